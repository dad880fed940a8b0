"""LLaVA-Med's open-ended benchmark of biomedical chat (193 questions about 50 images) into plain records.

The file, `llava_med_eval_qa50_qa.jsonl`, is CC BY-NC and not shipped: this reads the copy that the user has.
"""

from __future__ import annotations

import re
from pathlib import Path

from .columns import InvalidRecordError
from .messages import IMAGE_PLACEHOLDER
from .readers import ImageFiles, LoadReport, MissingImageError, read_records


QUESTION_TYPES = ("conversation", "detailed_description")
DOMAINS = ("chest_xray", "mri", "histology", "gross", "ct_scan")  # the order decides what a question of two counts for


def load_chat_benchmark(path: str | Path, image_folder: str | Path | None = None) -> tuple[list[dict], LoadReport]:
    """The questions of the benchmark.

    Args:
        path: JSON lines (or a JSON list) as LLaVA-Med publishes them.
        image_folder: where the images are. By default their names stay as they are and no file is looked for, because
            to judge answers takes no image.

    Returns:
        Records with `id`; `image`, a path; `image_id`; `question`, without `<image>`; `reference`, the answer of the
        text-only GPT-4; `context`, `{"fig_label", "fig_caption", "in_text_mention", "in_text_mention_repr"}`, of which
        the third is a list of texts and the last the Python notation of what the file has, as the published prompts
        show it; `type`, one of `QUESTION_TYPES`; `domain`, the first of `DOMAINS` that is true, or `None`; and
        `domains`, all of them. And a report, which lists the questions that are left out because their image is
        missing: rows and missing images together are all the questions.

    Raises:
        ValueError: naming the place, for a file that cannot be read, has no question, or has a malformed one or the
            same `question_id` twice.

    Source: LLaVA-Med (arXiv 2306.00890), section 5.1, and the published file.
    """
    images = None if image_folder is None else ImageFiles(image_folder)
    report, records, places = LoadReport(str(path)), [], {}
    for place, row in read_records(path):
        try:
            record = _as_record(row)
            if record["id"] in places:
                number = f"{row['question_id']!r:.200}"
                raise InvalidRecordError(f"`question_id` is {number}, as at {places[record['id']]}")
        except InvalidRecordError as error:
            raise ValueError(f"{str(path)!r} has an invalid question at {place}: {error}.") from None
        places[record["id"]] = place
        try:
            records.append(record if images is None else record | {"image": images.find(record["image"])})
        except MissingImageError as error:
            report.leave_out(record["id"], error)
    if not places:
        raise ValueError(f"{str(path)!r} has no question.")
    report.rows = len(records)
    return records, report


def _is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_mentions(value) -> bool:
    return isinstance(value, list) and all(isinstance(e, dict) and isinstance(e.get("tokens"), str) for e in value)


_TEXT = (_is_text, "text that is not blank")
_FIELDS = {
    "question_id": (lambda value: isinstance(value, (int, str)) and not isinstance(value, bool), "numbers and texts"),
    **dict.fromkeys(("image", "pair_id", "text", "gpt4_answer", "fig_label", "fig_caption"), _TEXT),
    "type": (lambda value: value in QUESTION_TYPES, QUESTION_TYPES),
    "domain": (lambda value: isinstance(value, dict) and set(value) <= set(DOMAINS), f"an object with {DOMAINS}"),
    "in_text_mention": (lambda value: value is None or _are_mentions(value), "null and objects with `tokens`"),
}


def _as_record(row: dict) -> dict:
    for name, (is_allowed, allowed) in _FIELDS.items():
        if not is_allowed(row.get(name)):
            raise InvalidRecordError(f"`{name}` is {row.get(name)!r:.200}; allowed are {allowed}")
    question = re.sub(rf"\s*{IMAGE_PLACEHOLDER}\s*", " ", row["text"]).strip()
    if not question:
        raise InvalidRecordError(f"`text` is {row['text']!r:.200}, which asks nothing")
    domains = [domain for domain in DOMAINS if row["domain"].get(domain)]
    return {
        "id": str(row["question_id"]),
        "image": row["image"],
        "image_id": row["pair_id"],
        "question": question,
        "reference": row["gpt4_answer"],
        "context": {
            "fig_label": row["fig_label"],
            "fig_caption": row["fig_caption"],
            "in_text_mention": [mention["tokens"] for mention in row.get("in_text_mention") or []],
            "in_text_mention_repr": repr(row.get("in_text_mention")),
        },
        "type": row["type"],
        "domain": domains[0] if domains else None,
        "domains": domains,
    }
