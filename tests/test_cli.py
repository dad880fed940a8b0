"""What all commands have in common: how errors end, help, JSON, and completion."""

import json
import os
import subprocess
import sys

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import lladamedv
from lladamedv import demo
from lladamedv.cli import app
from lladamedv.cli_common import DEBUG
from lladamedv.hub_cards import push as hub
from tests.hub_folders import write_model


@pytest.fixture(autouse=True)
def no_debug(monkeypatch):
    """Neither from outside, nor kept from a call with --debug."""
    monkeypatch.setenv(DEBUG, "")


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def commands(command, path=()):
    """All commands by their paths, those of groups, too."""
    below = (commands(each, (*path, name)) for name, each in getattr(command, "commands", {}).items())
    return {path: command} | {path: found for part in below for path, found in part.items()}


COMMANDS = commands(get_command(app))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_has_examples_of_the_command_itself(path):
    result = call(*path, "--help")
    assert result.exit_code == 0
    assert f"lladamedv {' '.join(path)}" in result.output.partition("Example")[2]


def test_wrong_usage_is_exit_code_2():
    for words in (["nonsense"], ["ask"], ["demo", "--questions", "many"]):
        assert call(*words).exit_code == 2


def test_version():
    assert call("--version").stdout == f"lladamedv {lladamedv.__version__}\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("`seed` is 3;\nallowed are others."), "lladamedv: `seed` is 3; allowed are others."),
        (ImportError("Install it."), "lladamedv: Install it."),
        (KeyError("key"), "lladamedv: KeyError: 'key' (--debug shows where)"),
        (AssertionError(), "lladamedv: AssertionError (--debug shows where)"),
        (FileNotFoundError(2, "No such file", "x"), "lladamedv: FileNotFoundError: [Errno 2] No such file"),
    ],
)
def test_errors_are_one_line_without_a_traceback(error, line, monkeypatch):
    def fails(*args, **options):
        raise error

    monkeypatch.setattr(demo, "run_demo", fails)
    result = call("demo")
    assert result.exit_code == 1 and not result.stdout
    assert result.stderr.startswith(line) and result.stderr.count("\n") == 1

    result = call("--debug", "demo")
    assert result.exit_code == 1 and result.exception is error
    monkeypatch.setenv(DEBUG, "1")
    assert call("demo").exception is error


def test_ctrl_c(monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupted)
    result = call("demo")
    assert result.exit_code == 130 and not result.output.strip()


def test_json_of_the_demo(tmp_path):
    sheet = tmp_path / "sheet.png"
    result = call("demo", "--questions", 12, "--output", sheet, "--json")
    assert result.exit_code == 0, result.output
    given = json.loads(result.stdout)
    assert given["output"] == str(sheet) and sheet.is_file()
    assert given["scores"]["looking at the picture"]["questions"] == 12
    assert "closed accuracy" in result.stderr
    assert f"{given['scores']['looking at the picture']['open']:.1%}" in result.stderr


def test_json_of_a_push(tmp_path):
    folder = write_model(tmp_path / "model")
    result = call("push", folder, "me/model", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    given = json.loads(result.stdout)
    assert (given["repo"], given["kind"], given["private"], given["url"]) == ("me/model", "model", True, None)
    assert given["files"] == hub.push_folder(folder, "me/model", dry_run=True, report=str).files
    assert "nothing was sent" in result.stderr


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], ["ask", "--help"], ["eval", "vqa", "--help"]])
def test_help_does_not_wait_for_torch(words):
    program = (
        f"import sys, atexit; sys.argv = {['lladamedv', *words]}\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "from lladamedv.cli import app; app()"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout and result.returncode == (0 if words else 2)
    assert result.stderr.strip() == "False"


@pytest.mark.parametrize(
    ("words", "expected"),
    [("lladamedv pu", ["push", "push-dataset"]), ("lladamedv train demo_l", ["demo_lora"])],
)
def test_completion_does_not_wait_for_torch(words, expected):
    environment = {
        **os.environ,
        "_LLADAMEDV_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    program = (
        "import sys, atexit; sys.argv[0] = 'lladamedv'\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "from lladamedv.cli import app; app(prog_name='lladamedv')"
    )
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout.split() == expected
    assert result.stderr.strip() == "False"
