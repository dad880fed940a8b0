"""What a denoising step asks of the device: no synchronisation, at most one small copy, one graph for each shape."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig

from tests.test_generation_lladamedv import PROMPT, SUPPRESSED
from tests.tiny import image_prompt, tiny_model


WAITING = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "is_nonzero", "equal")


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for the device, and reads of whole tensors."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name.startswith(WAITING):
            self.counts["waits"] += 1
        if name.startswith("index"):
            indices = args[1] if isinstance(args[1], (list, tuple)) else []
            self.counts["waits"] += any(each is not None and each.dtype == torch.bool for each in indices)
        return function(*args, **(kwargs or {}))


ROWS = torch.cat([image_prompt(PROMPT), image_prompt((5, 6, 9))])
PICTURES = torch.randn(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
MODES = {
    "exact": {},
    "dual": {"use_cache": True, "cache_implementation": "dual"},
    "prefix": {"use_cache": True, "cache_implementation": "prefix"},
    "guidance": {"cfg_scale": 1.5},
    "image guidance": {"image_guidance_scale": 1.5},
    "image guidance in a cache": {"image_guidance_scale": 1.5, "use_cache": True},
    "growth": {"initial_canvas_length": 4},
    "window": {"suffix_blocks": 1},
    "drift": {"use_cache": True, "output_cache_drift": True},
    "drift bound": {"use_cache": True, "cache_drift_bound": 0.01},
    "refresh": {"use_cache": True, "cache_refresh_interval": 2},
    "penalties": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "min_new_tokens": 2, "eos_token_id": [97]},
    "temperature": {"temperature": 1.0, "remasking": "entropy"},
    "threshold": {"confidence_threshold": 0.9},
    "threshold in a cache": {"confidence_threshold": 0.9, "use_cache": True},
    "deferred": {"defer_eos": True, "eos_token_id": [7], "pad_token_id": 8},
    "speculation": {"speculation_depth": 2, "use_cache": True, "cache_refresh_interval": 5},
}


def count(model, length, monkeypatch, **options):
    """Waits, copies and forward passes of an answer of `length` tokens."""
    waits = Waits()
    tolist = torch.Tensor.tolist
    with monkeypatch.context() as patch, waits:
        patch.setattr(torch.Tensor, "tolist", lambda tensor: waits.counts.update(["copies"]) or tolist(tensor))
        output = model.generate(
            ROWS, pixel_values=PICTURES, max_new_tokens=length, block_length=4, steps=length,
            suppress_tokens=SUPPRESSED, return_dict_in_generate=True, **options,
        )  # fmt: skip
    return waits.counts["waits"], waits.counts["copies"], int(output.num_forwards.max())


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_step_makes_the_host_wait_at_most_once(mode, monkeypatch):
    """A longer answer has more steps, and nothing else that could wait: the difference is what steps cost."""
    model, options = tiny_model(seed=1), MODES[mode]
    model.packs_candidates = False
    waits, copies, passes = count(model, 8, monkeypatch, **options)
    more_waits, more_copies, more_passes = count(model, 16, monkeypatch, **options)
    steps = more_passes - passes
    assert steps > 1 and more_waits == waits
    looked_at = {"confidence_threshold", "output_cache_drift", "cache_drift_bound", "speculation_depth"}
    foreseen = not looked_at & set(options)
    assert more_copies - copies == (0 if foreseen else steps)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_fixed_shapes_say_the_same(mode):
    """As packed candidates, which the brute-force versions are compared with. Noise is drawn in another order."""
    if mode == "temperature":
        pytest.skip("draws other noise")
    model, outputs = tiny_model(seed=1), []
    options = {"max_new_tokens": 12, "block_length": 4, "steps": 12, "suppress_tokens": SUPPRESSED}
    options |= {"return_dict_in_generate": True, "eos_token_id": [3], **MODES[mode]}
    for model.packs_candidates in (True, False):
        outputs.append(model.generate(ROWS, pixel_values=PICTURES, **options))
    for name in ("sequences", "commit_step", "num_forwards", "num_full_forwards"):
        assert torch.equal(*(output[name] for output in outputs)), name
    confidences = (output.commit_confidence for output in outputs)
    torch.testing.assert_close(*confidences, atol=5e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize("mode", sorted({*MODES} - {"temperature", "drift", "drift bound"}))
@pytest.mark.parametrize("packs", [True, False])
@torch.no_grad()
def test_speculation_changes_nothing_but_the_number_of_passes(mode, packs):
    """As a draft is its own row without a cache, and shares its row's states with one."""
    model = tiny_model(seed=1)
    model.packs_candidates = packs
    options = {"max_new_tokens": 16, "block_length": 8, "steps": 16, "suppress_tokens": SUPPRESSED}
    options |= {"return_dict_in_generate": True, "eos_token_id": [3], **MODES[mode]}
    if "initial_canvas_length" in options:
        options["initial_canvas_length"] = 8
    plain, *others = [
        model.generate(ROWS, pixel_values=PICTURES, **options | {"speculation_depth": depth}) for depth in (0, 1, 3)
    ]
    passes = [int(plain.num_forwards.sum())]
    for output in others:
        for name in ("sequences", "commit_step"):
            assert torch.equal(plain[name], output[name]), name
        torch.testing.assert_close(plain.commit_confidence, output.commit_confidence, atol=5e-5, rtol=0, equal_nan=True)
        passes.append(int(output.num_forwards.sum()))
    assert passes[0] > passes[1] >= passes[2] or options.get("cache_refresh_interval") == 2


