"""The server over real HTTP, by OpenAI's own client: answers, streams, queues, disconnections, and what is refused."""

import base64
import gzip
import io
import json
import logging
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from lladamedv import LLaDAMedVGenerationOutput, cli
from lladamedv.conversation import find_evidence, reply_to
from lladamedv.evaluation.answering import answer_batch
from lladamedv.modeling_lladamedv.continuous_batching_lladamedv import ContinuousBatch
from lladamedv.modeling_lladamedv.generation_options_lladamedv import OPTIONS
from lladamedv.processing.phantoms import PhantomVQA
from tests.faces import Gate, black_png, conversation, no_tensors_left, until


httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from prometheus_client.parser import text_string_to_metric_families  # noqa: E402 - needs the above

from lladamedv import serving  # noqa: E402 - needs the above
from lladamedv.openai_requests import Limits  # noqa: E402


http = httpx.Client(timeout=30)
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
LIMIT = 200_000  # bytes of a request
QUESTION = "Describe the image."
SECRET = "Doe^Jane"
TEXT = {"messages": [{"role": "user", "content": "Hello?"}]}


@pytest.fixture(scope="module")
def image(example):
    return example.image


@contextmanager
def serving_thread(shipped, **options):
    """URL of a server in a thread of its own, and the server."""
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server = serving.make_server(serving.build_api(*shipped, **{"name": "demo"} | options))
    thread = Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        listening.close()
    assert not thread.is_alive()


@contextmanager
def served(shipped, **options):
    with serving_thread(shipped, **options) as (url, _):
        yield url


@pytest.fixture(scope="module")
def url(shipped):
    with served(shipped, max_upload_size=LIMIT, max_positions=3_500) as address:
        yield address


