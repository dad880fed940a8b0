"""What holds of every answer, whatever the model, the prompts and the options: tried on random ones."""

import math
from collections import Counter
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import TextIteratorStreamer

from tests.brute_force import above_threshold, generated, published, rule_of, stop_sequences
from tests.properties.cases import (
    IMAGE,
    MASK,
    build_model,
    collate,
    generate,
    generation_cases,
    id_texts,
    infill,
    infill_cases,
    paddings,
)
from tests.tiny import Words


seeds = st.integers(0, 2**32 - 1)


def stops_by_pass(canvases: list[list[int]], options: dict) -> list[int]:
    """Where a row's answer ends, after each pass: at the first stop sequence that stands in the canvas. Once there is
    one, only the end ids and the first of the texts move it further left."""
    sequences, ends = stop_sequences(options), options.get("eos_token_id", [])
    first = 1 + (1 if isinstance(ends, int) else len(ends))
    length = stop = len(canvases[0])
    stops = []
    for canvas in canvases:
        for sequence in sequences[:first] if stop < length else sequences:
            found = [i for i in range(length - len(sequence) + 1) if canvas[i : i + len(sequence)] == sequence]
            stop = min([stop, *found])
        stops.append(stop)
    return stops


def assert_same(output, row, other, other_row):
    """Two rows of two outputs say the same, but for the padding behind the answer and for rounding."""
    passes = int(output.num_forwards[row])
    for name in ("num_forwards", "num_full_forwards", "tokens_per_forward"):
        assert getattr(output, name)[row] == getattr(other, name)[other_row], name
    assert torch.equal(output.commit_step[row], other.commit_step[other_row])
    assert torch.equal(output.history[:passes, row], other.history[:passes, other_row])
    pairs = [(getattr(each, name)[at] for each, at in ((output, row), (other, other_row)))
             for name in ("commit_confidence", "answer_confidence")]  # fmt: skip
    if output.cache_drift is not None:
        pairs.append((output.cache_drift[:passes, row], other.cache_drift[:passes, other_row]))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0, equal_nan=True)


def assert_identical(output, other, but: str = "cache_drift"):
    """Bit for bit."""
    for name in {*output.keys(), *other.keys()} - {but}:
        torch.testing.assert_close(output[name], other[name], atol=0, rtol=0, equal_nan=True)


@given(case=generation_cases(), padding=paddings, seed=seeds)
def test_answers_are_whole(case, padding, seed):
    """The prompt stays, no mask is left, lengths are those asked for, and nothing stands there that must not."""
    options, given_inputs = case[2], collate(build_model(case[0]), case[1], padding)
    output, inputs = generate(*case, padding, seed)
    for name, value in given_inputs.items():
        assert torch.equal(inputs[name], value), name
    width = given_inputs["input_ids"].shape[1]
    assert torch.equal(output.sequences[:, :width], given_inputs["input_ids"])
    suffix, ends = Words()(options.get("generation_suffix", "")).input_ids, stop_sequences(options)
    lengths = []
    for row, canvases in zip(output.sequences[:, width:].tolist(), output.history.unbind(1)):
        length = stops_by_pass(canvases.tolist(), options)[-1]
        answer = row[:length]
        lengths.append(length)
        assert row[length : length + len(suffix)] == suffix
        assert set(row[length + len(suffix) :]) <= {options["pad_token_id"]}
        assert not set(answer) & {MASK, *options.get("suppress_tokens", ())}
        eos = options.get("eos_token_id", [])
        for first in ends[: (1 if isinstance(eos, int) else len(eos)) or 1]:
            assert all(answer[i : i + len(first)] != first for i in range(length))
        if not ends:
            assert length == options["max_new_tokens"]
        if not options.get("stop_strings"):
            assert length >= options.get("min_new_tokens", 0)
        size = options.get("no_repeat_ngram_size", length + 1)
        grams = [tuple(answer[i : i + size]) for i in range(length - size + 1)]
        assert len(grams) == len(set(grams))
    assert output.sequences.shape[1] == width + max(lengths) + len(suffix)


