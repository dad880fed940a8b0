"""The VQA benchmarks from a model to a report, on the phantoms and the model that comes with the package."""

import json
import re

import pytest
import torch
from accelerate import cpu_offload
from datasets import Dataset, Image
from peft import LoraConfig, get_peft_model

from lladamedv.evaluation import vqa
from lladamedv.evaluation.answering import answer_batch, question_about
from lladamedv.evaluation.published import LLADA_MEDV, PUBLISHED_VQA
from lladamedv.evaluation.run_settings import model_fingerprint
from lladamedv.loading import load_model
from lladamedv.processing.datasets import VQA_FEATURES, VQAReport, load_vqa


ONE_STEP = {"max_new_tokens": 8, "block_length": 8, "steps": 1}
SHORT = {"max_new_tokens": 24, "block_length": 8, "steps": 24, "confidence_threshold": 0.9}


@pytest.fixture(scope="module")
def phantoms():
    return load_vqa("phantoms", path="9000:8")


def lines(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").open()]


def run(shipped, data, folder, **more):
    dataset, report = data
    more = {"options": SHORT, "bootstrap_samples": 20, "batch_size": 3, **more}
    return vqa.evaluate_vqa(*shipped, dataset, report, folder, model_name="demo", **more)


def test_report_and_files(shipped, phantoms, tmp_path):
    summary = run(shipped, phantoms, tmp_path)
    records = lines(tmp_path)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["complete"] and summary["coverage"] == 1 and summary["num_questions"] == 8
    assert [record["id"] for record in records] == list(phantoms[0]["id"])
    for record in records:
        assert record["decoding"].items() >= SHORT.items()
        assert (record["split"], record["dataset"]) == ("test", "phantoms:9000:8")
        assert record["question"] in record["prompt"] and 0 <= record["confidence"] <= 1
    # Counted once more, by hand: phantom answers have no articles, numbers or punctuation inside.
    closed = [record for record in records if record["answer_type"] == "closed"]
    right = [record["prediction"].lower() == record["reference"].lower() for record in closed]
    assert summary["scores"]["num_closed"] == len(closed) > 0
    assert summary["scores"]["closed_accuracy"] == pytest.approx(100 * sum(right) / len(right))
    seconds = sum(record["seconds"] for record in records) / 8
    assert summary["cost"]["seconds_per_question"] == pytest.approx(seconds)
    text = (tmp_path / "summary.md").read_text()
    assert f"| closed_accuracy | {summary['scores']['closed_accuracy']:.2f} |" in text
    for name in ("reliability_open.png", "risk_coverage_closed.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_not_asked_again(shipped, phantoms, tmp_path, monkeypatch):
    shipped[1].tokenizer(["a", "a a"], truncation=True, max_length=5)  # which leaves its traces in the tokenizer
    summary = run(shipped, phantoms, tmp_path)
    monkeypatch.setattr(vqa, "answer_batch", lambda *arguments, **options: pytest.fail("asked again"))
    assert run(shipped, phantoms, tmp_path) == summary
    for changed, told in (
        ({"options": SHORT | {"steps": 12}}, r"\(decoding.steps: 24 there, 12 here\)"),
        ({"scoring": "likelihood"}, "scoring: 'generate' there, 'likelihood' here"),
        ({"seed": 1}, "seed: 0 there, 1 here"),
    ):
        with pytest.raises(ValueError, match=told):
            run(shipped, phantoms, tmp_path, **changed)


CHANGES = {
    "decoding.cfg_scale: None there, 0.5": lambda model, _: setattr(model.generation_config, "cfg_scale", 0.5),
    "decoding.eos_token_id": lambda model, _: setattr(model.generation_config, "eos_token_id", [586, 574]),
    "vision_aspect_ratio": lambda _, processor: setattr(processor.image_processor, "vision_aspect_ratio", "pad"),
    "chat_template": lambda _, processor: setattr(processor, "chat_template", processor.chat_template + " "),
    "tokenizer_sha256": lambda _, processor: processor.tokenizer.add_tokens(["lesion"]),
    "model_sha256": lambda model, _: model.lm_head.weight.data.mul_(2),
    "; model_sha256": lambda model, _: model.lm_head.weight.data[586].mul_(2),  # one id of all
    "rms_norm_eps: 1e-05 there": lambda model, _: setattr(model.config.text_config, "rms_norm_eps", 0.1),
    "dtype: 'float32' there, 'float64' here": lambda model, _: model.double(),
}


@pytest.mark.parametrize("told", CHANGES)
def test_a_run_does_not_continue_with_something_else_in_force(phantoms, tmp_path, told):
    """What answers depend on is recorded as it is, and not as the caller asked for it."""
    model, processor = load_model()
    run((model, processor), phantoms, tmp_path, options=ONE_STEP)
    CHANGES[told](model, processor)
    with pytest.raises(ValueError, match=re.escape(told)):
        run((model, processor), phantoms, tmp_path, options=ONE_STEP)


def test_runs_of_the_first_version_continue(shipped):
    """The digest of weights is what version 0.1.0 wrote."""
    assert model_fingerprint(shipped[0]) == "075ff20c14dbe1cdb614a30b418f9ca2c15e7937180416f896de768ae2dffa52"


def test_adapters_are_told_apart_by_their_strength():
    digests = []
    for alpha in (8, 8, 16):
        torch.manual_seed(0)
        adapters = LoraConfig(target_modules=["q_proj"], lora_alpha=alpha, init_lora_weights=False)
        digests.append(model_fingerprint(get_peft_model(load_model()[0], adapters)))
    assert digests[0] == digests[1] != digests[2]


def test_offloaded_models_are_evaluated(shipped, phantoms, tmp_path):
    expected = run(shipped, phantoms, tmp_path / "whole", options=ONE_STEP)
    summary = run((cpu_offload(load_model()[0]), shipped[1]), phantoms, tmp_path / "offloaded", options=ONE_STEP)
    assert summary["scores"] == expected["scores"] and summary["model_sha256"] == expected["model_sha256"]


@pytest.mark.parametrize("change", ["question", "answer", "image", "answer_type"])
def test_a_run_does_not_continue_with_other_data(shipped, phantoms, tmp_path, change):
    """Of the same ids: an answer that was mended must be scored anew, another picture seen anew."""
    run(shipped, phantoms, tmp_path, options=ONE_STEP)
    rows = phantoms[0].cast_column("image", Image(decode=False)).to_list()
    other = {"open": "closed", "closed": "open"}[rows[3]["answer_type"]]
    rows[3][change] = {"image": rows[4]["image"], "answer_type": other}.get(change, "other")
    data = Dataset.from_list(rows, features=VQA_FEATURES), phantoms[1]
    with pytest.raises(ValueError, match="data_sha256"):
        run(shipped, data, tmp_path, options=ONE_STEP)


def test_models_in_training_answer_as_in_evaluation(shipped, phantoms):
    """Dropout would make each answer a matter of chance."""
    model, processor = load_model()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    chats = [question_about(row["image"], row["question"]) for row in phantoms[0]]
    expected = [answer.text for answer in answer_batch(*shipped, chats, **SHORT)]
    assert [answer.text for answer in answer_batch(model.train(), processor, chats, **SHORT)] == expected


def test_closed_questions_by_likelihood(shipped, phantoms, tmp_path):
    """The answer is the one that the bound prefers, computed here candidate by candidate."""
    summary = run(shipped, phantoms, tmp_path, scoring="likelihood")
    model, processor = shipped
    methods = {}
    for record, row in zip(lines(tmp_path), phantoms[0]):
        methods.setdefault(record["method"], []).append(record["reference"].lower())
        if record["method"] == "likelihood":
            inputs = processor.apply_chat_template(
                [question_about(row["image"], row["question"])], add_generation_prompt=True, tokenize=True,
                return_dict=True, return_tensors="pt",
            )  # fmt: skip
            scores = {
                text: model.score(**inputs, candidates=[text], tokenizer=processor.tokenizer).log_likelihood.item()
                for text in ("yes", "Yes", "no", "No")
            }
            assert record["prediction"] == max(scores, key=scores.get).lower()
    assert set(methods["likelihood"]) <= {"yes", "no"} and not {"yes", "no"} & set(methods["generate"])
    assert summary["complete"] and summary["scoring"] == "likelihood"


def test_what_cannot_be_read_or_scored_is_counted(shipped, phantoms, tmp_path):
    """A damaged image and an empty reference: both named, neither averaged over."""
    rows = phantoms[0].cast_column("image", Image(decode=False)).to_list()
    rows[1]["image"] = {"bytes": b"\x89PNG\r\n\x1a\n and then nothing", "path": None}
    rows[2]["answer"] = " "
    data = Dataset.from_list(rows, features=VQA_FEATURES), phantoms[1]
    summary = run(shipped, data, tmp_path / "damaged")
    assert not summary["complete"] and summary["failed"] == [rows[1]["id"]]
    assert summary["without_reference"] == [rows[2]["id"]] and summary["num_scored"] == 6
    text = (tmp_path / "damaged" / "summary.md").read_text()
    assert f"**INCOMPLETE: 1 of 8 questions have no answer ({rows[1]['id']}).**" in text
    records = lines(tmp_path / "damaged")
    assert records[1]["prediction"] is None
    assert f"image of question {rows[1]['id']!r} cannot be read" in records[1]["error"]
    others = run(shipped, (phantoms[0].select([0, 3, 4, 5, 6, 7]), phantoms[1]), tmp_path / "others")
    assert summary["scores"] == others["scores"]

    for row in rows:
        row["image"] = rows[1]["image"]
    summary = run(shipped, (Dataset.from_list(rows, features=VQA_FEATURES), phantoms[1]), tmp_path / "none")
    assert summary["scores"] is None and not summary["complete"] and summary["coverage"] == 0
    assert "No question could be scored." in (tmp_path / "none" / "summary.md").read_text()


def test_bad_input_before_anything_is_asked(shipped, phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr(vqa, "answer_batch", lambda *arguments, **options: pytest.fail("asked"))
    doubled = Dataset.from_list([phantoms[0][0]] * 2, features=VQA_FEATURES)
    for dataset, more, message in (
        (phantoms[0], {"scoring": "guess"}, "`scoring` is 'guess'; allowed are"),
        (phantoms[0].select([]), {}, "`dataset` is empty"),
        (phantoms[0], {"batch_size": 0}, "`batch_size` is 0"),
        (doubled, {}, "'phantoms/9000/0' more than once"),
    ):
        with pytest.raises(ValueError, match=message):
            run(shipped, (dataset, phantoms[1]), tmp_path, **more)
    assert not list(tmp_path.iterdir())


def test_published_numbers_are_fractions_of_the_test_sets():
    """What the closed accuracies must be if they are shares of the known numbers of closed questions."""
    for benchmark, model, right, closed in (
        ("vqa-rad", LLADA_MEDV, 231, 272),
        ("slake", LLADA_MEDV, 384, 416),
        ("path-vqa", LLADA_MEDV, 3199, 3362),
        ("path-vqa", "LLaVA-Med", 3093, 3391),
    ):
        assert PUBLISHED_VQA[benchmark][model][1] == round(100 * right / closed, 2)


def test_published_results_stand_beside_ones_own(shipped, phantoms, tmp_path):
    summary = run(shipped, phantoms, tmp_path)
    assert "table 2" not in vqa.render_summary(summary)  # nothing was published on phantoms
    report = VQAReport("", benchmark="slake")
    text = vqa.render_summary(summary | {"benchmark": "slake", "data": report.as_dict()})
    scores = summary["scores"]
    own = f"| **demo** | {scores['open_recall_llava_med']:.2f} | {scores['closed_accuracy_llava_med']:.2f} |"
    assert own in text and "| LLaDA-MedV | 68.85 | 92.31 |" in text and "| PubMedCLIP | 78.40 | 82.50 |" in text
    report.rows = summary["num_questions"] + 1  # a part of the questions has no place in the table
    assert "table 2" not in vqa.render_summary(summary | {"benchmark": "slake", "data": report.as_dict()})
