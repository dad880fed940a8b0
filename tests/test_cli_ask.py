"""`lladamedv ask` about files that are not plain pictures."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from lladamedv.cli import app
from lladamedv.demo import answer, load_model
from lladamedv.processing.phantoms import PhantomVQA
from tests.dicom_files import SECRET, dataset, to_bytes


@pytest.fixture(scope="module")
def example():
    """A question about a CT phantom, which is grey, and what the model says to the picture itself."""
    example = next(one for one in PhantomVQA(9000, 50, ["side"]) if one.attributes.domain == "ct")
    return example, answer(*load_model(), [example.messages()])[0]


def call(*words):
    return CliRunner().invoke(app, ["ask", *map(str, words)])


def test_dicom(example, tmp_path):
    """Stored as Hounsfield units with 10 for each grey level, in a window that shows just these."""
    example, expected = example
    grey = np.asarray(example.image)[..., 0]
    pixels = (10 * grey.astype(np.uint16) + 24).astype(np.uint16)  # 24 - 1024 = -1000 HU is black
    file = tmp_path / "slice"
    file.write_bytes(to_bytes(dataset(pixels, bits=12, RescaleSlope=1, RescaleIntercept=-1024)))
    result = call(file, example.question, "--window", "275/2550", "--json")
    assert result.exit_code == 0, result.output
    given = json.loads(result.stdout)
    assert given["answer"] == expected and 0 < given["confidence"] <= 1
    assert any("275" in step and "2550" in step for step in given["image"])
    assert SECRET not in result.output

    result = call(file, example.question, "--window", "bone")
    assert result.exit_code == 0 and result.stderr.startswith("image: ") and "bone" in result.stderr


def test_options_of_generate(example, tmp_path):
    example, expected = example
    file = tmp_path / "picture.png"
    example.image.save(file)
    options = ["--option", "steps=24", "--option", "confidence_threshold=0.9"]
    assert call(file, example.question, *options).stdout.strip() == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--frame", 2], "`frame` is 2, but `source` is a picture file"),
        (["--window", "long"], "`window` is 'long'"),
        (["--window", "1/x"], "`window` is '1/x'"),
        (["--window", "40/0"], "`window` is (40.0, 0.0)"),
        (["--option", "step=3"], "Unknown generation arguments ['step']"),
        (["--dtype", "int8"], "`dtype` is 'int8'"),
    ],
)
def test_bad_input(example, tmp_path, words, message):
    file = tmp_path / "picture.png"
    example[0].image.save(file)
    result = call(file, "What?", *words)
    assert result.exit_code == 1 and message in result.stderr and "Traceback" not in result.output
    assert str(tmp_path) not in result.stderr


def test_arguments_of_files_and_addresses():
    result = call("http://localhost:1/x.png", "What?", "--page", 3)
    assert result.exit_code == 1 and "`page` is 3; it is allowed for files only" in result.stderr
