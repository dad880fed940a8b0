"""The denoising loop against a brute-force one, alone and in batches, and everything around it."""

import itertools
import math

import numpy as np
import pytest
import torch
from transformers import CompileConfig, GenerationConfig, LogitsProcessorList, TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import TextDiffusionStreamer

from lladamedv import LLaDAMedVForConditionalGeneration, LLaDAMedVGenerationConfig, LLaDAMedVGenerationOutput
from tests.brute_force import generated, published
from tests.tiny import Words, image_prompt, tiny_model


PROMPT = (5, 6, 7)
PIXELS = torch.randn(1, 1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
SUPPRESSED = [90, 91, 98]


def generate(model, prompt=None, pixel_values=PIXELS, **options):
    options = {"suppress_tokens": SUPPRESSED, "return_dict_in_generate": True, "tokenizer": Words(), **options}
    prompt = image_prompt(PROMPT) if prompt is None else prompt
    return model.generate(prompt, pixel_values=pixel_values, **options)


WAYS = [
    *({"cfg_scale": scale, "generation_suffix": suffix} for scale in (0.0, 1.5) for suffix in ("", "30 31")),
    {"remasking": "margin"}, {"remasking": "entropy", "cfg_scale": 1.5}, {"confidence_threshold": 0.2},
    {"factor": 2.4, "generation_suffix": "30 31"}, {"entropy_bound": 3.0},
    {"entropy_bound": 3.0, "cfg_scale": 1.5, "generation_suffix": "30 31"},
    {"image_guidance_scale": 1.0, "generation_suffix": "30 31"}, {"image_guidance_scale": 2.0, "remasking": "margin"},
    {"image_guidance_scale": 0.5, "image_guidance_cutoff": 0.0, "entropy_bound": 3.0},
]  # fmt: skip
# Each must change something.
WINDOWS = [
    {"initial_canvas_length": 4}, {"initial_canvas_length": 8, "cfg_scale": 1.0}, {"suffix_blocks": 0},
    {"suffix_blocks": 1, "generation_suffix": "30 31"}, {"initial_canvas_length": 12, "suffix_blocks": 1},
    {"initial_canvas_length": 4, "cfg_scale": 1.0, "generation_suffix": "30 31"},
    {"initial_canvas_length": 4, "image_guidance_scale": 1.0},
]  # fmt: skip
REPETITION = [
    {"repetition_penalty": 1.7}, {"repetition_penalty": 0.6}, {"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3, "repetition_penalty": 0.5},
    {"no_repeat_ngram_size": 1, "image_guidance_scale": 1.0, "image_guidance_cutoff": 0.2},
]  # fmt: skip
GRID = [
    *itertools.product([(8, 8, 1), (8, 8, 5), (12, 4, 3), (12, 4, 6), (6, 2, 15)], WAYS),
    *itertools.product([(16, 4, 8)], WINDOWS), *itertools.product([(12, 12, 12), (12, 4, 12)], REPETITION),
]  # fmt: skip


@pytest.mark.parametrize(("lengths", "options"), GRID, ids=str)
@pytest.mark.parametrize("ends", [(), (1 / 2,), (3 / 4, 1 / 4)])
@torch.no_grad()
def test_against_brute_force(model, lengths, options, ends):
    """Ends are tokens that the answer is known to hold there; in whatever order, each ends it."""
    prompt = image_prompt(PROMPT)
    lengths = dict(zip(("max_new_tokens", "block_length", "steps"), lengths))
    options = {"suppress_tokens": SUPPRESSED, **lengths, **options}
    if ends:
        answer, _, _ = published(model, prompt, PIXELS, options)
        options["eos_token_id"] = [answer[int(share * lengths["max_new_tokens"])] for share in ends]
    output = generate(model, **options)
    assert generated(output, prompt) == published(model, prompt, PIXELS, options)
    speculative = generate(model, speculation_depth=3, **options)
    assert generated(speculative, prompt)[:2] == generated(output, prompt)[:2]
    assert (speculative.num_forwards <= output.num_forwards).all()
    special = options.keys() & {*WINDOWS[0], *WINDOWS[2], *REPETITION[0], *REPETITION[2]}
    if special and not ends:
        plain = generate(model, **{name: value for name, value in options.items() if name not in special})
        assert not torch.equal(plain.commit_confidence, output.commit_confidence), "it must have had something to do"


@torch.no_grad()
def test_output_fields_agree(model):
    output = generate(model, max_new_tokens=12, block_length=4, steps=6, output_history=True)
    assert isinstance(output, LLaDAMedVGenerationOutput) and output.history.shape == (6, 1, 12)
    torch.testing.assert_close(output.tokens_per_forward, torch.tensor([2.0]))
    plain = generate(model, max_new_tokens=12, block_length=4, steps=6, return_dict_in_generate=False)
    assert plain.tolist() == output.sequences.tolist()


@torch.no_grad()
def test_temperature_samples_the_softmax(model):
    """Gumbel-max at temperature 1 draws from the model's distribution: one position, many rows."""
    prompt, draws = torch.tensor([[5, 6, 7]]), 4000
    logits = model(input_ids=torch.cat([prompt, torch.tensor([[98]])], dim=1)).logits[0, -1].double()
    logits[SUPPRESSED] = -torch.inf
    probability = logits.softmax(-1)

    def drawn(temperature):
        torch.manual_seed(0)
        options = {"max_new_tokens": 1, "block_length": 1, "temperature": temperature}
        return generate(model, prompt.expand(draws, -1), None, **options).sequences[:, -1]

    frequency = torch.bincount(drawn(1.0), minlength=100) / draws
    tolerance = 5 * (probability * (1 - probability) / draws).sqrt() + 1e-3
    assert (frequency - probability).abs().le(tolerance).all()
    assert set(drawn(1e-6).tolist()) == {int(logits.argmax())}


@torch.no_grad()
def test_random_remasking_is_uniform(model):
    orders = []
    for seed in range(60):
        torch.manual_seed(seed)
        output = generate(model, max_new_tokens=4, block_length=4, remasking="random")
        orders.append(output.commit_step[0].argmin().item())
    assert all(8 <= orders.count(place) <= 23 for place in range(4)), "the first committed place should be uniform"


@torch.no_grad()
def test_head_runs_on_masked_positions_of_the_block_only(model, monkeypatch):
    rows = []
    original = model.lm_head.forward
    monkeypatch.setattr(
        model.lm_head, "forward", lambda hidden: rows.append(hidden.shape[:-1].numel()) or original(hidden)
    )
    generate(model, max_new_tokens=8, block_length=4, steps=8)
    assert rows == [4, 3, 2, 1, 4, 3, 2, 1]


def test_config_round_trip(tmp_path):
    config = LLaDAMedVGenerationConfig(max_new_tokens=64, block_length=32, steps=16, cfg_scale=0.5, stop_strings=["x"])
    other = tiny_model()
    other.generation_config = config
    other.save_pretrained(tmp_path)
    assert LLaDAMedVGenerationConfig.from_pretrained(tmp_path) == config
    loaded = LLaDAMedVForConditionalGeneration.from_pretrained(tmp_path)
    assert type(loaded.generation_config) is LLaDAMedVGenerationConfig and loaded.generation_config == config
    LLaDAMedVGenerationConfig(compile_config=CompileConfig()).save_pretrained(tmp_path)
    assert LLaDAMedVGenerationConfig.from_pretrained(tmp_path).compile_config is None, "it is not saved"


@pytest.mark.parametrize(
    ("prompt", "extra", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), {}, "`input_ids` has shape \\(1, 0\\)"),
        (torch.tensor([5, 6]), {}, "`input_ids` has shape \\(2,\\)"),
        (torch.tensor([[5, 98]]), {}, "`input_ids` holds the mask token 98"),
        (torch.tensor([[5, 100]]), {}, "`input_ids` holds 100; the model has ids from 0 to 99"),
        (torch.tensor([[5, -1]]), {}, "`input_ids` holds -1"),
        (torch.tensor([[5, 6]], dtype=torch.int32), {}, "`input_ids` is of type torch.int32"),
        ([[5, 6]], {}, "`input_ids` is of type list"),
        (torch.tensor([[5, 6]]), {"attention_mask": torch.tensor([[2, 2]])}, "`attention_mask` holds 2; allowed are 1"),
        (torch.tensor([[5, 6]]), {"attention_mask": torch.zeros(1, 2)}, "without any token"),
        (torch.tensor([[5, 6]]), {"attention_mask": torch.ones(1, 3)}, "`attention_mask` has shape \\(1, 3\\)"),
        (torch.tensor([[5, 6], [7, 8]]), {"streamer": object()}, "`streamer` works with one prompt"),
    ],
)
def test_bad_prompts(model, prompt, extra, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompt, None, **extra)


