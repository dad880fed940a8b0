"""The metric of medical VQA as `evaluate` loads it: text rules, scores, intervals, and what it refuses."""

import doctest
import itertools
import json
import math
import re
import shutil
import sys
import unicodedata
from pathlib import Path

import evaluate
import numpy as np
import pytest


ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "evaluation" / "medical_vqa"

# prediction, truth, both normalised, legacy precision, recall and F1, legacy "exact match", substring, BLEU-1..3,
# multiset recall: computed once with LLaVA-Med's own functions, the last by hand.
OPEN_VECTORS = [
    ("The right lower lobe of the lung.", "Right lower lobe", "right lower lobe of lung", "right lower lobe",
     (0.6, 1, 0.75), 0.6, 1, (0.6, 0.5, 0.3333), 1),
    ("left left left", "left lung", "left left left", "left lung",
     (1, 0.75, 0.857143), 0.3333, 0, (0.3333, 0, 0), 0.5),
    ("lung lung lung heart", "lung heart liver", "lung lung lung heart", "lung heart liver",
     (1, 0.8, 0.888889), 0.5, 0, (0.5, 0.3333, 0), 0.666667),
    ("Bilateral, mid-lung opacities", "bilateral mid lung", "bilateral mid lung opacities", "bilateral mid lung",
     (0.75, 1, 0.857143), 0.75, 1, (0.75, 0.6667, 0.5), 1),
    ("chest X-ray image", "X-Ray", "chest x ray image", "x ray", (0.5, 1, 0.666667), 0.5, 1, (0.5, 0.3333, 0), 1),
    ("There are two lesions", "2", "there are 2 lesions", "2", (0.25, 1, 0.4), 0.25, 1, (0.25, 0, 0), 1),
    ("Liver, Kidney", "Kidney, Liver", "liver kidney", "kidney liver", (1, 1, 1), 1, 0, (1, 0, 0), 1),
    ("1,000 cells", "1000", "1000 cells", "1000", (0.5, 1, 0.666667), 0.5, 1, (0.5, 0, 0), 1),
    ("3.5 cm", "3.5cm", "3.5 cm", "3.5cm", (0, 0, 0), 0, 0, (0, 0, 0), 0),
    ("", "lung", "", "lung", (0, 0, 0), 0, 0, (0, 0, 0), 0),
]  # fmt: skip
CANDIDATES = ["liver", "spleen", "left lung"]


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    return evaluate.load(str(FOLDER), cache_dir=str(tmp_path_factory.mktemp("metric")))


@pytest.fixture(scope="module")
def code(metric):
    """The module as `evaluate` copied it, so that the tests see what a user gets."""
    return sys.modules[type(metric).__module__]


def item(answer, answer_type="open", **identifiers):
    return {"answer": answer, "answer_type": answer_type, **identifiers}


# Normalisation


@pytest.mark.parametrize(
    "text, published, fixed",
    [
        ("it's a well-known e.g. test; (one) none, three/four!", "it's well known eg test 1 0 3 4",
         "it's well known eg test 1 0 3 4"),
        ("sub-pleural nodule - left", "subpleural nodule left", "sub pleural nodule left"),
        ("sub-pleural", "sub pleural", "sub pleural"),
        ("left- and right-sided", "left and rightsided", "left and right sided"),
        ("1,000 x-rays/day", "1000 xraysday", "1000 x rays day"),
        # The first 32 periods go; "a" is an article only where it lost its own.
        ("a. " * 40, " ".join(["a."] * 8), ""),
        ("The none, zero and TEN", "0 0 and 10", "0 0 and 10"),
        ("3.5 cm. 50% *mass*: patient's", "3.5 cm 50% *mass*: patient's", "3.5 cm 50 mass patient's"),
        ("yes.no", "yesno", "yes no"),
        ("A.P. view of L3,4, .5 cm", "ap view of l34 .5 cm", "ap view of l3 4 .5 cm"),
        ("it isn\u2019t 10\u201320\u00a0mm", "it isn\u2019t 10\u201320 mm", "it isn't 10 20 mm"),
        ("\uff59\uff45\uff53\uff0e", "\uff59\uff45\uff53\uff0e", "yes"),
    ],
)  # fmt: skip
def test_normalisers_differ_in_punctuation(code, text, published, fixed):
    assert code.normalize_answer(text, "vqa_v2") == published
    assert code.normalize_answer(text, "vqa_v2_fixed") == fixed


