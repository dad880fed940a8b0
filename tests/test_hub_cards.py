"""Cards: the right licence, measured numbers and nothing private in them, for all kinds of models and for data.

Whole cards are compared with `tests/golden_cards/*.md`. After a change that is meant, write them anew and look at the
difference: `UPDATE_GOLDEN_CARDS=1 pytest tests/test_hub_cards.py -k golden`.
"""

import dataclasses
import difflib
import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from peft import LoraConfig
from PIL import Image

from lladamedv.demo import DEMO_MODEL, load_model
from lladamedv.evaluation.chat import summarize
from lladamedv.evaluation.vqa import evaluate_vqa
from lladamedv.hub_cards import (
    COMPONENTS,
    Component,
    EvaluationResults,
    ModelFacts,
    build_dataset_card,
    build_model_card,
    component_of_model,
    eval_result_files,
    find_component,
    gather_training_facts,
    hash_files,
    is_hub_id,
    may_redistribute,
    save_model_card,
    scrub,
    strictest_licence,
)
from lladamedv.processing.datasets import load_vqa
from lladamedv.processing.processing_lladamedv import CHAT_TEMPLATES
from tests.test_masked_diffusion_sft_trainer import make_trainer
from tests.tiny import random_image


ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden_cards"
REVISION = "bcf91e7654fb9d51c8ab6a5b82cacf3fafd2fae9"

# Facts and files


def vqa_summary(**changes):
    """A summary.json, of all of VQA-RAD's test questions unless changed."""
    scores = {
        "open_precision": 31.25, "open_recall": 45.678, "open_f1": 37.1, "open_exact_match": 20.5,
        "open_recall_llava_med": 46.9, "open_recall_ci95": [40.0, 51.5], "num_open": 200,
        "closed_accuracy": 84.931, "closed_accuracy_llava_med": 85.2, "closed_accuracy_ci95": None, "num_closed": 251,
        "num_unparsable": 3,
    }  # fmt: skip
    data = {
        "source": f"flaviagiammarino/vqa-rad@{REVISION}", "reference": "flaviagiammarino/vqa-rad",
        "revision": REVISION, "leakage": "202 of 203", "questions": 451, "local": False,
        "is_published": True,
    }  # fmt: skip
    summary = {
        "benchmark": "vqa-rad", "split": "test", "model": "/home/alice/model", "model_sha256": "ab" * 32,
        "complete": True, "num_questions": 451, "num_scored": 451, "failed": [], "left_out": [], "scores": scores,
        "decoding": {"max_new_tokens": 64, "block_length": 32, "steps": 16, "temperature": 0.5},
        "scoring": "generate", "data": data,
        "environment": {"device": "NVIDIA A100", "dtype": "bfloat16", "batch_size": 8},
    }  # fmt: skip
    return summary | changes


def phantom_summary():
    data = {"source": "phantoms:9000:300", "reference": "phantoms", "revision": None, "leakage": "none"}
    data |= {"local": True, "is_published": True}
    scores = vqa_summary()["scores"] | {"num_open": 203, "num_closed": 97}
    return vqa_summary(benchmark="phantoms", num_questions=300, data=data | {"questions": 300}, scores=scores)


