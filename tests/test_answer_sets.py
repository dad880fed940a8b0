"""Sets of answers: calibrated, kept beside the model, refused where they do not belong, used and measured."""

import json
import math
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from lladamedv.cli import app
from lladamedv.evaluation.answer_sets import CALIBRATION_FILE, Calibration, answer_set, attach_calibration
from lladamedv.evaluation.answering import question_about
from lladamedv.evaluation.calibrating import calibrate
from lladamedv.evaluation.unusual_pictures import FEWEST_PICTURES, PictureModel
from lladamedv.evaluation.vqa import evaluate_vqa
from lladamedv.explanation import explain_answer
from lladamedv.loading import DEMO_MODEL, load_model
from lladamedv.processing.datasets import load_vqa
from lladamedv.processing.phantoms import PhantomVQA


LESION = "Is there a lesion?"


def call(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert "Traceback" not in result.output
    return result


@pytest.fixture(scope="module")
def phantoms():
    """Two questions about each of twelve pictures; some are about what no list of candidates has."""
    return load_vqa("phantoms", path="500:24:any_lesion,side,count,organ:2")


@pytest.fixture(scope="module")
def lists():
    return [["Yes", "No"], ["Left", "Right"]]


@pytest.fixture(scope="module")
def calibrated(shipped, phantoms, lists, tmp_path_factory):
    """A calibration of few pictures, and the lines of its run."""
    folder = tmp_path_factory.mktemp("run")
    found = calibrate(*shipped, *phantoms, folder, alpha=0.25, candidates=lists, group_by="modality")
    return found, [json.loads(line) for line in (folder / "predictions.jsonl").open()], folder


@pytest.fixture
def folder(tmp_path):
    """A copy of the demo model."""
    return shutil.copytree(DEMO_MODEL, tmp_path / "model")


# Calibrating


def test_what_is_calibrated_on_is_counted(calibrated, phantoms, lists):
    found, records, _ = calibrated
    names = {text: texts for texts in lists for text in texts}
    rows = [row for row in phantoms[0].remove_columns("image").to_list() if row["answer"] in names]
    assert found.questions == len(rows) < 24 == found.questions + found.left_out
    assert found.pictures == len({row["image_id"] for row in rows}) == len(records) <= 12
    scored = {question["id"]: question for record in records for question in record["questions"]}
    assert {row["id"]: lists[scored[row["id"]]["list"]][scored[row["id"]]["answer"]] for row in rows} == {
        row["id"]: row["answer"] for row in rows
    }
    assert sum(found.group_pictures.values()) == found.pictures and found.picture_model is None


def test_thresholds_cover_what_they_must(calibrated):
    """Counted in pictures, at the threshold enough are covered, and just below it too few."""
    found, records, _ = calibrated
    groups = {None: records}
    for record in records:
        groups.setdefault(record["questions"][0]["meta"]["modality"], []).append(record)
    for name, chosen in groups.items():
        threshold = found.threshold if name is None else found.group_thresholds.get(name)
        wanted = (len(chosen) + 1) * (1 - found.alpha)
        if wanted > len(chosen):
            assert threshold is None
            continue
        scores = [[1 - each["probabilities"][each["answer"]] for each in record["questions"]] for record in chosen]
        for limit, enough in ((threshold, True), (math.nextafter(threshold, -1), False)):
            covered = sum(sum(score <= limit for score in each) / len(each) for each in scores)
            assert (covered >= wanted - 1e-9) is enough
    assert None in {found.group_thresholds.get(name) for name in found.group_pictures}, "a group must be too small here"


def test_probabilities_are_those_of_the_texts(shipped, calibrated, phantoms):
    """The first question's, from `score` itself: both spellings of each candidate, among all."""
    model, processor = shipped
    question = calibrated[1][0]["questions"][0]
    row = next(row for row in phantoms[0] if row["id"] == question["id"])
    chat = [question_about(row["image"], row["question"])]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    texts = [["yes", "Yes", "no", "No"], ["left", "Left", "right", "Right"]][question["list"]]
    scores = model.score(**inputs, candidates=texts, tokenizer=processor.tokenizer).log_likelihood[0].exp()
    first = float(scores[:2].sum() / scores.sum())
    assert question["probabilities"] == pytest.approx([first, 1 - first], abs=1e-6)


def test_another_alpha_scores_nothing_anew(shipped, calibrated, phantoms, lists, monkeypatch):
    found, _, folder = calibrated
    monkeypatch.setattr("lladamedv.evaluation.calibrating.candidate_probabilities", lambda *_: pytest.fail("scored"))
    again = calibrate(*shipped, *phantoms, folder, alpha=0.01, candidates=lists)
    assert again.threshold is None and again.questions == found.questions and again.group_pictures == {}
    given = again.choose(["Yes", "No"], [0.999, 0.001], None)
    assert given[0] == ("Yes", "No") and "fewer than the 99 that an alpha of 0.01 needs" in given[2][0]
    assert "too few for any guarantee" in again.statement()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0}, "`alpha` is 0; allowed are numbers above 0 and below 1"),
        ({"alpha": math.nan}, "`alpha` is nan"),
        ({"candidates": [["Yes"]]}, "`candidates` is 'Yes'; allowed are lists of two or more answers"),
        ({"candidates": [["Yes", "No"], ["No.", "Some"]]}, "and none twice"),
        ({"candidates": [["+", "-"]]}, "each with a letter or digit"),
        ({"candidates": [["Cat", "Dog"]]}, "24 questions, none with an answer of Cat,Dog"),
        ({"group_by": "organ"}, "`group_by` is 'organ'; the columns of this data set are modality, question_type"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_at_once(shipped, phantoms, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        calibrate(*shipped, *phantoms, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


# The file


def test_a_calibration_is_read_as_it_was_written(calibrated, shipped, tmp_path):
    for each in (calibrated[0], shipped[0].calibration):
        each.save(tmp_path)
        assert asdict(Calibration.load(tmp_path)) == asdict(each) and Calibration.load(tmp_path).sha256 == each.sha256
    assert Calibration.load(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "`format` is 2; allowed is 1"),
        ({"surprise": 1}, "surprise"),
        ({"alpha": "0.1"}, "alpha"),
        ({"alpha": 1.5}, "`alpha` is 1.5"),
        ({"threshold": 1.5}, r"a threshold is 1.5; allowed are numbers in \[0, 1\]"),
        ({"threshold": math.nan}, "a threshold is nan"),
        ({"candidates": [["Yes"]]}, "`candidates` is 'Yes'"),
        ({"candidates": "Yes"}, "candidates"),
        ({"group_thresholds": {"x": 0.5}}, r"`group_pictures` lacks \['x'\]"),
        ({"dataset": "a\x1b[2Jb"}, "cannot be printed"),
        ({"pictures": None}, "pictures"),
        ({"picture_model": {"rest": 1.0}}, "missing"),
        ({"picture_model": 1}, "picture_model"),
    ],
)
def test_files_of_others_are_checked(folder, change, message):
    content = json.loads((folder / CALIBRATION_FILE).read_text()) | change
    (folder / CALIBRATION_FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        load_model(folder)
    assert CALIBRATION_FILE in str(error.value) and "\n" not in str(error.value)


def test_features_are_those_of_the_model(shipped, folder):
    foreign = PictureModel.fit(np.random.default_rng(0).standard_normal((FEWEST_PICTURES, 3)))
    replace(shipped[0].calibration, picture_model=foreign).save(folder)
    with pytest.raises(ValueError, match="has 3 features; the model has 512"):
        load_model(folder)


@pytest.mark.parametrize("what", ["set of weights", "prompt"])
def test_a_calibration_for_something_else_is_not_used(shipped, folder, caplog, what):
    model, processor = load_model(folder)
    assert model.calibration is not None and not caplog.messages
    assert load_model(folder, dtype="float16")[0].calibration is not None  # the values are the same
    if what != "prompt":
        model.lm_head.weight.data[5, 7] += 1
    else:
        processor.chat_template = "Mind: " + processor.chat_template
    attach_calibration(model, processor)
    assert model.calibration is None and f"made for another {what}" in caplog.messages[0]
    with pytest.raises(ValueError, match="The model has no calibration"):
        answer_set(model, processor, PhantomVQA(1, 1)[0].image, LESION)


# Using it


def test_a_set_holds_what_is_not_too_improbable(shipped):
    model, processor = shipped
    example = PhantomVQA(9_000, 1, ("any_lesion",))[0]
    given = answer_set(model, processor, example.image, example.question, ["no", "YES"])
    assert list(given.probabilities) == ["Yes", "No"] and sum(given.probabilities.values()) == pytest.approx(1)
    likely = max(given.probabilities, key=given.probabilities.get)
    expected = {text for text, value in given.probabilities.items() if 1 - value <= model.calibration.threshold}
    assert set(given.answers) == expected | {likely} and given.answers[0] == likely
    assert given.abstained == (len(given.answers) > 1) and given.warning is None and given.notes == ()
    within = answer_set(model, processor, example.image, example.question, group=example.attributes.domain)
    assert within.group == example.attributes.domain and within.probabilities == given.probabilities
    for options, message in (
        ({"candidates": ["Cat", "Dog"]}, "`candidates` is Cat,Dog; the model is calibrated for Yes,No or Left,Right"),
        ({"candidates": ["Yes", "No", "Perhaps"]}, "`candidates` is Yes,No,Perhaps"),
    ):
        with pytest.raises(ValueError, match=message):
            answer_set(model, processor, example.image, example.question, **options)


def test_small_groups_fall_back_with_a_word(calibrated):
    found, *_ = calibrated
    small = next(name for name in found.group_pictures if name not in found.group_thresholds)
    for name, count in ((small, found.group_pictures[small]), ("ultrasound", 0)):
        answers, group, notes = found.choose(["Yes", "No"], [0.4, 0.6], name)
        assert group is None and f"{count} pictures of the group '{name}'" in notes[0]
        assert answers == found.choose(["Yes", "No"], [0.4, 0.6], None)[0] and answers[0] == "No"


def test_evaluations_report_coverage_and_size(shipped, tmp_path):
    """Recounted from the lines of predictions, by picture."""
    dataset, report = load_vqa("phantoms", path="9000:8:any_lesion,side:2")
    options = {"max_new_tokens": 8, "block_length": 8, "steps": 1}
    summary = evaluate_vqa(*shipped, dataset, report, tmp_path, model_name="demo", options=options)["answer_sets"]
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").open()]
    held = {}
    for line in lines:
        held.setdefault(line["image_id"], []).append(line["reference"] in line["answer_set"])
    everything = summary["groups"]["all"]
    assert (everything["questions"], everything["pictures"]) == (8, 4) == (len(lines), len(held))
    assert everything["coverage"] == pytest.approx(sum(sum(each) / len(each) for each in held.values()) / 4)
    assert everything["size"] == pytest.approx(sum(len(line["answer_set"]) for line in lines) / 8)
    assert everything["coverage_ci95"][0] <= everything["coverage"] <= everything["coverage_ci95"][1]
    assert not summary["same_data"] and summary["unusual_pictures"] == 0
    assert set(summary["groups"]) == {"all"} | {line["set_group"] for line in lines}
    text = (tmp_path / "summary.md").read_text()
    assert f"| all | {everything['coverage']:.3f} |" in text and "calibrated on phantoms" in text


def test_command_line(shipped, folder, tmp_path):
    """Few pictures are too few, and everything says so; the card and a push have it."""
    words = ["calibrate", "--model", folder, "--benchmark", "phantoms", "--path", "500:6:closed"]
    done = call(*words, "--output", tmp_path / "run", "--candidates", "Yes,No", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["threshold"] is None, done.output
    card = (folder / "README.md").read_text()
    assert card.count("## Answer sets") == 1 and "too few for any guarantee" in card and "## Provenance" in card
    PhantomVQA(9_000, 1)[0].image.save(tmp_path / "phantom.png")
    asked = call("ask", tmp_path / "phantom.png", LESION, "--model", folder, "--candidates", "Yes,No", "--json")
    given = json.loads(asked.stdout)
    assert given["answer"].startswith("not sure: ") and given["abstained"] and set(given["answers"]) == {"Yes", "No"}
    assert "the set holds every candidate" in given["notes"][0]
    shipped[0].save_pretrained(folder)  # with its code, which the demo's folder lacks
    shipped[1].save_pretrained(folder)
    pushed = call("push", folder, "me/model", "--dry-run", "--json")
    assert pushed.exit_code == 0 and CALIBRATION_FILE in json.loads(pushed.stdout)["files"], pushed.output


def test_ask_prints_the_set_and_warns_of_photographs(shipped, photograph):
    asked = call("ask", photograph, LESION, "--candidates", "No,Yes", "--group", "mri")
    assert asked.exit_code == 0 and asked.stdout.strip() in ("Yes", "No", "not sure: Yes or No", "not sure: No or Yes")
    assert "Warning: The picture is unlike those of phantoms" in asked.stderr
    assert "of the sets hold the true answer, for questions of the group 'mri'" in asked.stderr
    plain = json.loads(call("ask", photograph, LESION, "--json").stdout)
    assert plain["warning"].startswith("The picture is unlike those of phantoms")
    assert plain["warning"] in explain_answer(*shipped, Image.open(photograph).convert("RGB"), LESION).notices


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--candidates", "Yes"], "'Yes'; allowed are two or more answers with commas between them"),
        (["--candidates", "Yes,No", "--steps", "24"], "--candidates: it generates nothing"),
        (["--group", "mri"], "--group: 'mri'; it goes with --candidates"),
    ],
)
def test_wrong_usage_of_ask(picture, words, message):
    result = call("ask", picture, LESION, *words)
    assert result.exit_code == 2 and message in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "me/model"], "--model: 'me/model' is on the Hub; calibration.json needs a folder"),
        (["--model", "demo", "--alpha", "1"], "--alpha: 1.0; allowed are numbers above 0 and below 1"),
        (["--model", "demo", "--candidates", "Yes,"], "'Yes,'; allowed are two or more answers"),
    ],
)
def test_wrong_usage_of_calibrate(tmp_path, words, message):
    result = call("calibrate", "--benchmark", "phantoms", "--output", tmp_path / "run", *words)
    assert result.exit_code == 2 and message in result.stderr
