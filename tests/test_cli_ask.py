"""`lladamedv ask` about files that are not plain pictures."""

import base64
import json
import re

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from lladamedv.cli import app
from lladamedv.conversation import DEMO_NOTICE
from lladamedv.demo import answer, load_model
from lladamedv.processing.phantoms import PhantomVQA
from tests.dicom_files import SECRET, dataset, to_bytes
from tests.faces import medical_files


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
    lines = result.stderr.splitlines()
    assert result.exit_code == 0 and lines[0].startswith("image: ") and "bone" in lines[0]
    assert lines[1:] == [DEMO_NOTICE] and given["notice"] == DEMO_NOTICE


def test_options_of_generate(example, tmp_path):
    example, expected = example
    file = tmp_path / "picture.png"
    example.image.save(file)
    assert call(file, example.question, "--steps", 24, "--confidence-threshold", 0.9).stdout.strip() == expected
    assert call(file, example.question, "--option", "steps=24", "--use-cache").stdout.strip() == expected
    result = call(file, example.question, "--output-image-reliance", "--json")
    assert json.loads(result.stdout)["image_reliance"] > 1
    result = call(file, example.question, "--output-image-reliance")
    assert result.stdout.strip() == expected and re.search(r"^image reliance: \+\d+\.\d\d nats$", result.stderr, re.M)


@pytest.mark.parametrize(
    ("name", "words", "steps"),
    [
        ("burned.dcm", ["--allow-burned-in"], []),
        ("burned.dcm", ["--allow-burned-in", "--full-range"], ["0"]),
        (
            "series.nii", ["--time", 1, "--axis", "coronal", "--slice", 2, "--window", "40/400"],
            ["coronal", "2 of", "1 of 3"],
        ),
        ("pages.tif", ["--page", 1, "--background", "#102030"], ["page 1 of 2"]),
    ],
)  # fmt: skip
def test_every_option_of_the_reader(tmp_path, name, words, steps):
    result = call(medical_files(tmp_path) / name, "What?", *words, "--json")
    assert result.exit_code == 0, result.stderr
    said = " ".join(json.loads(result.stdout)["image"])
    assert all(step in said for step in steps), said


def test_a_url_is_read_as_the_file(example, tmp_path):
    """Also with options, and what was done to it is told: a 16-bit picture was shown without a word."""
    file = tmp_path / "grey.png"
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16).save(file)
    url = f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
    other = f" DATA:;base64,{base64.urlsafe_b64encode(file.read_bytes()).decode().rstrip('=')}"
    for words in ([], ["--full-range"]):
        here, *there = (json.loads(call(source, "What?", *words, "--json").stdout) for source in (file, url, other))
        assert there == [here, here] and here["image"]
    result = call("http://localhost:1/x.png", "What?")
    assert result.exit_code == 1 and "'http://localhost:1/x.png' is a URL that cannot be fetched" in result.stderr