def results_of(folder, summary, run=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    if run is not None:
        (folder / "run.json").write_text(json.dumps(run))
    return EvaluationResults.from_file(folder / "summary.json")


def chat_summary(judged=True):
    """Of two questions, by the real summary."""
    records = [
        {"id": str(number), "image_id": f"{number}.jpg", "type": "conversation", "domains": [domain], "reference": "A."}
        for number, domain in enumerate(("mri", "ct_scan"))
    ]
    reply = {"status": "ok", "reason": "", "scores": [8, 6]}
    judgments = {"0": [reply], "1": [reply if judged else reply | {"status": "failed", "scores": None}]}
    judge = {"model": "gpt-4.1-mini", "host": "judge.intranet:8000", "temperature": 0}
    judged = {
        "judgments": judgments, "judge": judge, "prompt_version": "comparison-1", "prompt_sha256": "cd" * 32,
        "swap_positions": False,
    }  # fmt: skip
    return summarize(records, {"0": "A lung.", "1": "A liver."}, judged, bootstrap_samples=0)


LOG = [{"step": step, "loss": 8.0 - step / 10, "epoch": step / 50} for step in range(2, 52, 2)] + [
    {"step": 50, "eval_loss": 2.5, "epoch": 1.0},
    {"step": 50, "train_runtime": 61.7, "train_loss": 5.0, "epoch": 1.0},
]
RECIPE = """\
# at /home/alice/notes
model_name_or_path: /home/alice/base model/v1
output_dir: runs/x
hub_token: hf_abcdefghijklmnop
image_folder: images
train_data:
- phantoms:5000:2000
- path: vqa:slake:train:/data/SLAKE
  weight: 2
eos_padding_token: <|eot_id|>
learning_rate: 1.0e-4
"""
LORA = {
    "peft_type": "LORA", "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "use_dora": False, "modules_to_save": None,
    "target_modules": {"v_proj", "q_proj"},
}  # fmt: skip


def left_out(source, **more):
    return {"source": source, "rows": 2000, "missing_images": [["a", "/x/a.jpg"]], "invalid": []} | more


def training(reports, **options):
    options = {"software": {"lladamedv": "0.1.0", "torch": "2.13.0"}, "log_history": LOG, "recipe": RECIPE} | options
    return gather_training_facts(
        hardware="4 × NVIDIA A100, bf16", trained_parts=("projector", "language_model"), data_reports=reports, **options
    )


BASES = ("GSAI-ML/LLaDA-8B-Instruct", "google/siglip2-so400m-patch14-384")
VQA_RAD_DATA = {"benchmark": "vqa-rad", "reference": "flaviagiammarino/vqa-rad", "split": "train"}


def facts_of(kind, folder):
    """Facts about a model of each kind."""
    parts = [find_component(name) for name in (*BASES, "llada-medv", "llava-med-data")]
    common = {
        "version": "0.1.0", "base_models": BASES, "num_parameters": 8_000_000_000, "dtype": "bfloat16",
        "chat_template": "llava_llada_med",
    }  # fmt: skip
    if kind == "conversion":
        return ModelFacts(
            "LLaDA-MedV", "converted", "LLaDA-MedV, open-ended answers", parts, relation="finetune",
            generation={"steps": 64}, source={"checkpoint": "XZDong123/LLaDA-MedV"},
            key_report=["layout llava_llada: 61 keys mapped"], hashes={"model.safetensors": "12" * 32}, **common,
        )  # fmt: skip
    if kind == "initialized":
        source = {"language model": BASES[0], "vision tower": BASES[1], "projector": "untrained"}
        return ModelFacts("start", "initialized", "A new LLaDA-MedV", parts[:2], source=source, **common)
    if kind == "demo_model":
        run = training([left_out("phantoms:5000:2000")])
        return ModelFacts("demo", "demo", "The demo model", [], "0.1.0", training=run, num_parameters=1_467_392)
    if kind == "demo_run":
        results = [
            results_of(folder / "phantoms", phantom_summary(), {"chat_template": CHAT_TEMPLATES["llava_llada_med"]}),
            results_of(folder / "chat", chat_summary()),
        ]
        return ModelFacts(
            "run", "trained", "A fine-tuned demo model", [COMPONENTS["phantoms"]], "0.1.0", relation="finetune",
            training=training([left_out("phantoms:5000:2000")]), results=results,
        )  # fmt: skip
    assert kind == "adapter"
    reports = [left_out(f"flaviagiammarino/vqa-rad@{REVISION}", **VQA_RAD_DATA), left_out("me/mine@main")]
    return ModelFacts(
        "adapter", "trained", "Adapters for LLaDA-MedV", [find_component("XZDong123/LLaDA-MedV")], "0.1.0",
        base_models=["XZDong123/LLaDA-MedV"], relation="adapter", training=training(reports[:1], adapter=LORA),
        results=[results_of(folder / "vqa", vqa_summary())],
    )  # fmt: skip


KINDS = ("conversion", "initialized", "demo_model", "demo_run", "adapter")


def slake_report():
    return load_report(
        source="BoKelvin/SLAKE@a9083ce", benchmark="slake", reference="BoKelvin/SLAKE", revision="a9083ce", rows=1060,
        images=96, open=644, closed=416, published={"images": 96, "questions": 1061, "open": 645, "closed": 416},
        missing_images=[("3", "/home/alice/imgs/xmlab3/source.jpg")], leakage="none", other_languages=1033,
        local=False,
    )  # fmt: skip


def load_report(**values):
    _, report = load_vqa("phantoms", path="1:1")
    return dataclasses.replace(report, **values)


def table_rows(text, columns):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if len(row) == columns]


