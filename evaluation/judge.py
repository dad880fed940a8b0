"""The judge of the chat benchmark: its prompt, the parser of its replies, a client for OpenAI-compatible servers.

The comparison is that of LLaVA-Med's evaluation: two answers, a score from 1 to 10 for each. A reply that can be read
in more than one way has no scores.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit


PROMPT_VERSION = "comparison-1"
OPENAI_URL = "https://api.openai.com/v1"
LOWEST, HIGHEST = 1, 10
_LONGEST_WAIT = 120  # seconds of a Retry-After header that the openai client waits for
_SHOWN = 300  # characters of a server's message

_SYSTEM = "You are a helpful and precise assistant who checks the quality of answers."
_INSTRUCTION = """\
Two AI assistants were shown an image and asked the question above. You do not see the image; its caption, and where \
there is one the text that refers to it, describe what it shows.
Judge the helpfulness, relevance, accuracy and level of detail of the two answers, and give each assistant one overall \
score from 1 to 10. A higher score means a better answer.
Begin with a line that has nothing but the two scores, that of Assistant 1 and then that of Assistant 2, separated by \
a space. Explain your judgment in the lines after it. Avoid any bias; in particular, the order in which the answers \
stand must not matter."""
_REMINDER = """\
The scores could not be read. Answer again, and begin with a line that has nothing but two numbers from 1 to 10, the \
score of Assistant 1 and then that of Assistant 2, separated by a space."""

# What may stand behind a score is named, so that "2 errors", "4/5", "7-8" and "8,5" are none.
_SCORE = r"(\d+(?:\.\d+)?)(?:\s*/\s*10\b|\s+out\s+of\s+10\b)?(?:\s+points?\b)?"
_END = (
    r"(?=\s*(?:$|[;()\[\]|!]|[,.](?!\d)|[\u2013\u2014-](?!\s*\d)"
    r"|(?:and|but|while|whereas|because|since|as|vs|assistant|score\s+of\s+assistant)\b))"
)
_PREFIX = r"(?:(?:(?:final|overall|my|the)\s+)*(?:scores?|ratings?)\s*(?:are\b)?\s*[:=]?\s*)?[\[(|]?\s*"
_BETWEEN = r"(?:\s*(?:[;|&\u2013\u2014]|\band\b|\bvs\b\.?|\bversus\b)\s*|,\s+|\s+-\s+|\s+)"
_PAIR = re.compile(_PREFIX + _SCORE + _BETWEEN + _SCORE + _END)
_ITEM = r"(?:\s*[):=]\s*|\s*\.\s+|\s+-\s+)"
_NUMBERED = re.compile(rf"1{_ITEM}{_SCORE}(?:,|;|\s)\s*2{_ITEM}{_SCORE}{_END}")
_NUMBERED_LINES = re.compile(rf"1{_ITEM}{_SCORE}{_END}.*\n2{_ITEM}{_SCORE}{_END}")
_ALONE = re.compile(rf"{_SCORE}\.?")
_LABELLED = re.compile(
    r"\bassistant\s*#?([12])\b(?:'s\b|[\s:=()|\u2013\u2014-]|\b(?:score|rating)s?(?:\s+of)?\b"
    rf"|\b(?:answer|overall|gets?|receives?|earns?|is|an?)\b)*(?<![\d.,-]){_SCORE}{_END}"
)
_LABEL_WORDS = {"assistant", "answer", "final", "for", "of", "overall", "rating", "score", "the"}
_THOUGHTS = re.compile(r"<(think(?:ing)?)>.*?(?:</\1>|$)|^.*</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_MARKDOWN = re.compile(r"```[\w-]*|[*_`]|^\s*[#>]+", re.MULTILINE)


def render_messages(record: dict, answer: str, swapped: bool = False, reference_repr: bool = False) -> list[dict]:
    """The chat that asks for a comparison.

    Args:
        record: as `load_chat_benchmark` returns it.
        answer: the model's; an empty one is judged like any other.
        swapped: show it as Assistant 1, and the reference as Assistant 2, instead of the other way round.
        reference_repr: show the text that refers to the figure in Python's notation, `None` included, as the published
            evaluations do, instead of one line for each mention and no block without any.

    Source: order and headings of the blocks as in LLaVA-Med (arXiv 2306.00890, section 5.1), after the judge of Vicuna.
    """
    context = record["context"]
    mentions = [context["in_text_mention_repr"]] if reference_repr else context["in_text_mention"]
    first, second = (answer, record["reference"]) if swapped else (record["reference"], answer)
    blocks = [
        f"[Context]\nFigure Caption:\n{context['fig_label']}: {context['fig_caption']}",
        *(["Figure Context:\n" + "\n".join(f"\t- {mention}" for mention in mentions)] if mentions else []),
        f"[Question]\n{record['question']}",
        f"[Assistant 1]\n{first}\n\n[End of Assistant 1]",
        f"[Assistant 2]\n{second}\n\n[End of Assistant 2]",
        f"[System]\n{_INSTRUCTION}",
    ]
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": "\n\n".join(blocks)}]


def sha256(value) -> str:
    """The digest of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def prompt_sha256(reference_repr: bool = False) -> str:
    """The digest of a version of the prompt: of the messages around an empty question, and of the reminder."""
    context = {"fig_label": "", "fig_caption": "", "in_text_mention": [""], "in_text_mention_repr": ""}
    blank = {"question": "", "reference": "", "context": context}
    return sha256([render_messages(blank, "", reference_repr=reference_repr), _REMINDER])


