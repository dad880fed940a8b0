"""`load_model`: all that a model can be named by, and where and in what it is loaded."""

import json

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import save_file

from lladamedv import LLaDAMedVForConditionalGeneration
from lladamedv.conversion import convert_checkpoint
from lladamedv.loading import DEMO_MODEL, load_model
from lladamedv.modeling_lladamedv import released_lladamedv
from lladamedv.processing.phantoms import PhantomVQA
from tests import released
from tests.tiny import random_image, tiny_tokenizer


def asked(image, question):
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def logits(model, processor, chat):
    inputs = processor.apply_chat_template(
        [chat], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        return inputs, model(**inputs).logits


@pytest.mark.parametrize("name", ["demo", DEMO_MODEL, str(DEMO_MODEL)])
def test_the_demo_by_its_name_and_its_folder(name):
    model, _ = load_model(name)
    assert (model.dtype, model.training) == (torch.float32, False)
    stored = json.loads((DEMO_MODEL / "config.json").read_text())["dtype"]
    assert stored == "float16"  # on a CPU "auto" is another


@pytest.mark.parametrize("name", ["LLaDA-MedV", "LLaDA-V"])
def test_a_released_folder_answers_as_its_conversion(tmp_path, name):
    folder = released.write_llava(tmp_path / name)
    tiny_tokenizer().save_pretrained(folder)
    convert_checkpoint(folder, tmp_path / "converted", report=str)
    chat = asked(random_image(40, 30), "Is there a lesion?")
    theirs, wanted = logits(*load_model(tmp_path / "converted"), chat)
    model, processor = load_model(folder)
    ours, found = logits(model, processor, chat)
    assert torch.equal(theirs["input_ids"], ours["input_ids"]) and torch.equal(wanted, found)
    assert model.generation_config.max_new_tokens == {"LLaDA-MedV": 256, "LLaDA-V": 128}[name]


def test_adapters_need_no_processor_beside_them(shipped, tmp_path):
    """PEFT saves none. The truth is PEFT's own model, not merged."""
    base, processor = load_model()
    base.name_or_path = str(DEMO_MODEL)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    example = PhantomVQA(3, 1)[0]
    _, wanted = logits(adapted.eval(), processor, example.messages())
    _, found = logits(*load_model(tmp_path), example.messages())
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_adapters_of_a_released_checkpoint(tmp_path):
    folder = released.write_llava(tmp_path / "LLaDA-MedV")
    tiny_tokenizer().save_pretrained(folder)
    base, processor = load_model(folder)
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapters")
    chat = asked(random_image(40, 30), "Is there a lesion?")
    _, wanted = logits(adapted.eval(), processor, chat)
    torch.testing.assert_close(logits(*load_model(tmp_path / "adapters"), chat)[1], wanted, atol=1e-3, rtol=1e-3)
    with pytest.raises(
        ValueError, match=r"belong to '.*LLaDA-MedV', .* load them with `lladamedv\.loading\.load_model`"
    ):
        LLaDAMedVForConditionalGeneration.from_pretrained(tmp_path / "adapters")


def test_adapters_that_cannot_be_merged(tmp_path):
    config = PrefixTuningConfig(num_virtual_tokens=2, num_layers=2, token_dim=8, num_attention_heads=2)
    config.base_model_name_or_path = str(DEMO_MODEL)
    config.save_pretrained(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"Adapters that learn a prompt .* are not supported"):
        load_model(tmp_path)
    for base, message in (
        ("/no/such/model", "'/no/such/model'; there is no such model here"),
        ("", "''; there is no such model here"),
        (str(tmp_path), r"holds no config\.json"),  # which are adapters, too
    ):
        LoraConfig(base_model_name_or_path=base).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="pickled weights are not loaded"):
        load_model(tmp_path)


def test_what_is_no_model(tmp_path):
    for name in ("/no/such/folder", "neither", "a/b/c", tmp_path / "none"):
        with pytest.raises(ValueError, match=f"'{name}' is no folder; allowed are a folder and a Hub id"):
            load_model(name)
    with pytest.raises(ValueError, match=r"neither config\.json .* nor adapter_config\.json .*\)\.$"):
        load_model(tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"Such are in it: checkpoint-3\."):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="of a model of type 'bert'; allowed are 'lladamedv', and as released 'llada'"):
        load_model(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match="is no folder, and cannot be loaded from the Hub") as error:
        load_model("me/none")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "`dtype` is 'int8'; allowed are auto, float32, bfloat16, float16"),
        ({"device": "gpu"}, "The device 'gpu' cannot be used"),
        ({"device": "meta"}, "it holds no numbers"),
    ],
)
def test_bad_options_are_known_before_anything_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        load_model("me/none", **options)


def test_a_repository_that_changes_meanwhile(tmp_path, monkeypatch):
    """What is loaded is what was checked, under the name that was asked for."""
    snapshots = iter([DEMO_MODEL, tmp_path])
    monkeypatch.setattr(released_lladamedv, "snapshot_download", lambda *_, **__: str(next(snapshots)))
    model, _ = load_model("me/model")
    assert model.name_or_path == model.config.name_or_path == "me/model"
    assert next(snapshots) == tmp_path, "the repository is asked once"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype(dtype):
    assert load_model(dtype=dtype)[0].dtype == getattr(torch, dtype)
