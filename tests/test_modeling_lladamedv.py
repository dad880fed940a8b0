"""The network: attention back ends, padding, turns, images, precision, saving, and bad input."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lladamedv import LLaDAMedVForConditionalGeneration, LLaDAMedVModel
from tests.tiny import Words, image_prompt, small_vocabulary_config, tiny_model


CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def pixels(num_images=1, tiles=1, seed=0):
    return torch.randn(num_images, tiles, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def with_attention(model, implementation):
    config = small_vocabulary_config()
    config._attn_implementation = implementation
    other = LLaDAMedVForConditionalGeneration._from_config(config, attn_implementation=implementation)
    other.load_state_dict(model.state_dict())
    return other.eval()


@torch.no_grad()
def test_turn_mask_hides_later_turns_and_nothing_else(model):
    """Against one forward per turn with everything later cut off: the mask's definition."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    turns = torch.tensor([[0, 0, 0, 1, 1, 2, 2]])
    masked = model(input_ids=ids, turn_ids=turns).logits[0]
    changed = ids.clone()
    changed[0, 5:] = 40
    torch.testing.assert_close(model(input_ids=changed, turn_ids=turns).logits[0, :5], masked[:5], **CLOSE)
    torch.testing.assert_close(masked[:3], model(input_ids=ids[:, :3]).logits[0], **CLOSE)
    changed[0, 0] = 41
    assert not torch.allclose(model(input_ids=changed, turn_ids=turns).logits[0, 4], masked[4])


def test_turn_mask_under_flash_attention_is_refused(model, monkeypatch):
    monkeypatch.setattr(model.model.language_model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match="`segment_ids` cannot be used with attn_implementation='flash_attention_2'"):
        model(input_ids=torch.tensor([[5, 6]]), turn_ids=torch.tensor([[0, 1]]))


@torch.no_grad()
def test_logits_to_keep(model):
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    full = model(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids, logits_to_keep=2).logits, full[:, -2:], **CLOSE)
    places = torch.tensor([0, 3])
    torch.testing.assert_close(model(input_ids=ids, logits_to_keep=places).logits, full[:, places], **CLOSE)


@torch.no_grad()
def test_image_features_are_an_output_of_transformers(model):
    """What the tower sees, recomputed with it alone, and its hidden states."""
    outputs = model.get_image_features(pixels(2), output_hidden_states=True)
    assert isinstance(outputs, BaseModelOutputWithPooling)
    seen = model.model.vision_tower(pixels(2)[:, 0], output_hidden_states=True)
    torch.testing.assert_close(outputs.last_hidden_state, seen.last_hidden_state)
    torch.testing.assert_close(outputs.hidden_states, seen.hidden_states)
    projected = model.model.multi_modal_projector(seen.last_hidden_state)
    torch.testing.assert_close(torch.stack(outputs.pooler_output), projected)
    as_tuple = model.get_image_features(pixels(2), return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(torch.stack(as_tuple[1]), projected)


@pytest.mark.parametrize("offload", ["cpu", "disk", "device_map"])
@pytest.mark.parametrize("aspect_ratio", ["square", "anyres_max_4"])
@torch.no_grad()
def test_offloaded_weights(offload, aspect_ratio, tmp_path):
    """Weights that are on a meta device but for the moment of their use: same answers, scores and fillings."""
    model = tiny_model(aspect_ratio)
    images = {"pixel_values": pixels(1, 5), "image_sizes": torch.tensor([[60, 64]])}
    if aspect_ratio == "square":
        images = {"pixel_values": pixels()}
    width = len(model.get_image_features(**images).pooler_output[0])
    inputs = {"input_ids": torch.tensor([[99] * width + [5, 6, 7]]), **images}

    def results(model):
        options = {"max_new_tokens": 8, "generation_suffix": "30 31", "tokenizer": Words()}
        return [
            model.generate(**inputs, **options), model.generate(**inputs, use_cache=True, **options),
            model.score(**inputs, candidates=[[7, 8]]).log_likelihood,
            model.infill(**inputs, template="5 [[a:3]] 6", tokenizer=Words()).sequences,
        ]  # fmt: skip

    expected = results(model)
    if offload == "cpu":
        cpu_offload(model)
    elif offload == "disk":
        disk_offload(model, tmp_path)
    else:
        model.save_pretrained(tmp_path / "model")
        model = LLaDAMedVForConditionalGeneration.from_pretrained(
            tmp_path / "model", device_map="auto", max_memory={"cpu": 40_000}, offload_folder=tmp_path / "offload"
        )
        assert {"cpu", "disk"} == {str(device) for device in model.hf_device_map.values()}
    assert model.lm_head.weight.is_meta
    for got, wanted in zip(results(model), expected):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype):
    model = tiny_model()
    inputs = {"input_ids": image_prompt(), "pixel_values": pixels()}
    expected = model(**inputs).logits
    got = model.to(dtype)(**inputs).logits
    assert got.dtype == dtype
    assert torch.nn.functional.cosine_similarity(got.float().flatten(), expected.flatten(), dim=0) > 0.99