@pytest.mark.parametrize(
    ("options", "graphs"),
    [({}, 1), (MODES["dual"], 2), ({**MODES["dual"], "speculation_depth": 2}, 2)],
    ids=["exact", "dual", "speculation"],
)
@torch.no_grad()
@torch._dynamo.config.patch(recompile_limit=1)
def test_rows_that_finish_compile_nothing(options, graphs):
    """One graph a shape, whole rows and blocks: neither the next block nor a row that ends needs another. How many
    shapes there may be is not PyTorch's eight for all models of a process, beyond which there is an error."""
    model = tiny_model(seed=1)
    options = {"max_new_tokens": 16, "block_length": 4, "steps": 16, "suppress_tokens": SUPPRESSED, **options}
    arguments = {"input_ids": ROWS, "pixel_values": PICTURES, "return_dict_in_generate": True}
    free = model.generate(**arguments, **options).sequences[0, ROWS.shape[1] :]
    options["eos_token_id"] = [int(free[5])]
    expected = model.generate(**arguments, **options)
    assert len(set(expected.num_forwards.tolist())) == 2, "the rows must end at different steps"
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    options["compile_config"] = CompileConfig(backend=backend, mode=None, dynamic=False)
    found = model.generate(**arguments, **options)
    assert len(compiled) == graphs
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.num_forwards, expected.num_forwards)


@torch.no_grad()
def test_logits_that_are_not_finite_are_an_error_without_a_look(monkeypatch):
    model = tiny_model(seed=1)
    model.packs_candidates = False
    model.lm_head.weight[5] = float("nan")
    with pytest.raises(ValueError, match=r"not finite in forward pass 0 \(from 0\) of row 0"):
        model.generate(ROWS, pixel_values=PICTURES, max_new_tokens=8, block_length=4, suppress_tokens=SUPPRESSED)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "speculation"])
@torch.no_grad()
def test_equal_prompts_share_their_first_pass(model, mode):
    """Several answers to one question, against rows of which nothing says that their pictures are the same."""
    rows, options = 3, {**MODES[mode], "temperature": 4.0}
    options |= {"max_new_tokens": 8, "block_length": 4, "steps": 8, "suppress_tokens": SUPPRESSED}
    images = {"batch_num_images": torch.ones(rows, dtype=torch.long)}
    ways = {
        "apart": {"pixel_values": PICTURES[:1].repeat(rows, 1, 1, 1, 1)},
        "shared": {"pixel_values": PICTURES[:1], "image_index": torch.zeros(rows, dtype=torch.long)},
    }
    outputs, widths = {}, {name: [] for name in ways}
    for name, way in ways.items():
        torch.manual_seed(7)
        count = lambda module, given, seen=widths[name]: seen.append(len(given[0]))  # noqa: E731
        handle = model.model.language_model.layers[0].register_forward_pre_hook(count)
        prompt = ROWS[:1].repeat(rows, 1)
        outputs[name] = model.generate(prompt, **images, **way, return_dict_in_generate=True, **options)
        handle.remove()
    apart, shared = outputs["apart"], outputs["shared"]
    assert len({tuple(answer) for answer in shared.sequences.tolist()}) > 1
    for name in ("sequences", "commit_step", "num_forwards", "num_full_forwards"):
        assert torch.equal(getattr(shared, name), getattr(apart, name))
    torch.testing.assert_close(shared.commit_confidence, apart.commit_confidence, rtol=0, atol=5e-5, equal_nan=True)
    assert sum(widths["apart"]) - sum(widths["shared"]) in (2, 4), "the first pass runs one row of three, of each side"
