"""The table of options: what is refused and in which words, what texts stand for, and what is made from it."""

import math
import subprocess
import sys

import pytest
import torch
from transformers import CompileConfig, GenerationConfig

from lladamedv import LLaDAMedVGenerationConfig
from lladamedv.modeling_lladamedv.generation_options_lladamedv import OPTIONS, GenerationOptionError
from tests.test_generation_lladamedv import generate


CACHE, EIGHT, SIXTEEN = {"use_cache": True}, {"max_new_tokens": 8}, {"max_new_tokens": 16, "block_length": 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # Names, and options of Transformers' own `generate`
        ({"gen_length": 8}, r"Unknown generation arguments \['gen_length'\]"),
        ({"validate": True}, "Unknown generation arguments"),  # the name of a method, not of an option
        ({"num_beams": 2}, "`num_beams` is 2, which masked diffusion does not have: allowed is 1"),
        ({"top_k": 50}, "`top_k` is 50, .* use `temperature` instead"),  # Transformers' default
        ({"top_p": 0.9, "do_sample": True, "temperature": 0.5}, "`top_p` is 0.9, .* use `temperature` instead"),
        ({"do_sample": True}, "`do_sample` is True, .* use `temperature` instead"),
        ({"do_sample": False, "temperature": 0.7}, "`temperature` is 0.7, but `do_sample` is not True"),
        ({"max_length": 20}, "`max_length` is 20, .* use `max_new_tokens` instead"),
        ({"stopping_criteria": [print]}, "use `stop_strings` instead"),
        ({"synced_gpus": True}, "`synced_gpus` is True"),
        ({"inputs_embeds": torch.zeros(1, 2, 16)}, "`inputs_embeds` is"),
        ({"generation_config": GenerationConfig(num_beams=2)}, "`num_beams` is 2"),
        ({"generation_config": GenerationConfig(temperature=0.5)}, "`temperature` is 0.5, but `do_sample` is not True"),
        ({"generation_config": {"max_new_tokens": 4}}, "`generation_config` is a dict"),
        # Values by themselves
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0; allowed are whole numbers of at least 1"),
        ({"steps": 2.5}, "`steps` is 2.5"),
        ({"steps": True}, "`steps` is True"),
        ({"suffix_blocks": -1}, "`suffix_blocks` is -1; allowed are whole numbers of at least 0"),
        ({"temperature": -0.1}, "`temperature` is -0.1; allowed are finite numbers of at least 0"),
        ({"temperature": math.nan}, "`temperature` is nan"),
        ({"entropy_bound": math.inf}, "`entropy_bound` is inf"),
        ({"factor": 0}, "`factor` is 0; allowed are finite numbers above 0"),
        ({"confidence_threshold": 1.5}, r"`confidence_threshold` is 1\.5; allowed are numbers in \(0, 1\]"),
        ({"abstention_threshold": 0}, r"`abstention_threshold` is 0; allowed are numbers in \(0, 1\]"),
        ({"remasking": "best"}, "`remasking` is 'best'; allowed are low_confidence, random"),
        ({"remasking": ["margin"]}, "`remasking` is "),
        ({"defer_eos": 1}, "`defer_eos` is 1; allowed are True and False"),
        ({"use_cache": "yes"}, "`use_cache` is 'yes'"),
        ({"stop_strings": [5]}, r"`stop_strings` is \[5\]; allowed is a text or a list"),
        ({"generation_suffix": 5}, "`generation_suffix` is 5; allowed is a text"),
        ({"compile_config": True}, "`compile_config` is True; allowed is a transformers.CompileConfig"),
        ({"pad_token_id": [5]}, r"`pad_token_id` is \[5\]; allowed are ids"),
        # Values of this model and this call
        ({"suppress_tokens": [3, 100]}, "`suppress_tokens` holds 100; the model has ids from 0 to 99"),
        ({"eos_token_id": 100}, "`eos_token_id` holds 100"),
        ({"max_new_tokens": 600}, "need 619 positions; the model's context allows 512"),
        ({"stop_strings": ["x"], "tokenizer": None}, "needs the `tokenizer` argument"),
        ({"generation_suffix": "x", "tokenizer": None}, "needs the `tokenizer` argument"),
        ({"stop_strings": [""]}, "which has no tokens"),
        # What does not go together
        ({"max_new_tokens": 10, "block_length": 4}, r"`block_length` is 4, which does not divide .* \(10\)"),
        ({"max_new_tokens": 8, "block_length": 4, "steps": 3}, "`steps` is 3, which is no multiple of the number of"),
        ({"confidence_threshold": 0.5, "remasking": "random"}, "cannot be combined with remasking='random'"),
        ({"confidence_threshold": 0.9, "factor": 1.0}, "`confidence_threshold` is 0.9 and `factor` is 1.0"),
        ({"factor": 1.0, "schedule_shift": 2.0}, "`schedule_shift` is 2.0, but with `factor` no schedule"),
        ({"cache_drift_bound": 0.1}, "`cache_drift_bound` is 0.1, which is allowed with use_cache=True"),
        ({"output_cache_drift": True}, "`output_cache_drift` is True, which is allowed with use_cache=True"),
        ({**CACHE, "cache_implementation": "static"}, "`cache_implementation` is 'static'; allowed are prefix, dual"),
        ({"min_new_tokens": 3}, "`min_new_tokens` is 3, but there is no `eos_token_id`"),
        ({"defer_eos": True}, "`defer_eos` is True, but there is no `eos_token_id`"),
        ({"min_new_tokens": 9, **EIGHT, "eos_token_id": 5}, "`min_new_tokens` is 9; it must be at most"),
        ({"initial_canvas_length": 6, **SIXTEEN}, "`initial_canvas_length` is 6"),
        ({"initial_canvas_length": 32, **SIXTEEN}, r"up to `max_new_tokens` \(16\)"),
        ({"no_repeat_ngram_size": 2, "steps": 4, **EIGHT}, "and `steps` is 4: tokens that are committed"),
        ({"no_repeat_ngram_size": 2, "confidence_threshold": 0.9}, "and `confidence_threshold` is 0.9: tokens"),
        ({"abstention_threshold": 0.5, "return_dict_in_generate": False}, "needs return_dict_in_generate=True"),
        ({"output_image_reliance": True, "return_dict_in_generate": False}, "needs return_dict_in_generate=True"),
        ({"image_guidance_scale": 1, "cfg_scale": 0.5}, "`image_guidance_scale` is 1 and `cfg_scale` is 0.5; each"),
        ({"image_guidance_cutoff": 0.2}, "`image_guidance_cutoff` is 0.2, which is allowed with an `image_guidance_sc"),
        ({"image_guidance_scale": 1, "image_guidance_cutoff": 2}, r"allowed are numbers in \[0, 1\]"),
        ({"image_guidance_scale": 1, "prompt": torch.tensor([[5]]), "pixel_values": None}, "a prompt has no picture"),
    ],
)
def test_bad_options_fail_before_the_first_forward(model, monkeypatch, options, message):
    for part in (model.model.language_model, model.model.vision_tower):
        monkeypatch.setattr(part, "forward", lambda *a, **k: pytest.fail("a forward pass was made"))
    with pytest.raises(ValueError, match=message) as caught:
        generate(model, **options)
    assert all(name in str(caught.value) for name in getattr(caught.value, "options", ()))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"gen_length": 8}, ("gen_length",)),
        ({"num_beams": 2}, ("num_beams",)),
        ({"steps": 0}, ("steps",)),
        ({"factor": 1, "entropy_bound": 1}, ("factor", "entropy_bound")),
        ({"cache_drift_bound": 0.1}, ("cache_drift_bound", "use_cache")),
        ({"max_new_tokens": 10, "block_length": 4}, ("block_length", "max_new_tokens")),
        ({**SIXTEEN, "steps": 3}, ("steps", "max_new_tokens", "block_length")),
    ],
)
def test_errors_name_their_options_the_one_to_change_first(model, options, names):
    with pytest.raises(GenerationOptionError) as caught:
        model.resolve_generation_config(**options)
    assert caught.value.options == names


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("steps", "64", 64), ("temperature", "0.5", 0.5), ("temperature", "1", 1), ("use_cache", "true", True),
        ("use_cache", "True", True), ("factor", "None", None), ("factor", "null", None),
        ("suppress_tokens", "[1, 2]", [1, 2]), ("eos_token_id", "5", 5), ("stop_strings", "5", "5"),
        ("stop_strings", '["a", "b"]', ["a", "b"]), ("generation_suffix", "true", "true"),
        ("remasking", "random", "random"),
    ],
)  # fmt: skip
def test_what_texts_stand_for(name, text, value):
    parsed = OPTIONS[name].parse(text)
    assert parsed == value and type(parsed) is type(value)
    OPTIONS[name].check(parsed)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("steps", "many", "`steps` is many; allowed is int"),
        ("steps", "2.5", "`steps` is 2.5"),
        ("temperature", "true", "`temperature` is true; allowed is float"),
        ("eos_token_id", "x", r"`eos_token_id` is x; allowed is int or list\[int\]"),
    ],
)
def test_texts_of_no_value(name, text, message):
    with pytest.raises(ValueError, match=message):
        OPTIONS[name].parse(text)


def test_the_configuration_is_made_from_the_table():
    config = LLaDAMedVGenerationConfig()
    for name, option in OPTIONS.items():
        assert getattr(config, name) == option.default
        assert f"{name} (" in LLaDAMedVGenerationConfig.__doc__
        assert option.role in ("answer", "reply", "report", "model")
    assert LLaDAMedVGenerationConfig(compile_config=CompileConfig()).compile_config is not None


def test_the_table_needs_no_library():
    code = (
        "import sys, lladamedv.modeling_lladamedv.generation_options_lladamedv;"
        "assert not {'torch', 'transformers', 'numpy'} & {*sys.modules}"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