# Whole cards

@pytest.mark.parametrize("kind", [*KINDS, "dataset"])
def test_golden(tmp_path, kind):
    """And the Hub's library reads the front matter back."""
    if kind == "dataset":
        card = build_dataset_card(slake_report(), "SLAKE, English, test", "0.1.0")
    else:
        card = build_model_card(facts_of(kind, tmp_path))
    text, file = str(card), GOLDEN / f"{kind}.md"
    if os.environ.get("UPDATE_GOLDEN_CARDS"):
        file.write_text(text, encoding="utf-8")
    golden = file.read_text(encoding="utf-8")
    difference = difflib.unified_diff(golden.splitlines(), text.splitlines(), file.name, "now", lineterm="")
    assert text == golden, "\n" + "\n".join(difference)
    assert yaml.safe_load(text.split("---\n")[1]) == type(card)(text).data.to_dict() == card.data.to_dict()


# Licences

# Independent of the code, as one reads the licences.
STRICTER_AND_STRICTER = [
    ("vqa-rad", "cc0-1.0", None), ("llada-8b", "mit", None), ("path-vqa", "mit", None), ("siglip2", "apache-2.0", None),
    ("phantoms", "apache-2.0", None), ("slake", "cc-by-4.0", None),
    ("llava-med-data", "other", "cc-by-nc-4.0-research-only"), ("llada-medv", "other", "asu-non-commercial"),
]  # fmt: skip


def test_the_strictest_licence_of_every_set():
    assert {name for name, *_ in STRICTER_AND_STRICTER} == set(COMPONENTS)
    for chosen in itertools.product(STRICTER_AND_STRICTER, repeat=2):
        found = strictest_licence(COMPONENTS[name] for name, *_ in chosen)
        assert (found.license, found.license_name) == max(chosen, key=STRICTER_AND_STRICTER.index)[1:], chosen
        assert (found.license_link is not None) == (found.license == "other")


@pytest.mark.parametrize("name", COMPONENTS)
def test_an_unknown_component_frees_nothing(name):
    parts = [COMPONENTS[name], Component("a secret set", None)]
    for components, message in ((parts, "holds a secret set, of unknown licence"), ([], "is empty")):
        with pytest.raises(ValueError, match=f"`components` {message}"):
            strictest_licence(components)
    card = build_model_card(ModelFacts("x", "converted", "x", parts, "0.1.0"))
    assert not {"license", "license_name", "license_link"} & set(card.data.to_dict())
    assert "No licence is stated" in card.text and "(a secret set)" in card.text
    assert f"cannot be freer than {COMPONENTS[name].licence.title}" in card.text


def test_a_run_on_unknown_data_states_no_licence():
    for reports in ([], [left_out("/data/mine.json")], [left_out("me/mine")]):
        facts = ModelFacts("x", "trained", "x", [COMPONENTS["llada-8b"]], "0.1.0", training=training(reports))
        assert "license" not in build_model_card(facts).data.to_dict()


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("GSAI-ML/LLaDA-8B-Instruct", "llada-8b"), ("gsai-ml/llada-8b-instruct@main", "llada-8b"),
        ("OctoMed/VQA-RAD", "vqa-rad"), ("BoKelvin/SLAKE@a9083ce", "slake"), ("vqa:slake:train:/data", "slake"),
        ("phantoms:7:200:closed", "phantoms"), ("flaviagiammarino/path-vqa", "path-vqa"),
        ("llava-med-qa50", "llava-med-data"), ("GSAI-ML/LLaDA-V", None), ("slake2", None), ("", None),
    ],
)  # fmt: skip
def test_components_by_name(name, key):
    assert find_component(name) == (COMPONENTS[key] if key else Component(name, None))


