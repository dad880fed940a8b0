"""What goes wrong on the way to the Hub: each fault over real HTTP; afterwards nothing is half there or given away."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import _http
from safetensors.torch import save_file

from lladamedv.hub_cards.push import push_dataset, push_folder
from tests.hub_folders import contents, state, write_model
from tests.hub_stub import Fault, environment, running_hub, take_for_the_hub


ROOT = Path(__file__).parents[1]
TOKEN = "hf_test"
COMMIT, UPLOAD, BATCH = "POST /api/models/me/model/commit", "PUT /upload/", "POST /me/model.git/info/lfs"
CREATE, LOOK, WHO = "POST /api/repos/create", "GET /api/models/me/model", "GET /api/whoami"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose weights are three small files; never changed, as each test sees."""
    folder = write_model(tmp_path_factory.mktemp("complete") / "model")
    (folder / "model.safetensors").unlink()
    return write_shards(folder, 3)


def write_shards(folder, count):
    places = {f"weight_{number}": f"model-{number}.safetensors" for number in range(count)}
    for number, (key, name) in enumerate(places.items()):
        save_file({key: torch.full((5000,), float(number))}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with running_hub() as hub:
        take_for_the_hub(hub, monkeypatch, tmp_path / "home")
        yield hub


@pytest.fixture
def waits(monkeypatch):
    """How long the client's retries have waited, without the waiting."""
    waited = []
    monkeypatch.setattr(_http.time, "sleep", waited.append)
    return waited


@pytest.fixture
def watched(hub, folder, tmp_path, capfd, caplog):
    """After the test: the folder is as it was, and no output, log or file has the token."""
    caplog.set_level(logging.DEBUG, "huggingface_hub")
    before = state(folder)
    yield
    assert state(folder) == before
    out, err = capfd.readouterr()
    assert TOKEN not in out + err + caplog.text
    assert not any(TOKEN.encode() in data for data in contents(tmp_path).values())


def fails(folder, **options):
    """The one line that a push fails with."""
    with pytest.raises(ValueError) as caught:
        push_folder(folder, "me/model", report=print, **options)
    message = str(caught.value)
    assert "\n" not in message and TOKEN not in message and "signature" not in message
    assert message.startswith("`repo` is 'me/model', ")
    # A traceback would show what the line does not.
    assert caught.value.__suppress_context__ and caught.value.__cause__ is None
    return message


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(WHO, 401), "but the Hub does not let us in: HTTP 401, the token is missing or not valid"),
        (Fault(CREATE, 403), "HTTP 403, the token may not write there"),
        (Fault(CREATE, 500, times=1), "HTTP 500, the Hub has a problem"),
        (Fault(LOOK, 500), "could not be looked up: HTTP 500, the Hub has a problem"),
        (Fault(UPLOAD, 500), "HTTP 500, the Hub has a problem"),
        (Fault(UPLOAD, 429, {"Retry-After": "7"}), "HTTP 429, too many requests, try again in 7 s"),
        (Fault(UPLOAD, 0, read=1000), "Error"),
        (Fault(COMMIT, 403, body="read only: {authorization}"), "may not write there (read only: Bearer (token))"),
        (Fault(COMMIT, 404, {"X-Error-Code": "RepoNotFound"}), "HTTP 404, there is no such repository"),
        (Fault(COMMIT, 412), "HTTP 412, the repository has changed meanwhile"),
        (Fault(COMMIT, 429, {"Retry-After": "9"}), "HTTP 429, too many requests, try again in 9 s"),
        (Fault(COMMIT, 500, times=1, body="line one\nline two"), "the Hub has a problem (line one line two)"),
        (Fault(COMMIT, 0, read=1000), "Error"),
        (Fault(COMMIT, 0), "Error"),
    ],
    ids=lambda value: f"{value.request.rpartition('/')[2]}-{value.status}" if isinstance(value, Fault) else "",
)
def test_a_fault_leaves_nothing_half_pushed(hub, folder, watched, waits, fault, reason):
    fault.headers = {name.replace("-", "_"): value for name, value in fault.headers.items()}
    hub.faults = [fault]
    message = fails(folder)
    assert reason in message
    assert not hub.repos.get("me/model") and not hub.commits
    # Once more, when the fault is over: what has arrived is not sent again.
    sent = list(hub.uploads)
    hub.faults = []
    push_folder(folder, "me/model")
    assert hub.repos["me/model"] == contents(folder) and hub.commits == ["me/model"]
    assert (
        len(set(hub.uploads)) == len(hub.uploads) == len(list(folder.glob("*.safetensors")))
        and sent == (hub.uploads[: len(sent)])
    )


@pytest.mark.parametrize(
    ("fault", "waited"),
    [
        (Fault(UPLOAD, 500, times=1), 1),
        (Fault(UPLOAD, 429, {"Retry_After": "7"}, times=1), 8),
        (Fault(UPLOAD, 0, times=1, read=1000), 1),
        (Fault(UPLOAD, 0, times=1, after=True), 1),
        (Fault(BATCH, 500, times=1), 1),
        (Fault("POST /api/models/me/model/preupload", 429, {"Retry_After": "3"}, times=1), 4),
    ],
    ids=lambda value: f"{value.request.rpartition('/')[2]}-{value.status}" if isinstance(value, Fault) else "",
)
def test_what_the_client_repeats(hub, folder, watched, waits, fault, waited):
    hub.faults = [fault]
    push_folder(folder, "me/model")
    assert hub.repos["me/model"] == contents(folder) and hub.commits == ["me/model"]
    assert waits == [waited], "as long as the Hub asks for"


