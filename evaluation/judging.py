"""A judge compares each answer of a model with the reference answer and gives both a score from 1 to 10.

The comparison is that of LLaVA-Med's evaluation. What differs is what becomes of trouble: answers are joined to
questions by id, every reply is on disk before the next is waited for, a later run asks only for what is missing, and a
reply that cannot be read or a request that fails costs its own question and is counted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event, Lock

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from .judge import Judge, JudgeError
from .runs import cut_torn_line


JUDGMENTS_FILE = "judgments.jsonl"
PROMPT_VERSION = "comparison-1"
LOWEST, HIGHEST = 1, 10
_SHOWN = 5

_SYSTEM = "You are a helpful and precise assistant who checks the quality of answers."
_INSTRUCTION = """\
Two AI assistants were shown an image and asked the question above. You do not see the image; its caption, and where \
there is one the text that refers to it, describe what it shows.
Judge the helpfulness, relevance, accuracy and level of detail of the two answers, and give each assistant one overall \
score from 1 to 10. A higher score means a better answer.
Begin with a line that has nothing but the two scores, that of Assistant 1 and then that of Assistant 2, separated by \
a space. Explain your judgment in the lines after it. Avoid any bias; in particular, the order in which the answers \
stand must not matter."""
_REMINDER = """\
The scores could not be read. Answer again, and begin with a line that has nothing but two numbers from 1 to 10, the \
score of Assistant 1 and then that of Assistant 2, separated by a space."""

_NUMBER = r"(?<![\w.-])(\d+(?:\.\d+)?)(?:\s*/\s*10\b)?"
_TWO_SCORES = re.compile(rf"{_NUMBER}(?:[^\w/]|_|\band\b)*?{_NUMBER}", re.IGNORECASE)
_LABEL = re.compile(r"assistant\s*[12]", re.IGNORECASE)
_LABELLED = re.compile(r"assistant\s*([12])\W{1,6}(\d+(?:\.\d+)?)", re.IGNORECASE)


def render_messages(record: dict, answer: str, swapped: bool = False, reference_repr: bool = False) -> list[dict]:
    """The chat that asks for a comparison.

    Args:
        record: as `load_chat_benchmark` returns it.
        answer: the model's; an empty one is judged like any other.
        swapped: show it as Assistant 1, and the reference as Assistant 2, instead of the other way round.
        reference_repr: show the text that refers to the figure in Python's notation, `None` included, as the published
            evaluations do, instead of one line for each mention and no block without any.

    Source: order and headings of the blocks as in LLaVA-Med (arXiv 2306.00890, section 5.1), after the judge of Vicuna.
    """
    context = record["context"]
    mentions = [context["in_text_mention_repr"]] if reference_repr else context["in_text_mention"]
    first, second = (answer, record["reference"]) if swapped else (record["reference"], answer)
    blocks = [
        f"[Context]\nFigure Caption:\n{context['fig_label']}: {context['fig_caption']}",
        *(["Figure Context:\n" + "\n".join(f"\t- {mention}" for mention in mentions)] if mentions else []),
        f"[Question]\n{record['question']}",
        f"[Assistant 1]\n{first}\n\n[End of Assistant 1]",
        f"[Assistant 2]\n{second}\n\n[End of Assistant 2]",
        f"[System]\n{_INSTRUCTION}",
    ]
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": "\n\n".join(blocks)}]


def parse_scores(text: str) -> tuple[float, float] | None:
    """The scores of Assistant 1 and 2 in a reply, or `None` if they cannot be told or are not between 1 and 10.

    Either the first line that is not blank has exactly two numbers and between them no word but "and", or both
    assistants are named with a number behind each.
    """
    line = next((line for line in text.splitlines() if line.strip()), "")
    scores = None
    if not _LABEL.search(line):
        found = _TWO_SCORES.search(line)
        scores = found.groups() if found and len(re.findall(_NUMBER, line)) == 2 else None
    if scores is None:
        labelled = dict(reversed(_LABELLED.findall(text)))  # the first of each label
        scores = (labelled["1"], labelled["2"]) if len(labelled) == 2 else None
    if scores is None:
        return None
    first, second = map(float, scores)
    return (first, second) if LOWEST <= first <= HIGHEST and LOWEST <= second <= HIGHEST else None


def match_answers(records: Sequence[dict], answers: dict[str, str], allow_partial: bool = False) -> dict[str, str]:
    """The answers to the questions, in the order of these.

    Args:
        records: the questions.
        answers: texts by the question's id.
        allow_partial: accept questions without answers, and answers to other questions, which are left out.

    Raises:
        ValueError: naming a few ids, for those where they are not allowed, and if no question has an answer.
    """
    ids = [record["id"] for record in records]
    missing, unknown = [item for item in ids if item not in answers], sorted(answers.keys() - set(ids))
    if len(missing) == len(ids):
        raise ValueError(f"`answers` has none of the {len(ids)} questions, but {_some(unknown)}.")
    if not allow_partial:
        for items, problem in ((missing, "lacks questions"), (unknown, "has unknown questions")):
            if items:
                raise ValueError(f"`answers` {problem}: {_some(items)}; allowed is one answer to each question.")
    return {item: answers[item] for item in ids if item in answers}


def _some(items: Sequence[str]) -> str:
    return f"{len(items)} ({', '.join(items[:_SHOWN])}{', …' if len(items) > _SHOWN else ''})"


def judge_answers(
    records: Sequence[dict],
    answers: dict[str, str],
    judge: Judge,
    folder: str | Path,
    *,
    swap_positions: bool = False,
    reference_repr: bool = False,
    allow_partial: bool = False,
    max_concurrent: int = 4,
    report: Callable[[str], object] = print,
) -> dict:
    """Have all answers judged, those that were judged before not again.

    Args:
        records: as `load_chat_benchmark` returns them.
        answers: texts by the question's id, see [`match_answers`].
        judge: what judges.
        folder: keeps the judge's replies, in `judgments.jsonl`; made if it is not there. One folder can serve any
            number of judges and models.
        swap_positions: judge each answer a second time with the two answers in the other order.
        reference_repr: see [`render_messages`].
        allow_partial: see [`match_answers`].
        max_concurrent: requests at a time.
        report: called with each line of text.

    Returns:
        `{"judge": its settings, "prompt_version", "prompt_sha256", "swap_positions", "judgments"}`. The last has for
        each question with an answer one judgment, or with `swap_positions` two: `{"status", "scores", "reason"}`, where
        the status is "ok", "parse_error" or "failed", the scores are those of the reference and of the model, and
        the reason says why there are none. Whatever is not "ok" will be asked again by the next run.

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
                key = _sha256([judge.settings, version, messages])
                prompts[key] = messages
                keys.setdefault(record["id"], []).append((key, swapped))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            outcomes = _ask_all(prompts, judge, folder / JUDGMENTS_FILE, max_concurrent, report)
    except Timeout:
        raise ValueError(
            f"`folder` is {str(folder)!r}, in which another run is at work; wait for it or give another."
        ) from None
    blank = render_messages(_BLANK, "", reference_repr=reference_repr)
    judgments = {
        item: [_as_judgment(outcomes[key], swapped) for key, swapped in item_keys] for item, item_keys in keys.items()
    }
    return {
        "judge": judge.settings,
        "prompt_version": version,
        "prompt_sha256": _sha256([blank, _REMINDER]),
        "swap_positions": swap_positions,
        "judgments": judgments,
    }