def test_the_base_model_of_a_run(tmp_path):
    assert component_of_model("XZDong123/LLaDA-MedV") == COMPONENTS["llada-medv"]
    save_model_card(facts_of("conversion", tmp_path), tmp_path)
    base = component_of_model(str(tmp_path))
    assert base.licence == COMPONENTS["llada-medv"].licence and str(tmp_path) not in base.title
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: my-own\n---\n")
    for name in ("bare", "odd"):
        (tmp_path / name).mkdir()
    (tmp_path / "odd" / "README.md").write_text("---\na: [\n---\n")
    for unknown in ("me/other", "", *(str(tmp_path / name) for name in (".", "bare", "odd"))):
        assert component_of_model(unknown).licence is None


@pytest.mark.parametrize(
    ("source", "allowed", "why"),
    [
        ("OctoMed/VQA-RAD", True, "CC0"), ("slake", True, "CC BY 4.0"), ("phantoms:1:2", True, "drawn"),
        ("path-vqa", False, "publishers"), ("llava-med-instruct", False, "forbids"), ("mine", False, "nothing"),
    ],
)  # fmt: skip
def test_redistribution(source, allowed, why):
    answer, reason = may_redistribute(source)
    assert answer is allowed and why in reason


# Numbers


def test_numbers_are_those_of_a_real_run(tmp_path):
    """Of a few answers of the demo model: the card's table has all scores of the file and no others."""
    dataset, report = load_vqa("phantoms", path="9000:6")
    options = {"max_new_tokens": 8, "block_length": 8, "steps": 1}
    given = evaluate_vqa(
        *load_model(), dataset, report, tmp_path, model_name=str(tmp_path), options=options, bootstrap_samples=20
    )["scores"]
    results = EvaluationResults.from_file(tmp_path / "summary.json")
    card = build_model_card(ModelFacts("x", "converted", "x", [], "0.1.0", results=[results]))
    expected = {}
    for name, value in given.items():
        if value is not None and not name.startswith("num_") and not name.endswith("_ci95"):
            interval, group = given[f"{name}_ci95"], name.partition("_")[0]
            interval = "" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"
            expected[name] = [group, f"{value:.2f}", interval, str(given[f"num_{group}"])]
    assert {row[0]: row[1:] for row in table_rows(card.text, 5)[2:]} == expected and len(expected) > 10
    protocol = dict(table_rows(card.text.split("| protocol |")[1], 2)[1:])
    assert protocol["length of the canvas, L"] == "8" and protocol["denoising steps, Z"] == "1"
    assert hashlib.sha256((tmp_path / "summary.json").read_bytes()).hexdigest() in protocol["sha256 of summary.json"]
    assert str(tmp_path) not in str(card)


def test_results_survive_the_hubs_own_round_trip(tmp_path):
    index = build_model_card(facts_of("adapter", tmp_path)).data.to_dict()["model-index"]
    assert [entry["dataset"]["config"] for entry in index[0]["results"]] == ["open", "closed"]
    name, again = model_index_to_eval_results(index)
    assert name == "adapter" and eval_results_to_model_index(name, again) == index


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"complete": False, "failed": ["a", "b"]}, "INCOMPLETE: 2 of 451 questions have no score"),
        ({"num_questions": 20}, "A part only: 20 of 451 questions were asked"),
        ({"complete": False, "failed": ["a"] * 451, "scores": None}, "INCOMPLETE: 451 of 451"),
    ],
)
def test_what_is_no_result(tmp_path, changes, message):
    results = results_of(tmp_path, vqa_summary(**changes))
    card = build_model_card(ModelFacts("x", "converted", "x", [], "0.1.0", results=[results]))
    assert message in card.text and "model-index" not in card.data.to_dict()
    assert ("45.68" in card.text) == (changes.get("scores", ...) is not None)
    assert eval_result_files([results]) == {}


