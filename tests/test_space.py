"""The folder of a Gradio Space: what it pins and states, and that its program starts with a model of the Hub."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement
from typer.testing import CliRunner

from lladamedv.cli import app
from lladamedv.hub_cards import push as hub
from lladamedv.hub_cards.push import write_space
from tests.hub_folders import contents, write_model
from tests.hub_stub import environment, running_hub


ROOT = Path(__file__).parents[1]
GRADIO = "6.31.0"

# In place of `lladamedv.app`: it says what it was given.
APP = """
import json, sys, types
import lladamedv
app = types.ModuleType("lladamedv.app")
class Blocks:
    def launch(self):
        print(json.dumps({"model": type(self.model).__name__, "processor": type(self.processor).__name__,
                          "weights": float(self.model.lm_head.weight.sum())}))
def build_app(model, processor):
    blocks = Blocks()
    blocks.model, blocks.processor = model, processor
    return blocks
app.build_app = build_app
sys.modules["lladamedv.app"] = app
import runpy
runpy.run_path("app.py", run_name="__main__")
"""


@pytest.fixture(autouse=True)
def gradio_is_installed(monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(hub, "version", lambda name: GRADIO if name == "gradio" else real(name))


def quiet(line):
    pass


def start(folder, **variables):
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    run = subprocess.run(
        [sys.executable, "-c", APP], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_a_space_of_a_model_on_the_hub(tmp_path):
    with running_hub() as stub:
        stub.repos["me/model"] = contents(write_model(tmp_path / "model"))
        pinned = stub.commit("me/model")
        write_space("me/biomedical-chat", tmp_path / "space", "me/model", revision=pinned, report=quiet)
        assert set(contents(tmp_path / "space")) == {"app.py", "requirements.txt", "README.md"}
        started = start(tmp_path / "space", **environment(stub, tmp_path / "home"))
        assert started["model"] == "LLaDAMedVForConditionalGeneration" and started["processor"] == "LLaDAMedVProcessor"
        assert any(f"/resolve/{pinned}/" in request for request in stub.requests)

    data = SpaceCard.load(tmp_path / "space" / "README.md").data.to_dict()
    assert data["title"] == "biomedical-chat" and data["models"] == ["me/model"] and data["license"] == "apache-2.0"
    assert data["sdk"] == "gradio" and data["sdk_version"] == GRADIO and data["app_file"] == "app.py"
    assert data["python_version"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert {"research-only", "not-a-medical-device"} <= set(data["tags"])
    assert "https://huggingface.co/me/model" in (tmp_path / "space" / "README.md").read_text()

    wanted = [Requirement(line) for line in (tmp_path / "space" / "requirements.txt").read_text().splitlines()]
    assert wanted[0].name == "lladamedv" and wanted[0].extras == {"app"}
    assert {"torch", "transformers", "huggingface_hub"} < {each.name for each in wanted}
    for each in wanted:
        installed = importlib.metadata.version(each.name)
        assert str(each.specifier) == f"=={installed.partition('+')[0]}" and each.specifier.contains(installed)
    assert "gradio" not in {each.name for each in wanted}, "the Space's own sdk_version installs it"


def test_a_space_of_the_demo_model(tmp_path):
    write_space("Demo", tmp_path / "space", "demo", report=quiet)
    assert start(tmp_path / "space", HF_HUB_OFFLINE="1")["model"] == "LLaDAMedVForConditionalGeneration"
    assert "models" not in SpaceCard.load(tmp_path / "space" / "README.md").data.to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "/home/jane/model"}, "`model` is '/home/jane/model'; allowed are a Hub id, OWNER/NAME, and 'demo'"),
        ({"model": 'x/y"\nimport os'}, "`model` is "),
        ({"revision": '"; import os'}, "`revision` is "),
        ({"name": " "}, "`name` is ' '; it must not be empty"),
        ({"name": "me/a\n---\n"}, "`name` is "),
    ],
)
def test_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write_space(**{"name": "x", "out": tmp_path / "space", "model": "demo", "report": quiet} | options)
    assert not (tmp_path / "space").exists()


def test_out_must_be_new(tmp_path):
    (tmp_path / "space").mkdir()
    (tmp_path / "space" / "app.py").write_text("mine")
    with pytest.raises(ValueError, match=r"`out` is .*space', which exists already"):
        write_space("x", tmp_path / "space", "demo", report=quiet)
    assert contents(tmp_path / "space") == {"app.py": b"mine"}


def test_without_gradio(tmp_path, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(hub, "version", version)
    with pytest.raises(ValueError, match=r'is not installed, .* `pip install "lladamedv\[app\]"`'):
        write_space("x", tmp_path / "space", "demo", report=quiet)
    assert not (tmp_path / "space").exists()


def test_command_line(tmp_path):
    done = CliRunner().invoke(app, ["space", "Demo", str(tmp_path / "space")])
    assert done.exit_code == 0 and "hf upload" in done.output
    words = ["space", "Demo", str(tmp_path / "json"), "--model", "me/model", "--revision", "v1", "--json"]
    done = CliRunner().invoke(app, words)
    assert json.loads(done.stdout) == {"output": str(tmp_path / "json"), "model": "me/model", "revision": "v1"}
    assert "hf upload" in done.stderr and (tmp_path / "json" / "app.py").is_file()
    failed = CliRunner().invoke(app, ["space", "Demo", str(tmp_path / "space")])
    assert failed.exit_code == 2 and f"'OUT': '{tmp_path / 'space'}' exists already" in failed.stderr
