"""Decoding analysis: the numbers of given answers, what is asked and what is not, and the shipped model end to end."""

import csv
import json
import sys

import pytest
from PIL import Image

from lladamedv.demo import answer
from lladamedv.evaluation import decoding_analysis
from lladamedv.evaluation.answering import Answer
from lladamedv.evaluation.decoding_analysis import analyze_decoding, noise_pictures
from lladamedv.evaluation.published import PUBLISHED_ABLATION, PUBLISHED_EFFICIENCY
from lladamedv.processing.datasets import load_vqa
from lladamedv.processing.phantoms import PhantomVQA


PICTURE = Image.new("RGB", (64, 64))
RECORDS = [
    {"id": "a", "image_id": "1", "image": PICTURE, "question": "Is it?", "answer": "Yes", "answer_type": "closed"},
    {"id": "b", "image_id": 2, "image": PICTURE, "question": "What?", "answer": "left lesions", "answer_type": "open"},
    {"id": "c", "image": PICTURE, "question": "Where?"},
]
ANSWERS = {
    "Is it?": Answer("Yes", 0.9, num_tokens=1, num_forwards=2, seconds=1.0),
    "What?": Answer("The lesions lesions lesions", 0.5, num_tokens=4, num_forwards=4, seconds=2.0),
    "Where?": Answer("NoNo", 0.5, num_tokens=2, num_forwards=1, seconds=6.0),
}
SETTINGS = {"steps": [4], "max_new_tokens": [8], "block_length": [4], "report": lambda line: None}


@pytest.fixture
def asked(monkeypatch):
    """Answers from the table instead of the model; returns the questions and options of each batch."""
    batches = []

    def answer_batch(model, processor, chats, **options):
        questions = [chat[0]["content"][1]["text"] for chat in chats]
        batches.append((questions, options))
        return [ANSWERS[question] for question in questions]

    monkeypatch.setattr(decoding_analysis, "answer_batch", answer_batch)
    return batches


def test_numbers_counted_by_hand(shipped, asked, tmp_path):
    summary = analyze_decoding(*shipped, RECORDS, tmp_path, **SETTINGS)
    (one,) = summary["combinations"]
    expected = {
        "max_new_tokens": 8, "block_length": 4, "steps": 4,
        "words_per_question": (1 + 4 + 1) / 3, "seconds_per_question": 3.0, "seconds_per_word": 1.5,
        "forwards_per_question": 7 / 3, "tokens_per_forward": 1.0,
        # Words: "yes"; "the" and "lesions" three times; "nono", which has the tokens "no" and "no".
        "distinct_1": (1 + 2 / 4 + 1) / 3, "rep_2": 1 / 3, "rep_4": 0.0, "longest_run": 3, "mean_longest_run": 5 / 3,
        "token_distinct_1": (1 + 2 / 4 + 1 / 2) / 3, "token_rep_2": 1 / 6,
        "token_longest_run": 3, "token_mean_longest_run": 2.0,
        "closed_accuracy": 100.0, "open_recall": 50.0, "closed_accuracy_ci95": None,
    }  # fmt: skip
    assert {name: one[name] for name in expected} == pytest.approx(expected)
    assert (summary["num_questions"], summary["num_scored"], summary["example_id"]) == (3, 2, "b")
    (measured,) = one["measured_on"]
    assert measured["questions"] == 3 and measured["batch_size"] == 1 and measured["dtype"] == "float32"
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    (row,) = csv.DictReader((tmp_path / "decoding.csv").open())
    assert float(row["open_recall"]) == 50.0 and row["closed_accuracy_ci95_low"] == "" and row["steps"] == "4"
    text = (tmp_path / "summary.md").read_text()
    assert "## Answers to question b\n\nWhat? Bold" in text
    assert "| 8 | 4 | 4 | The lesions **lesions** **lesions** |" in text


def test_intervals_are_of_images(shipped, asked, tmp_path):
    """Two images, one answered rightly and one wrongly: means of 0, 50 and 100 with chances of 1/4, 1/2 and 1/4."""
    records = [{**RECORDS[0], "id": answer_, "image_id": answer_, "answer": answer_} for answer_ in ("Yes", "No")]
    (one,) = analyze_decoding(*shipped, records, tmp_path, **SETTINGS)["combinations"]
    assert one["closed_accuracy"] == 50.0 and one["closed_accuracy_ci95"] == [0.0, 100.0]
    assert one["rep_1_ci95"] == [0.0, 0.0] and one["rep_2_ci95"] is None and one["open_recall"] is None


