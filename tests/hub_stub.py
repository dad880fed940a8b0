"""A Hub in memory, on a local port: enough of the HTTP API for huggingface_hub to create, upload and download.

Faults can be put in its way: statuses, connections that break, and requests that are never answered.
"""

import base64
import hashlib
import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from urllib.parse import parse_qs, unquote, urlsplit

import transformers.utils.hub
from huggingface_hub import constants, hf_api


LFS_SUFFIXES = (".safetensors", ".parquet", ".arrow")
MAIN = "main"


@dataclass
class Fault:
    """What happens to requests of a kind, instead of or after what should.

    Args:
        request: regular expression for the beginning of "METHOD /path".
        status: what is answered; 0 closes the connection instead.
        headers, body: of the answer. In the body, `{authorization}` stands for what the client sent as such.
        times: how often; -1 is always.
        after: whether the request is carried out all the same, so that only the answer is lost.
        read: number of bytes of the request's body that are read before the connection closes; all by default.
        hang: never answer, until `HubStub.released` is set; `HubStub.reached` tells that it has come so far.
    """

    request: str
    status: int = 0
    headers: dict = field(default_factory=dict)
    body: str = ""
    times: int = -1
    after: bool = False
    read: int | None = None
    hang: bool = False


class HubStub:
    """`repos` maps a repository's id (of data sets "datasets/…") to its files on the main branch, `private` to its
    visibility; `requests` are what was asked, `uploads` the sha256 of each large file as often as it was sent."""

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.branches: dict[str, dict[str, dict[str, bytes]]] = {}  # others than main
        self.snapshots: dict[str, dict[str, bytes]] = {}  # files by the commit that they were seen at
        self.objects: dict[str, bytes] = {}  # large files by their sha256
        self.requests: list[str] = []
        self.uploads: list[str] = []
        self.commits: list[str] = []  # repositories, as often as there was a commit
        self.faults: list[Fault] = []
        self.reached, self.released = Event(), Event()
        self.url = ""

    def commit(self, repo: str, revision: str = MAIN) -> str:
        files = self.files(repo, revision)
        digest = hashlib.sha1(b"".join(name.encode() + data for name, data in sorted(files.items()))).hexdigest()
        self.snapshots[digest] = dict(files)
        return digest

    def files(self, repo: str, revision: str = MAIN) -> dict[str, bytes] | None:
        """Of a branch or a commit; `None` if there is no such revision."""
        if revision == MAIN:
            return self.repos[repo]
        return self.branches.get(repo, {}).get(revision, self.snapshots.get(revision))

    def fault(self, request: str) -> Fault | None:
        fault = next((each for each in self.faults if each.times and re.match(each.request, request)), None)
        if fault is not None:
            fault.times -= 1
        return fault