def test_every_mark_is_punctuation(code):
    for mark in '; / [ ] " { } ( ) = + \\ _ - > < @ ` , ? !'.split():
        for normalizer in ("vqa_v2", "vqa_v2_fixed"):
            assert code.normalize_answer(f"left{mark}lung", normalizer) == "left lung"
        assert code.normalize_answer(f"left{mark}lung {mark}", "vqa_v2") == "leftlung"


def test_every_mark_of_unicode_separates(code):
    marks = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "P"]
    assert len(marks) > 800
    for mark in [*marks, *"|~^$`\u2192\u2713"]:
        assert code.normalize_answer(f"{mark}left{mark}lung{mark}") == "left lung", repr(mark)
    for letters in ("\uff39\uff25\uff33", "\U0001d5ec\U0001d5d8\U0001d5e6"):  # wide ones, bold ones
        assert code.normalize_answer(letters) == "yes"
    for invisible in "\u200b\ufeff\u00ad\u2060":
        assert code.normalize_answer(f"{invisible}y{invisible}es{invisible}") == "yes"


@pytest.mark.parametrize(
    "prediction, answer, correct, unparsable",
    [
        ("No", "No, it is normal", 1, 0), ("Yes", "No, it is normal", 0, 0), ("It is normal", "No, it is normal", 0, 1),
        ("**No.** The heart is normal.", "There is no lesion.", 1, 0), ("Yes, on the right", "yes (left)", 1, 0),
        ("True", "true", 1, 0), ("Yes.", "True", 1, 0), ("No, that is false.", "True", 0, 0),
        ("A false aneurysm: yes", "yes", 1, 0), ("maybe", "False", 0, 1), ("No. Yes would be wrong", "yes", 0, 0),
        ("Well, yes and no", "Yes.", 1, 0), ("the lower left lung", "left lower lung", 0, 0),
        ("left lower lung", "lung left", 0, 0), ("leftward", "left", 0, 0), ("nodule", "none", 0, 0), ("", "no", 0, 1),
        ("", "left", 0, 0), ("anything", "A", 0, 0),
    ],
)  # fmt: skip
def test_closed_answers_are_decided_by_words(metric, prediction, answer, correct, unparsable):
    scores = metric.compute(predictions=[prediction], references=[item(answer, "closed")])
    assert (scores["closed_accuracy"], scores["num_unparsable"]) == (100 * correct, unparsable)


@pytest.mark.parametrize(
    "word, full",
    [("dont", "don't"), ("couldntve", "couldntve"), ("couldnt've", "couldn't've"), ("couldn'tve", "couldn't've"),
     ("somebody'd", "somebodyd"), ("yall'd've", "y'all'd've"), ("ow's'at", "'ow's'at"), ("twas", "'twas"),
     ("Im", "im"), ("its", "its"), ("well", "well")],
)  # fmt: skip
def test_contractions(code, word, full):
    assert code.normalize_answer(word) == full


def test_an_unknown_normaliser(code):
    with pytest.raises(ValueError, match="'clean'"):
        code.normalize_answer("lung", "clean")


# Scores


@pytest.mark.parametrize("vector", OPEN_VECTORS, ids=lambda vector: vector[0] or "empty")
def test_open_vectors(code, metric, vector):
    prediction, answer, *normal, legacy, legacy_match, substring, bleus, recall = vector
    for normalizer in ("vqa_v2", "vqa_v2_fixed"):
        assert [code.normalize_answer(text, normalizer) for text in (prediction, answer)] == normal
    scores = metric.compute(predictions=[prediction], references=[item(answer)])
    for name, expected in zip(("precision", "recall", "f1"), legacy):
        assert scores[f"open_{name}_llava_med"] == pytest.approx(100 * expected, abs=1e-4)
    assert scores["open_exact_match_llava_med"] == pytest.approx(100 * legacy_match, abs=1e-2)
    assert scores["open_accuracy_llava_med"] == 100 * substring
    for order, expected in enumerate(bleus, start=1):
        assert scores[f"open_bleu_{order}"] == pytest.approx(100 * expected, abs=1e-2)
    assert scores["open_recall"] == pytest.approx(100 * recall, abs=1e-4)


