"""Caches: against a plain version that runs whole layers on a mixture of stale and fresh states, and in batches."""

import itertools

import pytest
import torch

from lladamedv import LLaDAMedVGenerationConfig
from tests.brute_force import denoise
from tests.test_commit_rules_lladamedv import RULES
from tests.test_generation_lladamedv import PIXELS, PROMPT, SUPPRESSED, _Tokenizer, generate
from tests.tiny import image_prompt, tiny_model


class StaleStates:
    """A cache as its definition says it: each layer sees the states of the last full pass, but for what is run."""

    def __init__(self, model, prompt, pixel_values, block_length, kind, interval):
        self.model, self.block_length, self.kind, self.interval = model, block_length, kind, interval
        self.prompt, _ = model.model.get_multimodal_embeddings(prompt, pixel_values)
        self.partial_passes = 0

    def __call__(self, row, block_start, step):
        language_model, width = self.model.model.language_model, self.prompt.shape[1]
        fresh = self.model.get_input_embeddings()(torch.tensor([row[width:]]))
        embeds = torch.cat([self.prompt, fresh], dim=1)
        if step == 0 or (self.interval and step % self.interval == 0):
            outputs = language_model(inputs_embeds=embeds, output_hidden_states=True)
            self.stale = [state.clone() for state in outputs.hidden_states[:-1]]
            return self.model.lm_head(outputs.last_hidden_state)[0]
        self.partial_passes += 1
        end = block_start + self.block_length if self.kind == "dual" else len(row)
        rotary = language_model.rotary_emb(embeds, position_ids=torch.arange(len(row))[None])
        hidden = embeds[:, block_start:end]
        everywhere = torch.zeros(1, 1, len(row), len(row))
        for layer, stale in zip(language_model.layers, self.stale):
            mixed = stale.clone()
            mixed[:, block_start:end] = hidden
            hidden = layer(mixed, position_embeddings=rotary, attention_mask=everywhere)[:, block_start:end]
        logits = torch.full((len(row), self.model.config.text_config.vocab_size), torch.nan)
        logits[block_start:end] = self.model.lm_head(language_model.norm(hidden))[0]
        return logits


@pytest.mark.parametrize(
    ("kind", "interval", "lengths", "suffix", "rule"),
    [
        (*options, rule)
        for options in itertools.product(["dual", "prefix"], [None, 2], [(8, 8), (12, 4)], ["", "30 31"])
        for rule in ("low_confidence", "margin", "entropy_bound")
    ],
)
@torch.no_grad()
def test_against_stale_states(model, kind, interval, lengths, suffix, rule):
    (length, block_length), prompt = lengths, image_prompt(PROMPT)
    steps = block_length // 2 * (length // block_length)
    _, choose, options = RULES[rule]
    states = StaleStates(model, prompt, PIXELS, block_length, kind, interval)
    expected, commits, forwards = denoise(
        model, prompt[0].tolist(), PIXELS, length, block_length, steps, suppressed=SUPPRESSED, choose=choose,
        suffix=[int(part) for part in suffix.split()], forward=states,
        adaptive=rule == "entropy_bound",
    )  # fmt: skip
    output = generate(
        model, max_new_tokens=length, block_length=block_length, steps=steps, use_cache=True,
        cache_implementation=kind, cache_refresh_interval=interval, generation_suffix=suffix or None,
        tokenizer=_Tokenizer(), **options,
    )  # fmt: skip
    assert output.sequences[0, prompt.shape[1] :].tolist() == expected
    order = [(int(step), place) for place, step in enumerate(output.commit_step[0]) if step >= 0]
    assert sorted(order) == sorted(commits)
    assert output.num_forwards.tolist() == [forwards]
    assert output.num_full_forwards.tolist() == [forwards - states.partial_passes]
    assert states.partial_passes or rule == "entropy_bound"


@pytest.mark.parametrize("kind", ["dual", "prefix"])
@torch.no_grad()
def test_stale_states_change_the_answer(model, kind):
    """Otherwise the test above would not tell a cache from none."""
    exact = generate(model, max_new_tokens=16, block_length=16, steps=16)
    cached = generate(model, max_new_tokens=16, block_length=16, steps=16, use_cache=True, cache_implementation=kind)
    if kind == "dual":
        assert not torch.equal(exact.commit_confidence, cached.commit_confidence)
    two_blocks = {"max_new_tokens": 16, "block_length": 8, "steps": 16}
    exact = generate(model, **two_blocks)
    cached = generate(model, **two_blocks, use_cache=True, cache_implementation=kind)
    assert not torch.equal(exact.commit_confidence, cached.commit_confidence)


