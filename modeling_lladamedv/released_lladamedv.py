"""The layouts in which LLaDA, LLaDA-V and LLaDA-MedV were released: what their weights and configs are called here.

A layout is data: a mapping of names, a mapping of fields, and presets for what the released models are run with.
`read_checkpoint` reads a folder's config, and `Checkpoint.compare` its headers; loading and conversion follow both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, SiglipVisionConfig
from transformers.utils import find_adapter_config_file

from .configuration_lladamedv import MAX_GRIDS, LLaDAMedVConfig
from .generation_config_lladamedv import LLaDAMedVGenerationConfig
from .stored_weights_lladamedv import KeyReport, read_json, read_weights


_OLMO, _OURS = r"^model\.transformer\.", "model.language_model."
_OLMO_LAYER = {
    "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj", "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm",
}  # fmt: skip
_LLAMA = {r"^model\.(layers|embed_tokens|norm)\.": _OURS + r"\1."}
_TOWER = "model.vision_tower."
# Per layout: released names -> ours, as regular expressions for `from_pretrained(key_mapping=…)`, which understands one
# group per expression.
KEY_MAPPINGS = {
    "lladamedv": {},  # this package's own names
    # LLaDA-8B as published: OLMo's names.
    "llada": {
        _OLMO + r"wte\.": _OURS + "embed_tokens.",
        _OLMO + r"ln_f\.": _OURS + "norm.",
        _OLMO + r"ff_out\.": "lm_head.",
        **{rf"{_OLMO}blocks\.(\d+)\.{theirs}\.": rf"{_OURS}layers.\1.{ours}." for theirs, ours in _OLMO_LAYER.items()},
    },
    # LLaDA-8B with Llama's names, as LLaDA-V's training code starts from.
    "llada_hf": _LLAMA,
    # LLaDA-V and LLaDA-MedV: the same, with LLaVA's names around it.
    "llava_llada": {
        r"^model\.vision_tower\.vision_tower\.vision_model\.": _TOWER,
        r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
        r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
        **_LLAMA,
    },
    # Parts, for a new model: a stand-alone SigLIP, and the projector that stage 1 trains (under PEFT or not).
    "siglip": {
        r"^vision_model\.": _TOWER,
        r"^(embeddings|encoder|post_layernorm|head)\.": _TOWER + r"\1.",
    },
    "projector": {
        r"^(.*\.)?mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
        r"^(.*\.)?mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
        r"^(.*\.)?image_newline$": "model.image_newline",
    },
}
TEXT_LAYOUTS = ("llada", "llada_hf")
RELEASED_MODEL_TYPES = ("llada", "llava_llada")

# The special tokens that prompts and decoding need, with their ids in the released tokenizer.
SPECIAL_TOKENS = {
    "<|startoftext|>": 126080,
    "<|endoftext|>": 126081,
    "<|mdm_mask|>": 126336,
    "<|start_header_id|>": 126346,
    "<|end_header_id|>": 126347,
    "<|eot_id|>": 126348,
}


_LLADA, _TOWER_ID = "GSAI-ML/LLaDA-8B-Instruct", "google/siglip2-so400m-patch14-384"


@dataclass(frozen=True)
class Preset:
    """What a released model expects and is run with: prompt and options of the authors' evaluation or demo."""

    description: str
    chat_template: str  # name of the prompt's template (`processing_lladamedv.CHAT_TEMPLATES`)
    max_new_tokens: int
    block_length: int
    steps: int
    names: tuple[str, ...] = ()  # under which such checkpoints were released
    # Special tokens that end an answer; and those that are never proposed, besides the mask.
    stop: tuple[str, ...] = ("<|eot_id|>",)
    suppress: tuple[str, ...] = ("<|endoftext|>", "<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>")
    base_models: tuple[str, ...] = (_LLADA, _TOWER_ID)  # Hub ids of what the model was made from

    def generation_options(self) -> dict:
        """Arguments of `LLaDAMedVGenerationConfig`."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "block_length": self.block_length,
            "steps": self.steps,
            "bos_token_id": SPECIAL_TOKENS["<|startoftext|>"],
            "pad_token_id": SPECIAL_TOKENS["<|endoftext|>"],
            "eos_token_id": [SPECIAL_TOKENS[token] for token in self.stop],
            "suppress_tokens": [SPECIAL_TOKENS[token] for token in ("<|mdm_mask|>", *self.suppress)],
        }


PRESETS = {
    "llada-medv": Preset(
        "LLaDA-MedV, open-ended answers (arXiv 2508.01617)", "llava_llada_med", 256, 64, 256,
        names=("LLaDAMedV-2A4E", "LLaDA-MedV"),
    ),
    "llada-medv-vqa": Preset(
        "LLaDA-MedV fine-tuned on VQA-RAD, SLAKE or PathVQA (arXiv 2508.01617)", "llava_llada_med", 64, 64, 64,
        names=("VQA_RAD_2E", "SLAKE_10E", "PathVQA_7E"),
    ),
    "llada-v": Preset(
        "LLaDA-V (arXiv 2505.16933), as the released demo runs it", "llava_llada", 128, 128, 128, names=("LLaDA-V",),
    ),
    "llada": Preset(
        "LLaDA-8B-Instruct, text only (arXiv 2502.09992)", "llada", 128, 32, 128,
        stop=("<|eot_id|>", "<|endoftext|>"), suppress=(), base_models=(_LLADA,),
    ),
}  # fmt: skip


def choose_preset(source: str | Path, text_only: bool) -> str:
    """Name of the preset for a released checkpoint: by the name it was released under, or by whether it sees."""
    named = (name for name, preset in PRESETS.items() if Path(source).name in preset.names)
    return "llada" if text_only else next(named, "llada-medv")


# What the released networks are; anything else would load and answer wrongly.
_FIXED_FIELDS = {
    "llada": {
        "block_type": "llama", "block_group_size": 1, "layer_norm_type": "rms", "layer_norm_with_affine": True,
        "activation_type": "silu", "rope": True, "alibi": False, "include_bias": False, "include_qkv_bias": False,
        "bias_for_layer_norm": False, "attention_layer_norm": False, "input_emb_norm": False, "scale_logits": False,
        "weight_tying": False,
    },
    "llada_hf": {
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
        "rope_scaling": None,
    },
    "llava_llada": {
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None, "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
    },
}  # fmt: skip
_OLMO_FIELDS = {
    "vocab_size": "embedding_size", "hidden_size": "d_model", "intermediate_size": "mlp_hidden_size",
    "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "max_sequence_length", "rms_norm_eps": "rms_norm_eps", "initializer_range": "init_std",
}  # fmt: skip
_VISION_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
    "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout",
)  # fmt: skip
# SigLIP's parts behind the second-to-last layer, whose output the features are, by their names behind the tower's.
_BEHIND_FEATURES = {
    "encoder.layers.{layers}.": "last layer", "post_layernorm.": "final norm (post-layernorm)", "head.": "pooling head",
}  # fmt: skip
# What a model is loaded from, and is downloaded of a repository: weights of other names are left there.
FILES = (
    "*.json", "*.jinja", "*.txt", "*.model", "*model.safetensors", "*model-*-of-*.safetensors", "shard-*.safetensors",
)  # fmt: skip


def compare(layout: str, stored: Mapping, expected: dict[str, tuple[int, ...]], config: LLaDAMedVConfig):
    """Compare names and shapes of stored weights with those of the model.

    Args:
        layout: one of `KEY_MAPPINGS`.
        stored: weights by the source's keys: tensors, or headers of them.
        expected: shapes by our names.
        config: ours, to know which parts of SigLIP are not built.

    Returns:
        The stored weights by our names, and the [`KeyReport`], which the caller checks.
    """
    report, sources = KeyReport(layout), {}
    for key, weight in stored.items():
        ours = rename(key, layout)
        if ours not in expected and (reason := _reason_to_ignore(key, ours, layout, config)):
            report.ignored[key] = reason
        elif ours not in expected:
            report.unexpected.append(key)
        elif ours in sources:
            report.unexpected.append(f"{key} (which means the same as {sources[ours]})")
        else:
            report.mapped[key], sources[ours] = ours, key
            if tuple(weight.shape) != tuple(expected[ours]):
                report.misshaped[key] = weight.shape, expected[ours]
    report.missing = [name for name in expected if name not in sources]
    return {ours: stored[key] for ours, key in sources.items()}, report


def rename(key: str, layout: str) -> str:
    """Our name of a released key; a key that the layout does not know keeps its name."""
    for pattern, replacement in KEY_MAPPINGS[layout].items():
        renamed, count = re.subn(pattern, replacement, key)
        if count:
            return renamed
    return key


def _reason_to_ignore(key: str, ours: str, layout: str, config: LLaDAMedVConfig) -> str | None:
    if key.endswith(("rotary_emb.inv_freq", "embeddings.position_ids")):
        return "computed from the configuration"
    if layout == "siglip" and key.startswith(("text_model.", "logit_scale", "logit_bias")):
        return "SigLIP's text half: only its vision tower is used"
    for prefix, part in _BEHIND_FEATURES.items() if not config.text_only else ():
        if ours.startswith(_TOWER + prefix.format(layers=config.vision_config.num_hidden_layers)):
            return f"SigLIP's {part}: the features are the output of the second-to-last layer"
    if ours == "model.image_newline" and not config.text_only and config.max_anyres_tiles is None:
        return "newline embedding: images of one tile have no rows to end"
    return None


@dataclass(frozen=True)
class Checkpoint:
    """A local folder of a model: the layout of its weights, its `config.json` as it is, and what that means to us."""

    folder: Path
    layout: str  # "llada", "llada_hf", "llava_llada" as released, or "lladamedv"
    original: dict
    config: LLaDAMedVConfig
    preset: str  # one of `PRESETS`, for a released checkpoint
    source: str  # the name that led to the folder: a Hub id, or the folder itself

    @property
    def is_released(self) -> bool:
        return self.layout != LLaDAMedVConfig.model_type

    def compare(self, expected: dict[str, tuple[int, ...]], config: LLaDAMedVConfig | None = None):
        """As [`compare`], with the headers of this folder's weights. Raises ValueError as [`read_weights`] does."""
        return compare(self.layout, read_weights([*self.folder.iterdir()]), expected, config or self.config)

    def loading_options(self) -> dict:
        """Arguments with which Transformers' `from_pretrained` loads this checkpoint."""
        if not self.is_released:
            return {"config": self.config}
        # The generation_config.json beside released weights is one for autoregressive models.
        generation = LLaDAMedVGenerationConfig(**PRESETS[self.preset].generation_options())
        return {"config": self.config, "key_mapping": KEY_MAPPINGS[self.layout], "generation_config": generation}

    def load(self, model_class: type, **options):
        """Load the model from the files that were read here: a Hub repository may have changed since.

        Args:
            model_class: `LLaDAMedVForConditionalGeneration`.
            options: of its `from_pretrained`, such as `dtype`.
        """
        model = model_class.from_pretrained(self.folder, **self.loading_options(), **options)
        model.name_or_path = model.config.name_or_path = self.source  # what adapters and cards call it
        return model