@pytest.mark.parametrize(
    "prediction, answer, substring, gated, ours",
    [
        ("There is no pneumothorax", "No", 1, 1, 1), ("nodule present, normal heart", "no", 1, 1, 0),
        ("I do not know", "no", 1, 1, 0), ("on the left side", "left", 1, 0, 1), ("Yes, there is", "yes", 1, 1, 1),
        ("Yes", "no", 0, 0, 0), ("", "A", 0, 0, 0), ("lung", "A", 1, 0, 0), ("", "no", 0, 0, 0),
        ("the right one", "left", 0, 0, 0),
    ],
)  # fmt: skip
def test_published_variants_look_for_substrings(metric, prediction, answer, substring, gated, ours):
    scores = metric.compute(predictions=[prediction] * 2, references=[item(answer, "closed"), item(answer)])
    assert scores["closed_accuracy_llava_med"] == scores["open_accuracy_llava_med"] == 100 * substring
    assert scores["closed_gated_accuracy_llava_med"] == 100 * gated and scores["closed_accuracy"] == 100 * ours


@pytest.mark.parametrize(
    "prediction, answer, candidates, correct",
    [("The liver and the spleen", "Spleen", CANDIDATES, 0), ("spleen", "Spleen", CANDIDATES, 1),
     ("the mass is in the left lower lung", "left lung", CANDIDATES, 1), ("kidney", "liver", CANDIDATES, 1),
     ("", "liver", CANDIDATES, 0), ("the left lung", "Lung", ["left upper lung lobe", "lung"], 1)],
)  # fmt: skip
def test_candidates_compete_by_the_share_of_their_words(metric, prediction, answer, candidates, correct):
    scores = metric.compute(predictions=[prediction], references=[item(answer)], candidates=candidates)
    assert scores["open_candidate_accuracy_llava_med"] == 100 * correct


def test_fixed_scores(metric):
    scores = metric.compute(predictions=["lung lung lung heart"], references=[item("lung heart liver")])
    assert scores["open_precision"] == 50 and scores["open_recall"] == pytest.approx(200 / 3)
    assert scores["open_f1"] == pytest.approx(100 * 2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3))
    assert metric.compute(predictions=["The Lung."], references=[item("lung")])["open_exact_match"] == 100
    swapped = metric.compute(predictions=["Liver, Kidney"], references=[item("Kidney, Liver")])
    assert swapped["open_exact_match"] == 0 and swapped["open_f1"] == 100
    # A prediction that is shorter than the truth pays the brevity penalty.
    scores = metric.compute(predictions=["left lung"], references=[item("left lung upper lobe")])
    assert scores["open_bleu_1"] == scores["open_bleu_2"] == pytest.approx(100 * math.exp(1 - 4 / 2))
    assert scores["open_bleu_3"] == 0


def test_batches_are_averaged_by_type_and_counted(metric):
    metric.add_batch(predictions=["left", "maybe"], references=[item("left lung", id=1), item("yes", "CLOSED ", id=2)])
    metric.add(prediction=" ", reference=item("heart", "OPEN", id=3))
    metric.add_batch(predictions=["no", "no", "right"], references=[
        item("no", "closed", id=4, question="Is it?"), item("left", "closed", id=5), item("A", id=6)])  # fmt: skip
    scores = metric.compute(return_items=True)
    assert scores["open_recall"] == pytest.approx(100 * 0.5 / 3) and scores["num_open"] == 3
    assert scores["closed_accuracy"] == pytest.approx(100 / 3) and scores["num_closed"] == 3
    assert scores["num_empty_predictions"] == scores["num_unparsable"] == scores["num_wordless_answers"] == 1
    assert "open_candidate_accuracy_llava_med" not in scores
    assert [(each["id"], each.get("open_recall"), each.get("closed_accuracy")) for each in scores["items"]] == [
        ("1", 0.5, None), ("2", None, 0), ("3", 0, None), ("4", None, 1), ("5", None, 0), ("6", 0, None)]  # fmt: skip


def test_a_type_without_items_has_no_score(metric):
    scores = metric.compute(
        predictions=["a b"], references=[item("b", image_id=1)], candidates=["b"], bootstrap_samples=10
    )
    assert scores["open_recall"] == 100 and scores["closed_accuracy"] is None and scores["num_closed"] == 0
    assert scores["closed_accuracy_ci95"] is None
    assert scores["open_recall_ci95"] is None  # one image says nothing about the spread
    json.dumps(scores, allow_nan=False)


# Bootstrap