@torch.no_grad()
def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    ids, images = image_prompt(), pixels()
    expected = model(input_ids=ids, pixel_values=images)
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM, LLaDAMedVForConditionalGeneration):
        torch.testing.assert_close(
            auto.from_pretrained(tmp_path)(input_ids=ids, pixel_values=images).logits, expected.logits
        )
    body = AutoModel.from_pretrained(tmp_path)
    assert isinstance(body, LLaDAMedVModel)
    torch.testing.assert_close(
        model.lm_head(body(input_ids=ids, pixel_values=images).last_hidden_state), expected.logits
    )


def test_missing_and_misshaped_weights(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.multi_modal_projector.linear_1.weight"
    lacking = {key: value for key, value in weights.items() if key != name}
    save_file(lacking, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks weights of the model: {name}"):
        LLaDAMedVForConditionalGeneration.from_pretrained(tmp_path)
    save_file(lacking | {name: weights[name][:, 1:].clone()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"weights of the wrong shape: {name} \(16, 15\) instead of \(16, 16\)"):
        LLaDAMedVForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "exactly one of `input_ids` and `inputs_embeds`"),
        ({"input_ids": image_prompt()}, "`pixel_values` is None"),
        ({"input_ids": image_prompt()[:, 1:], "pixel_values": pixels()}, "15 image tokens .* make 16 features"),
        ({"input_ids": image_prompt(), "pixel_values": pixels(2)}, "16 image tokens .* make 32 features"),
        ({"input_ids": image_prompt(), "pixel_values": pixels()[0]}, "`pixel_values` has shape"),
        ({"inputs_embeds": torch.zeros(1, 2, 16), "pixel_values": pixels()}, "Images need `input_ids`"),
        ({"input_ids": torch.tensor([[5]]), "labels": torch.tensor([[5]])}, "`labels` is not accepted"),
    ],
)
def test_bad_input(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        model(**inputs)


def test_anyres_needs_sizes():
    model = tiny_model("anyres_max_4")
    with pytest.raises(ValueError, match="`image_sizes` is None, but 'anyres_max_4' needs"):
        model.get_image_features(pixels(1, 2))
    with pytest.raises(ValueError, match="1 tiles per image, but `image_sizes` asks for 5"):
        model.get_image_features(pixels(), torch.tensor([[64, 64]]))
    with pytest.raises(ValueError, match="`batch_num_images` sums to 2"):
        model.get_image_features(pixels(), torch.tensor([[64, 64]]), torch.tensor([2]))


@pytest.mark.parametrize("aspect_ratio", ["square", "anyres_max_4"])
def test_a_size_for_each_image(aspect_ratio):
    """Fewer sizes than images would lose images silently."""
    with pytest.raises(ValueError, match="`image_sizes` has 1 rows for 2 images; each needs one"):
        tiny_model(aspect_ratio).get_image_features(pixels(2, 5), torch.tensor([[40, 30]]))


# Images that several prompts show, and towers that are frozen


@pytest.mark.parametrize("aspect_ratio", ["square", "anyres_max_4"])
@torch.no_grad()
def test_an_image_index_spares_the_tower(aspect_ratio):
    model, sizes = tiny_model(aspect_ratio), torch.tensor([[40, 30], [64, 64]])
    images, index = pixels(2, 5), torch.tensor([1, 0, 1])
    tiles = []
    hook = model.model.vision_tower.register_forward_hook(lambda *a: tiles.append(len(a[2].last_hidden_state)))
    once = model.get_image_features(images, sizes, image_index=index).pooler_output
    again = model.get_image_features(images[index], sizes[index]).pooler_output
    hook.remove()
    assert len(once) == 3 and all(torch.equal(a, b) for a, b in zip(once, again)) and tiles[0] < tiles[1]


def test_an_image_index_that_is_none():
    model = tiny_model("anyres_max_4")
    sizes = torch.tensor([[40, 30], [64, 64]])
    with pytest.raises(ValueError, match=r"`image_index` is \[0, 0\], but there are 2 images"):
        model.get_image_features(pixels(2, 5), sizes, image_index=torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="`image_index` names image 0 alone in one prompt and beside others"):
        model.get_image_features(pixels(2, 5), sizes, torch.tensor([1, 2]), torch.tensor([0, 0, 1]))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_tower_keeps_no_activations(frozen):
    model = tiny_model()
    model.model.vision_tower.requires_grad_(not frozen)
    model.enable_input_require_grads()
    features = model.get_image_features(pixels()).last_hidden_state
    assert features.requires_grad is not frozen


def test_a_folder_without_a_configuration(tmp_path):
    """It is refused at once; the defaults would be a model of eight billion random weights."""
    save_file({"lm_head.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"which holds no config\.json"):
        LLaDAMedVForConditionalGeneration.from_pretrained(tmp_path)
