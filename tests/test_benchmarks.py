"""The benchmarks run, and the plain versions that they measure against give what ours give."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(name, folder):
    """What a benchmark prints, and the results that it writes."""
    results = folder / "results.json"
    options = ["--size", "tiny", "--repeats", "1", "--threads", "1"]  # other tests run beside it
    command = [sys.executable, BENCHMARKS / name, *options, "--json", results]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, json.loads(results.read_text())


def test_generation_benchmark(tmp_path):
    printed, results = run("bench_generation.py", tmp_path)
    rows = {row["mode"]: row for row in results["rows"]}
    assert rows["exact"]["agreement"] == 1.0 and rows["exact"]["forwards"] == rows["naive"]["forwards"] == 16
    assert rows["quarter of the steps"]["tokens_per_forward"] == 4.0
    assert all(row["seconds"] > 0 for row in rows.values()) and len(printed.splitlines()) == len(rows)


def test_training_benchmark(tmp_path):
    """Our step gives the plain one's loss and gradients, checkpointed or not, whole or in halves."""
    _, results = run("bench_training.py", tmp_path)
    assert results["gradient_difference"] < 1e-5
    losses = {name: mode["loss"] for name, mode in results["modes"].items()}
    assert losses["ours"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["ours, checkpointed"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["ours, accumulated"] == pytest.approx(losses["plain"], rel=1e-5)
    assert all(mode["seconds"] > 0 for mode in results["modes"].values())
