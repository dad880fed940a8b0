"""Judges and judging over real HTTP: every fault, nothing asked twice, nothing lost, and no secret shown."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path

import pytest

from lladamedv.evaluation.chat_benchmark import summarize
from lladamedv.evaluation.judge import JudgeError, OpenAIJudge
from lladamedv.evaluation.judging import judge_answers, match_answers, parse_scores, render_messages
from lladamedv.processing.datasets.chat_benchmark import load_chat_benchmark
from tests.judge_stub import CUT, DROP, HANG, Fault, benchmark_row, running_judge, write_rows


ROOT = Path(__file__).parents[1]
KEY = "sk-secret-0123456789"
QUESTION = [{"role": "user", "content": "Which is better?"}]


@pytest.fixture
def stub():
    with running_judge() as stub:
        yield stub


def judge_of(stub, **options):
    """A client, and the list of how long it would have waited."""
    waits = []
    return OpenAIJudge("a-judge", stub.url, sleep=waits.append, **options), waits


@pytest.fixture
def records(tmp_path):
    return load_chat_benchmark(write_rows(tmp_path / "questions.jsonl", map(benchmark_row, range(10))))[0]


@pytest.fixture
def answers(records):
    return {record["id"]: f"I see {record['id']}." for record in records}


def judged_by(stub, records, answers, folder, max_retries=0, **options):
    """The judgments, by a judge that does not repeat requests, and the number of requests that they took."""
    before, lines = len(stub.requests), []
    judge, _ = judge_of(stub, max_retries=max_retries)
    judged = judge_answers(records, answers, judge, folder, report=lines.append, **options)
    return judged, len(stub.requests) - before, lines


def statuses(judged):
    return [judgment["status"] for judgments in judged["judgments"].values() for judgment in judgments]


@pytest.mark.parametrize(
    "text, scores",
    [
        ("8 7\nexp", (8, 7)),
        ("8, 7", (8, 7)),
        ("\n 8.5 9\n", (8.5, 9)),
        ("Assistant 1: 8\nAssistant 2: 7", (8, 7)),
        ("**8 7**", (8, 7)),
        ("8/10 7/10", (8, 7)),
        ("N/A", None),
        ("0 5", None),
        ("11 3", None),
        ("3 11", None),
        ("3 0.5", None),
        ("", None),
        ("10 1", (10, 1)),
        ("Scores: 8 and 7", (8, 7)),
        ("8 7 because the second is vague", (8, 7)),
        ("Assistant 2: 7, Assistant 1: 8", (8, 7)),
        ("Here they are:\n**Assistant 1:** 9/10\n**Assistant 2:** 6.5/10", (9, 6.5)),
        ("Assistant 1: 8\nAssistant 2: 7\nAssistant 1: 3 mistakes", (8, 7)),
        ("Assistant 1: 8", None),
        ("Assistant 15 or Assistant 2: 7", None),
        ("I compared 2 answers by 4 criteria.\n8 7", None),
        ("8 7 6", None),
        ("80/100 70/100", None),
        ("-8 7", None),
        ("8", None),
        ("8/9", None),
        # Numbered
        ("1. 8\n2. 9", (8, 9)),
        ("1) 8/10\n2) 9/10\nThe second is longer.", (8, 9)),
        ("1: 8, 2: 9", (8, 9)),
        ("1 - 8\n2 - 9", (8, 9)),
        ("1. 8", None),
        ("1 8\n2 9", None),
        ("1.8 2.9", (1.8, 2.9)),
        ("8\n9", (8, 9)),
        ("8\n9\n7", None),
        # In other words and marks
        ("8 vs 9", (8, 9)),
        ("8/10 and 9/10", (8, 9)),
        ("8 out of 10 and 9 out of 10", (8, 9)),
        ("| 8 | 9 |", (8, 9)),
        ("```\n8 9\n```", (8, 9)),
        ("<think>Perhaps 5 6.</think>\n8 9", (8, 9)),
        ("Perhaps 5 6.</think>\n8 9", (8, 9)),
        ("<think>8 9", None),
        ("\uff18 \uff19", (8, 9)),
        ("8 9 errors", None),
        ("8 > 9", None),
        ("8,5", None),
        ("8,5\n7,5", None),
        ("7-8 9", None),
        ("4/5 3/5", None),
        ("8 9\n7 6", None),
        # By the assistants' names
        ("Assistant 1: 8.5/10, but assistant 2: 2 errors, so 6/10", None),
        ("Assistant 1: 8.5/10, but assistant 2: 6/10", (8.5, 6)),
        ("Assistant 1 gets a score of 8 and Assistant 2 gets 9.", (8, 9)),
        ("Score of Assistant 1: 8\nScore of Assistant 2: 9", (8, 9)),
        ("| Assistant 1 | 8 |\n| Assistant 2 | 9 |", (8, 9)),
        ("Assistant 1: 8\nAssistant 2: 9\nOn reflection, Assistant 1: 7", None),
        ("Assistant 1: 8,5\nAssistant 2: 7", None),
        ("Assistant 1: 7-8\nAssistant 2: 9", None),
        ("Assistant 1: 7 - 8\nAssistant 2: 9", None),
        ("Assistant 1: 7\u20138\nAssistant 2: 9", None),
        ("Assistant 1: 10 - 2 = 8, Assistant 2: 9", None),
        ("1 2\nAssistant 1: 8\nAssistant 2: 9", None),  # two scores of each
        ("8 9\nAssistant 1: 8\nAssistant 2: 9", (8, 9)),
        ("Assistant 1 of 2: 8, Assistant 2 of 2: 9", None),
        ("8 for Assistant 1 and 9 for Assistant 2", None),
        # JSON
        ("[8, 9]", (8, 9)),
        ('```json\n{"assistant_1": 8, "assistant_2": "9/10"}\n```', (8, 9)),
        ('{"scores": {"Assistant 1": 8, "Assistant 2": 9}, "winner": 2}', (8, 9)),
        ('{"assistant_1": {"score": 8}, "assistant_2": {"score": 9}}', (8, 9)),
        ('{"assistant_1_errors": 2, "assistant_2_errors": 3}', None),
        ('{"assistant_1": true, "assistant_2": 9}', None),
        ("[8, 9, 7]", None),
    ],
)
def test_scores_in_replies(text, scores):
    assert parse_scores(text) == scores


def test_the_prompt(tmp_path):
    mentions = [{"tokens": "It is dense.", "entities": [{"type": "x"}]}, {"tokens": "It is old.", "entities": []}]
    rows = [benchmark_row(0, in_text_mention=mentions), benchmark_row(1, in_text_mention=None)]
    (record, bare), _ = load_chat_benchmark(write_rows(tmp_path / "questions.jsonl", rows))
    system, user = render_messages(record, "An answer.")
    assert system["role"] == "system" and user["role"] == "user"
    head, instruction = user["content"].split("[System]\n")
    assert head == (
        "[Context]\nFigure Caption:\nFigure 1: An image of patient 0.\n\n"
        "Figure Context:\n\t- It is dense.\n\t- It is old.\n\n"
        "[Question]\nWhat does sign 0 mean?\n\n"
        "[Assistant 1]\nSign 0 means that all is well.\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nAn answer.\n\n[End of Assistant 2]\n\n"
    )
    for word in ("helpfulness", "relevance", "accuracy", "level of detail", "1 to 10", "separated by a space", "order"):
        assert word in instruction
    swapped = render_messages(record, "An answer.", swapped=True)[1]["content"]
    assert "[Assistant 1]\nAn answer.\n" in swapped and "[Assistant 2]\nSign 0 means" in swapped
    assert "Figure Context" not in render_messages(bare, "")[1]["content"]
    as_published = [render_messages(each, "", reference_repr=True)[1]["content"] for each in (record, bare)]
    assert f"Figure Context:\n\t- {mentions}\n\n[Question]" in as_published[0]
    assert "Figure Context:\n\t- None\n\n[Question]" in as_published[1]


def test_what_is_sent(stub, monkeypatch, tmp_path):
    """Without a key no authorisation goes out, whatever is in the environment; with one it is that one."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    for name in ("HF_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "hf_from_the_environment")
    monkeypatch.setenv("NETRC", str(netrc))
    stub.script = ["8 7"] * 3
    assert judge_of(stub)[0].complete(QUESTION) == "8 7"
    judge_of(stub, api_key=KEY, temperature=0.5, max_tokens=9)[0].complete(QUESTION)
    judge_of(stub, reasoning_model=True)[0].complete(QUESTION)
    (path, headers, body), (_, keyed, sampled), (_, _, reasoned) = stub.requests
    assert path == "/v1/chat/completions"
    assert body == {"model": "a-judge", "messages": QUESTION, "temperature": 0.0, "max_tokens": 1024}
    assert "authorization" not in {name.lower() for name in headers} and "hf_from" not in str(headers)
    assert {name.lower(): value for name, value in keyed.items()}["authorization"] == f"Bearer {KEY}"
    assert sampled["temperature"] == 0.5 and sampled["max_tokens"] == 9
    assert reasoned == {"model": "a-judge", "messages": QUESTION, "max_completion_tokens": 1024}


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "`base_url` and `api_key` are both missing"),
        ({"base_url": "", "api_key": ""}, "both missing"),
        ({"base_url": "localhost:8000"}, "`base_url` is no http"),
        ({"base_url": "http://me:secret@localhost/v1"}, "has a password"),
        ({"base_url": "http://localhost/v1?key=secret"}, "or a query"),
        ({"api_key": "secret\n"}, "`api_key` holds white space"),
        ({"api_key": "sécret"}, "`api_key` holds white space"),
        ({"api_key": "my secret"}, "`api_key` holds white space"),
        ({"api_key": "k", "temperature": -1}, "`temperature` is -1"),
        ({"api_key": "k", "max_tokens": 0}, "`max_tokens` is 0"),
        ({"api_key": "k", "timeout": 0}, "`timeout` is 0"),
        ({"api_key": "k", "max_retries": -1}, "`max_retries` is -1"),
        ({"api_key": "k", "model": " "}, "`model` is ' '"),
    ],
)
def test_unusable_settings(options, message, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ValueError, match=message) as caught:
        OpenAIJudge(**{"model": "a-judge", **options})
    assert "secret" not in str(caught.value) and "sécret" not in str(caught.value)


