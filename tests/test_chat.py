"""The open-ended chat benchmark: its file, files of answers, judgments that are neither lost nor paid twice, scores."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest

from lladamedv.evaluation.chat import judge_answers, match_answers, read_answers, summarize, to_markdown
from lladamedv.evaluation.judge import OpenAIJudge, render_messages
from lladamedv.evaluation.published import GROUP_SIZES, RELATIVE_SCORES
from lladamedv.processing.datasets.chat_benchmark import DOMAINS, QUESTION_TYPES, load_chat_benchmark
from tests.judge_stub import CUT, HANG, Fault, benchmark_row, running_judge, write_rows


def load(tmp_path, *rows):
    return load_chat_benchmark(write_rows(tmp_path / "questions.jsonl", rows))[0]


def judged(*judgments, swap_positions=False):
    """What `judge_answers` would return: for each question, from 0, the pairs of scores, or a reason for none."""
    return {
        "judge": {"model": "a-judge", "host": "localhost", "temperature": 0.0},
        "prompt_version": "v", "prompt_sha256": "abc", "swap_positions": swap_positions,
        "judgments": {
            str(number): [
                {"status": "failed", "scores": None, "reason": scores}
                if isinstance(scores, str)
                else {"status": "ok", "scores": scores, "reason": ""}
                for scores in orders
            ]
            for number, orders in enumerate(judgments)
        },
    }  # fmt: skip


def of_domain(*names):
    return {name: name in names for name in DOMAINS}


@pytest.fixture
def three(tmp_path):
    """Two conversations, about MRI and CT, and one description, about MRI."""
    kinds = [("conversation", "mri"), ("conversation", "ct_scan"), ("detailed_description", "mri")]
    fields = [
        {"type": kind, "domain": of_domain(domain), "pair_id": f"image-{number}"}
        for number, (kind, domain) in enumerate(kinds)
    ]
    return load(tmp_path, *(benchmark_row(number, **more) for number, more in enumerate(fields)))


def test_a_record(tmp_path):
    mentions = [{"tokens": "As seen .", "entities": []}]
    row = benchmark_row(7, in_text_mention=mentions, domain=of_domain("ct_scan", "chest_xray"), pair_id="1_F1")
    assert load(tmp_path, row) == [{
        "id": "7", "image": "1_F1.jpg", "image_id": "1_F1", "question": "What does sign 7 mean?",
        "reference": "Sign 7 means that all is well.",
        "context": {
            "fig_label": "Figure 1", "fig_caption": "An image of patient 1.", "in_text_mention": ["As seen ."],
            "in_text_mention_repr": "[{'tokens': 'As seen .', 'entities': []}]",
        },
        "type": "detailed_description", "domain": "chest_xray", "domains": ["chest_xray", "ct_scan"],
    }]  # fmt: skip
    (record,) = load(tmp_path, benchmark_row(7, in_text_mention=None, domain=of_domain()))
    assert record["context"]["in_text_mention"] == [] and record["context"]["in_text_mention_repr"] == "None"
    assert record["domain"] is None and record["domains"] == []


@pytest.mark.parametrize("text", ["<image>\nWhat is it?", "What is it?\n<image>", "What <image> is it?", "What is it?"])
def test_the_placeholder_may_stand_anywhere(tmp_path, text):
    assert load(tmp_path, benchmark_row(0, text=text))[0]["question"] == "What is it?"


@pytest.mark.parametrize(
    "fields, message",
    [({"question_id": 0}, "`question_id` is 0, as at line 1"), ({"question_id": None}, "`question_id` is None"),
     ({"question_id": True}, "`question_id` is True"), ({"gpt4_answer": " "}, "`gpt4_answer` is ' '"),
     ({"image": 3}, "`image` is 3"), ({"type": "chat"}, "`type` is 'chat'"), ({"domain": None}, "`domain` is None"),
     ({"domain": {"pet": True}}, "`domain` is {'pet': True}"), ({"in_text_mention": ["x"]}, "`in_text_mention` is"),
     ({"text": "<image>\n"}, "`text` is .*, which asks nothing")],
)  # fmt: skip
def test_bad_rows(tmp_path, fields, message):
    with pytest.raises(ValueError, match=f"invalid question at line 2: {message}"):
        load(tmp_path, benchmark_row(0), benchmark_row(1, **fields))
    with pytest.raises(ValueError, match="has no question"):
        load(tmp_path)


@pytest.mark.parametrize(
    "rows",
    [
        [{"id": "0", "prediction": "One."}, {"id": "1", "prediction": ""}],
        [{"id": "0", "prediction": "One.", "answer": "True."}, {"id": "1", "prediction": "", "text": "x"}],
        [{"question_id": 0, "prompt": "?", "text": "One.", "model_id": "m"}, {"question_id": 1, "text": ""}],
        [{"question_id": 0, "answer": "One."}, {"question_id": 1, "answer": ""}],
    ],
    ids=["ours", "ours with more fields", "text", "answer"],
)
def test_files_of_answers(tmp_path, rows):
    assert read_answers(write_rows(tmp_path / "answers.jsonl", rows)) == {"0": "One.", "1": ""}
    (tmp_path / "answers.json").write_text(json.dumps(rows))
    assert read_answers(tmp_path / "answers.json") == {"0": "One.", "1": ""}


ONE = {"id": "0", "text": "One."}


@pytest.mark.parametrize(
    "rows, message",
    [
        ([ONE, {"question_id": 0, "text": "Two."}], "answers question 0 at line 1 and again at line 2"),
        ([ONE, {"question_id": 1}], r"no answer at line 2, but \['question_id'\]"),
        ([ONE, {"text": "x"}], "no answer at line 2"),
        ([ONE, {"question_id": 1, "text": "x", "answer": "y"}], "one of `text` and `answer`"),
        ([ONE, {"question_id": 1, "text": None}], "no answer at line 2"),
        ([], "has no answer"),
    ],
)
def test_bad_answers(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_answers(write_rows(tmp_path / "answers.jsonl", rows))


@pytest.fixture
def stub():
    with running_judge() as stub:
        yield stub


@pytest.fixture
def records(tmp_path):
    return load(tmp_path, *map(benchmark_row, range(10)))


@pytest.fixture
def answers(records):
    return {record["id"]: f"I see {record['id']}." for record in records}


def judged_by(stub, records, answers, folder, settings=(), **options):
    """The judgments, by a judge that does not repeat requests, the number of requests, and the lines reported."""
    before, lines = len(stub.requests), []
    judge = OpenAIJudge(**{"model": "a-judge", "base_url": stub.url, "max_retries": 0, **dict(settings)})
    found = judge_answers(records, answers, judge, folder, report=lines.append, **options)
    return found, len(stub.requests) - before, lines


def statuses(found):
    return [judgment["status"] for judgments in found["judgments"].values() for judgment in judgments]


def test_answers_are_matched_by_id(records, answers):
    assert list(match_answers(records, dict(reversed(answers.items())))) == [record["id"] for record in records]
    fewer = {item: text for item, text in answers.items() if item != "3"}
    more = answers | {str(number): "" for number in range(90, 97)}
    with pytest.raises(ValueError, match=r"unknown questions: 7 \(90, 91, 92, 93, 94, …\)"):
        match_answers(records, more)
    assert match_answers(records, fewer | {"99": "x"}, allow_partial=True) == fewer
    with pytest.raises(ValueError, match="none of the 10 questions"):
        match_answers(records, {"x": "y"}, allow_partial=True)


def test_judgments(stub, records, answers, tmp_path):
    """Scores belong to the reference and the model, whichever came first; an empty answer is judged, too."""
    answers["4"] = ""
    found, count, _ = judged_by(stub, records, answers, tmp_path / "run", swap_positions=True)
    assert count == 20 and list(found["judgments"]) == [record["id"] for record in records]
    assert any("[Assistant 2]\n\n\n[End" in body["messages"][1]["content"] for _, _, body in stub.requests)
    for record in records:
        plain, swapped = (stub.scores(render_messages(record, answers[record["id"]], order)) for order in (False, True))
        scores = [judgment["scores"] for judgment in found["judgments"][record["id"]]]
        assert scores == [[*plain], [*reversed(swapped)]]
    again, count, lines = judged_by(stub, records, answers, tmp_path / "run", swap_positions=True, max_concurrent=1)
    assert again == found and count == 0 and lines == ["20 judgments are there, 0 to ask a-judge for"]


def test_what_a_judgment_depends_on(stub, records, answers, tmp_path):
    """Another answer, prompt, judge or sampling is asked for anew; all in one folder."""
    folder, records, answers = tmp_path / "run", records[:1], {"0": answers["0"]}
    for settings in ({}, {"temperature": 1.0}, {"max_tokens": 5}, {"reasoning_model": True}, {"model": "other"}):
        assert judged_by(stub, records, answers, folder, settings)[1] == 1
    assert judged_by(stub, records, {"0": "Other."}, folder)[1] == 1
    assert judged_by(stub, records, answers, folder, reference_repr=True)[1] == 1
    assert judged_by(stub, records, answers, folder)[1] == 0
    # Both orders of an answer that is the reference itself are one request.
    assert judged_by(stub, records, {"0": records[0]["reference"]}, folder, swap_positions=True)[1] == 1


def test_one_failure_costs_one_question(stub, records, answers, tmp_path):
    whole = judged_by(stub, records, answers, tmp_path / "whole")[0]
    stub.script = [None, Fault(400, "too long"), CUT, Fault(200, "<html>"), "8", "9", Fault(500)]
    found, count, lines = judged_by(stub, records, answers, tmp_path / "run", max_concurrent=1)
    assert count == 11 and statuses(found) == ["ok", *["failed"] * 3, "parse_error", "failed", *["ok"] * 4]
    assert "too long" in found["judgments"]["1"][0]["reason"] and "too long" in lines[-1]
    assert found["judgments"]["4"][0]["reason"].startswith("two replies without")
    summary = summarize(records, answers, found)
    assert not summary["complete"] and summary["n_failed"] == 5 and summary["coverage"] == 0.5
    resumed, count, _ = judged_by(stub, records, answers, tmp_path / "run")
    assert count == 5 and resumed == whole


def test_a_failure_for_all_requests_stops_the_run(stub, records, answers, tmp_path):
    """Neither the report nor the files hold the key that the server repeats."""
    key = {"api_key": "sk-secret"}
    stub.script = [None, Fault(401, "no such key: sk-secret")]
    found, count, lines = judged_by(stub, records, answers, tmp_path, key, max_concurrent=1)
    assert count == 2 and statuses(found) == ["ok", *["failed"] * 9] and "no such key: ***" in lines[-1]
    assert "not asked" in found["judgments"]["2"][0]["reason"]
    assert b"sk-secret" not in (tmp_path / "judgments.jsonl").read_bytes()


# tests/kills kills the same run, too.
@pytest.mark.parametrize("sent", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGINT], ids=str)
def test_a_stopped_process_continues(stub, records, answers, tmp_path, sent):
    """A kill costs the two requests under way; Ctrl-C waits for them and costs nothing."""
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # the background jobs of a shell ignore it
        "from lladamedv.evaluation.chat import judge_answers\n"
        "from lladamedv.evaluation.judge import OpenAIJudge\n"
        "from lladamedv.processing.datasets.chat_benchmark import load_chat_benchmark\n"
        "url, questions, folder = sys.argv[1:]\n"
        "records, _ = load_chat_benchmark(questions)\n"
        "answers = {record['id']: f'I see {record[\"id\"]}.' for record in records}\n"
        "judge_answers(records, answers, OpenAIJudge('a-judge', url), folder, max_concurrent=2)\n"
    )
    stub.script = [*[None] * 6, HANG, HANG]
    command = [sys.executable, "-u", "-c", code, stub.url, tmp_path / "questions.jsonl", tmp_path / "run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while len(stub.requests) < 8:  # two are under way, six are done
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(ValueError, match="another run is at work"):
        judged_by(stub, records, answers, tmp_path / "run")
    process.send_signal(sent)
    if sent == signal.SIGINT:
        assert any("stopping" in line for line in process.stdout)
        stub.ending.set()  # both are dropped, and then repeated with success
    process.communicate()
    assert process.returncode != 0
    with (tmp_path / "run/judgments.jsonl").open("a") as file:
        file.write('{"key": "abc", "sta')  # as after a kill in the midst of a line
    resumed, count, _ = judged_by(stub, records, answers, tmp_path / "run")
    assert count == (4 if sent == signal.SIGKILL else 2)
    assert resumed == judged_by(stub, records, answers, tmp_path / "whole")[0]


def test_bad_input_asks_nothing(stub, records, answers, tmp_path):
    with pytest.raises(ValueError, match="`max_concurrent` is 0"):
        judged_by(stub, records, answers, tmp_path / "run", max_concurrent=0)
    with pytest.raises(ValueError, match=r"`answers` lacks questions: 9 \(1, 2, 3, 4, 5, …\)"):
        judged_by(stub, records, {"0": "x"}, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for line, message in (('{"status": "ok"}', "no record with 'key'"), ('{"key": "a"}', "no judgment")):
        (tmp_path / "judgments.jsonl").write_text(line + "\n")
        with pytest.raises(ValueError, match=f"{message} at line 1"):
            judged_by(stub, records, answers, tmp_path)
    assert stub.requests == []


def test_replies_of_earlier_runs_are_read_anew(stub, records, answers, tmp_path):
    """A judgment that was misread when it was paid for is corrected, and not paid for again."""
    judged_by(stub, records, answers, tmp_path)
    file = tmp_path / "judgments.jsonl"
    lines = [json.loads(line) | {"replies": ["1. 8\n2. 9"], "scores": [1, 8]} for line in file.open()]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, requests, _ = judged_by(stub, records, answers, tmp_path)
    assert requests == 0
    assert all(judgment["scores"] == [8, 9] for (judgment,) in found["judgments"].values())


def test_runs_of_the_first_version_continue(stub, records, answers, tmp_path):
    """The key of a judgment is what version 0.1.0 wrote for the same server, judge, prompt and answer."""
    settings = {"base_url": "http://judge.example:8000/v1"}
    reply = {"status": "ok", "scores": [8, 7], "reason": "", "replies": ["8 7"]}
    line = {"key": "a8f27e00672da51e276e5b599c40921c2ac0c0fa943b68e93fa6e9f047c1b107", **reply}
    (tmp_path / "judgments.jsonl").write_text(json.dumps(line) + "\n")
    found, _, lines = judged_by(stub, records[:1], {"0": "I see 0."}, tmp_path, settings)
    assert lines == ["1 judgments are there, 0 to ask a-judge for"]
    assert found["prompt_sha256"] == "d3ff4224fee194dfa7df7c0f8110072315dfe57b0b2893ac415abb696c323f2f"


def test_relative_scores_are_means_of_ratios(three):
    """By hand: 6/8, 9/9 and 5/10; the ratio of the means would be 74.07."""
    summary = summarize(three, {"0": "a", "1": "b c", "2": ""}, judged([(8, 6)], [(9, 9)], [(10, 5)]))
    scores = {group: values["relative_score"] for group, values in summary["groups"].items()}
    assert scores == {
        "all": 75, "conversation": 87.5, "detailed_description": 50,
        "chest_xray": None, "mri": 62.5, "histology": None, "gross": None, "ct_scan": 100,
    }  # fmt: skip
    everything = summary["groups"]["all"]
    assert everything["gpt4_score"] == 9 and everything["pred_score"] == pytest.approx(20 / 3)
    assert everything["data_size"] == everything["n_judged"] == 3
    assert summary["complete"] and summary["coverage"] == 1 and summary["order_disagreement"] is None
    assert summary["text"]["model"]["words_per_answer"] == 1 and summary["text"]["model"]["num_empty"] == 1
    assert summary["text"]["reference"]["words_per_answer"] == 7
    text = to_markdown(summary)
    assert text.startswith("# Open-ended biomedical chat: model\n")
    for line in (
        "| model | " + " | ".join(GROUP_SIZES) + " |", "| **model** | 87.5 | 50 | – | 62.5 | – | – | 100 | 75 |",
        "| LLaDA-MedV | 54.141 | ", "Judge: a-judge at localhost",
    ):  # fmt: skip
        assert text.count(line) == 1


@pytest.mark.parametrize("multi_label, gross", [(False, 100), (True, 75)])
def test_questions_of_two_domains(tmp_path, multi_label, gross):
    rows = [benchmark_row(0, domain=of_domain("histology", "gross")), benchmark_row(1, domain=of_domain("gross"))]
    scores = judged([(10, 5)], [(10, 10)])
    groups = summarize(load(tmp_path, *rows), {"0": "a", "1": "b"}, scores, multi_label_domains=multi_label)["groups"]
    assert (groups["histology"]["relative_score"], groups["gross"]["relative_score"]) == (50, gross)


def test_swapped_positions(three):
    """Both orders count alike; a question without one of them does not count."""
    scores = judged([(8, 6), (4, 5)], [(9, 9), (9, 9)], [(10, 5), "too slow"], swap_positions=True)
    summary = summarize(three, {"0": "a", "1": "b", "2": "c"}, scores)
    first, second, third = summary["items"]
    assert first["relative_score"] == 100 and first["order_disagreement"] == 50  # of 75 and 125
    assert (first["gpt4_score"], first["pred_score"]) == (6, 5.5)
    assert second["order_disagreement"] == 0 and third["relative_score"] is None
    assert third["reason"] == "failed: too slow"
    assert summary["order_disagreement"] == 25 and summary["n_judged"] == 2
    assert "differ by 25 percent points" in to_markdown(summary)


def test_nothing_is_left_out_in_silence(three):
    scores = judged([(8, 6)], ["too slow"])
    summary = summarize(three, {"0": "a", "1": "b"}, scores)
    assert not summary["complete"] and summary["coverage"] == pytest.approx(1 / 3)
    assert (summary["data_size"], summary["n_answered"], summary["n_judged"], summary["n_failed"]) == (3, 2, 1, 1)
    assert [item["reason"] for item in summary["items"]] == ["", "failed: too slow", "not answered"]
    assert summary["groups"]["all"]["relative_score"] == 75 and summary["groups"]["mri"]["data_size"] == 2
    assert not summarize(three, {"0": "a"}, judged([(8, 6)]))["complete"]  # all that is answered, and yet not all
    first_line = to_markdown(summary).splitlines()[0]
    assert first_line.startswith("**Incomplete: 1 of 3 questions are judged, the judgments of 1 failed and 1 have no")


@pytest.mark.parametrize(
    "count, more, interval", [(10, {}, [20, 80]), (5, {}, None), (10, {"bootstrap_samples": 0}, None)]
)
def test_intervals_draw_images(tmp_path, count, more, interval):
    """Five questions about each image, all alike within an image: only 3 means are possible, the extremes 1/4 each."""
    records = load(tmp_path, *map(benchmark_row, range(count)))
    answers, scores = {record["id"]: "a" for record in records}, judged(*[[(10, 2)]] * 5, *[[(10, 8)]] * 5)
    found = summarize(records, answers, scores, **more)["groups"]["all"]["relative_score_ci95"]
    assert found == pytest.approx(interval)


@pytest.mark.parametrize("model", RELATIVE_SCORES)
def test_published_scores_add_up(model):
    """The overall score is the mean of those of the types, and of the domains, weighted by their sizes."""
    scores = dict(zip(GROUP_SIZES, RELATIVE_SCORES[model], strict=True))
    for groups in (QUESTION_TYPES, DOMAINS):
        assert sum(GROUP_SIZES[group] for group in groups) == GROUP_SIZES["all"] == 193
        weighted = math.fsum(GROUP_SIZES[group] * scores[group] for group in groups) / 193
        assert (abs(weighted - scores["all"]) < 0.01) == (model != "LLaVA")
