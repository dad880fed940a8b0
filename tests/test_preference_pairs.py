"""Pairs that are built of a VQA data set: against what is right by hand, and read back for training."""

import json

import datasets
import numpy as np
import pytest
from typer.testing import CliRunner

from lladamedv.cli import app
from lladamedv.evaluation.preference_pairs import PAIRS_FILE, build_pairs
from lladamedv.loading import load_model
from lladamedv.processing.datasets import load_own_vqa, load_vqa
from lladamedv.processing.phantoms import PhantomVQA
from lladamedv.trainers.data import load_dataset_mixture
from tests.tiny import random_image


pytestmark = pytest.mark.usefixtures("own_cache")
SHORT = {"max_new_tokens": 4, "block_length": 4, "steps": 4, "temperature": 1.0}
# Image, question, true answer, and what other pictures say wrongly.
ASKED = [
    (0, "Which organ?", "liver", {"left lung", "right lung"}),
    (1, "Which organ?", "left lung", {"liver", "right lung", "Liver."}),  # "right lung" lacks a word
    (2, "which organ", "Liver.", {"left lung"}),  # not "right lung", which this picture shows, too
    (2, "Which organ?", "right lung", {"left lung", "liver"}),  # not "Liver.", of this picture
    (3, "Is it big?", "yes", set()), (4, "Is it big?", "Yes", set()),
    (4, "Where?", "the", None), (5, "Is it old?", "no", {"True, yes"}), (0, "Is it old?", "True, yes", {"no"}),
]  # fmt: skip


@pytest.fixture
def asked(tmp_path):
    for number in range(6):
        random_image(20 + number, 20, seed=number).save(tmp_path / f"{number}.png")
    records = [{"image": f"{image}.png", "question": question, "answer": answer, "id": str(number)}
               for number, (image, question, answer, _) in enumerate(ASKED)]  # fmt: skip
    file = tmp_path / "asked.json"
    file.write_text(json.dumps(records))
    return file


def texts_of(row):
    return [row[name][0]["content"][-1]["text"] for name in ("prompt", "chosen", "rejected")]


def test_answers_of_other_pictures(tmp_path, asked):
    """Every wrong answer comes with some seed, and no other; what gives no pair is counted; training reads the file."""
    found = {number: set() for number in range(len(ASKED))}
    for seed in range(12):
        folder = tmp_path / str(seed)
        summary = build_pairs(None, None, *load_own_vqa(asked), folder, rejected="pictures", seed=seed)
        assert (summary["pairs"], summary["rejected_from"]) == (6, {"pictures": 6})
        assert summary["left_out"] == {"no wrong answer found": 2, "no word in the true answer": 1}
        pairs, _ = load_dataset_mixture([str(folder / PAIRS_FILE)], form="pairs")
        for row in pairs:
            image, question, answer, _ = ASKED[int(row["id"])]
            assert texts_of(row)[:2] == [question, answer]
            assert np.array_equal(row["images"][0], random_image(20 + image, 20, seed=image))
            found[int(row["id"])].add(texts_of(row)[2])
    assert found == {number: wrong or set() for number, (*_, wrong) in enumerate(ASKED)}
    (tmp_path / "3.png").unlink()  # the file holds its pictures
    columns = datasets.load_dataset("parquet", data_files=str(folder / PAIRS_FILE), split="train")
    assert {"prompt", "chosen", "rejected", "images"} < {*columns.column_names} and columns[0]["images"][0].size


def test_samples_of_the_model(tmp_path):
    """The demo model is often wrong about one question and never about others; its answers are reproducible."""
    model, processor = load_model()
    data = load_vqa("phantoms", "train", path="5000:12:new_closed,closed")
    runs = [
        build_pairs(model, processor, *data, tmp_path / name, rejected="model", options=SHORT, seed=seed, batch_size=4)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    first, again, other = ((tmp_path / name / "predictions.jsonl").read_text() for name in "abc")
    assert first == again and runs[0] == runs[1] and first != other
    examples = list(PhantomVQA(5000, 12, ["new_closed", "closed"]))
    pairs, _ = load_dataset_mixture([str(tmp_path / "a" / PAIRS_FILE)], form="pairs")
    assert 0 < len(pairs) == runs[0]["rejected_from"]["model"] == 12 - sum(runs[0]["left_out"].values())
    for row in pairs:
        example = examples[int(row["id"].rpartition("/")[2])]
        question, chosen, rejected = texts_of(row)
        assert (question, chosen) == (example.question, example.answer)
        assert rejected.strip() and chosen.lower() != rejected.lower().strip(" .")
    with pytest.raises(ValueError, match="`temperature` is 0"):
        build_pairs(model, processor, *data, tmp_path / "d", options=SHORT | {"temperature": 0.0})


def test_pictures_that_are_held_out(tmp_path, asked):
    """By their bytes, whatever they are called."""
    (tmp_path / "5.png").rename(tmp_path / "test.png")
    (tmp_path / "5.png").write_bytes((tmp_path / "test.png").read_bytes())
    (tmp_path / "test.csv").write_text("image,question,answer\ntest.png,Is it new?,yes\n")
    words = ["pairs", "--data", str(asked), "--rejected", "pictures", "--output", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*words, "--held-out", str(tmp_path / "test.csv"), "--json"])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert [*summary["held_out"].values()] == [1] and summary["left_out"]["a picture that is held out"] == 1
    assert summary["pairs"] == 4  # without an answer of picture 5, nothing is wrong about age
    result = CliRunner().invoke(app, [*words[:-1], str(tmp_path / "none"), "--held-out", str(asked)])
    assert result.exit_code == 1 and "of which none is left: their pictures are also in" in result.stderr
    result = CliRunner().invoke(app, [*words[:-1], str(tmp_path / "unsaid")])
    assert result.exit_code == 0 and "no pictures were compared with data to be evaluated on" in result.stdout


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "--model: missing; answers are sampled from it, unless with --rejected pictures"),
        (["--model", "demo", "--rejected", "pictures"], 2, "--model: 'demo'; with --rejected pictures nothing"),
        (["--model", "demo", "--temperature", "0", "--path", "1:3"], 1, "--temperature is 0"),
        (["--rejected", "pictures", "--path", "9000:3"], 1, "their pictures are also in phantoms test"),
        (["--rejected", "pictures", "--held-out", "none.csv"], 2, "'--held-out': 'none.csv'; there is no such file"),
        (["--rejected", "pictures", "--path", "1:1:new_closed"], 1, "gives no pair: 1 (no wrong answer found)"),
    ],
)
def test_bad_input_is_one_line(tmp_path, words, code, message):
    result = CliRunner().invoke(app, ["pairs", "--benchmark", "phantoms", "--output", str(tmp_path / "run"), *words])
    assert result.exit_code == code and message in result.stderr, result.output