def client_of(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def client(url):
    return client_of(url)


def data_url(content, kind="png"):
    if isinstance(content, Image.Image):
        file = io.BytesIO()
        content.save(file, "PNG")
        content = file.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def chat_about(image, question=QUESTION):
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def ask(client, messages, generation_config=None, **options):
    if generation_config is not None:
        options["extra_body"] = {"generation_config": json.dumps(generation_config)}
    return client.chat.completions.create(model="demo", messages=messages, **options)


def collect(stream):
    """Text, finish reason and usage of a stream, and its pieces."""
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    return "".join(pieces), chunks[-1].choices[0].finish_reason, chunks[-1].usage, pieces


def expected(shipped, image, *texts, **options):
    return answer_batch(*shipped, [conversation(image, *(texts or (QUESTION,)))], **options)[0]


def ask_length(shipped, image):
    """Tokens of the prompt of `QUESTION`, and of its canvas."""
    ids = shipped[1].apply_chat_template(
        conversation(image, QUESTION), add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    return len(ids[0]) + shipped[0].generation_config.max_new_tokens


def numbers(url):
    """What `/metrics` says, without its prefix."""
    families = text_string_to_metric_families(http.get(f"{url}/metrics").text)
    return {each.name.removeprefix("lladamedv_"): each.samples[0].value for each in families}


# Answers


@pytest.fixture
def passes(shipped, monkeypatch):
    """A list that gets an entry for each forward pass."""
    seen, step = [], type(shipped[0]).denoising_step
    monkeypatch.setattr(type(shipped[0]), "denoising_step", lambda model, state: seen.append(0) or step(model, state))
    return seen


@pytest.mark.parametrize(
    ("fields", "config", "same"),
    [
        ({}, None, {}),
        ({"max_tokens": 8}, None, {"max_new_tokens": 8}),
        ({"max_completion_tokens": 40}, {"max_new_tokens": 8}, {"max_new_tokens": 40}),
        ({}, {"steps": 6}, {"steps": 6}),
        ({}, {"block_length": 24, "confidence_threshold": 0.5}, {"block_length": 24, "confidence_threshold": 0.5}),
        ({}, {"use_cache": True, "cfg_scale": 3, "min_new_tokens": 24},
         {"use_cache": True, "cfg_scale": 3, "min_new_tokens": 24}),
        ({}, {"repetition_penalty": 3.0}, {"repetition_penalty": 3.0}),
        ({}, {"image_guidance_scale": 3}, {"image_guidance_scale": 3}),
        ({"max_tokens": 12}, {"block_length": 3, "remasking": "margin"},
         {"max_new_tokens": 12, "block_length": 3, "remasking": "margin"}),
        ({"temperature": 5, "seed": 3}, {"steps": 3}, {"temperature": 5, "steps": 3}),  # half characters, too
        ({"stop": " on"}, None, {"stop_strings": " on"}),
    ],
)  # fmt: skip
def test_answers_are_those_of_generate(client, shipped, image, passes, fields, config, same):
    torch.manual_seed(3)
    truth = expected(shipped, image, **same)
    passes.clear()
    reply = ask(client, chat_about(image), config, **fields)
    assert len(passes) == truth.num_forwards
    text, finish, usage, pieces = collect(ask(client, chat_about(image), config, stream=True, **fields))
    assert reply.choices[0].message.content.strip() == truth.text != ""
    assert text == reply.choices[0].message.content
    prompt = shipped[1].apply_chat_template(
        conversation(image, QUESTION), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    counts = (len(prompt["input_ids"][0]), truth.num_tokens, len(prompt["input_ids"][0]) + truth.num_tokens)
    for each in (reply.usage, usage):
        assert (each.prompt_tokens, each.completion_tokens, each.total_tokens) == counts
    canvas = same.get("max_new_tokens", 24)
    assert reply.choices[0].finish_reason == finish == ("length" if truth.num_tokens == canvas else "stop")
    assert len(pieces) >= -(-truth.num_tokens // same.get("block_length", 8)), "a piece for each block"
    assert reply.model == "demo"


@pytest.mark.parametrize(
    "stop", ["ons", ["nowhere", "lesion", "t"], "shows three large ring", "?", "brown stain.", "longer than all " * 20]
)
def test_stops_end_the_text_wherever_they_occur(client, shipped, image, stop):
    full = expected(shipped, image).text
    places = [full.find(each) for each in ([stop] if isinstance(stop, str) else stop) if each in full]
    truth = full[: min(places)] if places else full
    reply = ask(client, chat_about(image), stop=stop)
    text, finish, usage, _ = collect(ask(client, chat_about(image), stop=stop, stream=True))
    assert text == reply.choices[0].message.content == truth
    assert finish == reply.choices[0].finish_reason == "stop"
    tokens = shipped[1].tokenizer(full, add_special_tokens=False).input_ids
    ends = np.cumsum([len(shipped[1].decode([token])) for token in tokens])
    assert usage.completion_tokens == reply.usage.completion_tokens == (ends <= len(truth)).sum()


def test_characters_of_several_tokens_are_sent_whole(client, shipped, monkeypatch):
    text = "Größe 🫁 3 µm"
    tokens = shipped[1].tokenizer(text, add_special_tokens=False).input_ids
    assert len(tokens) > len(text)

    def submit(batch, input_ids, streamer, **options):
        future = Future()
        streamer.put(input_ids)
        try:
            for token in tokens:
                streamer.put(torch.tensor([token]))
            future.set_result(LLaDAMedVGenerationOutput())
        except Exception as error:
            future.set_exception(error)
        return SimpleNamespace(future=future)

    monkeypatch.setattr(ContinuousBatch, "submit", submit)
    joined, _, usage, pieces = collect(ask(client, TEXT["messages"], stream=True))
    assert joined == text and "\ufffd" not in "".join(pieces) and usage.completion_tokens == len(tokens)
    assert collect(ask(client, TEXT["messages"], stream=True, stop="e 🫁 3"))[0] == "Größ"


def test_a_fixed_text_behind_the_answer_does_not_make_it_longer(client, shipped, image, monkeypatch):
    monkeypatch.setattr(shipped[0].generation_config, "generation_suffix", " The tissue shows a stain.")
    truth = expected(shipped, image)
    reply = ask(client, chat_about(image)).choices[0]
    assert (reply.message.content, reply.finish_reason) == (truth.text, "stop")
    assert truth.text.endswith("stain. The tissue shows a stain.")
    assert ask(client, chat_about(image), max_tokens=8).choices[0].finish_reason == "length"


def test_noise_is_drawn_anew_without_a_seed(client, image):
    def draw(**fields):
        config = {"max_new_tokens": 8, "steps": 1}
        return ask(client, chat_about(image), config, temperature=5, **fields).choices[0].message.content

    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    draw(seed=1)
    first = draw()
    draw(seed=1)
    assert draw() != first


@pytest.mark.parametrize("role", ["system", "developer"])
def test_turns_and_system_texts(client, shipped, image, role):
    system, texts = "You answer in one word.", ("Is there a lesion?", "Yes", "On which side?")
    chat = [{"role": "system", "content": system}, *conversation(image, *texts)]
    truth = answer_batch(*shipped, [chat])[0].text
    said = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
    messages = [{"role": role, "content": system}, *chat_about(image, texts[0]), *said[1:]]
    assert ask(client, messages).choices[0].message.content == truth != expected(shipped, image, texts[0]).text


def test_text_alone(client, shipped):
    truth = answer_batch(*shipped, [[{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]])[0].text
    reply = ask(client, [{"role": "user", "content": QUESTION}], extra_body={"generation_config": None})
    assert reply.choices[0].message.content == truth != ""
    assert client.responses.create(model="demo", input=QUESTION).output_text == truth
    assert ask(client, [{"role": "user", "content": "What do <image> and <|mdm_mask|> mean?"}]).usage.prompt_tokens > 10


def test_responses(client, shipped, image):
    parts = [{"type": "input_image", "image_url": data_url(image)}, {"type": "input_text", "text": QUESTION}]
    truth = expected(shipped, image)
    for given in (parts, [{"role": "user", "content": parts}]):
        reply = client.responses.create(model="demo", input=given)
        assert reply.output_text == truth.text and reply.usage.output_tokens == truth.num_tokens
    with client.responses.stream(model="demo", input=parts) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(deltas) == stream.get_final_response().output_text == truth.text and len(deltas) == 3
    short = client.responses.create(
        model="demo", input=parts, instructions="Be brief.", max_output_tokens=8,
        extra_body={"generation_config": {"steps": 2}},
    )  # fmt: skip
    assert (short.status, short.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    system = [{"role": "system", "content": "Be brief."}, *conversation(image, QUESTION)]
    assert short.output_text == answer_batch(*shipped, [system], max_new_tokens=8, steps=2)[0].text


def test_evidence_on_request(client, shipped, image):
    """Where in the picture the answer comes from, as the model itself says it; in both forms of the API."""
    reply = reply_to(*shipped, image, QUESTION)
    values, whole_fall = find_evidence(*shipped, image, QUESTION, reply)
    parts = [{"type": "input_image", "image_url": data_url(image)}, {"type": "input_text", "text": QUESTION}]
    wanted = {"extra_body": {"evidence": True}}
    for found in (
        ask(client, chat_about(image), **wanted),
        client.responses.create(model="demo", input=[{"role": "user", "content": parts}], **wanted),
    ):
        np.testing.assert_allclose(found.evidence["maps"], values[None], atol=1e-3)
        assert found.evidence["whole_fall"] == [pytest.approx(whole_fall, abs=1e-3)]
        assert found.evidence["log_likelihood"] < 0
    short = {"max_new_tokens": 8, "block_length": 8, "steps": 1}
    assert not hasattr(ask(client, chat_about(image), short), "evidence")


def test_unusual_pictures_are_told(client, image, photograph):
    for picture, told in ((Image.open(photograph).resize((128, 128)), True), (image, False)):
        whole = ask(client, chat_about(picture), max_tokens=8)
        chunk = next(iter(ask(client, chat_about(picture), max_tokens=8, stream=True)))
        parts = [{"type": "input_image", "image_url": data_url(picture)}, {"type": "input_text", "text": QUESTION}]
        response = client.responses.create(model="demo", input=parts, max_output_tokens=8)
        for reply in (whole, chunk, response):
            assert ("The picture is unlike" in (getattr(reply, "warning", None) or "")) is told


def test_many_at_once_are_not_mixed_up(url, shipped):
    examples = list(PhantomVQA(77, 12))
    truths = [expected(shipped, example.image, example.question).text for example in examples]
    assert len(set(truths)) > 6

    def one(number):
        example, client = examples[number % 12], client_of(url)
        options = {"stream": True} if number % 2 else {}
        reply = ask(client, chat_about(example.image, example.question), **options)
        return collect(reply)[0] if number % 2 else reply.choices[0].message.content

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(one, range(12))) == truths


def test_a_short_question_overtakes_a_long_answer(url, shipped, image):
    with ThreadPoolExecutor(1) as pool:
        config = {"max_new_tokens": 96, "block_length": 8, "steps": 96, "min_new_tokens": 96}
        before = numbers(url)["requests"]
        long = pool.submit(ask, client_of(url), chat_about(image), config)
        until(lambda: numbers(url)["requests"] > before)
        short = ask(client_of(url), chat_about(image), {"max_new_tokens": 1, "block_length": 1, "steps": 1})
        assert short.usage.completion_tokens == 1 and not long.done()
        assert long.result(120).usage.completion_tokens == 96


def test_image_reliance(client, shipped, image):
    """A field of its own at the end of the answer, where it is asked for and there is a picture."""
    config = {"output_image_reliance": True, "max_new_tokens": 8, "block_length": 8, "steps": 4}
    truth = pytest.approx(expected(shipped, image, **config).image_reliance, abs=1e-3)
    parts = [{"type": "input_image", "image_url": data_url(image)}, {"type": "input_text", "text": QUESTION}]
    given = {"model": "demo", "input": [{"role": "user", "content": parts}]}
    given["extra_body"] = {"generation_config": json.dumps(config)}
    assert ask(client, chat_about(image), config).image_reliance == truth
    assert [*ask(client, chat_about(image), config, stream=True)][-1].image_reliance == truth
    assert client.responses.create(**given).image_reliance == truth
    assert [*client.responses.create(**given, stream=True)][-1].response.image_reliance == truth
    assert not hasattr(ask(client, chat_about(image)), "image_reliance")
    assert not hasattr(ask(client, TEXT["messages"], config), "image_reliance")
    with pytest.raises(openai.BadRequestError, match="image_guidance_scale` is not allowed"):
        ask(client, TEXT["messages"], {"image_guidance_scale": 1})


def test_mixed_options_and_pictures_at_once(url, shipped):
    options = [
        {}, {"use_cache": True}, {"steps": 6}, {"block_length": 24, "confidence_threshold": 0.5}, {"cfg_scale": 1.5},
        {"max_new_tokens": 8}, {"remasking": "margin"}, {"use_cache": True, "repetition_penalty": 2.0},
    ]  # fmt: skip
    examples = list(PhantomVQA(99, 8))
    truths = [expected(shipped, each.image, each.question, **chosen).text for each, chosen in zip(examples, options)]

    def one(example, chosen):
        return ask(client_of(url), chat_about(example.image, example.question), chosen).choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            assert [text.strip() for text in pool.map(one, examples, options)] == truths


# What the server says of itself, and what it has not


def test_models_and_health(client, url):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("org/other")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    assert http.get(f"{url}/health").json() == {"status": "ok"}
    for path in ("/health", "/v1/models", "/v1/models/demo"):
        reply = http.head(f"{url}{path}")
        assert reply.status_code == 200 and not reply.content
        assert http.get(f"{url}{path}/").json() == http.get(f"{url}{path}").json()
    assert http.post(f"{url}{CHAT}/", json=TEXT).status_code == 200


def test_metrics(shipped, image):
    with served(shipped) as url:
        for _ in range(2):
            count = ask(client_of(url), chat_about(image)).usage.completion_tokens
        until(lambda: not numbers(url)["running"])  # the answer is there a moment before its row has left
        found = numbers(url)
    passes = expected(shipped, image).num_forwards * 2
    assert found.pop("image_cache_bytes") > 0
    assert found == {
        "waiting": 0, "running": 0, "positions": 0, "requests": 2, "finished": 2, "cancelled": 0, "failed": 0,
        "tokens": 2 * count, "passes": passes, "rows": passes, "image_cache_hits": 1, "image_cache_misses": 1,
    }  # fmt: skip


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"stop": ["lesion"]}, {"max_tokens": 10_000}], ids=str)
def test_what_an_answer_took_is_free_at_its_end(url, image, fields):
    body = {"messages": chat_about(image), "generation_config": {"use_cache": True}} | fields
    http.post(f"{url}{CHAT}", json=body)
    with no_tensors_left(lambda: not numbers(url)["running"]):
        for _ in range(3):
            http.post(f"{url}{CHAT}", json=body)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_server_whose_batch_has_ended_says_so(shipped, image, monkeypatch, caplog):
    def fail(batch):
        raise OSError(SECRET)

    with served(shipped) as url:
        monkeypatch.setattr(ContinuousBatch, "step", fail)
        with pytest.raises(openai.InternalServerError):
            ask(client_of(url), chat_about(image))
        until(lambda: http.get(f"{url}/health").status_code == 503)
        assert refused(url, 503, json=TEXT)["message"].endswith("must be started again.")
        assert numbers(url)["failed"] == 1
    assert "the batch has ended: OSError" in caplog.text and SECRET not in caplog.text


def test_nothing_else_is_there(url):
    for method, path, status in (
        ("POST", "/v1/completions", 404), ("GET", "/docs", 404), ("GET", "/openapi.json", 404), ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
    ):  # fmt: skip
        reply = http.request(method, f"{url}{path}", json=TEXT if method == "POST" else None)
        assert reply.status_code == status and reply.json()["error"]["message"]
    for name in ("org/other", "", 5):
        assert refused(url, 404, json=TEXT | {"model": name})["param"] == "model"
        assert refused(url, 404, RESPONSES, json={"model": name, "input": "?"})["param"] == "model"


# What is refused


def refused(url, status=400, path=CHAT, **request):
    """The error of a request that must be refused."""
    reply = http.post(f"{url}{path}", **request)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert "Traceback" not in reply.text and len(reply.text) < 3_000
    return error


def content(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}]}


