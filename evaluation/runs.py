"""Long runs over many items: shared between processes, killed at any moment, continued later, nothing lost or doubled.

A journal has one JSON object per line, on disk before the next batch begins. Each process writes one of its own; a
later run, with any number of processes, skips what the journals hold. At the end they become `predictions.jsonl`, in
the order of the items.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from huggingface_hub.utils import tqdm


SETTINGS_FILE, PREDICTIONS_FILE = "run.json", "predictions.jsonl"
_PARTS = "part-*.jsonl"
_T = TypeVar("_T")


def process_state() -> PartialState:
    """Which of how many processes this is, on CPUs if there is no accelerator."""
    return PartialState(cpu=not torch.accelerator.is_available())


def run_items(
    ids: Sequence[str],
    answer: Callable[[list[int]], list[dict]],
    folder: str | Path,
    settings: dict,
    batch_size: int = 1,
    unit: str = "question",
    redo: Callable[[dict], bool] | None = None,
) -> list[dict]:
    """Call `answer` for all items, each once.

    Under `accelerate launch` every process calls this with the same arguments; they must share the file system.

    Args:
        ids: what the items are called, each differently.
        answer: gets the places in `ids` of at most `batch_size` items and returns a JSON-able record for each, with its
            "id".
        folder: where the files are; made if it does not exist.
        settings: JSON-able; all that the records depend on. A folder whose run had other settings is refused.
        batch_size: items at a time.
        unit: what the progress counts.
        redo: which records of an earlier call are made anew. If it is given, items may come and go between calls:
            records of those that are gone are left out.

    Returns:
        The records of all items in the order of `ids`, in every process.

    Raises:
        ValueError: before anything is done, if ids are not unique, `batch_size` is below 1, `folder` holds a run with
            other settings or items or records that cannot be read, or another run is using it.
        Exception: what `answer` raises; the other processes raise a RuntimeError that names it. Finished items stay.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; allowed are whole numbers of at least 1.")
    repeated = next((item for item, count in Counter(ids).items() if count > 1), None)
    if repeated is not None:
        raise ValueError(f"`ids` holds {repeated!r} more than once; each item needs its own id.")
    known = set(ids)
    folder, state = Path(folder), process_state()
    if redo is None:
        digest = hashlib.sha256("\n".join(ids).encode()).hexdigest()
        settings = {**settings, "num_items": len(ids), "items_sha256": digest}
    settings = json.loads(json.dumps(settings))  # as it will be read again

    def prepare() -> None:
        if state.is_main_process:
            held.enter_context(locked(folder))
            _check_settings(folder, settings)
            for part in folder.glob(_PARTS):
                cut_torn_line(part)

    def answer_own() -> None:
        batches = []
        for start in range(0, len(ids), batch_size):
            batch = [*range(start, min(start + batch_size, len(ids)))]
            # Whole, wherever the last run stopped: what shares a forward pass decides the last digits.
            if not all(ids[place] in done for place in batch):
                batches.append(batch)
            elif redo and (again := [place for place in batch if redo(done[ids[place]])]):
                batches.append(again)
        own = batches[state.process_index :: state.num_processes]
        label = f"process 1 of {state.num_processes}" if state.num_processes > 1 else None
        total = sum(map(len, own))
        with tqdm(total=total, unit=unit, desc=label, disable=not state.is_main_process) as progress:
            for batch in own:
                records = answer(batch)
                if len(records) != len(batch):
                    raise RuntimeError(f"{len(batch)} items gave {len(records)} records.")
                append_lines(folder / f"part-{state.process_index:05}.jsonl", records)
                progress.update(len(batch))

    def put_together() -> None:
        if state.is_main_process:
            done = _read_done(folder, known, redo)
            replace_file(folder / PREDICTIONS_FILE, "".join(json.dumps(done[item]) + "\n" for item in ids))
            for part in folder.glob(_PARTS):
                part.unlink()

    with ExitStack() as held:
        _all_do(prepare, state)
        done = _all_do(lambda: _read_done(folder, known, redo), state)  # no process writes before all have read
        _all_do(answer_own, state)
        _all_do(put_together, state)
        done = _read_done(folder, known, redo)
        return [done[item] for item in ids]


