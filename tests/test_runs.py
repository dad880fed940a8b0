"""Long runs: every item once, whatever is killed, and however many processes share the work."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lladamedv.evaluation.runs import run_items


ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def start(*arguments, processes=1, **options):
    launch = [sys.executable]
    if processes > 1:  # `accelerate launch` starts one process where there is no GPU
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launch, str(ROOT / "tests" / "runs_worker.py"), *map(str, arguments)]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, **options)


def finish(process):
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-3000:]


def squares(places):
    return [{"id": str(place), "square": place**2} for place in places]


def test_order_batches_and_files(tmp_path):
    batches = []

    def answer(places):
        batches.append(places)
        return squares(places)

    records = run_items([str(place) for place in range(7)], answer, tmp_path / "run", {"steps": 4}, batch_size=3)
    assert batches == [[0, 1, 2], [3, 4, 5], [6]]
    assert records == squares(range(7))
    assert [json.loads(line) for line in (tmp_path / "run/predictions.jsonl").open()] == records
    assert json.loads((tmp_path / "run/run.json").read_text())["steps"] == 4
    assert not list((tmp_path / "run").glob("part-*"))
    again = run_items([str(place) for place in range(7)], lambda places: 1 / 0, tmp_path / "run", {"steps": 4})
    assert again == records


@pytest.mark.parametrize("items", [5, 1])
def test_two_processes_share_the_items(tmp_path, items):
    finish(start(tmp_path / "run", items, 2, processes=2))
    records = [json.loads(line) for line in (tmp_path / "run/predictions.jsonl").open()]
    assert records == [{"id": f"item-{place}", "square": place**2} for place in range(items)]
    asked = [line.split() for line in (tmp_path / "asked.txt").read_text().splitlines()]
    assert sorted(place for place, _ in asked) == [str(place) for place in range(items)]
    assert len({process for _, process in asked}) == min(items, 2)


def test_no_process_waits_for_one_that_failed(tmp_path):
    """All end with an error, in seconds and not when a timeout of the process group comes; what is done is kept."""
    process = start(tmp_path / "run", 6, 1, 0, 3, processes=2)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "OSError: no answer to 3" in errors
    assert "RuntimeError: process 2 of 2 failed: OSError: no answer to 3" in errors
    asked = [line.split()[0] for line in (tmp_path / "asked.txt").read_text().splitlines()]

    def answer(places):
        asked.extend(map(str, places))
        return [{"id": f"item-{place}", "square": place**2} for place in places]

    run_items([f"item-{place}" for place in range(6)], answer, tmp_path / "run", {"a": 1})
    assert sorted(asked) == [*"012345"]  # none twice


@pytest.mark.slow
def test_no_process_waits_for_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "run").write_text("a file")
    process = start(tmp_path / "run", 2, 1, processes=2)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "process 1 of 2 failed: FileExistsError" in errors


def test_killed_runs_go_on(tmp_path):
    """Killed twice at random moments, then finished by two processes: at most one batch a kill is done twice."""
    kills, batch, items = 2, 2, 40
    for seed in range(kills):
        process = start(tmp_path / "run", items, batch, 0.05)
        deadline = time.monotonic() + 60
        asked = tmp_path / "asked.txt"
        before = asked.stat().st_size if asked.exists() else 0
        while not asked.exists() or asked.stat().st_size == before:  # it has got to work
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        time.sleep(random.Random(seed).uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (tmp_path / "run/predictions.jsonl").exists()
    finish(start(tmp_path / "run", items, batch, processes=2))
    records = [json.loads(line) for line in (tmp_path / "run/predictions.jsonl").open()]
    assert records == [{"id": f"item-{place}", "square": place**2} for place in range(items)]
    asked = [line.split()[0] for line in asked.read_text().splitlines()]
    assert set(asked) == {str(place) for place in range(items)}
    assert len(asked) <= items + kills * batch


def test_a_torn_line_is_done_anew(tmp_path):
    folder, ids, asked = tmp_path / "run", ["a\u2028b", "c", "d"], []  # a line separator, but not of JSON lines

    def answer(places):
        asked.extend(places)
        if asked == [0, 1, 2]:
            raise OSError("no more")
        return [{"id": ids[place], "n": place} for place in places]

    with pytest.raises(OSError, match="no more"):
        run_items(ids, answer, folder, {})
    part = folder / "part-00000.jsonl"
    part.write_bytes(part.read_bytes()[:-4])  # in the midst of the record of "c"
    asked.clear()
    assert [record["n"] for record in run_items(ids, answer, folder, {})] == [0, 1, 2]
    assert asked == [1, 2]


def test_what_is_refused_loses_nothing(tmp_path):
    folder, ids = tmp_path / "run", ["0", "1"]
    run_items(ids, squares, folder, {"steps": 4, "revision": None})
    kept = {file: file.read_bytes() for file in folder.iterdir()}
    for changed, settings, message in (
        (ids, {"steps": 8}, "steps: 4 there, 8 here"),
        (["0"], {"steps": 4}, r"other settings .*num_items: 2 there, 1 here"),
        (["1", "0"], {"steps": 4}, r"other settings .*items_sha256"),
        (["0", "0"], {"steps": 4}, "'0' more than once"),
    ):
        with pytest.raises(ValueError, match=message):
            run_items(changed, squares, folder, {**settings, "revision": None})
    with pytest.raises(ValueError, match="`batch_size` is 0"):
        run_items(ids, squares, folder, {}, batch_size=0)
    assert {file: file.read_bytes() for file in folder.iterdir()} == kept
    with pytest.raises(RuntimeError, match="2 items gave 1 records"):
        run_items(ids, lambda places: squares(places)[:1], tmp_path / "short", {}, batch_size=2)

    for line, message in (('{"id": "5"}', "'5' at line 1, which is no item"), ("[1]", "no record with 'id' at line 1")):
        (folder / "predictions.jsonl").write_text(line + "\n")
        with pytest.raises(ValueError, match=message):
            run_items(ids, squares, folder, {"steps": 4, "revision": None})
    (folder / "run.json").unlink()
    with pytest.raises(ValueError, match=r"holds .*predictions.jsonl.* but no run.json"):
        run_items(ids, squares, folder, {"steps": 4, "revision": None})


def test_one_run_at_a_time(tmp_path):
    process = start(tmp_path / "run", 40, 1, 0.2)
    try:
        while not (tmp_path / "asked.txt").exists():
            assert process.poll() is None
            time.sleep(0.05)
        with pytest.raises(ValueError, match="another run is at work"):
            run_items([f"item-{place}" for place in range(40)], squares, tmp_path / "run", {"a": 1})
    finally:
        process.kill()
        process.communicate()
