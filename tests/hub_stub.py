"""A Hub in memory, on a local port: enough of the HTTP API for huggingface_hub to create, upload and download."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote


class HubStub:
    """`repos` maps a repository's id to its files, `private` to its visibility; `requests` are what was asked."""

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}  # large files by their sha256
        self.requests: list[str] = []
        self.url = ""

    def commit(self, repo: str) -> str:
        files = self.repos[repo]
        digest = hashlib.sha1(b"".join(name.encode() + data for name, data in sorted(files.items())))
        return digest.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubStub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _send(self, status=200, body=b"", **headers):
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

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _handle(self):
        hub, path = self.hub, unquote(self.path.split("?")[0])
        hub.requests.append(f"{self.command} {path}")
        body = self._body()
        if path == "/api/whoami-v2":
            if self.headers.get("Authorization") != "Bearer hf_test":
                return self._send(401, {"error": "Invalid credentials"})
            return self._send(body={"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}})
        if path == "/api/validate-yaml":
            return self._send(body={"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            new = repo not in hub.repos
            if new:
                hub.repos[repo] = {}
                hub.private[repo] = asked.get("private") or asked.get("visibility") == "private"
            return self._send(200 if new else 409, {"url": f"{hub.url}/{repo}", "name": repo})
        if match := re.fullmatch(r"/upload/(\w{64})", path):
            hub.objects[match[1]] = body
            return self._send()
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [
                item | {"actions": {"upload": {"href": f"{hub.url}/upload/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return self._send(body={"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path):
            return self._model(match[1], match[2] or "", body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self._file(*match.groups())
        return self._send(404, {"error": path}, X_Error_Code="RepoNotFound")

    def _model(self, repo, rest, body):
        hub = self.hub
        if repo not in hub.repos:
            return self._send(404, {"error": "no such repository"}, X_Error_Code="RepoNotFound")
        if rest.startswith("/preupload/"):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._send(body={"files": files})
        if rest.startswith("/commit/"):
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    hub.repos[repo][value["path"]] = hub.objects[value["oid"]]
            commit = hub.commit(repo)
            return self._send(body={"commitUrl": f"{hub.url}/{repo}/commit/{commit}", "commitOid": commit})
        files = [
            {"rfilename": name, "path": name, "type": "file", "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in hub.repos[repo].items()
        ]
        if rest.startswith("/tree/"):
            return self._send(body=files)
        if rest == "" or rest.startswith("/revision/"):
            return self._send(
                body={"id": repo, "modelId": repo, "sha": hub.commit(repo), "siblings": files, "tags": []}
            )
        return self._send(404, {"error": rest}, X_Error_Code="EntryNotFound")

    def _file(self, repo, name):
        hub = self.hub
        if name not in hub.repos.get(repo, {}):
            if repo not in hub.repos:
                return self._send(404, {"error": name}, X_Error_Code="RepoNotFound")
            return self._send(404, {"error": name}, X_Error_Code="EntryNotFound", X_Repo_Commit=hub.commit(repo))
        data = hub.repos[repo][name]
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Repo_Commit": hub.commit(repo)}
        return self._send(206 if start else 200, data[start:], **headers)

    do_GET = do_POST = do_PUT = do_HEAD = _handle  # noqa: N815 - the names that http.server calls


@contextmanager
def running_hub() -> Iterator[HubStub]:
    """A stub that answers until the block ends."""
    hub = HubStub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def environment(hub: HubStub, home, token: str = "hf_test") -> dict[str, str]:
    """Environment variables for a process that should take the stub for the Hub."""
    return {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
