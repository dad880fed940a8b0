"""The notebooks: each runs on the demo model, and what is stored in it is what its cells give.

`make notebooks` executes them and stores their outputs. Cells with the tag `varies` train or measure seconds: of their
outputs the words are compared, not the numbers or pictures, but for the tables of those with the tag `scores`, which
show what a training taught.
"""

import base64
import hashlib
import io
import os
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image


FOLDER = Path(__file__).parents[1] / "notebooks"
FILES = sorted(FOLDER.glob("*.ipynb"))
QUICK = "quick_start"
NUMBER = r"\s*-?\d[\d.,]*(?:e[+-]?\d+)?\s*"
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def opened(picture: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(picture)))


def digest(notebook) -> str:
    return hashlib.sha256("\0".join(cell.source for cell in code_cells(notebook)).encode()).hexdigest()[:16]


def smaller(picture: str) -> str:
    """A picture in at most 128 colours, which take a fraction of the bytes."""
    written = io.BytesIO()
    opened(picture).convert("RGB").quantize(128, Image.Quantize.FASTOCTREE).save(written, "PNG", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


def executed(file: Path, folder: Path):
    """The notebook with the outputs of a new kernel, without what differs from run to run: progress, warnings, times
    and addresses of objects."""
    notebook = nbformat.read(file, as_version=4)
    NotebookClient(
        notebook, timeout=1800, kernel_name="python3", record_timing=False, coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    ).execute()  # fmt: skip
    for cell in code_cells(notebook):
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for data in (output.data for output in cell.outputs if "data" in output):
            if {"image/png", "text/html"} & data.keys():
                data.pop("text/plain", None)
                data.pop("image/jpeg", None)
            if "image/png" in data:
                data["image/png"] = smaller(data["image/png"])
    notebook.metadata = {**KERNEL, "lladamedv": {"executed": digest(notebook)}}
    return notebook


def shown(cell) -> list[dict[str, str]]:
    """The outputs of a cell by kind; a picture as whether there is one."""
    outputs = [{"text/plain": each.text} if each.output_type == "stream" else dict(each.data) for each in cell.outputs]
    varies = "varies" in cell.metadata.get("tags", ())
    return [
        {
            kind: "" if kind == "image/png" else re.sub(NUMBER, "#", text) if varies else text
            for kind, text in output.items()
        }
        for output in outputs
    ]


def scores(cell) -> list[float]:
    """The numbers of its table, for a cell that shows how many answers are right."""
    texts = [each.data["text/html"] for each in cell.outputs if "scores" in cell.metadata.get("tags", ())]
    return [float(number) for text in texts for number in re.findall(r"<td>([\d.]+)</td>", text)]


def thumbnails(cell) -> list[np.ndarray]:
    """Small grey pictures: fonts and rounding do not count."""
    if "varies" in cell.metadata.get("tags", ()):
        return []
    pictures = [each.data["image/png"] for each in cell.outputs if "image/png" in each.get("data", ())]
    return [np.asarray(opened(picture).convert("L").resize((32, 32)), dtype=float) for picture in pictures]


@pytest.mark.parametrize(
    "file",
    [pytest.param(file, id=file.stem, marks=[] if file.stem == QUICK else pytest.mark.slow) for file in FILES],
)
def test_what_is_stored_is_what_a_run_gives(file, tmp_path):
    notebook = executed(file, tmp_path)
    if "UPDATE_NOTEBOOKS" in os.environ:
        nbformat.write(notebook, file)
    for stored, new in zip(code_cells(nbformat.read(file, as_version=4)), code_cells(notebook)):
        assert shown(stored) == shown(new), new.source
        assert scores(new) == pytest.approx(scores(stored), abs=8), new.source  # of 80 or 100
        for before, now in zip(thumbnails(stored), thumbnails(new)):
            assert np.abs(before - now).mean() < 3, new.source


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_notebooks_are_fit_to_be_read(file):
    """Executed as they stand, in order, without an error, and free of what tells about a machine."""
    text = file.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata["lladamedv"]["executed"] == digest(notebook), f"`make notebooks` is needed for {file.name}"
    assert [cell.execution_count for cell in code_cells(notebook)] == [*range(1, len(code_cells(notebook)) + 1)]
    assert {output.output_type for cell in code_cells(notebook) for output in cell.outputs} <= {
        "stream", "display_data", "execute_result"
    }  # fmt: skip
    plain = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|usr|Users)/|0x[0-9a-f]{6}", plain)
    assert "8B" in "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def test_the_notebooks_are_small():
    assert sum(file.stat().st_size for file in FILES) < 1e6