def read_checkpoint(
    folder: Path, vision_tower: str | Path | None = None, source: str | Path | None = None, original: dict | None = None
) -> Checkpoint:
    """Read the configuration of a local folder with a model, released or of this package's own format.

    Args:
        folder: `config.json` and safetensors weights, with an index if there is more than one file.
        vision_tower: folder with the `config.json` of the stand-alone SigLIP model. By default the subfolder that
            `mm_vision_tower` names, and where there is none, SigLIP2 so400m/14-384 is meant.
        source: the name that led to the folder, which decides on the preset; by default the folder.
        original: what `config.json` holds, if it is read already.

    Raises:
        ValueError: if there is no such configuration, or it describes no network of this kind.
    """
    original = original or read_json(folder / "config.json")
    layout, tower, named = original.get("model_type"), None, str(original.get("mm_vision_tower") or "")
    if layout not in (LLaDAMedVConfig.model_type, *RELEASED_MODEL_TYPES):
        raise ValueError(
            f"The config.json of {str(folder)!r} is of a model of type {layout!r}; allowed are "
            f"{LLaDAMedVConfig.model_type!r}, and as released {', '.join(map(repr, RELEASED_MODEL_TYPES))}."
        )
    if layout == "llada" and "d_model" not in original:  # d_model is OLMo's
        layout = "llada_hf"
    elif layout == "llava_llada" and (vision_tower or (named and (folder / named / "config.json").is_file())):
        if not vision_tower and not (folder / named).resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"`mm_vision_tower` is {named!r}, which is outside of {str(folder)!r}; allowed are its subfolders. "
                "Name the folder with `vision_tower`, if it can be trusted."
            )
        tower = read_json(Path(vision_tower or folder / named, "config.json"))
    try:
        config = convert_config(original, layout, tower)
    except (StrictDataclassError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"The config.json of {str(folder)!r} describes no model: {reason}") from error
    source = str(source or folder)
    return Checkpoint(folder, layout, original, config, choose_preset(source, config.text_only), source)


