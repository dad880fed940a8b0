"""What every trainer does: over processes, killed, resumed and accumulated; and for those of alignment the data that
they take, and what they push. The mathematics of each are in its own file."""

import json
import math

import pytest
import torch
from datasets import Image, List
from peft import get_peft_model
from safetensors.torch import load, load_file
from transformers.trainer_utils import get_last_checkpoint

from tests.training import (
    FSDP,
    QUESTIONS,
    ROWS,
    adapters,
    check_sharded,
    kill_behind,
    logged,
    losses,
    make_trainer,
    run_two_processes,
    tiny_model,
    trained,
    weights_of,
)


ALIGNED = ["dpo", "expected_reward", "grpo"]
SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ALIGNED]


@pytest.mark.parametrize("method", SLOW)
def test_accumulation_changes_nothing(tmp_path, method):
    """A whole batch at once, in halves, or in quarters: the same noise, the same loss, the same weights."""
    options = {
        "dpo": {"loss_type": ["sigmoid", "sft"]}, "expected_reward": {"max_exact_tokens": 2},
        "grpo": {"loss_type": "diffu_grpo", "beta": 0.1, "learning_rate": 1e-1},
    }[method]  # fmt: skip
    size = 16 if method == "grpo" else 4
    whole, *others = (
        trained(method, tmp_path, per_device_train_batch_size=size // parts, gradient_accumulation_steps=parts,
                optim="sgd", max_steps=2, **options)
        for parts in (1, 2, 4)
    )  # fmt: skip
    for other in others:
        for name, rel in {"grpo": {"reward": 1e-6}}.get(method, {"loss": 1e-4}).items():
            assert logged(other, name) == pytest.approx(logged(whole, name), rel=rel)
        torch.testing.assert_close(weights_of(other.model), weights_of(whole.model), atol=1e-5, rtol=1e-3)


# Other processes


@pytest.mark.slow  # tests/kills has an interrupted training, too
@pytest.mark.parametrize("method", ["sft", *ALIGNED])
def test_killed_and_resumed(tmp_path, method):
    """SIGKILL behind the second checkpoint; what is logged is what an uninterrupted run logs."""
    options = {"sft": {"max_steps": 16}, "grpo": {"max_steps": 10, "num_iterations": 2, "beta": 0.05}}
    options = options.get(method, {"max_steps": 10})
    names = {"sft": (), "dpo": ("rewards/margins",), "grpo": ("reward", "kl")}.get(method, ("reward",))
    saving = {"save_strategy": "steps", "save_steps": 2, "method": method, "lora": method != "sft"}
    kill_behind("checkpoint-4", tmp_path / "killed", options | saving)
    given = {"peft_config": adapters()} if saving.pop("lora") else {}
    whole = trained(**saving | {"save_strategy": "no"}, folder=tmp_path / "whole", **options, **given)
    last = get_last_checkpoint(str(tmp_path / "killed"))
    resumed = trained(folder=tmp_path / "killed", resume=last, **options, **saving, **given)
    assert len(losses(whole)) == options["max_steps"]
    for name in ("loss", "num_tokens", *names):
        assert logged(resumed, name) == pytest.approx(logged(whole, name), rel=1e-4, abs=1e-7) and logged(whole, name)


# The last is sharded, and compared with `two`.
RUNS = {
    "sft": {"two": {}, "tokens": {"complementary_masking": True, "loss_normalization": "tokens"}, "fsdp": {}},
    "sft, adapters": {"two": {"lora": True}, "fsdp": {"lora": True}},
    "dpo": {"copy": {}, "precomputed": {"precompute_ref_log_probs": True}, "two": {"lora": True},
            "fsdp": {"lora": True}},
    "expected_reward": {
        "copy": {"max_exact_tokens": 2}, "precomputed": {"precompute_ref_log_probs": True, "max_exact_tokens": 2},
        "none": {"beta": 0.0, "loss_type": "expected_reward"}, "two": {"lora": True}, "fsdp": {"lora": True},
    },
    "grpo": {
        "espo": {"beta": 0.1, "num_iterations": 2}, "spg": {"loss_type": "spg"},
        "two": {"lora": True, "beta": 0.05, "loss_type": "diffu_grpo", "scale_rewards": "batch"},
        "fsdp": {"lora": True, "beta": 0.05, "loss_type": "diffu_grpo", "scale_rewards": "batch"},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "sft" else pytest.mark.slow) for name in RUNS]
)
def test_two_processes_are_one_with_twice_the_batch(tmp_path, name):
    """Copied to two processes (DDP), with each kind of reference, and sharded over them (FSDP2), also resumed."""
    method, runs = name.partition(",")[0], RUNS[name]
    size, rate, near = (8, 1e-1, {"rel": 1e-3, "abs": 1e-6}) if method == "grpo" else (2, 1e-2, {"rel": 1e-4})
    common = {"method": method, "max_steps": 4, "optim": "sgd", "learning_rate": rate}
    half = common | {"per_device_train_batch_size": size, "ddp_backend": "gloo"}
    found = run_two_processes(
        [(str(tmp_path / name), half | options | (FSDP if name == "fsdp" else {})) for name, options in runs.items()]
    )
    *copied, (name, sharded) = zip(runs, found)
    for name, two in copied:
        options = {option: value for option, value in runs[name].items() if option != "lora"}
        given = {"peft_config": adapters()} if "lora" in runs[name] else {}
        one = trained(folder=tmp_path / "one", **common, per_device_train_batch_size=2 * size, **options, **given)
        assert list(two.values()) == pytest.approx(losses(one), **near) and len(two) == 4
        if not given:
            weights = load_file(tmp_path / name / "model.safetensors")
            torch.testing.assert_close(weights_of(one.model), weights, atol=1e-5, rtol=1e-3)
    near = {"rel": 1e-4, "abs": 1e-6} if method == "grpo" else {"rel": 1e-6}
    assert sharded == pytest.approx(dict(copied)["two"], **near)
    check_sharded(tmp_path, "adapter_model.safetensors" if given else "model.safetensors")