def test_chat_results(tmp_path):
    results = results_of(tmp_path, chat_summary(judged=False))
    card = build_model_card(ModelFacts("x", "converted", "x", [], "0.1.0", results=[results]))
    assert "INCOMPLETE: 1 of 2 questions" in card.text and "model-index" not in card.data.to_dict()
    assert ["relative_score", "mri", "75.00", "", "1"] in table_rows(card.text, 5)
    assert "gpt-4.1-mini, temperature 0; prompt comparison-1" in card.text and "judge.intranet" not in card.text
    assert "| length of the canvas, L | not recorded |" in card.text
    run = {"decoding": {"max_new_tokens": 256}, "chat_template": {"default": CHAT_TEMPLATES["llava_llada"]}}
    results = results_of(tmp_path, chat_summary() | {"data_size": 193, "n_judged": 193}, run)
    assert results.protocol["length of the canvas, L"] == "256" and results.protocol["prompt"] == "`llava_llada`"
    listed = {each.dataset_config: each for each in results.to_eval_results()}
    assert set(listed) == {"all", "conversation"} and listed["all"].metric_value == 75.0
    assert listed["all"].metric_args == {"judge": "gpt-4.1-mini", "prompt": "comparison-1", "max_new_tokens": 256}


def test_eval_result_files(tmp_path):
    """As the Hub's library reads them; only when asked for, and only of data on the Hub."""
    facts, file = facts_of("adapter", tmp_path / "facts"), tmp_path / ".eval_results/flaviagiammarino--vqa-rad.yaml"
    for asked in (False, True):
        save_model_card(facts, tmp_path, eval_results=asked)
        assert file.exists() == asked
    entries = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert [(each.dataset_id, each.task_id, each.value, each.dataset_revision) for each in entries] == [
        ("flaviagiammarino/vqa-rad", "open", 45.678, REVISION),
        ("flaviagiammarino/vqa-rad", "closed", 84.931, REVISION),
    ]  # fmt: skip
    assert "open_recall, test; max_new_tokens=64, block_length=32" in entries[0].notes
    local = vqa_summary(data=vqa_summary()["data"] | {"source": "/data/rad.json", "revision": None})
    for summary, benchmark in ((phantom_summary(), "phantoms"), (local, "vqa-rad")):
        results = results_of(tmp_path, summary)
        assert {each.dataset_type for each in results.to_eval_results()} == {benchmark}
        assert eval_result_files([results]) == {} and results.dataset_id is None
    assert results.protocol["data"] == "local data"


@pytest.mark.parametrize(
    ("report", "name", "hub_id"),
    [
        (left_out("OctoMed/VQA-RAD@abc", **VQA_RAD_DATA | {"reference": "OctoMed/VQA-RAD"}),
         "OctoMed/VQA-RAD@abc, train", "OctoMed/VQA-RAD"),
        (left_out("copies/rad", **VQA_RAD_DATA), "vqa-rad, local data, train", None),
        (left_out("phantoms:1:2", **VQA_RAD_DATA | {"benchmark": "phantoms"}), "phantoms:1:2, train", None),
        (left_out("phantoms:1:2"), "phantoms:1:2", None), (left_out("me/mine@main"), "me/mine@main", "me/mine"),
        (left_out("rows.jsonl"), "local data", None),
    ],
)  # fmt: skip
def test_names_of_training_data(report, name, hub_id):
    (data,) = training([report]).data
    assert (data.name, data.hub_id) == (name, hub_id)


@pytest.mark.parametrize("content", ["{", "[]", '{"scores": {}}', None])
def test_files_that_are_no_summary(tmp_path, content):
    file = tmp_path / "summary.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=r"`path` is .*summary\.json', which "):
        EvaluationResults.from_file(file)


# Training