def test_a_key_alone_means_openai():
    assert OpenAIJudge("a-judge", api_key=KEY).settings["host"] == "api.openai.com"


@pytest.mark.parametrize(
    "faults, shortest",
    [
        ([Fault(429, "slow down", {"Retry-After": "7"})], [7]),
        ([Fault(429), Fault(500), Fault(503)], [0.5, 1, 2]),
        ([Fault(500, "<html>oops</html>"), Fault(502)], [0.5, 1]),
        ([HANG], [0.5]),
        ([CUT], [0.5]),
        ([DROP], [0.5]),
        ([Fault(408)], [0.5]),
        ([Fault(503, headers={"Retry-After": "soon"})], [0.5]),
    ],
)
def test_passing_faults(stub, faults, shortest):
    """Waits are between half of 1, 2, 4 seconds and the whole, or as long as the server says."""
    stub.script = [*faults, "9 8"]
    judge, waits = judge_of(stub, timeout=0.3 if HANG in faults else 10)
    assert judge.complete(QUESTION) == "9 8"
    assert len(stub.requests) == len(faults) + 1 and len(waits) == len(shortest)
    for wait, least in zip(waits, shortest):
        assert wait == least if least == 7 else least <= wait <= 2 * least


def test_retry_after_a_date(stub):
    stub.script = [Fault(429, headers={"Retry-After": formatdate(time.time() + 100, usegmt=True)}), "9 8"]
    judge, waits = judge_of(stub)
    judge.complete(QUESTION)
    assert 60 < waits[0] <= 100


