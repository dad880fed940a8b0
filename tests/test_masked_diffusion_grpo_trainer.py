"""The trainer of rewards for the model's own answers: groups, rewards, metrics, over processes, resumed, bad rows."""

import json
import logging
from functools import partial

import pytest
from trl import GRPOConfig

from lladamedv.trainers import MaskedDiffusionGRPOTrainer
from tests import training
from tests.training import (
    QUESTIONS,
    ROWS,
    adapters,
    changed,
    logged,
    losses,
    tiny_model,
    tiny_processor,
    turn,
    vowels,
    weights_of,
)


METRICS = {
    "reward", "reward_std", "rewards/vowels/mean", "rewards/vowels/std", "frac_reward_zero_std",
    "completions/mean_length", "completions/clipped_ratio", "clip_ratio/region_mean",
}  # fmt: skip


rows = ROWS["grpo"]
arguments, make_trainer, trained = (
    partial(each, "grpo") for each in (training.arguments, training.make_trainer, training.trained)
)


# What is learned


@pytest.mark.parametrize("loss_type", ["espo", "diffu_grpo", "spg"])
def test_rewards_rise(tmp_path, loss_type):
    """More vowels, by each loss. The penalty is 0 at the start: the reference is the model as it was."""
    trainer = trained(
        tmp_path, loss_type=loss_type, max_steps=12, learning_rate=3e-2, num_generations=8, logging_steps=3,
        per_device_train_batch_size=16, warmup_steps=0, lr_scheduler_type="constant",
        beta=0.0 if loss_type == "spg" else 0.01,
    )  # fmt: skip
    reward = logged(trainer, "reward")
    assert reward[-1] > reward[0] + 0.3
    if loss_type != "spg":
        kl = logged(trainer, "kl")
        assert 0 < kl[0] < kl[-1]


def test_evaluation_and_adapters(tmp_path):
    """The same prompts have the same noise, so that an evaluation says the same of the same model."""
    trainer = make_trainer(tmp_path, max_steps=2, peft_config=adapters(), eval_dataset=rows(4), beta=0.1)
    before, start = weights_of(trainer.model), trainer.evaluate()
    assert trainer.evaluate()["eval_reward"] == start["eval_reward"] and start["eval_kl"] == 0
    assert {f"eval_{name}" for name in METRICS} <= set(start)
    trainer.train()
    moved = changed(trainer.model, before)
    assert moved and all("lora_" in name for name in moved) and logged(trainer, "kl")[0] == 0


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
    processor, asked = trainer.processing_class, {row["id"]: row["answer"] for row in rows()}
    for prompts, completions, ids, answers, images, names in calls:
        assert len(prompts) == 8 and len({*names[:4]}) == len({*names[4:]}) == 1
        for prompt, completion, own, answer, pictures, name in zip(prompts, completions, ids, answers, images, names):
            assert (prompt, answer) == (turn("user", QUESTIONS[int(name[-1]) % 4]), asked[name])
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


def test_a_stream_of_which_each_step_comes_twice(tmp_path):
    trainer = trained(tmp_path, dataset=rows(8).to_iterable_dataset(), num_iterations=2)
    assert len(logged(trainer, "reward")) == 2 and len(losses(trainer)) == 4


def test_the_answers_of_a_step_are_learned_from_several_times(tmp_path):
    """Of `num_iterations=2` every second step has new answers. With a learning rate of 0 all ratios are 1, and so every
    loss minus the mean advantage, 0; with one of 0.05 they are not."""
    for rate, expected in ((0.0, pytest.approx([0.0] * 4, abs=1e-6)), (5e-2, None)):
        trainer = trained(tmp_path, num_iterations=2, learning_rate=rate, loss_type="espo", warmup_steps=0)
        if expected is not None:
            assert losses(trainer) == expected
        assert len(logged(trainer, "reward")) == 2
    assert losses(trainer)[0] == pytest.approx(0.0, abs=1e-6) and abs(losses(trainer)[1]) > 1e-4


# What is refused


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
    ],
)  # fmt: skip
def test_bad_rows_and_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options).train()
