"""A judge: its prompt, its replies, and a client that meets every fault over real HTTP and shows no secret."""

import logging
import sys

import pytest

from lladamedv.evaluation.judge import JudgeError, OpenAIJudge, ask, parse_scores, render_messages
from lladamedv.processing.datasets.chat_benchmark import load_chat_benchmark
from tests.judge_stub import CUT, DROP, HANG, Fault, benchmark_row, running_judge, write_rows


KEY = "sk-secret-0123456789"
QUESTION = [{"role": "user", "content": "Which is better?"}]
AT_ONCE = {"retry-after-ms": "1"}


@pytest.fixture
def stub():
    with running_judge() as stub:
        yield stub


def judge_of(stub, **options):
    return OpenAIJudge("a-judge", stub.url, **options)


SCORES = {
    (8, 7): [
        "8 7\nexp", "8, 7", "**8 7**", "8/10 7/10", "Scores: 8 and 7", "8 7 because the second is vague",
        "Assistant 1: 8\nAssistant 2: 7", "Assistant 2: 7, Assistant 1: 8",
        "Assistant 1: 8\nAssistant 2: 7\nAssistant 1: 3 mistakes",
    ],
    (8, 9): [
        "1. 8\n2. 9", "1) 8/10\n2) 9/10\nThe second is longer.", "1: 8, 2: 9", "1 - 8\n2 - 9", "8\n9", "8 vs 9",
        "8/10 and 9/10", "8 out of 10 and 9 out of 10", "| 8 | 9 |", "```\n8 9\n```",
        "<think>Perhaps 5 6.</think>\n8 9", "Perhaps 5 6.</think>\n8 9", "\uff18 \uff19",
        "Assistant 1 gets a score of 8 and Assistant 2 gets 9.", "Score of Assistant 1: 8\nScore of Assistant 2: 9",
        "| Assistant 1 | 8 |\n| Assistant 2 | 9 |", "8 9\nAssistant 1: 8\nAssistant 2: 9", "[8, 9]",
        '```json\n{"assistant_1": 8, "assistant_2": "9/10"}\n```',
        '{"scores": {"Assistant 1": 8, "Assistant 2": 9}, "winner": 2}',
        '{"assistant_1": {"score": 8}, "assistant_2": {"score": 9}}',
    ],
    (8.5, 9): ["\n 8.5 9\n"],
    (10, 1): ["10 1"],
    (9, 6.5): ["Here they are:\n**Assistant 1:** 9/10\n**Assistant 2:** 6.5/10"],
    (1.8, 2.9): ["1.8 2.9"],
    (8.5, 6): ["Assistant 1: 8.5/10, but assistant 2: 6/10"],
    None: [
        "N/A", "", "0 5", "11 3", "3 11", "3 0.5", "8 7 6", "80/100 70/100", "-8 7", "8", "8/9", "1. 8", "1 8\n2 9",
        "8\n9\n7", "<think>8 9", "8 9 errors", "8 > 9", "8,5", "8,5\n7,5", "7-8 9", "4/5 3/5", "8 9\n7 6",
        "Assistant 1: 8", "Assistant 15 or Assistant 2: 7", "I compared 2 answers by 4 criteria.\n8 7",
        "Assistant 1: 8.5/10, but assistant 2: 2 errors, so 6/10",
        "Assistant 1: 8\nAssistant 2: 9\nOn reflection, Assistant 1: 7", "Assistant 1: 8,5\nAssistant 2: 7",
        "Assistant 1: 7-8\nAssistant 2: 9", "Assistant 1: 7 - 8\nAssistant 2: 9",
        "Assistant 1: 7\u20138\nAssistant 2: 9", "Assistant 1: 10 - 2 = 8, Assistant 2: 9",
        "1 2\nAssistant 1: 8\nAssistant 2: 9", "Assistant 1 of 2: 8, Assistant 2 of 2: 9",
        "8 for Assistant 1 and 9 for Assistant 2", '{"assistant_1_errors": 2, "assistant_2_errors": 3}',
        '{"assistant_1": true, "assistant_2": 9}', "[8, 9, 7]",
    ],
}  # fmt: skip


@pytest.mark.parametrize("text, scores", [(text, scores) for scores, texts in SCORES.items() for text in texts])
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
    assert "one overall score from 1 to 10" in instruction
    swapped = render_messages(record, "An answer.", swapped=True)[1]["content"]
    assert "[Assistant 1]\nAn answer.\n" in swapped and "[Assistant 2]\nSign 0 means" in swapped
    assert "Figure Context" not in render_messages(bare, "")[1]["content"]
    as_published = [render_messages(each, "", reference_repr=True)[1]["content"] for each in (record, bare)]
    assert f"Figure Context:\n\t- {mentions}\n\n[Question]" in as_published[0]
    assert "Figure Context:\n\t- None\n\n[Question]" in as_published[1]