def parse_scores(text: str) -> tuple[float, float] | None:
    """The scores of Assistant 1 and 2 in a reply, or `None` if they are not clear or not between 1 and 10.

    Thoughts in `<think>` and Markdown's marks are left out. What remains must be one of these, without a number that
    could be another score and without two scores of one assistant:

    - a first line with the two scores and no other number: "8 9", "8, 9", "8 vs 9", "8/10 and 9/10", "Scores: 8 9",
      perhaps with a reason behind a mark or "because";
    - numbered scores, "1. 8" and "2. 9", or two lines with a score each;
    - both assistants named with a score behind each: "Assistant 1: 8/10, Assistant 2: 9/10";
    - JSON: `[8, 9]`, `{"scores": [8, 9]}`, or an object with one number for each assistant.
    """
    text = unicodedata.normalize("NFKC", _THOUGHTS.sub("", text))
    lines = [line.strip() for line in _MARKDOWN.sub("", text).lower().splitlines() if line.strip()]
    found = _scores_in_json(re.sub(r"```[\w-]*", "", text).strip()) or _scores_in_lines(lines)
    named = _labelled(label_and_score.groups() for line in lines for label_and_score in _LABELLED.finditer(line))
    if found is not None and named is not None and [*map(float, found)] != [*map(float, named)]:
        return None
    found = found or named
    if found is None:
        return None
    first, second = map(float, found)
    return (first, second) if LOWEST <= first <= HIGHEST and LOWEST <= second <= HIGHEST else None


def _scores_in_lines(lines: list[str]) -> tuple[str, str] | None:
    """Two scores that begin a reply, without the names of the assistants."""
    head = "\n".join(lines[:2])
    if numbered := _NUMBERED_LINES.match(head) or _NUMBERED.match(head):
        return numbered.groups()
    alone = [_ALONE.fullmatch(line) for line in lines[:3]]
    if (all(alone) and len(alone) == 2) or (len(alone) == 3 and alone[0] and alone[1] and not alone[2]):
        return alone[0][1], alone[1][1]
    pairs = [pair.groups() for line in lines if (pair := _PAIR.match(line)) and _count_numbers(line) == 2]
    begins = bool(lines) and _PAIR.match(lines[0]) and _count_numbers(lines[0]) == 2
    return pairs[0] if begins and len(set(pairs)) == 1 else None