@torch.no_grad()
def test_one_layer_has_nothing_stale():
    """Keys of the first layer depend on their own token alone: with one layer and one block the caches are exact."""
    model = tiny_model(num_hidden_layers=1)
    exact = generate(model, max_new_tokens=8, block_length=8, steps=8)
    for kind in ("dual", "prefix"):
        cached = generate(model, max_new_tokens=8, block_length=8, steps=8, use_cache=True, cache_implementation=kind)
        assert torch.equal(exact.sequences, cached.sequences)
        torch.testing.assert_close(exact.commit_confidence, cached.commit_confidence, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["dual", "prefix"])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_interval_1_is_exact_bit_for_bit(model, kind, cfg_scale, side):
    prompts, mask = padded([image_prompt(PROMPT), image_prompt((8, 9))], side)
    inputs = {"prompt": prompts, "pixel_values": PIXELS.repeat(2, 1, 1, 1, 1), "attention_mask": mask}
    options = {"max_new_tokens": 12, "block_length": 4, "steps": 6, "cfg_scale": cfg_scale}
    exact = generate(model, **inputs, **options)
    cached = generate(model, **inputs, **options, use_cache=True, cache_implementation=kind, cache_refresh_interval=1)
    assert torch.equal(exact.sequences, cached.sequences) and torch.equal(exact.commit_step, cached.commit_step)
    assert torch.equal(exact.commit_confidence, cached.commit_confidence)
    assert torch.equal(cached.num_full_forwards, cached.num_forwards)


def padded(prompts, side):
    width = max(prompt.shape[1] for prompt in prompts)
    rows, masks = [], []
    for prompt in prompts:
        amount = (width - prompt.shape[1], 0) if side == "left" else (0, width - prompt.shape[1])
        rows.append(torch.nn.functional.pad(prompt, amount, value=91))
        masks.append(torch.nn.functional.pad(torch.ones_like(prompt), amount, value=0))
    return torch.cat(rows), torch.cat(masks)


