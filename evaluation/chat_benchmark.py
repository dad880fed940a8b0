"""The open-ended biomedical chat benchmark: files of answers in, judged by a language model, scores out.

`load_chat_benchmark` and `read_answers` read, `judge_answers` asks the judge, and here its judgments become a summary,
which says first of all whether every question is in it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lladamedv.processing.datasets import read_records
from lladamedv.processing.datasets.chat_benchmark import DOMAINS, QUESTION_TYPES

from .medical_vqa.medical_vqa import bootstrap_intervals
from .published_chat import GROUP_SIZES, RELATIVE_SCORES
from .runs import replace_file
from .tables import markdown_table
from .text_repetition.text_repetition import TextRepetition


SUMMARY_FILE, MARKDOWN_FILE = "summary.json", "summary.md"


def read_answers(path: str | Path) -> dict[str, str]:
    """The answers in a file, by the question's id.

    Args:
        path: JSON lines or a JSON list: our predictions, with `id` and `prediction`, or the published answer files,
            with `question_id` and either `text` or `answer`. Empty answers are kept.

    Raises:
        ValueError: naming the line, for a file that cannot be read or has no answer, a record with other fields, or an
            id that occurred before.
    """
    answers, lines = {}, {}
    for line, record in read_records(path):
        item = record.get("id", record.get("question_id"))
        fields = [name for name in ("prediction", "text", "answer") if name in record]
        if "prediction" in fields:
            fields = ["prediction"]
        if item is None or len(fields) != 1 or not isinstance(record[fields[0]], str):
            raise ValueError(
                f"{str(path)!r} has no answer at line {line}, but {sorted(record)}; allowed are `id` and `prediction`, "
                "or `question_id` and one of `text` and `answer`, all of them texts."
            )
        item = str(item)
        if item in answers:
            raise ValueError(f"{str(path)!r} answers question {item} at line {lines[item]} and again at line {line}.")
        answers[item], lines[item] = record[fields[0]], line
    if not answers:
        raise ValueError(f"{str(path)!r} has no answer.")
    return answers


def summarize(
    records: Sequence[dict],
    answers: dict[str, str],
    judged: dict,
    *,
    name: str = "model",
    multi_label_domains: bool = False,
    bootstrap_samples: int = 1000,
    seed: int = 0,
) -> dict:
    """Scores of one model.

    Args:
        records, answers: as given to `judge_answers`.
        judged: as it returns them.
        name: what to call the model.
        multi_label_domains: count a question for all of its domains, not only for the first.
        bootstrap_samples: how often the images are drawn anew for the 95 % intervals; 0 computes none.
        seed: of these draws.

    Returns:
        JSON-able:
        - name; complete, whether all questions are judged; data_size; n_answered; n_judged; n_failed, those that have
          an answer and no judgment; coverage, judged questions of all;
        - groups: for "all", each type and each domain, `data_size`, `n_judged`, and means over the judged questions:
          `relative_score`, of the model's score divided by the reference's, in percent (a mean of ratios), with
          `relative_score_ci95`; `gpt4_score` and `pred_score`, of the reference and of the model, from 1 to 10. `None`
          where nothing is judged, and intervals where fewer than two images are;
        - order_disagreement: with swapped positions, how far the relative scores of a question's two orders are apart,
          in percent points, mean over the questions; `None` without;
        - text: for "model" and "reference", the metric `text_repetition` of the answered questions;
        - items: for each question its scores, relative score and order disagreement, or the reason why there are none;
        - judge, prompt_version, prompt_sha256, swap_positions, multi_label_domains, bootstrap_samples, seed.

    Source: the relative score of LLaVA-Med (arXiv 2306.00890, section 5.1) as computed for LLaDA-MedV's Table 1.
    """
    items = [_item(record, judged["judgments"].get(record["id"])) for record in records]
    groups = {"all": items}
    groups |= {kind: [item for item in items if item["type"] == kind] for kind in QUESTION_TYPES}
    for domain in DOMAINS:
        groups[domain] = [
            item for item in items if domain in (item["domains"] if multi_label_domains else item["domains"][:1])
        ]
    answered = [record for record in records if record["id"] in answers]
    n_judged = sum(item["relative_score"] is not None for item in items)
    disagreements = [item["order_disagreement"] for item in items if item["order_disagreement"] is not None]
    return {
        "name": name,
        "complete": n_judged == len(items),
        "data_size": len(items),
        "n_answered": len(answered),
        "n_judged": n_judged,
        "n_failed": len(answered) - n_judged,
        "coverage": n_judged / len(items),
        "groups": {group: _scores(chosen, bootstrap_samples, seed) for group, chosen in groups.items()},
        "order_disagreement": sum(disagreements) / len(disagreements) if disagreements else None,
        "text": {
            "model": _text_metrics([answers[record["id"]] for record in answered]),
            "reference": _text_metrics([record["reference"] for record in answered]),
        },
        "judge": judged["judge"],
        "prompt_version": judged["prompt_version"],
        "prompt_sha256": judged["prompt_sha256"],
        "swap_positions": judged["swap_positions"],
        "multi_label_domains": multi_label_domains,
        "bootstrap_samples": bootstrap_samples,
        "seed": seed,
        "items": items,
    }


def _item(record: dict, judgments: list[dict] | None) -> dict:
    item = {key: record[key] for key in ("id", "image_id", "type", "domains")}
    item |= {"gpt4_score": None, "pred_score": None, "relative_score": None, "order_disagreement": None, "reason": ""}
    if judgments is None:
        return item | {"reason": "not answered"}
    missing = [judgment for judgment in judgments if judgment["status"] != "ok"]
    if missing:
        return item | {"reason": f"{missing[0]['status']}: {missing[0]['reason']}"}
    scores = np.array([judgment["scores"] for judgment in judgments])  # (orders, 2)
    ratios = 100 * scores[:, 1] / scores[:, 0]  # a judged score is never 0
    reference_score, model_score = scores.mean(axis=0).tolist()
    item |= {"gpt4_score": reference_score, "pred_score": model_score, "relative_score": float(ratios.mean())}
    return item | {"order_disagreement": float(np.ptp(ratios)) if len(ratios) > 1 else None}


def _scores(items: list[dict], bootstrap_samples: int, seed: int) -> dict:
    judged = [item for item in items if item["relative_score"] is not None]
    names = ("relative_score", "gpt4_score", "pred_score")
    means = {name: float(np.mean([item[name] for item in judged])) if judged else None for name in names}
    interval = None
    if judged and bootstrap_samples:
        values = np.array([[item["relative_score"]] for item in judged])
        interval = bootstrap_intervals(values, [item["image_id"] for item in judged], bootstrap_samples, seed)
    return {
        **means,
        "relative_score_ci95": None if interval is None else interval[0].tolist(),
        "data_size": len(items),
        "n_judged": len(judged),
    }


def _text_metrics(texts: list[str]) -> dict:
    return TextRepetition(keep_in_memory=True).compute(predictions=texts)


def to_markdown(summary: dict) -> str:
    """The summary for readers; whether questions are missing stands in its first line."""
    lines = [f"# Open-ended biomedical chat: {summary['name']}", ""]
    if not summary["complete"]:
        unanswered = summary["data_size"] - summary["n_answered"]
        warning = (
            f"**Incomplete: {summary['n_judged']} of {summary['data_size']} questions are judged, the judgments of "
            f"{summary['n_failed']} failed and {unanswered} have no answer. All scores leave these questions out.**"
        )
        lines = [warning, "", *lines]
    lines += markdown_table(
        ["group", "relative score, %", "95 % interval", "reference's score", "model's score", "judged"],
        [
            [
                group, _number(scores["relative_score"]), _interval(scores["relative_score_ci95"]),
                _number(scores["gpt4_score"]), _number(scores["pred_score"]),
                f"{scores['n_judged']} of {scores['data_size']}",
            ]
            for group, scores in summary["groups"].items()
        ],
    )  # fmt: skip
    sampling = ", ".join(f"{name} {value}" for name, value in summary["judge"].items() if name not in ("model", "host"))
    lines += [
        "The relative score is the mean, over questions, of the model's score divided by the reference's; the interval "
        f"is a bootstrap over images ({summary['bootstrap_samples']} samples, seed {summary['seed']}).",
        "A question of several domains counts for " + ("each." if summary["multi_label_domains"] else "the first."),
        f"Judge: {summary['judge']['model']} at {summary['judge']['host']}, {sampling}; prompt "
        f"{summary['prompt_version']} (sha256 {summary['prompt_sha256']}).",
    ]
    if summary["swap_positions"]:
        lines.append(
            "Each answer is judged in both positions; the relative scores of the two differ by "
            f"{_number(summary['order_disagreement'])} percent points on average."
        )
    lines += [
        "",
        "## Length and repetition of the answers",
        "Language models favour long answers when they judge (arXiv 2306.05685).",
        "",
    ]
    columns = ("words_per_answer", "distinct_1", "rep_4", "longest_run", "num_empty")
    lines += markdown_table(
        ["answers", *columns],
        [[who, *(_number(metrics[column]) for column in columns)] for who, metrics in summary["text"].items()],
    )
    lines += [
        "## Beside published scores",
        "The others are those of LLaDA-MedV's Table 1 (arXiv 2508.01617), judged by GPT-4.1 mini in one order. "
        "Relative scores compare only under the same judge and prompt.",
        "",
    ]
    own = [summary["groups"][group]["relative_score"] for group in GROUP_SIZES]
    published = [[name, *(f"{score:.3f}" for score in scores)] for name, scores in RELATIVE_SCORES.items()]
    lines += markdown_table(["model", *GROUP_SIZES], [[f"**{summary['name']}**", *map(_number, own)], *published])
    return "\n".join(lines).rstrip() + "\n"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".rstrip("0").rstrip(".")


def _interval(bounds: list[float] | None) -> str:
    return "–" if bounds is None else f"{bounds[0]:.1f} to {bounds[1]:.1f}"


def write_summary(folder: str | Path, summary: dict) -> None:
    """Write `summary.json` and `summary.md`, each as a whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    replace_file(folder / MARKDOWN_FILE, to_markdown(summary))


__all__ = ["MARKDOWN_FILE", "SUMMARY_FILE", "read_answers", "summarize", "to_markdown", "write_summary"]