@torch.no_grad()
def test_a_checkpoints_block_and_steps_are_fitted_to_the_callers_length():
    model = tiny_model()
    model.generation_config = LLaDAMedVGenerationConfig(max_new_tokens=24, block_length=8, steps=12, pad_token_id=91)
    output = generate(model, max_new_tokens=20, suppress_tokens=[98])
    assert output.commit_step.shape == (1, 20)
    assert output.num_forwards.tolist() == [8]  # four blocks of 5; half a step per token, rounded, is 2 each
    options = model.resolve_generation_config(max_new_tokens=20)
    assert (options.block_length, options.steps) == (5, 8)


@pytest.mark.parametrize("streamer_class", [TextStreamer, TextIteratorStreamer, TextDiffusionStreamer])
@torch.no_grad()
def test_streamers_print_the_answer(model, streamer_class, capsys):
    streamer = streamer_class(Words(), skip_prompt=True)
    output = generate(model, max_new_tokens=12, block_length=4, streamer=streamer, eos_token_id=[41])
    expected = Words().decode(output.sequences[0, image_prompt(PROMPT).shape[1] :])
    text = "".join(streamer) if streamer_class is TextIteratorStreamer else capsys.readouterr().out
    if streamer_class is TextDiffusionStreamer:
        text = text.split("\x1b[J")[-1]  # what stays after the last draft was wiped
        assert expected.endswith(text.strip()) and text.strip()
    else:
        assert text.strip() == expected


