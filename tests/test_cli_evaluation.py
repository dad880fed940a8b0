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


def test_image_controls(tmp_path):
    words = ["eval", "vqa", "--benchmark", "phantoms", "--path", "9000:3", "--model", "demo", *SHORT]
    result = call(*words, "--output", tmp_path, "--image-controls")
    assert result.exit_code == 0 and "the score" in result.stdout.split("\n\n")[1].lower(), result.output
    assert all(row["image_reliance"] > -1 and {"noise"} < {*row["controls"]} for row in predictions(tmp_path))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--benchmark", "vqa-med"], 2, "'--benchmark': 'vqa-med'; allowed are vqa-rad, slake, path-vqa, phantoms"),
        (["--benchmark", "phantoms", "--split", "dev"], 2, "--split: 'dev'; allowed are train, validation, test"),
        (["--benchmark", "slake", "--source", "x/y"], 1, "--source is 'x/y'; allowed"),
        (["--benchmark", "slake", "--path", "none.json"], 2, "--path: 'none.json'; there is no such file or folder"),
        (["--benchmark", "phantoms", "--option", "steps"], 2, "'--option': 'steps'; allowed is NAME=VALUE"),
        (["--benchmark", "phantoms", "--option", "step=7"], 2, "did you mean steps"),
        (["--benchmark", "phantoms", "--scoring", "x"], 2, "'--scoring': 'x'; allowed are generate, likelihood"),
        (["--benchmark", "phantoms", "--dtype", "float8"], 2, "'--dtype'"),
        (["--benchmark", "phantoms", "--limit", "2", "--steps", "7"], 2, "--steps is 7"),
        (["--benchmark", "phantoms", "--steps", "0"], 2, "--steps is 0"),
        (["--benchmark", "phantoms", "--output", __file__], 2, "'--output'"),
        (["--benchmark", "phantoms", "--data", "."], 2, "--benchmark, --data: both given; exactly one is needed"),
        ([], 2, "--benchmark, --data: none given; exactly one is needed"),
        (["--data", "none.csv"], 2, "'--data': 'none.csv'; there is no such file or folder"),
        (["--benchmark", "phantoms", "--limit", "1", "--image-controls"], 1, "1 picture; --image-controls need two"),
        (["--data", ".", "--revision", "x"], 2, "--revision: 'x'; it goes with --benchmark"),
        (["--data", ".", "--image-folder", "none"], 2, "'--image-folder': 'none'; there is no such file or folder"),
    ],
)
def test_bad_input_is_one_line(tmp_path, words, code, message):
    output = [] if "--output" in words else ["--output", tmp_path / "run"]
    result = call("eval", "vqa", "--model", "demo", *output, *SHORT[:6], *words)
    assert result.exit_code == code, result.output
    assert message in result.stderr and "Traceback" not in result.output
    assert not (tmp_path / "run" / "predictions.jsonl").exists()


def test_own_data(tmp_path):
    """A table with pictures beside it, one of which is not there; then the same questions for the analysis."""
    for number, example in enumerate(PhantomVQA(9000, 2)):
        example.image.save(tmp_path / f"{number}.png")
    table = tmp_path / "own.csv"
    table.write_text("Image,Question,Label\n0.png,Is there a lesion?,yes\n1.png,Which?,left\n2.png,Which?,left\n")
    words = ["--model", "demo", "--data", table, *SHORT, "--device", "cpu", "--bootstrap-samples", "0"]
    result = call("eval", "vqa", *words, "--output", tmp_path / "run", "--json")
    assert result.exit_code == 3, result.output
    summary = json.loads(result.stdout)
    assert summary["benchmark"] == "own-data" and summary["left_out"] == ["own-data/all/2"]
    assert (summary["scores"]["num_closed"], summary["scores"]["num_open"]) == (1, 1)
    text = (tmp_path / "run" / "summary.md").read_text()
    assert "**INCOMPLETE: 1 of 3 records" in text and "answer from 'Label'" in text
    assert "licence" not in text and "table 2" not in text and "train" not in text
    result = call("analyze", "decoding", *words, "--output", tmp_path / "decoding", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["num_questions"] == 2 and "1 missing images" in result.stderr
    (tmp_path / "0.png").unlink(), (tmp_path / "1.png").unlink()
    result = call("eval", "vqa", "--model", "demo", "--data", table, "--output", tmp_path / "none")
    assert result.exit_code == 1 and "3 missing images: own-data/all/0 (0.png)" in result.stderr
    assert "--image-folder says where images are" in result.stderr


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
        assert result.exit_code == 1 and "--answers lacks questions: 1 (5)" in result.stderr
        assert call(*words, *judge, "--allow-partial").exit_code == 3
        assert len(stub.requests) == 6  # the five are known
    for more, message in (
        ([], "give --judge-model to have them judged"),
        (["--model", "demo"], "--model, --answers: both given; exactly one is needed"),
        (["--judge-model", "judge"], "--judge-model: needs --judge-url or --judge-key-env"),
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
