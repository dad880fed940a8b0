"""What publications and users call the columns of their records, and what stands in them.

Names are compared without case, blanks and marks: "Image Path" is `image_path`. Answers may be texts, numbers, truth
values, or missing; all of them become text here, and in one way.
"""

from __future__ import annotations

import math
import re
import unicodedata

from .vqa_sources import SPLITS


# Of each column the first name that a record has counts: for questions and answers whatever stands there, and for all
# others the first in which something stands.
COLUMNS = {
    "id": ("id", "qid", "question_id"),
    "image": (
        "image", "images", "img_name", "image_name", "img", "image_path", "img_path", "image_file", "file_name",
        "picture", "path",
    ),
    "image_id": ("image_id", "image_name", "img_name", "img_id"),
    "question": ("question", "query", "prompt", "instruction", "q"),
    "answer": (
        "answer", "answers", "ground_truth", "gt_answer", "correct_answer", "label", "target", "reference", "response",
        "output", "gt", "a",
    ),
    "answer_type": ("answer_type",),
    "language": ("language", "q_lang", "lang"),
    "organ": ("organ", "image_organ"),
    "split": ("split",),
}  # fmt: skip
CONVERSATIONS = ("conversations", "conversatons")  # LLaVA-Med's alignment file has the second
_WRAPPERS = {"data", "rows", "records", "items", "examples", "samples", "questions", "annotations", *SPLITS}
_FIRST_THAT_IS_THERE = ("question", "answer")
ANSWER_TYPES = {
    "open": "open", "openended": "open", "freeform": "open", "other": "open", "number": "open",
    "closed": "closed", "closeended": "closed", "closedended": "closed", "yesno": "closed", "binary": "closed",
}  # fmt: skip
# An answer that is yes or no, or begins so before a mark: "Yes.", "No, it is normal", but not "No evidence" or "No-go".
_POLAR = re.compile(
    r"\W*(?:yes|no)(?:\W*|\s*[.,;:!(\u3001\u3002\u060c\u061b](?!\d).*|\s*[\u2013\u2014]\s.*|\s+-\s.*)"
    r"|\W*(?:true|false)\W*",
    re.IGNORECASE | re.DOTALL,
)


class InvalidRecordError(ValueError):
    """A record that cannot become a row: the kind of reason, and what it is in this record, but not which record."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason = reason
        super().__init__(f"{reason}: {detail:.300}" if detail else reason)


def squash(name: object) -> str:
    """A name without case, blanks and marks."""
    return re.sub(r"[\W_]+", "", str(name).lower())


_SQUASHED = {column: tuple(map(squash, names)) for column, names in COLUMNS.items()}


class Fields:
    """The values of a record by column, whatever the record calls the column."""

    def __init__(self, record: dict):
        self.record, self._names = record, {}
        for name in record:
            self._names.setdefault(squash(name), name)

    def names(self, column: str) -> list[str]:
        """All columns of this record that may be the one."""
        return [self._names[name] for name in _SQUASHED.get(column, (squash(column),)) if name in self._names]

    def name(self, column: str) -> str | None:
        """The column of this record that is read; `None` if there is none."""
        names = self.names(column)
        if column in _FIRST_THAT_IS_THERE:
            return next(iter(names), None)
        return next((name for name in names if not _is_gap(self.record[name])), None)

    def get(self, column: str, default=None):
        """What stands in a column; the default if nothing does."""
        name = self.name(column)
        return default if name is None else self.record[name]

    def id(self, default: str) -> str:
        """What the record is called."""
        given = self.get("id", default)
        return text_of(given) or str(given)

    def need(self, column: str) -> None:
        """
        Raises:
            InvalidRecordError: if no column of this record is the one.
        """
        if not self.names(column):
            raise InvalidRecordError(
                f"none of its columns {list(self.record)!r:.200} is its {column}; such are called "
                f"{', '.join(COLUMNS[column])}"
            )


def unwrapped(record: dict, with_splits: bool = False) -> list[dict]:
    """The records in an object such as `{"data": [{…}, …]}`; or the record itself.

    Args:
        with_splits: also of `{"train": […], "test": […]}`, where each record gets its `split`.
    """
    held = {
        name: value
        for name, value in record.items()
        if name in _WRAPPERS and isinstance(value, list) and value and all(isinstance(each, dict) for each in value)
    }
    wrapped = len(held) == 1 or (with_splits and held and {*held} <= {*SPLITS})
    is_row = not {"messages", *CONVERSATIONS}.isdisjoint(record)
    if not wrapped or is_row or Fields(record).name("question") not in (None, *_WRAPPERS):
        return [record]
    named = {*SPLITS} if with_splits else set()
    return [{"split": name, **each} if name in named else each for name, value in held.items() for each in value]


def _is_gap(value) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or value in ("", [])


def text_of(value) -> str | None:
    """A question or an answer as text: numbers as a table shows them, 5 also where a gap in the column made it 5.0.

    Returns:
        `None` for a value that is neither text nor a number.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not _is_gap(value):
        return str(value)
    return value if isinstance(value, str) else None


def answer_text(value) -> str:
    """A true answer as text: a number as tables show it, yes or no for a truth value, nothing for a gap.

    Raises:
        InvalidRecordError: for something else, also for several answers.
    """
    if isinstance(value, (list, tuple)):
        if len(value) > 1:
            raise InvalidRecordError(f"`answer` holds {len(value)} answers; allowed is one")
        value = value[0] if value else None
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = "" if _is_gap(value) else text_of(value)
    if text is None:
        raise InvalidRecordError(f"`answer` is {value!r:.200}; allowed are text, numbers and truth values")
    return text.strip()


def derived_answer_type(answer: str) -> str:
    """The type of a question that has none: "closed" if its true answer is yes or no, or begins so before a mark."""
    return "closed" if _POLAR.fullmatch(unicodedata.normalize("NFKC", answer)) else "open"
