"""Rewards from the metrics, in TRL's form: checked against the evaluate module, and by what they must not pay for."""

import importlib
import logging
import math

import evaluate
import pytest
import torch

from lladamedv.trainers.rewards import REWARDS, Rewards


MODULE = importlib.import_module("lladamedv.evaluation.medical_vqa.medical_vqa").__file__
CASES = [
    ("Yes.", "Yes"), ("No, yes", "Yes"), ("There is no nodule", "No"), ("A nodule", "No"), ("", "Yes"), ("True", "Yes"),
    ("left lung", "Left lung"), ("left left left", "left lung"), ("the lung", "left lung"), ("", "left"),
]  # fmt: skip


def test_they_are_the_metrics():
    """What the metric says of each item; a closed answer is the one's, an open answer the other's."""
    metric = evaluate.load(MODULE)
    kinds = ["closed" if true in ("Yes", "No") else "open" for _, true in CASES]
    metric.add_batch(
        predictions=[text for text, _ in CASES],
        references=[{"answer": true, "answer_type": kind} for (_, true), kind in zip(CASES, kinds)],
    )
    items = metric.compute(return_items=True)["items"]
    texts, answers = map(list, zip(*CASES))
    for name, kind, score in (("closed_polarity", "closed", "closed_accuracy"), ("open_f1", "open", "open_f1")):
        expected = [item[score] if item["answer_type"] == kind else None for item in items]
        assert REWARDS[name](prompts=texts, completions=texts, answer=answers, image_id=answers) == expected


@pytest.mark.parametrize(
    ("text", "chosen", "formed"),
    [
        ("Left lung", 1, 1), ("It is the left lung.", 1, 0), ("left", 0, 1), ("left or left lung", 0, 0),
        ("left, right and left lung", 0, 0), ("right", 0, 1), ("", 0, 0),
    ],
)  # fmt: skip
def test_choices(text, chosen, formed):
    """Naming all candidates earns nothing. Completions of conversations are messages."""
    completion = [{"role": "assistant", "content": text}]
    rows = {"answer": ["left lung"] * 2, "candidates": [["left", "left lung", "right"], None]}
    rewards = Rewards(["choice", "candidate_format"])([["Where?"]] * 2, [completion] * 2, rows)
    expected = chosen if text != "left or left lung" else 1  # "left" is a part of "left lung"
    assert rewards[0].tolist() == [expected, formed] and rewards[1].isnan().all()


@pytest.mark.parametrize(("answer", "candidates"), [("up", ["left", "right"]), ("A", ["A", "B"]), ("b", ["B", "b"])])
def test_choices_without_the_answer(answer, candidates):
    with pytest.raises(ValueError, match="the answer must be one of them, and each must have a word"):
        REWARDS["choice"](completions=["left"], answer=[answer], candidates=[candidates])


def by(*values):
    def reward(prompts, completions, answer, **_):
        return list(values)

    return reward


def test_none_and_nan_do_not_apply(caplog):
    """As in TRL: other functions count, and a completion that none applies to has no reward, which is said."""
    first, second = by(1, None, None), by(0.5, 2, math.nan)
    second.__name__ = "second"
    rewards = Rewards([first, second], [1.0, 0.1])
    with caplog.at_level(logging.WARNING):
        found = rewards(["p"] * 3, ["a", "b", "c"], {"answer": ["x"] * 3})
    torch.testing.assert_close(rewards.total(found), torch.tensor([1.05, 0.2, torch.nan]), equal_nan=True)
    assert "No reward function applies to 1 of 3 completions" in caplog.text and "'c' after 'p'" in caplog.text


@pytest.mark.parametrize(("values", "count"), [((1, 2), 2), ((1, 2, 3, 4), 4), ((1, 2, math.inf), 3), ((), 0)])
def test_wrong_rewards(values, count):
    with pytest.raises(ValueError, match=f"'reward' returned {count} rewards for 3 completions"):
        Rewards(by(*values))(["p"] * 3, ["a", "b", "c"], {"answer": ["x"] * 3})


async def coroutine(prompts, completions, **_):
    return [0.0]


@pytest.mark.parametrize(
    ("functions", "weights", "error", "message"),
    [
        ("accuracy", None, ValueError, "holds 'accuracy'; allowed are functions and closed_polarity, open_f1, choice"),
        ([], None, ValueError, "needed are one or more"),
        (["open_f1", "open_f1"], None, ValueError, "of different names"),
        (["open_f1"], [1.0, 2.0], ValueError, r"`reward_weights` is \[1.0, 2.0\]; `reward_funcs` are 1"),
        (torch.nn.Linear(2, 2), None, TypeError, "holds a Linear"),
        (coroutine, None, TypeError, "holds a function; allowed are plain functions"),
    ],
)
def test_refused(functions, weights, error, message):
    with pytest.raises(error, match=message):
        Rewards(functions, weights)


def test_missing_columns():
    Rewards([by(1), "open_f1"]).check_columns(["prompt", "answer"], "train_dataset")
    with pytest.raises(ValueError, match=r"'choice' needs 'candidates'; `train_dataset` has the columns \['answer'"):
        Rewards(["choice"]).check_columns(["answer", "prompt"], "train_dataset")