def find_released(source: str | Path, vision_tower: str | Path | None = None, **hub_options) -> Checkpoint | None:
    """The checkpoint that a folder or Hub id means, downloaded if need be; `None` if it is in no released layout.

    Args:
        source: as of `from_pretrained`.
        vision_tower: see [`read_checkpoint`].
        hub_options: `revision`, `subfolder`, `cache_dir` and the like, as of `from_pretrained`.

    Raises:
        ValueError: if `source` has no `config.json`, or holds adapters of a released checkpoint; or for the reasons of
            [`read_checkpoint`].
    """
    original, _ = PreTrainedConfig.get_config_dict(source, **hub_options)
    if not original and (adapters := find_adapter_config_file(str(source), **hub_options)):
        base = str(read_json(Path(adapters)).get("base_model_name_or_path"))
        if PreTrainedConfig.get_config_dict(base)[0].get("model_type") in RELEASED_MODEL_TYPES:
            raise ValueError(
                f"The adapters {str(source)!r} belong to {base!r}, a checkpoint in a released layout; load them with "
                "`lladamedv.loading.load_model`, or with `peft.PeftModel.from_pretrained` into the loaded model."
            )
        return None  # Transformers loads the model that adapters name
    if not original:  # Transformers would go on with the defaults and initialise eight billion weights
        raise ValueError(f"`pretrained_model_name_or_path` is {str(source)!r}, which holds no config.json.")
    if original.get("model_type") not in RELEASED_MODEL_TYPES:
        return None
    subfolder = hub_options.pop("subfolder", None) or ""
    return read_checkpoint(resolve_source(source, **hub_options) / subfolder, vision_tower, source, original)


