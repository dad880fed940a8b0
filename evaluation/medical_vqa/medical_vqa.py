"""Medical VQA scores that can be trusted, beside the ones that published tables were made with.

LLaVA-Med's evaluation code counts a repeated word as often as it is repeated and finds "no" inside "nodule". A
masked-diffusion model repeats words when it takes few steps, so these faults flatter it in particular. The headline
numbers here have neither fault; the published variants stand beside them under names that end in `_llava_med`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from .vqa_normalization import normalize_answer


ANSWER_TYPES = ("open", "closed")
HEADLINES = {"closed": "closed_accuracy", "open": "open_recall"}
POLARITY = ("yes", "no")
_TRUTH_VALUES = {"true": "yes", "false": "no"}

_DESCRIPTION = """\
Accuracy of answers to closed questions and token recall, precision, F1, exact match and BLEU of answers to open ones,
on text normalised as in the VQA v2 evaluation; and the variants that LLaVA-Med's tables were made with.
"""

_CITATION = """\
@article{li2023llavamed,
  title={{LLaVA-Med}: Training a Large Language-and-Vision Assistant for Biomedicine in One Day},
  author={Li, Chunyuan and Wong, Cliff and Zhang, Sheng and Usuyama, Naoto and Liu, Haotian and Yang, Jianwei and
    Naumann, Tristan and Poon, Hoifung and Gao, Jianfeng},
  journal={arXiv preprint arXiv:2306.00890},
  year={2023}
}
@inproceedings{goyal2017making,
  title={Making the {V} in {VQA} Matter: Elevating the Role of Image Understanding in Visual Question Answering},
  author={Goyal, Yash and Khot, Tejas and Summers-Stay, Douglas and Batra, Dhruv and Parikh, Devi},
  booktitle={CVPR},
  year={2017}
}
"""

_INPUTS_DESCRIPTION = """
Args:
    predictions (`list[str]`): the answers that the model gave. An empty one is wrong, and counted.
    references (`list[dict]`): for each prediction
        - answer (`str`): the true answer, not blank;
        - answer_type (`str`): "open" or "closed", in any case;
        - id (`str` or `int`, *optional*): must be unique, and given for all items or for none;
        - image_id (`str` or `int`, *optional*): needed by the bootstrap.
      Other keys are ignored, so rows of a data set can be passed as they are.
    candidates (`list[str]`, *optional*): the answers to the open questions of the training split, for
        `open_candidate_accuracy_llava_med`.
    bootstrap_samples (`int`, defaults to 0): how often the images are drawn anew for 95 % confidence intervals;
        0 computes none.
    seed (`int`, defaults to 0): of the bootstrap.
    return_items (`bool`, defaults to `False`): add `items`, the scores of each item between 0 and 1.

Returns:
    `dict`: scores from 0 to 100, means over the items of their type with equal weights, `None` without such items:
        - closed_accuracy: the first "yes" or "no" among the words of the prediction is also the first of the truth; for
          a truth with neither: its words occur in the prediction, one after the other. For the truths "true" and
          "false", these words count in predictions like "yes" and "no";
        - open_recall, open_precision, open_f1: of words, each counted at most as often as it occurs on both sides;
        - open_exact_match: nothing but the truth;
        - open_bleu_1, open_bleu_2, open_bleu_3: of n-grams of that size alone, with the brevity penalty;
        - closed_accuracy_llava_med: the truth is a substring of the prediction;
        - closed_gated_accuracy_llava_med: the same, but wrong without "yes" or "no" as a substring;
        - open_recall_llava_med, open_precision_llava_med, open_f1_llava_med: a word that both sides have counts as
          often as the prediction repeats it;
        - open_exact_match_llava_med: not an exact match: distinct common words per word of the prediction;
        - open_accuracy_llava_med: the truth is a substring of the prediction;
        - open_candidate_accuracy_llava_med: the candidate that shares the largest part of its distinct words with the
          prediction, the first of equals, is the truth; only with `candidates`.
      Counts:
        - num_open, num_closed;
        - num_empty_predictions: blank ones;
        - num_unparsable: closed questions whose truth has a yes or no and whose prediction has neither;
        - num_wordless_answers: true answers of which normalisation leaves nothing, such as "A"; every answer to them
          is wrong, but right for the variants that look for a substring.
      With `bootstrap_samples`, `<score>_ci95`: `[low, high]`, and `None` where fewer than two images have items of
      that type.