class _Handler(BaseHTTPRequestHandler):
    hub: HubStub
    protocol_version = "HTTP/1.1"
    silent = False

    def log_message(self, *args):
        pass

    def _send(self, status=200, body=b"", **headers):
        if self.silent:
            return
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.get("Content_Length", str(len(body))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self, limit: int | None = None) -> bytes:
        length = int(self.headers.get("Content-Length", 0))
        return self.rfile.read(length if limit is None else min(limit, length))

    def _close(self):
        self.silent = self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _handle(self):
        hub, path = self.hub, unquote(self.path.split("?")[0])
        hub.requests.append(request := f"{self.command} {path}")
        fault = hub.fault(request)
        body = self._body(fault.read if fault else None)
        if fault is None:
            return self._answer(path, body)
        if fault.hang:
            hub.reached.set()
            hub.released.wait()
            return self._close()
        if fault.after:
            self.silent = True
            self._answer(path, body)
            self.silent = False
        if not fault.status:
            return self._close()
        text = fault.body.replace("{authorization}", self.headers.get("Authorization", ""))
        return self._send(fault.status, {"error": text}, **fault.headers)

    def _absent(self, what, code="EntryNotFound", **headers):
        return self._send(404, {"error": what}, X_Error_Code=code, **headers)

    def _answer(self, path, body):
        hub = self.hub
        if path == "/api/whoami-v2":
            if self.headers.get("Authorization") != "Bearer hf_test":
                return self._send(401, {"error": "Invalid credentials"})
            return self._send(body={"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}})
        if path == "/api/validate-yaml":
            return self._send(body={"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            kind = "" if asked.get("type", "model") == "model" else f"{asked['type']}s/"
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            repo, new = kind + name, kind + name not in hub.repos
            if new:
                hub.repos[repo] = {}
                hub.private[repo] = asked.get("private") or asked.get("visibility") == "private"
            return self._send(200 if new else 409, {"url": f"{hub.url}/{repo}", "name": name})
        if match := re.fullmatch(r"/upload/(\w{64})", path):
            if hashlib.sha256(body).hexdigest() != match[1]:
                return self._send(400, {"error": "not what was announced"})
            hub.uploads.append(match[1])
            hub.objects[match[1]] = body
            return self._send()
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for each in objects:
                if each["oid"] not in hub.objects:
                    url = f"{hub.url}/upload/{each['oid']}?signature=hf_signed_by_the_store"
                    each["actions"] = {"upload": {"href": url}}
            return self._send(body={"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(/.*)?", path):
            kind = "" if match[1] == "models" else "datasets/"
            return self._repository(kind + match[2], match[3] or "", body)
        if match := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(*match.groups())
        return self._absent(path, "RepoNotFound")

    def _repository(self, repo, rest, body):
        hub = self.hub
        if repo not in hub.repos:
            return self._absent(repo, "RepoNotFound")
        _, action, revision, folder = [*rest.split("/", 3), "", "", ""][:4]
        if action == "branch":
            hub.branches.setdefault(repo, {}).setdefault(revision, dict(hub.repos[repo]))
            return self._send()
        if action == "refs":
            branches = [{"name": MAIN, "ref": f"refs/heads/{MAIN}", "targetCommit": hub.commit(repo)}]
            return self._send(body={"branches": branches, "tags": [], "converts": []})
        revision = revision or MAIN
        files = hub.files(repo, revision)
        if files is None:
            return self._absent(revision, "RevisionNotFound")
        if action == "preupload":
            answer = [
                {"path": name, "uploadMode": "lfs" if name.endswith(LFS_SUFFIXES) else "regular", "shouldIgnore": False,
                 "oid": _oid(name, files[name]) if name in files else None}
                for name in (file["path"] for file in json.loads(body)["files"])
            ]  # fmt: skip
            return self._send(body={"files": answer})
        if action == "commit":
            return self._commit(repo, revision, body)
        if action == "paths-info":
            asked = parse_qs(body.decode())["paths"]
            return self._send(body=[entry for entry in _entries(files) if entry["path"] in asked])
        if action == "tree":
            recursive = "recursive=true" in urlsplit(self.path).query.lower()
            entries = [entry for entry in _entries(files) if _is_in(entry["path"], folder, recursive)]
            if folder and not entries:
                return self._absent(folder)
            return self._send(body=entries)
        if action in ("", "revision"):
            info = {"id": repo.removeprefix("datasets/"), "sha": hub.commit(repo, revision), "tags": []}
            info |= {"siblings": [{"rfilename": name} for name in files], "private": hub.private.get(repo, False)}
            if "config.json" in files:
                info["config"] = {"model_type": json.loads(files["config.json"]).get("model_type")}
            return self._send(body=info)
        return self._absent(rest)

    def _commit(self, repo, revision, body):
        """All of a commit or nothing, as git does it."""
        hub = self.hub
        files = dict(hub.files(repo, revision))
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header" and value.get("parentCommit") not in (None, hub.commit(repo, revision)):
                return self._send(412, {"error": "A commit has happened since."})
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in hub.objects:
                    return self._send(400, {"error": f"{value['path']} was never uploaded"})
                files[value["path"]] = hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        if revision == MAIN:
            hub.repos[repo] = files
        else:
            hub.branches[repo][revision] = files
        hub.commits.append(repo)
        commit = hub.commit(repo, revision)
        return self._send(body={"commitUrl": f"{hub.url}/{repo}/commit/{commit}", "commitOid": commit})

    def _file(self, repo, revision, name):
        hub = self.hub
        files = hub.files(repo, revision) if repo in hub.repos else None
        if files is None:
            return self._absent(name, "RepoNotFound")
        commit = hub.commit(repo, revision)
        if name not in files:
            return self._absent(name, X_Repo_Commit=commit)
        data = files[name]
        start, _, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = data[int(start) : int(end) + 1 if end else None]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Repo_Commit": commit}
        if "Range" in self.headers:
            headers["Content_Range"] = f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}"
        return self._send(206 if "Range" in self.headers else 200, part, **headers)

    do_GET = do_POST = do_PUT = do_HEAD = _handle  # noqa: N815 - the names that http.server calls


def _oid(name: str, data: bytes) -> str:
    """As the Hub names a file's content: git's hash, or the sha256 of a large file."""
    if name.endswith(LFS_SUFFIXES):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entries(files: dict[str, bytes]) -> list[dict]:
    folders = {name.rsplit("/", depth)[0] for name in files for depth in range(1, name.count("/") + 1)}
    return [{"path": name, "type": "directory", "oid": "0" * 40, "size": 0} for name in sorted(folders)] + [
        {"path": name, "type": "file", "size": len(data), "oid": _oid(name, data)} for name, data in files.items()
    ]


def _is_in(path: str, folder: str, recursive: bool) -> bool:
    below = f"{folder}/*" if folder else "*"
    return fnmatchcase(path, below) and (recursive or "/" not in path.removeprefix(f"{folder}/"))


@contextmanager
def running_hub() -> Iterator[HubStub]:
    """A stub that answers until the block ends."""
    hub = HubStub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.handle_error = lambda *_: None  # a client that is killed breaks its connections
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


def take_for_the_hub(hub: HubStub, monkeypatch, home) -> None:
    """Let this process and its children take the stub for the Hub."""
    for name, value in environment(hub, home).items():
        monkeypatch.setenv(name, value)
    for name, value in {  # huggingface_hub has read the environment already
        "ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": f"{home}/hub",
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # kept from the first use, with the endpoint of then


def environment(hub: HubStub, home, token: str = "hf_test") -> dict[str, str]:
    """Environment variables for a process that should take the stub for the Hub."""
    return {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
