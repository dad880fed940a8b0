"""An explanation says what `generate` says of itself, in HTML and as pixels, and tells nothing else."""

import base64
import io
import json
import math
import re
import resource
from itertools import groupby

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from typer.testing import CliRunner

from lladamedv.cli import app
from lladamedv.conversation import DEMO_NOTICE, MASK, Token, find_evidence, reply_to
from lladamedv.evidence import draw_evidence, evidence_legend
from lladamedv.explanation import Explanation, draw_explanation, explain_answer, image_as_url, to_html
from lladamedv.processing.phantoms import PhantomVQA
from tests.faces import generated
from tests.html_pages import Page


ATTACK = "<img src=x onerror=alert(1)></span><script>alert(2)</script> \"'&amp; \x1b[2J \u202e"
EMPTY, EDGE = (0xE6, 0xE9, 0xEE), (0x0B, 0x53, 0x94)  # of masks, and around what a step committed
OPTIONS = [
    {},
    {"confidence_threshold": 0.9},
    {"use_cache": True, "block_length": 24, "steps": 6},
    {"initial_canvas_length": 8},
    {"generation_suffix": " Answer ends."},
    {"stop_strings": [" on the"]},
    {"suppress_tokens": [], "min_new_tokens": 24},
]


@pytest.fixture(scope="module")
def example():
    return PhantomVQA(9000, 60, ("description",))[15]


def squeeze(text):
    return re.sub(r"\s", "", text)


@pytest.fixture(scope="module", params=OPTIONS, ids=str)
def told(request, shipped, example):
    """An explanation; text, step and confidence of each token by `generate`'s own account; and how many passes."""
    explanation = explain_answer(*shipped, example.image, example.question, **request.param)
    truth = generated(shipped, example.image, example.question, **request.param)
    return explanation, truth.tokens, len(truth.output.history)


def test_tokens_are_those_of_generate(told):
    explanation, expected, passes = told
    assert [(token.text or "end", token.step, token.confidence) for token in explanation.tokens] == expected
    assert explanation.num_forwards == passes
    sure = [confidence for _, _, confidence in expected if confidence is not None]
    assert explanation.confidence == pytest.approx(math.exp(sum(map(math.log, sure)) / len(sure)), rel=1e-6)


def test_html_is_what_happened(told):
    explanation, expected, passes = told
    text = to_html(explanation)
    page = Page(text)
    committed = [row for row in expected if row[1] is not None]
    bounds = [0.9, 0.7, 0.5, 0.0]
    spans = [(found, "".join(text)) for _, found, text in page.elements if "title" in found]
    assert [(found["title"], found["class"], text) for found, text in spans] == [
        (f"step {step}, confidence {sure:.1%}", f"token level-{next(i for i in range(4) if sure >= bounds[i])}",
         f"{text}{step}") for text, step, sure in committed
    ]  # fmt: skip
    assert squeeze("".join(page.texts("p", "answer"))) == squeeze(
        "".join(text if step is None else f"{text}{step}" for text, step, _ in expected)
    )

    rows = text.split('<th scope="row">')[1:]
    assert len(rows) == passes + 1
    for step, row in enumerate(rows):
        number, masks, canvas = re.match("(.*?)</th><td>(.*?)</td>(<td>.*?</td>)", row, re.DOTALL).groups()
        texts = [MASK if when is None or when > step else text for text, when, _ in expected]
        new = "".join(text for text, when, _ in expected if when == step)
        assert (int(number), int(masks)) == (step, texts.count(MASK))
        assert squeeze("".join(Page(canvas).texts("td"))) == squeeze("".join(texts))
        assert squeeze("".join(Page(canvas).texts("b"))) == squeeze(new)
    assert page.texts("td")[2 * len(rows) :] == [
        cell for text, step, sure in committed for cell in (text, str(step), f"{sure:.1%}")
    ]


def runs(pixels, color):
    """How many separate runs of a colour there are in a line of pixels."""
    return sum(key for key, _ in groupby((pixels == color).all(axis=-1).tolist()))


def test_picture_shows_what_happened(told):
    """Cells are counted in the pixels: grey ones are masks, and a framed one has an edge on both sides."""
    explanation, expected, passes = told
    pixels = np.asarray(draw_explanation(explanation, scale=2))
    assert pixels.shape[1] == 2000
    left = next(x for x in range(400, 800) if (pixels[:, x] == EMPTY).all(axis=-1).sum() > 20)  # of the first column
    filled = (pixels[:, left + 3] != 255).any(axis=-1)
    changes = np.flatnonzero(np.diff(filled.astype(int))) + 1
    tops = [top for top, bottom in zip(changes[::2], changes[1::2]) if bottom - top > 30]
    lines, rest = divmod(len(tops), passes + 1)  # of cells, for each canvas
    assert lines in (1, 2) and rest == 0
    for step in range(passes + 1):
        # Above the words, where cells have nothing but their colour.
        strips = [pixels[top + 6, left - 2 :] for top in tops[lines * step : lines * (step + 1)]]
        masks, framed = (sum(runs(strip, color) for strip in strips) for color in (EMPTY, EDGE))
        assert masks == sum(when is None or when > step for _, when, _ in expected)
        assert framed == 2 * sum(when == step for _, when, _ in expected)


