"""What all commands have in common: how errors end, help, JSON, and completion."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from importlib import metadata

import pytest
from huggingface_hub import scan_cache_dir
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

import lladamedv
from lladamedv import demo, loading
from lladamedv.cli import app
from lladamedv.cli_common import DEBUG
from lladamedv.conversation import DEMO_NOTICE
from lladamedv.hub_cards import push as hub
from tests.faces import free_port, medical_files
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


def test_version():
    assert call("--version").stdout == f"lladamedv {lladamedv.__version__}\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("`questions` is 3;\nallowed are others."), "lladamedv: --questions is 3; allowed are others."),
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


@pytest.mark.parametrize(
    ("command", "library", "line"),
    [
        ("app", "gradio", 'The app needs Gradio: pip install "lladamedv[app]".'),
        ("serve", "fastapi", 'The server needs libraries of its own: pip install "lladamedv[serve]".'),
    ],
)
def test_a_missing_extra_is_named_before_a_model_is_loaded(monkeypatch, command, library, line):
    monkeypatch.setattr(loading, "load_model", None)
    monkeypatch.delitem(sys.modules, "lladamedv.serving", raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    result = call(command, "--port", free_port())
    assert result.exit_code == 1 and result.stderr == f"lladamedv: {line}\n"


def test_json_of_a_push(tmp_path):
    folder = write_model(tmp_path / "model")
    result = call("push", folder, "me/model", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    given = json.loads(result.stdout)
    assert (given["repo"], given["kind"], given["private"], given["url"]) == ("me/model", "model", True, None)
    assert given["files"] == hub.push_folder(folder, "me/model", dry_run=True, report=str).files
    assert "nothing was sent" in result.stderr


def light(*words, **environment):
    """The result of the command in a process of its own, which must not import PyTorch."""
    program = (
        f"import sys, atexit; sys.argv = {['lladamedv', *words]}\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "from lladamedv.cli import app; app(prog_name='lladamedv')"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert result.stderr.strip() == "False"
    return result


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], ["ask", "--help"], ["eval", "vqa", "--help"]])
def test_help_does_not_wait_for_torch(words):
    result = light(*words)
    assert result.stdout and result.returncode == (0 if words else 2)


# What the documentation of 0.1.0 shows, as far as today's may not.
COMMAND_LINES = """
analyze decoding --model demo --output o --path 9000:60:description --steps 24 --steps 6 --full-canvas --noise-pictures
ask picture.png "Describe the image." --option steps=8 --json
ask scan.dcm "Is there a fracture?" --model path/or/hub-id --window bone --json
ask volume.nii.gz "What is shown?" --axis coronal --slice 6 --time 0 --window 40/80
chat scan.dcm --window bone --model path/or/hub-id --option confidence_threshold=0.9
convert LLaDAMedV-2A4E converted --dtype bfloat16 --preset llada-medv --push ME/REPO
eval chat --questions qa50.jsonl --image-folder images --model hub/id --output o --judge-model NAME --judge-url URL
eval vqa --benchmark phantoms --path 9000:9:new --model demo --output o --max-new-tokens 24 --block-length 8 --steps 9
push ADAPTERS OWNER/NAME --base-model OWNER/MODEL --merge
push OUT OWNER/NAME --public --branch BRANCH --replace --leave-out 'checkpoint-*' --dry-run
train lora_one_gpu --model_name_or_path FOLDER --train_data DATA.csv --eval_split 0.1 --output_dir OUT
"""


@pytest.mark.parametrize("line", COMMAND_LINES.strip().splitlines())
def test_documented_command_lines_are_understood(line):
    words, command = shlex.split(line), get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    for parameter in command.params:  # the files and folders are not there
        parameter.callback = None
    command.make_context(command.name, words)


# Bad calls, and what is said about them: in the names of the command line, before anything is imported.
BAD_CALLS = {
    "ask missing.png What?": "'missing.png' is a path that cannot be opened (there is no such file)",
    "ask 'Is there a lesion?' {picture}": "IMAGE: 'Is there a lesion?' is no file, but QUESTION '{picture}' is one",
    "ask {folder} What?": "IMAGE: '{folder}' is a folder; it goes with --output",
    "ask {folder} What? --output /no/x.csv": "'--output': The file '/no/x.csv' cannot be written: there is no folder",
    "ask {folder} --output {folder}/x.csv": "QUESTION: missing; only a table may have the questions in it",
    "ask {picture} What? Why?": "QUESTION: 2 given; several go with --output",
    "ask {picture} ' '": "QUESTION: it is empty",
    "ask {picture}": "QUESTION: missing",
    "ask {picture} What? --window long": "--window is 'long'; allowed are lung,",
    "ask {picture} What? --window 40/400 --full-range": "--window and --full-range are both given",
    "ask {picture} What? --slice 3": "--slice is given, but '{picture}' is a picture file",
    "ask {picture} What? --frame x": "'--frame': ",
    "ask {picture} What? --frame 2": "--frame is given, but '{picture}' is a picture file; allowed for it are --page",
    "ask {folder}/burned.dcm What?": "'{folder}/burned.dcm' says that text is burned into its pixels",
    "ask {folder}/burned.dcm What? --slice 0": "--slice is given, but '{folder}/burned.dcm' is a DICOM file",
    "ask {folder}/series.nii What?": "--time is not given, but there are 3 volumes; allowed are 0 to 2.",
    "ask {folder}/series.nii What? --time 3": "--time is 3; allowed are whole numbers from 0 to 2.",
    "ask {folder}/pages.tif What?": "--page is not given, but there are 2 pages",
    "eval vqa --benchmark phantoms --model demo --output o --limit 0": "0",
    "ask {picture} What? --steps many": "--steps is many; allowed is int",
    "ask {picture} What? --steps 8 --option steps=9": "'--option': steps is given twice",
    "ask {picture} What? --confidence-threshold 2": "--confidence-threshold is 2; allowed are numbers in (0, 1]",
    "ask {picture} What? --factor 1 --entropy-bound 1": "--factor is 1 and --entropy-bound is 1; each is a rule",
    "ask {picture} What? --option steps": "'--option': 'steps'; allowed is NAME=VALUE",
    "ask {picture} What? --option stepps=3": "'--option': 'stepps' is no option of generate; did you mean steps?",
    "ask {picture} What? --dtype int8": "'--dtype': 'int8'; allowed are auto, float32, bfloat16, float16",
    "ask {picture} What? --device gpu": "'--device': 'gpu'; allowed are auto, cpu, cuda",
    "ask {picture} What? --model {folder}": "'--model': '{folder}' is a folder with neither config.json",
    "ask {picture} What? --model /no/such": "'--model': '/no/such' is no folder; allowed are a folder and a Hub id",
    "ask {picture} What? --explain x.gif": "'--explain': The file 'x.gif' cannot be written: its name must end in",
    "ask {picture} What? --explain /no/x.png": "The file '/no/x.png' cannot be written: there is no folder '/no'",
    "ask {picture} What? --option steps=8 --option steps=9": "'--option': steps is given twice",
    "ask {picture} What? --option output_history=true": "'output_history' changes nothing that a command shows",
    "ask {picture} What? --option steps=7": "--steps is 7, which is no multiple of the number of blocks (3 = --max",
    "ask {picture} What? --option num_beams=4": "num_beams is 4, which masked diffusion does not have",
    "ask {picture} What? --option streamer=x": "Unknown generation arguments ['streamer']",
    "chat --option temperature=-1": "temperature is -1",
    "eval vqa --benchmark phantoms --model demo --output o --steps 7 --block-length 16": "--steps is 7, which is no",
    "eval chat --questions {picture} --model demo --image-folder {folder} --output o --block-length 7": (
        "--block-length is 7, which does not divide --max-new-tokens (256)"
    ),
    "analyze decoding --model demo --output o --option temperature=-1": "temperature is -1",
    "chat missing.png": "'missing.png' is a path that cannot be opened",
    "chat {picture} --window long": "--window is 'long'",
    "demo --questions 2": "'--questions'",
    "demo --train": "'--train': removed; use: lladamedv train demo_full",
    "demo --output x.gif": "'--output': The file 'x.gif' cannot be written: its name must end in .png",
    "serve --model {folder}": "'--model': '{folder}' is a folder with neither",
    "serve --host ''": "'--host': it is empty",
    "serve --port {port}": "--port is {port}, which cannot be listened on at 127.0.0.1: ",
    "app --port {port}": "--port is {port}, which cannot be listened on at 127.0.0.1: ",
    "app --host ::1": "--host is '::1'; allowed are names and IPv4 addresses",
    "app --host 203.0.113.1": "--port is 7860, which cannot be listened on at 203.0.113.1: ",
    "app --host foo.invalid": "--host is 'foo.invalid', which cannot be listened on",
    "app --device gpu": "'--device': 'gpu'",
    "convert nowhere {folder}/new": "SOURCE': 'nowhere' is no folder; allowed are a folder and a Hub id",
    "convert a/b {picture}": "OUT': The folder '{picture}' cannot be used",
    "convert a/b {parent}": "OUT': '{parent}' exists already; allowed is a new or an empty folder",
    "convert a/b {folder}/new --dtype auto": "'--dtype': 'auto'; allowed are float32, bfloat16, float16",
    "convert a/b {folder}/new --max-shard-size big": "'--max-shard-size': 'big'",
    "convert a/b {folder}/new --max-shard-size 1.5": "'--max-shard-size': '1.5'",
    "convert a/b {folder}/new --preset other": "'--preset': 'other'; allowed are llada-medv, ",
    "convert a/b {folder}/new --public": "--public: it goes with --push",
    "convert a/b {folder}/new --push a/b/c": "'--push': 'a/b/c' is no Hub id",
    "init {folder}/new --language-model a/b --vision-tower a/b --aspect-ratio wide": "'--aspect-ratio': 'wide'",
    "init {folder}/new --language-model nowhere --vision-tower a/b": "'--language-model': 'nowhere' is no folder",
    "init {folder}/new --language-model a/b --vision-tower a/b --projector no.bin": "'--projector'",
    "push /no/such me/model": "FOLDER': there is no folder '/no/such'",
    "push {folder} 'not a name'": "REPO': 'not a name' is no Hub id",
    "push-dataset other a/b": "BENCHMARK': 'other'; allowed are vqa-rad, slake, path-vqa, phantoms",
    "push-dataset phantoms a/b --split other": "'--split': 'other'; allowed are train, validation, test",
    "push {folder} a--b/c": "REPO': 'a--b/c' is no Hub id",
    "space Name {folder}/new --model nowhere": "'--model': 'nowhere'; allowed are a Hub id",
    "space Name {parent}": "OUT': '{parent}' exists already",
    "train nothing": "RECIPE is 'nothing'; allowed are demo_closed_form,",
    "train demo_lora --accelerate nothing": "--accelerate is 'nothing'; allowed are cpu,",
    "nonsense": "No such command 'nonsense'",
}


@pytest.fixture(scope="module")
def bad_calls(tmp_path_factory):
    """What each said, from one process that has asked for no PyTorch, and the places that the calls name."""
    parent = tmp_path_factory.mktemp("bad")
    folder = parent / "folder"
    folder.mkdir()
    medical_files(folder)
    taken = socket.create_server(("127.0.0.1", 0))
    places = {
        "parent": parent, "folder": folder, "picture": folder / "picture.png", "port": taken.getsockname()[1],
    }  # fmt: skip
    calls = [shlex.split(each.format_map(places)) for each in BAD_CALLS]
    program = (
        "import sys, json\n"
        "from typer.testing import CliRunner; from lladamedv.cli import app\n"
        f"results = [CliRunner().invoke(app, words) for words in {calls!r}]\n"
        "print(json.dumps(['torch' in sys.modules, [(each.exit_code, each.stdout, each.stderr) for each in results]]))"
    )
    with taken:
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    heavy, results = json.loads(run.stdout)
    return heavy, dict(zip(BAD_CALLS, results)), places


def test_bad_calls_do_not_wait_for_torch(bad_calls):
    assert bad_calls[0] is False


@pytest.mark.parametrize("words", BAD_CALLS)
def test_bad_calls_are_one_line_in_the_names_of_the_command(bad_calls, words):
    code, stdout, stderr = bad_calls[1][words]
    assert code in (1, 2) and not stdout and stderr.startswith("lladamedv: ") and stderr.count("\n") == 1
    assert BAD_CALLS[words].format_map(bad_calls[2]) in stderr
    assert not re.search("`|None|Traceback|slice_index|time_index|full_range|allow_burned_in", stderr)


def test_nothing_of_other_libraries_is_printed(tmp_path):
    """Standard error holds what the command says, and nothing else: with --quiet, no progress bar either. A process of
    its own, as users have it."""
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    program = (
        "from contextlib import suppress; from lladamedv.cli import app\n"
        "with suppress(SystemExit):\n"
        "    app('pairs -q --benchmark phantoms --path 0:9 --rejected pictures --output pairs'.split())\n"
        "app(['ask', 'picture.png', 'Is there a lesion?'])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert run.stderr == f"{DEMO_NOTICE}\n" and run.stdout.strip()


def test_quiet(tmp_path, photograph):
    """Notices and steps are left out, warnings are not; the next command speaks again."""
    Image.new("I;16", (64, 64), 300).save(file := tmp_path / "grey.png")
    told = [call("ask", each, "Is there a lesion?", *more) for each in (file, photograph) for more in ([], ["-q"])]
    assert [each.exit_code for each in told] == [0] * 4
    assert "image: " in told[0].stderr and DEMO_NOTICE in told[0].stderr and not told[1].stderr
    assert DEMO_NOTICE in told[2].stderr and told[3].stderr.startswith("Warning: The picture is unlike")
    assert [each.stdout for each in told[1::2]] == [each.stdout for each in told[::2]]


def test_the_first_line_on_a_terminal_comes_before_torch(tmp_path):
    """While PyTorch is imported, which this one never does."""
    pty = pytest.importorskip("pty")
    Image.new("RGB", (64, 64)).save(file := tmp_path / "picture.png")
    program = (
        "import sys; from importlib.abc import MetaPathFinder\n"
        "class Block(MetaPathFinder):\n"
        "    def find_spec(self, name, *more):\n"
        "        if name == 'torch': raise ImportError('no torch')\n"
        "sys.meta_path.insert(0, Block())\n"
        "from lladamedv.cli import app; app()"
    )
    screen, terminal = pty.openpty()
    words = [sys.executable, "-c", program, "ask", file, "Is there a lesion?"]
    run = subprocess.run(words, stderr=terminal, stdout=subprocess.DEVNULL, env=os.environ | {"TERM": "xterm"})
    os.close(terminal)
    assert run.returncode == 1 and b"Starting PyTorch" in os.read(screen, 4096)


def test_info():
    """Versions are those of the distributions, and the demo model can be loaded from where it is."""
    sections = json.loads(call("info", "--json").stdout)
    assert list(sections) == ["Versions", "Devices", "Extras", "Models"]
    for name, told in list(sections["Versions"].items())[1:]:
        assert told == metadata.version(name)
    assert loading.load_model(sections["Models"]["demo"]) and sections["Devices"]["used by default"]
    assert set(sections["Extras"]) == set(metadata.metadata("lladamedv").get_all("Provides-Extra"))
    plain = call("info").stdout
    assert all(value in plain for lines in sections.values() for value in lines.values())


def test_info_says_what_an_extra_lacks(monkeypatch):
    """An extra that holds others lacks what they lack; a version that is too old is named."""
    installed = {"pydicom": metadata.PackageNotFoundError(), "matplotlib": "3.1"}

    def version(name, ask=metadata.version):
        if isinstance(found := installed.get(name), Exception):
            raise found
        return found or ask(name)

    monkeypatch.setattr("lladamedv.information.version", version)
    extras = json.loads(call("info", "--json").stdout)["Extras"]
    assert extras["medical-codecs"] == 'lacks pydicom: pip install "lladamedv[medical-codecs]"'
    assert extras["plots"].startswith("lacks matplotlib") and "(3.1 is installed)" in extras["plots"]


def test_info_lists_models_of_the_hubs_cache(tmp_path, monkeypatch):
    """Those that this package loads, and no others."""
    for name, kind in (("mine", "lladamedv"), ("theirs", "llava_llada"), ("other", "llama")):
        snapshot = tmp_path / f"models--me--{name}/snapshots/{'a' * 40}"
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps({"model_type": kind}))
        (tmp_path / f"models--me--{name}/refs").mkdir()
        (tmp_path / f"models--me--{name}/refs/main").write_text("a" * 40)
    monkeypatch.setattr("lladamedv.information.scan_cache_dir", lambda: scan_cache_dir(tmp_path))
    models = json.loads(call("info", "--json").stdout)["Models"]
    assert list(models) == ["demo", "Hub cache", "me/mine", "me/theirs"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [("lladamedv pu", ["push", "push-dataset"]), ("lladamedv train demo_l", ["demo_lora"])],
)
def test_completion_does_not_wait_for_torch(words, expected):
    completing = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    result = light(_LLADAMEDV_COMPLETE="complete_bash", **completing)
    assert result.stdout.split() == expected
