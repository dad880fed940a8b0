"""Plans and the shard-by-shard writer: new models from parts, projector files, dtypes, damaged weights."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lladamedv import LLaDAMedVForConditionalGeneration
from lladamedv.modeling_lladamedv import convert_checkpoint
from lladamedv.modeling_lladamedv.convert_checkpoint import write_weights
from lladamedv.modeling_lladamedv.released_lladamedv import read_checkpoint
from tests import released


def plan_conversion(folder, tower=None):
    return convert_checkpoint.plan_conversion(read_checkpoint(folder, tower), tower)


def plan_initialization(language_model, tower, projector=None, aspect_ratio="anyres_max_4", seed=0):
    checkpoint = read_checkpoint(language_model)
    return convert_checkpoint.plan_conversion(checkpoint, tower, aspect_ratio, projector, seed)


@pytest.fixture
def llada(tmp_path):
    return released.write_olmo(tmp_path / "llada")


@pytest.fixture
def siglip(tmp_path):
    return released.write_tower(tmp_path / "siglip")


def written(plan, folder, **options):
    folder.mkdir()
    write_weights(plan, folder, **options)
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def test_shards_and_index(tmp_path):
    plan = plan_conversion(released.write_llava(tmp_path / "x", num_shards=4))
    seen = []
    weights = written(plan, tmp_path / "out", max_shard_size=3_000_000, progress=seen.append)
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    # The two matrices with a row per token are 2 MB each and do not fit into one shard.
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    total = sum(value.numel() * value.itemsize for value in weights.values())
    assert index["metadata"]["total_size"] == total == sum(seen) == sum(plan.num_bytes().values())
    assert index["weight_map"].keys() == weights.keys() == set(plan.weights)
    for file in files:
        with safe_open(tmp_path / "out" / file, framework="pt") as handle:
            assert all(index["weight_map"][name] == file for name in handle.keys())
            assert handle.metadata() == {"format": "pt"}
    source = released.llava_weights()
    assert torch.equal(weights["lm_head.weight"], source["lm_head.weight"])
    assert torch.equal(weights["model.image_newline"], source["model.image_newline"])
    layer = "model.vision_tower.encoder.layers.1.mlp.fc2.weight"
    assert torch.equal(weights[layer], source["model.vision_tower.vision_tower.vision_model" + layer[18:]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(tmp_path, llada, dtype):
    plan = plan_conversion(llada)
    weights = written(plan, tmp_path / "out", dtype=dtype)
    assert {value.dtype for value in weights.values()} == {dtype}
    expected = released.olmo_weights()["model.transformer.blocks.0.ff_proj.weight"].to(dtype)
    assert torch.equal(weights["model.language_model.layers.0.mlp.gate_proj.weight"], expected)
    assert sum(plan.num_bytes(dtype).values()) == sum(value.numel() * value.itemsize for value in weights.values())


@pytest.mark.parametrize(("value", "dtype", "message"), [
    (math.nan, None, r"ln_f\.weight in model\.safetensors holds values that are not finite"),
    (math.inf, torch.float32, "not finite"),
    (1e6, torch.float16, r"ln_f\.weight .* does not fit into torch\.float16"),
])  # fmt: skip
def test_damaged_values(tmp_path, value, dtype, message):
    weights = released.olmo_weights()
    weights["model.transformer.ln_f.weight"][3] = value
    plan = plan_conversion(released.write(tmp_path / "x", released.OLMO_CONFIG, weights))
    with pytest.raises(ValueError, match=message):
        written(plan, tmp_path / "out", dtype=dtype)


def test_quantised_weights_are_refused(tmp_path):
    weights = released.olmo_weights()
    weights["model.transformer.blocks.0.ff_out.weight"] = torch.ones(released.HIDDEN, released.MLP, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"blocks\.0\.ff_out\.weight.* is stored as I8"):
        plan_conversion(released.write(tmp_path / "x", released.OLMO_CONFIG, weights))


def test_the_tower_from_elsewhere(tmp_path, siglip):
    """A checkpoint that was saved without its frozen tower gets it from the stand-alone SigLIP."""
    weights = {name: value for name, value in released.llava_weights().items() if "vision_tower" not in name}
    folder = released.write(tmp_path / "x", released.LLAVA_CONFIG | {"mm_vision_tower": "."}, weights)
    with pytest.raises(ValueError, match="`model_type` of the vision tower is 'llava_llada'"):
        plan_conversion(folder)
    folder = released.write_llava(tmp_path / "y")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks weights of the model: model\.vision_tower\."):
        plan_conversion(folder)
    plan = plan_conversion(folder, siglip)
    assert plan.report.layout == "llava_llada + siglip" and not plan.report.missing
    assert sum("pooling head" in reason for reason in plan.report.ignored.values()) == 2
    tower = "model.vision_tower.encoder.layers.0.mlp.fc1.bias"
    expected = released.tower_weights()["vision_model.encoder.layers.0.mlp.fc1.bias"]
    assert torch.equal(written(plan, tmp_path / "out")[tower], expected)


# New models


@pytest.mark.parametrize("aspect_ratio", ["anyres_max_4", "square"])
def test_a_new_model(tmp_path, llada, siglip, aspect_ratio):
    plan = plan_initialization(llada, siglip, aspect_ratio=aspect_ratio, seed=1)
    assert plan.report.layout == "llada + siglip"
    untrained = ["linear_1.bias", "linear_1.weight", "linear_2.bias", "linear_2.weight"]
    expected = [f"model.multi_modal_projector.{name}" for name in untrained]
    if aspect_ratio != "square":
        expected.insert(0, "model.image_newline")
    new = {name: weight for name, weight in plan.weights.items() if isinstance(weight, torch.Tensor)}
    assert sorted(new) == sorted(expected)
    # nn.Linear: uniform within 1/sqrt(inputs); newline: about 1/sqrt(width).
    assert new["model.multi_modal_projector.linear_1.weight"].shape == (released.HIDDEN, released.VISION)
    bound = released.VISION**-0.5
    assert 0.5 * bound < new["model.multi_modal_projector.linear_1.weight"].abs().max() <= bound * 1.01
    assert all(weight.dtype == torch.bfloat16 for weight in new.values())
    again = plan_initialization(llada, siglip, aspect_ratio=aspect_ratio, seed=1).weights
    other = plan_initialization(llada, siglip, aspect_ratio=aspect_ratio, seed=2).weights
    assert all(torch.equal(weight, again[name]) for name, weight in new.items())
    assert not any(torch.equal(weight, other[name]) for name, weight in new.items())
    folder = tmp_path / "out"
    weights = written(plan, folder)
    plan.config.save_pretrained(folder)
    model = LLaDAMedVForConditionalGeneration.from_pretrained(folder)
    assert model.config.vision_aspect_ratio == aspect_ratio and not model.config.text_only
    assert all(torch.equal(value.to(model.dtype), weights[name]) for name, value in model.state_dict().items())


def test_a_whole_siglip(tmp_path, llada):
    """SigLIP2 on the Hub is the whole model, text half included."""
    weights = released.tower_weights() | {
        "text_model.embeddings.token_embedding.weight": torch.ones(4, 2),
        "logit_scale": torch.ones(1),
        "logit_bias": torch.ones(1),
    }
    config = {"model_type": "siglip", "vision_config": released.TOWER_CONFIG}
    plan = plan_initialization(llada, released.write(tmp_path / "siglip2", config, weights))
    assert sum("text half" in reason for reason in plan.report.ignored.values()) == 3


@pytest.mark.parametrize("prefix", ["model.", "", "base_model.model.model."])
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("newline", [False, True])
def test_projector_files(tmp_path, llada, siglip, prefix, suffix, newline):
    weights = released.projector_weights(prefix)
    if newline:
        weights |= {f"{prefix}image_newline": released.weight(released.HIDDEN, seed=9)}
    file = tmp_path / f"mm_projector{suffix}"
    save_file(weights, file) if suffix == ".safetensors" else torch.save(weights, file)
    plan = plan_initialization(llada, siglip, file)
    assert plan.report.layout == "llada + siglip + projector" and set(weights) <= set(plan.report.mapped)
    trained = released.projector_weights()["model.mm_projector.2.weight"]
    assert torch.equal(plan.weights["model.multi_modal_projector.linear_2.weight"], trained)
    if newline:
        assert torch.equal(plan.weights["model.image_newline"], released.weight(released.HIDDEN, seed=9))
        square = plan_initialization(llada, siglip, file, aspect_ratio="square")
        assert "no rows to end" in square.report.ignored[f"{prefix}image_newline"]


def test_projector_files_that_are_none(tmp_path, llada, siglip):
    def refused(message, **weights):
        torch.save(weights, tmp_path / "p.bin")
        with pytest.raises(ValueError, match=message):
            plan_initialization(llada, siglip, tmp_path / "p.bin")

    good = released.projector_weights()
    refused("holds no tensors by name", step=3)
    refused("not part of this layout: model.mm_projector.4", **good, **{"model.mm_projector.4.bias": torch.ones(1)})
    refused("wrong shape", **good | {"model.mm_projector.0.bias": torch.ones(3)})
    good.pop("model.mm_projector.0.bias")
    refused("lacks weights of the model: model.multi_modal_projector.linear_1.bias", **good)
    with pytest.raises(ValueError, match="there is no such file"):
        plan_initialization(llada, siglip, tmp_path / "missing.bin")
    for name in ("p.bin", "p.safetensors"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(ValueError, match=rf"p\.{name[2:]}"):
            plan_initialization(llada, siglip, tmp_path / name)


def test_parts_that_do_not_fit(tmp_path, llada, siglip):
    with pytest.raises(ValueError, match=r"`vision_tower` is .* text-only checkpoint .* `lladamedv init`"):
        plan_conversion(llada, siglip)
    with pytest.raises(ValueError, match=r"`language_model` is .* has a vision tower already"):
        plan_initialization(released.write_llava(tmp_path / "llava"), siglip)
    with pytest.raises(ValueError, match="`model_type` of the vision tower is 'llada'"):
        plan_initialization(llada, llada)
    with pytest.raises(ValueError, match="`vision_aspect_ratio` is 'round'"):
        plan_initialization(llada, siglip, aspect_ratio="round")
    weights = released.olmo_weights()
    weights.pop("model.transformer.ln_f.weight")
    broken = released.write(tmp_path / "broken", released.OLMO_CONFIG, weights)
    with pytest.raises(ValueError, match=r"lacks weights of the model: model\.language_model\.norm\.weight\."):
        plan_initialization(broken, siglip)