@torch.no_grad()
def test_a_streamer_of_canvases(model):
    """It gets what is written after each pass, with confidences."""

    class Recorder(list):
        def put(self, value):
            pass

        def put_canvas(self, *values):
            self.append(values)

        def end(self):
            pass

    recorder = Recorder()
    output = generate(model, max_new_tokens=8, block_length=4, streamer=recorder, output_history=True)
    assert len(recorder) == 8
    for passes, (tokens, confidence) in enumerate(recorder):
        assert torch.equal(tokens, output.history[passes])
        known = output.commit_step <= passes
        assert torch.equal(confidence.nan_to_num(-1), output.commit_confidence.where(known, -1.0))


# What asks for nothing in Transformers' own `generate`: its greedy defaults, and what its documentation calls off.
NEUTRAL = {
    "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
    "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "repetition_penalty": 1.0, "length_penalty": 1.0,
    "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0,
    "early_stopping": False, "guidance_scale": 1.0, "num_beam_groups": 1, "diversity_penalty": 0.0,
    "renormalize_logits": False, "remove_invalid_values": False, "output_scores": False, "bad_words_ids": None,
    "sequence_bias": None, "temperature": 1.0,
}  # fmt: skip
NEUTRAL_ARGUMENTS = {"synced_gpus": False, "logits_processor": LogitsProcessorList(), "assistant_model": None}
NEUTRAL_ARGUMENTS |= dict.fromkeys(("inputs_embeds", "past_key_values", "position_ids", "token_type_ids"))


