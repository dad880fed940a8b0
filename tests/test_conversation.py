"""What the app, the chat and explanations share: every canvas is seen, no text is lost, nothing acts on a terminal."""

import math

import pytest

from lladamedv.conversation import CanvasStreamer, chat_about, generate_answer, pieces, printable
from lladamedv.processing.phantoms import PhantomVQA


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"confidence_threshold": 0.9},
        {"steps": 9},
        {"use_cache": True, "block_length": 24},
        {"initial_canvas_length": 8},
    ],
)
def test_every_canvas_is_streamed(shipped, options):
    """Against the history that `generate` itself keeps, up to the first end that is in it, and what it returns."""
    model, processor = shipped
    ends = set(model.generation_config.eos_token_id)
    mask = model.config.mask_token_id
    for example in [PhantomVQA(11, 1)[0], PhantomVQA(5, 1, ("description",))[0]]:  # of one block and of several
        seen = []
        streamer = CanvasStreamer(24, mask, lambda *canvas, seen=seen: seen.append(canvas))
        _, output = generate_answer(
            model, processor, example.messages(), streamer=streamer, output_history=True, **options
        )
        expected = [[mask] * 24]
        for canvas in output.history[:, 0].tolist():
            end = next((place for place, token in enumerate(canvas) if token in ends), len(canvas))
            expected.append(canvas[:end])
        assert [canvas for canvas, _ in seen] == expected
        final = output.commit_confidence[0].tolist()
        for canvas, confidence in seen:
            assert len(confidence) == len(canvas)
            for place, token in enumerate(canvas):  # committed once, and never changed
                assert math.isnan(confidence[place]) if token == mask else confidence[place] == final[place]


def test_what_shows_a_canvas_can_end_it(shipped):
    class EnoughError(Exception):
        pass

    def show(canvas, confidence):
        shown.append(canvas)
        if len(shown) == 3:
            raise EnoughError

    shown = []
    streamer = CanvasStreamer(24, shipped[0].config.mask_token_id, show)
    with pytest.raises(EnoughError):
        generate_answer(*shipped, PhantomVQA(5, 1, ("description",))[0].messages(), streamer=streamer)
    assert [canvas.count(shipped[0].config.mask_token_id) for canvas in shown] == [24, 23, 22]


def test_pieces_of_text_are_the_text(shipped):
    """Characters of several tokens stay whole, and nothing is lost around masks."""
    model, processor = shipped
    mask = model.config.mask_token_id
    text = "A lésion – 😀 of 3 µm."
    tokens = processor.tokenizer(text, add_special_tokens=False).input_ids
    found = list(pieces([mask, *tokens, mask], processor.decode, mask))
    assert [found[0], found[-1]] == [(None, [0]), (None, [len(tokens) + 1])]
    assert "".join(piece for piece, _ in found[1:-1]) == text
    assert [place for _, places in found for place in places] == list(range(len(tokens) + 2))
    assert "😀" in "|".join(piece for piece, _ in found[1:-1])


def test_a_chat_holds_all_turns():
    chat = chat_about("image", [("one", "1"), ("two", "2")], "three")
    assert [message["role"] for message in chat] == ["user", "assistant", "user", "assistant", "user"]
    contents = [[part.get("text", part.get("image")) for part in message["content"]] for message in chat]
    assert contents == [["image", "one"], ["1"], ["two"], ["2"], ["three"]]


def test_nothing_acts_on_a_terminal():
    harmless = "A lésion – 😀 of 3 µm\n\tand 5\u00a0mm"
    assert printable(harmless) == harmless
    assert printable("\x1b[2J\r\x07\x9b1m\u202e\ud800\u2028") == r"\x1b[2J\r\x07\x9b1m\u202e\ud800\u2028"
    assert printable("one\ntwo", keep="") == r"one\ntwo"