def test_training_facts(tmp_path):
    facts = training([left_out("phantoms:1:9")], picture=tmp_path / "curve.png")
    assert (facts.steps, facts.epochs, facts.seconds, facts.picture) == (50, 1.0, 61.7, "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(maxcolors=10**6)) > 2
    # Without it twelve losses from the first to the last stand in.
    facts = training([left_out("phantoms:1:9")])
    assert facts.picture is None
    assert len(facts.loss_rows) == 12 and facts.loss_rows[0] == (2, "7.8000") and facts.loss_rows[-1] == (50, "3.0000")
    assert "![Loss" not in build_model_card(ModelFacts("x", "trained", "x", [], "0.1.0", training=facts)).text
    assert training([], log_history=[], picture=tmp_path / "none.png").picture is None
    for recipe in ("a: [", "- 1"):
        with pytest.raises(ValueError, match="`recipe`"):
            training([], recipe=recipe)


def test_the_card_of_an_adapter_run(tmp_path):
    """A trainer's own card: true, without its folder, and its example is a program that runs with the base model."""
    config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q|v)_proj", task_type="CAUSAL_LM")
    model, processor = load_model()
    base, folder = tmp_path / "base", tmp_path / "run"
    model.save_pretrained(base)
    processor.save_pretrained(base)
    save_model_card(facts_of("demo_model", tmp_path), base)
    folder.mkdir()
    options = {"eos_padding": 2, "eos_padding_token": "<|eot_id|>", "hub_token": "hf_" + "x" * 20, "max_steps": 2}
    trainer = make_trainer(folder, model=type(model).from_pretrained(base), peft_config=config, **options)
    trainer.train()
    trainer.save_model()
    reports = [left_out("phantoms:1:8"), left_out(str(tmp_path / "rows.json"))]

    def card_of(reports):
        (folder / "data_report.json").write_text(json.dumps(reports))
        trainer.create_model_card("mine", tags="chest")
        card = ModelCard.load(folder / "README.md")
        assert str(tmp_path) not in str(card)
        return card, card.data.to_dict()

    again, data = card_of(reports)
    assert "license" not in data and "| local data | 2000 | 1 |" in again.text
    card, data = card_of(reports[:1])
    assert data["library_name"] == "peft" and {"trl", "lora", "chest"} <= set(data["tags"])
    assert data["license"] == "apache-2.0" and "base_model" not in data
    recipe = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert recipe["learning_rate"] == 1e-2 and recipe["max_steps"] == 2
    assert recipe["eos_padding_token"] == "<|eot_id|>" and "hub_token" not in recipe
    assert not {"adam_beta1", "loss_weighting", "output_dir"} & set(recipe), "defaults are no recipe"
    assert "| optimizer steps | 2, " in card.text and (folder / "loss_curve.png").is_file()
    assert "| phantoms:1:8 | 2000 | 1 |" in card.text
    run_example(card, tmp_path, folder=folder, base=base)


def run_example(card, place, **folders):
    code = card.text.split("```python\n")[1].split("```")[0]
    for name, folder in folders.items():
        code = code.replace(f'{name} = "…"', f"{name} = {str(folder)!r}")
    random_image(64, 64).save(place / "picture.png")
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0 and run.stdout, run.stderr[-2000:]


def test_the_example_of_the_demo_model(tmp_path):
    run_example(build_model_card(facts_of("demo_model", tmp_path)), tmp_path, folder=DEMO_MODEL)


# Nothing private


