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
import unicodedata
from collections.abc import Callable, Iterable, Sequence
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

# What may stand behind a score is named, so that "2 errors", "4/5", "7-8" and "8,5" are none.
_SCORE = r"(\d+(?:\.\d+)?)(?:\s*/\s*10\b|\s+out\s+of\s+10\b)?(?:\s+points?\b)?"
_END = (
    r"(?=\s*(?:$|[;()\[\]|!]|[,.](?!\d)|[\u2013\u2014-](?!\s*\d)"
    r"|(?:and|but|while|whereas|because|since|as|vs|assistant|score\s+of\s+assistant)\b))"
)
_PREFIX = r"(?:(?:(?:final|overall|my|the)\s+)*(?:scores?|ratings?)\s*(?:are\b)?\s*[:=]?\s*)?[\[(|]?\s*"
_BETWEEN = r"(?:\s*(?:[;|&\u2013\u2014]|\band\b|\bvs\b\.?|\bversus\b)\s*|,\s+|\s+-\s+|\s+)"
_PAIR = re.compile(_PREFIX + _SCORE + _BETWEEN + _SCORE + _END)
_ITEM = r"(?:\s*[):=]\s*|\s*\.\s+|\s+-\s+)"
_NUMBERED = re.compile(rf"1{_ITEM}{_SCORE}(?:,|;|\s)\s*2{_ITEM}{_SCORE}{_END}")
_NUMBERED_LINES = re.compile(rf"1{_ITEM}{_SCORE}{_END}.*\n2{_ITEM}{_SCORE}{_END}")
_ALONE = re.compile(rf"{_SCORE}\.?")
_LABELLED = re.compile(
    r"\bassistant\s*#?([12])\b(?:'s\b|[\s:=()|\u2013\u2014-]|\b(?:score|rating)s?(?:\s+of)?\b"
    rf"|\b(?:answer|overall|gets?|receives?|earns?|is|an?)\b)*(?<![\d.,-]){_SCORE}{_END}"
)
_LABEL_WORDS = {"assistant", "answer", "final", "for", "of", "overall", "rating", "score", "the"}
_THOUGHTS = re.compile(r"<(think(?:ing)?)>.*?(?:</\1>|$)|^.*</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_MARKDOWN = re.compile(r"```[\w-]*|[*_`]|^\s*[#>]+", re.MULTILINE)


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

    Thoughts in `<think>` and Markdown's marks are left out. What remains must be one of these; a number that only might
    be a score, or two different scores of one assistant, are none:

    - a first line with the two scores and no other number: "8 9", "8, 9", "8 vs 9", "8/10 and 9/10", "Scores: 8 9",
      perhaps with a reason behind a mark or "because";
    - numbered scores, "1. 8" and "2. 9", or two lines with a score each;
    - both assistants named with a score behind each: "Assistant 1: 8/10, Assistant 2: 9/10";
    - JSON: `[8, 9]`, `{"scores": [8, 9]}`, or an object with one number for each assistant.
    """
    text = unicodedata.normalize("NFKC", _THOUGHTS.sub("", text))
    lines = [line.strip() for line in _MARKDOWN.sub("", text).lower().splitlines() if line.strip()]
    found = _scores_in_json(re.sub(r"```[\w-]*", "", text).strip()) or _scores_in_lines(lines)
    named = _labelled(label_and_score.groups() for line in lines for label_and_score in _LABELLED.finditer(line))
    if found is not None and named is not None and [*map(float, found)] != [*map(float, named)]:
        return None
    found = found or named
    if found is None:
        return None
    first, second = map(float, found)
    return (first, second) if LOWEST <= first <= HIGHEST and LOWEST <= second <= HIGHEST else None


def _scores_in_lines(lines: list[str]) -> tuple[str, str] | None:
    """Two scores that begin a reply, without the names of the assistants."""
    head = "\n".join(lines[:2])
    if numbered := _NUMBERED_LINES.match(head) or _NUMBERED.match(head):
        return numbered.groups()
    alone = [_ALONE.fullmatch(line) for line in lines[:3]]
    if (all(alone) and len(alone) == 2) or (len(alone) == 3 and alone[0] and alone[1] and not alone[2]):
        return alone[0][1], alone[1][1]
    pairs = [pair.groups() for line in lines if (pair := _PAIR.match(line)) and _count_numbers(line) == 2]
    begins = bool(lines) and _PAIR.match(lines[0]) and _count_numbers(lines[0]) == 2
    return pairs[0] if begins and len(set(pairs)) == 1 else None


def _count_numbers(line: str) -> int:
    return len(re.findall(r"\d+(?:\.\d+)?", re.sub(r"(?:/|out of)\s*10\b", "", line)))


def _scores_in_json(text: str) -> tuple[float, float] | None:
    try:
        value, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        value = {str(name).lower(): each for name, each in value.items()}
        value = value.get("scores", value)
    if isinstance(value, list):
        value = dict(zip("12", value)) if len(value) == 2 else {}
    found = []
    for name, score in value.items() if isinstance(value, dict) else ():
        score = score.get("score") if isinstance(score, dict) else score
        words = re.findall(r"[a-z]+", str(name).lower())
        number = _ALONE.fullmatch(str(score))
        if len(digits := re.findall(r"\d+", str(name))) == 1 and number and {*words} <= _LABEL_WORDS:
            found.append((digits[0], number[1]))
    return _labelled(found)


def _labelled(found: Iterable[tuple[str, str]]) -> tuple[float, float] | None:
    """The scores of the labels "1" and "2", if each has one, however often."""
    scores = {}
    for label, score in found:
        scores.setdefault(label, set()).add(float(score))
    if sorted(scores) != ["1", "2"] or any(len(each) > 1 for each in scores.values()):
        return None
    return min(scores["1"]), min(scores["2"])


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
            f"In the folder {str(folder)!r} another run is at work; wait for it or give another folder."
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
            # Read anew, because an earlier version may have read it otherwise.
            if outcome["status"] == "ok" and (scores := parse_scores(outcome["replies"][-1])):
                finished[outcome["key"]] = {**outcome, "scores": list(scores), "reason": outcome["reason"]}
        except (ValueError, LookupError, TypeError, RecursionError):
            raise ValueError(f"{str(file)!r} has no judgment at line {number}.") from None
    return finished


__all__ = ["JUDGMENTS_FILE", "PROMPT_VERSION", "judge_answers", "match_answers", "parse_scores", "render_messages"]
