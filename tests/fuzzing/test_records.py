"""Files of records and replies of judges, with anything wrong anywhere in them, give rows or an error that tells."""

from __future__ import annotations

import json
import os
import random
import tempfile
from functools import cache
from pathlib import Path

import pytest
from datasets import Image, List
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lladamedv.evaluation.chat import read_judgments
from lladamedv.evaluation.judge import parse_scores
from lladamedv.processing.datasets import load_chat_benchmark, load_vqa, read_records
from lladamedv.processing.datasets.messages import normalize_messages
from lladamedv.trainers.data import DataSource, load_dataset_mixture
from tests.tiny import random_image

from .harness import Target, both_profiles
from .mutations import mutate_bytes, mutate_value


@cache
def folder() -> Path:
    """A folder with one image; the process has its own."""
    path = Path(tempfile.mkdtemp(prefix=f"lladamedv_records_{os.getpid()}_"))
    random_image().save(path / "a.png")
    return path


LLAVA = {
    "id": "7",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Lung.\n🩻"}],
}
VQA = {
    "qid": 3, "image_name": "a.png", "question": "Is it?", "answer": "Yes", "answer_type": "CLOSED", "q_lang": "en",
    "meta": {"modality": "CT", "phrase_type": None},
}  # fmt: skip
CHAT = {
    "question_id": 0, "image": "a.png", "pair_id": "p", "text": "<image>\nWhat?", "gpt4_answer": "A lung.",
    "fig_label": "Fig 1", "fig_caption": "CT.", "type": "conversation", "domain": {"ct_scan": True, "mri": False},
    "in_text_mention": [{"tokens": "It shows."}],
}  # fmt: skip
RECORDS = {"llava": LLAVA, "vqa": VQA, "chat": CHAT}


