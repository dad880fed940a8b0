"""Tiny checkpoints with random weights in the released layouts, names spelled out one by one."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


HIDDEN, MLP, VOCABULARY, LAYERS, VISION, VISION_MLP, TILE, PATCH, VISION_LAYERS = 8, 12, 126464, 2, 6, 10, 28, 14, 3
_OLMO = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out", "attn_norm", "ff_norm")
_LLAMA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
          "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")  # fmt: skip
_SHAPES = [(HIDDEN, HIDDEN)] * 4 + [(MLP, HIDDEN)] * 2 + [(HIDDEN, MLP)] + [(HIDDEN,)] * 2

OLMO_CONFIG = {
    "model_type": "llada", "d_model": HIDDEN, "n_heads": 2, "n_kv_heads": 2, "n_layers": LAYERS,
    "mlp_hidden_size": MLP, "embedding_size": VOCABULARY, "vocab_size": VOCABULARY, "max_sequence_length": 4096,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "block_type": "llama", "layer_norm_type": "rms", "rope": True,
    "activation_type": "silu", "weight_tying": False, "include_bias": False,
}  # fmt: skip
LLAMA_CONFIG = {
    "model_type": "llada", "hidden_size": HIDDEN, "num_attention_heads": 2, "num_key_value_heads": 2,
    "num_hidden_layers": LAYERS, "intermediate_size": MLP, "vocab_size": VOCABULARY, "rope_theta": 500000.0,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu", "bos_token_id": 128000,
    "eos_token_id": 126081,
}  # fmt: skip
LLAVA_CONFIG = LLAMA_CONFIG | {
    "model_type": "llava_llada", "image_aspect_ratio": "anyres_max_4", "image_grid_pinpoints": "(1x1),...,(2x3)",
    "mm_patch_merge_type": "spatial_unpad", "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch", "mm_vision_tower": "tower", "mm_hidden_size": VISION,
}  # fmt: skip
TOWER_CONFIG = {
    "model_type": "siglip_vision_model", "hidden_size": VISION, "intermediate_size": VISION_MLP, "image_size": TILE,
    "patch_size": PATCH, "num_hidden_layers": VISION_LAYERS, "num_attention_heads": 2,
}  # fmt: skip


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 1000 * len(shape) + shape[0])).bfloat16()


def olmo_weights() -> dict[str, torch.Tensor]:
    """LLaDA-8B's own layout."""
    weights = {"model.transformer.wte.weight": weight(VOCABULARY, HIDDEN, seed=1)}
    weights["model.transformer.ff_out.weight"] = weight(VOCABULARY, HIDDEN, seed=2)
    weights["model.transformer.ln_f.weight"] = weight(HIDDEN, seed=3)
    for layer in range(LAYERS):
        for number, (name, shape) in enumerate(zip(_OLMO, _SHAPES)):
            weights[f"model.transformer.blocks.{layer}.{name}.weight"] = weight(*shape, seed=10 * layer + number)
    return weights


def llama_weights() -> dict[str, torch.Tensor]:
    """The same numbers with Llama's names."""
    olmo = olmo_weights()
    weights = {"model.embed_tokens.weight": olmo["model.transformer.wte.weight"]}
    weights["lm_head.weight"] = olmo["model.transformer.ff_out.weight"]
    weights["model.norm.weight"] = olmo["model.transformer.ln_f.weight"]
    for layer in range(LAYERS):
        for theirs, name in zip(_OLMO, _LLAMA):
            weights[f"model.layers.{layer}.{name}.weight"] = olmo[f"model.transformer.blocks.{layer}.{theirs}.weight"]
    return weights


def tower_weights(layers: int = VISION_LAYERS, prefix: str = "vision_model.", head: bool = True):
    """A SigLIP tower."""
    square = dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), (VISION, VISION))
    linear = {f"self_attn.{name}": shape for name, shape in square.items()}
    linear |= {"mlp.fc1": (VISION_MLP, VISION), "mlp.fc2": (VISION, VISION_MLP)}
    weights = {
        "embeddings.patch_embedding.weight": weight(VISION, 3, PATCH, PATCH),
        "embeddings.patch_embedding.bias": weight(VISION),
        "embeddings.position_embedding.weight": weight((TILE // PATCH) ** 2, VISION),
        "post_layernorm.weight": weight(VISION),
        "post_layernorm.bias": weight(VISION),
    }
    for layer in range(layers):
        for number, (name, shape) in enumerate(linear.items()):
            weights[f"encoder.layers.{layer}.{name}.weight"] = weight(*shape, seed=layer + 10 * number)
            weights[f"encoder.layers.{layer}.{name}.bias"] = weight(shape[0], seed=layer + 10 * number)
        for norm in ("layer_norm1", "layer_norm2"):
            weights[f"encoder.layers.{layer}.{norm}.weight"] = weight(VISION, seed=layer)
            weights[f"encoder.layers.{layer}.{norm}.bias"] = weight(VISION, seed=layer + 1)
    if head:
        weights["head.probe"] = weight(1, 1, VISION)
        weights["head.layernorm.weight"] = weight(VISION)
    return {prefix + name: value for name, value in weights.items()}


def projector_weights(prefix: str = "model.") -> dict[str, torch.Tensor]:
    return {
        f"{prefix}mm_projector.0.weight": weight(HIDDEN, VISION, seed=5),
        f"{prefix}mm_projector.0.bias": weight(HIDDEN, seed=6),
        f"{prefix}mm_projector.2.weight": weight(HIDDEN, HIDDEN, seed=7),
        f"{prefix}mm_projector.2.bias": weight(HIDDEN, seed=8),
    }


def llava_weights(tower_layers: int = VISION_LAYERS - 1) -> dict[str, torch.Tensor]:
    """LLaDA-V's and LLaDA-MedV's layout."""
    tower = tower_weights(tower_layers, "model.vision_tower.vision_tower.vision_model.", head=False)
    newline = {"model.image_newline": weight(HIDDEN, seed=9)}
    return llama_weights() | projector_weights() | newline | tower


def write(folder: Path, config: dict, weights: dict[str, torch.Tensor], num_shards: int = 1) -> Path:
    """A checkpoint folder, with an index if there are several shards."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(weights)
    if num_shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    index = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: weights[name] for name in names[shard::num_shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def write_olmo(folder: Path, num_shards: int = 1) -> Path:
    return write(folder, OLMO_CONFIG, olmo_weights(), num_shards)


def write_tower(folder: Path) -> Path:
    return write(folder, TOWER_CONFIG, tower_weights())


def write_llava(folder: Path, num_shards: int = 1, **config) -> Path:
    write(folder, LLAVA_CONFIG | config, llava_weights(), num_shards)
    (folder / "tower").mkdir()
    (folder / "tower" / "config.json").write_text(json.dumps(TOWER_CONFIG))
    return folder