@torch.no_grad()
def test_what_asks_for_nothing_passes(model):
    expected = model.generate(image_prompt(PROMPT), pixel_values=PIXELS, max_new_tokens=8)
    plain = dict.fromkeys(vars(GenerationConfig()))
    everything = {name: value for name, value in (plain | NEUTRAL | NEUTRAL_ARGUMENTS).items() if name[0] != "_"}
    kept = {name: everything.pop(name) for name in ("eos_token_id", "pad_token_id", "bos_token_id", "suppress_tokens")}
    assert set(kept.values()) == {None}
    for options in (everything, {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}):
        options |= {"max_new_tokens": 8}
        assert torch.equal(model.generate(image_prompt(PROMPT), pixel_values=PIXELS, **options), expected)


@torch.no_grad()
def test_numbers_of_other_libraries(model):
    prompt = image_prompt(PROMPT)
    ends = model.generate(prompt, pixel_values=PIXELS, max_new_tokens=8, eos_token_id=None)[0, -3:].tolist()
    expected = model.generate(prompt, pixel_values=PIXELS, max_new_tokens=8, eos_token_id=ends)
    for numbers in (torch.tensor(ends), np.array(ends)):
        options = {"eos_token_id": numbers, "max_new_tokens": np.int64(8), "do_sample": np.bool_(False)}
        assert torch.equal(model.generate(prompt, pixel_values=PIXELS, **options), expected)


@torch.no_grad()
def test_do_sample_means_the_temperature():
    model = tiny_model()
    model.generation_config.temperature = 2.0
    prompt, options = image_prompt(PROMPT), {"pixel_values": PIXELS, "max_new_tokens": 8}
    greedy = model.generate(prompt, temperature=0.0, **options)
    assert torch.equal(model.generate(prompt, do_sample=False, **options), greedy)
    torch.manual_seed(0)
    sampled = model.generate(prompt, **options)
    torch.manual_seed(0)
    assert torch.equal(model.generate(prompt, do_sample=True, temperature=2.0, **options), sampled)
    assert not torch.equal(sampled, greedy)


@torch.no_grad()
def test_plain_generation_configs(tmp_path):
    """Given to `generate`, set on the model, or lying in the checkpoint: what is neutral works, anything else ends."""
    model, prompt = tiny_model(), image_prompt(PROMPT)
    free = model.generate(prompt, pixel_values=PIXELS, max_new_tokens=8)
    ends = free[0, -3:-1].tolist()
    expected = model.generate(prompt, pixel_values=PIXELS, max_new_tokens=8, eos_token_id=ends)
    refused_by_itself = ("min_p", "top_k")  # when it is saved
    neutral = {name: value for name, value in NEUTRAL.items() if name not in refused_by_itself}
    plain = GenerationConfig(max_new_tokens=8, eos_token_id=ends, **neutral)
    assert torch.equal(model.generate(prompt, pixel_values=PIXELS, generation_config=plain), expected)
    model.save_pretrained(tmp_path)
    plain.save_pretrained(tmp_path)
    loaded = LLaDAMedVForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(prompt, pixel_values=PIXELS), expected)
    model.generation_config = plain
    assert torch.equal(model.generate(prompt, pixel_values=PIXELS), expected)
    model.generation_config = LLaDAMedVGenerationConfig(max_new_tokens=8, steps=4)
    model.generation_config.save_pretrained(tmp_path)
    ours_as_plain = GenerationConfig.from_pretrained(tmp_path)
    assert generate(model, generation_config=ours_as_plain).num_forwards.tolist() == [4]
    GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`top_p` is 0.9"):
        LLaDAMedVForConditionalGeneration.from_pretrained(tmp_path)
    model.generation_config.num_beams = 3  # no field of it, so that no check has seen it
    with pytest.raises(ValueError, match="`num_beams` is 3"):
        model.generate(prompt, pixel_values=PIXELS)