def _all_do(work: Callable[[], _T], state: PartialState) -> _T:
    """What `work()` returns. If it raises in one process all processes raise, so that none waits for that one.

    No process returns before all have done it.
    """
    result = error = None
    try:
        result = work()
    except Exception as raised:
        error = raised
    failure = None if error is None else f"{type(error).__name__}: {error}"
    messages = gather_object([failure]) if state.num_processes > 1 else []
    if error is not None:
        raise error
    for number, message in enumerate(messages, start=1):
        if message is not None:
            raise RuntimeError(f"process {number} of {state.num_processes} failed: {message}")
    return result


def _check_settings(folder: Path, settings: dict) -> None:
    file = folder / SETTINGS_FILE
    if not file.exists():
        left = [path.name for path in (folder / PREDICTIONS_FILE, *folder.glob(_PARTS)) if path.exists()]
        if left:
            raise ValueError(f"The folder {str(folder)!r} holds {left} but no {SETTINGS_FILE}; choose another.")
        replace_file(file, json.dumps(settings, indent=2) + "\n")
        return
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(file)!r} cannot be read: {error}") from None
    differing = list(_differences(earlier, settings))
    if differing:
        shown = "; ".join(f"{name}: {there!r} there, {here!r} here" for name, there, here in differing)
        raise ValueError(f"The folder {str(folder)!r} holds a run with other settings ({shown}); choose another.")


def _differences(there: dict, here: dict, within: str = "") -> Iterator[tuple[str, object, object]]:
    """Names and both values of what differs, for dicts in dicts as `name.name`."""
    for name in sorted({*there, *here}):
        values = there.get(name), here.get(name)
        if all(isinstance(value, dict) for value in values):
            yield from _differences(*values, within=f"{within}{name}.")
        elif values[0] != values[1]:
            yield f"{within}{name}", *values


def _read_done(folder: Path, known: set[str], redo: Callable[[dict], bool] | None) -> dict[str, dict]:
    done = {}
    for file in (folder / PREDICTIONS_FILE, *sorted(folder.glob(_PARTS))):
        for number, record in read_lines(file, "id"):
            if record["id"] not in known and redo is not None:
                continue
            if record["id"] not in known:
                raise ValueError(f"{str(file)!r} has a record of {record['id']!r} at line {number}, which is no item.")
            # Killed while the parts were being put together, it is there twice; made anew, the last one counts.
            if record["id"] not in done or (redo and redo(done[record["id"]])):
                done[record["id"]] = record
    return done


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder and keep other runs out of it.

    Raises:
        ValueError: if another run is using it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"In the folder {str(folder)!r} another run is at work; wait for it or choose another folder."
        ) from None
    with lock:
        yield


def read_lines(journal: Path, key: str) -> Iterator[tuple[int, dict]]:
    """Line numbers and objects of a journal; none if there is no file.

    Raises:
        ValueError: naming the line, if it is no JSON object with a text at `key`.
    """
    for number, line in enumerate(journal.read_bytes().splitlines() if journal.exists() else (), start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not isinstance(record.get(key), str):
            raise ValueError(f"{str(journal)!r} has no record with {key!r} at line {number}.")
        yield number, record


def append_lines(journal: Path, records: Iterable[dict]) -> None:
    """Add lines to a journal; they are on disk afterwards."""
    with journal.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())


def cut_torn_line(journal: Path) -> None:
    """Remove the line in which a killed process was interrupted; its item is done again."""
    with journal.open("rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def replace_file(file: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all."""
    unfinished = file.with_suffix(".new")
    with unfinished.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    unfinished.replace(file)


__all__ = [
    "PREDICTIONS_FILE", "SETTINGS_FILE", "append_lines", "cut_torn_line", "locked", "process_state", "read_lines",
    "replace_file", "run_items",
]  # fmt: skip
