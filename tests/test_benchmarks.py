"""The benchmark of `generate` runs, and the plain loop that it measures against gives what exact decoding gives."""

import json
import subprocess
import sys
from pathlib import Path


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_generation_benchmark(tmp_path):
    results = tmp_path / "results.json"
    command = [
        sys.executable,
        BENCHMARKS / "bench_generation.py",
        "--size",
        "tiny",
        "--repeats",
        "1",
        "--json",
        results,
    ]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = {row["mode"]: row for row in json.loads(results.read_text())["rows"]}
    assert rows["exact"]["agreement"] == 1.0 and rows["exact"]["forwards"] == rows["naive"]["forwards"] == 16
    assert rows["quarter of the steps"]["tokens_per_forward"] == 4.0
    assert all(row["seconds"] > 0 for row in rows.values()) and len(run.stdout.splitlines()) == len(rows)
