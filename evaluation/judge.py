"""Language models that judge answers: what the benchmark asks of one, and a client for OpenAI-compatible servers.

huggingface_hub's `InferenceClient` is not used: without a key it sends the user's Hub token to whatever server it is
pointed to, it refuses local servers in offline mode, and it puts `/v1` into addresses that must not have it.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime
from typing import Protocol

import httpx2


OPENAI_URL = "https://api.openai.com/v1"
_LONGEST_BACKOFF, _LONGEST_WAIT = 60.0, 600.0  # seconds: without and with a server's wish
_SHOWN = 300  # characters of a server's message


class JudgeError(RuntimeError):
    """A judge that gave no reply; the message says why.

    Args:
        message: the reason, without any secret.
        for_all: whether any other request would fail in the same way.
    """

    def __init__(self, message: str, for_all: bool = False):
        super().__init__(message)
        self.for_all = for_all


class Judge(Protocol):
    """What can judge.

    Attributes:
        settings: JSON-able, all that the replies depend on and no secret; `model` and `host` are shown in reports.
    """

    settings: dict

    def complete(self, messages: Sequence[dict]) -> str:
        """The reply to chat messages `{"role", "content"}`; called from several threads.

        Raises:
            JudgeError: if there is none.
        """


class OpenAIJudge:
    """A judge behind OpenAI's chat completions API: OpenAI itself, vLLM, SGLang, llama.cpp, `transformers serve`, …

    Requests that meet a full or broken server are repeated after 1, 2, 4, … up to 60 seconds, shortened at random by up
    to half, or later if the server says so; those that the server refuses for what they are, are not. No setting is
    taken from the environment, except proxies.

    Args:
        model: what the server calls the model.
        base_url: address to which `/chat/completions` is added; by default OpenAI's, but only with an `api_key`.
        api_key: sent as the bearer token and shown nowhere; without it no authorisation is sent.
        temperature: of sampling.
        max_tokens: of a reply.
        reasoning_model: for models that take `max_completion_tokens` for `max_tokens` and no temperature.
        timeout: seconds that the server may be silent.
        max_retries: how often a request is repeated.
        sleep: waits for a number of seconds.

    Raises:
        ValueError: if neither `base_url` nor `api_key` is given, or for a value that cannot be used.

    Source: https://platform.openai.com/docs/api-reference/chat
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key: str | None = None,
        temperature: float = 0.0,
        max_tokens: int = 1024,
        reasoning_model: bool = False,
        timeout: float = 60.0,
        max_retries: int = 5,
        sleep: Callable[[float], object] = time.sleep,
    ):
        if not base_url and not api_key:
            raise ValueError("`base_url` and `api_key` are both missing; nothing is sent anywhere without one of them.")
        if not model.strip():
            raise ValueError(f"`model` is {model!r}; allowed are the names of models.")
        if api_key and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
            raise ValueError("`api_key` holds white space or characters other than ASCII's printable ones.")
        for name, value, least in (("temperature", temperature, 0), ("max_retries", max_retries, 0)):
            if value < least:
                raise ValueError(f"`{name}` is {value}; allowed are numbers of at least {least}.")
        for name, value in (("max_tokens", max_tokens), ("timeout", timeout)):
            if value <= 0:
                raise ValueError(f"`{name}` is {value}; allowed are numbers above 0.")
        try:
            url = httpx2.URL((base_url or OPENAI_URL).rstrip("/") + "/chat/completions")
        except httpx2.InvalidURL:
            url = httpx2.URL()
        if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query:
            raise ValueError("`base_url` is no http or https address, or it has a password or a query.")
        limit = {"max_completion_tokens": max_tokens} if reasoning_model else {"max_tokens": max_tokens}
        self._sampling = limit if reasoning_model else {"temperature": temperature, **limit}
        self.settings = {"model": model, "host": url.netloc.decode(), **self._sampling}
        self.max_retries, self.sleep = max_retries, sleep
        self._url, self._key = url, api_key
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx2.Client(headers=headers, timeout=timeout)

    def __repr__(self) -> str:
        return f"OpenAIJudge({', '.join(f'{name}={value!r}' for name, value in self.settings.items())})"

    def complete(self, messages: Sequence[dict]) -> str:
        """The reply to chat messages `{"role", "content"}`.

        Raises:
            JudgeError: if there is none, even after all repetitions.
        """
        body = {"model": self.settings["model"], "messages": list(messages), **self._sampling}
        for attempt in range(self.max_retries + 1):
            wait, unreachable = 0.0, False
            try:
                response = self._client.post(self._url, json=body)
            except httpx2.RequestError as error:
                problem = f"{type(error).__name__}: {error}".rstrip(": ")
                unreachable = isinstance(error, httpx2.ConnectError)
            else:
                status = response.status_code
                if status == 200:
                    return self._reply(response)
                problem = f"HTTP {status}: {self._shown(response)}"
                if status not in (408, 429) and status < 500:
                    raise JudgeError(f"{self.settings['host']} refused, {problem}", for_all=status in (401, 404))
                wait = _seconds_asked(response.headers.get("Retry-After", ""))
                if wait > _LONGEST_WAIT:
                    raise JudgeError(f"{self.settings['host']} asks to wait {wait:.0f} s, {problem}", for_all=True)
            if attempt < self.max_retries:
                self.sleep(max(wait, min(2**attempt, _LONGEST_BACKOFF) * random.uniform(0.5, 1)))
        raise JudgeError(f"{self.settings['host']} failed {self.max_retries + 1} times, {problem}", for_all=unreachable)

    def _reply(self, response: httpx2.Response) -> str:
        try:
            choice = json.loads(response.content)["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise JudgeError(f"{self.settings['host']} sent no chat completion: {self._shown(response)}") from None
        if not isinstance(text, str) or not text.strip():
            reason = choice.get("finish_reason")
            raise JudgeError(f"{self.settings['host']} sent a reply without text (finish_reason {reason!r})")
        return text

    def _shown(self, response: httpx2.Response) -> str:
        """The beginning of what a server says, in one line; some repeat the key that they were sent."""
        text = " ".join(response.text.split())
        return (text.replace(self._key, "***") if self._key else text)[:_SHOWN]


def _seconds_asked(retry_after: str) -> float:
    """What a Retry-After header asks for (RFC 9110, section 10.2.3): seconds, or a date; 0 without or for another."""
    if re.fullmatch(r"\d+(\.\d+)?", retry_after):
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0


__all__ = ["OPENAI_URL", "Judge", "JudgeError", "OpenAIJudge"]