def test_what_is_sent(stub, monkeypatch, tmp_path):
    """Without a key no authorisation is sent, whatever the environment holds; with one it is that one."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password from_the_environment\n")
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, "from_the_environment")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: from_the_environment")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    stub.script = ["8 7"] * 3
    assert judge_of(stub).complete(QUESTION) == "8 7"
    judge_of(stub, api_key=KEY, temperature=0.5, max_tokens=9).complete(QUESTION)
    judge_of(stub, reasoning_model=True).complete(QUESTION)
    (path, headers, body), (_, keyed, sampled), (_, _, reasoned) = stub.requests
    assert path == "/v1/chat/completions"
    assert body == {"model": "a-judge", "messages": QUESTION, "temperature": 0.0, "max_tokens": 1024}
    assert "Authorization" not in headers and "from_the" not in f"{headers}{keyed}"
    assert keyed["Authorization"] == f"Bearer {KEY}"
    assert sampled["temperature"] == 0.5 and sampled["max_tokens"] == 9
    assert reasoned == {"model": "a-judge", "messages": QUESTION, "max_completion_tokens": 1024}
    assert OpenAIJudge("a-judge", api_key=KEY).settings["host"] == "api.openai.com"


@pytest.mark.parametrize(
    "options, message",
    [({}, "`base_url` and `api_key` are both missing"), ({"base_url": "", "api_key": ""}, "both missing"),
     ({"base_url": "localhost:8000"}, "`base_url` is no http"), ({"base_url": "http://a:secret"}, "`base_url` is no"),
     ({"base_url": "http://me:secret@a/v1"}, "has a password"), ({"base_url": "http://a?key=secret"}, "or a query"),
     *(({"api_key": key}, "`api_key` holds white space") for key in ("secret\n", "sécret", "my secret")),
     *(({"api_key": "k", name: value}, f"`{name}` is {value!r}") for name, value in {
         "temperature": -1, "max_tokens": 0, "timeout": 0, "max_retries": -1, "model": " "}.items())],
)  # fmt: skip
def test_unusable_settings(options, message, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ValueError, match=message) as caught:
        OpenAIJudge(**{"model": "a-judge", **options})
    assert "secret" not in str(caught.value) and "sécret" not in str(caught.value)


def test_without_openai_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r'pip install "lladamedv\[judge\]"'):
        OpenAIJudge("a-judge", api_key=KEY)


@pytest.mark.parametrize("faults", [[Fault(429, headers=AT_ONCE), Fault(503, headers=AT_ONCE)], [HANG], [CUT], [DROP]])
def test_passing_faults_are_repeated(stub, faults):
    stub.script = [*faults, "9 8"]
    assert judge_of(stub, timeout=0.5 if HANG in faults else 10).complete(QUESTION) == "9 8"
    assert len(stub.requests) == len(faults) + 1
    stub.script = [Fault(500, headers=AT_ONCE)] * 9
    with pytest.raises(JudgeError, match="HTTP 500") as caught:
        judge_of(stub, max_retries=2).complete(QUESTION)
    assert not caught.value.for_all and len(stub.requests) == len(faults) + 4


@pytest.mark.parametrize(
    "fault, message, for_all",
    [
        (Fault(400, "bad  request"), "answered HTTP 400: bad request", False),
        (Fault(401, f"wrong key {KEY}"), r"HTTP 401: wrong key \*\*\*", True),
        (Fault(403), "HTTP 403", False),
        (Fault(404, "no such model"), "HTTP 404: no such model", True),
        (Fault(307, headers={"Location": "http://127.0.0.1:9/"}), "HTTP 307", False),
        (Fault(429, headers={"Retry-After": "86400"}), "HTTP 429, Retry-After 86400", True),
        (Fault(200, "<html>Log in, please</html>"), "no chat completion", False),
        (Fault(200, "<html>Log in</html>", {"Content-Type": "text/html"}), "no chat completion: <html>Log in", False),
        (Fault(200, '{"error": "overloaded"}'), "no chat completion: .*overloaded", False),
        (Fault(200, '{"choices": []}'), "no chat completion", False),
        (Fault(200, "[1]"), "no chat completion", False),
        (Fault(200, '{"choices": [{"message": {"content": " "}}]}'), "without text", False),
        (Fault(200, '{"choices": [{"message": {"content": null}, "finish_reason": 1}]}'), "without text .*1", False),
    ],
)
def test_lasting_faults_are_not_repeated(stub, fault, message, for_all):
    stub.script = [fault]
    with pytest.raises(JudgeError, match=message) as caught:
        judge_of(stub, api_key=KEY).complete(QUESTION)
    assert len(stub.requests) == 1 and caught.value.for_all == for_all


def test_an_unreachable_server():
    with running_judge() as stub:
        judge = judge_of(stub, max_retries=0)
    with pytest.raises(JudgeError, match="failed, ConnectError") as caught:
        judge.complete(QUESTION)
    assert caught.value.for_all


def test_the_key_is_shown_nowhere(stub, caplog):
    stub.script = [Fault(400, f"your key {KEY}"), Fault(500, KEY), Fault(200, f"<html>{KEY}"), Fault(200, f'"{KEY}"')]
    judge = judge_of(stub, api_key=KEY, max_retries=0)
    with caplog.at_level(logging.DEBUG):
        errors = [str(ask(judge, QUESTION)[2]) for _ in range(len(stub.script))]
    assert "***" in errors[0] and "***" in errors[1]
    assert not any(KEY in text for text in (repr(judge), str(judge.settings), caplog.text, *errors))


def test_one_reminder_for_a_reply_without_scores(stub):
    stub.script = ["Both are nice.", "8 7", "Both are nice.", "Really nice."]
    judge = judge_of(stub)
    assert ask(judge, QUESTION) == ((8, 7), ["Both are nice.", "8 7"], None)
    assert ask(judge, QUESTION) == (None, ["Both are nice.", "Really nice."], None)
    question, answer, reminder = stub.requests[1][2]["messages"]
    assert [question] == QUESTION and answer == {"role": "assistant", "content": "Both are nice."}
    assert reminder["role"] == "user" and "two numbers from 1 to 10" in reminder["content"]