def test_html_needs_and_tells_nothing_else(shipped, example):
    image = example.image.resize((900, 700))
    image.info.update({"comment": "SECRET", "dpi": (72, 72)})
    text = to_html(explain_answer(*shipped, image, example.question, image_steps=["window 40/400 & more"]))
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>") and dict(page.elements[0][1]) == {"lang": "en"}
    assert not {"script", "link", "a", "iframe", "object"} & page.tags
    assert not re.search(r"https?:|url\(|@import|SECRET", text) and 'charset="utf-8"' in text
    (image_attributes,) = [attributes for tag, attributes, _ in page.elements if tag == "img"]
    assert image_attributes["alt"] == "The image asked about, 900 by 700 pixels"
    kind, _, data = image_attributes["src"].partition(",")
    assert kind == "data:image/png;base64"
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert shown.size == (640, 498) and not shown.info
    assert np.abs(np.asarray(shown, float) - np.asarray(image.resize(shown.size), float)).mean() < 5
    headers = [attributes["scope"] for tag, attributes, _ in page.elements if tag == "th"]
    assert headers.count("col") == 6 and headers.count("row") >= 20
    assert "Not a medical device" in text and "window 40/400 & more" in "".join(page.texts("figcaption"))
    assert "max_new_tokens = 24\nblock_length = 8\nsteps = 24" in page.texts("dd")[3]
    assert page.texts("dd")[:2] == [example.question, example.answer]


@pytest.fixture
def hostile():
    """As no model answers: markup, controls, white space, a long token, other scripts, and more steps than fit."""
    texts = [ATTACK, "\n", " ", "-" * 400, "лёгкие", " 3 µm"] * 30
    tokens = tuple(Token(text, 1 + 7 * index % 180, 0.01 + index / 181) for index, text in enumerate(texts))
    return Explanation(
        image=Image.new("L", (20, 600)),
        question=ATTACK + "\n\n" + "W" * 3_000,
        image_steps=[ATTACK],
        text=ATTACK * 50,
        confidence=None,
        tokens=(*tokens, Token(MASK, None, None), Token(None, 256, 0.5)),
        length=181,
        num_forwards=256,
        abstained=True,
        suffix=ATTACK,
        options={"max_new_tokens": 256, "block_length": 64, "steps": 256, "stop_strings": [ATTACK]},
    )


def test_nothing_that_is_said_acts(hostile):
    text = to_html(hostile)
    page = Page(text)
    assert len(page.texts("img")) == 1 and not page.texts("script")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    assert page.texts("dd")[1] == (ATTACK * 50).replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")


def test_pictures_of_long_answers_stay_small(hostile):
    picture = draw_explanation(hostile, scale=1)
    assert picture.width == 1000 and picture.height < 10_000
    assert len(picture.getcolors(1 << 24)) > 10


@pytest.mark.parametrize("name", ["denoising.html", "denoising.PNG"])
def test_files(hostile, tmp_path, name):
    file = tmp_path / name
    file.write_text("before")
    hostile.save(file)
    if file.suffix == ".html":
        assert file.read_text(encoding="utf-8") == to_html(hostile)
    else:
        picture = Image.open(file)
        assert isinstance(picture, PngImagePlugin.PngImageFile) and picture.size[0] == 2000 and not picture.info
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("denoising.pdf", r"its name must end in \.html or \.png"),
        ("no/such/file.html", "there is no folder '.*such'"),
        ("folder.html", "it is a folder"),
    ],
)
def test_files_that_cannot_be_written(hostile, tmp_path, name, reason):
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ValueError, match=f"The file '.*{name}' cannot be written: {reason}"):
        hostile.save(tmp_path / name)


@pytest.mark.parametrize("name", ["denoising.html", "denoising.png"])
def test_a_full_disk_leaves_what_was_there(hostile, tmp_path, name):
    """The limit of the size of files stands for the disk's end."""
    (tmp_path / name).write_text("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ValueError, match=f"{name}' cannot be written: File too large"):
            hostile.save(tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "before")]


def test_ask(shipped, example, tmp_path):
    """The command says what it always says, and writes a file that does not name the picture's."""
    picture, file = tmp_path / "SECRET_NAME.png", tmp_path / "denoising.html"
    example.image.save(picture)
    words = ["ask", str(picture), example.question, "--confidence-threshold", "0.9", "--json"]
    plain = CliRunner().invoke(app, words)
    result = CliRunner().invoke(app, [*words, "--explain", str(file), "--where", str(tmp_path / "map.png")])
    assert result.exit_code == 0 and result.stdout == plain.stdout
    reply = reply_to(*shipped, example.image, example.question, confidence_threshold=0.9)
    found = find_evidence(*shipped, example.image, example.question, reply)
    np.testing.assert_array_equal(Image.open(tmp_path / "map.png"), draw_evidence(example.image, *found))
    text = file.read_text(encoding="utf-8")
    assert "SECRET_NAME" not in text and str(tmp_path) not in text
    assert image_as_url(example.image, found) in text
    assert {line for _, line in evidence_legend(*found)} < {
        item.strip().split(": ")[-1] for item in Page(text).texts("li")
    }
    assert "confidence_threshold = 0.9" in Page(text).texts("dd")[3]

    assert DEMO_NOTICE in Page(text).texts("p", "note")[0] and json.loads(plain.stdout)["notice"] == DEMO_NOTICE