IMAGE = "messages[0].content[0].image_url"
JSON = {"content-type": "application/json"}


def image_part(url, **options):
    return {"type": "image_url", "image_url": {"url": url} | options}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": ["Hello?"]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "5"}]}, "messages[0].role"),
        ({"messages": [{"content": "5"}]}, "messages[0].role"),
        (TEXT | {"evidence": True}, "evidence"),
        (content(image_part("data:,")) | {"evidence": True, "stream": True}, "evidence"),
        (TEXT | {"evidence": 1}, "evidence"),
        ({"messages": [{"role": "user", "content": "5", "weight": 0}]}, "messages[0].weight"),
        ({"messages": [{"role": "user", "content": " \n\u00a0\u200b"}]}, "messages[0].content"),
        (content({"type": "text", "text": ""}, {"type": "input_text", "text": "\t"}), "messages[0].content"),
        (content({"type": "text", "text": "a", "annotation": 1}), "messages[0].content[0].annotation"),
        (content(image_part("data:,", detail="best")), f"{IMAGE}.detail"),
        ({"messages": [{"role": "system", "content": [image_part("data:,")]}]}, f"{IMAGE}.url"),
        ({"messages": [{"role": "assistant", "content": [image_part("data:,")]}]}, f"{IMAGE}.url"),
        (content(*[image_part("data:,")] * 5), "messages"),
        (content({"type": "input_image", "file_id": "file-1"}), "messages[0].content[0].file_id"),
        (content(image_part("data:,", slice="3")), f"{IMAGE}.slice"),
        (content({"page": 1} | image_part("data:,", page=1)), f"{IMAGE}.page"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (content("Hello?"), "messages[0].content[0].type"),
        (content({"type": ["text"]}), "messages[0].content[0].type"),
        (content({"type": "text", "text": "\ud800 🫁"}), "messages[0].content[0].text"),
        (content(image_part(5)), f"{IMAGE}.url"),
        ({"messages": [{"role": "user", "content": "x" * 100_001}]}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 5_000}]}, "messages"),  # longer than the context
        (TEXT | {"stream": "yes"}, "stream"),
        (TEXT | {"seed": 2**63}, "seed"),
        (TEXT | {"seed": True}, "seed"),
        (TEXT | {"temperature": -1}, "temperature"),
        (TEXT | {"max_tokens": 10**9}, "max_tokens"),
        (TEXT | {"max_tokens": 2_040}, "max_tokens"),  # with the prompt longer than the context
        (TEXT | {"generation_config": {"max_new_tokens": 2_040}}, "generation_config.max_new_tokens"),
        (TEXT | {"max_tokens": 8, "max_completion_tokens": 9}, "max_completion_tokens"),
        (TEXT | {"stop": ""}, "stop"),
        (TEXT | {"stop": ["\udc00"]}, "stop"),
        (TEXT | {"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        (TEXT | {"n": 2}, "n"),
        (TEXT | {"n": True}, "n"),  # is no number
        (TEXT | {"top_p": True}, "top_p"),
        (TEXT | {"tools": [{"type": "function"}]}, "tools"),
        (TEXT | {"reasoning": {"effort": "high"}}, "reasoning"),
        (TEXT | {"stream_options": True}, "stream_options"),
        (TEXT | {"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        (TEXT | {"gen_length": 5}, "gen_length"),
        (TEXT | {"\ud800": 5}, "\ufffd"),
        (TEXT | {"generation_config": "[" * 50_000}, "generation_config"),
        (TEXT | {"generation_config": {"gen_length": 5}}, "generation_config.gen_length"),
        (TEXT | {"generation_config": {"do_sample": True}}, "generation_config.do_sample"),
        (TEXT | {"generation_config": {"eos_token_id": 5}}, "generation_config.eos_token_id"),
        (TEXT | {"generation_config": {"block_length": 7}}, "generation_config.block_length"),
        (TEXT | {"generation_config": {"steps": 25}}, "generation_config.steps"),
        (TEXT | {"generation_config": {"cache_implementation": "dual"}}, "generation_config.cache_implementation"),
        (TEXT | {"generation_config": {"stop_strings": {}, "steps": 0}}, "generation_config.stop_strings"),
        (TEXT | {"max_tokens": 1_900, "generation_config": {"cfg_scale": 2, "block_length": 1, "steps": 1_900}},
         "max_tokens"),  # twice as many positions as the server's
        ({"input": None}, "input"),
        ({"input": [{"type": "input_text", "text": " "}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "1"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": "?"}, {"type": "function_call"}]}, "input[1].type"),
        ({"input": [{"type": "reasoning", "content": 5}, {"role": "user", "content": "?"}]}, "input[0].type"),
        ({"input": "?", "instructions": " "}, "instructions"),
        ({"input": "?", "max_output_tokens": 2_040}, "max_output_tokens"),
        ({"input": "word " * 5_000}, "input"),
        ({"input": "?", "include": ["message.output_text.logprobs"]}, "include"),
        ({"input": "?", "instructions": 5}, "instructions"),
        ({"input": "?", "previous_response_id": "r"}, "previous_response_id"),
    ],
)  # fmt: skip
def test_wrong_requests(url, body, param):
    """Also when it would be too late for a status in a stream."""
    path, started = RESPONSES if "input" in body else CHAT, time.monotonic()
    for stream in (None, True):
        error = refused(url, path=path, content=json.dumps({"stream": stream} | body), headers=JSON)
        assert error["param"] == param and f"`{param}`" in error["message"]
        assert error["type"] == "invalid_request_error"
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "value", ["x", [], {}, [5], True, -1, 0, 0.5, 10**400, 2**31, 1e308, "\ud800"],
    ids=["text", "list", "object", "numbers", "true", "negative", "zero", "half", "huge", "2^31", "1e308", "surrogate"],
)  # fmt: skip
def test_any_value_of_any_option_is_answered_or_refused(url, value):
    for option in (name for name, each in OPTIONS.items() if each.role == "answer"):
        body = TEXT | {"generation_config": json.dumps({"max_new_tokens": 8, "steps": 2} | {option: value})}
        reply = http.post(f"{url}{CHAT}", json=body)
        assert reply.status_code in (200, 400), (option, reply.text)
        if reply.status_code == 400:
            error = reply.json()["error"]
            named = f"`generation_config.{option}`" in error["message"]
            assert named or "logits are not finite" in error["message"], (option, error)


TWICE = json.dumps(TEXT)[:-1].encode() + b', "temperature": 0, "temperature": 1}'


@pytest.mark.parametrize(
    ("body", "param"),
    [
        *((body, None) for body in (b"", b"{", b"[]", b'"text"', b"\xff\xfe", b"[" * 100_000, b"1" * 5_000, b"null")),
        (b'{"seed": NaN}', None), (TWICE, "temperature"),
    ],
)  # fmt: skip
def test_bodies_that_are_no_objects_or_say_a_thing_twice(url, body, param):
    assert refused(url, content=body, headers=JSON)["param"] == param


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({"content-type": "text/plain"}, "Content-Type"),
        ({"content-type": "application/x-www-form-urlencoded"}, "Content-Type"),
        ({"content-type": "multipart/form-data; boundary=x"}, "Content-Type"),
        (JSON | {"content-encoding": "gzip"}, "Content-Encoding"),
    ],
)
def test_other_content_types(url, headers, param):
    body = gzip.compress(json.dumps(TEXT).encode()) if "content-encoding" in headers else json.dumps(TEXT)
    assert refused(url, 415, content=body, headers=headers)["param"] == param
    assert http.post(url + CHAT, json=TEXT, headers={"content-type": "Application/JSON"}).status_code == 200


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_nothing_is_fetched(url, path, tmp_path):
    file = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(file)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)
        port = listening.getsockname()[1]
        for address in (
            f"HTTP://localhost:{port}/x.png", f"//127.0.0.1:{port}/x.png", str(file), f"file://{file}",
            base64.b64encode(file.read_bytes()).decode(), "",
        ):  # fmt: skip
            part = {"type": "input_image", "image_url": address}
            body = content(part) if path == CHAT else {"input": [part]}
            assert "nothing is fetched" in refused(url, path=path, json=body)["message"]
        with pytest.raises(TimeoutError):
            listening.accept()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (data_url(b"no picture"), "is of no known format"),
        (data_url(b"\x1f\x8b broken"), "cannot be read"),
        (data_url(black_png(6_000, 6_000)), "6000 by 6000 pixels; allowed are 1 to 8388608"),
        (data_url(bytes(128) + b"DICM"), "TransferSyntaxUID is missing"),
        (data_url(b""), "is of no known format"),
        ("data:image/png;base64", ""),
        ("data:image/png;base64,%%%", ""),
        ("data:image/png,abc", ""),
        ("data:image/png;base64,é", ""),
        ("data:image/png;base64,A", ""),
        ("data:image/png;base64,AA=AAAAA", ""),
    ],
    ids=str,
)
def test_pictures_that_are_refused(url, address, message):
    error = refused(url, json=content(image_part(address)))
    assert error["param"] == f"{IMAGE}.url" and message in error["message"]