@pytest.mark.parametrize("broken", ["lm_head", "model.language_model.layers.1.mlp.down_proj"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@torch.no_grad()
def test_logits_that_are_not_finite(broken, value):
    model, prompt = tiny_model(), image_prompt(PROMPT)
    model.get_submodule(broken).weight[0, 0] = value
    message = "logits are not finite"
    with pytest.raises(ValueError, match=rf"{message} in forward pass 0 \(from 0\) of row 0"):
        generate(model, max_new_tokens=8)
    with pytest.raises(ValueError, match=f"{message} for candidate 1 of row 0"):
        model.get_submodule(broken).register_forward_hook(_finite_at_first())
        model.score(prompt, [[7], [8]], pixel_values=PIXELS, append_eos=False)


def _finite_at_first():
    calls = []

    def hook(module, inputs, output):
        calls.append(0)
        return torch.zeros_like(output) if len(calls) == 1 else output

    return hook


@torch.no_grad()
def test_a_number_that_is_not_finite_names_its_step():
    """The embedding of the token that is written in pass 3 is read in the pass after it."""
    model = tiny_model().half()
    options = {"max_new_tokens": 8, "block_length": 8, "no_repeat_ngram_size": 1}
    output = generate(model, pixel_values=PIXELS.half(), **options)
    token = output.sequences[0, -8:][output.commit_step[0] == 3]
    model.get_input_embeddings().weight[token] = 70000.0  # beyond float16: inf
    with pytest.raises(ValueError, match=r"in forward pass 4 \(from 0\) of row 0"):
        generate(model, pixel_values=PIXELS.half(), **options)


# Where an answer may end


@torch.no_grad()
def test_min_new_tokens(model):
    """The end token stands where it would come first, and not before the place that is asked for."""
    options = {"max_new_tokens": 12, "block_length": 12, "steps": 12}
    free = generate(model, **options)
    first = free.sequences[0, -12:].tolist()[2]  # a token that the model likes to write early
    prompt_length = image_prompt(PROMPT).shape[1]

    def answer(**extra):
        return generate(model, **options, eos_token_id=[first], **extra).sequences[0, prompt_length:].tolist()

    assert len(answer()) <= 2
    for least in (4, 8, 12):  # 12 fills the canvas
        longer = answer(min_new_tokens=least)
        assert 12 >= len(longer) >= least and not {first, 98} & set(longer[:least])


@pytest.mark.parametrize(
    "rule",
    [{}, {"remasking": "margin"}, {"remasking": "entropy"}, {"remasking": "random"}, {"confidence_threshold": 0.1},
     {"factor": 2.4}, {"entropy_bound": 2.0}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@torch.no_grad()
def test_deferred_ends_are_not_written_first(rule, temperature):
    """What the first pass would write is an end; deferred, it writes other things, at their own confidence."""
    model = tiny_model(seed=1)  # one that proposes different tokens at different places
    options = {"max_new_tokens": 16, "block_length": 16, "output_history": True, "temperature": temperature, **rule}

    def first_pass(**more):
        torch.manual_seed(0)
        output = generate(model, **options, **more)
        written = output.commit_step[0] == 0
        assert (output.commit_confidence[0, written] > 0).all()
        return set(output.history[0, 0, written].tolist())

    ends = sorted(first_pass())[:1]
    assert set(ends) & first_pass(eos_token_id=ends)
    assert not set(ends) & first_pass(eos_token_id=ends, defer_eos=True)


# A canvas that is not all there from the start


@torch.no_grad()
def test_only_the_window_is_run(model):
    lengths = []
    prompt = image_prompt(PROMPT).shape[1]
    options = {"max_new_tokens": 16, "block_length": 4, "steps": 4}
    first = model.model.language_model.layers[0]
    with first.register_forward_pre_hook(lambda layer, inputs: lengths.append(inputs[0].shape[1] - prompt)):
        generate(model, **options, initial_canvas_length=8)
        assert lengths == [8, 8, 12, 16]
        lengths.clear()
        generate(model, **options, suffix_blocks=1)
        assert lengths == [8, 12, 16, 16]


# Compiled, and in half precision


@pytest.mark.parametrize("cache", [{}, {"use_cache": True}, {"use_cache": True, "image_guidance_scale": 1.0}])
@torch.no_grad()
def test_compiled_once_for_all_blocks(cache):
    """Later blocks and later answers compile nothing more; the answer is the same."""
    graphs = []
    torch.compiler.reset()  # a process has at most eight graphs of a function

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = tiny_model()
    options = {"max_new_tokens": 12, "block_length": 4, **cache}
    expected = generate(model, **options)
    options["compile_config"] = CompileConfig(backend=backend, fullgraph=True, mode=None)
    for _ in range(2):
        assert torch.equal(generate(model, **options).sequences, expected.sequences)
        assert len(graphs) == 1 + bool(cache), "one for whole rows and one for blocks"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cache", [{}, {"use_cache": True}, {"use_cache": True, "image_guidance_scale": 1.0}])
@torch.no_grad()
def test_half_precision(dtype, cache):
    output = generate(tiny_model().to(dtype), max_new_tokens=12, block_length=4, **cache)
    assert not (output.sequences == 98).any() and output.commit_confidence.dtype == torch.float64
    assert (output.commit_confidence > 0).all() and (output.commit_confidence <= 1).all()


@torch.no_grad()
def test_growth_until_an_end_is_seen_against_a_plain_loop():
    """The length that a loop over whole rows finds; then the answer is that of a canvas which begins so long."""
    model, options = tiny_model(seed=1), {"max_new_tokens": 64, "block_length": 8}
    prompts = [image_prompt(PROMPT), image_prompt((9, 8, 7))]
    model.lm_head.weight *= 30  # surer than a random one
    canvas = torch.full((1, 64), 98)
    proposed = model(torch.cat([prompts[0], canvas], dim=1), pixel_values=PIXELS).logits[0, -64:].argmax(-1)
    ends = options["eos_token_id"] = proposed.unique()[::2].tolist()  # some of what it proposes
    bounds = torch.linspace(0.02, 0.9, 12).tolist()
    lengths = []
    for prompt, bound in itertools.product(prompts, bounds):
        length, passes = 8, 0
        while length < 64:
            ids = torch.cat([prompt, torch.full((1, length), 98)], dim=1)
            probability = model(ids, pixel_values=PIXELS).logits[0, -length:].double().softmax(-1)
            sure = [float(row[ends].sum()) for row in probability.flip(0) if int(row.argmax()) in ends][:32]
            passes += 1
            if sum(sure) / min(32, length) >= bound:
                break
            length += 8
        lengths.append(length)
        grown = generate(model, prompt, initial_canvas_length=8, grow_until_eos_confidence=bound, **options)
        fixed = generate(model, prompt, initial_canvas_length=length, **options)
        assert torch.equal(grown.sequences, fixed.sequences)
        assert grown.num_forwards.item() == fixed.num_forwards.item() + passes
        torch.testing.assert_close(grown.commit_confidence, fixed.commit_confidence, atol=1e-9, rtol=0, equal_nan=True)
    assert len(set(lengths)) > 1, "the bounds must make a difference"
    both = generate(
        model, torch.cat(prompts), PIXELS.expand(2, -1, -1, -1, -1), initial_canvas_length=8,
        grow_until_eos_confidence=bounds[2], **options,
    )  # fmt: skip
    for row, prompt in enumerate(prompts):
        alone = generate(model, prompt, initial_canvas_length=8, grow_until_eos_confidence=bounds[2], **options)
        assert alone.num_forwards[0] == both.num_forwards[row]
        assert torch.equal(alone.commit_step[0], both.commit_step[row])
