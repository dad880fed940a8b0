"""Scores against the mean over all orders of revealing an answer, sampling against exact values, and batches."""

import copy
import itertools

import pytest
import torch

from tests.brute_force import median_picture
from tests.test_generation_lladamedv import PIXELS, PROMPT, generate
from tests.tiny import Words, image_prompt


MASK = 98


def over_all_orders(model, prompt, pixel_values, answer, places=None):
    """Mean over all orders of the sum of log p(token | tokens revealed before): the bound, said the other way.

    With `places`, of these tokens of the answer, with the others given.
    """
    totals = []
    places = range(len(answer)) if places is None else places
    for order in itertools.permutations(places):
        canvas, total = [MASK if place in places else token for place, token in enumerate(answer)], 0.0
        for place in order:
            ids = torch.tensor([[*prompt[0].tolist(), *canvas]])
            logits = model(input_ids=ids, pixel_values=pixel_values).logits[0, prompt.shape[1] + place].double()
            total += logits.log_softmax(-1)[answer[place]].item()
            canvas[place] = answer[place]
        totals.append(total)
    return sum(totals) / len(totals)


@pytest.mark.parametrize("answer", [[7], [7, 20], [30, 31, 30], [5, 6, 7, 8]])
@torch.no_grad()
def test_exact_scores(model, answer):
    prompt = image_prompt(PROMPT)
    output = model.score(prompt, [answer], pixel_values=PIXELS, append_eos=False, batch_size=3)
    expected = over_all_orders(model, prompt, PIXELS, answer)
    assert output.log_likelihood[0, 0].item() == pytest.approx(expected, abs=1e-4)
    assert output.standard_error.item() == 0 and output.num_tokens.item() == len(answer)


def test_a_single_token_is_a_probability(model):
    prompt = image_prompt(PROMPT)
    everything = [[token] for token in range(100) if token != MASK]
    output = model.score(prompt, everything, pixel_values=PIXELS, append_eos=False)
    mask_only = 1 - output.log_likelihood.exp().sum().item()
    with torch.no_grad():
        row = torch.cat([prompt, torch.tensor([[MASK]])], dim=1)
        probability = model(input_ids=row, pixel_values=PIXELS).logits[0, -1].double().softmax(-1)
    assert mask_only == pytest.approx(probability[MASK].item(), abs=1e-6)


def test_sampling_converges(model):
    prompt, answer = image_prompt(PROMPT), [5, 6, 7, 8, 9]
    exact = model.score(prompt, [answer], pixel_values=PIXELS, append_eos=False).log_likelihood.item()
    errors = []
    for samples in (64, 4096):
        output = model.score(
            prompt, [answer], pixel_values=PIXELS, append_eos=False, max_exact_tokens=2, num_samples=samples,
            batch_size=512, seed=1,
        )  # fmt: skip
        errors.append(output.standard_error.item())
        assert abs(output.log_likelihood.item() - exact) < 4 * errors[-1]
    assert errors[1] == pytest.approx(errors[0] / 8, rel=0.4), "the error falls with the root of the samples"


def test_the_standard_error_is_that_of_repeated_runs(model):
    prompt, answer = image_prompt(PROMPT), [5, 6, 7, 8, 9, 10]
    runs = [
        model.score(prompt, [answer], pixel_values=PIXELS, max_exact_tokens=0, num_samples=32, seed=seed)
        for seed in range(60)
    ]
    spread = torch.cat([run.log_likelihood for run in runs]).std().item()
    assert torch.cat([run.standard_error for run in runs]).mean().item() == pytest.approx(spread, rel=0.35)


