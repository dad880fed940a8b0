"""A judge on a local port: OpenAI's chat completions API with scripted faults, and questions to judge."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread


HANG, CUT, DROP = "hang", "cut in mid-body", "drop without a word"


@dataclass
class Fault:
    """An answer other than a completion."""

    status: int = 200
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)


class JudgeStub:
    """`script` is what the next requests meet, one entry each: a `Fault`, HANG, CUT, DROP, or the text of a reply.

    When it is used up, a reply's scores are a function of the request's messages alone. `requests` are what was asked:
    `(path, headers, body)`.
    """

    def __init__(self):
        self.script: list[Fault | str | None] = []
        self.requests: list[tuple[str, Message, dict]] = []
        self.url = ""
        self.lock, self.ending = Lock(), Event()

    @staticmethod
    def scores(messages: list[dict]) -> tuple[int, int]:
        digest = hashlib.sha256(json.dumps(messages[:2]).encode()).digest()
        return 1 + digest[0] % 10, 1 + digest[1] % 10


class _Handler(BaseHTTPRequestHandler):
    stub: JudgeStub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        stub = self.stub
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with stub.lock:
            stub.requests.append((self.path, self.headers, body))
            step = stub.script.pop(0) if stub.script else None
        if step == HANG:
            stub.ending.wait()
        if step in (HANG, DROP):
            self.close_connection = True
        elif step == CUT:
            self._send(200, self._completion("8 7")[:20], {"Content-Length": "500"})
            self.close_connection = True
        elif isinstance(step, Fault):
            self._send(step.status, step.body.encode(), step.headers)
        else:
            self._send(200, self._completion(step or "{} {}\nFor a reason.".format(*stub.scores(body["messages"]))), {})

    @staticmethod
    def _completion(text: str) -> bytes:
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return json.dumps({"object": "chat.completion", "choices": [choice]}).encode()

    def _send(self, status: int, body: bytes, headers: dict[str, str]):
        self.send_response(status)
        kind = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        for name, value in {**kind, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def running_judge() -> Iterator[JudgeStub]:
    """A stub that answers until the block ends."""
    stub = JudgeStub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"stub": stub}))
    server.daemon_threads = True
    server.block_on_close = False  # clients keep their connections
    stub.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        stub.ending.set()
        server.shutdown()
        thread.join()
        server.server_close()


def benchmark_row(number: int, **fields) -> dict:
    """A question as the benchmark's file has it: five about each image, alternately of both types."""
    names = ("chest_xray", "mri", "histology", "gross", "ct_scan")
    image = f"{number // 5}_F1"
    return {
        "question_id": number,
        "image": f"{image}.jpg",
        "pair_id": image,
        "text": f"What does sign {number} mean?\n<image>",
        "gpt4_answer": f"Sign {number} means that all is well.",
        "fig_label": "Figure 1",
        "fig_caption": f"An image of patient {number // 5}.",
        "in_text_mention": [{"tokens": "As Figure 1 shows, all is well.", "entities": []}],
        "domain": {name: name == names[number % 5] for name in names},
        "type": ("conversation", "detailed_description")[number % 2],
        **fields,
    }


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