def test_a_repository_that_comes_into_being_meanwhile(hub, folder, watched):
    """Another process creates it between our look and our request: 409 is fine then."""
    hub.repos["me/model"], hub.private["me/model"] = {".gitattributes": b"x"}, True
    hub.faults = [Fault(LOOK, 404, {"X_Error_Code": "RepoNotFound"}, times=1)]
    push_folder(folder, "me/model")
    assert "POST /api/repos/create" in hub.requests
    assert hub.repos["me/model"] == contents(folder) | {".gitattributes": b"x"}


def test_an_old_version_stays_whole(hub, folder, tmp_path, watched, waits):
    """A model that is there stays as it was through every failure of the next push."""
    shutil.copytree(folder, tmp_path / "older", ignore=shutil.ignore_patterns("*.safetensors"))
    push_folder(write_shards(tmp_path / "older", 1), "me/model")
    before = dict(hub.repos["me/model"])
    for fault in (Fault(UPLOAD, 500), Fault(UPLOAD, 0, read=100), Fault(COMMIT, 500), Fault(COMMIT, 0, read=100)):
        hub.faults = [fault]
        fails(folder)
        assert hub.repos["me/model"] == before
    hub.faults = []
    push_folder(folder, "me/model")
    assert hub.repos["me/model"] == contents(folder)


def test_another_commit_in_between(hub, folder, watched):
    """What was looked at is no longer what is there, so the commit is not made."""
    hub.repos["me/model"], hub.private["me/model"] = {"README.md": b"---\nlicense: mit\n---\n"}, True
    put = hub.fault

    def commit_meanwhile(request):
        if request.startswith(COMMIT):
            hub.repos["me/model"]["notes.txt"] = b"theirs"
        return put(request)

    hub.fault = commit_meanwhile
    assert "HTTP 412, the repository has changed meanwhile" in fails(folder)
    assert set(hub.repos["me/model"]) == {"README.md", "notes.txt"}


def test_the_answer_to_a_commit_is_lost(hub, folder, watched):
    """The commit is there as a whole, and a second push sees it and makes no other."""
    hub.faults = [Fault(COMMIT, 0, times=1, after=True)]
    fails(folder)
    assert hub.repos["me/model"] == contents(folder)
    push_folder(folder, "me/model")
    assert hub.commits == ["me/model"]


def test_no_hub_answers(hub, folder, watched, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "but the Hub does not let us in: ConnectionRefusedError" in fails(folder)


def test_no_token_and_no_network(hub, folder, watched, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "but the Hub does not let us in: LocalTokenNotFoundError" in fails(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "offline mode is enabled" in fails(folder, token=TOKEN)
    assert not hub.requests


def test_a_data_set(hub, watched, waits):
    repo = "datasets/me/data"
    for fault in (Fault(UPLOAD, 500), Fault("POST /api/datasets/me/data/commit", 0, read=50)):
        hub.faults = [fault]
        with pytest.raises(ValueError, match="`repo` is 'me/data', which could not be pushed to") as caught:
            push_dataset("phantoms", "me/data", path="1:3")
        assert "\n" not in str(caught.value) and not hub.repos[repo]
    hub.faults = []
    push_dataset("phantoms", "me/data", path="1:3")
    assert hub.commits == [repo] and len(hub.uploads) == 1


PUSH = """
import sys
from lladamedv.hub_cards.push import push_folder
push_folder(sys.argv[1], "me/model")
"""


@pytest.mark.parametrize("request_", [UPLOAD, COMMIT], ids=["upload", "commit"])
def test_killed(hub, folder, tmp_path, watched, request_):
    """SIGKILL with a request half sent: the repository is empty, and the next push completes it."""
    hub.faults = [Fault(request_, hang=True, read=1000, times=1)]
    variables = {**os.environ, **environment(hub, tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    output = tmp_path / "output"
    with open(output, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", PUSH, str(folder)], cwd=tmp_path, env=variables, stdout=file, stderr=file
        )
        assert hub.reached.wait(120), output.read_text()
        if request_ == UPLOAD:  # the others arrive
            for _ in range(100):
                if len(hub.uploads) == len(list(folder.glob("*.safetensors"))) - 1:
                    break
                time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert hub.repos["me/model"] == {} and not hub.commits
    sent = list(hub.uploads)
    assert len(sent) == len(list(folder.glob("*.safetensors"))) - (request_ == UPLOAD)
    push_folder(folder, "me/model")
    assert hub.repos["me/model"] == contents(folder) and hub.commits == ["me/model"]
    assert len(hub.uploads) == len(set(hub.uploads)) and hub.uploads[: len(sent)] == sent


def test_the_folder_holds_no_token_to_begin_with(folder):
    """What `watched` looks for would be found."""
    assert not any(TOKEN.encode() in data for data in contents(folder).values())
    assert json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