def test_waits_double_up_to_a_minute(stub):
    stub.script = [Fault(500)] * 9
    judge, waits = judge_of(stub, max_retries=8)
    with pytest.raises(JudgeError, match="failed 9 times, HTTP 500") as caught:
        judge.complete(QUESTION)
    assert not caught.value.for_all and len(stub.requests) == 9
    for attempt, wait in enumerate(waits):
        longest = min(2**attempt, 60)
        assert longest / 2 <= wait <= longest


@pytest.mark.parametrize(
    "fault, message, for_all",
    [
        (Fault(400, "bad  request"), "refused, HTTP 400: bad request", False),
        (Fault(401, f"wrong key {KEY}"), r"refused, HTTP 401: wrong key \*\*\*", True),
        (Fault(403), "refused, HTTP 403", False),
        (Fault(404, "no such model"), "HTTP 404: no such model", True),
        (Fault(307, headers={"Location": "http://127.0.0.1:9/"}), "HTTP 307", False),
        (Fault(429, headers={"Retry-After": "86400"}), "asks to wait 86400 s", True),
        (Fault(200, "<html>Log in, please</html>"), "no chat completion: <html>Log in", False),
        (Fault(200, '{"error": "overloaded"}'), "no chat completion: .*overloaded", False),
        (Fault(200, '{"choices": []}'), "no chat completion", False),
        (Fault(200, '{"choices": [{"message": {"content": " "}}]}'), "without text", False),
        (
            Fault(200, '{"choices": [{"message": {"content": null}, "finish_reason": "length"}]}'),
            "without text .*length",
            False,
        ),
    ],
)
def test_lasting_faults_are_not_repeated(stub, fault, message, for_all):
    stub.script = [fault]
    judge, waits = judge_of(stub, api_key=KEY)
    with pytest.raises(JudgeError, match=message) as caught:
        judge.complete(QUESTION)
    assert len(stub.requests) == 1 and waits == [] and caught.value.for_all == for_all


