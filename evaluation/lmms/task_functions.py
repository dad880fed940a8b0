"""What the task files in `tasks` refer to: which questions are open, how an answer is scored, and which items count.

The scores are those of `evaluation/medical_vqa`, between 0 and 1 as in lmms-eval's other tasks. Each is the mean over
the questions of its type alone, and the table says how many those are.
"""

from __future__ import annotations

import hashlib

from datasets import Dataset, Image

from lladamedv.evaluation.medical_vqa.medical_vqa import ANSWER_TYPES, complete_reference, score_closed, score_open
from lladamedv.processing.datasets.columns import COLUMNS, answer_text, derived_answer_type


_SCORE = dict(zip(ANSWER_TYPES, (score_open, score_closed)))
SCORES = {answer_type: tuple(score("yes", "yes")) for answer_type, score in _SCORE.items()}
COUNTS = ("num_open", "num_closed", "num_empty_predictions")


def process_docs(dataset: Dataset) -> Dataset:
    """Rows of one form: `image`, `question`, `answer`, `answer_type` ("open" or "closed") and `image_id`.

    Args:
        dataset: has at least `image`, `question` and `answer`. Without `answer_type`, questions answered by yes or no
            count as closed, as in `load_vqa`. Without a name of the picture, `image_id` is the SHA-256 of its file.

    Raises:
        ValueError: naming the row, for a blank question or answer or an answer type that is not known.
    """
    names = dataset.column_names
    questions = ["" if text is None else str(text).strip() for text in dataset["question"]]
    answers = [answer_text(answer) for answer in dataset["answer"]]
    types = dataset["answer_type"] if "answer_type" in names else map(derived_answer_type, answers)
    checked = []
    for row, (question, answer, answer_type) in enumerate(zip(questions, answers, types)):
        if not question:
            raise ValueError(f"row {row} has no question: {dataset[row]['question']!r}")
        checked.append(complete_reference("", {"answer": answer, "answer_type": answer_type}, f"row {row}"))
    name = next((name for name in COLUMNS["image_id"] if name in names), None)
    files = dataset.cast_column("image", Image(decode=False))["image"]
    image_ids = map(_file_hash, files) if name is None else map(str, dataset[name])
    rows = dataset.select_columns(["image"]).add_column("question", questions).add_column("answer", answers)
    rows = rows.add_column("answer_type", [reference["answer_type"] for reference in checked])
    return rows.add_column("image_id", list(image_ids))


def _file_hash(file: dict) -> str:
    return file["path"] if file["bytes"] is None else hashlib.sha256(file["bytes"]).hexdigest()


def process_results(doc: dict, results: list[str]) -> dict[str, dict | None]:
    """The scores of one answer.

    Returns:
        For each score of the question's type its value as `score` and the picture as `image_id`, by which lmms-eval can
        cluster its standard error; `None` for those of the other type; and for each of `COUNTS` whether it `counts`.
    """
    prediction, answer_type = results[0], doc["answer_type"]
    scores = _SCORE[answer_type](prediction, doc["answer"])
    counts = dict(zip(COUNTS, (answer_type == "open", answer_type == "closed", not prediction.strip())))
    return {
        **{name: None for names in SCORES.values() for name in names},
        **{name: {"score": value, "image_id": doc["image_id"]} for name, value in scores.items()},
        # Not bare numbers, of which lmms-eval would give a standard error.
        **{name: {"counts": value} for name, value in counts.items()},
    }


def mean_of_type(items: list[dict | None]) -> float | None:
    """The mean over the questions of the score's type; `None` if there is none."""
    scores = [item["score"] for item in items if item is not None]
    return sum(scores) / len(scores) if scores else None


def total(items: list[dict]) -> int:
    """How many count."""
    return sum(item["counts"] for item in items)


__all__ = ["COUNTS", "SCORES", "mean_of_type", "process_docs", "process_results", "total"]
