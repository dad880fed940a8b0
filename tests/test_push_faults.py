"""What goes wrong on the way to the Hub: each fault over real HTTP; afterwards nothing is half there or given away."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from threading import Event

import pytest
import torch
from huggingface_hub.utils import _http
from safetensors.torch import save_file

from lladamedv.hub_cards.push import push_dataset, push_folder
from tests.hub_folders import contents, state, write_model
from tests.hub_stub import Fault, environment


ROOT = Path(__file__).parents[1]
TOKEN = "hf_test"
COMMIT, UPLOAD, BATCH = "POST /api/models/me/model/commit", "PUT /upload/", "POST /me/model.git/info/lfs"
CREATE, LOOK, WHO = "POST /api/repos/create", "GET /api/models/me/model", "GET /api/whoami"
SHARDS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose weights are three small files; never changed, as each test sees."""
    folder = write_model(tmp_path_factory.mktemp("complete") / "model")
    (folder / "model.safetensors").unlink()
    return write_shards(folder, SHARDS)


def write_shards(folder, count):
    places = {f"weight_{number}": f"model-{number}.safetensors" for number in range(count)}
    for number, (key, name) in enumerate(places.items()):
        save_file({key: torch.full((5000,), float(number))}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """How long the client's retries have waited, without the waiting."""
    waited = []
    monkeypatch.setattr(_http.time, "sleep", waited.append)
    return waited


@pytest.fixture(autouse=True)
def watched(hub, folder, tmp_path, capfd, caplog):
    """After the test: the folder is as it was, and no output, log or file has the token."""
    caplog.set_level(logging.DEBUG, "huggingface_hub")
    before = state(folder)
    yield
    assert state(folder) == before
    out, err = capfd.readouterr()
    assert TOKEN not in out + err + caplog.text
    assert not any(TOKEN.encode() in data for data in contents(tmp_path).values())


def fails(push, *arguments, **options):
    """The one line that a push fails with."""
    with pytest.raises(ValueError) as caught:
        push(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and TOKEN not in message and "signature" not in message
    assert message.startswith(f"`repo` is {arguments[1]!r}, ")
    # A traceback would show what the line does not.
    assert caught.value.__suppress_context__ and caught.value.__cause__ is None
    return message


def faults(*rows):
    return pytest.mark.parametrize(
        ("fault", "expected"),
        [pytest.param(*row, id=f"{row[0].args[0].rpartition('/')[2]}-{row[0].args[1]}") for row in rows],
    )


def completes(hub, folder):
    """A push without faults: one commit of all there is, and no large file was sent twice, before or now."""
    sent = list(hub.uploads)
    hub.faults = []
    push_folder(folder, "me/model")
    assert hub.repos["me/model"] == contents(folder) and hub.commits == ["me/model"]
    assert len(set(hub.uploads)) == len(hub.uploads) == SHARDS and hub.uploads[: len(sent)] == sent


@faults(
    (partial(Fault, WHO, 401), "but the login at the Hub fails: HTTP 401, the token is missing or not valid"),
    (partial(Fault, CREATE, 403), "HTTP 403, the token may not write there"),
    (partial(Fault, CREATE, 500, times=1), "HTTP 500, the Hub has a problem"),
    (partial(Fault, LOOK, 500), "could not be looked up: HTTP 500, the Hub has a problem"),
    (partial(Fault, UPLOAD, 500), "HTTP 500, the Hub has a problem"),
    (partial(Fault, UPLOAD, 429, {"Retry_After": "7"}), "HTTP 429, too many requests, try again in 7 s"),
    (partial(Fault, UPLOAD, 0, read=1000), "Error"),
    (partial(Fault, COMMIT, 403, body="only: {authorization}"), "may not write there (only: Bearer (token))"),
    (partial(Fault, COMMIT, 404, {"X_Error_Code": "RepoNotFound"}), "HTTP 404, there is no such repository"),
    (partial(Fault, COMMIT, 412), "HTTP 412, the repository has changed meanwhile"),
    (partial(Fault, COMMIT, 429, {"Retry_After": "9"}), "HTTP 429, too many requests, try again in 9 s"),
    (partial(Fault, COMMIT, 500, times=1, body="line one\nline two"), "the Hub has a problem (line one line two)"),
    (partial(Fault, COMMIT, 0, read=1000), "Error"),
    (partial(Fault, COMMIT, 0), "Error"),
)
def test_a_fault_leaves_nothing_half_pushed(hub, folder, fault, expected):
    hub.faults = [fault()]
    assert expected in fails(push_folder, folder, "me/model")
    assert not hub.repos.get("me/model") and not hub.commits
    completes(hub, folder)


@faults(
    (partial(Fault, UPLOAD, 500, times=1), 1),
    (partial(Fault, UPLOAD, 429, {"Retry_After": "7"}, times=1), 8),
    (partial(Fault, UPLOAD, 0, times=1, read=1000), 1),
    (partial(Fault, UPLOAD, 0, times=1, after=True), 1),
    (partial(Fault, BATCH, 500, times=1), 1),
    (partial(Fault, "POST /api/models/me/model/preupload", 429, {"Retry_After": "3"}, times=1), 4),
)
def test_what_the_client_repeats(hub, folder, waits, fault, expected):
    hub.faults = [fault()]
    push_folder(folder, "me/model")
    assert hub.repos["me/model"] == contents(folder) and hub.commits == ["me/model"]
    assert waits == [expected], "as long as the Hub asks for"


def test_a_repository_that_comes_into_being_meanwhile(hub, folder):
    """Another process creates it between our look and our request: 409 is fine then."""
    hub.repos["me/model"], hub.private["me/model"] = {".gitattributes": b"x"}, True
    hub.faults = [Fault(LOOK, 404, {"X_Error_Code": "RepoNotFound"}, times=1)]
    push_folder(folder, "me/model")
    assert "POST /api/repos/create" in hub.requests
    assert hub.repos["me/model"] == contents(folder) | {".gitattributes": b"x"}


def test_an_old_version_stays_whole(hub, folder, tmp_path):
    """A model that is there stays as it was through every failure of the next push."""
    shutil.copytree(folder, tmp_path / "older", ignore=shutil.ignore_patterns("*.safetensors"))
    push_folder(write_shards(tmp_path / "older", 1), "me/model")
    before = dict(hub.repos["me/model"])
    for fault in (Fault(UPLOAD, 500), Fault(UPLOAD, 0, read=100), Fault(COMMIT, 500), Fault(COMMIT, 0, read=100)):
        hub.faults = [fault]
        fails(push_folder, folder, "me/model")
        assert hub.repos["me/model"] == before
    hub.faults = []
    push_folder(folder, "me/model")
    assert hub.repos["me/model"] == contents(folder)


def test_another_commit_in_between(hub, folder):
    """What was looked at is no longer what is there, so the commit is not made."""
    hub.repos["me/model"], hub.private["me/model"] = {"README.md": b"---\nlicense: mit\n---\n"}, True

    def commit_meanwhile(request):
        if request.startswith(COMMIT):
            hub.repos["me/model"]["notes.txt"] = b"theirs"

    hub.fault = commit_meanwhile
    assert "HTTP 412, the repository has changed meanwhile" in fails(push_folder, folder, "me/model")
    assert set(hub.repos["me/model"]) == {"README.md", "notes.txt"}


def test_the_answer_to_a_commit_is_lost(hub, folder):
    """The commit is there as a whole, and a second push sees it and makes no other."""
    hub.faults = [Fault(COMMIT, 0, times=1, after=True)]
    fails(push_folder, folder, "me/model")
    assert hub.repos["me/model"] == contents(folder)
    completes(hub, folder)


@pytest.mark.parametrize(
    ("setting", "value", "options", "message"),
    [
        ("ENDPOINT", "http://127.0.0.1:9", {}, "but the login at the Hub fails: ConnectionRefusedError"),
        ("HF_HUB_OFFLINE", True, {"token": TOKEN}, "offline mode is enabled"),
        ("HF_HUB_OFFLINE", False, {}, "but the login at the Hub fails: LocalTokenNotFoundError"),
    ],
)
def test_no_hub_and_no_token(hub, folder, monkeypatch, setting, value, options, message):
    if not value:
        monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(f"huggingface_hub.constants.{setting}", value)
    assert message in fails(push_folder, folder, "me/model", **options) and not hub.requests


@pytest.mark.parametrize("fault", [(UPLOAD, 500), ("POST /api/datasets/me/data/commit", 0)])
def test_a_data_set(hub, fault):
    hub.faults = [Fault(*fault, read=50)]
    assert "could not be pushed to" in fails(push_dataset, "phantoms", "me/data", path="1:3")
    assert not hub.repos["datasets/me/data"]
    hub.faults = []
    push_dataset("phantoms", "me/data", path="1:3")
    assert hub.commits == ["datasets/me/data"] and len(hub.uploads) == 1


PUSH = "import sys; from lladamedv.hub_cards.push import push_folder; push_folder(sys.argv[1], 'me/model')"


@pytest.mark.parametrize("request_", [UPLOAD, COMMIT], ids=["upload", "commit"])
def test_killed(hub, folder, tmp_path, request_):
    """SIGKILL with a request half sent: the repository is empty, and the next push completes it."""
    hub.faults, arrive = [Fault(request_, hang=True, read=1000, times=1)], SHARDS - (request_ == UPLOAD)
    variables = {**os.environ, **environment(hub, tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    output = tmp_path / "output"
    with open(output, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", PUSH, str(folder)], cwd=tmp_path, env=variables, stdout=file, stderr=file
        )
        assert hub.reached.wait(120), output.read_text()
        for _ in range(100):
            if len(hub.uploads) == arrive:
                break
            Event().wait(0.1)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert hub.repos["me/model"] == {} and not hub.commits and len(hub.uploads) == arrive
    completes(hub, folder)


def test_the_folder_holds_no_token_to_begin_with(folder):
    """What `watched` looks for would be found."""
    assert not any(TOKEN.encode() in data for data in contents(folder).values())
