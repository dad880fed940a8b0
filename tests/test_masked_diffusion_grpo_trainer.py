"""The trainer of rewards for the model's own answers: groups, rewards, metrics, over processes, resumed, bad rows."""

import json
import logging
import math
import time

import datasets
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig

from lladamedv.trainers import MaskedDiffusionGRPOConfig, MaskedDiffusionGRPOTrainer
from tests.test_masked_diffusion_dpo_trainer import adapters, turn
from tests.test_masked_diffusion_sft_trainer import (
    FSDP,
    LORA,
    changed,
    check_sharded,
    logged,
    losses,
    run_two_processes,
    start_workers,
    tiny_model,
    tiny_processor,
    weights_of,
)
from tests.tiny import random_image


QUESTIONS = [("Is it small?", "Yes."), ("Where is it?", "left"), ("What is it?", "A lung."), ("Big?", "No.")]
METRICS = {
    "reward", "reward_std", "rewards/vowels/mean", "rewards/vowels/std", "frac_reward_zero_std",
    "completions/mean_length", "completions/clipped_ratio", "clip_ratio/region_mean",
}  # fmt: skip


def rows(count=8, **changes):
    data = [
        {"prompt": turn("user", question), "answer": answer, "images": [random_image(seed=number // 4)],
         "id": f"row-{number}", **changes}
        for number in range(count) for question, answer in [QUESTIONS[number % 4]]
    ]  # fmt: skip
    return datasets.Dataset.from_list(data).cast_column("images", datasets.List(datasets.Image()))


def vowels(completions, answer, **_):
    return [sum(letter in "aeiou" for letter in completion[-1]["content"]) / 4 for completion in completions]


def arguments(folder, **options):
    options = {
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 4, "max_steps": 4,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "learning_rate": 1e-2, "bf16": False,
        "use_cpu": True, "activation_checkpointing": False, "seed": 3, "disable_tqdm": True, **options,
    }  # fmt: skip
    return MaskedDiffusionGRPOConfig(str(folder), **options)


def make_trainer(folder, model=None, dataset=None, functions=vowels, **options):
    given = {name: options.pop(name, None) for name in ("peft_config", "eval_dataset", "ref_model")}
    return MaskedDiffusionGRPOTrainer(
        model or tiny_model(), functions, arguments(folder, **options), rows() if dataset is None else dataset,
        processing_class=tiny_processor(), **given,
    )  # fmt: skip


def seen(trainer, name):
    """What was logged, also if not at every step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def trained(folder, resume=None, **options):
    trainer = make_trainer(folder, **options)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


# What is learned


@pytest.mark.parametrize("loss_type", ["espo", "diffu_grpo", "spg"])
def test_rewards_rise(tmp_path, loss_type):
    """More vowels, by each loss. The penalty is 0 at the start: the reference is the model as it was."""
    trainer = trained(
        tmp_path, loss_type=loss_type, max_steps=12, learning_rate=3e-2, num_generations=8, logging_steps=3,
        per_device_train_batch_size=16, warmup_steps=0, lr_scheduler_type="constant",
        beta=0.0 if loss_type == "spg" else 0.01,
    )  # fmt: skip
    reward = seen(trainer, "reward")
    assert reward[-1] > reward[0] + 0.3
    if loss_type != "spg":
        kl = seen(trainer, "kl")
        assert 0 < kl[0] < kl[-1]


def test_evaluation_and_adapters(tmp_path):
    """The same prompts have the same noise, so that an evaluation says the same of the same model."""
    trainer = make_trainer(tmp_path, max_steps=2, peft_config=adapters(), eval_dataset=rows(4), beta=0.1)
    before, start = weights_of(trainer.model), trainer.evaluate()
    assert trainer.evaluate()["eval_reward"] == start["eval_reward"] and start["eval_kl"] == 0
    assert {f"eval_{name}" for name in METRICS} <= set(start)
    trainer.train()
    moved = changed(trainer.model, before)
    assert moved and all("lora_" in name for name in moved) and seen(trainer, "kl")[0] == 0


def test_nothing_is_learned_without_a_difference(tmp_path, caplog):
    """Groups of equal rewards are counted, said, and move no weight."""
    trainer = make_trainer(tmp_path, functions=lambda completions, **_: [0.7] * len(completions), weight_decay=0.0)
    before = weights_of(trainer.model)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert logged(trainer, "frac_reward_zero_std") == [1.0] * 4 and not changed(trainer.model, before)
    assert caplog.text.count("in no group since the last log did rewards differ") == 1


def test_what_reward_functions_get(tmp_path):
    """Columns for each answer, pictures opened, and the answer as the evaluation reads it; a row without a reward."""
    calls = []

    def spy(prompts, completions, completion_ids, answer, images, id, trainer_state, **_):
        calls.append((prompts, completions, completion_ids, answer, images, id))
        return [
            None if answer == "left" else float(len(text[0]["content"])) for answer, text in zip(answer, completions)
        ]

    trainer = trained(tmp_path, functions=spy, max_steps=2, log_completions=True)
    processor = trainer.processing_class
    for prompts, completions, ids, answers, images, names in calls:
        assert len(prompts) == 8 and len({*names[:4]}) == len({*names[4:]}) == 1
        for prompt, completion, own, answer, pictures, name in zip(prompts, completions, ids, answers, images, names):
            assert (prompt, answer) == (turn("user", QUESTIONS[int(name[-1]) % 4][0]), QUESTIONS[int(name[-1]) % 4][1])
            assert completion == turn("assistant", processor.decode(own, skip_special_tokens=True).strip())
            assert pictures[0].size == (40, 30)
    records = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert [record["completion"] for record in records] == [each[0]["content"] for call in calls for each in call[1]]
    assert {record["step"] for record in records} == {1, 2} and all(1 <= record["tokens"] <= 4 for record in records)


def test_answers_that_are_cut(tmp_path):
    """They are counted; with `mask_truncated_completions` nothing is learned from them."""
    model = tiny_model()
    model.generation_config.eos_token_id = None  # no answer ends
    trainer = make_trainer(tmp_path, model=model, mask_truncated_completions=True, weight_decay=0.0)
    before = weights_of(trainer.model)
    trainer.train()
    assert logged(trainer, "completions/clipped_ratio") == [1.0] * 4 and not changed(trainer.model, before)


def test_a_picture_is_encoded_once(tmp_path):
    """For a group of answers; and for the masks of all answers that are learned from."""
    trainer, towers = make_trainer(tmp_path, dataset=rows(4), peft_config=adapters(), num_draws=3), []
    tower = trainer._base_model.model.vision_tower
    tower.register_forward_hook(lambda *a: towers.append(a[1][0].shape[0]))
    batch = trainer.data_collator(list(rows(4)))
    answers, _ = trainer.get_batch_samples(iter([batch]), 1, "cpu")
    assert towers == [1] * 4
    trainer.compute_loss(trainer.model, answers[0])
    assert towers == [1] * 5


# Batches and processes


def test_texts_streams_and_several_steps(tmp_path):
    streamed = trained(tmp_path, dataset=rows(6).to_iterable_dataset(), gradient_accumulation_steps=2)
    assert len(losses(streamed)) == 4 and all(map(math.isfinite, losses(streamed)))
    data = rows(4, prompt="Big?").remove_columns("images")
    texts = trained(
        tmp_path, dataset=data, functions=lambda completions, **_: [float(len(each)) for each in completions]
    )
    assert len(losses(texts)) == 4
    again = trained(tmp_path, dataset=rows(8).to_iterable_dataset(), num_iterations=2)
    assert len(seen(again, "reward")) == 2 and len(losses(again)) == 4


def test_the_answers_of_a_step_are_learned_from_several_times(tmp_path):
    """Of `num_iterations=2` every second step has new answers. With a learning rate of 0 all ratios are 1, and so every
    loss minus the mean advantage, 0; with one of 0.05 they are not."""
    for rate, expected in ((0.0, pytest.approx([0.0] * 4, abs=1e-6)), (5e-2, None)):
        trainer = trained(tmp_path, num_iterations=2, learning_rate=rate, loss_type="espo", warmup_steps=0)
        if expected is not None:
            assert losses(trainer) == expected
        assert len(seen(trainer, "reward")) == 2
    assert losses(trainer)[0] == pytest.approx(0.0, abs=1e-6) and abs(losses(trainer)[1]) > 1e-4


@pytest.mark.slow
def test_accumulation_changes_nothing(tmp_path):
    options = {"optim": "sgd", "learning_rate": 1e-1, "max_steps": 2, "loss_type": "diffu_grpo", "beta": 0.1}
    whole, *others = (
        trained(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=16 // size, **options)
        for size in (16, 8, 4)
    )
    for other in others:
        assert logged(other, "reward") == pytest.approx(logged(whole, "reward"), rel=1e-6)
        torch.testing.assert_close(weights_of(other.model), weights_of(whole.model), atol=1e-5, rtol=1e-3)


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    """SIGKILL behind the second checkpoint; losses and rewards are those of an uninterrupted run."""
    options = {"max_steps": 10, "num_iterations": 2, "beta": 0.05, "lora": LORA}
    saving = {"save_strategy": "steps", "save_steps": 2}
    process = start_workers([(str(tmp_path / "killed"), options | saving | {"method": "grpo"})])
    state = tmp_path / "killed" / "checkpoint-4" / "trainer_state.json"
    while not (state.exists() and state.read_text().endswith("}\n")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (tmp_path / "killed" / "losses.json").exists()
    options.pop("lora")
    whole = trained(tmp_path / "whole", peft_config=adapters(), **options)
    last = get_last_checkpoint(str(tmp_path / "killed"))
    resumed = trained(tmp_path / "killed", last, peft_config=adapters(), **options, **saving)
    for name in ("loss", "reward", "kl", "num_tokens"):
        assert seen(resumed, name) == pytest.approx(seen(whole, name), rel=1e-4, abs=1e-7) and seen(whole, name)


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    """Each loss; with a copy as reference, and with adapters."""
    common = {"max_steps": 4, "optim": "sgd", "learning_rate": 1e-1}
    half = common | {"per_device_train_batch_size": 8, "ddp_backend": "gloo", "method": "grpo"}
    runs = {"espo": {"beta": 0.1, "num_iterations": 2}, "diffu_grpo": {"scale_rewards": "batch"}, "spg": {"lora": LORA}}
    runs = {name: {"loss_type": name, **options} for name, options in runs.items()}
    found = run_two_processes([(str(tmp_path / name), half | options) for name, options in runs.items()])
    for (name, options), two in zip(runs.items(), found):
        options = {k: v for k, v in options.items() if k != "lora"} | (
            {"peft_config": adapters()} if name == "spg" else {}
        )
        one = trained(tmp_path / "one", **common, per_device_train_batch_size=16, **options)
        assert list(two.values()) == pytest.approx(losses(one), rel=1e-3, abs=1e-6) and len(two) == 4
        if name != "spg":
            weights = load_file(tmp_path / name / "model.safetensors")
            torch.testing.assert_close(weights_of(one.model), weights, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
def test_sharded(tmp_path):
    """Processes generate in passes of their own number, with all weights."""
    common = {"max_steps": 4, "ddp_backend": "gloo", "lora": LORA, "method": "grpo", "beta": 0.05}
    two, sharded = run_two_processes([(str(tmp_path / "two"), common), (str(tmp_path / "fsdp"), common | FSDP)])
    assert list(sharded.values()) == pytest.approx(list(two.values()), rel=1e-4, abs=1e-6)
    check_sharded(tmp_path, "adapter_model.safetensors")


# What is said


def test_answers_and_card(tmp_path):
    options = {"eval_dataset": rows(4), "log_answers": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    trainer = trained(tmp_path, functions=["closed_polarity", "open_f1"], reward_weights=[1.0, 0.5], **options)
    records = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [record["reference"] for record in records] == ["Yes.", "left"]
    trainer.create_model_card("tuned")
    card = (tmp_path / "README.md").read_text()
    assert "tuned to earn the reward 1 × closed_polarity + 0.5 × open_f1 by the objective espo (beta 0" in card
    assert "masked-diffusion-grpo" in card


def test_arguments_of_trl(tmp_path):
    """A GRPOConfig is taken over, also its scaling of rewards; what means nothing here is refused."""
    config = GRPOConfig(str(tmp_path), beta=0.3, bf16=False, use_cpu=True, report_to=[], max_completion_length=8)
    trainer = MaskedDiffusionGRPOTrainer(tiny_model(), vowels, config, rows(2), processing_class=tiny_processor())
    args = trainer.args
    assert (args.beta, args.loss_type, args.learning_rate, args.scale_rewards) == (0.3, "espo", 1e-6, "group")
    config.top_p = 0.5
    with pytest.raises(ValueError, match=r"`top_p` is 0\.5, which does not apply to rewards"):
        MaskedDiffusionGRPOTrainer(tiny_model(), vowels, config, rows(2), processing_class=tiny_processor())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": rows(2).remove_columns("prompt")}, "needed are `prompt` and `images`"),
        ({"dataset": rows(2).remove_columns("answer")}, r"'vowels' needs 'answer'; `train_dataset` has the columns"),
        ({"dataset": rows(2, prompt=turn("assistant", "Yes."))}, "`prompt` does not end with the user's turn"),
        ({"dataset": rows(2, answer=" ")}, "`answer` is empty"),
        ({"dataset": rows(2), "max_length": 30}, "more than 30 tokens"),
        ({"functions": None}, "needed are one or more"),
        ({"temperature": 0.0}, "`temperature` is 0.0; allowed are numbers above 0; at 0 all answers"),
        ({"num_generations": 3}, "`num_generations` 3; every process has whole groups"),
        ({"num_generations": 1}, "`num_generations` is 1; allowed are whole numbers of at least 2"),
        ({"loss_type": "dapo"}, r"`loss_type` is 'dapo'; allowed are \('diffu_grpo', 'espo', 'spg'\)"),
        ({"loss_type": "spg", "beta": 0.1}, "`beta` is 0.1, but `loss_type` is 'spg'; it belongs to diffu_grpo"),
        ({"loss_type": "diffu_grpo", "num_draws": 2}, "`num_draws` is 2, but `loss_type` is 'diffu_grpo'"),
        ({"num_iterations": 3, "save_strategy": "steps", "save_steps": 4}, "`save_steps` is 4 and `num_iterations` 3"),
        ({"num_iterations": 2, "dataset": rows(1)}, "`train_dataset` has 1 rows, but a step of `num_iterations`"),
        ({"generation_kwargs": {"steps": 3, "block_length": 2}}, "steps"),
        ({"generation_kwargs": {"blocks": 2}}, "blocks"),
        ({"ref_model": "anything"}, "`ref_model` is given, but `beta` is 0"),
        ({"model": get_peft_model(tiny_model(), adapters()), "beta": 0.1}, "`model` comes with adapters.*give a"),
    ],
)  # fmt: skip
def test_bad_rows_and_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options).train()
