"""The layouts in which LLaDA, LLaDA-V and LLaDA-MedV were released: what their weights and configs are called here.

`read_checkpoint` looks at a folder without loading a weight and says what each of its keys becomes; `from_pretrained`
and the conversion (`convert_checkpoint.py`) both follow it.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import SiglipVisionConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from .configuration_lladamedv import MAX_GRIDS, LLaDAMedVConfig


_OLMO = r"^model\.transformer\."
_OLMO_BLOCK = _OLMO + r"blocks\.(\d+)\."
_OUR_BLOCK = r"model.language_model.layers.\1."
_TOWER = "model.vision_tower."
# Per layout: released names -> ours, as regular expressions for `from_pretrained(key_mapping=…)`, which understands one
# group per expression.
KEY_MAPPINGS = {
    # LLaDA-8B as published: OLMo's names.
    "llada": {
        _OLMO + r"wte\.": "model.language_model.embed_tokens.",
        _OLMO + r"ln_f\.": "model.language_model.norm.",
        _OLMO + r"ff_out\.": "lm_head.",
        _OLMO_BLOCK + r"q_proj\.": _OUR_BLOCK + "self_attn.q_proj.",
        _OLMO_BLOCK + r"k_proj\.": _OUR_BLOCK + "self_attn.k_proj.",
        _OLMO_BLOCK + r"v_proj\.": _OUR_BLOCK + "self_attn.v_proj.",
        _OLMO_BLOCK + r"attn_out\.": _OUR_BLOCK + "self_attn.o_proj.",
        _OLMO_BLOCK + r"ff_proj\.": _OUR_BLOCK + "mlp.gate_proj.",
        _OLMO_BLOCK + r"up_proj\.": _OUR_BLOCK + "mlp.up_proj.",
        _OLMO_BLOCK + r"ff_out\.": _OUR_BLOCK + "mlp.down_proj.",
        _OLMO_BLOCK + r"attn_norm\.": _OUR_BLOCK + "input_layernorm.",
        _OLMO_BLOCK + r"ff_norm\.": _OUR_BLOCK + "post_attention_layernorm.",
    },
    # LLaDA-8B with Llama's names, as LLaDA-V's training code starts from.
    "llada_hf": {r"^model\.(layers|embed_tokens|norm)\.": r"model.language_model.\1."},
    # LLaDA-V and LLaDA-MedV: the same, with LLaVA's names around it.
    "llava_llada": {
        r"^model\.vision_tower\.vision_tower\.vision_model\.": _TOWER,
        r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
        r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
        r"^model\.(layers|embed_tokens|norm)\.": r"model.language_model.\1.",
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


@dataclass(frozen=True)
class Preset:
    """What a released model expects and is run with.

    Args:
        description: for whom it is.
        chat_template: name of the prompt's template (`processing_lladamedv.CHAT_TEMPLATES`).
        max_new_tokens, block_length, steps: of the authors' evaluation or demo.
        stop: special tokens that end an answer.
        suppress: special tokens that are never proposed, besides the mask.
        base_models: what the model was made from, as Hub ids.
        papers: arXiv ids.
    """

    description: str
    chat_template: str
    max_new_tokens: int
    block_length: int
    steps: int
    stop: tuple[str, ...] = ("<|eot_id|>",)
    suppress: tuple[str, ...] = ("<|endoftext|>", "<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>")
    base_models: tuple[str, ...] = ()
    papers: tuple[str, ...] = ()

    def generation_options(self, token_ids: dict[str, int] = SPECIAL_TOKENS) -> dict:
        """Arguments of `LLaDAMedVGenerationConfig`; `token_ids` are those of the tokenizer."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "block_length": self.block_length,
            "steps": self.steps,
            "bos_token_id": token_ids["<|startoftext|>"],
            "pad_token_id": token_ids["<|endoftext|>"],
            "eos_token_id": [token_ids[token] for token in self.stop],
            "suppress_tokens": [token_ids[token] for token in ("<|mdm_mask|>", *self.suppress)],
        }


