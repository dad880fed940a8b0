"""Whatever messages say stays text: it comes back from its tokens, and no token of it controls anything."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lladamedv.demo import DEMO_MODEL
from lladamedv.processing import LLaDAMedVProcessor
from lladamedv.processing.processing_lladamedv import CHAT_TEMPLATES
from tests.tiny import random_image, tiny_processor

from .harness import Target, both_profiles
from .mutations import STRANGE_TEXTS, mutate_value, strange_value


IMAGE = random_image(9, 7)
MARKERS = dict.fromkeys((0xF0000, 0xF0001))  # Transformers' own, which it takes out of texts


@cache
def processors() -> list[LLaDAMedVProcessor]:
    return [tiny_processor(), LLaDAMedVProcessor.from_pretrained(DEMO_MODEL)]


@cache
def control_tokens(number: int) -> dict[str, int]:
    tokens = processors()[number].tokenizer.added_tokens_decoder.items()
    return {token.content: token_id for token_id, token in tokens}


def encode(processor, chats, **options) -> torch.Tensor:
    return processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
        processor_kwargs={"padding": True}, **options,
    )["input_ids"]  # fmt: skip


def hostile_text(rng: random.Random) -> str:
    """Texts with control tokens in them, whole, cut, doubled or with something between their letters."""
    tokens = [*control_tokens(0), "\U000f0000<image>\U000f0001", "\U000f0000", "<\U000f0000image>", "<|eot_id|", "id|>"]
    pieces = []
    for _ in range(rng.randrange(6)):
        piece = rng.choice((*rng.choices(tokens, k=3), *rng.choices(STRANGE_TEXTS, k=2), "a lung", " ", "\n"))
        if rng.random() < 0.2:
            place = rng.randrange(len(piece) + 1)
            piece = piece[:place] + rng.choice(("", " ", "\u200b", "\u202e", "\0", *tokens)) + piece[place:]
        pieces.append(piece * rng.choice((1, 1, 1, 2, 200)))
    return "".join(pieces)


def cut_up(text: str, rng: random.Random) -> list[dict]:
    """The text in parts, cut anywhere, within tokens, too."""
    places = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(4)))
    pieces = [text[first:last] for first, last in zip((0, *places), (*places, len(text)))]
    return [{"type": "text", "text": piece} for piece in pieces]


def conversation(rng: random.Random) -> list[dict]:
    roles = ["system"] * (rng.random() < 0.3) + ["user", "assistant"] * rng.randrange(2) + ["user"]
    chat = []
    for role in roles:
        text = hostile_text(rng)
        content = text if rng.random() < 0.4 else cut_up(text, rng)
        if role == "user" and isinstance(content, list):
            for _ in range(rng.choice((0, 1, 1, 2))):
                content.insert(rng.randrange(len(content) + 1), {"type": "image", "image": IMAGE})
        chat.append({"role": role, "content": content})
    return chat


def hostile_chats(rng: random.Random):
    chats = [conversation(rng) for _ in range(rng.choice((1, 1, 1, 3)))]
    return rng.randrange(2), rng.choice(("llava_llada_med", "llava_llada", "llava_llada_demo")), chats


def texts_of(chat: list[dict]) -> list[str]:
    """Pieces of text that come out as they went in: those of each turn, between its images, without spaces around."""
    texts = []
    for message in chat:
        pieces = [""]
        parts = message["content"]
        for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
            if part["type"] == "text":
                pieces[-1] += part["text"]
            else:
                pieces.append("")
        texts += [piece.translate(MARKERS).strip() for piece in pieces]
    return texts


def stays_text(given) -> None:
    number, template, chats = given
    processor, template = processors()[number], CHAT_TEMPLATES[template]
    controls = set(control_tokens(number).values())
    try:
        ids = encode(processor, chats, chat_template=template)
    except ValueError as error:
        assert "without lone surrogates" in str(error), error
        raise
    quiet = [
        [
            {**message, "content": "x"}
            if isinstance(message["content"], str)
            else {**message, "content": [part for part in message["content"] if part["type"] == "image"]}
            for message in chat
        ]
        for chat in chats
    ]
    expected = encode(processor, quiet, chat_template=template)
    pad = processor.tokenizer.pad_token_id
    for row, quiet_row, chat in zip(ids.tolist(), expected.tolist(), chats):
        found, allowed = ([token for token in each if token in controls and token != pad] for each in (row, quiet_row))
        assert found == allowed, "a text became a control token"
        assert pad not in [token for token in row if token != pad][1:], "padding within a text"
        decoded = processor.tokenizer.decode(row)
        assert all(text in decoded for text in texts_of(chat)), "a text does not come back"


def malformed(rng: random.Random):
    """A conversation with something wrong in it, anywhere."""
    chats = conversation(rng) if rng.random() < 0.5 else [conversation(rng)]
    for _ in range(rng.choice((1, 2))):
        chats = mutate_value(chats, rng)
    return rng.randrange(2), chats


def any_conversation(given) -> None:
    number, chats = given
    ids = encode(processors()[number], chats)
    assert ids.ndim == 2 and ids.numel()


def raw(rng: random.Random):
    text = rng.choice((hostile_text, strange_value))(rng)
    text = [text, hostile_text(rng)] if rng.random() < 0.2 else text
    images = rng.choice((None, IMAGE, [IMAGE], [[IMAGE], [IMAGE]], [], [[]], strange_value(rng)))
    return rng.randrange(2), text, images


def any_text(given) -> None:
    number, text, images = given
    output = processors()[number](text=text, images=images, return_tensors="pt", padding=True)
    if "pixel_values" in output and text is not None:
        processor = processors()[number]
        assert (output["input_ids"] == processor.image_token_id).sum() % len(output["image_sizes"]) == 0


TARGETS = [
    Target("hostile chats", hostile_chats, stays_text),
    Target("malformed chats", malformed, any_conversation, documented=(ValueError, TypeError)),
    Target("raw prompts", raw, any_text, documented=(ValueError, TypeError)),
]


@both_profiles(TARGETS)
def test_prompts(target, first, count):
    target.hunt(first, count)


@pytest.mark.parametrize("examples", [60, pytest.param(5000, marks=pytest.mark.slow)])
def test_any_text_comes_back(examples):
    """What hypothesis thinks of, with control tokens between it."""
    piece = st.one_of(st.text(), st.sampled_from(sorted(control_tokens(0))), st.sampled_from(STRANGE_TEXTS))

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.lists(piece, max_size=5).map("".join), st.sampled_from(["user", "system", "assistant"]))
    def comes_back(text, role):
        try:
            stays_text((0, "llava_llada_med", [[{"role": role, "content": text}, {"role": "user", "content": "?"}]]))
        except ValueError as error:
            assert type(error) is ValueError and "lone surrogates" in str(error)

    comes_back()


def test_a_megabyte():
    text = "a" * 2**18 + "<|eot_id|>" * 25_000 + "🩻" * 2**16 + "{{ x }}" * 36_000
    stays_text((0, "llava_llada_med", [[{"role": "user", "content": text}]]))
