"""The released layouts: names, configs, every key accounted for, and folders that are no checkpoints."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lladamedv import LLaDAMedVConfig, LLaDAMedVForConditionalGeneration, LLaDAMedVModel
from lladamedv.modeling_lladamedv.presets_lladamedv import PRESETS, SPECIAL_TOKENS, choose_preset
from lladamedv.modeling_lladamedv.released_lladamedv import convert_config, read_checkpoint, rename, resolve_source
from lladamedv.processing.processing_lladamedv import CHAT_TEMPLATES
from tests import released
from tests.parity.fixtures import FIXTURES


def shapes(config):
    return LLaDAMedVForConditionalGeneration.parameter_shapes(config)


def report_of(folder, **options):
    checkpoint = read_checkpoint(folder, **options)
    return checkpoint.compare(shapes(checkpoint.config))[1]


def change_config(folder, **change):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def change_weights(folder, drop=(), **add):
    file = folder / "model.safetensors"
    weights = load_file(file) | add
    save_file({name: value for name, value in weights.items() if name not in drop}, file, metadata={"format": "pt"})


# The full model


def test_the_8b_model_has_the_published_names_and_size():
    index = json.loads((FIXTURES / "real-index" / "llada-8b-instruct-hf.json").read_text())
    config = convert_config(index["config"], "llada_hf")
    ours = shapes(config)
    assert {rename(name, "llada_hf") for name in index["names"]} == set(ours)
    assert 2 * sum(torch.Size(shape).numel() for shape in ours.values()) == index["total_size_bytes"]
    assert config.text_config.bos_token_id == 126080, "the published 128000 is outside the vocabulary"
    assert ours["model.language_model.layers.31.mlp.down_proj.weight"] == (4096, 12288)
    # The vision-language model has the same language model.
    full = shapes(LLaDAMedVConfig())
    assert {name: full[name] for name in ours} == ours
    extra = [name for name in full if name not in ours]
    towers = [name for name in extra if name.startswith("model.vision_tower.")]
    assert len(towers) == 3 + 26 * 16 and len(extra) == len(towers) + 5
    assert full["model.multi_modal_projector.linear_1.weight"] == (4096, 1152)
    assert full["model.vision_tower.embeddings.position_embedding.weight"] == (729, 1152)


def test_special_tokens_are_the_released_ones():
    published = json.loads((FIXTURES / "real-index" / "llada-special-tokens.json").read_text())["added_tokens"]
    assert {token: str(number) for token, number in SPECIAL_TOKENS.items()}.items() <= {
        token: number for number, token in published.items()
    }.items()
    assert max(map(int, published)) + 1 == LLaDAMedVConfig().image_token_id


# Every key


def test_reports(tmp_path):
    llava = report_of(released.write_llava(tmp_path / "llava"))
    llava.check("x")
    assert len(llava.mapped) == len(released.llava_weights()) - 2 and not llava.missing
    assert set(llava.ignored) == {
        "model.vision_tower.vision_tower.vision_model.post_layernorm.weight",
        "model.vision_tower.vision_tower.vision_model.post_layernorm.bias",
    }
    assert llava.mapped["model.mm_projector.2.bias"] == "model.multi_modal_projector.linear_2.bias"
    assert "2 ignored" in llava.summary()[0] and "post-layernorm" in llava.summary()[1]
    olmo = report_of(released.write_olmo(tmp_path / "olmo", num_shards=3))
    assert len(olmo.mapped) == len(released.olmo_weights()) and not olmo.ignored
    assert (
        olmo.mapped["model.transformer.blocks.1.ff_out.weight"] == "model.language_model.layers.1.mlp.down_proj.weight"
    )


def test_the_last_siglip_layer_and_the_head_are_ignored(tmp_path):
    folder = released.write_llava(tmp_path / "x")
    tower = released.tower_weights(released.VISION_LAYERS, "model.vision_tower.vision_tower.vision_model.")
    change_weights(folder, **tower, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    report = report_of(folder)
    report.check(folder)
    reasons = {reason.split(":")[0] for reason in report.ignored.values()}
    assert reasons == {
        "SigLIP's last layer",
        "SigLIP's pooling head",
        "SigLIP's final norm (post-layernorm)",
        "computed from the configuration",
    }
    assert sum("layers.2." in key for key in report.ignored) == 16
    LLaDAMedVForConditionalGeneration.from_pretrained(folder)


def test_both_text_layouts_and_the_body_alone_give_the_same_model(tmp_path):
    olmo = released.write_olmo(tmp_path / "olmo")
    llama = released.write(tmp_path / "llama", released.LLAMA_CONFIG, released.llama_weights(), num_shards=2)
    models = [LLaDAMedVForConditionalGeneration.from_pretrained(folder) for folder in (olmo, llama)]
    body = LLaDAMedVModel.from_pretrained(olmo)
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert all(torch.equal(value, states[0][f"model.{name}"]) for name, value in body.state_dict().items())
    assert models[0].dtype == torch.bfloat16 and models[0].generation_config.eos_token_id == [126348, 126081]
    models[0].save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == states[0].keys(), "our names, not the released"


def test_subfolders_and_dtypes(tmp_path):
    released.write_olmo(tmp_path / "repo" / "inner")
    model = LLaDAMedVForConditionalGeneration.from_pretrained(tmp_path / "repo", subfolder="inner", dtype=torch.float32)
    assert model.dtype == torch.float32


@pytest.mark.parametrize(("drop", "add", "message"), [
    ("model.norm.weight", {}, r"lacks weights of the model: model\.language_model\.norm\.weight"),
    ("model.image_newline", {}, r"lacks weights of the model: model\.image_newline"),
    ("", {"model.layers.9.mlp.up_proj.weight": 2}, r"not part of this layout: model\.layers\.9"),
    ("", {"model.mm_projector.4.weight": 3}, r"not part of this layout: model\.mm_projector\.4"),
    ("", {"model.norm.weight": 3}, r"wrong shape: model\.norm\.weight \(3,\) instead of \(8,\)"),
    ("", {"model.multi_modal_projector.linear_1.bias": 8}, "which means the same as model.mm_projector.0"),
])  # fmt: skip
def test_keys_that_are_not_right(tmp_path, drop, add, message):
    folder = released.write_llava(tmp_path / "x")
    change_weights(folder, [drop], **{name: torch.ones(size) for name, size in add.items()})
    with pytest.raises(ValueError, match=message):
        LLaDAMedVForConditionalGeneration.from_pretrained(folder)


# Configs


def test_config_of_the_authors():
    original = json.loads((FIXTURES / "anyres_gqa" / "checkpoint" / "config.json").read_text())
    config = convert_config(original, "llava_llada")
    assert config.text_config.num_key_value_heads == 2 and config.vision_aspect_ratio == "anyres_max_4"
    assert config.image_grid_pinpoints[0] == [384, 384] and config.image_grid_pinpoints[-1] == [2304, 2304]
    assert config.vision_config.num_hidden_layers == 26, "without the tower's config, SigLIP2 so400m is meant"


def test_pinpoints_as_text_and_as_a_list():
    text = convert_config(released.LLAVA_CONFIG, "llava_llada", released.TOWER_CONFIG)
    assert text.image_grid_pinpoints == [[28, 28], [56, 28], [84, 28], [28, 56], [56, 56], [84, 56]]
    pinpoints = [[28, 56]]
    given = convert_config(released.LLAVA_CONFIG | {"image_grid_pinpoints": pinpoints}, "llava_llada")
    assert given.image_grid_pinpoints == pinpoints


@pytest.mark.parametrize(("layout", "change", "message"), [
    ("llava_llada", {"mm_vision_select_layer": -1}, "`mm_vision_select_layer` is -1"),
    ("llava_llada", {"mm_patch_merge_type": "flat"}, "`mm_patch_merge_type` is 'flat'"),
    ("llava_llada", {"image_grid_pinpoints": "all"}, "`image_grid_pinpoints` is 'all'"),
    ("llava_llada", {"image_grid_pinpoints": "(1x1),...,(100000x100000)"}, "allowed are at most 4096 grids"),
    ("llava_llada", {"rope_scaling": {"factor": 2}}, "`rope_scaling` is"),
    ("llada_hf", {"tie_word_embeddings": True}, "`tie_word_embeddings` is True"),
    ("llada_hf", {"hidden_size": None}, "`hidden_size` is missing"),
    ("llada", {"alibi": True}, "`alibi` is True"),
    ("llada", {"mlp_hidden_size": None}, "`mlp_hidden_size` is missing"),
])  # fmt: skip
def test_networks_that_were_never_released(layout, change, message):
    configs = {"llada": released.OLMO_CONFIG, "llada_hf": released.LLAMA_CONFIG, "llava_llada": released.LLAVA_CONFIG}
    with pytest.raises(ValueError, match=message):
        convert_config(configs[layout] | change, layout)


def test_other_vision_towers(tmp_path):
    config = {"model_type": "clip_vision_model"}
    with pytest.raises(ValueError, match="`model_type` of the vision tower is 'clip_vision_model'"):
        convert_config(released.LLAVA_CONFIG, "llava_llada", config)
    folder = released.write_llava(tmp_path / "x", mm_vision_tower="google/siglip2-so400m-patch14-384")
    with pytest.raises(ValueError, match="wrong shape"):  # it is not that tower
        LLaDAMedVForConditionalGeneration.from_pretrained(folder)
    model = LLaDAMedVForConditionalGeneration.from_pretrained(folder, vision_tower=folder / "tower")
    assert model.config.vision_config.hidden_size == released.VISION
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"`vision_tower` is .* allowed for checkpoints in a released layout only"):
        LLaDAMedVForConditionalGeneration.from_pretrained(tmp_path / "ours", vision_tower=folder / "tower")


# Presets


def test_presets():
    assert choose_preset("/somewhere/SLAKE_10E", text_only=False) == "llada-medv-vqa"
    assert choose_preset("XZDong123/LLaDA-MedV", text_only=False) == "llada-medv"
    assert choose_preset("anything", text_only=False) == "llada-medv"
    assert choose_preset("GSAI-ML/LLaDA-V", text_only=False) == "llada-v"
    assert choose_preset("LLaDA-V", text_only=True) == "llada", "a text-only model cannot have a prompt with images"
    for preset in PRESETS.values():
        assert preset.chat_template in CHAT_TEMPLATES
        assert preset.max_new_tokens % preset.block_length == 0
        assert preset.generation_options()["suppress_tokens"][0] == SPECIAL_TOKENS["<|mdm_mask|>"]


def test_the_preset_is_used_without_converting(tmp_path):
    folder = released.write_llava(tmp_path / "VQA_RAD_2E")
    options = LLaDAMedVForConditionalGeneration.from_pretrained(folder).generation_config
    assert (options.max_new_tokens, options.block_length, options.steps) == (64, 64, 64)
    assert options.eos_token_id == [126348]


# Folders that are no checkpoints


@pytest.mark.parametrize(("config", "weights", "message"), [
    ({"model_type": "llama"}, {}, "of a model of type 'llama'; allowed are 'lladamedv', and as released 'llada'"),
    ({}, {}, "of a model of type None"),
    (released.OLMO_CONFIG, {"model.layers.0.x": 8}, r"layout llada\) holds keys that are not part of this layout"),
    (released.LLAMA_CONFIG, {"model.transformer.ln_f.weight": 8}, r"layout llada_hf\) holds keys that are not"),
    (released.LLAMA_CONFIG, {"model.mm_projector.0.bias": 8}, "not part of this layout: model.mm_projector"),
    (released.LLAVA_CONFIG, {"model.mm_projector.0.bias": 8}, "A projector is no model: `lladamedv init"),
    (released.OLMO_CONFIG, {}, r"holds no weights: no model\.safetensors, nor shards of it\.$"),
])  # fmt: skip
def test_folders_that_are_none(tmp_path, config, weights, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if weights:
        save_file({key: torch.ones(size) for key, size in weights.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        report_of(tmp_path).check(tmp_path)


def test_broken_shards(tmp_path):
    folder = released.write_olmo(tmp_path / "x", num_shards=3)
    second = folder / "model-00002-of-00003.safetensors"
    whole = second.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    for content, message in ((whole[:-1], "cut off or damaged"), (b"", "cut off or damaged"), (pointer, "Git LFS")):
        second.write_bytes(content)
        with pytest.raises(ValueError, match=rf"model-00002-of-00003.*{message}"):
            report_of(folder)
    second.unlink()
    with pytest.raises(ValueError, match=r"lacks files that its index names: 'model-00002-of-00003"):
        report_of(folder)


def test_broken_indexes(tmp_path):
    folder = released.write_olmo(tmp_path / "x", num_shards=2)
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    key, other = sorted(places)[:2]
    first, second = (folder / places[name] for name in (key, other))
    for change, message in (
        ({"weight_map": places | {key: places[other]}}, f"1 weights are not where the index of .* says, as {key}"),
        ({"weight_map": places | {"model.x": places[key]}}, r"as model\.x: it names model-.* weight is in no file"),
        ({"weight_map": dict.fromkeys(places, second.name)}, "and the weight is in model-00001"),
    ):
        index.write_text(json.dumps(change))
        with pytest.raises(ValueError, match=message):
            report_of(folder)
    index.write_text(json.dumps({"weight_map": places}))
    save_file(load_file(first) | {other: load_file(second)[other]}, first)
    with pytest.raises(ValueError, match=f"{other}: .* is in {first.name} and {second.name}"):
        report_of(folder)
    index.unlink()
    with pytest.raises(ValueError, match=r"without model\.safetensors\.index\.json"):
        report_of(folder)


@pytest.mark.parametrize("source", ["no/such/folder", "a b/c", "me/none"])
def test_sources_that_are_nothing(source):
    with pytest.raises(ValueError, match=f"'{source}' is no folder, and cannot be had from the Hub"):
        resolve_source(source)
