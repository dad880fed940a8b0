"""`lladamedv serve` under load: many clients at once, some of which leave in the middle of an answer.

    python benchmarks/serving_load.py --seconds 300 --clients 16 --compare 20 --repeats 3 --json results.json

Clients ask a process with the demo model about phantoms, half of the time in streams. What is right was computed with
`generate` beforehand, so that an answer to another's question is found. A client that gets status 429 comes again after
`Retry-After`. A good server gives no wrong answer, loses no request, and its memory does not grow.

With `--compare`, a server whose batch has room for one request, and so answers one at a time, and one with the default
`--max-positions` take turns before: answers a second to 8 clients with the dual cache, and how long a question of one
token takes that is asked while an answer of 256 tokens is made.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import openai
import psutil
import torch

from lladamedv.demo import answer, load_model
from lladamedv.processing.phantoms import PhantomVQA


QUESTIONS = 64
DUAL = {"use_cache": True}
LONG = {"max_new_tokens": 256, "block_length": 8, "steps": 256, "min_new_tokens": 256}
SHORT = {"max_new_tokens": 1, "block_length": 1, "steps": 1}
PATIENCE = 120  # seconds after which a request without a reply is lost


def prepare() -> list[tuple[list[dict], str]]:
    """Messages of questions, and what the model answers to each."""
    torch.set_num_threads(1)
    model, processor = load_model()
    examples = list(PhantomVQA(4_242, QUESTIONS))
    truths = answer(model, processor, [example.messages() for example in examples], batch_size=1)
    prepared = []
    for example, truth in zip(examples, truths):
        file = io.BytesIO()
        example.image.save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": example.question}]
        prepared.append(([{"role": "user", "content": parts}], truth))
    return prepared


@contextmanager
def serving(*options):
    """A server, and its address."""
    command = [sys.executable, "-m", "lladamedv.cli", "serve", "--port", "0", *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield server, re.search(r"http://\S+", server.stdout.readline())[0]
        finally:
            server.terminate()


def positions_of_one() -> tuple[int, int]:
    """Room for one answer at a time: of the demo model's own length, and of 256 tokens."""
    _, processor = load_model()
    example = PhantomVQA(4_242, 1)[0]
    inputs = processor.apply_chat_template(
        example.messages(), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    length = len(inputs["input_ids"][0])
    return length + 24 + length // 2, length + 256 + length // 2


async def answers_a_second(url: str, seconds: float, clients: int, questions) -> float:
    until, done = time.monotonic() + seconds, 0

    async def visit():
        nonlocal done
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE) as client:
            while time.monotonic() < until:
                messages, _ = random.choice(questions)
                await client.chat.completions.create(
                    model="lladamedv-demo", messages=messages, extra_body={"generation_config": DUAL}
                )
                done += 1

    started = time.monotonic()
    await asyncio.gather(*(visit() for _ in range(clients)))
    return done / (time.monotonic() - started)


async def short_behind_long(url: str, questions) -> tuple[float, float]:
    """Seconds that a question of one token takes, and the answer of 256 tokens before it."""

    async def timed(config):
        started = time.monotonic()
        await client.chat.completions.create(
            model="lladamedv-demo", messages=questions[0][0], extra_body={"generation_config": config}
        )
        return time.monotonic() - started

    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE) as client:
        long = asyncio.create_task(timed(LONG))
        await asyncio.sleep(0.3)
        short = await timed(SHORT)
        return short, await long


def compare(seconds: float, repeats: int, questions) -> dict:
    """Numbers of both servers, a list of one for each repetition."""
    small, large = positions_of_one()
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, one, one_long in (("one_at_a_time", small, large), ("batch", 16384, 16384)):
            with serving("--max-positions", one) as (_, url):
                asyncio.run(answers_a_second(url, 2, 8, questions))  # to warm up
                rate = asyncio.run(answers_a_second(url, seconds, 8, questions))
            with serving("--max-positions", one_long) as (_, url):
                asyncio.run(answers_a_second(url, 1, 1, questions))
                short, long = asyncio.run(short_behind_long(url, questions))
            for what, value in (("answers_a_second", rate), ("short_seconds", short), ("long_seconds", long)):
                found.setdefault(f"{name}_{what}", []).append(round(value, 2))
    rates = zip(found["batch_answers_a_second"], found["one_at_a_time_answers_a_second"])
    return found | {"throughput_ratios": [round(batch / one, 2) for batch, one in rates]}


