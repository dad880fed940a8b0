"""SIGKILL at random moments: what is left is the old state or a whole new one, and the next call completes it.

`LLADAMEDV_KILLS` is how often each task is killed (50). The result after kills is compared with that of a run without
any, bit by bit where the task computes.
"""

import json
import shutil

import pytest

from lladamedv import LLaDAMedVForConditionalGeneration
from tests import released
from tests.hub_folders import contents, write_model
from tests.hub_stub import running_hub
from tests.judge_stub import benchmark_row, running_judge, write_rows
from tests.kills import harness, tasks
from tests.tiny import tiny_tokenizer


pytestmark = pytest.mark.slow


@pytest.fixture
def killed(tmp_path):
    """Kills a task; by default the result is all files of a folder, and clearing removes the folder."""
    folder = tmp_path / "made"

    def kill(task, *arguments, result=lambda: contents(folder), check=lambda expected: None, clear=None):
        return harness.kill_at_random(
            task, arguments, tmp_path / "log", result=result, check=check,
            clear=clear or (lambda: shutil.rmtree(folder, ignore_errors=True)),
        )  # fmt: skip

    return folder, kill


def test_convert(killed, tmp_path):
    folder, kill = killed
    source = released.write_llava(tmp_path / "SLAKE_10E", num_shards=3)
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")

    def check(expected):
        assert not folder.exists() or contents(folder) == expected

    kill(tasks.convert, source, folder, tmp_path / "tokenizer", check=check)
    assert LLaDAMedVForConditionalGeneration.from_pretrained(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["SLAKE_10E", "log", "made", "tokenizer"]


def test_train(killed):
    folder, kill = killed

    def result():
        weights = (folder / "model.safetensors").read_bytes()
        return weights, json.loads((folder / "losses.json").read_text())

    kill(tasks.train, folder, result=result)
    assert len(result()[1]) == 10


def test_evaluate(killed):
    folder, kill = killed

    def result():
        records = [json.loads(line) for line in (folder / "predictions.jsonl").open()]
        assert len({record["id"] for record in records}) == len(records) == 24
        return [{name: value for name, value in record.items() if name != "seconds"} for record in records]

    kill(tasks.evaluate, folder, result=result)


def test_judge(killed, tmp_path):
    folder, kill = killed
    questions = write_rows(tmp_path / "questions.jsonl", map(benchmark_row, range(60)))

    def result():
        lines = [json.loads(line) for line in (folder / "judgments.jsonl").open()]
        assert len(lines) == 60
        return sorted(json.dumps(line, sort_keys=True) for line in lines)

    with running_judge() as stub:
        line = kill(tasks.judge, stub.url, questions, folder, result=result)
        ends = int(line.split(" came")[0].split()[-1]) + 1  # and the first, which was not killed
        assert 60 * ends <= len(stub.requests) <= 60 * ends + 2 * harness.KILLS + 60 * ends // 2, line


def test_push(killed, tmp_path):
    _, kill = killed
    folder = write_model(tmp_path / "model", max_shard_size="500KB")
    before = contents(folder)
    with running_hub() as hub:

        def clear():
            for kept in (hub.repos, hub.private, hub.objects, hub.snapshots, hub.uploads):
                kept.clear()

        def check(expected):
            assert hub.repos.get("me/model") in (None, {}, before)
            assert len(hub.uploads) == len(set(hub.uploads))  # nothing that had arrived is sent again

        def result():
            return hub.repos["me/model"]

        kill(tasks.push, hub.url, tmp_path / "home", folder, clear=clear, result=result, check=check)
        assert result() == before == contents(folder)
