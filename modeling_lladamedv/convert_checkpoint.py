"""Load checkpoints in the layout that the LLaDA-MedV and LLaDA-V authors release (`LlavaLLaDAModelLM`)."""

from __future__ import annotations

import json
from pathlib import Path

from .configuration_lladamedv import LLaDAMedVConfig
from .modeling_lladamedv import LLaDAMedVForConditionalGeneration


# Released names -> ours, as regular expressions for `from_pretrained(key_mapping=…)`.
KEY_MAPPING = {
    r"^model\.vision_tower\.vision_tower\.vision_model\.": "model.vision_tower.",
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.(layers|embed_tokens|norm)\.": r"model.language_model.\1.",
}
_TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act", "attention_bias", "mlp_bias",
    "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range",
)  # fmt: skip


def convert_config(original: dict, vision_tower: dict | None = None, **ids: int) -> LLaDAMedVConfig:
    """Our configuration for a released `config.json`.

    Args:
        original: the released configuration, of model_type `llava_llada`.
        vision_tower: configuration of the stand-alone SigLIP tower, if it is not SigLIP2 so400m/14-384.
        ids: `mask_token_id` and `image_token_id`, where they are not the released ones.

    Raises:
        ValueError: if the configuration is of another kind or uses something that the released models do not.
    """
    if original.get("model_type") != "llava_llada":
        raise ValueError(f"`model_type` is {original.get('model_type')!r}; allowed is 'llava_llada'.")
    fixed = {"mm_vision_select_layer": -2, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch"}
    for name, value in fixed.items():
        if original.get(name, value) != value:
            raise ValueError(f"`{name}` is {original[name]!r}; allowed is {value!r}, as in the released models.")
    vision = dict((vision_tower or {}).get("vision_config", vision_tower or {}))
    if vision:
        vision = {key: value for key, value in vision.items() if key not in ("architectures", "torch_dtype", "dtype")}
        vision |= {"num_hidden_layers": vision["num_hidden_layers"] - 1, "vision_use_head": False}
        vision["model_type"] = "siglip_vision_model"
    text = {name: original[name] for name in _TEXT_FIELDS if original.get(name) is not None}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": original.get("rope_theta", 500000.0)}
    text.setdefault("pad_token_id", text.get("eos_token_id", 126081))
    mode = original.get("image_aspect_ratio", "square")
    config = LLaDAMedVConfig(vision_config=vision or None, text_config=text, vision_aspect_ratio=mode, **ids)
    pinpoints = original.get("image_grid_pinpoints")
    if isinstance(pinpoints, list) and pinpoints:
        config.image_grid_pinpoints = pinpoints
    return config


def load_released_checkpoint(folder: str | Path, **kwargs) -> LLaDAMedVForConditionalGeneration:
    """Load a local checkpoint with the released names and layout.

    Args:
        folder: contains `config.json`, safetensors weights and, where `mm_vision_tower` names a subfolder, that
            tower's `config.json`.
        kwargs: for `from_pretrained`, for example `dtype`.

    Raises:
        ValueError: if the folder holds no such checkpoint or weights are missing.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"`folder` is {str(folder)!r}, which holds no config.json: it is no checkpoint.")
    original = json.loads((folder / "config.json").read_text())
    tower = folder / str(original.get("mm_vision_tower", "")) / "config.json"
    vision = json.loads(tower.read_text()) if original.get("mm_vision_tower") and tower.is_file() else None
    config = convert_config(original, vision)
    return LLaDAMedVForConditionalGeneration.from_pretrained(folder, config=config, key_mapping=KEY_MAPPING, **kwargs)
