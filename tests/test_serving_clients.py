"""The server and real clients: recorded requests, fields that ask for nothing, data URLs, readers' options, limits."""

import base64
import ctypes
import gzip
import io
import json
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote_from_bytes

import nibabel
import numpy as np
import pytest
from PIL import Image

from lladamedv.evaluation.answering import answer_batch
from lladamedv.processing.medical_images import READING_OPTIONS, read_data_url, read_medical_image
from lladamedv.processing.phantoms import PhantomVQA
from tests.dicom_files import dataset, to_bytes
from tests.faces import Gate, conversation, until


pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from lladamedv import openai_requests  # noqa: E402 - needs the above
from lladamedv.openai_requests import Limits  # noqa: E402
from tests.test_serving import (  # noqa: E402
    CHAT,
    HEAD,
    IMAGE,
    QUESTION,
    RESPONSES,
    TEXT,
    chat_about,
    connect,
    content,
    data_url,
    http,
    image_part,
    received,
    refused,
    served,
    serving_thread,
)


ASKED = {"type": "text", "text": QUESTION}
REQUESTS = {
    f"{file.stem} {number}": request
    for file in sorted((Path(__file__).parent / "cases" / "requests").glob("*.json"))
    for number, request in enumerate(json.loads(file.read_text())["requests"])
}


@pytest.fixture(scope="module")
def image(example):
    return example.image


@pytest.fixture(scope="module")
def url(shipped):
    with served(shipped, name="lladamedv-demo") as address:
        yield address


FAST = {"max_new_tokens": 8, "block_length": 8, "steps": 2}  # options of a quick answer


@pytest.fixture(scope="module")
def truth(shipped, image):
    return quick_truth(shipped, image)


def quick_truth(shipped, image):
    return answer_batch(*shipped, [conversation(image, QUESTION)], **FAST)[0].text


def quick(url, body):
    """The text of a quick answer."""
    reply = http.post(f"{url}{CHAT}", json={"generation_config": FAST} | body)
    assert reply.status_code == 200, reply.text
    return text_of(reply).strip()


def text_of(reply):
    """The answer of either endpoint, whole or streamed."""
    if reply.headers["content-type"].startswith("text/event-stream"):
        events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
        deltas = (event.get("delta") or event["choices"][0]["delta"].get("content") for event in events
                  if event.get("type") == "response.output_text.delta" or event.get("choices"))  # fmt: skip
        return "".join(delta for delta in deltas if isinstance(delta, str))
    body = reply.json()
    if "choices" in body:
        return body["choices"][0]["message"]["content"]
    return body["output"][0]["content"][0]["text"]


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_of_real_clients(url, shipped, image, name):
    """Answers are those of the processor and the model to the same conversation."""
    request = REQUESTS[name]
    body = request["body"]
    given = body.get("messages") or body["input"]
    conversation = [{"role": "system", "content": body["instructions"]}] if "instructions" in body else []
    for message in given:
        parts = [{"type": "text", "text": message["content"]}] if isinstance(message["content"], str) else [
            {"type": "image", "image": image} if "image" in part["type"] else {"type": "text", "text": part["text"]}
            for part in message["content"]
        ]  # fmt: skip
        parts.sort(key=lambda part: part["type"])  # a turn's images come first
        conversation.append({"role": message["role"], "content": parts})
    options = {} if "max_tokens" in body else FAST
    sent = json.loads(json.dumps(body | {"generation_config": options}).replace("PICTURE", data_url(image)))
    reply = http.post(f"{url}{request['path']}", json=sent)
    assert reply.status_code == 200, reply.text
    assert text_of(reply).strip() == answer_batch(*shipped, [conversation], **options)[0].text
    options = body.get("stream_options")
    if options:
        events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
        usage = [event for event in events if event.get("usage")]
        assert usage == events[-1:] and usage[0]["choices"] == [] and usage[0]["usage"]["total_tokens"] > 0


