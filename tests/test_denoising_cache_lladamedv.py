"""Caches: against a plain version that runs whole layers on a mixture of stale and fresh states, and in batches."""

import itertools

import pytest
import torch

from tests.brute_force import generated, published
from tests.test_generation_lladamedv import PIXELS, PROMPT, SUPPRESSED, generate
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
        for rule in ({}, {"remasking": "margin"}, {"entropy_bound": 3.0})
    ],
    ids=str,
)
@torch.no_grad()
def test_against_stale_states(model, kind, interval, lengths, suffix, rule):
    (length, block_length), prompt = lengths, image_prompt(PROMPT)
    options = {"max_new_tokens": length, "block_length": block_length, "steps": length // 2, **rule}
    options |= {"generation_suffix": suffix, "suppress_tokens": SUPPRESSED}
    states = StaleStates(model, prompt, PIXELS, block_length, kind, interval)
    expected = published(model, prompt, PIXELS, options, forward=states)
    output = generate(model, use_cache=True, cache_implementation=kind, cache_refresh_interval=interval, **options)
    assert generated(output, prompt) == expected
    assert output.num_full_forwards.item() == output.num_forwards.item() - states.partial_passes
    assert states.partial_passes or "entropy_bound" in rule


@pytest.mark.parametrize("kind", ["dual", "prefix"])
@torch.no_grad()
def test_stale_states_change_the_answer(model, kind):
    """Otherwise the test above would not tell a cache from none."""
    options = {"max_new_tokens": 16, "block_length": 8}
    cached = generate(model, **options, use_cache=True, cache_implementation=kind)
    assert not torch.equal(generate(model, **options).commit_confidence, cached.commit_confidence)


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
    lengths = {"max_new_tokens": 24, "block_length": 12, "suppress_tokens": SUPPRESSED}
    expected = published(model, prompt, PIXELS, lengths, forward=states)
    output = generate(
        model, **lengths, use_cache=True, cache_implementation=kind, cache_refresh_interval=interval,
        cache_drift_bound=bound, output_cache_drift=options.get("output_cache_drift", False),
    )  # fmt: skip
    assert generated(output, prompt) == expected
    assert output.num_full_forwards.item() == output.num_forwards.item() - states.partial_passes
    drift = torch.tensor(states.drift, dtype=torch.float64)[:, None]
    torch.testing.assert_close(output.cache_drift, drift, atol=1e-6, rtol=1e-3, equal_nan=True)
    assert output.cache_drift.nan_to_num().max() > 1e-4, "there must be something to measure"


@pytest.mark.parametrize("kind", ["dual", "prefix"])
@torch.no_grad()
def test_a_tighter_bound_refreshes_more(kind):
    model = tiny_model(num_hidden_layers=3)
    options = {"max_new_tokens": 24, "block_length": 24, "use_cache": True, "cache_implementation": kind}
    counts = [
        generate(model, **options, cache_drift_bound=bound).num_full_forwards.item() for bound in (1e-9, 0.02, 1e3)
    ]
    assert counts[0] > counts[1] >= counts[2] and counts[2] == 3  # at steps 0, 4 and 12