def test_intervals_match_all_draws_of_unequal_images(code):
    """Against every one of the 4^4 draws; the larger image weighs more."""
    scores, image_ids = np.array([[1.0], [0], [0], [0], [1], [1], [0.5]]), ["a", "b", "b", "b", "c", "c", "d"]
    groups = [scores[np.array(image_ids) == image, 0] for image in "abcd"]
    draws = [np.concatenate(draw).mean() for draw in itertools.product(groups, repeat=4)]
    expected = np.percentile(draws, [2.5, 97.5])
    found = code.bootstrap_intervals(scores, image_ids, samples=20_000, seed=1)
    assert found[0] == pytest.approx(expected, abs=0.02)
    assert expected[0] > 0 and np.percentile(draws, 10) > expected[0] + 0.05  # other levels would be told apart


def test_bootstrap_is_seeded_and_leaves_open_and_closed_images_apart(metric):
    predictions = ["left", "lung left", "heart"] * 10
    references = [item("left lung", image_id=index % 9) for index in range(30)]
    closed = {"predictions": ["yes"] * 5, "references": [item("yes", "closed", image_id=f"c{n}") for n in range(5)]}

    def intervals(seed, predictions=predictions + closed["predictions"], references=references + closed["references"]):
        scores = metric.compute(predictions=predictions, references=references, bootstrap_samples=200, seed=seed)
        return scores["open_recall_ci95"], scores["closed_accuracy_ci95"]

    assert intervals(3) == intervals(3) != intervals(4)
    assert intervals(3) == (intervals(3, predictions, references)[0], [100, 100])


# Bad input


@pytest.mark.parametrize(
    "predictions, references, options, message",
    [
        (["x", "y"], [item("x")], {}, "2 predictions but 1 references"),
        (["x", "y"], [item("x"), {"answer": "y"}], {}, "item number 1 has no answer type"),
        (["x"], [{"id": 17, "answer": "y", "answer_type": None}], {}, "item '17' has no answer type"),
        (["x"], [item("y", "other", id="q3")], {}, "item 'q3' has no answer type.*'other'"),
        (["x"], [item(" ", id=4)], {}, "item '4' has no answer"),
        (["x"], ["y"], {}, "item number 0 must be a dict"),
        ([None], [item("y", id="q1")], {}, "prediction of item 'q1' is not text but None"),
        (["x", 3], [item("y"), item("z")], {}, "prediction of item number 1 is not text but 3"),
        (["x", "y"], [item("x", id=5), item("y", id="5")], {}, "id '5' occurs more than once"),
        (["x", "y"], [item("x", id=5), item("y")], {}, "item number 1 has no id"),
        ([], [], {}, "no item"),
        (["x"], [item("x")], {"candidates": []}, "candidates must not be empty"),
        (["x", "y"], [item("x", image_id=1), item("y")], {"bootstrap_samples": 9}, "item number 1 has no image_id"),
    ],
)
def test_bad_input(metric, predictions, references, options, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references, **options)
    assert metric.compute(predictions=["y"], references=[item("y")])["num_open"] == 1, "nothing is left of it"


def test_items_are_counted_and_compared_across_batches(metric):
    metric.add_batch(predictions=["x", "y"], references=[item("x", id="q1"), item("y", id="q2")])
    with pytest.raises(ValueError, match="item number 2 has no answer type"):
        metric.add(prediction="z", reference={"answer": "z"})
    metric.add(prediction="z", reference=item("z", id="q1"))
    with pytest.raises(ValueError, match="id 'q1' occurs more than once"):
        metric.compute()


# Loading


def test_the_folder_is_self_contained(tmp_path):
    """A copy under another roof loads: nothing outside the folder is needed, as on the Hub."""
    shutil.copytree(FOLDER, tmp_path / "medical_vqa", ignore=shutil.ignore_patterns("__pycache__"))
    metric = evaluate.load(str(tmp_path / "medical_vqa"), cache_dir=str(tmp_path))
    assert metric.compute(predictions=["Yes"], references=[item("yes", "closed")])["closed_accuracy"] == 100
    for file in FOLDER.glob("*.py"):
        assert "lladamedv" not in file.read_text()


def test_examples_of_the_description_and_the_card(metric, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    test = doctest.DocTestParser().get_doctest(metric.inputs_description, {}, "medical_vqa", None, 0)
    assert len(test.examples) == 6
    assert doctest.DocTestRunner().run(test) == doctest.TestResults(0, 6)
    capsys.readouterr()
    exec(re.search(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)[1], {})
    assert capsys.readouterr().out == "100.0 100.0\n"