def _count_numbers(line: str) -> int:
    return len(re.findall(r"\d+(?:\.\d+)?", re.sub(r"(?:/|out of)\s*10\b", "", line)))


def _scores_in_json(text: str) -> tuple[float, float] | None:
    try:
        value, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        value = {str(name).lower(): each for name, each in value.items()}
        value = value.get("scores", value)
    if isinstance(value, list):
        value = dict(zip("12", value)) if len(value) == 2 else {}
    found = []
    for name, score in value.items() if isinstance(value, dict) else ():
        score = score.get("score") if isinstance(score, dict) else score
        words = re.findall(r"[a-z]+", str(name).lower())
        number = _ALONE.fullmatch(str(score))
        if len(digits := re.findall(r"\d+", str(name))) == 1 and number and {*words} <= _LABEL_WORDS:
            found.append((digits[0], number[1]))
    return _labelled(found)


def _labelled(found: Iterable[tuple[str, str]]) -> tuple[float, float] | None:
    """The scores of the labels "1" and "2", if each has one, however often."""
    scores = {}
    for label, score in found:
        scores.setdefault(label, set()).add(float(score))
    if sorted(scores) != ["1", "2"] or any(len(each) > 1 for each in scores.values()):
        return None
    return min(scores["1"]), min(scores["2"])


class JudgeError(RuntimeError):
    """A judge gave no reply; the message says why.

    Args:
        message: the reason, without any secret.
        for_all: whether any other request would fail in the same way.
    """

    def __init__(self, message: str, for_all: bool = False):
        super().__init__(message)
        self.for_all = for_all


def ask(judge: OpenAIJudge, messages: list[dict]) -> tuple[tuple[float, float] | None, list[str], JudgeError | None]:
    """Ask for a comparison, and once more if the scores cannot be read.

    Returns:
        The scores of Assistant 1 and 2 if there are any, the replies, and the error that ended the request if one did.
    """
    replies = []
    try:
        replies.append(judge.complete(messages))
        if parse_scores(replies[-1]) is None:
            reply, reminder = {"role": "assistant", "content": replies[-1]}, {"role": "user", "content": _REMINDER}
            replies.append(judge.complete([*messages, reply, reminder]))
    except JudgeError as error:
        return None, replies, error
    return parse_scores(replies[-1]), replies, None