@pytest.mark.parametrize(
    "fields",
    [
        {"include": [], "tools": [], "tool_choice": "auto", "reasoning": {"effort": None, "summary": None}},
        {"best_of": 1, "repetition_penalty": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0, "n": 1},
        {"logprobs": False, "logit_bias": {}, "functions": [], "function_call": "auto", "store": False, "user": "u"},
        {"response_format": {"type": "text"}, "metadata": {"a": "b"}, "stream_options": {"include_obfuscation": False}},
        {"text": {"format": {"type": "text"}, "verbosity": "medium"}, "truncation": "disabled", "modalities": ["text"]},
        dict.fromkeys(
            ("model", "stream", "max_tokens", "max_completion_tokens", "temperature", "stop", "seed", "n", "tools",
             "top_p", "user", "logit_bias", "logprobs", "response_format", "audio")
        ),
        {"temperature": 0, "stop": [], "reasoning_effort": "none", "reasoning": {"effort": "none"}},
        {"generation_config": FAST | {"do_sample": False, "num_beams": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_values_that_ask_for_nothing_pass(url, image, truth, fields):
    assert quick(url, {"messages": chat_about(image)} | fields) == truth


@pytest.mark.parametrize(
    "said",
    [{"content": None, "refusal": None}, {}, {"content": []}, {"content": ""},
     {"content": [{"type": "output_text", "text": "", "annotations": []}], "id": "m", "status": "completed"}],
    ids=str,
)  # fmt: skip
def test_an_empty_answer_can_be_sent_back(url, shipped, image, said):
    """As clients send it; the model sees an empty turn."""
    truth = answer_batch(*shipped, [conversation(image, QUESTION, "", QUESTION)], **FAST)[0].text
    messages = [*chat_about(image), {"role": "assistant"} | said, {"role": "user", "content": QUESTION}]
    assert quick(url, {"messages": messages}) == truth


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n" + bytes(range(256)) + bytes(more) for more in range(3)])
def test_data_urls_in_every_spelling(content):
    """One of the contents needs each padding."""
    plain = base64.b64encode(content).decode()
    escaped = plain.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D")
    for address in (
        f"DATA:IMAGE/PNG;BASE64,{plain}",
        f"data:image/png;name=a.png;charset=utf-8;base64,{plain}",
        f"data:;base64,{plain}",
        f"data:application/octet-stream;base64,{plain}",
        f" data:image/png; base64 ,{plain}\n",
        f"data:image/png;base64,{plain.rstrip('=')}",
        "data:image/png;base64," + "\r\n ".join(textwrap.wrap(plain, 76)),
        f"data:image/png;base64,{base64.urlsafe_b64encode(content).decode()}",
        f"data:image/png;base64,{escaped}",
        f"data:image/png,{quote_from_bytes(content)}",
    ):
        assert read_data_url(address) == content


@pytest.mark.parametrize(
    "form",
    [
        image_part,
        lambda address: {"type": "image_url", "image_url": address},
        lambda address: {"type": "input_image", "image_url": address, "detail": "high"},
    ],
)
def test_images_in_every_form(url, image, truth, form):
    assert quick(url, content(form(data_url(image)), ASKED)) == truth


# Options of the reader


def tiff():
    file = io.BytesIO()
    pages = [example.image for example in PhantomVQA(5, 3)]
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    return file.getvalue()


def nifti():
    volume = np.random.default_rng(0).integers(0, 100, (16, 16, 16, 2)).astype(np.int16)
    volume[4:12, 4:12, 3, 1] = 100
    return nibabel.Nifti1Image(volume, np.eye(4)).to_bytes()


def dicom():
    grey = np.stack([np.asarray(example.image.convert("L")) for example in PhantomVQA(5, 2)]).astype(np.uint16)
    return to_bytes(dataset(grey * 16, bits=12, BurnedInAnnotation="YES"))


def sixteen_bits():
    """Not to be clipped: Pillow's own conversion would show white."""
    file, gradient = io.BytesIO(), np.linspace(20_000, 60_000, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(gradient).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (sixteen_bits, {}),
        (tiff, {"page": 2}),
        (nifti, {"time": 1, "slice": 3, "axis": "coronal", "window": "50/40"}),
        (dicom, {"allow_burned_in": True, "frame": 0, "full_range": True}),
        (dicom, {"allow_burned_in": True, "frame": 1, "window": "1000/500"}),
    ],
)
@pytest.mark.parametrize("beside", [False, True], ids=["in image_url", "beside it"])
def test_options_of_the_reader(url, shipped, make, fields, beside):
    arguments = {option.argument: fields[option.name] for option in READING_OPTIONS if option.name in fields}
    truth = quick_truth(shipped, read_medical_image(make(), **arguments).image)
    address = data_url(make(), "x-any")
    picture = {"type": "input_image", "image_url": address} | fields if beside else image_part(address, **fields)
    assert quick(url, content(picture, ASKED)) == truth


@pytest.mark.parametrize(
    ("make", "fields", "param"),
    [
        (tiff, {}, "page"),
        (tiff, {"page": 3}, "page"),
        (nifti, {}, "time"),
        (nifti, {"time": 0, "slice": 99}, "slice"),
        (nifti, {"time": 0, "window": "wide"}, "window"),
        (nifti, {"time": 0, "axis": "up"}, "axis"),
        (nifti, {"page": 0}, "page"),
        (dicom, {}, "allow_burned_in"),
        (tiff, {"page": 0, "background": "no colour"}, "background"),
    ],
)
def test_messages_name_the_field_of_the_request(url, make, fields, param):
    error = refused(url, json=content(image_part(data_url(make()), **fields)))
    assert error["param"] == f"{IMAGE}.{param}" and f"`{IMAGE}.{param}`" in error["message"]
    body = {"input": [{"type": "input_image", "image_url": data_url(make())} | fields]}
    assert refused(url, path=RESPONSES, json=body)["param"] == f"input[0].{param}"


# What images may take


def peak(function):
    """What a call adds to this process's memory at its highest point, and what is in use after it, in MB.

    Memory that is free, but kept by the C library for each thread, is given back before each look.
    """

    def status(name):
        LIBC.malloc_trim(0)
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1e3

    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = status("VmRSS")
    function()
    return status("VmHWM") - before, status("VmRSS") - before


LIBC = ctypes.CDLL(None)


@pytest.mark.skipif(
    not (Path("/proc/self/clear_refs").exists() and hasattr(LIBC, "malloc_trim")), reason="needs Linux and glibc"
)
@pytest.mark.parametrize(
    ("mode", "side", "count", "status"),
    [
        ("1", 5_700, 4, 400),
        ("1", 2_890, 3, 400),
        ("1", 2_890, 2, 200),
        ("RGBA", 2_890, 1, 200),
        ("I;16", 2_890, 1, 200),
    ],
)
def test_a_request_takes_bounded_memory(url, mode, side, count, status):
    picture = Image.new("L", (side, side), 7).convert(mode) if mode != "I;16" else Image.fromarray(
        np.full((side, side), 7_000, np.uint16)
    )  # fmt: skip
    body = content(*[image_part(data_url(picture))] * count, ASKED)
    del picture
    http.post(f"{url}{CHAT}", json=TEXT)
    replies = []
    # Other threads of the process may be at work in one of them.
    taken = [peak(lambda: replies.append(http.post(f"{url}{CHAT}", json=body))) for _ in range(3)]
    assert [reply.status_code for reply in replies] == [status] * 3, replies[0].text
    most, left = map(min, zip(*taken))
    assert most < 300 and left < 40, taken


def test_long_pictures_are_no_large_squares(url, shipped):
    """Images that share a prompt are padded to squares: 30 000 by 1 pixels would become 900 million."""
    part = image_part(data_url(Image.new("L", (30_000, 1), 7)))
    reply = http.post(f"{url}{CHAT}", json=content(part, part, ASKED))
    assert reply.status_code == 200, reply.text


def large_volume():
    volume = nibabel.Nifti1Image(np.zeros((256, 256, 800), np.uint8), np.eye(4))
    return image_part(data_url(gzip.compress(volume.to_bytes(), 1)), slice=799)


def jpeg_of_a_thousand_scans():
    file = io.BytesIO()
    Image.new("L", (1_600, 1_600), 7).save(file, "JPEG", progressive=True)
    whole = file.getvalue()
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    return image_part(data_url(whole[:-2] + scan * 1_000 + whole[-2:]))


@pytest.mark.parametrize(("make", "seconds"), [(large_volume, 0.03), (jpeg_of_a_thousand_scans, 0.3)])
def test_pictures_that_take_long_are_not_read_to_their_end(shipped, make, seconds):
    part = make()
    with served(shipped, limits=Limits(reading_seconds=seconds)) as url:
        started = time.process_time()
        assert f"takes more than {seconds} seconds" in refused(url, json=content(part))["message"]
        taken = time.process_time() - started
    assert taken < 1.5, "all scans take more than 2 seconds"


def test_the_model_is_not_held_by_reading(shipped, image, monkeypatch):
    """While one answer is denoised, the images of the next are read."""
    read = []
    with served(shipped) as url, ThreadPoolExecutor(2) as pool:
        gate = Gate(monkeypatch, shipped[0])
        real = openai_requests.read_medical_image
        monkeypatch.setattr(openai_requests, "read_medical_image", lambda *a, **k: (read.append(0), real(*a, **k))[1])
        replies = [pool.submit(http.post, f"{url}{CHAT}", json={"messages": chat_about(image)}) for _ in range(2)]
        until(lambda: len(read) == 2 and gate.begun)
        gate.let(1_000)
        assert [reply.result(60).status_code for reply in replies] == [200, 200]


# The end


@pytest.mark.parametrize("finishes", [True, False])
def test_waiting_requests_get_503_at_the_end_and_what_runs_is_finished(shipped, image, truth, monkeypatch, finishes):
    limits = Limits() if finishes else Limits(stopping_seconds=2)
    with serving_thread(shipped, limits=limits) as (url, server), ThreadPoolExecutor(4) as pool:
        gate = Gate(monkeypatch, shipped[0])
        body = {"messages": chat_about(image), "generation_config": FAST}
        running = pool.submit(http.post, f"{url}{CHAT}", json=body)
        until(lambda: gate.begun == 1)
        waiting = [pool.submit(http.post, f"{url}{CHAT}", json={"messages": chat_about(image)}) for _ in range(3)]
        with connect(url, HEAD + b"Content-Length: 99\r\n\r\n{") as uploading:
            time.sleep(0.5)
            server.should_exit = True  # as SIGTERM does
            assert b" 503 " in received(uploading)
        replies = [reply.result(30) for reply in waiting]
        assert [(reply.status_code, reply.json()["error"]["type"]) for reply in replies] == [(503, "server_error")] * 3
        assert not running.done()
        if finishes:
            gate.let(1_000)
            assert text_of(running.result(60)).strip() == truth
        else:
            assert running.result(60).status_code == 503
            gate.let(1_000)
