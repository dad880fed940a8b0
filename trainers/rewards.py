"""Rewards that can be checked: our metrics as functions in TRL's form, and how a trainer asks several of them.

A reward function is called as TRL's `GRPOTrainer` calls it, `f(prompts=…, completions=…, **columns)`, with the columns
of the data set by name, one value a completion, and returns one number a completion, or `None` where it does not apply.
Completions are texts, or chat messages where prompts are.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from lladamedv.evaluation.medical_vqa.medical_vqa import closed_polarity as polarities
from lladamedv.evaluation.medical_vqa.medical_vqa import contains_words, score_closed, score_open
from lladamedv.evaluation.medical_vqa.vqa_normalization import normalize_answer


logger = logging.getLogger(__name__)
# What a reward function is given besides the columns of the data set.
_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state")


# The functions


def closed_polarity(completions, answer, **_) -> list[float | None]:
    """1 where the completion says yes or no as `answer` does, else 0 (`closed_accuracy` of the metric `medical_vqa`);
    `None` where `answer` says neither."""
    return [
        None if polarities("", true)[1] is None else score_closed(text, true)["closed_accuracy"]
        for text, true in zip(texts_of(completions), answer)
    ]


def open_f1(completions, answer, **_) -> list[float | None]:
    """F1 of the words of completion and `answer`, in [0, 1] (`open_f1` of the metric `medical_vqa`): more words than
    asked for cost precision. `None` where `answer` says yes or no, which is [`closed_polarity`]'s."""
    return [
        score_open(text, true)["open_f1"] if polarities("", true)[1] is None else None
        for text, true in zip(texts_of(completions), answer)
    ]


def choice(completions, answer, candidates, **_) -> list[float | None]:
    """1 where the completion names `answer` and no other of the row's `candidates`, else 0; `None` without candidates.

    A candidate is named where its words stand in the completion one after the other; of "left" and "left lung" the
    longer. Naming all of them earns nothing.
    """
    rewards = []
    for text, true, options in zip(texts_of(completions), answer, candidates):
        if not options:
            rewards.append(None)
            continue
        options, true, said = [_words(each) for each in options], _words(true), _words(text)
        if options.count(true) != 1 or [] in options:
            raise ValueError(
                f"`answer` is {true} and `candidates` are {options}, as words without articles; the answer must be one "
                "of them, and each must have a word."
            )
        named = [each for each in options if contains_words(said, each)]
        named = [each for each in named if not any(each != other and contains_words(other, each) for other in named)]
        rewards.append(float(named == [true]))
    return rewards


def candidate_format(completions, candidates, **_) -> list[float | None]:
    """1 where the completion is one of the row's `candidates` and nothing else, right or wrong; `None` without
    candidates."""
    return [
        float(_words(text) in map(_words, options)) if options else None
        for text, options in zip(texts_of(completions), candidates)
    ]


def _words(text: str) -> list[str]:
    return normalize_answer(text).split()


def texts_of(completions: Sequence) -> list[str]:
    """Completions as texts, also where they are chat messages."""
    return [each if isinstance(each, str) else each[-1]["content"] for each in completions]


# By name, for recipes and the command line.
REWARDS = {function.__name__: function for function in (closed_polarity, open_f1, choice, candidate_format)}


# Several of them


class Rewards:
    """Reward functions and their weights.

    Args:
        functions: one or more; each a function in TRL's form, or a name in `REWARDS`.
        weights: of each; by default 1.

    Attributes:
        names (`list[str]`): of the functions, as logged.
        weights (`torch.FloatTensor` of shape `(functions,)`).

    Raises:
        TypeError: for what is no such function: reward models and coroutines are not.
        ValueError: for an unknown name, a name twice, or weights of another number.
    """

    def __init__(self, functions: Callable | str | Sequence, weights: Sequence[float] | None = None):
        functions = list(functions) if isinstance(functions, (list, tuple)) else [functions]
        for function in functions:
            if isinstance(function, str) and function not in REWARDS:
                raise ValueError(f"`reward_funcs` holds {function!r}; allowed are functions and {', '.join(REWARDS)}.")
        self.functions = [REWARDS[each] if isinstance(each, str) else each for each in functions]
        for function in self.functions:
            if not callable(function) or isinstance(function, nn.Module) or inspect.iscoroutinefunction(function):
                kind = "reward model" if isinstance(function, PreTrainedModel) else type(function).__name__
                raise TypeError(f"`reward_funcs` holds a {kind}; allowed are plain functions and {', '.join(REWARDS)}.")
        self.names = [getattr(each, "__name__", type(each).__name__) for each in self.functions]
        if not functions or len(set(self.names)) < len(self.names):
            raise ValueError(f"`reward_funcs` are {self.names}; needed are one or more, of different names.")
        self.weights = torch.ones(len(self.names)) if weights is None else torch.tensor(weights, dtype=torch.float32)
        if self.weights.shape != (len(self.names),):
            raise ValueError(f"`reward_weights` is {weights}; `reward_funcs` are {len(self.names)}: {self.names}.")

    def check_columns(self, columns: Sequence[str], name: str) -> None:
        """
        Raises:
            ValueError: if a function needs a column that the data set `name` does not have.
        """
        for label, function in zip(self.names, self.functions):
            needed = [
                parameter.name
                for parameter in inspect.signature(function).parameters.values()
                if parameter.default is parameter.empty
                and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            ]
            if missing := [each for each in needed if each not in (*columns, *_GIVEN)]:
                raise ValueError(
                    f"The reward function {label!r} needs {', '.join(map(repr, missing))}; `{name}` has the columns "
                    f"{sorted(columns)}."
                )

    def __call__(self, prompts: list, completions: list, columns: dict[str, list], **given) -> torch.FloatTensor:
        """What every function says of every completion.

        Args:
            prompts, completions: as many of each.
            columns: of the data set, as long.
            given: what else functions in TRL's form get, `completion_ids` and `trainer_state`.

        Returns:
            `(completions, functions)`, NaN where a function does not apply: it returned `None`, or NaN.

        Raises:
            ValueError: for another number of rewards than of completions, or an infinite one.
        """
        found = []
        for name, function in zip(self.names, self.functions):
            rewards = function(prompts=prompts, completions=completions, **given, **columns)
            rewards = [math.nan if each is None else float(each) for each in rewards]
            if len(rewards) != len(completions) or math.inf in map(abs, rewards):
                raise ValueError(
                    f"The reward function {name!r} returned {len(rewards)} rewards for {len(completions)} completions: "
                    f"{rewards!r:.200}; needed is one finite number for each, or None where it does not apply."
                )
            found.append(rewards)
        found = torch.tensor(found).T
        if bool((nothing := found.isnan().all(dim=1)).any()):
            row = int(nothing.nonzero()[0])
            logger.warning(
                "No reward function applies to %d of %d completions, from which nothing is learned, as in %r after %r.",
                int(nothing.sum()), len(nothing), completions[row], prompts[row],
            )  # fmt: skip
        return found

    def total(self, rewards: torch.FloatTensor) -> torch.FloatTensor:
        """The weighted sum of what `__call__` returns, `(completions,)`; NaN where no function applies."""
        total = (rewards * self.weights.to(rewards.device)).nansum(dim=1)
        return total.masked_fill(rewards.isnan().all(dim=1), math.nan)


__all__ = ["REWARDS", "Rewards", "candidate_format", "choice", "closed_polarity", "open_f1", "texts_of"]