async def ask(client: openai.AsyncOpenAI, messages, streamed: bool, leave: bool) -> str | None:
    """The answer; `None` if the client left before its end."""
    if not streamed:
        asked = client.chat.completions.create(model="lladamedv-demo", messages=messages)
        if not leave:
            return (await asked).choices[0].message.content
        try:
            await asyncio.wait_for(asked, random.uniform(0.01, 1))
        except TimeoutError:
            pass
        return None
    pieces = []
    async with await client.chat.completions.create(model="lladamedv-demo", messages=messages, stream=True) as stream:
        async for chunk in stream:
            pieces.append(chunk.choices[0].delta.content or "")
            if leave and pieces[-1]:
                return None
    return None if leave else "".join(pieces)


async def visit(url: str, until: float, questions, abort_share: float, counts: Counter, latencies: list[float]) -> None:
    """One client: asks until the time is over, and waits after a 429."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE) as client:
        while time.monotonic() < until:
            messages, truth = random.choice(questions)
            leave, started = random.random() < abort_share, time.monotonic()
            try:
                text = await ask(client, messages, random.random() < 0.5, leave)
            except openai.RateLimitError as error:
                counts["429"] += 1
                await asyncio.sleep(float(error.response.headers["retry-after"]))
                continue
            except openai.OpenAIError as error:
                counts["lost"] += 1
                print(f"lost: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            if leave:
                counts["aborted"] += 1
            else:
                counts["done"] += 1
                counts["wrong"] += text.strip() != truth
                latencies.append(time.monotonic() - started)


async def watch(process: psutil.Process, until: float, sizes: list[tuple[float, float]]) -> None:
    """Note the server's resident memory in MB every second, and when."""
    while time.monotonic() < until:
        sizes.append((time.monotonic(), process.memory_info().rss / 1e6))
        await asyncio.sleep(1)


async def load(url: str, process: psutil.Process, arguments, questions) -> dict:
    counts, latencies, sizes = Counter(), [], []
    until = time.monotonic() + arguments.seconds
    visits = [visit(url, until, questions, arguments.abort_share, counts, latencies) for _ in range(arguments.clients)]
    await asyncio.gather(watch(process, until, sizes), *visits)
    times, memory = np.array(sizes)[len(sizes) // 3 :].T
    first, last, most = (round(float(size), 1) for size in (sizes[0][1], memory[-1], memory.max()))
    minutes = [[size for when, size in sizes if (when - sizes[0][0]) // 60 == minute] for minute in range(60)]
    cuts = statistics.quantiles(latencies, n=100) if len(latencies) > 1 else [float("nan")] * 99
    return {
        **{name: counts[name] for name in ("done", "aborted", "429", "wrong", "lost")},
        "latency_seconds": {f"p{share}": round(cuts[share - 1], 3) for share in (50, 90, 99)},
        "rss_mb": {"first": first, "last": last, "most": most},
        "rss_mb_by_minute": [round(statistics.median(each), 1) for each in minutes if each],
        "rss_slope_mb_per_minute": round(float(np.polyfit(times, memory, 1)[0]) * 60, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--max-queue", type=int, default=8, help="Fewer than clients, so that some are turned away.")
    parser.add_argument("--compare", type=float, default=0, help="Seconds of each measurement of both servers.")
    parser.add_argument("--repeats", type=int, default=3, help="Of the comparison.")
    parser.add_argument("--abort-share", type=float, default=0.2, help="Of the requests that are given up midway.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="File to write the results to.")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    questions = prepare()
    compared = compare(arguments.compare, arguments.repeats, questions) if arguments.compare else {}
    with serving("--max-queue", arguments.max_queue) as (server, url):
        results = compared | asyncio.run(load(url, psutil.Process(server.pid), arguments, questions))
        results["healthy"] = httpx.get(url.replace("/v1", "/health"), timeout=PATIENCE).is_success
    results["exit_code"] = server.returncode
    for name, value in results.items():
        print(f"{name:34}{value}")
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name != "json"}
        arguments.json.write_text(json.dumps({"settings": settings, **results}, indent=1) + "\n")
    if results["wrong"] or results["lost"] or not results["healthy"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
