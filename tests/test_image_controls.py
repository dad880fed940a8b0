"""Whether scores come from the pictures: the demo model, one that cannot see, and numbers counted by hand."""

import json

import numpy as np
import pytest
import torch

from lladamedv.evaluation import vqa
from lladamedv.evaluation.answering import encode_chats, question_about
from lladamedv.evaluation.image_controls import CONTROLS, ControlPictures, finding, summarize_controls
from lladamedv.loading import load_model
from lladamedv.processing.datasets import load_vqa
from lladamedv.processing.datasets.readers import undecoded


SHORT = {"max_new_tokens": 24, "block_length": 8, "steps": 24, "confidence_threshold": 0.9}


@pytest.fixture(scope="module")
def phantoms():
    return load_vqa("phantoms", path="9000:30:closed")


def run(shipped, data, folder, **more):
    more = {"options": SHORT, "bootstrap_samples": 200, "batch_size": 30, "image_controls": True, **more}
    return vqa.evaluate_vqa(*shipped, *data, folder, model_name="demo", **more)


@pytest.fixture(scope="module")
def seen(shipped, phantoms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, run(shipped, phantoms, folder)


def test_a_model_that_sees(shipped, phantoms, seen, monkeypatch):
    folder, summary = seen
    controls, shuffled = summary["image_controls"], summary["image_controls"]["shuffled"]["closed"]
    records = [json.loads(line) for line in (folder / "predictions.jsonl").open()]
    others = [record["controls"]["shuffled"]["prediction"].lower() == record["reference"].lower() for record in records]
    assert shuffled["score"] == pytest.approx(100 * np.mean(others))
    assert shuffled["drop"] == pytest.approx(summary["scores"]["closed_accuracy"] - shuffled["score"])
    assert controls["rests_on_pictures"] and shuffled["drop_ci95"][0] > 0 and controls["shuffled"]["all"] == shuffled
    first = (folder / "summary.md").read_text().split("\n\n")[1]
    assert first.startswith("The score comes from the pictures: with the picture of another question the score is ")
    monkeypatch.setattr(vqa, "answer_batch", lambda *arguments, **options: pytest.fail("asked again"))
    assert run(shipped, phantoms, folder) == summary
    with pytest.raises(ValueError, match="image_controls: True there, None here"):
        run(shipped, phantoms, folder, image_controls=False)


def score(shipped, image, question, answers):
    inputs = encode_chats(*shipped, [question_about(image, question)])
    return shipped[0].score(**inputs, candidates=answers, tokenizer=shipped[1].tokenizer).log_likelihood


@pytest.mark.parametrize("scoring", ["generate", "likelihood"])
def test_reliance_is_a_difference_of_scores(shipped, phantoms, seen, tmp_path, scoring):
    """Behind the picture, and behind the blank one as a file would show it."""
    pictures, folder = ControlPictures(shipped[1], undecoded(phantoms[0]), 0), seen[0]
    if scoring == "likelihood":
        run(shipped, (phantoms[0].select(range(2)), phantoms[1]), folder := tmp_path, scoring=scoring)
    methods = set()
    for record, row in zip(map(json.loads, (folder / "predictions.jsonl").open()), phantoms[0].select(range(2))):
        given = record["prediction"]
        answers = [given] if record["method"] == "generate" else [given, given.capitalize()]
        images = row["image"], pictures.replace("blank", row)["image"]
        here, blank = (score(shipped, image, row["question"], answers).logsumexp(dim=1) for image in images)
        assert record["image_reliance"] == pytest.approx(float(here - blank), abs=0.02)
        methods.add(record["method"])
    assert scoring in methods


def test_a_model_that_does_not_see(phantoms, tmp_path):
    """Features that are the same for all pictures."""
    model, processor = load_model()
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.zero_()
    summary = run((model, processor), phantoms, tmp_path)
    controls = summary["image_controls"]
    assert controls["rests_on_pictures"] is False and controls["image_reliance"]["all"]["mean"] == 0
    for control in CONTROLS:
        assert controls[control]["all"]["same_answers"] == 100 and controls[control]["all"]["drop_ci95"] == [0, 0]
    first = vqa.render_summary(summary).split("\n\n")[1]
    assert first.startswith("**THE ANSWERS DO NOT DEPEND ON THE PICTURES: with the picture of another question ")
    assert "100.0 % of the answers stay the same; the drop is 0.0, 95 % interval 0.00 to 0.00" in first


def test_pictures(shipped, phantoms):
    dataset = undecoded(phantoms[0])
    pictures, again = (ControlPictures(shipped[1], dataset, 3) for _ in range(2))
    rows, shown = list(dataset), []
    for row, own in zip(rows, phantoms[0]["image"]):
        replaced = {control: pictures.replace(control, row)["image"] for control in CONTROLS}
        shown.append(replaced["shuffled"])
        assert replaced["shuffled"] != row["image"]
        median = tuple(np.median(own, axis=(0, 1)).astype(int))
        assert replaced["blank"].getcolors() == [(own.width * own.height, median)]
        noise = np.asarray(replaced["noise"])
        assert noise.shape == (*own.size[::-1], 3) and 120 < noise.mean() < 135 and 70 < noise.std() < 78
        assert np.array_equal(noise, np.asarray(again.replace("noise", row)["image"]))
    assert sorted(map(str, shown)) == sorted(str(row["image"]) for row in rows), "each picture is shown once"
    assert shown == [again.replace("shuffled", row)["image"] for row in rows]
    assert shown != [ControlPictures(shipped[1], dataset, 4).replace("shuffled", row)["image"] for row in rows]
    with pytest.raises(ValueError, match="`dataset` has 1 picture; `image_controls` need two"):
        ControlPictures(shipped[1], dataset.select([0]), 0)


def record(number, kind, reference, own, other, reliance=None):
    controls = {control: {"prediction": other if control == "shuffled" else own} for control in CONTROLS}
    fields = {"image_id": str(number), "answer_type": kind, "reference": reference, "prediction": own}
    return {**fields, "controls": controls, "image_reliance": reliance}


@pytest.mark.parametrize(
    ("others", "told"),
    [(["no"] * 40, "above 0."), (["no", "yes"] * 20, "above 0."), (["yes"] * 39 + ["no"], "not above 0.**")],
)
def test_numbers_counted_by_hand(others, told):
    """A drop in one answer of forty may be chance: most draws of the pictures have it, but not 97.5 % of them."""
    records = [record(number, "closed", "Yes", "yes", other, 1.5) for number, other in enumerate(others)]
    of = summarize_controls(records, 2000, 0)
    wrong = 100 * others.count("no") / 40
    assert (of["shuffled"]["all"]["drop"], of["shuffled"]["all"]["same_answers"]) == (wrong, 100 - wrong)
    half = 196 * (wrong / 100 * (1 - wrong / 100) / 40) ** 0.5  # of the normal interval of a share
    if 0 < wrong < 100 and half < wrong:
        assert of["shuffled"]["all"]["drop_ci95"] == pytest.approx([wrong - half, wrong + half], abs=2.6)
    assert of["blank"]["closed"]["drop"] == 0 and "open" not in of["blank"]
    assert (of["image_reliance"]["all"]["mean"], of["image_reliance"]["all"]["above_0"]) == (1.5, 100)
    assert finding(of).endswith(told)


def test_what_is_missing_is_not_counted():
    others = {"left lung": (None, None), "left": ("a lung", -2.0)}
    records = [record(number, "open", "left lung", own, *other) for number, (own, other) in enumerate(others.items())]
    of = summarize_controls(records, 0, 0)
    assert of["shuffled"]["open"] == of["shuffled"]["all"] | {"count": 1, "score": 50, "drop": 0, "same_answers": 0}
    assert of["image_reliance"]["open"] | {"count": 1, "median": -2.0} == of["image_reliance"]["open"]
    assert of["rests_on_pictures"] is None and "NOT KNOWN TO COME FROM THE PICTURES: with" in finding(of)
    nothing = summarize_controls(records[:1], 100, 0)
    assert "NOT KNOWN TO COME FROM THE PICTURES: no question" in finding(nothing)