def test_an_unreachable_server():
    with running_judge() as stub:
        judge, waits = judge_of(stub, max_retries=2)
    with pytest.raises(JudgeError, match="failed 3 times, ConnectError") as caught:
        judge.complete(QUESTION)
    assert caught.value.for_all and len(waits) == 2


def test_the_key_is_shown_nowhere(stub, records, answers, tmp_path, caplog):
    stub.script = [Fault(400, f"your key {KEY}"), Fault(500, KEY), Fault(200, f"<html>{KEY}")]
    judge, _ = judge_of(stub, api_key=KEY)
    lines = []
    with caplog.at_level(logging.DEBUG):
        judged = judge_answers(records, answers, judge, tmp_path / "run", report=lines.append, max_concurrent=1)
    assert statuses(judged).count("failed") == 2 and lines
    shown = [repr(judge), str(judge.settings), str(judged), caplog.text, *lines]
    shown += [file.read_text() for file in (tmp_path / "run").iterdir()]
    assert not any(KEY in text for text in shown) and "***" in str(judged)


def test_answers_are_matched_by_id(records, answers):
    assert list(match_answers(records, dict(reversed(answers.items())))) == [record["id"] for record in records]
    fewer = {item: text for item, text in answers.items() if item != "3"}
    with pytest.raises(ValueError, match=r"`answers` lacks questions: 1 \(3\)"):
        match_answers(records, fewer)
    more = answers | {str(number): "" for number in range(90, 97)}
    with pytest.raises(ValueError, match=r"unknown questions: 7 \(90, 91, 92, 93, 94, …\)"):
        match_answers(records, more)
    assert match_answers(records, fewer | {"99": "x"}, allow_partial=True) == fewer
    with pytest.raises(ValueError, match="none of the 10 questions"):
        match_answers(records, {"x": "y"}, allow_partial=True)


