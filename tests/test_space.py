"""The folder of a Gradio Space: what it pins and states, and that its program starts with a model of the Hub."""

import importlib.metadata
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement
from typer.testing import CliRunner

from lladamedv.cli import app
from lladamedv.hub_cards import push
from tests.hub_folders import contents, write_model
from tests.hub_stub import environment, running_hub


ROOT = Path(__file__).parents[1]
GRADIO = "6.31.0"

# In place of `lladamedv.app`: it says what it was given.
APP = """
import json, runpy, sys, types
import lladamedv
class Blocks:
    def __init__(self, model, processor, name):
        self.given = [type(model).__name__, type(processor).__name__, name]
    def launch(self):
        print(json.dumps(self.given))
sys.modules["lladamedv.app"] = app = types.ModuleType("lladamedv.app")
app.build_app = Blocks
runpy.run_path("app.py", run_name="__main__")
"""


@pytest.fixture(autouse=True)
def gradio_is_installed(monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(push, "version", lambda name: GRADIO if name == "gradio" else real(name))


write_space = partial(push.write_space, report=str)


def start(folder, name, **variables):
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    run = subprocess.run([sys.executable, "-c", APP], cwd=folder, env=variables, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout.splitlines()[-1]) == ["LLaDAMedVForConditionalGeneration", "LLaDAMedVProcessor", name]


def test_a_space_of_a_model_on_the_hub(tmp_path):
    space = tmp_path / "space"
    with running_hub() as stub:
        stub.repos["me/model"] = contents(write_model(tmp_path / "model"))
        pinned = stub.commit("me/model")
        write_space("me/biomedical-chat", space, "me/model", revision=pinned)
        assert set(contents(space)) == {"app.py", "requirements.txt", "README.md"}
        start(space, "me/model", **environment(stub, tmp_path / "home"))
        assert any(f"/resolve/{pinned}/" in request for request in stub.requests)

    data = SpaceCard.load(space / "README.md").data.to_dict()
    assert {"research-only", "not-a-medical-device"} <= set(data.pop("tags"))
    assert data == {
        "title": "biomedical-chat", "models": ["me/model"], "license": "apache-2.0", "sdk": "gradio",
        "sdk_version": GRADIO, "app_file": "app.py",
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
    }  # fmt: skip
    assert "https://huggingface.co/me/model" in (space / "README.md").read_text()

    first, *others = map(Requirement, (space / "requirements.txt").read_text().splitlines())
    assert first.name == "lladamedv" and first.extras == {"app"}
    assert {"torch", "transformers", "huggingface_hub"} < {each.name for each in others}
    for each in (first, *others):
        assert each.name != "gradio", "the Space's own sdk_version installs it"
        assert str(each.specifier) == f"=={importlib.metadata.version(each.name).partition('+')[0]}"


def test_a_space_of_the_demo_model(tmp_path):
    write_space("Demo", tmp_path / "space", "demo")
    start(tmp_path / "space", "demo", HF_HUB_OFFLINE="1")
    assert "models" not in SpaceCard.load(tmp_path / "space" / "README.md").data.to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "/home/jane/model"}, "`model` is '/home/jane/model'; allowed are a Hub id, OWNER/NAME, and 'demo'"),
        ({"model": 'x/y"\nimport os'}, "`model` is "),
        ({"revision": '"; import os'}, "`revision` is "),
        ({"name": " "}, "`name` is ' '; it must not be empty"),
        ({"name": "me/a\n---\n"}, "`name` is "),
        ({"out": "{}/mine"}, "`out` is .*mine', which exists already"),
        ({}, r'is not installed, .* `pip install "lladamedv\[app\]"`'),
    ],
)
def test_arguments(tmp_path, monkeypatch, options, message):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "app.py").write_text("mine")
    if "out" in options:
        options = {"out": options["out"].format(tmp_path)}
    if not options:
        monkeypatch.setattr(push, "version", lambda name: importlib.metadata.version(f"no-such-{name}"))
    with pytest.raises(ValueError, match=message):
        write_space(**{"name": "x", "out": tmp_path / "space", "model": "demo"} | options)
    assert contents(tmp_path) == {"mine/app.py": b"mine"}


def test_command_line(tmp_path):
    words = ["space", "Demo", str(tmp_path / "json"), "--model", "me/model", "--revision", "v1", "--json"]
    done = CliRunner().invoke(app, words)
    assert json.loads(done.stdout) == {"output": str(tmp_path / "json"), "model": "me/model", "revision": "v1"}
    assert "hf upload" in done.stderr and (tmp_path / "json" / "app.py").is_file()