@given(case=generation_cases(), padding=paddings, seed=seeds)
def test_the_history_tells_how_the_answer_came(case, padding, seed):
    """Each pass commits, for good, masked places of the first unfinished block, as many as the schedule says."""
    options, (output, inputs) = case[2], generate(*case, padding, seed)
    length, block = options["max_new_tokens"], options["block_length"]
    steps = options.get("steps", length) * block // length
    counted = "remasking" in options and "schedule_shift" not in options
    for row, answer in enumerate(output.sequences[:, inputs["input_ids"].shape[1] :].tolist()):
        passes, canvases = int(output.num_forwards[row]), output.history[:, row].tolist()
        stops = stops_by_pass(canvases, options)
        before, step = [MASK] * length, 0
        for number, after in enumerate(canvases[:passes]):
            begin = before.index(MASK) // block * block
            step = 0 if before[begin : begin + block] == [MASK] * block else step + 1
            end = min(begin + block, stops[number - 1] if number else length)
            open_places = {place for place in range(begin, end) if before[place] == MASK}
            changed = {place for place in range(length) if before[place] != after[place]}
            assert changed and changed <= open_places
            assert changed == set((output.commit_step[row] == number).nonzero().flatten().tolist())
            if counted:
                assert len(changed) == min(block // steps + (step < block % steps), len(open_places))
            assert (MASK in after[: stops[number]]) == (number + 1 < passes), "it ended too early or too late"
            before = after
        assert all(after == before for after in canvases[passes:]), "a finished row changed"
        stop = stops[-1]
        assert answer[:stop] == before[:stop]
        decided = output.commit_confidence[row, : stop + 1]
        decided = decided[output.commit_step[row, : stop + 1] >= 0]
        assert ((decided > 0) & (decided <= 1)).all()
        confidence = math.exp(sum(math.log(value) for value in decided) / len(decided))
        odds_against = (1 / confidence - 1) ** (1 / options["confidence_temperature"])
        assert output.answer_confidence[row].item() == pytest.approx(1 / (1 + odds_against), abs=1e-6)


@given(case=generation_cases(), padding=paddings, seed=seeds)
def test_the_number_of_forward_passes(case, padding, seed):
    """As documented: of steps in a block, of whole rows with a cache, and of the model for a batch of any size."""
    options, language_model = case[2], build_model(case[0]).model.language_model
    with patch.object(language_model, "forward", wraps=language_model.forward) as forward:
        output, _ = generate(*case, padding, seed)
    length, block = options["max_new_tokens"], options["block_length"]
    steps = options.get("steps", length) * block // length if "remasking" in options else block
    assert len(output.history) == output.num_forwards.max()
    if not options.get("use_cache"):
        assert forward.call_count == len(output.history)
    for row, passes in enumerate(output.num_forwards.tolist()):
        block_of_pass = {step: place // block for place, step in enumerate(output.commit_step[row].tolist())}
        block_of_pass.pop(-1, None)
        assert sorted(block_of_pass) == list(range(passes))
        in_block = Counter(block_of_pass.values())
        if "remasking" in options and not stop_sequences(options):
            assert in_block == dict.fromkeys(range(length // block), min(steps, block))
        assert max(in_block.values()) <= min(steps, block)
        interval = options.get("cache_refresh_interval", block)
        whole = sum(math.ceil(count / interval) for count in in_block.values())
        full = int(output.num_full_forwards[row])
        if not options.get("use_cache"):
            assert full == passes
        elif "cache_drift_bound" in options:
            assert len(in_block) <= full <= passes
        else:
            assert full == whole


greedy_batches = generation_cases(sampled=False, masks=True, rows=(2, 4))
cached_batches = generation_cases(sampled=False, cached=True, rows=(2, 4))


@given(case=greedy_batches | cached_batches, padding=paddings)
def test_a_row_does_not_depend_on_its_batch(case, padding):
    """Without random numbers, which the rows of a batch take from one source."""
    spec, batch, options = case
    together, inputs = generate(spec, batch, options, padding)
    for row, prompt in enumerate(batch):
        alone, own = generate(spec, [prompt], options)
        assert_same(alone, 0, together, row)
        answer = alone.sequences[0, own["input_ids"].shape[1] :]
        assert torch.equal(together.sequences[row, inputs["input_ids"].shape[1] :][: len(answer)], answer)


@given(case=generation_cases(masks=True), paddings=st.lists(paddings, min_size=2, max_size=2), seed=seeds)
def test_the_side_of_the_padding_does_not_matter(case, paddings, seed):
    """Nor does its amount, nor what stands in it."""
    (output, inputs), (other, other_inputs) = (generate(*case, padding, seed) for padding in paddings)
    for row in range(len(case[1])):
        assert_same(output, row, other, row)
    answers, others = (
        each.sequences[:, own["input_ids"].shape[1] :] for each, own in ((output, inputs), (other, other_inputs))
    )
    assert torch.equal(answers, others)


@given(
    case=generation_cases(masks=True), padding=paddings, seed=seeds, measure=st.booleans(),
    implementation=st.sampled_from(["dual", "prefix"]),
)  # fmt: skip
def test_a_cache_refreshed_at_every_step_changes_nothing(case, padding, seed, measure, implementation):
    """Bit for bit."""
    *given_case, options = case
    options = {name: value for name, value in options.items() if "cache" not in name}
    plain, _ = generate(*given_case, options, padding, seed)
    options |= {"use_cache": True, "cache_refresh_interval": 1, "cache_implementation": implementation}
    cached, _ = generate(*given_case, options, padding, seed, output_cache_drift=measure)
    assert_identical(plain, cached)


@given(case=generation_cases(masks=True), padding=paddings, seed=seeds)
def test_measuring_the_drift_changes_nothing(case, padding, seed):
    *given_case, options = case
    options = {name: value for name, value in options.items() if name != "output_cache_drift"} | {"use_cache": True}
    without, _ = generate(*given_case, options, padding, seed)
    measured, _ = generate(*given_case, options, padding, seed, output_cache_drift=True)
    assert_identical(without, measured, but="cache_drift")
    assert (measured.cache_drift.isnan() | (measured.cache_drift > -1e-9)).all()


@given(case=generation_cases(masks=True), padding=paddings, seed=seeds)
def test_the_same_seed_gives_the_same_answer(case, padding, seed):
    """And a greedy answer takes no random numbers at all."""
    output, _ = generate(*case, padding, seed)
    state = torch.get_rng_state()
    again, _ = generate(*case, padding, seed)
    assert_identical(output, again)
    assert torch.equal(torch.get_rng_state(), state)
    options = case[2]
    if options["temperature"] == 0 and options.get("remasking") != "random":
        torch.manual_seed(seed)
        assert torch.equal(torch.get_rng_state(), state)


class Recorder:
    """A streamer that keeps what it gets, as [`TextIteratorStreamer`] and TextDiffusionStreamer get it."""

    def __init__(self):
        self.events, self.ended = [], 0

    def put(self, value):
        self.events.append(("put", value.tolist()))

    def put_draft(self, value):
        self.events.append(("draft", value[0].tolist()))

    def end(self):
        self.ended += 1


@given(case=generation_cases(rows=(1, 1)), seed=seeds)
def test_what_is_streamed_is_what_is_returned(case, seed):
    """As tokens and as text; and a draft shows what the canvas holds behind what is out already."""
    recorder, streamer = Recorder(), TextIteratorStreamer(Words(), skip_prompt=True)
    output, inputs = generate(*case, seed=seed, streamer=recorder)
    prompt, answer = inputs["input_ids"], output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    (kind, first), *events = recorder.events
    assert (kind, first) == ("put", prompt.tolist()) and recorder.ended == 1
    out, number = [], 0
    for (kind, tokens), following in zip(events, [*events[1:], ("put", [])]):
        if kind == "put":
            out += tokens
            assert tokens and out == answer[: len(out)], "something was streamed that is not returned"
        else:
            canvas = output.history[number, 0].tolist()
            begins = [len(out), len(out) + len(following[1])]  # a block that is done is out after the draft
            assert any(canvas[begin : begin + len(tokens)] == tokens for begin in begins)
            number += 1
    assert out == answer
    text_output, _ = generate(*case, seed=seed, streamer=streamer)
    assert "".join(streamer) == Words().decode(text_output.sequences[0, prompt.shape[1] :])


@pytest.mark.usefixtures("uncompiled_flex")
@pytest.mark.filterwarnings("ignore:_compile flag", "ignore:flex_attention called without")
@settings(max_examples=settings.default.max_examples // 5)  # those of flex attention take a while
@given(case=generation_cases(masks=True, rows=(1, 2), attention=("sdpa",)), padding=paddings, seed=seeds,
       implementation=st.sampled_from(["eager", "flex_attention"]))  # fmt: skip
def test_attention_implementations_agree(case, padding, seed, implementation):
    spec, batch, options = case
    output, _ = generate(spec, batch, options, padding, seed)
    other, _ = generate(replace(spec, attention=implementation), batch, options, padding, seed)
    assert torch.equal(output.sequences, other.sequences)
    for row in range(len(batch)):
        assert_same(output, row, other, row)


class WithImages:
    """A model that is given the images of a prompt whenever it is given any `pixel_values`."""

    def __init__(self, model, images):
        self.model, self.images, self.config = model, images, model.config

    def __call__(self, pixel_values=None, **inputs):
        return self.model(**inputs, **({} if pixel_values is None else self.images))


def decided_threshold(threshold):
    """`above_threshold` for cases that rounding does not decide: a confidence of 1 may be a bit less."""

    def choose(probabilities, quota):
        assume(all(abs(max(row) - threshold) > 1e-9 for row in probabilities.values()))
        return above_threshold(threshold)(probabilities, quota)

    return choose


@given(case=generation_cases(sampled=False, ends=False, rows=(1, 1)), stop=st.none() | id_texts())
@torch.no_grad()
def test_the_published_loop(case, stop):
    """Tokens, order and number of passes of the plain loop in `tests/brute_force.py`."""
    spec, batch, options = case
    options = {name: value for name, value in options.items() if "cache" not in name and name != "schedule_shift"}
    options |= {} if stop is None else {"stop_strings": stop}
    options["cfg_scale"] = options.pop("image_guidance_scale", 0.0) or options.get("cfg_scale", 0.0)
    options["suppress_tokens"] = [*options.get("suppress_tokens", [MASK]), IMAGE]  # the loop would look for its picture
    output, inputs = generate(spec, batch, options)
    choose, _ = rule_of(options)
    if "confidence_threshold" in options:
        choose = decided_threshold(options["confidence_threshold"])
    images = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    model = WithImages(build_model(spec), images)
    expected = published(model, inputs["input_ids"], images or None, options, choose=choose)
    assert generated(output, inputs["input_ids"]) == expected


# Templates


@given(case=infill_cases(), padding=paddings, seed=seeds)
def test_a_template_keeps_its_text(case, padding, seed):
    """Fixed tokens are the same after every pass; a blank holds one of its choices, or what fits into its length."""
    options, ids = case.options, torch.tensor(case.ids)
    report, inputs = infill(case, padding, seed)
    width = inputs["input_ids"].shape[1]
    assert torch.equal(report.sequences[:, :width], collate(build_model(case.model), case.batch, padding)["input_ids"])
    assert (report.history[..., : len(ids)] == ids)[..., ids != MASK].all()
    ends = {token for sequence in stop_sequences(options) for token in sequence}
    masks = case.ids.count(MASK)
    steps = options["steps"] if "remasking" in options else masks
    for row, (fields, confidences) in enumerate(zip(report.fields, report.field_confidence)):
        text = []
        for piece in case.pieces:
            own = list(piece.ids) or Words()(fields[piece.name]).input_ids
            text += own
            if piece.choices:
                assert fields[piece.name] in piece.choices
            elif piece.name:
                assert not set(own) & {MASK, *ends, *options.get("suppress_tokens", ())}
                assert len(own) <= piece.width if ends else len(own) == piece.width
            assert piece.ids or 0 < confidences[piece.name] <= 1
        answer = report.sequences[row, width:].tolist()
        assert answer[: len(text)] == text and set(answer[len(text) :]) <= {options["pad_token_id"]}
        assert report.texts[row] == Words().decode(text)
        assert 1 <= report.num_forwards[row] <= min(masks, steps)


@given(case=infill_cases(sampled=False), padding=paddings)
def test_a_filled_in_template_does_not_depend_on_its_batch(case, padding):
    together, _ = infill(case, padding)
    for row, prompt in enumerate(case.batch):
        alone, _ = infill(case, batch=[prompt])
        assert_same_report(alone, 0, together, row)


def assert_same_report(report, row, other, other_row):
    passes = int(report.num_forwards[row])
    assert other.num_forwards[other_row] == passes
    assert other.texts[other_row] == report.texts[row] and other.fields[other_row] == report.fields[row]
    assert other.field_confidence[other_row] == pytest.approx(report.field_confidence[row], abs=1e-9)
    assert torch.equal(other.history[:passes, other_row], report.history[:passes, row])