_LLADA, _TOWER_ID = "GSAI-ML/LLaDA-8B-Instruct", "google/siglip2-so400m-patch14-384"
_MEDV_PAPERS = ("2508.01617", "2505.16933", "2502.09992")
PRESETS = {
    "llada-medv": Preset(
        "LLaDA-MedV, open-ended answers (arXiv 2508.01617)", "llava_llada_med", 256, 64, 256,
        base_models=(_LLADA, _TOWER_ID), papers=_MEDV_PAPERS,
    ),
    "llada-medv-vqa": Preset(
        "LLaDA-MedV fine-tuned on VQA-RAD, SLAKE or PathVQA (arXiv 2508.01617)", "llava_llada_med",
        64, 64, 64, base_models=(_LLADA, _TOWER_ID), papers=_MEDV_PAPERS,
    ),
    "llada-v": Preset(
        "LLaDA-V (arXiv 2505.16933), as the released demo runs it", "llava_llada", 128, 128, 128,
        base_models=(_LLADA, _TOWER_ID), papers=_MEDV_PAPERS[1:],
    ),
    "llada": Preset(
        "LLaDA-8B-Instruct, text only (arXiv 2502.09992)", "llada", 128, 32, 128,
        stop=("<|eot_id|>", "<|endoftext|>"), suppress=(), base_models=(_LLADA,), papers=_MEDV_PAPERS[2:],
    ),
}  # fmt: skip
# The names under which the checkpoints were released, for which the right preset is known.
_PRESET_OF_NAME = {
    "LLaDAMedV-2A4E": "llada-medv",
    "LLaDA-MedV": "llada-medv",
    "VQA_RAD_2E": "llada-medv-vqa",
    "SLAKE_10E": "llada-medv-vqa",
    "PathVQA_7E": "llada-medv-vqa",
    "LLaDA-V": "llada-v",
    "LLaDA-8B-Instruct": "llada",
}


def choose_preset(source: str | Path, layout: str) -> str:
    """Name of the preset for a released checkpoint, by the name it was released under or else by its layout."""
    default = "llada" if layout in TEXT_LAYOUTS else "llada-medv"
    preset = _PRESET_OF_NAME.get(Path(source).name, default)
    return default if (preset == "llada") != (default == "llada") else preset


def preset_of(source: str | Path, config) -> Preset:
    """The preset for a released checkpoint whose configuration is read."""
    return PRESETS[choose_preset(source, "llada" if config.text_only else "llava_llada")]


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
_COMPUTED = r"(rotary_emb\.inv_freq|embeddings\.position_ids)$"
# What is downloaded of a repository, and may be read of a folder.
_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")
_LARGEST_JSON = 2**24  # bytes of a configuration or an index: Python takes about twenty times that to read it


