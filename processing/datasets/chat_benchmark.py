"""LLaVA-Med's open-ended benchmark of biomedical chat (193 questions about 50 images) into plain records.

The file, `llava_med_eval_qa50_qa.jsonl`, is CC BY-NC and not shipped: this reads the copy that the user has.
"""

from __future__ import annotations

import re
from pathlib import Path

from .llava_med import IMAGE_PLACEHOLDER
from .records import ImageFiles, InvalidRecordError, LoadReport, MissingImageError, read_records


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
        ValueError: naming the line, for a file that cannot be read, has no question, or has a malformed one or the
            same `question_id` twice.

    Source: LLaVA-Med (arXiv 2306.00890), section 5.1, and the published file.
    """
    images = None if image_folder is None else ImageFiles(image_folder)
    report, records, lines = LoadReport(str(path)), [], {}
    for line, row in read_records(path):
        try:
            record = _as_record(row)
            if record["id"] in lines:
                number = f"{row['question_id']!r:.200}"
                raise InvalidRecordError(f"`question_id` is {number}, as at line {lines[record['id']]}")
        except InvalidRecordError as error:
            raise ValueError(f"{str(path)!r} has an invalid question at line {line}: {error}.") from None
        lines[record["id"]] = line
        try:
            records.append(record if images is None else record | {"image": images.find(record["image"])})
        except MissingImageError as error:
            report.leave_out(record["id"], error)
    if not lines:
        raise ValueError(f"{str(path)!r} has no question.")
    report.rows = len(records)
    return records, report


def _as_record(row: dict) -> dict:
    number, domains, mentions = row.get("question_id"), row.get("domain"), row.get("in_text_mention")
    if isinstance(number, bool) or not isinstance(number, (int, str)):
        raise InvalidRecordError(f"`question_id` is {number!r:.200}; allowed are numbers and texts")
    for name in ("image", "pair_id", "text", "gpt4_answer", "fig_label", "fig_caption"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise InvalidRecordError(f"`{name}` is {row.get(name)!r:.200}; allowed is text that is not blank")
    if row.get("type") not in QUESTION_TYPES:
        raise InvalidRecordError(f"`type` is {row.get('type')!r:.200}; allowed are {QUESTION_TYPES}")
    if not isinstance(domains, dict) or not set(domains) <= set(DOMAINS):
        raise InvalidRecordError(f"`domain` is {domains!r:.200}; allowed is an object with {DOMAINS}")
    mentions = [] if mentions is None else mentions
    if not isinstance(mentions, list) or not all(
        isinstance(mention, dict) and isinstance(mention.get("tokens"), str) for mention in mentions
    ):
        raise InvalidRecordError(f"`in_text_mention` is {mentions!r:.200}; allowed are null and objects with `tokens`")
    question = re.sub(rf"\s*{IMAGE_PLACEHOLDER}\s*", " ", row["text"]).strip()
    if not question:
        raise InvalidRecordError(f"`text` is {row['text']!r:.200}, which asks nothing")
    true_domains = [domain for domain in DOMAINS if domains.get(domain)]
    return {
        "id": str(number),
        "image": row["image"],
        "image_id": row["pair_id"],
        "question": question,
        "reference": row["gpt4_answer"],
        "context": {
            "fig_label": row["fig_label"],
            "fig_caption": row["fig_caption"],
            "in_text_mention": [mention["tokens"] for mention in mentions],
            "in_text_mention_repr": repr(row.get("in_text_mention")),
        },
        "type": row["type"],
        "domain": true_domains[0] if true_domains else None,
        "domains": true_domains,
    }


__all__ = ["DOMAINS", "QUESTION_TYPES", "load_chat_benchmark"]