def convert_config(original: dict, layout: str, vision_tower: dict | None = None) -> LLaDAMedVConfig:
    """Our configuration for a `config.json`, with the ids of the released tokenizer: the files' own are not reliable.

    Args:
        original: what it holds.
        layout: `"llada"`, `"llada_hf"`, `"llava_llada"`, or `"lladamedv"`.
        vision_tower: configuration of the stand-alone SigLIP model, if it is not SigLIP2 so400m/14-384.

    Raises:
        ValueError: if a field is missing or says that the network is not one of the released kind.
    """
    if layout == LLaDAMedVConfig.model_type:
        return LLaDAMedVConfig.from_dict(original)
    _check_fields(original, _FIXED_FIELDS["llada" if layout == "llada" else "llada_hf"])
    names = _OLMO_FIELDS if layout == "llada" else {name: name for name in _OLMO_FIELDS}
    optional = ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "initializer_range")
    text = {}
    for ours, theirs in names.items():
        if original.get(theirs) is not None:
            text[ours] = original[theirs]
        elif ours not in optional:
            raise ValueError(f"`{theirs}` is missing in the config.json of layout {layout}.")
    text.setdefault("num_key_value_heads", text["num_attention_heads"])
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": original.get("rope_theta", 500000.0)}
    if layout in TEXT_LAYOUTS:
        return LLaDAMedVConfig(text_config=text, text_only=True)

    _check_fields(original, _FIXED_FIELDS["llava_llada"])
    mode = original.get("image_aspect_ratio", "square")
    merge = original.get("mm_patch_merge_type", "flat")
    wanted = "spatial_unpad" if str(mode).startswith("anyres") else "flat"
    if merge != wanted:
        raise ValueError(
            f"`mm_patch_merge_type` is {merge!r} with `image_aspect_ratio` {mode!r}; allowed is {wanted!r}."
        )
    pinpoints = original.get("image_grid_pinpoints")
    vision = None if vision_tower is None else convert_vision_config(vision_tower)
    if isinstance(pinpoints, str) and mode.startswith("anyres"):
        pinpoints = _expand_pinpoints(pinpoints, (vision or {}).get("image_size", 384))
    return LLaDAMedVConfig(
        vision_config=vision, text_config=text, vision_aspect_ratio=mode, image_grid_pinpoints=pinpoints or None
    )