_BLANK = {
    "question": "",
    "reference": "",
    "context": {"fig_label": "", "fig_caption": "", "in_text_mention": [""], "in_text_mention_repr": ""},
}


def _sha256(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _as_judgment(outcome: dict, swapped: bool) -> dict:
    scores = outcome["scores"] and (outcome["scores"][::-1] if swapped else outcome["scores"])
    return {"status": outcome["status"], "scores": scores, "reason": outcome["reason"]}


def _ask_all(prompts: dict[str, list[dict]], judge: Judge, file: Path, max_concurrent: int, report) -> dict[str, dict]:
    """What came of each prompt, in this run or an earlier one, by its key."""
    outcomes = _read_finished(file)
    pending = [key for key in prompts if key not in outcomes]
    report(f"{len(prompts) - len(pending)} judgments are there, {len(pending)} to ask {judge.settings['model']} for")
    writing, stopped = Lock(), Event()

    def ask(key: str) -> dict:
        if stopped.is_set():
            return _outcome("failed", reason="not asked, because an earlier request failed for all")
        outcome = _ask(prompts[key], judge, stopped)
        # Written by the thread that has it, so that an interrupted run keeps what is under way.
        with writing, file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps({"key": key, **outcome}) + "\n")
            opened.flush()
            os.fsync(opened.fileno())
        return outcome

    with ThreadPoolExecutor(max_concurrent) as threads, tqdm(total=len(pending), unit="judgment") as progress:
        futures = {threads.submit(ask, key): key for key in pending}
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


def _ask(messages: list[dict], judge: Judge, stopped: Event) -> dict:
    """Ask once, and once more if the scores cannot be read."""
    replies = []
    try:
        replies.append(judge.complete(messages))
        if parse_scores(replies[-1]) is None:
            reply, reminder = {"role": "assistant", "content": replies[-1]}, {"role": "user", "content": _REMINDER}
            replies.append(judge.complete([*messages, reply, reminder]))
    except JudgeError as error:
        if error.for_all:
            stopped.set()
        return _outcome("failed", replies, reason=str(error))
    scores = parse_scores(replies[-1])
    if scores is None:
        return _outcome("parse_error", replies, reason="two replies without two scores from 1 to 10")
    return _outcome("ok", replies, scores=list(scores))


def _outcome(status: str, replies: Sequence[str] = (), scores: list[float] | None = None, reason: str = "") -> dict:
    return {"status": status, "scores": scores, "reason": reason, "replies": list(replies)}


def _read_finished(file: Path) -> dict[str, dict]:
    """The judgments that need not be asked for again, by key."""
    if not file.exists():
        return {}
    cut_torn_line(file)
    finished = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            outcome = json.loads(line)
            if outcome["status"] == "ok":
                first, second = map(float, outcome["scores"])
                finished[outcome["key"]] = {**outcome, "scores": [first, second], "reason": outcome["reason"]}
        except (ValueError, LookupError, TypeError, RecursionError):
            raise ValueError(f"{str(file)!r} has no judgment at line {number}.") from None
    return finished


__all__ = ["JUDGMENTS_FILE", "PROMPT_VERSION", "judge_answers", "match_answers", "parse_scores", "render_messages"]
