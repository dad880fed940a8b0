"""`lladamedv eval` and `lladamedv analyze`, as a user calls them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lladamedv.cli import app
from lladamedv.processing.phantoms import PhantomVQA
from tests.judge_stub import Fault, benchmark_row, running_judge, write_rows


ROOT = Path(__file__).parents[1]
SHORT = ["--max-new-tokens", "24", "--block-length", "8", "--steps", "24", "--option", "confidence_threshold=0.9"]
TIMES = ("seconds",)


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def predictions(folder):
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").open()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def test_one_and_two_processes_give_the_same(tmp_path):
    """Seven questions, which two processes cannot share evenly, in batches of which the last is not full."""
    words = ["eval", "vqa", "--benchmark", "phantoms", "--path", "9000:7", "--model", "demo", *SHORT]
    words += ["--batch-size", "2", "--bootstrap-samples", "50"]
    alone = call(*words, "--output", tmp_path / "alone", "--json")
    assert alone.exit_code == 0, alone.output
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [*launch, "-m", "lladamedv.cli", *words, "--output", str(tmp_path / "two")], env=environment, check=True,
        timeout=300,
    )  # fmt: skip
    first, second = predictions(tmp_path / "alone"), predictions(tmp_path / "two")
    for one, two in zip(first, second, strict=True):
        assert one.pop("confidence") == pytest.approx(two.pop("confidence"), abs=1e-5)
        assert one == two
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("alone", "two")]
    assert json.loads(alone.stdout) == summaries[0]
    assert summaries[0]["scores"] == summaries[1]["scores"]
    assert [summary["environment"]["processes"] for summary in summaries] == [1, 2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--benchmark", "vqa-med"], "`benchmark` is 'vqa-med'; allowed are"),
        (["--benchmark", "phantoms", "--split", "dev"], "`split` is 'dev'; allowed"),
        (["--benchmark", "slake", "--source", "x/y"], "`source` is 'x/y'; allowed"),
        (["--benchmark", "phantoms", "--option", "steps"], "`--option` is 'steps'; allowed is NAME=VALUE"),
        (["--benchmark", "phantoms", "--scoring", "x"], "`scoring` is 'x'; allowed are"),
        (["--benchmark", "phantoms", "--dtype", "float8"], "`dtype` is 'float8'; allowed are"),
        (["--benchmark", "phantoms", "--limit", "2", "--steps", "7"], "`steps` is 7"),
        (["--benchmark", "phantoms", "--limit", "2", "--option", "step=7"], "Unknown generation arguments ['step']"),
    ],
)
def test_bad_input_is_one_line(tmp_path, words, message):
    result = call("eval", "vqa", "--model", "demo", "--output", tmp_path / "run", *SHORT[:4], *words)
    assert result.exit_code == 1
    assert message in result.stderr and "Traceback" not in result.output
    assert not (tmp_path / "run" / "predictions.jsonl").exists()


@pytest.fixture
def chat_benchmark(tmp_path):
    """Six questions about two pictures, drawn."""
    images = tmp_path / "images"
    images.mkdir()
    for number, example in enumerate(PhantomVQA(3, 2, ["description"])):
        example.image.save(images / f"{number}_F1.jpg")
    rows = [benchmark_row(number, text="Describe the image.\n<image>") for number in range(6)]
    return write_rows(tmp_path / "qa50.jsonl", rows), images


def test_chat_with_a_judge(chat_benchmark, tmp_path, monkeypatch):
    """Answers, judged by a server that fails twice; a missing picture is a question that the report lacks."""
    questions, images = chat_benchmark
    words = ["eval", "chat", "--questions", questions, "--output", tmp_path / "run"]
    monkeypatch.setenv("MY_KEY", "secret-of-mine")
    with running_judge() as stub:
        judge = ["--judge-model", "judge", "--judge-url", stub.url, "--judge-key-env", "MY_KEY"]
        judge += ["--max-concurrent", "1"]
        stub.script = [Fault(500), "no numbers", "nor here"]
        asked = ["--model", "demo", "--image-folder", images, *SHORT]
        result = call(*words, *asked, *judge)
        assert result.exit_code == 3, result.output
        assert "5 of 6 questions are judged" in (tmp_path / "run" / "summary.md").read_text()
        result = call(*words, *asked, *judge, "--json")
        assert result.exit_code == 0, result.output
        assert all(headers["Authorization"] == "Bearer secret-of-mine" for _, headers, _ in stub.requests)
        assert len(stub.requests) == 1 + 2 + 5 + 1  # repeated, asked for numbers again, the others, the lost one
    summary = json.loads(result.stdout)
    assert summary["complete"] and summary["n_judged"] == 6
    answers = predictions(tmp_path / "run")
    assert all(answer["prediction"].startswith("The") for answer in answers)
    for file in (tmp_path / "run").rglob("*"):
        assert not file.is_file() or b"secret-of-mine" not in file.read_bytes()
    assert "secret-of-mine" not in result.output

    (images / "1_F1.jpg").unlink()
    with running_judge() as stub:
        words[-1] = tmp_path / "less"
        result = call(*words, *asked, "--judge-model", "judge", "--judge-url", stub.url)
        assert result.exit_code == 3 and len(stub.requests) == 5
    assert "1 missing images: 5 (1_F1.jpg)" in " ".join(result.stderr.split())
    assert json.loads((tmp_path / "less" / "summary.json").read_text())["coverage"] == pytest.approx(5 / 6)


def test_chat_with_published_answers(chat_benchmark, tmp_path):
    questions, _ = chat_benchmark
    rows = [{"question_id": number, "answer": f"Answer {number}."} for number in range(6)]
    answers = write_rows(tmp_path / "answers.jsonl", rows)
    words = ["eval", "chat", "--questions", questions, "--output", tmp_path / "run", "--answers", answers]
    with running_judge() as stub:
        judge = ["--judge-model", "judge", "--judge-url", stub.url]
        assert call(*words, *judge).exit_code == 0
        write_rows(answers, rows[:5])
        result = call(*words, *judge)
        assert result.exit_code == 1 and "`answers` lacks questions: 1 (5)" in result.stderr
        assert call(*words, *judge, "--allow-partial").exit_code == 3
        assert len(stub.requests) == 6  # the five are known
    for more, message in (
        ([], "give --judge-model to have them judged"),
        (["--model", "demo"], "exactly one of the two is needed"),
        (["--judge-model", "judge"], "`base_url` and `api_key` are both missing"),
        (["--judge-model", "judge", "--judge-key-env", "NOT_THERE"], "no such environment variable"),
    ):
        assert message in call(*words, *more).output


def test_analysis_of_decoding(tmp_path):
    words = ["analyze", "decoding", "--model", "demo", "--output", tmp_path / "run", "--path", "9000:3"]
    words += ["--max-new-tokens", 24, "--block-length", 8, "--steps", 24, "--steps", 3, "--steps", 5]
    words += ["--bootstrap-samples", 0, "--json"]
    result = call(*words)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert [(row["max_new_tokens"], row["steps"]) for row in summary["combinations"]] == [(24, 24), (24, 3)]
    assert [row["steps"] for row in summary["not_allowed"]] == [5]
    assert "L24-B8-Z5" in result.stderr
