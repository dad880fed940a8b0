"""The open-ended biomedical chat benchmark: a model answers, a language model judges, and the judgments become scores.

Answers are joined to questions by id. Answers and the judge's replies are on disk before the next are waited for, and a
later run asks only for what is missing. A reply that cannot be read or a request that fails costs its own question, and
the first line of the summary says whether questions are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event, Lock

import numpy as np
from huggingface_hub.utils import tqdm

from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration
from lladamedv.processing import LLaDAMedVProcessor
from lladamedv.processing.datasets import read_records
from lladamedv.processing.datasets.chat_benchmark import DOMAINS, QUESTION_TYPES
from lladamedv.processing.datasets.readers import first_few

from .answering import answer_batch, open_image, question_about
from .judge import PROMPT_VERSION, OpenAIJudge, ask, parse_scores, prompt_sha256, render_messages, sha256
from .published import CHAT_DECODING, GROUP_SIZES, RELATIVE_SCORES
from .reports import document, interval_of_mean, markdown_table, number
from .run_settings import run_settings
from .runs import PREDICTIONS_FILE, append_lines, cut_torn_line, locked, read_lines, run_items
from .text_repetition.text_repetition import TextRepetition


JUDGMENTS_FILE = "judgments.jsonl"


def answer_chat_benchmark(
    model: LLaDAMedVForConditionalGeneration,
    processor: LLaDAMedVProcessor,
    records: Sequence[dict],
    folder: str | Path,
    *,
    model_name: str,
    options: dict | None = None,
    batch_size: int = 1,
) -> Path:
    """Answer the questions of the benchmark. Interrupted, it continues; `accelerate launch` shares it.

    Args:
        model, processor: as loaded; the model where it shall run.
        records: of `load_chat_benchmark`, whose images exist.
        folder: of this run.
        model_name: what to call the model.
        options: of `generate`; by default the paper's for chat, a canvas of 256 tokens in blocks of 64 and 256 steps.
        batch_size: questions at a time.

    Returns:
        The file of answers, `predictions.jsonl`.

    Raises:
        ValueError: before anything is answered, for values that are not allowed or a folder of another run; and for an
            image that cannot be read, when it is reached (what is answered stays).
    """
    options = CHAT_DECODING if options is None else options
    asked = [{name: record[name] for name in ("id", "image", "question")} for record in records]
    settings = {"model": model_name, **run_settings(model, processor, options, asked)}
    provenance = {name: settings[name] for name in ("model", "model_revision", "decoding")}

    def answer(places: list[int]) -> list[dict]:
        rows = [records[place] for place in places]
        images = [open_image(processor, row["image"], row["id"]) for row in rows]
        chats = [question_about(image, row["question"]) for image, row in zip(images, rows)]
        return [
            {**{name: row[name] for name in ("id", "image_id", "question")}, **given.as_record(), **provenance}
            for row, given in zip(rows, answer_batch(model, processor, chats, **options))
        ]

    run_items([record["id"] for record in records], answer, folder, settings, batch_size)
    return Path(folder) / PREDICTIONS_FILE


def read_answers(path: str | Path) -> dict[str, str]:
    """The answers in a file, by the question's id; empty ones are kept.

    Args:
        path: JSON lines or a JSON list: our predictions, with `id` and `prediction`, or the published answer files,
            with `question_id` and either `text` or `answer`.

    Raises:
        ValueError: naming the place, for a file that cannot be read or has no answer, a record with other fields, or an
            id that occurred before.
    """
    answers, places = {}, {}
    for place, record in read_records(path):
        item = record.get("id", record.get("question_id"))
        fields = [name for name in ("prediction", "text", "answer") if name in record]
        if "prediction" in fields:
            fields = ["prediction"]
        if item is None or len(fields) != 1 or not isinstance(record[fields[0]], str):
            raise ValueError(
                f"{str(path)!r} has no answer at {place}, but {sorted(record)}; allowed are `id` and `prediction`, "
                "or `question_id` and one of `text` and `answer`, all of them texts."
            )
        item = str(item)
        if item in answers:
            raise ValueError(f"{str(path)!r} answers question {item} at {places[item]} and again at {place}.")
        answers[item], places[item] = record[fields[0]], place
    if not answers:
        raise ValueError(f"{str(path)!r} has no answer.")
    return answers


def match_answers(records: Sequence[dict], answers: dict[str, str], allow_partial: bool = False) -> dict[str, str]:
    """The answers to the questions, in the order of the questions.

    Raises:
        ValueError: naming a few ids, if no question has an answer, or if questions lack answers or answers belong to
            no question; with `allow_partial` these are left out.
    """
    ids = [record["id"] for record in records]
    missing, unknown = [item for item in ids if item not in answers], sorted(answers.keys() - set(ids))
    if len(missing) == len(ids):
        raise ValueError(f"`answers` has none of the {len(ids)} questions, but {len(unknown)} ({first_few(unknown)}).")
    if not allow_partial:
        for items, problem in ((missing, "lacks questions"), (unknown, "has unknown questions")):
            if items:
                raise ValueError(
                    f"`answers` {problem}: {len(items)} ({first_few(items)}); allowed is one answer to each question."
                )
    return {item: answers[item] for item in ids if item in answers}


def judge_answers(
    records: Sequence[dict],
    answers: dict[str, str],
    judge: OpenAIJudge,
    folder: str | Path,
    *,
    swap_positions: bool = False,
    reference_repr: bool = False,
    allow_partial: bool = False,
    max_concurrent: int = 4,
    report: Callable[[str], object] = print,
) -> dict:
    """Have all answers judged, except those that were judged before.

    Args:
        records: as `load_chat_benchmark` returns them.
        answers: texts by the question's id, see [`match_answers`].
        judge: an [`OpenAIJudge`], or what has its `settings` and `complete`.
        folder: keeps the judge's replies, in `judgments.jsonl`; made if it does not exist. One folder can serve any
            number of judges and models.
        swap_positions: judge each answer a second time with the two answers in the other order.
        reference_repr: see [`~judge.render_messages`].
        allow_partial: see [`match_answers`].
        max_concurrent: requests at a time.
        report: called with each line of text.

    Returns:
        `{"judge": its settings, "prompt_version", "prompt_sha256", "swap_positions", "judgments"}`. The last has for
        each question with an answer one judgment, or with `swap_positions` two: `{"status", "scores", "reason"}`, where
        the status is "ok", "parse_error" or "failed", the scores are those of the reference and of the model, and
        the reason says why there are none. The next run asks again for those that are not "ok".

    Raises:
        ValueError: before anything is asked, if answers and questions do not fit together, `max_concurrent` is below 1,
            or `folder` is in use or has lines that cannot be read.
    """
    if max_concurrent < 1:
        raise ValueError(f"`max_concurrent` is {max_concurrent}; allowed are whole numbers of at least 1.")
    answers = match_answers(records, answers, allow_partial)
    version = PROMPT_VERSION + ("-repr" if reference_repr else "")
    prompts, keys = {}, {}  # messages by key; keys of each question, in each order
    for record in records:
        for swapped in (False, True) if swap_positions else (False,):
            if record["id"] in answers:
                messages = render_messages(record, answers[record["id"]], swapped, reference_repr)
                key = sha256([judge.settings, version, messages])
                prompts[key] = messages
                keys.setdefault(record["id"], []).append((key, swapped))
    with locked(folder := Path(folder)):
        outcomes = _ask_all(prompts, judge, folder / JUDGMENTS_FILE, max_concurrent, report)
    judgments = {}
    for item, orders in keys.items():
        for key, swapped in orders:
            found = {name: outcomes[key][name] for name in ("status", "scores", "reason")}
            if swapped and found["scores"]:
                found["scores"] = found["scores"][::-1]
            judgments.setdefault(item, []).append(found)
    return {
        "judge": judge.settings,
        "prompt_version": version,
        "prompt_sha256": prompt_sha256(reference_repr),
        "swap_positions": swap_positions,
        "judgments": judgments,
    }


def _ask_all(
    prompts: dict[str, list[dict]], judge: OpenAIJudge, file: Path, max_concurrent: int, report
) -> dict[str, dict]:
    """The outcome of each prompt, in this run or an earlier one, by its key."""
    outcomes = read_judgments(file)
    pending = [key for key in prompts if key not in outcomes]
    report(f"{len(prompts) - len(pending)} judgments are there, {len(pending)} to ask {judge.settings['model']} for")
    writing, stopped = Lock(), Event()

    def outcome_of(key: str) -> dict:
        if stopped.is_set():
            reason = "not asked, because an earlier request failed for all"
            return {"status": "failed", "scores": None, "reason": reason}
        scores, replies, error = ask(judge, prompts[key])
        if error is not None and error.for_all:
            stopped.set()
        reason = str(error) if error else "" if scores else "two replies without two scores from 1 to 10"
        outcome = {
            "status": "failed" if error else "ok" if scores else "parse_error",
            "scores": scores and list(scores),
            "reason": reason,
            "replies": replies,
        }
        # Written by the thread that has it, so that an interrupted run keeps what is under way.
        with writing:
            append_lines(file, [{"key": key, **outcome}])
        return outcome

    with ThreadPoolExecutor(max_concurrent) as threads, tqdm(total=len(pending), unit="judgment") as progress:
        futures = {threads.submit(outcome_of, key): key for key in pending}
        try:
            for future in as_completed(futures):
                outcomes[futures[future]] = future.result()
                progress.update()
        except BaseException:
            report("stopping as soon as the requests under way are done")
            threads.shutdown(cancel_futures=True)
            raise
    reasons = [outcomes[key]["reason"] for key in pending if outcomes[key]["status"] != "ok"]
    if reasons:
        report(f"{len(reasons)} judgments are missing, the first because: {reasons[0]}")
    return outcomes


def read_judgments(file: Path) -> dict[str, dict]:
    """The judgments that need not be asked for again, by key.

    Raises:
        ValueError: naming the line, if it holds no judgment.
    """
    if file.exists():
        cut_torn_line(file)
    finished = {}
    for line, outcome in read_lines(file, "key"):
        try:
            # The replies are parsed again, because an earlier version may have misread them.
            if outcome["status"] == "ok" and (scores := parse_scores(outcome["replies"][-1])):
                finished[outcome["key"]] = {"status": "ok", "scores": list(scores), "reason": outcome["reason"]}
        except (LookupError, TypeError):
            raise ValueError(f"{str(file)!r} has no judgment at line {line}.") from None
    return finished


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
        records, answers, judged: as given to and returned by `judge_answers`.
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
    texts = {
        "model": [answers[record["id"]] for record in answered],
        "reference": [record["reference"] for record in answered],
    }
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
        "text": {name: TextRepetition(keep_in_memory=True).compute(predictions=each) for name, each in texts.items()},
        **{key: judged[key] for key in ("judge", "prompt_version", "prompt_sha256", "swap_positions")},
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
    relative = [(item["relative_score"], item["image_id"]) for item in judged]
    interval = interval_of_mean(relative, bootstrap_samples, seed)
    return {**means, "relative_score_ci95": interval, "data_size": len(items), "n_judged": len(judged)}


def to_markdown(summary: dict) -> str:
    """The summary as Markdown; its first line says whether questions are missing."""
    judge, unanswered = summary["judge"], summary["data_size"] - summary["n_answered"]
    sampling = ", ".join(f"{name} {value}" for name, value in judge.items() if name not in ("model", "host"))
    header = ["group", "relative score, %", "95 % interval", "reference's score", "model's score", "judged"]
    rows = []
    for group, scores in summary["groups"].items():
        bounds = scores["relative_score_ci95"]
        interval = "–" if bounds is None else f"{bounds[0]:.1f} to {bounds[1]:.1f}"
        relative, *absolute = (number(scores[name]) for name in ("relative_score", "gpt4_score", "pred_score"))
        rows.append([group, relative, interval, *absolute, f"{scores['n_judged']} of {scores['data_size']}"])
    columns = ("words_per_answer", "distinct_1", "rep_4", "longest_run", "num_empty")
    repetition = [[name, *(number(each[column]) for column in columns)] for name, each in summary["text"].items()]
    own = [summary["groups"][group]["relative_score"] for group in GROUP_SIZES]
    published = {f"**{summary['name']}**": own, **RELATIVE_SCORES}
    incomplete = (
        f"**Incomplete: {summary['n_judged']} of {summary['data_size']} questions are judged, the judgments of "
        f"{summary['n_failed']} failed and {unanswered} have no answer. All scores leave these questions out.**"
    )
    both_positions = (
        "Each answer is judged in both positions; the relative scores of the two differ by "
        f"{number(summary['order_disagreement'])} percent points on average."
    )
    paragraphs = [
        "" if summary["complete"] else incomplete,
        f"# Open-ended biomedical chat: {summary['name']}",
        markdown_table(header, rows),
        "The relative score is the mean, over questions, of the model's score divided by the reference's; the interval "
        f"is a bootstrap over images ({summary['bootstrap_samples']} samples, seed {summary['seed']}). A question of "
        f"several domains counts for {'each' if summary['multi_label_domains'] else 'the first'}. "
        f"Judge: {judge['model']} at {judge['host']}, {sampling}; prompt {summary['prompt_version']} (sha256 "
        f"{summary['prompt_sha256']}).",
        both_positions if summary["swap_positions"] else "",
        "## Length and repetition of the answers",
        "Language models favour long answers when they judge (arXiv 2306.05685).",
        markdown_table(["answers", *columns], repetition),
        "## Beside published scores",
        "The others are those of LLaDA-MedV's Table 1 (arXiv 2508.01617), judged by GPT-4.1 mini in one order. "
        "Relative scores compare only under the same judge and prompt.",
        markdown_table(["model", *GROUP_SIZES], [[name, *map(number, row)] for name, row in published.items()]),
    ]
    return document(paragraphs)


__all__ = [
    "JUDGMENTS_FILE", "answer_chat_benchmark", "judge_answers", "match_answers", "read_answers",
    "read_judgments", "summarize", "to_markdown",
]  # fmt: skip