Raises:
    ValueError: naming the item, if it has no answer or no type, a prediction that is not text, an id that another
        item has, or no image id where the bootstrap needs one; if the numbers of predictions and references differ;
        if there is no item; if `candidates` is empty.

Examples:
    >>> import evaluate
    >>> metric = evaluate.load("evaluation/medical_vqa")
    >>> metric.add_batch(
    ...     predictions=["left left left", "A nodule, and the heart is normal."],
    ...     references=[
    ...         {"id": "1", "answer": "left lung", "answer_type": "open"},
    ...         {"id": "2", "answer": "no", "answer_type": "closed"},
    ...     ],
    ... )
    >>> scores = metric.compute()
    >>> scores["open_recall"], scores["open_recall_llava_med"]
    (50.0, 75.0)
    >>> scores["closed_accuracy"], scores["closed_accuracy_llava_med"], scores["num_unparsable"]
    (0.0, 100.0, 1)
"""


def overlap(prediction: Sequence[str], answer: Sequence[str]) -> tuple[float, float, float]:
    """Precision, recall and F1 of words as multisets, each in [0, 1]; all 0 where either side is empty."""
    common = (Counter(prediction) & Counter(answer)).total()
    if common == 0:
        return 0.0, 0.0, 0.0
    return common / len(prediction), common / len(answer), 2 * common / (len(prediction) + len(answer))


def overlap_llava_med(prediction: Sequence[str], answer: Sequence[str]) -> tuple[float, float, float]:
    """Precision, recall and F1 as LLaVA-Med computes them: a common word counts as often as the *prediction* has it.

    Repeating a correct word therefore raises the recall, whatever the answer has.
    """
    predicted, true = Counter(prediction), Counter(answer)
    common = sum(count for word, count in predicted.items() if word in true)
    if common == 0:
        return 0.0, 0.0, 0.0
    missed = sum(count for word, count in true.items() if word not in predicted)
    precision, recall = common / len(prediction), common / (common + missed)
    return precision, recall, 2 * precision * recall / (precision + recall)


def bleu(prediction: Sequence[str], answer: Sequence[str], order: int) -> float:
    """BLEU of n-grams of one size (Papineni et al., 2002, with all weight on `order`), unsmoothed, in [0, 1]."""
    predicted, true = (
        Counter(tuple(words[start : start + order]) for start in range(len(words) - order + 1))
        for words in (prediction, answer)
    )
    if not predicted:
        return 0.0
    brevity_penalty = min(1.0, math.exp(1 - len(answer) / len(prediction)))
    return brevity_penalty * (predicted & true).total() / predicted.total()


def contains_words(prediction: Sequence[str], answer: Sequence[str]) -> bool:
    """Whether the words of the answer, at least one, occur in the prediction one after the other."""
    starts = range(len(prediction) - len(answer) + 1)
    return bool(answer) and any(prediction[start : start + len(answer)] == answer for start in starts)


def closed_polarity(prediction: str, answer: str) -> tuple[str | None, str | None]:
    """What the prediction and the true answer to a closed question say, "yes", "no", or `None` for neither.

    "True" and "false" are read so only where they are all that the true answer says: elsewhere they are attributes, as
    in "false aneurysm".
    """
    predicted, true = normalize_answer(prediction).split(), normalize_answer(answer).split()
    if len(true) == 1 and true[0] in _TRUTH_VALUES:
        predicted, true = ([_TRUTH_VALUES.get(word, word) for word in words] for words in (predicted, true))
    return tuple(next((word for word in words if word in POLARITY), None) for words in (predicted, true))


def score_closed(prediction: str, answer: str) -> dict[str, float]:
    """Scores of one answer to a closed question, each 0 or 1; the texts come as they are."""
    predicted, true = closed_polarity(prediction, answer)
    if true is None:
        correct = contains_words(normalize_answer(prediction).split(), normalize_answer(answer).split())
    else:
        correct = predicted == true
    legacy_prediction, legacy_answer = normalize_answer(prediction, "vqa_v2"), normalize_answer(answer, "vqa_v2")
    contained = bool(legacy_prediction) and legacy_answer in legacy_prediction
    return {
        "closed_accuracy": float(correct),
        "closed_accuracy_llava_med": float(contained),
        "closed_gated_accuracy_llava_med": float(contained and any(word in legacy_prediction for word in POLARITY)),
    }


def score_open(prediction: str, answer: str, candidates: Sequence[str] | None = None) -> dict[str, float]:
    """Scores of one answer to an open question, each at least 0 and at most 1; the texts come as they are.

    `candidates` are normalised with `"vqa_v2"` beforehand, since there are thousands of them.
    """
    predicted, true = normalize_answer(prediction).split(), normalize_answer(answer).split()
    legacy_prediction, legacy_answer = normalize_answer(prediction, "vqa_v2"), normalize_answer(answer, "vqa_v2")
    legacy_predicted, legacy_true = legacy_prediction.split(), legacy_answer.split()
    distinct_common = len(set(legacy_predicted) & set(legacy_true))
    scores = {
        **dict(zip(("open_precision", "open_recall", "open_f1"), overlap(predicted, true))),
        "open_exact_match": float(bool(true) and predicted == true),
        **{f"open_bleu_{order}": bleu(predicted, true, order) for order in (1, 2, 3)},
        **dict(zip(
            ("open_precision_llava_med", "open_recall_llava_med", "open_f1_llava_med"),
            overlap_llava_med(legacy_predicted, legacy_true),
        )),
        "open_exact_match_llava_med": distinct_common / len(legacy_predicted) if legacy_predicted else 0.0,
        "open_accuracy_llava_med": float(bool(legacy_prediction) and legacy_answer in legacy_prediction),
    }  # fmt: skip
    if candidates is not None:

        def shared(candidate: str) -> float:
            words = set(candidate.split())
            return len(words.intersection(legacy_predicted)) / max(1, len(words))

        # The first of equals is chosen, so the first of all if none shares a word: that is how LLaVA-Med classifies.
        chosen = max(candidates, key=shared)
        scores["open_candidate_accuracy_llava_med"] = float(bool(legacy_predicted) and chosen == legacy_answer)
    return scores


def bootstrap_intervals(scores: np.ndarray, image_ids: Sequence[str], samples: int, seed: int) -> np.ndarray | None:
    """95 % percentile intervals of mean scores, with images drawn anew and not items.

    Questions about one image are answered well or badly together; drawing items would make the intervals too narrow.

    Args:
        scores (`np.ndarray` of shape `(items, scores)`): of each item.
        image_ids (`Sequence[str]` of length `items`): the image of each item.
        samples (`int`, at least 1): how often the images are drawn, as many as there are, with replacement.
        seed (`int`): of the draws.

    Returns:
        `np.ndarray` of shape `(scores, 2)`, or `None` for fewer than two images, which say nothing about the spread.

    Source: the cluster bootstrap with percentile intervals (Davison and Hinkley, Bootstrap Methods and their
    Application, 1997, section 3.8).
    """
    images, image_of_item = np.unique(np.asarray(image_ids), return_inverse=True)
    if len(images) < 2:
        return None
    sums = np.zeros((len(images), scores.shape[1]))  # (images, scores)
    np.add.at(sums, image_of_item, scores)
    counts = np.bincount(image_of_item)  # (images,)
    chances = np.full(len(images), 1 / len(images))
    draws = np.random.default_rng(seed).multinomial(len(images), chances, size=samples)  # (samples, images)
    means = draws @ sums / (draws @ counts)[:, None]  # (samples, scores)
    return np.percentile(means, [2.5, 97.5], axis=0).T


def complete_reference(prediction: object, reference: object, name: str) -> dict[str, str]:
    """The fields that the metric keeps, checked; `name` says which item an error is about.

    An identifier that is not there becomes "": `evaluate` stores no text that is missing.
    """
    if not isinstance(reference, dict):
        raise ValueError(f"the reference of {name} must be a dict with answer and answer_type, not {reference!r}")
    if reference.get("id") is not None:
        name = f"item {str(reference['id'])!r}"
    if not isinstance(prediction, str):
        raise ValueError(f"the prediction of {name} is not text but {prediction!r}")
    answer, answer_type = reference.get("answer"), reference.get("answer_type")
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"{name} has no answer: {answer!r}")
    # Some published tables have upper-case types with blanks behind them.
    kind = answer_type.strip().lower() if isinstance(answer_type, str) else answer_type
    if kind not in ANSWER_TYPES:
        raise ValueError(f"{name} has no answer type: expected one of {ANSWER_TYPES}, not {answer_type!r}")
    identifiers = {key: reference.get(key) for key in ("id", "image_id")}
    texts = {key: "" if value is None else str(value) for key, value in identifiers.items()}
    return {**texts, "answer": answer, "answer_type": kind}


class MedicalVQA(evaluate.Metric):
    """The metric; its arguments and results are in `inputs_description`, which `compute` also shows."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features(
                predictions=text, references={"id": text, "image_id": text, "answer": text, "answer_type": text}
            ),
            reference_urls=["https://arxiv.org/abs/2306.00890", "https://visualqa.org/evaluation.html"],
        )

    def add_batch(self, *, predictions=None, references=None):
        """Adds predictions and references, checked here because what is stored no longer says what was missing."""
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions but {len(references)} references")
        references = [
            complete_reference(prediction, reference, f"item number {index}")
            for index, (prediction, reference) in enumerate(zip(predictions, references), start=len(self))
        ]
        super().add_batch(predictions=predictions, references=references)

    def add(self, *, prediction=None, reference=None):
        """Adds one prediction and its reference."""
        self.add_batch(predictions=[prediction], references=[reference])

    def _compute(self, predictions, references, candidates=None, bootstrap_samples=0, seed=0, return_items=False):
        if not predictions:
            raise ValueError("there is no item to score")
        ids = [reference["id"] for reference in references]
        if any(ids) and not all(ids):
            raise ValueError(f"item number {ids.index('')} has no id, but others have one")
        item, count = Counter(ids).most_common(1)[0]
        if item and count > 1:
            raise ValueError(f"id {item!r} occurs more than once")
        unknown = [index for index, reference in enumerate(references) if not reference["image_id"]]
        if bootstrap_samples and unknown:
            name = f"item {ids[unknown[0]]!r}" if ids[unknown[0]] else f"item number {unknown[0]}"
            raise ValueError(f"the bootstrap draws images, but {name} has no image_id")
        if candidates is not None:
            candidates = [normalize_answer(candidate, "vqa_v2") for candidate in candidates]
            if not candidates:
                raise ValueError("candidates must not be empty; leave them out to skip the score that needs them")
        score = {"open": lambda *texts: score_open(*texts, candidates), "closed": score_closed}
        items = [
            {**reference, "prediction": text, **score[reference["answer_type"]](text, reference["answer"])}
            for text, reference in zip(predictions, references)
        ]
        results = {}
        for answer_type in ANSWER_TYPES:
            chosen = [item for item in items if item["answer_type"] == answer_type]
            names = list(score[answer_type]("", ""))  # also where a type has no items
            scores = np.array([[item[name] for name in names] for item in chosen])  # (items, scores)
            means = 100 * scores.mean(axis=0) if chosen else [None] * len(names)
            results |= {name: None if mean is None else float(mean) for name, mean in zip(names, means)}
            if bootstrap_samples:
                image_ids = [item["image_id"] for item in chosen]
                found = bootstrap_intervals(scores, image_ids, bootstrap_samples, seed) if chosen else None
                intervals = [None] * len(names) if found is None else (100 * found).tolist()
                results |= {f"{name}_ci95": interval for name, interval in zip(names, intervals)}
            results[f"num_{answer_type}"] = len(chosen)
        closed = [item for item in items if item["answer_type"] == "closed"]
        polarities = [closed_polarity(item["prediction"], item["answer"]) for item in closed]
        results["num_empty_predictions"] = sum(not prediction.strip() for prediction in predictions)
        results["num_unparsable"] = sum(predicted is None and true is not None for predicted, true in polarities)
        results["num_wordless_answers"] = sum(not normalize_answer(item["answer"]) for item in items)
        return results | ({"items": items} if return_items else {})
