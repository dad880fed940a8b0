"""PEFT's adapters: what works gives what the merged weights give, and what would be ignored is refused."""

import peft
import pytest
import torch
from packaging.version import Version
from transformers import AutoModelForImageTextToText as Auto
from transformers.integrations.peft import MIN_PEFT_VERSION

from lladamedv import LLaDAMedVForConditionalGeneration as Ours
from tests.test_modeling_lladamedv import pixels
from tests.tiny import image_prompt, tiny_model


CAUSAL = {"task_type": "CAUSAL_LM"}
MATRICES = {"target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(**MATRICES, **CAUSAL),
        peft.LoraConfig(**MATRICES, use_dora=True),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **CAUSAL),
        peft.LoHaConfig(**MATRICES),
        peft.VeraConfig(**MATRICES),
        peft.LNTuningConfig(target_modules=["input_layernorm"]),
    ],
    ids=lambda config: f"{config.peft_type.value}{'-dora' * getattr(config, 'use_dora', False)}",
)
@torch.no_grad()
def test_adapters_of_layers_change_all_answers(config):
    inputs = {"input_ids": image_prompt(), "pixel_values": pixels()}

    def results(model):
        answer = model.generate(**inputs, max_new_tokens=8, return_dict_in_generate=True)
        return answer.sequences, answer.commit_confidence, model.score(**inputs, candidates=[[7, 8]]).log_likelihood

    torch.manual_seed(0)
    plain, adapted = results(tiny_model()), peft.get_peft_model(tiny_model(), config)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.add_(torch.randn_like(weight))
    got, merged = results(adapted.eval()), results(adapted.merge_and_unload())
    torch.testing.assert_close(got, merged, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(got[1], plain[1]) and not torch.allclose(got[2], plain[2])


@torch.no_grad()
def test_a_folder_of_adapters_is_a_model(tmp_path):
    """Through this package's class, the Auto classes and PEFT's: the logits that were saved. What of Transformers' own
    methods for adapters needs a newer PEFT says so."""
    inputs = {"input_ids": image_prompt(), "pixel_values": pixels()}
    tiny_model().save_pretrained(tmp_path / "base")
    base = Auto.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["q_proj"], **CAUSAL, init_lora_weights=False)
    adapted = peft.get_peft_model(base, config)
    expected = adapted(**inputs).logits
    adapted.save_pretrained(tmp_path / "adapters")
    plain = Auto.from_pretrained(tmp_path / "base")
    loaded, info = Ours.from_pretrained(tmp_path / "adapters", output_loading_info=True)
    assert type(loaded) is Ours and not loaded.training and not info["missing_keys"]
    models = [
        loaded, Auto.from_pretrained(tmp_path / "adapters"),
        peft.PeftModel.from_pretrained(plain, tmp_path / "adapters"),
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters"),
    ]  # fmt: skip
    models.append(Auto.from_pretrained(tmp_path / "base"))
    models[-1].load_adapter(tmp_path / "adapters")
    for model in models:
        torch.testing.assert_close(model(**inputs).logits, expected)
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        for method in (loaded.active_adapters, lambda: loaded.save_pretrained(tmp_path / "again")):
            with pytest.raises(ValueError, match=f"PEFT .* >= {MIN_PEFT_VERSION}"):
                method()
    else:
        loaded.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again" / "adapter_model.safetensors").is_file()


PROMPT = {"num_virtual_tokens": 3, **CAUSAL}


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(**PROMPT),
        peft.PromptTuningConfig(num_virtual_tokens=3, task_type="FEATURE_EXTRACTION"),
        peft.PrefixTuningConfig(**PROMPT),
        peft.PromptEncoderConfig(**PROMPT),
        peft.MultitaskPromptTuningConfig(num_tasks=2, **PROMPT),
        peft.CPTConfig(cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2], **CAUSAL),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_learned_prompts_are_refused_at_once(config):
    with pytest.raises(ValueError, match=r"Adapters that learn a prompt .* are not supported"):
        peft.get_peft_model(tiny_model(), config)


@torch.no_grad()
def test_adapters_that_wait_for_their_words_are_refused():
    """aLoRA counts from the end of what it was given; a canvas moves that end."""
    config = peft.LoraConfig(**MATRICES, **CAUSAL, alora_invocation_tokens=[5, 6])
    adapted, inputs = peft.get_peft_model(tiny_model(), config), {"input_ids": image_prompt(), "pixel_values": pixels()}
    for ask in (adapted.generate, lambda **inputs: adapted.score(**inputs, candidates=[[7]])):
        with pytest.raises(ValueError, match="`alora_invocation_tokens`"):
            ask(**inputs)