class OpenAIJudge:
    """A judge behind OpenAI's chat completions API: OpenAI itself, vLLM, SGLang, llama.cpp, `transformers serve`, …

    The `openai` client repeats requests that fail because the server is busy or broken, with growing pauses or those
    that the server asks for, up to two minutes. The key, the address and the organisation are never taken from the
    environment, and redirects are not followed. A judge of another kind needs the same `settings` (JSON-able, all that
    its replies depend on and no secret; reports show `model` and `host`) and `complete`.

    Args:
        model: what the server calls the model.
        base_url: address to which `/chat/completions` is added; by default OpenAI's, but only with an `api_key`.
        api_key: sent as the bearer token and shown nowhere; without it no authorisation is sent.
        temperature: of sampling.
        max_tokens: of a reply.
        reasoning_model: for models that take `max_completion_tokens` for `max_tokens` and no temperature.
        timeout: seconds that the server may be silent.
        max_retries: how often a request is repeated.

    Raises:
        ImportError: without the `openai` package.
        ValueError: if neither `base_url` nor `api_key` is given, or for a value that cannot be used.
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
        max_retries: int = 8,
    ):
        try:
            import openai
        except ImportError as error:
            raise ImportError('A judge needs the openai package: pip install "lladamedv[judge]".') from error
        if not base_url and not api_key:
            raise ValueError("`base_url` and `api_key` are both missing; nothing is sent anywhere without one of them.")
        if not model.strip():
            raise ValueError(f"`model` is {model!r}; allowed are the names of models.")
        if api_key and not re.fullmatch("[!-~]+", api_key):
            raise ValueError("`api_key` holds white space or characters other than ASCII's printable ones.")
        for name, value, least in (
            ("temperature", temperature, 0), ("max_retries", max_retries, 0), ("max_tokens", max_tokens, 1),
            ("timeout", timeout, 0.001),
        ):  # fmt: skip
            if not value >= least:
                raise ValueError(f"`{name}` is {value}; allowed are numbers of at least {least}.")
        base_url = (base_url or OPENAI_URL).rstrip("/")
        try:
            address = urlsplit(base_url)
            usable = address.scheme in ("http", "https") and address.hostname and address.port != 0
        except ValueError:
            usable = False
        if not usable or "@" in address.netloc or address.query or address.fragment:
            raise ValueError("`base_url` is no http or https address, or it has a password or a query.")
        limit = {"max_completion_tokens": max_tokens} if reasoning_model else {"max_tokens": max_tokens}
        self._sampling = limit if reasoning_model else {"temperature": temperature, **limit}
        self.settings = {"model": model, "host": address.netloc.lower(), **self._sampling}
        self._key = api_key
        # Sent with each request, because the client would take them from the environment.
        self._headers = {
            "Authorization": f"Bearer {api_key}" if api_key else openai.omit,
            "OpenAI-Organization": openai.omit, "OpenAI-Project": openai.omit,
        }  # fmt: skip
        self._client = openai.OpenAI(
            api_key=api_key or "none", base_url=base_url, timeout=timeout, max_retries=max_retries,
            http_client=openai.DefaultHttpxClient(follow_redirects=False),
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"OpenAIJudge({', '.join(f'{name}={value!r}' for name, value in self.settings.items())})"

    def complete(self, messages: Sequence[dict]) -> str:
        """The reply to chat messages `{"role", "content"}`; called from several threads.

        Raises:
            JudgeError: if there is none, even after all repetitions.
        """
        import openai

        host, no_completion = self.settings["host"], f"{self.settings['host']} sent no chat completion"
        try:
            completion = self._client.chat.completions.create(
                model=self.settings["model"], messages=list(messages), **self._sampling, extra_headers=self._headers
            )
        except openai.APIStatusError as error:
            status, wait = error.status_code, error.response.headers.get("Retry-After", "")
            for_all = status in (401, 404) or (wait.isdecimal() and int(wait) > _LONGEST_WAIT)
            wait = f", Retry-After {wait}" if wait else ""
            message = f"{host} answered HTTP {status}{wait}: {self._shown(error.response.text)}"
            raise JudgeError(message, for_all) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            unreachable = type(cause).__name__ == "ConnectError"  # of httpx or httpx2, whichever the client is built on
            message = f"{host} failed, {type(cause).__name__}: {self._shown(str(cause))}"
            raise JudgeError(message, for_all=unreachable) from None
        except (openai.OpenAIError, ValueError) as error:  # a body that is no JSON
            raise JudgeError(f"{no_completion}: {self._shown(str(error))}") from None
        try:
            choice = completion.choices[0]
            text = choice.message.content
        except (AttributeError, LookupError, TypeError):
            raise JudgeError(f"{no_completion}: {self._shown(str(completion))}") from None
        if not isinstance(text, str) or not text.strip():
            raise JudgeError(f"{host} sent a reply without text (finish_reason {choice.finish_reason!r})")
        return text

    def _shown(self, text: str) -> str:
        """The beginning of what a server says, in one line; some repeat the key that they were sent."""
        text = " ".join(text.split())
        return (text.replace(self._key, "***") if self._key else text)[:_SHOWN]


__all__ = [
    "OPENAI_URL", "PROMPT_VERSION", "JudgeError", "OpenAIJudge", "ask", "parse_scores", "prompt_sha256",
    "render_messages", "sha256",
]  # fmt: skip