def file_of(kind: str, rng: random.Random) -> bytes:
    """JSON or JSON lines of records, one of which is wrong, or whose bytes are."""
    records = [{**RECORDS[kind], key: number} for number, key in enumerate(["number"] * rng.choice((1, 1, 2, 5)))]
    for number, record in enumerate(records):
        record.update({key: str(number) for key in ("id", "qid", "question_id") if key in record})
    for _ in range(rng.choice((0, 1, 1, 2))):
        place = rng.randrange(len(records))
        records[place] = mutate_value(records[place], rng)
    if rng.random() < 0.1:
        records = mutate_value(records, rng)
    ascii_only = rng.random() < 0.5
    if rng.random() < 0.5 and isinstance(records, list):
        text = "".join(
            json.dumps(record, ensure_ascii=ascii_only) + rng.choice(("\n", "\r\n", "\n\n")) for record in records
        )
    else:
        text = json.dumps(records, ensure_ascii=ascii_only, indent=rng.choice((None, 1)))
    content = text.encode(rng.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16")), "surrogatepass")
    kinds = (lambda: content, lambda: content, lambda: mutate_bytes(content, rng), lambda: text_bomb(content, rng))
    return rng.choice(kinds)()


def text_bomb(content: bytes, rng: random.Random) -> bytes:
    """Nested without end, numbers without end, keys that come twice."""
    depth = rng.choice((100, 5000, 100_000))
    inside = rng.choice(
        (b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth, b"9" * depth, b"1e" + b"9" * depth)
    )
    inside = rng.choice(
        (inside, b"NaN", b"-Infinity", b'"\\ud800"', b'"\\ud83d\\ude00"', b'"\\u0000"', b"0" * 50, b'"')
    )
    place = content.find(b":", rng.randrange(len(content) + 1)) + 1
    return content[:place] + inside + rng.choice((b"", b",", b'"}]')) + content[place:]


def written(content: bytes) -> Path:
    path = folder() / "records.json"
    path.write_bytes(content)
    return path


def training(given) -> None:
    content, policy = given
    source = DataSource(str(written(content)), image_folder=str(folder()))
    dataset, (report,) = load_dataset_mixture([source], invalid_records=policy)
    rows = dataset.cast_column("images", List(Image(decode=False))).to_list()
    assert len(rows) == report.rows
    for row in rows:
        assert normalize_messages(row["messages"], len(row["images"])) == row["messages"]
        json.dumps(row["messages"], ensure_ascii=False).encode()


def vqa(given) -> None:
    content, policy = given
    rows, report = load_vqa("vqa-rad", path=written(content), invalid_records=policy)
    assert len(rows) == report.rows and all(rows["question"]) and len(report.summary()) < 5000


def chat(given) -> None:
    content, _ = given
    records, report = load_chat_benchmark(written(content), folder())
    assert len(records) == report.rows and all(record["question"] for record in records)


def plain(given) -> None:
    content, _ = given
    for _, record in read_records(written(content)):
        assert isinstance(record, dict)
        json.dumps(record, ensure_ascii=False).encode()


def table(rng: random.Random) -> bytes:
    """A table with a cell too many, a quotation mark or anything else somewhere in it."""
    lines = ["id,image,question,answer", *(f'{number},a.png,"Is it, {number}?",5' for number in range(3))]
    other = rng.choice((",", '"', "\n", "\r", "\0", "\t", "x" * 200_000, ""))
    text = "\n".join(lines).replace(rng.choice(',5"?'), other, 1)
    return rng.choice((text.encode(), mutate_bytes(text.encode(), rng), text.encode("utf-16")))


def cells(content: bytes) -> None:
    path = folder() / "records.csv"
    path.write_bytes(content)
    for place, record in read_records(path):
        assert place != "line 1" and all(value is None or isinstance(value, str) for value in record.values())


def for_kind(kind: str):
    return lambda rng: (file_of(kind, rng), rng.choice(("error", "skip")))


def any_file(rng: random.Random):
    return file_of(rng.choice(("llava", "vqa", "chat")), rng), "error"


# Judges


def judgments(rng: random.Random) -> bytes:
    outcome = {"key": "ab", "status": "ok", "scores": [7, 8.5], "reason": "", "replies": ["7 8.5"]}
    lines = [json.dumps(mutate_value(outcome, rng) if rng.random() < 0.5 else outcome) for _ in range(3)]
    content = "\n".join([*lines, ""]).encode()
    return rng.choice((content, mutate_bytes(content, rng), text_bomb(content, rng) + b"\n"))


def finished(content: bytes) -> None:
    for outcome in read_judgments(written(content)).values():
        assert len(outcome["scores"]) == 2 and "reason" in outcome


_PIECES = (
    "7", "8.5", "10", "0", "11", "-3", "7/10", "8 / 10", "1e5", "٣", "²", "½", " ", " ", "\n", "\t", ",", "and", "_",
    "/", "Assistant 1", "assistant 2:", "Assistant", "**", "score", ".", "-", "\u2028", "\r", "nan", "<think>",
    "x" * 50, " " * 500, "1." * 200, "9" * 400, "Assistant 1: 7", "Assistant 2 = 9/10",
)  # fmt: skip


def reply(rng: random.Random) -> str:
    text = "".join(rng.choice(_PIECES) for _ in range(rng.randrange(12)))
    return text if rng.random() < 0.9 else text * rng.choice((100, 1000, 10_000))


def scores(text: str) -> None:
    found = parse_scores(text)
    assert found is None or (len(found) == 2 and all(1 <= score <= 10 for score in found))


TARGETS = [
    Target("records", any_file, plain, share=1.5),
    Target("tables", table, cells),
    Target("training records", lambda rng: for_kind(rng.choice(("llava", "vqa")))(rng), training),
    Target("vqa records", for_kind("vqa"), vqa, share=0.3, quick=20),
    Target("chat benchmark records", for_kind("chat"), chat),
    Target("judgments", judgments, finished),
    Target("judge replies", reply, scores, share=2.0, quick=300),
]


@both_profiles(TARGETS)
def test_records(target, first, count):
    target.hunt(first, count)


@pytest.mark.parametrize("examples", [200, pytest.param(20_000, marks=pytest.mark.slow)])
def test_any_reply(examples):
    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.one_of(st.text(), st.lists(st.sampled_from(_PIECES)).map("".join)))
    def any_reply(text):
        scores(text)

    any_reply()


@pytest.mark.parametrize(
    "place", ["/dev/zero", "/dev", "no\0where", "\ud800", "~nobody-of-this-name/x.json", "x" * 5000]
)
def test_what_is_no_file(place):
    for read in (
        lambda: list(read_records(place)),
        lambda: load_dataset_mixture([place]),
        lambda: load_vqa("slake", path=place),
        lambda: load_chat_benchmark(place),
    ):
        with pytest.raises(ValueError) as error:
            read()
        assert type(error.value) is ValueError and "\n" not in str(error.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "records.json")
    with pytest.raises(ValueError, match="no regular one"):
        list(read_records(tmp_path / "records.json"))
