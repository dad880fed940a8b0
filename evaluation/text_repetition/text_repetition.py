"""How much generated text repeats itself, in numbers.

A masked-diffusion model that fills many tokens per step writes "the the the": accuracy alone does not show it, and
word recall may even reward it. These numbers stand beside the scores wherever the number of steps is varied.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import datasets
import evaluate


_DESCRIPTION = """\
Share of distinct n-grams and of repeated ones, the longest run of one word, and the number of words, per answer.
"""

_CITATION = """\
@inproceedings{li2016diversity,
  title={A Diversity-Promoting Objective Function for Neural Conversation Models},
  author={Li, Jiwei and Galley, Michel and Brockett, Chris and Gao, Jianfeng and Dolan, Bill},
  booktitle={NAACL},
  year={2016}
}
@inproceedings{welleck2020neural,
  title={Neural Text Generation With Unlikelihood Training},
  author={Welleck, Sean and Kulikov, Ilia and Roller, Stephen and Dinan, Emily and Cho, Kyunghyun and Weston, Jason},
  booktitle={ICLR},
  year={2020}
}
"""

_INPUTS_DESCRIPTION = """
Args:
    predictions (`list[str]`): the texts. Words are what white space separates, in lower case; punctuation belongs to
        the word that it touches.
    ngram_sizes (`list[int]`, defaults to `[1, 2, 3, 4]`): the sizes n, each at least 1.
    return_items (`bool`, defaults to `False`): add `items`, the numbers of each text.

Returns:
    `dict`:
        - distinct_n, for each n: distinct n-grams / n-grams of a text, from 0 to 1, mean over the texts that have at
          least n words; `None` without such texts;
        - rep_n: 1 - distinct_n;
        - num_scored_n: how many texts have at least n words;
        - longest_run: of one word, the largest over all texts;
        - mean_longest_run: the mean over all texts, a text without words counting as 0;
        - words_per_answer: the mean over all texts;
        - num_texts, num_empty: how many texts, and how many of them without a word.

Raises:
    ValueError: if there is no text, a text is not a string, or a size is below 1.

Examples:
    >>> import evaluate
    >>> metric = evaluate.load("evaluation/text_repetition")
    >>> metric.add_batch(predictions=["the the the lung"])
    >>> results = metric.compute(ngram_sizes=[1, 2])
    >>> results["distinct_1"], round(results["distinct_2"], 4), results["longest_run"], results["words_per_answer"]
    (0.5, 0.6667, 3, 4.0)
"""


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


class TextRepetition(evaluate.Metric):
    """The metric; its arguments and results are in `inputs_description`, which `compute` also shows."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("string")}),
            reference_urls=["https://arxiv.org/abs/1510.03055", "https://arxiv.org/abs/1908.04319"],
        )

    def add_batch(self, *, predictions=None):
        """Adds texts, checked here because a number among them would be stored as text."""
        for index, text in enumerate(predictions, start=len(self)):
            if not isinstance(text, str):
                raise ValueError(f"text number {index} is not a string but {text!r}")
        super().add_batch(predictions=predictions)

    def add(self, *, prediction=None):
        """Adds one text."""
        self.add_batch(predictions=[prediction])

    def _compute(self, predictions, ngram_sizes=(1, 2, 3, 4), return_items=False):
        if not predictions:
            raise ValueError("there is no text to measure")
        if min(ngram_sizes, default=1) < 1:
            raise ValueError(f"an n-gram has at least one word, not {min(ngram_sizes)}")
        items = []
        for text in predictions:
            words, item = text.lower().split(), {}
            for size in ngram_sizes:
                ngrams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
                item[f"distinct_{size}"] = len(set(ngrams)) / len(ngrams) if ngrams else None
            longest_run = max((sum(1 for _ in run) for _, run in groupby(words)), default=0)
            items.append({**item, "longest_run": longest_run, "words": len(words)})
        results = {}
        for size in ngram_sizes:
            values = [item[f"distinct_{size}"] for item in items if item[f"distinct_{size}"] is not None]
            results[f"distinct_{size}"] = _mean(values)
            results[f"rep_{size}"] = 1 - _mean(values) if values else None
            results[f"num_scored_{size}"] = len(values)
        results["longest_run"] = max(item["longest_run"] for item in items)
        results["mean_longest_run"] = _mean([item["longest_run"] for item in items])
        results["words_per_answer"] = _mean([item["words"] for item in items])
        results["num_texts"] = len(items)
        results["num_empty"] = sum(item["words"] == 0 for item in items)
        return results | ({"items": items} if return_items else {})
