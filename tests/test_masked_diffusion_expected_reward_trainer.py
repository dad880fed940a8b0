"""The trainer of candidates' rewards: objectives by `score`, columns and rewards, over processes, resumed, bad rows."""

import logging
from functools import partial

import pytest
import torch

from tests import training
from tests.test_masked_diffusion_dpo_trainer import REFERENCES
from tests.training import CANDIDATES, QUESTIONS, ROWS, changed, tiny_model, weights_of


METRICS = {
    "reward", "rewards/choice/mean", "reward/accuracies", "entropy", "frac_reward_zero_std", "logps/candidates", "kl",
}  # fmt: skip


rows = ROWS["expected_reward"]
arguments, make_trainer, trained = (
    partial(each, "expected_reward") for each in (training.arguments, training.make_trainer, training.trained)
)


def scores(trainer, model, row):
    """Of a row's candidates, by `score`, with the end that the template has; on all masks."""
    processor = trainer.processing_class
    question = [{"type": "image", "image": row["images"][0]}, {"type": "text", "text": row["prompt"][0]["content"]}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    ended = [each + "<|eot_id|>" for each in row["candidates"]]
    answers = [processor.tokenizer(each, add_special_tokens=False).input_ids for each in ended]
    return model.eval().score(**inputs, candidates=answers, append_eos=False).log_likelihood[0].float()


# The objective


@pytest.mark.parametrize(
    "reference", [pytest.param(each, marks=pytest.mark.slow if "," in each else ()) for each in REFERENCES]
)
def test_what_is_optimised_is_the_reward_less_the_divergence(tmp_path, reference):
    """Before and after training, by `score` of the model and of that which it began with, whatever is the reference."""
    data = rows(4)
    options = {"dataset": data, "eval_dataset": data, "max_exact_tokens": 8, "loss_type": "expected_reward"}
    trainer = make_trainer(tmp_path, max_steps=12, **options, **REFERENCES[reference]())
    before, start = weights_of(trainer.model), trainer.evaluate()
    assert start["eval_kl"] == pytest.approx(0, abs=1e-6)
    trainer.train()
    after, moved = trainer.evaluate(), changed(trainer.model, before)
    assert moved and all("lora_" in name for name in moved) == ("adapters" in reference)
    assert {f"eval_{name}" for name in METRICS} <= set(after) and after["eval_reward"] > start["eval_reward"] + 0.03
    objective, rewards, right = [], [], []
    for row in data:
        now, begin = (scores(trainer, model, row) for model in (trainer.model, tiny_model()))
        log_policy, log_start = now.log_softmax(0), begin.log_softmax(0)
        own = torch.tensor([float(each == row["answer"]) for each in row["candidates"]])
        rewards.append(float(log_policy.exp() @ own))
        objective.append(float(log_policy.exp() @ (own - 0.2 * (log_policy - log_start)) + 0.1 * now.logsumexp(0)))
        right.append(float(own[log_policy.argmax()]))
    assert after["eval_reward"] == pytest.approx(sum(rewards) / 4, abs=1e-3)
    assert after["eval_loss"] == pytest.approx(-sum(objective) / 4, rel=1e-4)
    assert after["eval_reward/accuracies"] == sum(right) / 4


def test_the_closed_form_learns_what_is_unlikely(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=rows(4), max_steps=24, per_device_train_batch_size=4, beta=0.05,
                           mass_weight=0.0)  # fmt: skip
    assert trainer.args.loss_type == "closed_form"
    trainer.train()
    assert trainer.evaluate()["eval_reward"] > 0.95


def test_no_reference_without_beta(tmp_path):
    trainer = trained(tmp_path, beta=0.0, loss_type="expected_reward")
    assert trainer.ref_model is None and "kl" not in {name for each in trainer.state.log_history for name in each}
    with pytest.raises(ValueError, match="`ref_model` is given, but `beta` is 0"):
        make_trainer(tmp_path, beta=0.0, loss_type="expected_reward", ref_model=tiny_model())


# Rewards


def test_rewards_are_functions_of_candidates_and_columns(tmp_path):
    """Each is called with a candidate as completion, beside its row's columns; weighted sums are what counts."""
    seen = []

    def longest(prompts, completions, completion_ids, weight, images, trainer_state, **columns):
        texts = [each[0]["content"] for each in completions]
        seen.extend(zip(texts, [each[0]["content"] for each in prompts], weight, map(len, completion_ids)))
        assert all(len(each) == 1 for each in images) and set(columns) == {"candidates", "answer", "id"}
        return [len(text) / 10 for text in texts]

    data = rows(4).add_column("weight", [1, 2, 3, 4])
    trainer = make_trainer(tmp_path, functions=[longest, "choice"], reward_weights=[1.0, 2.0], dataset=data,
                           eval_dataset=data, reward_funcs=None)  # fmt: skip
    found = trainer.evaluate()
    expected = [(text, question, number + 1) for number, (question, texts) in enumerate(zip(QUESTIONS, CANDIDATES))
                for text in texts]
    assert sorted(each[:3] for each in seen) == sorted(expected) and min(each[3] for each in seen) >= 2
    mixed = found["eval_rewards/longest/mean"] + 2 * found["eval_rewards/choice/mean"]
    assert found["eval_reward"] == pytest.approx(mixed, abs=1e-5)


def test_rows_without_a_reward_or_a_difference(tmp_path, caplog):
    """From the first nothing is learned; the second are counted."""
    data = rows(4).map(lambda row, number: {"value": number}, with_indices=True)

    def some(completions, value, **_):
        return [None if each == 0 else 0.5 if each == 1 else float(len(text[0]["content"]))
                for text, each in zip(completions, value)]  # fmt: skip

    trainer = make_trainer(tmp_path, functions=some, dataset=data, eval_dataset=data, reward_funcs=None)
    assert trainer.evaluate()["eval_frac_reward_zero_std"] == pytest.approx(1 / 3)
    assert "No reward function applies to 2 of 9 completions" in caplog.text
    batch = trainer.data_collator([trainer.train_dataset[0]])
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss == 0 and all(weight.grad is None or not weight.grad.any() for weight in trainer.model.parameters())


# What is said


def test_a_fall_of_all_candidates_is_warned_of(tmp_path, caplog):
    """The reference is one under which they are likelier than they were."""
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, max_steps=6, per_device_train_batch_size=4)
        trainer._reference_bounds = lambda inputs, bounds_of: bounds_of(trainer.model).detach() + 3.0
        trainer.train()
    assert caplog.text.count("together become less likely than under the reference, by 3.00 nats") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": rows(2).remove_columns("candidates")}, "needed are `prompt`, `candidates` and `images`"),
        ({"dataset": rows(2).remove_columns("answer")}, "The reward function 'choice' needs 'answer'"),
        ({"dataset": rows(2, candidates=["Yes"])}, "`candidates` are not two or more different texts"),
        ({"dataset": rows(2, candidates=["Yes", "Yes "])}, "`candidates` are not two or more different texts"),
        ({"dataset": rows(2, candidates=["Yes", ""])}, "`candidates` is no list of texts that are not empty"),
        ({"dataset": rows(2, candidates=None)}, "`candidates` is no list of texts that are not empty"),
        ({"reward_funcs": ["best"]}, "`reward_funcs` holds 'best'; allowed are functions and"),
        ({"reward_funcs": None}, "needed are one or more"),
        ({"eos_padding": 2}, "`eos_padding` is 2, which does not apply to rewards of candidates"),
        ({"loss_type": "sigmoid"}, "`loss_type` is 'sigmoid'; allowed are"),
        ({"beta": 0.0}, "`beta` is 0.0; allowed are numbers above 0, or 0 with loss_type='expected_reward'"),
        ({"temperature": 0.0}, "`temperature` is 0.0; allowed are numbers above 0"),
        ({"mass_weight": -1.0}, "`mass_weight` is -1.0; allowed are numbers of at least 0"),
        ({"max_exact_tokens": 13}, "`max_exact_tokens` is 13; allowed are whole numbers up to 12"),
    ],
)  # fmt: skip
def test_bad_rows_and_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)
