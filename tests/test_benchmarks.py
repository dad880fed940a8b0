"""The benchmarks run, and the plain versions that they measure against give what ours give."""

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(name, folder):
    """What a benchmark prints, and the results that it writes."""
    results = folder / "results.json"
    options = ["--size", "tiny", "--repeats", "1", "--threads", "1"]  # other tests run beside it
    command = [sys.executable, BENCHMARKS / name, *options, "--json", results]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, json.loads(results.read_text())


@pytest.mark.slow
def test_generation_benchmark(tmp_path):
    printed, results = run("bench_generation.py", tmp_path)
    rows = {row["mode"]: row for row in results["rows"]}
    assert rows["exact"]["agreement"] == 1.0 and rows["exact"]["forwards"] == rows["naive"]["forwards"] == 16
    assert rows["quarter of the steps"]["tokens_per_forward"] == 4.0
    assert all(row["seconds"] > 0 for row in rows.values()) and len(printed.splitlines()) == len(rows)


@pytest.mark.slow
def test_training_benchmark(tmp_path):
    """Our step gives the plain one's loss and gradients, checkpointed or not, whole or in halves."""
    _, results = run("bench_training.py", tmp_path)
    assert results["gradient_difference"] < 1e-5
    losses = {name: mode["loss"] for name, mode in results["modes"].items()}
    assert losses["ours"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["ours, checkpointed"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["ours, accumulated"] == pytest.approx(losses["plain"], rel=1e-5)
    assert all(mode["seconds"] > 0 for mode in results["modes"].values())


@pytest.mark.slow
def test_alignment_benchmark(tmp_path):
    """Draws in one pass and in passes of their own give one loss."""
    _, results = run("bench_alignment.py", tmp_path)
    losses = {name: mode["loss"] for name, mode in results["modes"].items()}
    for name in ("dpo", "short dpo"):
        assert losses[f"{name}, 8 draws"] == pytest.approx(losses[f"{name}, 8 passes"], rel=1e-5)
        assert abs(losses[f"{name}, 8 draws"] - math.log(2)) > 1e-3
    assert all(mode["seconds"] > 0 for mode in results["modes"].values())


def write_slake(folder, boxes):
    """A miniature of SLAKE's folder: one picture with its boxes, its mask and questions, one of which names no box."""
    picture = folder / "imgs" / "xmlab7"
    picture.mkdir(parents=True)
    image, mask = Image.new("RGB", (80, 60), (40, 40, 40)), Image.new("RGB", (80, 60))
    image.paste((220, 220, 220), (20, 15, 30, 25))
    mask.paste((7, 7, 7), (20, 15, 30, 25))
    image.save(picture / "source.jpg")
    mask.save(picture / "mask.png")
    (picture / "detection.json").write_text(json.dumps(boxes))
    asked = [("Is there a liver?", "Yes", "CLOSED"), ("Which organ?", "Liver", "OPEN"), ("Which side?", "Left", "OPEN")]
    common = {"img_id": 7, "img_name": "xmlab7/source.jpg", "q_lang": "en", "content_type": "Organ", "modality": "CT"}
    records = [
        common | {"qid": number, "question": question, "answer": answer, "answer_type": kind}
        for number, (question, answer, kind) in enumerate(asked)
    ]
    (folder / "test.json").write_text(json.dumps(records))


def play(monkeypatch, folder, *options):
    """The game in this process."""
    results = folder / "game.json"
    monkeypatch.setattr(sys, "argv", ["", "--slake", str(folder), "--json", str(results), *options])
    runpy.run_path(str(BENCHMARKS / "pointing_game.py"), run_name="__main__")
    return json.loads(results.read_text())


def test_the_pointing_game_on_slake(tmp_path, monkeypatch, own_cache):
    write_slake(tmp_path, [{"Liver": [16, 12, 20, 16]}, {"Spleen": [0, 0, 5, 5]}])
    for game in play(monkeypatch, tmp_path, "--curves", "1", "--cells", "4", "--max-rows", "60").values():
        assert game["questions"] == 2 and list(game["by_topic"]) == ["Organ"]
        # Of 3 by 4 cells of 20 by 20 pixels, what is marked in the box touches two.
        assert game["chance"] == pytest.approx(2 / 12) and 0 <= game["deletion"] <= 1
        assert game["hit"] in (0, 0.5, 1) and game["rows"] <= 60


def test_boxes_that_leave_the_picture(tmp_path, monkeypatch, own_cache):
    write_slake(tmp_path, [{"Liver": [60, 40, 30, 10]}])
    with pytest.raises(ValueError, match=r"has the box \[60, 40, 30, 10\], which leaves the picture"):
        play(monkeypatch, tmp_path)