@pytest.mark.parametrize("kind", ["dual", "prefix"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options",
    [{}, {"cfg_scale": 1.0}, {"confidence_threshold": 0.2}, {"entropy_bound": 3.0}, {"eos_token_id": [7, 40]},
     {"cache_refresh_interval": 2}, {"factor": 2.4, "cfg_scale": 0.5, "generation_suffix": "30 31"}],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_a_row_answers_the_same_in_any_batch(model, kind, side, options):
    """Rows of different lengths and images, in different blocks at a time under the adaptive rules."""
    prompts = [image_prompt(PROMPT), torch.tensor([[8, 9]]), image_prompt((10, 11, 12, 13, 14)), image_prompt((3,))]
    images = [PIXELS, None, PIXELS.flip(-1), PIXELS.flip(-2)]
    options = {"max_new_tokens": 12, "block_length": 4, "steps": 6, "tokenizer": _Tokenizer(), **options}
    options |= {"use_cache": True, "cache_implementation": kind}
    ids, mask = padded(prompts, side)
    pixels = torch.cat([image for image in images if image is not None])
    together = generate(model, ids, pixels, attention_mask=mask, **options)
    for row, (prompt, image) in enumerate(zip(prompts, images)):
        alone = generate(model, prompt, image, **options)
        answer = alone.sequences[0, prompt.shape[1] :]
        assert torch.equal(together.sequences[row, ids.shape[1] :][: len(answer)], answer)
        assert torch.equal(together.commit_step[row], alone.commit_step[0])
        assert together.num_forwards[row] == alone.num_forwards[0]
        assert together.num_full_forwards[row] == alone.num_full_forwards[0]


@pytest.mark.parametrize(
    ("kind", "rule", "cfg_scale", "suffix"),
    list(itertools.product(["dual", "prefix"], [*RULES, "random"], [0.0, 1.0], ["", "30 31"])),
)
@torch.no_grad()
def test_no_mask_is_left(model, kind, rule, cfg_scale, suffix):
    options = {"remasking": "random"} if rule == "random" else RULES[rule][2]
    prompts = torch.cat([image_prompt(PROMPT), image_prompt((8, 9, 10))])
    output = generate(
        model, prompts, PIXELS.repeat(2, 1, 1, 1, 1), max_new_tokens=12, block_length=6, steps=6, temperature=0.5,
        cfg_scale=cfg_scale, generation_suffix=suffix or None, tokenizer=_Tokenizer(), use_cache=True,
        cache_implementation=kind, **options,
    )  # fmt: skip
    assert not (output.sequences == 98).any()
    for row, forwards in enumerate(output.num_forwards.tolist()):
        assert set(output.commit_step[row].tolist()) == set(range(forwards)), "every pass commits"
        assert output.num_full_forwards[row] == 2, "one a block"


@torch.no_grad()
def test_only_the_block_is_run(model):
    lengths = []
    options = {"max_new_tokens": 12, "block_length": 4, "steps": 6, "use_cache": True}
    row = image_prompt(PROMPT).shape[1] + 12
    first = model.model.language_model.layers[0]
    with first.register_forward_pre_hook(lambda layer, inputs: lengths.append(inputs[0].shape[1])):
        generate(model, **options)
        assert lengths == [row, 4] * 3
        lengths.clear()
        generate(model, **options, cache_implementation="prefix")
        assert lengths == [row, 12, row, 8, row, 4]


@torch.no_grad()
def test_a_proposed_mask_ends_too(model, monkeypatch):
    """With the mask left out of `suppress_tokens` an adaptive rule may commit masks; the loop ends nevertheless."""
    weight = model.lm_head.weight.detach().clone()
    weight[98] = 0
    bias = torch.zeros(100)
    bias[98] = 1e4
    monkeypatch.setitem(model.lm_head._parameters, "weight", torch.nn.Parameter(weight))
    monkeypatch.setitem(model.lm_head._parameters, "bias", torch.nn.Parameter(bias))
    for use_cache in (False, True):
        output = generate(
            model, max_new_tokens=8, block_length=4, confidence_threshold=0.9, suppress_tokens=[90], use_cache=use_cache
        )
        assert output.num_forwards.tolist() == [8] and (output.sequences[0, -8:] == 98).all()


# Drift


def divergence(exact, cached, places):
    """Mean over `places` of KL(exact || cached), in nats."""
    exact, cached = exact[places].double().log_softmax(-1), cached[places].double().log_softmax(-1)
    return torch.nn.functional.kl_div(cached, exact, log_target=True, reduction="none").sum(-1).mean().item()


class MeasuredStates(StaleStates):
    """[`StaleStates`] that compares cached logits with whole ones: at every step, or, with a bound, at every refresh,
    which then sets the interval."""

    def __init__(self, *arguments, bound):
        super().__init__(*arguments[:-1], None)
        self.pixels, self.bound, self.age, self.drift = arguments[2], bound, 0, []
        self.refresh_after = arguments[-1] or (4 if bound else 10**9)

    def __call__(self, row, block_start, step):
        whole = self.model(input_ids=torch.tensor([row]), pixel_values=self.pixels).logits[0]
        refresh = step == 0 or self.age >= self.refresh_after
        cached, drift = None, float("nan")
        if step and (not refresh or self.bound is not None):
            cached = super().__call__(row, block_start, step)
            if refresh or self.bound is None:
                places = [i for i in range(block_start, block_start + self.block_length) if row[i] == 98]
                drift = divergence(whole, cached, places)
        if refresh:
            super().__call__(row, block_start, 0)  # stores the states
            self.partial_passes -= cached is not None
            if cached is not None:
                self.refresh_after = max(1, self.refresh_after // 2) if drift > self.bound else self.refresh_after * 2
        self.age = 1 if refresh else self.age + 1
        self.drift.append(drift)
        return whole if refresh else cached


@pytest.mark.parametrize("kind", ["dual", "prefix"])
@pytest.mark.parametrize(
    "options",
    [{"output_cache_drift": True}, {"output_cache_drift": True, "interval": 3}, {"bound": 1e-3}, {"bound": 0.05},
     {"bound": 0.3, "interval": 1}],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_drift_against_whole_passes(kind, options):
    model = tiny_model(num_hidden_layers=3)
    prompt, bound, interval = image_prompt(PROMPT), options.get("bound"), options.get("interval")
    states = MeasuredStates(model, prompt, PIXELS, 12, kind, interval, bound=bound)
    expected, _, forwards = denoise(
        model, prompt[0].tolist(), PIXELS, 24, 12, 24, suppressed=SUPPRESSED, forward=states
    )
    output = generate(
        model, max_new_tokens=24, block_length=12, use_cache=True, cache_implementation=kind,
        cache_refresh_interval=interval, cache_drift_bound=bound,
        output_cache_drift=options.get("output_cache_drift", False),
    )  # fmt: skip
    assert output.sequences[0, prompt.shape[1] :].tolist() == expected
    assert output.num_full_forwards.item() == forwards - states.partial_passes
    drift = torch.tensor(states.drift, dtype=torch.float64)[:, None]
    torch.testing.assert_close(output.cache_drift, drift, atol=1e-6, rtol=1e-3, equal_nan=True)
    assert output.cache_drift.nan_to_num().max() > 1e-4, "there must be something to measure"


@torch.no_grad()
def test_measuring_changes_nothing(model):
    options = {"max_new_tokens": 12, "block_length": 6, "use_cache": True}
    plain, measured = generate(model, **options), generate(model, **options, output_cache_drift=True)
    assert torch.equal(plain.commit_confidence, measured.commit_confidence) and plain.cache_drift is None
    assert torch.equal(plain.num_full_forwards, measured.num_full_forwards)


@pytest.mark.parametrize("kind", ["dual", "prefix"])
@torch.no_grad()
def test_a_tighter_bound_refreshes_more(kind):
    model = tiny_model(num_hidden_layers=3)
    options = {"max_new_tokens": 24, "block_length": 24, "use_cache": True, "cache_implementation": kind}
    counts = [
        generate(model, **options, cache_drift_bound=bound).num_full_forwards.item() for bound in (1e-9, 0.02, 1e3)
    ]
    assert counts[0] > counts[1] >= counts[2] and counts[2] == 3  # at steps 0, 4 and 12


@pytest.mark.parametrize("kind", ["dual", "prefix"])
@torch.no_grad()
def test_rows_find_their_own_interval(kind):
    model = tiny_model(num_hidden_layers=3)
    prompts = [image_prompt(PROMPT), torch.tensor([[8, 9]]), image_prompt((3,))]
    images = [PIXELS, None, PIXELS.flip(-2)]
    ids, mask = padded(prompts, "left")
    options = {"max_new_tokens": 24, "block_length": 12, "use_cache": True, "cache_implementation": kind}
    options |= {"cache_drift_bound": 0.03}
    together = generate(model, ids, torch.cat(images[::2]), attention_mask=mask, **options)
    for row, (prompt, image) in enumerate(zip(prompts, images)):
        alone = generate(model, prompt, image, **options)
        assert torch.equal(together.sequences[row, -24:], alone.sequences[0, -24:])
        assert together.num_full_forwards[row] == alone.num_full_forwards[0]
        torch.testing.assert_close(
            together.cache_drift[:, row], alone.cache_drift[:, 0], atol=1e-6, rtol=1e-3, equal_nan=True
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_drift_bound": 0.1}, "`cache_drift_bound` is 0.1, which is allowed with use_cache=True"),
        ({"output_cache_drift": True}, "`output_cache_drift` is True, which is allowed with use_cache=True"),
        ({"use_cache": True, "cache_drift_bound": -1}, "`cache_drift_bound` is -1; allowed are finite numbers above 0"),
        ({"use_cache": True, "cache_implementation": "static"}, "`cache_implementation` is 'static'; allowed are"),
        ({"cache_implementation": "dual"}, "`cache_implementation` is 'dual', which is allowed with use_cache=True"),
        ({"cache_refresh_interval": 4}, "`cache_refresh_interval` is 4, which is allowed with use_cache=True"),
        ({"use_cache": True, "cache_refresh_interval": 0}, "`cache_refresh_interval` is 0"),
        ({"use_cache": "yes"}, "`use_cache` is 'yes'"),
    ],
)
def test_options_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        LLaDAMedVGenerationConfig(**options)