@dataclass(frozen=True)
class StoredWeight:
    """A weight in a safetensors file: where it is, its shape, and its dtype as safetensors writes it ("BF16")."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


@dataclass
class KeyReport:
    """What became of every key.

    Args:
        layout: one of `KEY_MAPPINGS`, or several joined by " + " where a model was put together from parts.
        mapped: source key -> our name.
        ignored: source key -> why it is not needed.
        missing: our names that nothing in the source stands for.
        unexpected: source keys that mean nothing here.
        misshaped: source key -> the shape that it has and the one that it should have.
    """

    layout: str
    mapped: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: dict[str, str] = field(default_factory=dict)

    def add(self, part: KeyReport) -> None:
        """Account for another source that the same model is put together from."""
        self.layout += f" + {part.layout}"
        self.mapped |= part.mapped
        self.ignored |= part.ignored

    def check(self, source: object) -> None:
        """Raise ValueError, naming keys, unless every weight is there, known and of the right shape."""
        problems = {
            "holds keys that are not part of this layout": self.unexpected,
            "holds weights of the wrong shape": [f"{key} {shapes}" for key, shapes in self.misshaped.items()],
            "lacks weights of the model": self.missing,
        }
        for problem, keys in problems.items():
            if keys:
                shown = ", ".join(sorted(keys)[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
                raise ValueError(f"The checkpoint {str(source)!r} (layout {self.layout}) {problem}: {shown}.")

    def summary(self) -> list[str]:
        """Lines for people: counts, and the reasons for what was ignored."""
        lines = [
            f"layout {self.layout}: {len(self.mapped)} keys mapped, {len(self.ignored)} ignored, "
            f"{len(self.missing)} missing"
        ]
        for reason, count in Counter(self.ignored.values()).items():
            lines.append(f"  ignored {count}: {reason}")
        return lines


@dataclass
class ReleasedCheckpoint:
    """A folder in a released layout, as read from its headers: our configuration, and where each weight is."""

    folder: Path
    layout: str
    config: LLaDAMedVConfig
    stored: dict[str, StoredWeight]  # by source key

    @property
    def key_mapping(self) -> dict[str, str]:
        return KEY_MAPPINGS[self.layout]

    def match(self, expected: dict[str, tuple[int, ...]]) -> tuple[dict[str, StoredWeight], KeyReport]:
        """The weight for each of our names, and the report; `expected` gives our names and shapes."""
        return match_keys(self.layout, self.stored, expected, self.config)


def match_keys(
    layout: str, stored: dict[str, StoredWeight], expected: dict[str, tuple[int, ...]], config: LLaDAMedVConfig
) -> tuple[dict[str, StoredWeight], KeyReport]:
    """Find the stored weight for each of our weights.

    Args:
        layout: one of `KEY_MAPPINGS`.
        stored: the source's weights by key.
        expected: our names and shapes.
        config: ours, to know which parts of SigLIP are not built.

    Returns:
        The weights by our name, and the report, which the caller checks.
    """
    report = KeyReport(layout)
    found = {}
    for key, weight in stored.items():
        ours = rename(key, layout)
        if ours in expected:
            report.mapped[key] = ours
            if ours in found:
                report.unexpected.append(f"{key} (which means the same as {found[ours].key})")
            elif weight.shape != tuple(expected[ours]):
                report.misshaped[key] = f"{weight.shape} instead of {tuple(expected[ours])}"
            found[ours] = weight
        elif reason := _reason_to_ignore(key, ours, layout, config):
            report.ignored[key] = reason
        else:
            report.unexpected.append(key)
    report.missing = [name for name in expected if name not in found]
    return found, report


def rename(key: str, layout: str) -> str:
    """Our name of a released key; a key that the layout does not know keeps its name."""
    for pattern, replacement in KEY_MAPPINGS[layout].items():
        renamed, count = re.subn(pattern, replacement, key)
        if count:
            return renamed
    return key


def _reason_to_ignore(key: str, ours: str, layout: str, config: LLaDAMedVConfig) -> str | None:
    if re.search(_COMPUTED, key):
        return "computed from the configuration"
    if layout == "siglip" and re.match(r"text_model\.|logit_(scale|bias)$", key):
        return "SigLIP's text half: only its vision tower is used"
    if ours.startswith(_TOWER) and config.vision_config is not None:
        last = f"{_TOWER}encoder.layers.{config.vision_config.num_hidden_layers}."
        for prefix, part in ((last, "last layer"), (f"{_TOWER}post_layernorm.", "final norm (post-layernorm)"),
                             (f"{_TOWER}head.", "pooling head")):  # fmt: skip
            if ours.startswith(prefix):
                return f"SigLIP's {part}: the features are the output of the second-to-last layer"
    if ours == "model.image_newline" and not config.text_only and config.max_anyres_tiles is None:
        return "newline embedding: images of one tile have no rows to end"
    return None


def read_checkpoint(folder: str | Path, vision_tower: str | Path | None = None, **ids: int) -> ReleasedCheckpoint:
    """Look at a local folder in one of the released layouts, without loading a weight.

    Args:
        folder: `config.json` and safetensors weights, with an index if there is more than one file.
        vision_tower: folder with the `config.json` of the stand-alone SigLIP model. By default the subfolder that
            `mm_vision_tower` names, and where there is none, SigLIP2 so400m/14-384 is meant.
        ids: `mask_token_id`, `image_token_id`, and `bos_token_id`, `eos_token_id`, `pad_token_id` of the tokenizer;
            by default those of the released one. (The released configs' own are not reliable.)

    Raises:
        ValueError: if the folder holds no complete checkpoint in one of these layouts, or one of a network that the
            released models do not have.
    """
    folder = Path(folder)
    original = read_config(folder)
    stored = read_weights(folder)
    layout = detect_layout(stored, original, folder)
    tower = None
    if layout == "llava_llada":
        tower_folder = Path(vision_tower) if vision_tower is not None else None
        named = original.get("mm_vision_tower")
        if tower_folder is None and named and (folder / str(named) / "config.json").is_file():
            tower_folder = folder / str(named)
            if not _is_within(tower_folder, folder):
                raise ValueError(
                    f"`mm_vision_tower` is {named!r}, which is outside of {str(folder)!r}; allowed are its subfolders. "
                    "Name the folder with `vision_tower`, if it can be trusted."
                )
        tower = read_config(tower_folder) if tower_folder is not None else None
    try:
        config = convert_config(original, layout, tower, **ids)
    except (StrictDataclassError, ArithmeticError, AttributeError, TypeError) as error:  # for values of other types
        reason = " ".join(str(error).split())
        raise ValueError(f"The config.json of {str(folder)!r} describes no model: {reason}") from error
    return ReleasedCheckpoint(folder, layout, config, stored)


def check_folder(folder: str | Path) -> Path:
    """See that the files of a local folder, whoever made it, keep to that folder, and that its JSON can be read.

    Links may lead to other files of the folder. The Hub's cache is made of links, which lead to the blobs of the same
    repository or of the whole cache.

    Args:
        folder: of a model, of a part of one, or of a tokenizer.

    Returns:
        The folder.

    Raises:
        ValueError: for a file that is a link to elsewhere or none that can be read, such as a pipe; an index that names
            files elsewhere; or a `config.json` or index of more than 16 MB or that is no JSON object.
    """
    folder = Path(folder)
    for file in (file for pattern in _FILES for file in folder.glob(pattern)):
        if not _is_within(file, folder):
            raise ValueError(
                f"{str(file)!r} is a link to {os.path.realpath(file)!r}; allowed are links to what is within the same "
                "folder. Copy what it leads to, if that can be trusted."
            )
        if not file.is_file() and not file.is_dir():  # reading a pipe may never end
            raise ValueError(f"{str(file)!r} is no regular file; no others are allowed.")
        is_read = file.name.endswith("config.json") or ".index." in file.name
        if is_read and file.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"{str(file)!r} has {file.stat().st_size} bytes; allowed are at most {_LARGEST_JSON}.")
    if (folder / "config.json").is_file():
        _read_json(folder / "config.json")
    for index in folder.glob("*.safetensors.index*.json"):  # also those of variants
        _read_index(index)
    return folder


def _is_within(file: Path, folder: Path) -> bool:
    """Whether a file, or what it is a link to, is where the files of a folder may be."""
    # Not `Path.resolve`, which raises RuntimeError for links in a circle.
    place, home = Path(os.path.realpath(file)), Path(os.path.realpath(folder))
    homes = [home]
    for repository in home.parents:  # models--OWNER--NAME/snapshots/REVISION
        if repository.name.startswith("models--") and home.relative_to(repository).parts[0] == "snapshots":
            homes += [repository, repository.parent / "blobs"]
    return any(place.is_relative_to(home) for home in homes)


def read_config(folder: Path) -> dict:
    """`config.json` of a local folder.

    Raises:
        ValueError: if it is missing or not JSON, or for the reasons of [`check_folder`].
    """
    file = check_folder(folder) / "config.json"
    if not file.is_file():
        raise ValueError(f"The folder {str(folder)!r} holds no config.json: it is no checkpoint.")
    return _read_json(file)


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise ValueError(f"{str(file)!r} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(file)!r} holds a {type(content).__name__}; it must hold an object.")
    return content


def _read_index(file: Path) -> dict[str, str]:
    """The file that holds each weight."""
    promised = _read_json(file).get("weight_map")
    if not isinstance(promised, dict):
        raise ValueError(f"{str(file)!r} is not an index of weights: it has no object `weight_map`.")
    for name in promised.values():
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
            raise ValueError(
                f"`weight_map` in {str(file)!r} holds {name!r}; allowed are names of files in the same folder."
            )
    return promised


def read_weights(folder: Path) -> dict[str, StoredWeight]:
    """Names, shapes and dtypes of all weights of a local folder, from the headers of its files.

    Raises:
        ValueError: if there are none, a shard is missing, cut off or not in the index, or the index is wrong; or for
            the reasons of [`check_folder`].
    """
    folder = check_folder(folder)
    files = sorted(path.name for path in folder.glob("model*.safetensors"))
    indexed = (folder / SAFE_WEIGHTS_INDEX_NAME).is_file()
    if not files and not indexed:
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        hint = f" It holds {pickled[:3]}, but pickled weights are not loaded." if pickled else ""
        raise ValueError(f"The folder {str(folder)!r} holds no weights: no model*.safetensors.{hint}")
    if indexed:
        promised = _read_index(folder / SAFE_WEIGHTS_INDEX_NAME)
        if absent := sorted(set(promised.values()) - set(files)):
            raise ValueError(f"The folder {str(folder)!r} lacks files that its index names: {', '.join(absent)}.")
        if extra := sorted(set(files) - set(promised.values())):
            raise ValueError(f"The index of {str(folder)!r} does not name {', '.join(extra)}; which is right?")
    elif files == ["model.safetensors"]:
        promised = None
    else:
        raise ValueError(
            f"The folder {str(folder)!r} holds {', '.join(files[:3])} without {SAFE_WEIGHTS_INDEX_NAME}, which "
            "says whether they are complete."
        )
    stored = {}
    for name in files:
        for weight in read_header(folder / name):
            if weight.key in stored:
                raise ValueError(f"{weight.key} is both in {stored[weight.key].file.name} and in {name}.")
            if promised is not None and promised.get(weight.key) != name:
                raise ValueError(f"{name} holds {weight.key}, which the index of {str(folder)!r} does not say.")
            stored[weight.key] = weight
    if promised is not None and (absent := sorted(set(promised) - set(stored))):
        raise ValueError(f"The index of {str(folder)!r} names {', '.join(absent[:5])}, which no file holds.")
    return stored


def read_header(file: Path) -> list[StoredWeight]:
    """The weights of one safetensors file.

    Raises:
        ValueError: if it is cut off, or no safetensors file.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            weights = []
            for key in handle.keys():
                view = handle.get_slice(key)
                weights.append(StoredWeight(Path(file), key, tuple(view.get_shape()), view.get_dtype()))
            return weights
    except (SafetensorError, OSError) as error:
        with Path(file).open("rb") as handle:
            is_pointer = handle.read(24) == b"version https://git-lfs."
        hint = "it is a Git LFS pointer: run `git lfs pull`" if is_pointer else f"cut off or damaged ({error})"
        raise ValueError(f"{str(file)!r} cannot be read: {hint}.") from error


def detect_layout(keys, config: dict, folder: object = "") -> str:
    """Which released layout these keys and this configuration are in.

    Raises:
        ValueError: if it is none of them, or several.
    """
    markers = {
        "llada": ("model.transformer.",),
        "Llama-like": ("model.layers.", "model.embed_tokens."),
        "lladamedv": ("model.language_model.",),
    }
    found = [name for name, prefixes in markers.items() if any(key.startswith(prefixes) for key in keys)]
    eyes = [key for key in keys if key.startswith(("model.mm_projector.", "model.vision_tower."))]
    model_type = config.get("model_type")
    where = f"The checkpoint {str(folder)!r}"
    if found == ["lladamedv"]:
        raise ValueError(f"{where} has this package's own names already: load it with `from_pretrained`.")
    if len(found) > 1 or (found == ["llada"] and eyes):
        raise ValueError(f"{where} mixes two layouts: {', '.join([*found, *eyes[:1]])}.")
    if not found:
        if any("mm_projector." in key for key in keys):
            raise ValueError(
                f"{where} holds a projector only, no language model: put a model together with `lladamedv init "
                "--language-model … --vision-tower … --projector …`."
            )
        raise ValueError(f"{where} is in none of the released layouts; its first keys are {sorted(keys)[:3]}.")
    if found == ["llada"]:
        layout = "llada"
    else:
        layout = "llava_llada" if eyes or model_type == "llava_llada" else "llada_hf"
    wanted = "llava_llada" if layout == "llava_llada" else "llada"
    if model_type != wanted:
        raise ValueError(
            f"{where} has the weights of layout {layout}, but `model_type` is {model_type!r}, not {wanted!r}."
        )
    if (layout == "llada") != ("d_model" in config):
        raise ValueError(f"{where} has the weights of layout {layout}, but the config of another one.")
    return layout


def convert_config(original: dict, layout: str, vision_tower: dict | None = None, **ids: int) -> LLaDAMedVConfig:
    """Our configuration for a released `config.json`.

    Args:
        original: the released configuration.
        layout: `"llada"`, `"llada_hf"` or `"llava_llada"`.
        vision_tower: configuration of the stand-alone SigLIP model, if it is not SigLIP2 so400m/14-384.
        ids: as for [`read_checkpoint`].

    Raises:
        ValueError: if a field is missing or says that the network is not one of the released kind.
    """
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
    text |= {name: ids.pop(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in ids}
    if layout in TEXT_LAYOUTS:
        return LLaDAMedVConfig(text_config=text, text_only=True, **ids)

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
        vision_config=vision, text_config=text, vision_aspect_ratio=mode, image_grid_pinpoints=pinpoints or None, **ids
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
    try:
        validate_repo_id(str(source))
        if str(source).count("/") != 1:
            raise HFValidationError("a Hub id looks like OWNER/NAME")
    except HFValidationError as error:
        raise ValueError(f"{str(source)!r} is neither a folder nor a Hub id ({error}).") from error
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=list(_FILES), **hub_options))
    except Exception as error:  # the Hub client raises many kinds: no network, no such repository, no rights
        raise ValueError(f"{str(source)!r} is no folder, and cannot be had from the Hub: {error}") from error


__all__ = ["KeyReport", "ReleasedCheckpoint", "read_checkpoint"]
