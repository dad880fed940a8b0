"""Long runs over many items: shared between processes, killed at any moment, taken up again, nothing lost or doubled.

Each process appends what it has done to a file of its own, one line per item, on disk before the next batch begins. A
later run, with any number of processes, skips what those files hold. At the end they become `predictions.jsonl`, in
the order of the items.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from tqdm.auto import tqdm


SETTINGS_FILE, PREDICTIONS_FILE = "run.json", "predictions.jsonl"
_PARTS = "part-*.jsonl"
_T = TypeVar("_T")


def process_state() -> PartialState:
    """Which of how many processes this is; without an accelerator they are on CPUs, which has to be said."""
    return PartialState(cpu=not torch.accelerator.is_available())


def run_items(
    ids: Sequence[str],
    answer: Callable[[list[int]], list[dict]],
    folder: str | Path,
    settings: dict,
    batch_size: int = 1,
    unit: str = "question",
) -> list[dict]:
    """Do what `answer` does for all items, each once.

    Under `accelerate launch` every process calls this with the same arguments; they must share the file system.

    Args:
        ids: what the items are called, each differently.
        answer: gets the places in `ids` of at most `batch_size` items and returns a JSON-able record for each, with its
            "id".
        folder: where the files are; made if it is not there.
        settings: JSON-able; all that the records depend on. A folder whose run had other settings is refused.
        batch_size: items at a time.
        unit: what the progress bar calls an item.

    Returns:
        The records of all items in the order of `ids`, in every process.

    Raises:
        ValueError: before anything is done, if ids are not unique, `batch_size` is below 1, `folder` holds a run with
            other settings or items or records that cannot be read, or another run is using it.
        Exception: what `answer` raises, and in the other processes a RuntimeError that tells it. What is done is kept.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; allowed are whole numbers of at least 1.")
    seen, doubled = set(), []
    for item in ids:
        (doubled.append if item in seen else seen.add)(item)
    if doubled:
        raise ValueError(f"`ids` holds {doubled[0]!r} more than once; each item needs its own id.")
    folder, state = Path(folder), process_state()
    settings = {**settings, "num_items": len(ids), "items_sha256": hashlib.sha256("\n".join(ids).encode()).hexdigest()}
    settings = json.loads(json.dumps(settings))  # as it will be read again
    lock = FileLock(folder / ".lock")

    def prepare() -> None:
        if state.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise ValueError(
                    f"In the folder {str(folder)!r} another run is at work; wait for it or give another folder."
                ) from None
            _check_settings(folder, settings)
            for part in folder.glob(_PARTS):
                cut_torn_line(part)

    def answer_own(done: dict[str, dict]) -> None:
        pending = [place for place, item in enumerate(ids) if item not in done]
        own = pending[state.process_index :: state.num_processes]
        _run_own(own, answer, folder / f"part-{state.process_index:05}.jsonl", batch_size, unit, state)

    def put_together() -> None:
        if state.is_main_process:
            done = _read_done(folder, set(ids))
            lines = [json.dumps(done[item]) + "\n" for item in ids]
            replace_file(folder / PREDICTIONS_FILE, "".join(lines))
            for part in folder.glob(_PARTS):
                part.unlink()

    try:
        _all_do(prepare, state)
        done = _all_do(lambda: _read_done(folder, set(ids)), state)  # no process writes before all have read
        _all_do(lambda: answer_own(done), state)
        _all_do(put_together, state)
        done = _read_done(folder, set(ids))
        return [done[item] for item in ids]
    finally:
        lock.release()


def _all_do(work: Callable[[], _T], state: PartialState) -> _T:
    """What `work()` returns. If it raises in one process all processes raise, so that none waits for that one.

    No process returns before all have done it.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as raised:
        if state.num_processes == 1:
            raise
        error = raised
    errors = [None if error is None else f"{type(error).__name__}: {error}"]
    if state.num_processes > 1:
        errors = gather_object(errors)
    if error is not None:
        raise error
    for number, told in enumerate(errors):
        if told is not None:
            raise RuntimeError(f"process {number + 1} of {state.num_processes} failed: {told}")
    return result


def _run_own(places: list[int], answer, part: Path, batch_size: int, unit: str, state: PartialState) -> None:
    description = f"process 1 of {state.num_processes}" if state.num_processes > 1 else None
    with tqdm(total=len(places), unit=unit, desc=description, disable=not state.is_main_process) as progress:
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size]
            records = answer(batch)
            if len(records) != len(batch):
                raise RuntimeError(f"{len(batch)} items gave {len(records)} records.")
            with part.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
                file.flush()
                os.fsync(file.fileno())
            progress.update(len(batch))


def _check_settings(folder: Path, settings: dict) -> None:
    file = folder / SETTINGS_FILE
    if not file.exists():
        left = [path.name for path in (folder / PREDICTIONS_FILE, *folder.glob(_PARTS)) if path.exists()]
        if left:
            raise ValueError(f"The folder {str(folder)!r} holds {left} but no {SETTINGS_FILE}; give another.")
        replace_file(file, json.dumps(settings, indent=2) + "\n")
        return
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(file)!r} cannot be read: {error}") from None
    differing = list(_differences(earlier, settings))
    if differing:
        shown = "; ".join(f"{name}: {there!r} there, {here!r} here" for name, there, here in differing)
        raise ValueError(f"The folder {str(folder)!r} holds a run with other settings ({shown}); give another.")


def _differences(there: dict, here: dict, within: str = "") -> Iterator[tuple[str, object, object]]:
    """Names and both values of what differs, for dicts in dicts as `name.name`."""
    for name in sorted({*there, *here}):
        values = there.get(name), here.get(name)
        if all(isinstance(value, dict) for value in values):
            yield from _differences(*values, within=f"{within}{name}.")
        elif values[0] != values[1]:
            yield f"{within}{name}", *values


def cut_torn_line(part: Path) -> None:
    """Remove the line in which a killed process was interrupted; its item is done anew."""
    with part.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _read_done(folder: Path, known: set[str]) -> dict[str, dict]:
    done = {}
    for file in (folder / PREDICTIONS_FILE, *sorted(folder.glob(_PARTS))):
        if not file.exists():
            continue
        for number, line in enumerate(file.read_bytes().splitlines(), start=1):
            try:
                record = json.loads(line)
                item = record["id"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{str(file)!r} has no record with an id at line {number}.") from None
            if item not in known:
                raise ValueError(f"{str(file)!r} has a record of {item!r} at line {number}, which is no item here.")
            done.setdefault(item, record)  # killed while the parts were being put together, it is there twice
    return done


def replace_file(file: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all."""
    unfinished = file.with_suffix(".new")
    with unfinished.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    unfinished.replace(file)


__all__ = ["PREDICTIONS_FILE", "SETTINGS_FILE", "cut_torn_line", "process_state", "replace_file", "run_items"]