def test_seeds(model):
    prompt, arguments = image_prompt(PROMPT), {"pixel_values": PIXELS, "max_exact_tokens": 0, "num_samples": 8}
    first = model.score(prompt, [[5, 6, 7]], **arguments)
    state = torch.get_rng_state()
    assert torch.equal(model.score(prompt, [[5, 6, 7]], **arguments).log_likelihood, first.log_likelihood)
    assert not torch.equal(model.score(prompt, [[5, 6, 7]], **arguments, seed=1).log_likelihood, first.log_likelihood)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_and_candidates_do_not_depend_on_each_other(model, side):
    prompts = [image_prompt(PROMPT), torch.tensor([[8, 9]])]
    width = prompts[0].shape[1]
    amount = (width - 2, 0) if side == "left" else (0, width - 2)
    ids = torch.cat([prompts[0], torch.nn.functional.pad(prompts[1], amount, value=91)])
    mask = torch.cat([torch.ones(1, width), torch.nn.functional.pad(torch.ones(1, 2), amount)]).long()
    rows = [[[5, 6], [7]], [[9, 10, 11], [3], [4, 5, 6, 7, 8, 9, 10, 11, 12, 13]]]
    together = model.score(ids, rows, attention_mask=mask, pixel_values=PIXELS, append_eos=False)
    for row, (prompt, image) in enumerate(zip(prompts, (PIXELS, None))):
        for place, candidate in enumerate(rows[row]):
            alone = model.score(prompt, [candidate], pixel_values=image, append_eos=False)
            torch.testing.assert_close(together.log_likelihood[row, place], alone.log_likelihood[0, 0])
            assert together.num_tokens[row, place] == len(candidate)
    assert together.log_likelihood[0, 2] == -torch.inf and together.standard_error[0, 2].isnan()
    assert together.standard_error[1, 2] > 0 and together.standard_error[1, 1] == 0


@pytest.mark.parametrize("ends", [40, [40], [40, 91], [91, 40]])
def test_texts_and_the_end_of_the_answer(model, monkeypatch, ends):
    """Padding (91) is no end beside another one."""
    prompt = image_prompt(PROMPT)
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    monkeypatch.setattr(model.generation_config, "pad_token_id", 91)
    texts = model.score(prompt, ["7 8", "9"], pixel_values=PIXELS, tokenizer=Words())
    ids = model.score(prompt, [[7, 8, 40], [9, 40]], pixel_values=PIXELS, append_eos=False)
    assert torch.equal(texts.log_likelihood, ids.log_likelihood) and texts.num_tokens.tolist() == [[3, 2]]


@pytest.mark.parametrize("exact", [8, 0])
def test_several_ends(model, monkeypatch, exact):
    """The likelihoods of an answer and each of its ends are added up, in any order of the ends."""
    prompt, options = image_prompt(PROMPT), {"pixel_values": PIXELS, "max_exact_tokens": exact}
    each = model.score(prompt, [[7, 8, 40], [7, 8, 41]], append_eos=False, **options)
    for ends in ([40, 41], [41, 40]):
        monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
        both = model.score(prompt, [[7, 8]], **options)
        summed = each.log_likelihood.exp().sum(dim=1, keepdim=True)
        torch.testing.assert_close(both.log_likelihood.exp(), summed, atol=0, rtol=1e-9)
        assert each.standard_error.min() <= both.standard_error <= each.standard_error.max()
    monkeypatch.setattr(model.generation_config, "eos_token_id", 91)
    monkeypatch.setattr(model.generation_config, "pad_token_id", 91)
    alone = model.score(prompt, [[7, 8]], **options).log_likelihood
    assert torch.equal(alone, model.score(prompt, [[7, 8, 91]], append_eos=False, **options).log_likelihood)


@pytest.mark.parametrize("exact", [8, 1])
def test_gradients(model, exact):
    """Those of finite differences, of all masks and of draws; without being asked for there are none.

    The norms compute in float32 whatever the weights are, which limits how small a step can be.
    """
    model = copy.deepcopy(model).double().requires_grad_(True)
    options = {"pixel_values": PIXELS.double(), "max_exact_tokens": exact, "num_samples": 6}
    towers = []
    model.model.vision_tower.register_forward_hook(lambda *_: towers.append(1))

    def total(**more):
        scores = model.score(image_prompt(PROMPT), [[7, 20], [30, 31, 5]], **options, **more).log_likelihood
        return (scores * torch.tensor([1.0, -0.5])).sum()

    assert not total().requires_grad
    total(requires_grad=True).backward()
    assert len(towers) == 2, "the picture is encoded once for both candidates"
    for weight in (model.lm_head.weight, model.model.multi_modal_projector.linear_1.weight):
        place, sides = divmod(int(weight.grad.abs().argmax()), weight.shape[1]), []
        for step in (1e-3, -1e-3):
            with torch.no_grad():
                weight[place] += step
                sides.append(total())
                weight[place] -= step
        assert float(sides[0] - sides[1]) / 2e-3 == pytest.approx(float(weight.grad[place]), rel=1e-3)