# Data


@pytest.mark.parametrize("method", ALIGNED)
def test_texts_and_streams(tmp_path, method):
    """A stream that ends within a step; a stream is evaluated as the table of its rows is, and other rows by their own
    name; prompts that are texts."""
    rows = ROWS[method]
    data = {"table": rows(4), "stream": rows(4).to_iterable_dataset(), "other": rows(2)}
    streamed = trained(
        method, tmp_path, dataset=rows(6).to_iterable_dataset(), eval_dataset=data, gradient_accumulation_steps=2
    )
    assert len(losses(streamed)) == 4 and all(map(math.isfinite, losses(streamed)))
    found = streamed.evaluate()
    table, stream, other = (found[f"eval_{each}_{'rewards/margins' if method == 'dpo' else 'reward'}"] for each in data)
    assert table == pytest.approx(stream, rel=1e-5) and table != pytest.approx(other, rel=1e-3)
    texts = {"prompt": "Big?"} | ({"chosen": "No.", "rejected": "Yes."} if method == "dpo" else {})
    lengths = {"functions": lambda completions, **_: list(map(len, completions))} if method == "grpo" else {}
    assert len(losses(trained(method, tmp_path, dataset=rows(4, **texts).remove_columns("images"), **lengths))) == 4


@pytest.mark.parametrize("method", ALIGNED)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pack_questions": 2}, "`pack_questions` is 2, which does not apply to"),
        ({"beta": -0.1}, "`beta` is -0.1; allowed are numbers"),
        ({"num_draws": 0}, "`num_draws` is 0; allowed are whole numbers of at least 1"),
        ({"adapters": True, "beta": 0.1}, "`model` comes with adapters, without which"),
        ({"prompt": []}, "`prompt`"),
    ],
    ids=str,
)
def test_bad_rows_and_options_of_alignment(tmp_path, method, options, message):
    options = dict(options)
    if options.pop("adapters", False):
        options["model"] = get_peft_model(tiny_model(), adapters())
    if "prompt" in options:
        options["dataset"] = ROWS[method](2, prompt=options.pop("prompt"))
    with pytest.raises(ValueError, match=message):
        make_trainer(method, tmp_path, **options)


# What is said and pushed

PUSHED = {
    "dpo": (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        "tuned on preferences with the loss 1 × sigmoid + 0.5 × sft (beta 0.2, 2 masks an answer)",
    ),
    "expected_reward": ({}, "tuned on rewards of candidates, 1 × choice, by closed form (beta 0.2)"),
    "grpo": (
        {"functions": ["closed_polarity", "open_f1"], "reward_weights": [1.0, 0.5], "log_completions": True},
        "tuned to earn the reward 1 × closed_polarity + 0.5 × open_f1 by the objective espo (beta 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", ALIGNED)
def test_answers_and_what_is_pushed(hub, tmp_path, method):
    """Answers are compared with what is chosen, has the highest reward, or is in the column `answer`. The card says
    what was optimised, the weights are those trained, and neither pictures nor questions leave."""
    options, objective = PUSHED[method]
    model, rows = tiny_model(), ROWS[method](4)
    model.generation_config.update(max_new_tokens=4, block_length=4, steps=4)
    trainer = trained(
        method, tmp_path / "run", model=model, eval_dataset=rows, log_answers=2, eval_strategy="steps", eval_steps=2,
        max_steps=2, save_strategy="steps", save_steps=2, **options,
    )  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    references = {"dpo": ["Yes.", "On the left side."], "expected_reward": ["No", "Right"], "grpo": ["Yes.", "left"]}
    assert [record["reference"] for record in records] == references[method]
    trainer.push_to_hub(model_name="tuned")
    files = hub.repos["me/run"]
    card = files["README.md"].decode()
    assert objective in card and f"masked-diffusion-{method.replace('_', '-')}" in card and hub.private["me/run"]
    torch.testing.assert_close(load(files["model.safetensors"]), weights_of(trainer.model), atol=0, rtol=0)
    (picture,) = rows.cast_column("images", List(Image(decode=False)))[0]["images"]
    for data in files.values():
        assert picture["bytes"] not in data and not any(asked.encode() in data for asked in QUESTIONS)
    quoting = {name for name in files if name.endswith((".png", ".jpg", ".parquet", ".jsonl", ".html"))}
    assert quoting == {"loss_curve.png"}
