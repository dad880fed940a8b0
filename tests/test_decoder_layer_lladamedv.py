"""The last layer run at a few positions gives there what it gives when it is run everywhere."""

import pytest
import torch

from tests.test_modeling_lladamedv import CLOSE, pixels, with_attention
from tests.tiny import image_prompt, tiny_model


@pytest.mark.usefixtures("uncompiled_flex")
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("turns", [False, True])
@torch.no_grad()
def test_logits_at_chosen_positions(model, implementation, side, turns):
    """With every attention implementation those of the whole run, and all implementations agree."""
    ids = torch.cat([image_prompt((5, 6, 7, 8)), image_prompt((9, 10, 11, 12))])
    mask = torch.ones_like(ids)
    if side is not None:
        mask[1, slice(0, 2) if side == "left" else slice(-2, None)] = 0
        ids[1, mask[1] == 0] = 91
    inputs = {"input_ids": ids, "attention_mask": mask}
    if side != "left":  # padding stands where an image token would be
        inputs["pixel_values"] = pixels(2)
    else:
        inputs["input_ids"] = ids.masked_fill(ids == 99, 50)
    if turns:
        inputs["turn_ids"] = (torch.arange(ids.shape[1]) > 12).long().expand_as(ids)
    keep = torch.zeros_like(ids, dtype=torch.bool)
    keep[0, [3, 17, 18]] = True  # a different number in each row
    keep[1, 16] = True
    other, expected = with_attention(model, implementation), model(**inputs).logits
    torch.testing.assert_close(other(**inputs).logits[mask.bool()], expected[mask.bool()], **CLOSE)
    torch.testing.assert_close(other(**inputs, logits_to_keep=keep).logits, expected[keep], **CLOSE)
    assert other(**inputs, logits_to_keep=torch.zeros_like(keep)).logits.shape == (0, 100)


@torch.no_grad()
def test_the_rest_is_not_run(model):
    run = []
    hook = model.model.language_model.layers[-1].mlp.register_forward_hook(
        lambda module, inputs, output: run.append(tuple(output.shape[:2]))
    )
    keep = torch.zeros(2, 20, dtype=torch.bool)
    keep[0, 4:7] = keep[1, 19] = True
    model(input_ids=torch.full((2, 20), 7), logits_to_keep=keep)
    hook.remove()
    assert run == [(2, 3)]


@torch.no_grad()
def test_recorded_states_are_whole(model):
    keep = torch.zeros(1, 20, dtype=torch.bool)
    keep[0, 4] = True
    ids = torch.arange(20)[None]
    some = model(input_ids=ids, logits_to_keep=keep, output_hidden_states=True)
    every = model(input_ids=ids, output_hidden_states=True)
    assert [tuple(state.shape) for state in some.hidden_states] == [(1, 20, 16)] * 3
    torch.testing.assert_close(some.hidden_states[-1], every.hidden_states[-1])
    torch.testing.assert_close(some.logits, every.logits[keep], **CLOSE)


def test_gradients():
    """Whole, at chosen positions (also of the keys and values at the others), and checkpointed: the same."""
    gradients = []
    keep = torch.zeros(2, 21, dtype=torch.bool)
    keep[0, 17:20] = keep[1, 20] = True
    ids = torch.cat([image_prompt((5, 6, 7, 8, 9)), image_prompt((10, 11, 12, 13, 14))])
    for whole, checkpointing in ((True, False), (True, True), (False, False), (False, True)):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        logits = model(input_ids=ids, pixel_values=pixels(2), logits_to_keep=0 if whole else keep).logits
        (logits[keep] if whole else logits).square().sum().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values()), "a weight is never used"
    largest = max(gradient.norm() for gradient in gradients[0].values())
    for other in gradients[1:]:
        for name, expected in gradients[0].items():
            rounding = 1e-6 * largest  # which is all that biases of keys have
            assert (other[name] - expected).norm() <= 1e-4 * expected.norm() + rounding, name