@pytest.mark.parametrize(
    "text",
    [
        "/home/alice/x", "at '/root/run 1'", "vqa:slake:train:/data/alice", "zip://a.jpg::/srv/alice.zip", "~/alice",
        "~alice/x", "../alice", "./alice/x", "file:///home/alice", r"C:\Users\alice\x", "D:/alice/x", r"\\alice\share",
        "(/mnt/alice)", "x=/alice", "hf_alicealicealice", "ghp_alice0123456789", "sk-proj-alice0123_x",
        "Bearer hf_alice01234567890",
    ],
)  # fmt: skip
def test_scrubbed(text):
    cleaned = scrub(text)
    assert "alice" not in cleaned and cleaned != text and "root" not in cleaned


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/GSAI-ML/LLaDA-8B-Instruct", "GSAI-ML/LLaDA-8B-Instruct@main", "yes/no and/or 1/p",
        "phantoms:5000:2000:closed,open", "a [link](https://arxiv.org/abs/2508.01617)",
        r"model\.layers\.\d+\.(q|v)_proj", "hf_hub_download", "1.0e-4 / 2",
        "sha256 `abcd`", "~ 5", "a: b", "task-specific",
    ],
)  # fmt: skip
def test_not_scrubbed(text):
    assert scrub(text) == text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("me/mine", True), ("me/mine@main", True), ("mine", False), ("/me/mine", False), ("./mine", False),
        ("a/b/c", False), ("data/train.json", False), ("tests/golden_cards", False), ("~/mine", False), ("", False),
    ],
)  # fmt: skip
def test_hub_ids(name, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert is_hub_id(name) is expected


def test_nothing_private_gets_into_a_card(tmp_path):
    secret = "/home/alice/secret/models"
    reports = [
        left_out(f"{secret}/rows.json"), left_out("../alice/rows"), left_out(f"{secret}/slake", **VQA_RAD_DATA),
    ]  # fmt: skip
    summary = vqa_summary(data=vqa_summary()["data"] | {"source": secret}, failed=[secret], complete=False)
    chat = chat_summary() | {"data_size": 193, "name": secret}
    chat["judge"] = chat["judge"] | {"model": secret}
    facts = ModelFacts(
        name=secret, kind="trained", description=f"Made in {secret} with hf_alicealicealice",
        components=[Component(f"base in {secret}", None)], version="0.1.0", source={"checkpoint": secret},
        key_report=[f"from {secret}"], training=training(reports),
        results=[results_of(tmp_path / "alice", summary), results_of(tmp_path / "secret", chat)],
    )  # fmt: skip
    assert "judge" in str(build_model_card(facts).data.to_dict()["model-index"])
    for text in (
        str(build_model_card(facts)),
        str(build_dataset_card(load_report(source=secret, invalid=[(secret, secret)]), secret, "0.1.0")),
    ):
        for private in ("alice", "secret", "/data/SLAKE", "hf_", str(tmp_path), "images:"):
            assert private not in text
    assert yaml.safe_load(facts.training.recipe) == {
        "model_name_or_path": "(local path)",
        "train_data": ["phantoms:5000:2000", {"path": "(local path)", "weight": 2}],
        "eos_padding_token": "<|eot_id|>",
        "learning_rate": 1e-4,
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "new"}, "`kind` is 'new'; allowed are"),
        ({"relation": "copy"}, "`relation` is 'copy'; allowed are"),
        ({"kind": "trained"}, "`training` is not given for the kind 'trained'"),
        ({"training": training([])}, "`training` is given for the kind 'converted'"),
        ({"base_models": ["/home/alice/x"]}, "`base_models` holds '/home/alice/x'; allowed are Hub ids"),
    ],
)
def test_facts_that_are_wrong(values, message):
    with pytest.raises(ValueError, match=message):
        ModelFacts(**{"name": "x", "kind": "converted", "description": "x", "components": [], "version": None} | values)


def test_hashes(tmp_path):
    for name in ("a.safetensors", "b.bin"):
        (tmp_path / name).write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert hash_files(tmp_path) == {"a.safetensors": digest}


# Data


def test_the_recipe_of_a_dataset_card_builds_it():
    _, report = load_vqa("phantoms", path="3:12")
    card, names = build_dataset_card(report, "phantoms", "0.1.0", has_images=True), {}
    exec(card.text.split("```python\n")[1].split("```")[0], names)
    assert names["report"] == report and len(names["dataset"]) == 12 and "Pictures: included" in card.text
    assert card.data.to_dict()["license"] == "apache-2.0" and "show no person" in card.text


def test_pictures_that_must_not_be_published():
    hub_id = "flaviagiammarino/path-vqa"
    path_vqa = load_report(benchmark="path-vqa", source=hub_id, reference=hub_id)
    with pytest.raises(ValueError, match="`has_images` is True; allowed is False: PathVQA's MIT licence"):
        build_dataset_card(path_vqa, "x", "0.1.0", has_images=True)
    assert "They must not be passed on here" in build_dataset_card(path_vqa, "x", "0.1.0").text