def test_combinations_that_are_not_allowed(shipped, asked, tmp_path):
    lines = []
    settings = {"steps": [6, 6, 4], "max_new_tokens": [24], "block_length": [8, 5], "report": lines.append}
    summary = analyze_decoding(*shipped, RECORDS, tmp_path / "some", **settings)
    assert [(one["block_length"], one["steps"]) for one in summary["combinations"]] == [(8, 6)]
    reasons = {(one["block_length"], one["steps"]): one["reason"] for one in summary["not_allowed"]}
    assert set(reasons) == {(8, 4), (5, 6), (5, 4)}
    assert "no multiple of the number of blocks" in reasons[8, 4] and "does not divide" in reasons[5, 6]
    assert {path.name for path in (tmp_path / "some").iterdir() if path.is_dir()} == {"L24-B8-Z6"}
    assert "- L24-B8-Z4: " in (tmp_path / "some/summary.md").read_text() and any("L24-B8-Z4" in line for line in lines)
    asked.clear()
    with pytest.raises(ValueError, match=r"L24-B5-Z6: .*does not divide"):
        analyze_decoding(*shipped, RECORDS, tmp_path / "none", **settings | {"block_length": [5]})
    assert not asked and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("records", "changed", "message"),
    [
        ([], {}, "`records`"),
        ([{"id": "a", "question": "?"}], {}, "no image in record 0"),
        ([RECORDS[0], {**RECORDS[1], "question": " "}], {}, "no question in record 1"),
        ([{**RECORDS[0], "image_id": None}], {}, "no image_id for 'a'"),
        ([{**RECORDS[0], "answer_type": "maybe"}], {}, "answer type"),
        (RECORDS, {"steps": []}, "`steps`"),
        (RECORDS, {"steps": [0]}, "`steps` is 0"),
        (RECORDS, {"extra_options": {"steps": 4}}, r"`extra_options` has \['steps'\]"),
        (RECORDS, {"extra_options": {"eos_token_id": 4}, "full_canvas": True}, r"has \['eos_token_id'\]"),
        (RECORDS, {"extra_options": {"top_k": 4}}, "top_k"),
        (RECORDS, {"example_id": "z"}, "`example_id` is 'z'"),
    ],
)
def test_bad_input_before_any_question(shipped, asked, tmp_path, records, changed, message):
    with pytest.raises(ValueError, match=message):
        analyze_decoding(*shipped, records, tmp_path / "run", **SETTINGS | changed)
    assert not asked and not (tmp_path / "run").exists()