# Doors


def test_large_requests_are_refused_while_they_arrive(url, image):
    assert "200000 bytes" in refused(url, 413, content=bytes(LIMIT + 1), headers=JSON)["message"]

    def chunks():
        for _ in range(100):
            yield bytes(LIMIT // 10)

    refused(url, 413, content=chunks(), headers=JSON)
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client_of(url), chat_about(image, "x" * LIMIT))
    assert caught.value.status_code == 413
    refused(url, 400, content=bytes(LIMIT), headers=JSON)


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def connect(url, *parts):
    """A connection on which so much was sent."""
    connection = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
    connection.settimeout(10)
    for part in parts:
        connection.sendall(part)
    return connection


def received(connection):
    """All that comes until the server closes the connection."""
    return b"".join(iter(lambda: connection.recv(1000), b""))


def test_slow_senders_hold_no_places(shipped):
    limits = Limits(first_seconds=0.5, header_seconds=0.5)
    with served(shipped, max_queue=0, limits=limits) as url, ExitStack() as stack:
        bodies = [stack.enter_context(connect(url, HEAD + b"Content-Length: 99\r\n\r\n{")) for _ in range(20)]
        heads = [stack.enter_context(connect(url, *part)) for part in ([], [b"GET"], [b"GET /health HTTP/1.1\r\nHo"])]
        assert http.post(f"{url}{CHAT}", json=TEXT).status_code == 200
        for slow in bodies:
            reply = received(slow)
            assert reply.startswith(b"HTTP/1.1 408") and b"connection: close" in reply.lower()
        assert [slow.recv(100) for slow in heads] == [b""] * 3, "closed"
        kept = stack.enter_context(connect(url, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"))
        assert kept.recv(1000).startswith(b"HTTP/1.1 200")
        kept.sendall(b"GET")
        assert received(kept) in (b"", b'{"status":"ok"}'), "closed, too"


def test_uploads_together_take_bounded_memory(shipped):
    with served(shipped, max_queue=1, max_upload_size=LIMIT) as url, ExitStack() as stack:
        slow = [
            stack.enter_context(connect(url, HEAD + b"Content-Length: 190000\r\n\r\n" + bytes(150_000))) for _ in "123"
        ]
        assert slow[0].recv(100).startswith(b"HTTP/1.1 408"), "the oldest makes room"
        assert http.post(f"{url}{CHAT}", json=TEXT).status_code == 200


def test_what_is_no_http_gets_json(url):
    with connect(url, b"GET / HTTP/1.1\r\nno header\r\n\r\n") as connection:
        reply = received(connection)
    assert b" 400 " in reply and json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_web_pages_are_kept_out(url):
    for method, path in (("POST", CHAT), ("OPTIONS", CHAT), ("GET", "/v1/models"), ("POST", RESPONSES)):
        for origin in ("http://evil.example", "null", url):
            reply = http.request(
                method, f"{url}{path}", json=TEXT if method == "POST" else None,
                headers={"Origin": origin, "Access-Control-Request-Method": "POST"},
            )  # fmt: skip
            assert reply.status_code == 403 and reply.json()["error"]["param"] == "Origin"
            assert not [name for name in reply.headers if name.startswith("access-control")]


def test_foreign_names_are_kept_out(url, shipped):
    port = url.rpartition(":")[2]
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", f"127.0.0.1@evil:{port}"):
        reply = http.get(f"{url}/health", headers={"Host": host})
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "Host"
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "localhost", f"LocalHost:{port}"):
        assert http.get(f"{url}/health", headers={"Host": host}).status_code == 200
    with served(shipped, hosts=None) as anywhere:
        assert http.get(f"{anywhere}/health", headers={"Host": "evil.example"}).status_code == 200


# Queue, and clients that leave


def test_the_queue_is_bounded_and_cancelled_waiters_are_dropped(shipped, image, monkeypatch):
    truths = [expected(shipped, image, question).text for question in (QUESTION, "Is there a lesion?")]
    positions = ask_length(shipped, image) * 3 // 2  # room for one at a time
    with served(shipped, max_queue=0, max_positions=positions) as url, ThreadPoolExecutor(4) as pool:
        gate = Gate(monkeypatch, shipped[0])
        running = pool.submit(ask, client_of(url), chat_about(image))
        until(lambda: gate.begun == 1)

        def probe():  # answered at once, where there is a place for it
            return http.post(f"{url}{CHAT}", json={})

        def waits():
            while True:  # `until` sees it refused, and so may it be itself by a probe
                try:
                    return ask(client_of(url), chat_about(image, "Is there a lesion?"))
                except openai.RateLimitError:
                    time.sleep(0.02)

        until(lambda: probe().status_code == 400)
        with pytest.raises(httpx.ReadTimeout):
            body = {"messages": chat_about(image, "This is a longer question, is it not?")}
            http.post(f"{url}{CHAT}", json=body, timeout=0.5)
        until(lambda: probe().status_code == 400)
        waiting = pool.submit(waits)
        until(lambda: probe().status_code == 429)
        reply = http.post(f"{url}{CHAT}", json=TEXT)
        assert reply.status_code == 429
        assert int(reply.headers["retry-after"]) >= 1 and reply.json()["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            ask(client_of(url), chat_about(image))
        assert http.get(f"{url}/health").status_code == 200, "that needs no place"
        gate.let(1_000)
        assert [future.result(60).choices[0].message.content for future in (running, waiting)] == truths
        assert gate.begun == 2


@pytest.mark.parametrize("stream", [True, False])
def test_an_abandoned_answer_stops(url, shipped, image, monkeypatch, stream):
    truth = expected(shipped, image).text
    gate = Gate(monkeypatch, shipped[0])
    body = {"messages": chat_about(image), "stream": stream}
    with httpx.Client(timeout=60) as browser:
        if stream:
            gate.let(8)
            with browser.stream("POST", f"{url}{CHAT}", json=body) as reply:
                lines = (line for line in reply.iter_lines() if '"content":"' in line and '"content":""' not in line)
                assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["delta"]["content"]
        else:
            with pytest.raises(httpx.ReadTimeout):
                browser.post(f"{url}{CHAT}", json=body, timeout=1)
    gate.let(1)  # the pass that was under way; at the next, its place is free
    until(lambda: numbers(url)["running"] == 0)
    before = gate.passes
    gate.let(1_000)
    reply = ask(client_of(url), chat_about(image))
    assert reply.choices[0].message.content == truth
    whole = expected(shipped, image).num_forwards
    assert gate.passes - before == whole * 2
    assert gate.begun == 3


def test_errors_tell_nothing_and_nothing_is_logged(url, shipped, image, monkeypatch, caplog, capfd):
    def fail(*arguments):
        raise RuntimeError(f"{SECRET} went wrong")

    client = client_of(url)
    messages = chat_about(image, f"{SECRET} lesion?")
    with caplog.at_level(logging.DEBUG):
        ask(client, messages)
        collect(ask(client, messages, stream=True))
        client.responses.create(model="demo", input=SECRET, instructions=SECRET, user=SECRET)
        refused(url, json={"messages": messages, "model": SECRET}, status=404)
        refused(url, json={"messages": messages, SECRET: 5})
        http.get(f"{url}/{SECRET}")
        monkeypatch.setattr(type(shipped[0]), "denoising_step", fail)
        with pytest.raises(openai.InternalServerError) as caught:
            ask(client, messages)
        assert "RuntimeError" in caught.value.message and SECRET not in str(caught.value.body)
        with pytest.raises(openai.APIError, match="RuntimeError") as caught:
            collect(ask(client, messages, stream=True))
        assert SECRET not in str(caught.value.body)
        with pytest.raises(openai.APIError, match="RuntimeError"):
            list(client.responses.create(model="demo", input="?", stream=True))
        monkeypatch.undo()
        assert ask(client, messages).choices[0].message.content
    assert caplog.text.count("a request could not be answered: RuntimeError") == 3
    clients = ("httpx", "httpcore", "openai", "asyncio")
    own = [record for record in caplog.records if not record.name.startswith(clients)]
    assert SECRET not in "".join(f"{record.getMessage()} {record.exc_info}" for record in own)
    assert SECRET not in "".join(capfd.readouterr())


def test_one_client_never_waits_for_itself(shipped):
    with served(shipped, max_queue=0) as url:
        assert [http.post(f"{url}{CHAT}", json={}).status_code for _ in range(200)] == [400] * 200


def test_streams_are_server_sent_events(url):
    """The format: https://html.spec.whatwg.org/multipage/server-sent-events.html, ended as OpenAI's are."""
    with http.stream("POST", f"{url}{CHAT}", json=TEXT | {"stream": True}) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        events = reply.read().decode().split("\n\n")
    assert all(event.startswith("data: ") for event in events[:-1]) and events[-2:] == ["data: [DONE]", ""]


# The command


@pytest.mark.parametrize(
    ("argument", "value"), [("max_queue", -1), ("max_queue", True), ("max_upload_size", "1mb"), ("max_positions", 0)]
)
def test_arguments(shipped, argument, value):
    with pytest.raises(ValueError, match=f"`{argument}` is {value!r}; allowed are whole numbers of at least"):
        serving.build_api(*shipped, **{argument: value})


def command(*arguments):
    return CliRunner().invoke(cli.app, ["serve", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "address", "built", "warned"),
    [
        ([], "127.0.0.1", {}, False),
        (["--host", "localhost"], "127.0.0.1", {}, False),
        (["--host", "0.0.0.0", "--max-queue", 3, "--max-upload-size", 1, "--max-positions", 4096], "0.0.0.0",
         {"max_queue": 3, "max_upload_size": 1_000_000, "max_positions": 4096, "hosts": None}, True),
    ],
)  # fmt: skip
def test_command_line(monkeypatch, arguments, address, built, warned):
    seen, build_api = {}, serving.build_api

    def run(self, sockets):
        seen["address"] = sockets[0].getsockname()
        sockets[0].close()

    monkeypatch.setattr(serving, "build_api", lambda *a, **options: (seen.update(options), build_api(*a, **options))[1])
    monkeypatch.setattr(uvicorn.Server, "run", run)
    result = command("--port", 0, *arguments)
    assert result.exit_code == 0, result.output
    host, port = seen.pop("address")
    assert host == address and f":{port}/v1" in result.stdout and "lladamedv-demo" in result.stdout
    defaults = {"max_queue": 16, "max_upload_size": 20_000_000, "max_positions": 16384}
    assert seen == {"name": "lladamedv-demo"} | defaults | built
    assert len(result.stderr.splitlines()) == warned and ("anyone who can reach" in result.stderr) == warned
