"""Configuration of LLaDA-MedV: every number of the architecture, with the released model's values as defaults."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


# SigLIP2 so400m/14-384. The released model reads the second-to-last hidden state, so the last of the 27 layers and
# the pooling head are never computed and are not part of the model.
_VISION_DEFAULTS = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "patch_size": 14,
    "image_size": 384,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "vision_use_head": False,
}
# LLaDA-8B: a Llama without the causal mask.
_TEXT_DEFAULTS = {
    "vocab_size": 126464,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "bos_token_id": 126080,
    "eos_token_id": 126081,
    "pad_token_id": 126081,
    "tie_word_embeddings": False,
    "use_cache": False,
}
# Far beyond every network of this kind. Larger numbers are refused, because a model would take memory and time for them
# before it turns out that its weights are not there.
_LARGEST_EACH = {
    "hidden_size": 2**20, "intermediate_size": 2**22, "num_hidden_layers": 1024, "num_attention_heads": 2**14,
}  # fmt: skip
_LARGEST = {
    "vision_config": _LARGEST_EACH | {"num_channels": 2**8, "image_size": 2**14, "patch_size": 2**14},
    "text_config": _LARGEST_EACH
    | {"vocab_size": 2**24, "num_key_value_heads": 2**14, "head_dim": 2**14, "max_position_embeddings": 2**24},
}
MAX_GRIDS = 4096  # as in the image processor
# Which of the files that `save_pretrained` writes next to the weights serves which Auto class, so that a folder loads
# with `trust_remote_code=True` where this package is not installed.
_MODEL = "modeling_lladamedv.LLaDAMedVForConditionalGeneration"
_AUTO_MAP = {
    "AutoConfig": "configuration_lladamedv.LLaDAMedVConfig",
    "AutoModel": "modeling_lladamedv.LLaDAMedVModel",
    "AutoModelForCausalLM": _MODEL,
    "AutoModelForImageTextToText": _MODEL,
    "AutoModelForMultimodalLM": _MODEL,
    "AutoImageProcessor": "image_processing_lladamedv.LLaDAMedVImageProcessor",
    "AutoProcessor": "processing_lladamedv.LLaDAMedVProcessor",
}


@strict
class LLaDAMedVConfig(PreTrainedConfig):
    r"""
    Configuration of [`LLaDAMedVModel`] and [`LLaDAMedVForConditionalGeneration`] (LLaDA-MedV, arXiv 2508.01617).

    Args:
        vision_config (`dict` or `SiglipVisionConfig`, *optional*):
            The SigLIP tower; `None` means SigLIP2 so400m/14-384, unless `text_only` is set. `num_hidden_layers` counts
            the layers that are built, all of which are used: the features are the output of the last one, before any
            final norm. LLaVA's "second-to-last layer of SigLIP" is therefore a tower with one layer less than the
            stand-alone SigLIP model.
        text_config (`dict` or `LlamaConfig`, *optional*):
            The language model. `is_causal` is always `False`: LLaDA attends in both directions.
        image_token_id (`int`, *optional*, defaults to 126349):
            Id of the `<image>` placeholder. It is the first id behind the released tokenizer and, like all ids up to
            126463, a spare row of the released embedding matrix that no text ever uses: adding the placeholder
            neither resizes nor changes that matrix, and its row is never read, because image features replace it.
        mask_token_id (`int`, *optional*, defaults to 126336):
            Id of `<|mdm_mask|>`, the token that stands for "not denoised yet".
        vision_aspect_ratio (`str`, *optional*, defaults to `"anyres_max_4"`):
            How an image becomes tiles: `"square"` (resized to one tile), `"pad"` (padded to a square, one tile) or
            `"anyres_max_N"` (a base tile and a grid of tiles, shrunk to at most `N` tiles' worth of features).
        image_grid_pinpoints (`list[list[int]]`, *optional*):
            `[height, width]` of the grids that anyres may choose, in pixels; all grids of 1 to 6 by 1 to 6 tiles by
            default.
        projector_hidden_act (`str`, *optional*, defaults to `"gelu"`): activation between the projector's layers.
        multimodal_projector_bias (`bool`, *optional*, defaults to `True`): whether the projector has biases.
        vision_feature_layer (`int`, *optional*, defaults to -1): only -1, the last layer that is built.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`): only `False` is supported.
        text_only (`bool`, *optional*, defaults to `False`):
            A LLaDA without images: no vision tower, projector or newline embedding, and `vision_config` is `None`.

    Raises:
        ValueError: for an aspect ratio that does not exist, tied embeddings, special ids outside the vocabulary, a
            `vision_config` of a text-only model, another kind of sub-configuration, or sizes that no such model has.

    ```python
    >>> from lladamedv import LLaDAMedVConfig, LLaDAMedVForConditionalGeneration
    >>> config = LLaDAMedVConfig(text_config={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    ...     "num_attention_heads": 4, "num_key_value_heads": 4}, vision_config={"hidden_size": 32,
    ...     "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4})
    >>> model = LLaDAMedVForConditionalGeneration(config)
    ```
    """

    model_type = "lladamedv"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig, model_type="siglip_vision_model", init_kwargs=_VISION_DEFAULTS, optional=True
        ),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama", init_kwargs=_TEXT_DEFAULTS),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 126349
    mask_token_id: int = 126336
    vision_aspect_ratio: str = "anyres_max_4"
    image_grid_pinpoints: list | None = None
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    vision_feature_layer: int = -1
    tie_word_embeddings: bool = False
    text_only: bool = False

    def __post_init__(self, **kwargs):
        if self.text_only and self.vision_config is not None:
            raise ValueError("`vision_config` is set, but `text_only` is True; a text-only model has no vision tower.")
        if not self.text_only and self.vision_config is None:
            self.vision_config = {}
        for name, defaults in (("vision_config", _VISION_DEFAULTS), ("text_config", _TEXT_DEFAULTS)):
            value = getattr(self, name)
            if value is not None:
                _check_part(name, value)
            # A partial dict means "the released model, but with these values".
            if isinstance(value, dict) and "model_type" not in value:
                setattr(self, name, {**defaults, **value})
        _check_grids(self.image_grid_pinpoints)
        super().__post_init__(**kwargs)
        if not getattr(self, "auto_map", None):
            self.auto_map = dict(_AUTO_MAP)
        self.text_config.is_causal = False
        if not self.text_only and self.vision_config.patch_size > self.vision_config.image_size:
            raise ValueError(
                f"`vision_config.patch_size` is {self.vision_config.patch_size}; allowed are at most the "
                f"{self.vision_config.image_size} pixels of `vision_config.image_size`."
            )
        if self.image_grid_pinpoints is None and not self.text_only:
            tile = self.vision_config.image_size
            self.image_grid_pinpoints = [[tile * rows, tile * cols] for cols in range(1, 7) for rows in range(1, 7)]
        if self.tie_word_embeddings or self.text_config.tie_word_embeddings:
            raise ValueError(
                "`tie_word_embeddings` is True; LLaDA's output layer is its own matrix: only False is allowed."
            )
        if self.vision_feature_layer != -1:
            raise ValueError(
                f"`vision_feature_layer` is {self.vision_feature_layer}; only -1 is allowed: build as many layers as "
                "are used with `vision_config.num_hidden_layers`."
            )
        for name in ("image_token_id", "mask_token_id"):
            if not 0 <= getattr(self, name) < self.text_config.vocab_size:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}; it must be an id of the vocabulary, "
                    f"0 to {self.text_config.vocab_size - 1}."
                )
        mode, _, tiles = self.vision_aspect_ratio.partition("anyres_max_")
        if self.vision_aspect_ratio not in ("square", "pad") and (mode or not tiles.isdecimal() or int(tiles) < 1):
            raise ValueError(
                f"`vision_aspect_ratio` is {self.vision_aspect_ratio!r}; allowed are 'square', 'pad' and "
                "'anyres_max_N' with a whole number N of at least 1."
            )

    @property
    def max_anyres_tiles(self) -> int | None:
        """The N of `"anyres_max_N"`, or `None` where an image is always one tile."""
        if "anyres" not in self.vision_aspect_ratio:
            return None
        return int(self.vision_aspect_ratio.removeprefix("anyres_max_"))


def _check_part(name: str, part: dict | PreTrainedConfig) -> None:
    """Refuse a sub-configuration of another kind of model, or of sizes that no model has."""
    kind = LLaDAMedVConfig.sub_configs_defaults[name].model_type
    values = part if isinstance(part, dict) else {"model_type": part.model_type, **vars(part)}
    found = values.get("model_type", kind)
    if found != kind:
        raise ValueError(f"`{name}.model_type` is {found!r:.200}; allowed is {kind!r}.")
    for size, largest in _LARGEST[name].items():
        value = values.get(size)
        if value is None and (size not in values or size in ("num_key_value_heads", "head_dim")):
            continue  # the default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
            raise ValueError(f"`{name}.{size}` is {value!r:.200}; allowed are whole numbers from 1 to {largest}.")


def _check_grids(grids: object) -> None:
    sides = range(1, 2**20)
    fits = isinstance(grids, (list, tuple)) and len(grids) <= MAX_GRIDS
    if grids is not None and not (
        fits and all(isinstance(grid, (list, tuple)) and len(grid) == 2 for grid in grids)
        and all(isinstance(side, int) and side in sides for grid in grids for side in grid)
    ):  # fmt: skip
        raise ValueError(
            f"`image_grid_pinpoints` is {grids!r:.200}; allowed are at most {MAX_GRIDS} pairs [height, width] of whole "
            f"numbers from 1 to {sides[-1]}."
        )


LLaDAMedVConfig.register_for_auto_class()

__all__ = ["LLaDAMedVConfig"]