def test_judgments(stub, records, answers, tmp_path):
    """Scores belong to the reference and the model, whichever came first; an empty answer is judged, too."""
    answers["4"] = ""
    judged, count, _ = judged_by(stub, records, answers, tmp_path / "run", swap_positions=True)
    assert count == 20 and list(judged["judgments"]) == [record["id"] for record in records]
    assert any("[Assistant 2]\n\n\n[End" in body["messages"][1]["content"] for _, _, body in stub.requests)
    for record in records:
        plain, swapped = (
            stub.scores(render_messages(record, answers[record["id"]], swapped)) for swapped in (False, True)
        )
        assert [judgment["scores"] for judgment in judged["judgments"][record["id"]]] == [
            [*plain],
            [*reversed(swapped)],
        ]
    again, count, lines = judged_by(stub, records, answers, tmp_path / "run", swap_positions=True, max_concurrent=1)
    assert again == judged and count == 0 and lines == ["20 judgments are there, 0 to ask a-judge for"]


def test_what_a_judgment_depends_on(stub, records, answers, tmp_path):
    """Another answer, prompt, judge or sampling is asked for anew; all in one folder."""
    folder, records = tmp_path / "run", records[:1]
    answers = {"0": answers["0"]}
    assert judged_by(stub, records, answers, folder)[1] == 1
    assert judged_by(stub, records, {"0": "Other."}, folder)[1] == 1
    assert judged_by(stub, records, answers, folder, reference_repr=True)[1] == 1
    for number, options in enumerate(({"temperature": 1.0}, {"max_tokens": 5}, {"reasoning_model": True}), start=4):
        judge_answers(records, answers, judge_of(stub, **options)[0], folder, report=str)
        assert len(stub.requests) == number
    judge_answers(records, answers, OpenAIJudge("other", stub.url), folder, report=str)
    assert len(stub.requests) == 7
    assert judged_by(stub, records, answers, folder)[1] == 0
    # Both orders of an answer that is the reference itself are one request.
    assert judged_by(stub, records, {"0": records[0]["reference"]}, folder, swap_positions=True)[1] == 1


def test_one_reminder_for_a_reply_without_scores(stub, records, answers, tmp_path):
    stub.script = ["Both are nice.", "8 7", "Both are nice.", "Really nice."]
    judged, count, lines = judged_by(stub, records[:3], answers, tmp_path, allow_partial=True, max_concurrent=1)
    assert count == 5 and statuses(judged) == ["ok", "parse_error", "ok"]
    assert judged["judgments"]["0"][0]["scores"] == [8, 7] and judged["judgments"]["1"][0]["scores"] is None
    first, second = (stub.requests[number][2]["messages"] for number in (0, 1))
    assert second[:2] == first and second[2] == {"role": "assistant", "content": "Both are nice."}
    assert second[3]["role"] == "user" and len(second) == 4
    assert lines[-1].startswith("1 judgments are missing, the first because: two replies without")
    judged, count, _ = judged_by(stub, records[:3], answers, tmp_path, allow_partial=True)
    assert count == 1 and statuses(judged) == ["ok"] * 3


def test_one_failure_costs_one_question(stub, records, answers, tmp_path):
    whole, count, _ = judged_by(stub, records, answers, tmp_path / "whole")
    assert count == 10
    stub.script = [None, Fault(400, "too long"), CUT, Fault(200, "<html>"), "8", Fault(500)]
    judged, count, _ = judged_by(stub, records, answers, tmp_path / "run", max_concurrent=1)
    assert count == 11 and statuses(judged) == ["ok", *["failed"] * 4, *["ok"] * 5]
    assert "too long" in judged["judgments"]["1"][0]["reason"]
    summary = summarize(records, answers, judged)
    assert not summary["complete"] and summary["n_failed"] == 4 and summary["coverage"] == 0.6
    resumed, count, _ = judged_by(stub, records, answers, tmp_path / "run")
    assert count == 4 and resumed == whole