def _expand_pinpoints(text: str, tile: int) -> list[list[int]]:
    """`"(1x1),...,(6x6)"` (columns x rows) as `[height, width]` in pixels, in LLaVA's order."""
    match = re.fullmatch(r"\((\d+)x(\d+)\),\.\.\.,\((\d+)x(\d+)\)", text.replace(" ", ""))
    if match is None:
        raise ValueError(f"`image_grid_pinpoints` is {text!r}; a text must look like '(1x1),...,(6x6)'.")
    first_column, first_row, last_column, last_row = map(int, match.groups())
    if (last_column - first_column + 1) * (last_row - first_row + 1) > MAX_GRIDS:
        raise ValueError(f"`image_grid_pinpoints` is {text!r}; allowed are at most {MAX_GRIDS} grids.")
    columns, rows = range(first_column, last_column + 1), range(first_row, last_row + 1)
    return [[tile * row, tile * column] for column in columns for row in rows]


def convert_vision_config(original: dict) -> dict:
    """Our `vision_config` for the `config.json` of a SigLIP model, without its last layer and its head.

    Raises:
        ValueError: if it is another kind of model.
    """
    tower = original.get("vision_config", original)
    if tower.get("model_type") != "siglip_vision_model":
        raise ValueError(
            f"`model_type` of the vision tower is {tower.get('model_type')!r}; allowed is 'siglip_vision_model' or a "
            "whole 'siglip' model (SigLIP2 with a fixed resolution is one)."
        )
    config = SiglipVisionConfig(**{name: tower[name] for name in _VISION_FIELDS if tower.get(name) is not None})
    values = {name: getattr(config, name) for name in _VISION_FIELDS}
    return values | {
        "model_type": "siglip_vision_model",
        "num_hidden_layers": config.num_hidden_layers - 1,
        "vision_use_head": False,
    }


def _check_fields(original: dict, fixed: dict) -> None:
    for name, value in fixed.items():
        found = original.get(name, value)
        if found != value and not (found is None and value is False):
            raise ValueError(f"`{name}` is {found!r}; allowed is {value!r}, as in the released models.")


def resolve_source(source: str | Path, revision: str | None = None, **hub_options) -> Path:
    """A local folder: `source` itself, or the download of a Hub repository (configs, tokenizer, safetensors).

    Raises:
        ValueError: if it is neither an existing folder nor a repository that can be downloaded.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    hub_options |= {"allow_patterns": list(FILES), "ignore_patterns": "checkpoint-*/*"}
    try:
        return Path(snapshot_download(str(source), revision=revision, **hub_options))
    except Exception as error:  # the Hub client raises many kinds: no Hub id, no network, no such repository, no rights
        raise ValueError(f"{str(source)!r} is no folder, and cannot be had from the Hub: {error}") from error


__all__ = ["Checkpoint", "read_checkpoint"]
