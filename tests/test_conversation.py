"""What `ask`, the chat and the app share: every canvas is seen, no text is lost, nothing acts on a terminal."""

import pytest

from lladamedv.conversation import demo_notice, printable, reply_to
from lladamedv.processing.phantoms import PhantomVQA
from tests.faces import generated


@pytest.mark.parametrize("of_one_block", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"confidence_threshold": 0.9},
        {"steps": 9},
        {"use_cache": True, "block_length": 24},
        {"initial_canvas_length": 8},
        {"image_guidance_scale": 0.5, "output_image_reliance": True},
    ],
)
def test_every_canvas_is_shown(shipped, example, options, of_one_block):
    """As in the history that `generate` itself keeps, up to the first end that is in it."""
    example, seen = PhantomVQA(11, 1)[0] if of_one_block else example, []
    reply = reply_to(*shipped, example.image, example.question, show=seen.append, **options)
    expected = generated(shipped, example.image, example.question, **options)
    assert seen == expected.canvases
    assert reply.num_forwards == len(seen) - 1 and reply.confidence == expected.output.answer_confidence[0]
    assert reply.image_reliance == expected.output.image_reliance
    assert (" nats from the picture" in reply.summary) == ("output_image_reliance" in options)
    assert reply.text == example.answer and "".join(token.text or "" for token in reply.tokens) == reply.text


def test_what_shows_a_canvas_can_end_it(shipped, example):
    class EnoughError(Exception):
        pass

    def show(tokens):
        shown.append(tokens)
        if len(shown) == 3:
            raise EnoughError

    shown = []
    with pytest.raises(EnoughError):
        reply_to(*shipped, example.image, example.question, show=show)
    assert [sum(token.step is None for token in tokens) for tokens in shown] == [24, 23, 22]


def test_characters_of_several_tokens_stay_whole(shipped, example, monkeypatch):
    """The model is made to say bytes."""
    model, processor = shipped
    text = "A lésion – 😀 of 3 µm."
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    generate = type(model).generate

    def say(self, **options):
        output = generate(self, **options, suppress_tokens=[], min_new_tokens=24)
        output.sequences[0, -24 : len(ids) - 24] = output.sequences.new_tensor(ids)
        return output

    monkeypatch.setattr(type(model), "generate", say)
    tokens = [token.text for token in reply_to(model, processor, example.image, "What?").tokens]
    assert "".join(tokens).startswith(text) and {"é", "–", "😀", "µ"} < set(tokens)


def test_nothing_acts_on_a_terminal():
    harmless = "A lésion – 😀 of 3 µm\n\tand 5\u00a0mm"
    assert printable(harmless) == harmless
    assert printable("\x1b[2J\r\x07\x9b1m\u202e\ud800\u2028") == r"\x1b[2J\r\x07\x9b1m\u202e\ud800\u2028"
    assert printable("one\ntwo", keep="") == r"one\ntwo"


def test_other_models_are_not_taken_for_the_demo(model):
    assert demo_notice(model) is None