def test_a_wrong_key_is_tried_once(stub, records, answers, tmp_path):
    stub.script = [None, Fault(401, "who are you?")]
    judged, count, lines = judged_by(stub, records, answers, tmp_path / "run", max_concurrent=1)
    assert count == 2 and statuses(judged) == ["ok", *["failed"] * 9]
    assert "who are you?" in judged["judgments"]["1"][0]["reason"] and "who are you?" in lines[-1]
    assert "not asked" in judged["judgments"]["2"][0]["reason"]
    _, count, _ = judged_by(stub, records, answers, tmp_path / "run")
    assert count == 9


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_goes_on(stub, records, answers, tmp_path, error):
    whole, _, _ = judged_by(stub, records, answers, tmp_path / "whole")
    judge, _ = judge_of(stub)

    class Dying:
        settings = judge.settings
        left = 4

        def complete(self, messages):
            self.left -= 1
            if self.left < 0:
                raise error
            return judge.complete(messages)

    with pytest.raises(error):
        judge_answers(records, answers, Dying(), tmp_path / "run", max_concurrent=1, report=str)
    with (tmp_path / "run/judgments.jsonl").open("a") as file:
        file.write('{"key": "abc", "sta')  # as after a kill while it was being written
    resumed, count, _ = judged_by(stub, records, answers, tmp_path / "run")
    assert count == 6 and resumed == whole
    assert summarize(records, answers, resumed) == summarize(records, answers, whole)
    assert all(json.loads(line) for line in (tmp_path / "run/judgments.jsonl").open())


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT], ids=["killed", "Ctrl-C"])
def test_a_stopped_process_goes_on(stub, records, answers, tmp_path, sent):
    """A kill costs the two requests under way; Ctrl-C waits for them and costs nothing."""
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    code = (
        "import json, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # the background jobs of a shell ignore it
        "from lladamedv.evaluation.judge import OpenAIJudge\n"
        "from lladamedv.evaluation.judging import judge_answers\n"
        "from lladamedv.processing.datasets.chat_benchmark import load_chat_benchmark\n"
        "url, folder = sys.argv[1:]\n"
        "records, _ = load_chat_benchmark(folder + '/questions.jsonl')\n"
        "answers = json.load(open(folder + '/answers.json'))\n"
        "judge_answers(records, answers, OpenAIJudge('a-judge', url), folder + '/run', max_concurrent=2)\n"
    )
    stub.script = [*[None] * 6, HANG, HANG]
    command = [sys.executable, "-u", "-c", code, stub.url, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
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
    resumed, count, _ = judged_by(stub, records, answers, tmp_path / "run")
    assert count == (4 if sent == signal.SIGKILL else 2)
    assert resumed == judged_by(stub, records, answers, tmp_path / "whole")[0]


def test_bad_input_asks_nothing(stub, records, answers, tmp_path):
    with pytest.raises(ValueError, match="`max_concurrent` is 0"):
        judged_by(stub, records, answers, tmp_path / "run", max_concurrent=0)
    with pytest.raises(ValueError, match="lacks questions"):
        judged_by(stub, records, {"0": "x"}, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/judgments.jsonl").write_text('{"status": "ok"}\n')
    with pytest.raises(ValueError, match="no judgment at line 1"):
        judged_by(stub, records, answers, tmp_path / "run")
    assert stub.requests == []


def test_replies_of_earlier_runs_are_read_anew(stub, records, answers, tmp_path):
    """A judgment that was misread when it was paid for is corrected, and not paid for again."""
    judged_by(stub, records, answers, tmp_path)
    file = tmp_path / "judgments.jsonl"
    lines = [json.loads(line) | {"replies": ["1. 8\n2. 9"], "scores": [1, 8]} for line in file.open()]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    judged, requests, _ = judged_by(stub, records, answers, tmp_path)
    assert requests == 0
    assert all(judgment["scores"] == [8, 9] for (judgment,) in judged["judgments"].values())
