"""What `ask`, the chat and the app share: every canvas is seen, no text is lost, nothing acts on a terminal."""

import pytest

from lladamedv.conversation import MASK, printable, reply_to
from lladamedv.evaluation.answering import question_about
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
def test_every_canvas_is_shown(shipped, options):
    """Against the history that `generate` itself keeps, up to the first end that is in it, and what it returns."""
    model, processor = shipped
    ends, mask = set(model.generation_config.eos_token_id), model.config.mask_token_id
    for example in [PhantomVQA(11, 1)[0], PhantomVQA(5, 1, ("description",))[0]]:  # of one block and of several
        seen = []
        reply = reply_to(model, processor, example.image, example.question, show=seen.append, **options)
        inputs = processor.apply_chat_template(
            question_about(example.image, example.question), add_generation_prompt=True, tokenize=True,
            return_dict=True, return_tensors="pt",
        )  # fmt: skip
        output = model.generate(**inputs, return_dict_in_generate=True, output_history=True, **options)
        sure, step = output.commit_confidence[0].tolist(), output.commit_step[0].tolist()
        expected = [[(MASK, None, None)] * 24]
        for canvas in output.history[:, 0].tolist():
            end = next((place for place, token in enumerate(canvas) if token in ends), len(canvas))
            expected.append([
                (MASK, None, None) if token == mask else (processor.decode([token]), step[place] + 1, sure[place])
                for place, token in enumerate(canvas[:end])
            ])  # fmt: skip
        assert seen == expected
        assert reply.num_forwards == len(seen) - 1 and reply.confidence == output.answer_confidence[0]
        assert reply.text == example.answer and "".join(token.text or "" for token in reply.tokens) == reply.text


def test_what_shows_a_canvas_can_end_it(shipped):
    class EnoughError(Exception):
        pass

    def show(tokens):
        shown.append(tokens)
        if len(shown) == 3:
            raise EnoughError

    shown, example = [], PhantomVQA(5, 1, ("description",))[0]
    with pytest.raises(EnoughError):
        reply_to(*shipped, example.image, example.question, show=show)
    assert [sum(token.step is None for token in tokens) for tokens in shown] == [24, 23, 22]


def test_characters_of_several_tokens_stay_whole(shipped, monkeypatch):
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
    example = PhantomVQA(5, 1)[0]
    tokens = [token.text for token in reply_to(model, processor, example.image, example.question).tokens]
    assert "".join(tokens).startswith(text) and {"é", "–", "😀", "µ"} < set(tokens)


def test_nothing_acts_on_a_terminal():
    harmless = "A lésion – 😀 of 3 µm\n\tand 5\u00a0mm"
    assert printable(harmless) == harmless
    assert printable("\x1b[2J\r\x07\x9b1m\u202e\ud800\u2028") == r"\x1b[2J\r\x07\x9b1m\u202e\ud800\u2028"
    assert printable("one\ntwo", keep="") == r"one\ntwo"