def test_a_run_is_taken_up_again_with_the_times_measured(shipped, asked, tmp_path, monkeypatch):
    settings = SETTINGS | {"steps": [4, 2]}
    table = decoding_analysis.answer_batch

    def killed_at_the_third(model, processor, chats, **options):
        if chats[0][0]["content"][1]["text"] == "Where?":
            raise KeyboardInterrupt
        return table(model, processor, chats, **options)

    monkeypatch.setattr(decoding_analysis, "answer_batch", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        analyze_decoding(*shipped, RECORDS, tmp_path, **settings)
    assert not (tmp_path / "summary.json").exists()
    asked.clear()
    later = {name: Answer(one.text, 0.1, one.num_tokens, one.num_forwards, 30.0) for name, one in ANSWERS.items()}
    monkeypatch.setitem(globals(), "ANSWERS", later)
    monkeypatch.setattr(decoding_analysis, "answer_batch", table)
    summary = analyze_decoding(*shipped, RECORDS, tmp_path, **settings | {"batch_size": 2})
    first, second = summary["combinations"]
    # Each combination's first batch is answered once more, untimed.
    assert [batch for batch, _ in asked] == [["Where?"]] * 2 + [["Is it?", "What?"]] * 2 + [["Where?"]]
    assert first["seconds_per_question"] == (1 + 2 + 30) / 3 and second["seconds_per_question"] == 30
    assert [(one["batch_size"], one["questions"]) for one in first["measured_on"]] == [(1, 2), (2, 1)]
    assert len(second["measured_on"]) == 1
    assert "times are mixed" in (tmp_path / "summary.md").read_text()

    asked.clear()
    assert analyze_decoding(*shipped, RECORDS, tmp_path, **settings) == summary
    assert not asked
    other_records = [*RECORDS[:2], {**RECORDS[2], "question": "Is it?"}]
    for records, changed, differing in (
        (RECORDS, {"full_canvas": True}, "min_new_tokens"),
        (RECORDS, {"extra_options": {"cfg_scale": 1.0}}, "cfg_scale"),
        (RECORDS, {"seed": 1}, "seed"),
        (other_records, {}, "data_sha256"),
    ):
        with pytest.raises(ValueError, match=f"other settings .*{differing}"):
            analyze_decoding(*shipped, records, tmp_path, **settings | changed)


def test_full_canvas_holds_back_every_end(shipped, asked, tmp_path):
    model, processor = shipped
    analyze_decoding(model, processor, RECORDS, tmp_path, full_canvas=True, **SETTINGS)
    end, padding = processor.tokenizer.convert_tokens_to_ids(["<|eot_id|>", processor.tokenizer.pad_token])
    expected = {"min_new_tokens": 8, "eos_token_id": sorted([end, padding]), "stop_strings": None}
    assert asked[0][1] == {"max_new_tokens": 8, "block_length": 4, "steps": 4, **expected}


def test_without_matplotlib_the_tables_are_written(shipped, asked, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    lines = []
    assert analyze_decoding(*shipped, RECORDS, tmp_path, **SETTINGS | {"report": lines.append})["plots"] == []
    assert any("lladamedv[plots]" in line for line in lines) and (tmp_path / "decoding.csv").exists()


def test_published_numbers_agree_with_each_other():
    for _, per_question, words, per_word, _, _ in PUBLISHED_EFFICIENCY:
        assert per_word == pytest.approx(per_question / words, abs=6e-4)
    ablation = {row[:3]: row[3] for row in PUBLISHED_ABLATION}
    assert len(ablation) == 10 and ablation[256, 64, 256] == PUBLISHED_EFFICIENCY[2][5]
    assert all(length % block == 0 and steps % (length // block) == 0 for length, block, steps in ablation)


def test_demo_model_end_to_end(shipped, tmp_path):
    pytest.importorskip("matplotlib")
    records, _ = load_vqa("phantoms", path="9000:6")
    settings = {**SETTINGS, "steps": [24, 6], "max_new_tokens": [24], "block_length": [8], "batch_size": 4}
    summary = analyze_decoding(*shipped, records, tmp_path / "own", **settings)
    for one, steps in zip(summary["combinations"], (24, 6)):
        texts = answer(*shipped, [example.messages() for example in PhantomVQA(9000, 6)], steps=steps)
        lines = (tmp_path / f"own/L24-B8-Z{steps}/predictions.jsonl").read_text().splitlines()
        assert [json.loads(line)["prediction"] for line in lines] == texts and one["forwards_per_question"] < steps
    full = analyze_decoding(*shipped, list(records), tmp_path / "full", full_canvas=True, **settings)
    for one, steps in zip(full["combinations"], (24, 6)):
        assert one["forwards_per_question"] == steps and one["tokens_per_forward"] == pytest.approx(24 / steps)
        assert one["token_rep_2"] > 0
    assert full["plots"] == summary["plots"] == ["repetition.png", "time.png"]
    text = (tmp_path / "own/summary.md").read_text()
    for name in summary["plots"]:
        assert f"({name})" in text and (tmp_path / "own" / name).read_bytes().startswith(b"\x89PNG")
    assert "| LLaDA-MedV | 8.595 | 192.09 | 0.045 | 16 | 13.525 |" in text and "| 24 | 8 | 6 |" in text


def test_fewer_steps_more_repetition(shipped, tmp_path):
    """The paper's effect, where the model cannot be sure: descriptions of noise, the whole canvas filled."""
    phantoms = PhantomVQA(9000, 24, ["description"])
    records = noise_pictures(
        [{"id": str(number), "image": each.image, "question": each.question} for number, each in enumerate(phantoms)]
    )
    assert all(record["image"].size == (64, 64) for record in records)
    summary = analyze_decoding(
        *shipped, records, tmp_path, steps=[24, 1], max_new_tokens=[24], block_length=[24], batch_size=24,
        full_canvas=True, bootstrap_samples=0, report=lambda line: None,
    )  # fmt: skip
    many, one = (row["token_rep_2"] for row in summary["combinations"])
    assert one > 1.3 * many
