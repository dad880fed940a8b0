"""Eight billion weights rarely fit in float32: torchao int8, bitsandbytes 8 and 4 bits and bfloat16 load and generate.

Tolerances come from how finely each format can store a weight.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import bitsandbytes
import pytest
import torch
from torch import nn
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig
from transformers import BitsAndBytesConfig, TorchAoConfig

from lladamedv import LLaDAMedVForConditionalGeneration
from tests import released
from tests.tiny import image_prompt, tiny_model


# Inputs in multiples of 64 and outputs in multiples of 32, which bitsandbytes' 4-bit kernel for CPUs with AVX512-BF16
# needs. SigLIP's 4304 is neither, so on such a CPU its tower must be skipped.
WIDTHS = {"hidden_size": 64, "intermediate_size": 128}
# Full names from the model down: Transformers matches a name from its start ("lm_head" is the start of its name). An
# explicit list replaces the default one, which holds the output layer alone.
SKIPPED = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
PIXELS = torch.randn(1, 1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
SUPPRESSED, MASK, ANSWER = [90, 91, 98], 98, 12


@dataclass
class Format:
    """A way of storing weights.

    Args:
        options: makes the arguments of `from_pretrained`, anew for every load, because a model keeps its config.
        weight_class, stored_dtype: of a quantised weight.
        error: root mean square error of a stored weight, relative to the root mean square of the weights.
        roundings: how many values on the way from tokens to logits are off by that much, each on its own.
        largest_error: how far each weight `(out, in)` may be off.
    """

    options: Callable[[], dict]
    weight_class: type
    stored_dtype: torch.dtype
    error: float
    roundings: int
    largest_error: Callable[[torch.Tensor], torch.Tensor]


def _int8_half_step(weight):
    """A row's largest weight is 127 steps. bitsandbytes rounds to float16 (2**-11) before and after."""
    return weight.abs().amax(1, keepdim=True) / 254 + weight.abs() * 2**-10


def _nf4_half_step(weight):
    """The levels of nf4 are at most 0.304 apart (-1 and -0.696), times the largest of 64 neighbours. Some CPUs then
    round level, scale and product to bfloat16 (2**-8), whatever the compute dtype."""
    largest = weight.view(-1, 64).abs().amax(1, keepdim=True)
    return (0.152 * largest).expand(-1, 64).reshape(weight.shape) + weight.abs() * 3 * 2**-8


def _bfloat16_half_step(weight):
    return weight.abs() * 2**-8


def _torchao_int8():
    return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=SKIPPED)}


def _bitsandbytes(dtype=torch.float32, **options):
    config = BitsAndBytesConfig(llm_int8_skip_modules=SKIPPED, **options)
    return {"dtype": dtype, "quantization_config": config}


# int8: a step is 1/127 of a row's largest weight, 2.65 times its deviation; the error is uniform: 2.65 / 127 / 12**0.5.
# nf4: 0.092 for normal weights in blocks of 64. bfloat16: 2**-7 / 12**0.5, times 0.74 for where mantissas lie.
# Each of the language model's 14 matrices is rounded once, and with 8 bits of bitsandbytes so is what it multiplies.
# bfloat16 rounds everything: 30 matrices with the tower's, and 54 results of matrices, norms, activations and sums.
_nf4 = partial(_bitsandbytes, load_in_4bit=True, bnb_4bit_quant_type="nf4")
FORMATS = {
    "torchao-int8": Format(_torchao_int8, Int8Tensor, torch.int8, 0.006, 14, _int8_half_step),
    "bitsandbytes-8bit": Format(
        partial(_bitsandbytes, load_in_8bit=True),
        bitsandbytes.nn.Int8Params, torch.int8, 0.006, 28, _int8_half_step,
    ),
    "bitsandbytes-nf4-float32": Format(
        partial(_nf4, bnb_4bit_compute_dtype=torch.float32),
        bitsandbytes.nn.Params4bit, torch.uint8, 0.092, 14, _nf4_half_step,
    ),
    "bitsandbytes-nf4-bfloat16": Format(
        partial(_nf4, dtype=torch.bfloat16, bnb_4bit_compute_dtype=torch.bfloat16),
        bitsandbytes.nn.Params4bit, torch.uint8, 0.092, 14, _nf4_half_step,
    ),
    "bfloat16": Format(
        partial(dict, dtype=torch.bfloat16), nn.Parameter, torch.bfloat16, 0.00166, 84, _bfloat16_half_step
    ),
}  # fmt: skip
QUANTIZED = [name for name in FORMATS if name != "bfloat16"]
# It warns at every layer of every pass that its 8-bit product casts inputs to float16.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def original():
    return tiny_model(**WIDTHS)


@pytest.fixture(scope="module")
def folder(original, tmp_path_factory):
    path = tmp_path_factory.mktemp("original")
    original.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=FORMATS)
def stored(request):
    return FORMATS[request.param]


@pytest.fixture(scope="module")
def loaded(folder, stored):
    return LLaDAMedVForConditionalGeneration.from_pretrained(folder, **stored.options())