@pytest.mark.parametrize(
    ("candidates", "options", "message"),
    [
        ([], {}, r"`candidates` is \[\]"),
        (["7"], {}, "texts need `tokenizer`"),
        ([[5, MASK]], {}, r"`candidates` holds \[5, 98\]"),
        ([[5, 100]], {}, r"`candidates` holds \[5, 100\]; allowed are non-empty answers of ids below 100"),
        ([[5], 7], {}, "`candidates` holds 7; allowed are non-empty answers"),
        ([[[5.5]]], {}, r"`candidates` holds \[5.5\]"),
        ([[5]], {"attention_mask": torch.full((1, 19), 2)}, "`attention_mask` holds 2"),
        ([[[5]], [[6]]], {}, "`candidates` holds lists for 2 prompts; `input_ids` holds 1"),
        ([[5]], {"max_exact_tokens": 20}, "`max_exact_tokens` is 20; allowed are whole numbers from 0 to 12"),
        ([[5]], {"num_samples": 1}, "`num_samples` is 1"),
        ([[5]], {"batch_size": 0}, "`batch_size` is 0"),
        ([list(range(5, 80)) * 7], {}, "need 544 positions; the model's context allows 512"),
    ],
)
def test_bad_input(model, monkeypatch, candidates, options, message):
    monkeypatch.setattr(model.model, "forward", None)
    with pytest.raises(ValueError, match=message):
        model.score(image_prompt(PROMPT), candidates, pixel_values=PIXELS, **options)


@pytest.mark.parametrize("length", [4, 12])
@torch.no_grad()
def test_image_reliance_is_the_difference_of_two_scores(model, length):
    """Of answers with and without an end in them, behind pictures and behind their medians."""
    texts = [(5, 6, 7), (8,)]
    width = image_prompt(texts[0]).shape[1]
    prompts = [torch.nn.functional.pad(image_prompt(text), (width - 16 - len(text), 0), value=91) for text in texts]
    mask = torch.tensor([[1] * width, [0, 0] + [1] * (width - 2)])
    pixels = torch.cat([PIXELS, -0.5 * PIXELS + 0.1])
    options = {"max_new_tokens": length, "block_length": length, "attention_mask": mask, "output_image_reliance": True}
    free = generate(model, torch.cat(prompts), pixels, **options)
    ends = [int(free.sequences[1, width + length // 2])]
    for end in (None, ends):
        output = generate(model, torch.cat(prompts), pixels, **options, eos_token_id=end)
        stops = (output.tokens_per_forward * output.num_forwards).round().long().tolist()
        assert end is None or stops[1] <= length // 2
        for row, text in enumerate(texts):
            answer = output.sequences[row, width : width + stops[row]].tolist() + (ends if stops[row] < length else [])
            with_, without = (
                model.score(image_prompt(text), [answer], pixel_values=each[row : row + 1], append_eos=False)
                for each in (pixels, median_picture(pixels))
            )
            expected = with_.log_likelihood - without.log_likelihood
            assert output.image_reliance[row].item() == pytest.approx(expected.item(), abs=1e-3)
            drawn = len(answer) > 8
            assert (output.image_reliance_error[row] > 0) == drawn
            # The masks are the same, so that the difference is known better than both.
            assert not drawn or output.image_reliance_error[row] < with_.standard_error + without.standard_error


@torch.no_grad()
def test_nothing_to_rely_on(model):
    options = {"max_new_tokens": 4, "block_length": 4, "output_image_reliance": True}
    assert generate(model, torch.tensor([[5, 6]]), None, **options).image_reliance.isnan().all()
    neutral = generate(model, image_prompt(PROMPT), median_picture(PIXELS), **options)
    assert neutral.image_reliance.tolist() == [0] and generate(model, max_new_tokens=4).image_reliance is None
