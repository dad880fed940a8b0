"""A process that cannot import this package: it has a model folder and Transformers, and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import torch


_PREFIX = """
import sys
from pathlib import Path
sys.path.append({site!r})
folder = Path(sys.argv[1])
try:
    import lladamedv
except ImportError:
    pass
else:
    raise SystemExit("the package is importable: this test shows nothing")
"""


def run_as_stranger(program: str, folder: Path, tmp_path: Path) -> None:
    """Run `program`, which finds the model's folder as `folder`, and fail with its error if it fails."""
    # -S and -I keep editable installs and this checkout out; the other packages are given by their folder.
    site = os.path.dirname(os.path.dirname(torch.__file__))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _PREFIX.format(site=site) + program, str(folder)], cwd=tmp_path,
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