@torch.no_grad()
def answer_logits(model):
    """Logits `(answer, vocabulary)` of a masked answer to a question about an image."""
    prompt = image_prompt()
    canvas = torch.full((1, ANSWER), MASK)
    return model(torch.cat([prompt, canvas], dim=1), pixel_values=PIXELS).logits[0, -ANSWER:].float()


def distance(logits, reference):
    """Relative to how much the reference varies, so that logits of no relation are about 2**0.5 away."""
    return ((logits - reference).norm() / (reference - reference.mean()).norm()).item()


def linear_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def is_language_layer(name):
    return name.startswith("model.language_model.layers.")


def check_storage(model, stored, dtype):
    """Language model linear layers are stored in the format, all else as it was."""
    layers = linear_layers(model)
    assert sum(is_language_layer(name) for name in layers) == 14
    assert sum(not is_language_layer(name) for name in layers) == 2 * 6 + 2 + 1  # tower, projector, output layer
    for name, layer in layers.items():
        if is_language_layer(name):
            assert type(layer.weight) is stored.weight_class, name
            held = layer.weight.qdata if stored.weight_class is Int8Tensor else layer.weight
            assert held.dtype == stored.stored_dtype, name
        else:
            assert type(layer.weight) is nn.Parameter and layer.weight.dtype == dtype, name


def test_only_the_language_model_is_quantized(loaded, stored, original):
    dtype = stored.options().get("dtype", torch.float32)
    check_storage(loaded, stored, dtype)
    assert loaded.dtype == dtype
    changed = [name for name, layer in linear_layers(original).items() if is_language_layer(name)]
    parameters = dict(loaded.named_parameters())
    for name, weight in original.named_parameters():
        if name.removesuffix(".weight") not in changed:
            assert torch.equal(parameters[name], weight.to(dtype)), name


@torch.no_grad()
def test_weights_are_as_fine_as_the_format(loaded, stored, original):
    """No weight is off by more than half a step of the format, nor are the weights better than it can store."""
    originals = linear_layers(original)
    squares = torch.zeros(2)
    for name, layer in linear_layers(loaded).items():
        if not is_language_layer(name):
            continue
        weight = originals[name].weight
        # What a layer multiplies with is what it answers to the unit vectors.
        used = layer(torch.eye(weight.shape[1], dtype=loaded.dtype)).float().T
        assert ((used - weight).abs() <= stored.largest_error(weight)).all(), name
        squares += torch.stack([(used - weight).square().sum(), weight.square().sum()])
    assert (squares[0] / squares[1]).sqrt().item() == pytest.approx(stored.error, rel=0.15)


def test_logits_stay_close(loaded, stored, original):
    """Independent errors add up in squares. Twice that is allowed, because attention and norms can amplify them: up to
    1.3 times in eight random models."""
    tolerance = 2 * stored.error * stored.roundings**0.5
    reference = answer_logits(original)
    assert distance(answer_logits(loaded), reference) < tolerance
    # Such a tolerance would not pass a model of other weights.
    assert distance(answer_logits(tiny_model(seed=1, **WIDTHS)), reference) > 1.5 * tolerance


@pytest.mark.parametrize("options", [{}, {"use_cache": True}], ids=["exact", "cached"])
def test_generates(loaded, options):
    prompt = image_prompt()
    output = loaded.generate(
        prompt, pixel_values=PIXELS, max_new_tokens=ANSWER, block_length=ANSWER // 2, steps=6,
        suppress_tokens=SUPPRESSED, return_dict_in_generate=True, **options,
    )  # fmt: skip
    answer = output.sequences[:, prompt.shape[1] :]
    assert answer.shape == (1, ANSWER)
    assert MASK not in answer and (answer < 100).all()
    assert output.num_forwards.tolist() == [6]
    assert (output.commit_step >= 0).all() and (output.commit_confidence > 0).all()


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_model_survives_saving(folder, tmp_path, name):
    """Saved before its first pass: bitsandbytes 0.50 damages 4-bit weights that are saved after one on some CPUs."""
    stored = FORMATS[name]
    model = LLaDAMedVForConditionalGeneration.from_pretrained(folder, **stored.options())
    model.save_pretrained(tmp_path)
    again = LLaDAMedVForConditionalGeneration.from_pretrained(tmp_path)
    check_storage(again, stored, model.dtype)
    assert torch.equal(answer_logits(again), answer_logits(model))


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_released_layout_loads_quantized(tmp_path, name):
    """Renaming the weights and quantising them meet in one load."""
    stored = FORMATS[name]
    path = released.write_llava(tmp_path / "LLaDA-MedV")
    model = LLaDAMedVForConditionalGeneration.from_pretrained(path, **{"dtype": torch.float32} | stored.options())
    check_storage(model, stored, model.dtype)
    if stored.stored_dtype == torch.int8:  # these layers are too narrow for the kernels of 4 bits
        plain = LLaDAMedVForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
        ids = torch.tensor([[5, 6, 7, 126336, 126336]])
        with torch.no_grad():
            assert distance(model(ids).logits, plain(ids).logits) < 2 * stored.error * stored.roundings**0.5
        answer = model.generate(ids[:, :3], max_new_tokens=4, block_length=4, steps=2)[0, 3:]
        assert 126336 not in answer
