"""The LLaDA-MedV model: SigLIP tower -> projector -> image features merged into the text -> bidirectional Llama.

The denoising loop is in `generation_lladamedv.py`; nothing here knows about steps or schedules.
"""

import math
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import nn
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.image_processing_utils import select_best_resolution
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .configuration_lladamedv import LLaDAMedVConfig
from .decoder_layer_lladamedv import LLaDAMedVLastDecoderLayer, positions_in_rows
from .evidence_lladamedv import LLaDAMedVEvidenceMixin
from .generation_config_lladamedv import LLaDAMedVGenerationConfig
from .generation_lladamedv import LLaDAMedVGenerationMixin
from .infilling_lladamedv import LLaDAMedVInfillingMixin
from .released_lladamedv import find_released
from .scoring_lladamedv import LLaDAMedVScoringMixin
from .stored_weights_lladamedv import KeyReport


_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class _NestedOutput(ModelOutput):
    def to_tuple(self):
        return tuple(each.to_tuple() if isinstance(each, ModelOutput) else each for each in super().to_tuple())


@dataclass
class LLaDAMedVModelOutput(_NestedOutput):
    """Output of [`LLaDAMedVModel`].

    Args:
        last_hidden_state (`(batch, sequence, hidden)`, or `(positions wanted, hidden)` with `query_mask`): of the last
            layer.
        hidden_states, attentions (tuples of `torch.FloatTensor`, *optional*): of every layer, as of all models of
            Transformers, where `output_hidden_states` and `output_attentions` ask for them.
        image_outputs (`BaseModelOutputWithPooling`, *optional*): what [`LLaDAMedVModel.get_image_features`] returns,
            with the projected features of the images in its `pooler_output`.
    """

    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    image_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class LLaDAMedVOutput(_NestedOutput):
    """Output of [`LLaDAMedVForConditionalGeneration`].

    Args:
        logits (`(batch, positions, vocab_size)`, or `(positions wanted, vocab_size)` with a boolean `logits_to_keep`).
        hidden_states, attentions, image_outputs: those of [`LLaDAMedVModelOutput`].
    """

    logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    image_outputs: BaseModelOutputWithPooling | None = None


class LLaDAMedVPreTrainedModel(PreTrainedModel):
    """Weight initialisation, loading, and what the attention backends may do."""

    config_class = LLaDAMedVConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache"]
    # Parts of a stand-alone SigLIP tower that come after the features.
    _keys_to_ignore_on_load_unexpected = [r"vision_tower\.(post_layernorm|head)\."]
    _no_split_modules = ["LlamaDecoderLayer", "LLaDAMedVLastDecoderLayer", "SiglipEncoderLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": "LlamaDecoderLayer", "attentions": "LlamaAttention"}

    @property
    def device(self) -> torch.device:
        """Where inputs belong: the device of the weights, and of offloaded ones the device that they are run on."""
        device = super().device
        if device.type == "meta":
            hooks = (getattr(module, "_hf_hook", None) for module in self.modules())
            devices = (getattr(hook, "execution_device", None) for hook in hooks)
            return next((torch.device(each) for each in devices if each is not None), device)
        return device

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if getattr(module, "image_newline", None) is not None:
            init.normal_(module.image_newline, std=1 / math.sqrt(self.config.text_config.hidden_size))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        vision_tower=None,
        output_loading_info=False,
        ignore_mismatched_sizes=False,
        **kwargs,
    ):
        """As `PreTrainedModel.from_pretrained`, but a checkpoint with missing weights is an error, not a warning, and
        checkpoints in the layouts that LLaDA, LLaDA-V and LLaDA-MedV were released in load as they are. A folder of
        adapters (PEFT) gives the model that they name, with the adapters in it, as the Auto classes do.

        Args:
            vision_tower (`str` or `Path`, *optional*): for a released checkpoint with another tower than SigLIP2
                so400m/14-384, the folder with that tower's `config.json`.

        Raises:
            ValueError: if there is no `config.json`; if weights of the model are missing from the checkpoint, or have
                other shapes and `ignore_mismatched_sizes` is not set (a model with random parts would still answer,
                wrongly); if a checkpoint in a released layout holds keys that this layout does not have.
        """
        name, released = pretrained_model_name_or_path, None
        kwargs.setdefault("use_safetensors", True)
        if name is not None and kwargs.get("config") is None and "key_mapping" not in kwargs:
            hub = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs}
            released = find_released(name, vision_tower, **hub)
        if released is not None:
            shapes = LLaDAMedVForConditionalGeneration.parameter_shapes(released.config)
            released.compare(shapes)[1].check(name)
            kwargs = released.loading_options() | kwargs
        elif vision_tower is not None:
            raise ValueError(
                f"`vision_tower` is {str(vision_tower)!r}; it is allowed for checkpoints in a released layout only."
            )
        model, info = super().from_pretrained(
            name, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        report = KeyReport(cls.config_class.model_type, missing=list(info["missing_keys"]))
        if not ignore_mismatched_sizes:
            report.misshaped = {key: shapes for key, *shapes in info["mismatched_keys"]}
        report.check(name)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, save_original_format=False, **kwargs):
        """As `PreTrainedModel.save_pretrained`, but weights get this package's names, also where they were loaded under
        those of a released layout."""
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)

    @classmethod
    def parameter_shapes(cls, config: LLaDAMedVConfig) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all weights that a model of this configuration has, without allocating them."""
        with torch.device("meta"):
            return {name: tuple(weight.shape) for name, weight in cls(config).state_dict().items()}


class LLaDAMedVProjector(nn.Module):
    """From the vision tower's width to the language model's: two layers, `(…, vision width)` to `(…, hidden)`."""

    def __init__(self, config: LLaDAMedVConfig):
        super().__init__()
        hidden, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, hidden, bias=bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden, hidden, bias=bias)

    def forward(self, features: torch.FloatTensor) -> torch.FloatTensor:
        return self.linear_2(self.act(self.linear_1(features)))


class LLaDAMedVModel(LLaDAMedVPreTrainedModel):
    """SigLIP tower, projector and bidirectional language model, without the output layer."""

    def __init__(self, config: LLaDAMedVConfig):
        super().__init__(config)
        self.image_newline = None
        if not config.text_only:
            self.vision_tower = AutoModel.from_config(config.vision_config)
            # The features are taken before SigLIP's final norm (LLaVA's habit): without it no weight is left unused.
            self.vision_tower.post_layernorm = nn.Identity()
            self.multi_modal_projector = LLaDAMedVProjector(config)
            # Only images cut into a grid have rows to end.
            if config.max_anyres_tiles is not None:
                self.image_newline = nn.Parameter(torch.zeros(config.text_config.hidden_size))
        self.language_model = AutoModel.from_config(config.text_config)
        last = config.text_config.num_hidden_layers - 1
        self.language_model.layers[last] = LLaDAMedVLastDecoderLayer(self.language_model.config, last)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor,
        image_sizes: torch.LongTensor | None = None,
        batch_num_images: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        image_features: list[torch.FloatTensor | None] | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode, project and lay out every image as a sequence of embeddings.

        Args:
            pixel_values (`(num_images, num_tiles, 3, height, width)`): tiles, the base tile first; rows with fewer
                tiles are filled up at the end.
            image_sizes (`(num_images, 2)`): original height and width; needed for anyres.
            batch_num_images (`(batch_size,)`, *optional*): images per prompt. Anyres tiles an image only where it is
                alone in its prompt, as LLaVA-OneVision does; `None` means that each is.
            image_index (`(placeholders,)`, *optional*): which image stands at each placeholder of the batch, so that an
                image that several prompts show is encoded once; by default one after the other.
            image_features (list, *optional*): of each image what was made of it before, `(num_image_tokens, hidden)`,
                or `None` for those that are to be encoded.
            kwargs: `output_hidden_states` and `output_attentions` of the vision tower, and `return_dict`.

        Returns:
            `BaseModelOutputWithPooling`. Its `pooler_output` is a list of `(num_image_tokens, hidden_size)`, one per
            placeholder, its `last_hidden_state` what the vision tower sees, `(tiles, patches, vision width)`; `None` if
            all features are given.

        Raises:
            ValueError: if the shapes do not fit each other or the config, or the model is text-only.
        """
        grids = self.tile_grids(pixel_values, image_sizes, batch_num_images, image_index)
        images = [None] * len(grids) if image_features is None else [*image_features]
        if len(images) != len(grids):
            raise ValueError(f"`image_features` has {len(images)} entries for {len(grids)} images; each needs one.")
        new = [number for number, image in enumerate(images) if image is None]
        outputs = BaseModelOutputWithPooling()
        if new:
            counts = [count_tiles(grids[number]) for number in new]
            tiles = torch.cat([pixel_values[number, :count] for number, count in zip(new, counts)])
            # A frozen tower keeps no activations, even where its inputs are made to require gradients (as PEFT does),
            # unless those of the pixels are asked for.
            traced = tiles.requires_grad or any(weight.requires_grad for weight in self.vision_tower.parameters())
            with torch.set_grad_enabled(torch.is_grad_enabled() and traced):
                outputs = self.vision_tower(tiles.to(self.dtype), return_dict=True, **kwargs)
            features = self.multi_modal_projector(outputs.last_hidden_state)  # (tiles, patches, hidden)
            sizes = image_sizes.tolist() if image_sizes is not None else [None] * len(grids)
            for number, part in zip(new, features.split(counts)):
                images[number] = self._lay_out(part, grids[number], sizes[number])
        outputs.pooler_output = images if image_index is None else [images[number] for number in image_index.tolist()]
        return outputs

    def tile_grids(self, pixel_values, image_sizes=None, batch_num_images=None, image_index=None):
        """Rows and columns of each image's tile grid, or `None` for an image of one tile; checks that all fits."""
        if self.config.text_only:
            raise ValueError("`pixel_values` is given, but this model is text-only: it has no vision tower.")
        if pixel_values.dim() != 5:
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)}; expected 5 dimensions: "
                "(num_images, num_tiles, 3, height, width)."
            )
        num_images, num_tiles = pixel_values.shape[:2]
        if image_sizes is not None and len(image_sizes) != num_images:
            raise ValueError(f"`image_sizes` has {len(image_sizes)} rows for {num_images} images; each needs one.")
        shown = list(range(num_images)) if image_index is None else image_index.tolist()
        if set(shown) != set(range(num_images)):
            raise ValueError(
                f"`image_index` is {shown}, but there are {num_images} images; allowed are their numbers, each at "
                "least once."
            )
        if self.config.max_anyres_tiles is None:
            return [None] * num_images
        if image_sizes is None:
            raise ValueError(
                f"`image_sizes` is None, but {self.config.vision_aspect_ratio!r} needs (height, width) of each image."
            )
        prompts = [1] * len(shown) if batch_num_images is None else [int(count) for count in batch_num_images]
        if sum(prompts) != len(shown):
            raise ValueError(f"`batch_num_images` sums to {sum(prompts)}, but the prompts show {len(shown)} images.")
        tiled = {}
        for number, alone in zip(shown, [count == 1 for count in prompts for _ in range(count)]):
            if tiled.setdefault(number, alone) != alone:
                raise ValueError(
                    f"`image_index` names image {number} alone in one prompt and beside others in another one; anyres "
                    "cuts it differently there: it must be given twice."
                )
        side, pinpoints = self.config.vision_config.image_size, self.config.image_grid_pinpoints
        grids = [None] * num_images
        for number, size in enumerate(image_sizes.tolist()):
            if tiled[number]:
                grids[number] = tuple(edge // side for edge in select_best_resolution(tuple(size), pinpoints))
        most = max(map(count_tiles, grids))
        if most > num_tiles:
            raise ValueError(f"`pixel_values` has {num_tiles} tiles per image, but `image_sizes` asks for {most}.")
        return grids

    def _lay_out(self, features, grid, image_size):
        """Arrange the features `(tiles, patches, hidden)` of one image as `(num_image_tokens, hidden)`."""
        if self.config.max_anyres_tiles is None:
            return features[0]
        newline = self.image_newline.to(features)
        if grid is None:
            return torch.cat([features[0], newline[None]])
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        hidden = features.shape[-1]
        # (rows * cols, side * side, hidden) -> (hidden, rows * side, cols * side)
        plane = features[1:].view(*grid, side, side, hidden).permute(4, 0, 2, 1, 3).reshape(hidden, grid[0] * side, -1)
        plane = _unpad(plane, *image_size)
        height, width = plane.shape[1:]
        shrink = math.sqrt(height * width / (self.config.max_anyres_tiles * side**2))
        if shrink > 1.1:
            size = (int(height // shrink), int(width // shrink))
            plane = nn.functional.interpolate(plane[None], size, mode="bilinear")[0]
        rows = torch.cat([plane, newline[:, None, None].expand(-1, plane.shape[1], 1)], dim=-1)
        return torch.cat([features[0], rows.flatten(1).T])

    def get_multimodal_embeddings(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        batch_num_images: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        image_features: list[torch.FloatTensor | None] | None = None,
        **kwargs,
    ) -> tuple[torch.FloatTensor, BaseModelOutputWithPooling | None]:
        """Token embeddings `(batch, sequence, hidden)` with the image features at the image tokens.

        The other arguments are those of [`~LLaDAMedVModel.get_image_features`].

        Returns:
            The embeddings, and what [`~LLaDAMedVModel.get_image_features`] returns (`None` without images).

        Raises:
            ValueError: if the number of image tokens differs from the number of features.
        """
        is_image = input_ids == self.config.image_token_id  # (batch, sequence)
        embeddings = self.get_input_embeddings()(input_ids)
        num_tokens = int(is_image.sum())
        if pixel_values is None:
            if num_tokens:
                raise ValueError(
                    f"`input_ids` holds {num_tokens} image tokens (id {self.config.image_token_id}) but `pixel_values` "
                    "is None: pass everything that the processor returned."
                )
            return embeddings, None
        images = self.get_image_features(
            pixel_values, image_sizes, batch_num_images, image_index, image_features, return_dict=True, **kwargs
        )
        features = torch.cat(images.pooler_output).to(embeddings)
        if num_tokens != len(features):
            raise ValueError(
                f"`input_ids` holds {num_tokens} image tokens (id {self.config.image_token_id}), but the images make "
                f"{len(features)} features; the two must be equal."
            )
        return embeddings.masked_scatter(is_image[..., None], features), images

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        batch_num_images: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        turn_ids: torch.LongTensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        image_index: torch.LongTensor | None = None,
        query_mask: torch.BoolTensor | None = None,
        query_positions: torch.LongTensor | None = None,
        cache: Cache | None = None,
        embeddings_only: bool = False,
        image_features: list[torch.FloatTensor | None] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LLaDAMedVModelOutput:
        """One bidirectional pass.

        Args:
            input_ids (`(batch, sequence)`): tokens; give either these or `inputs_embeds`.
            pixel_values, image_sizes, batch_num_images, image_index, image_features: see
                [`~LLaDAMedVModel.get_image_features`].
            attention_mask (`(batch, sequence)`, *optional*): 1 for tokens, 0 for padding on either side.
            position_ids (`(batch, sequence)`, *optional*): by default a row's tokens are numbered from 0, its padding
                left out, so that a row means the same alone and in any batch.
            turn_ids (`(batch, sequence)`, *optional*): conversation turn of each token. A token then attends to its
                own and earlier turns only (LLaDA-V, arXiv 2505.16933, section 3.2: the dialogue-causal mask).
            segment_ids (`(batch, sequence)`, *optional*): 0 for a part that all share, such as the image, and a number
                for each of several questions about it. A token then attends to the shared part and to its own segment,
                and the shared part to itself alone: a prefix-LM, in which questions do not know of each other.
            inputs_embeds (`(batch, sequence, hidden)`, *optional*): merged embeddings.
            query_mask (`(batch, sequence)`, *optional*): True where output is wanted; by default everywhere. The last
                layer is spared the positions that no row of the batch wants.
            query_positions (`(batch, queries)`, *optional*): the same as equally many positions of each row, which need
                not be counted.
            cache (`Cache`, *optional*): that of the denoising loop, which knows which positions this pass runs.
            embeddings_only: return what [`~LLaDAMedVModel.get_multimodal_embeddings`] makes, as `last_hidden_state`
                and `image_outputs`, and run no layer. Weights that accelerate has offloaded come back for a
                forward pass only.

        Returns:
            [`LLaDAMedVModelOutput`] with `last_hidden_state` `(batch, sequence, hidden)`, with `query_mask`
            `(number of True, hidden)`, row after row, or with `query_positions` `(batch, queries, hidden)`.

        Raises:
            ValueError: for contradictory inputs, or `turn_ids` under an attention implementation that cannot mask
                by turn.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        images = None
        if inputs_embeds is None:
            recorded = {name: kwargs.get(name) for name in ("output_hidden_states", "output_attentions")}
            inputs_embeds, images = self.get_multimodal_embeddings(
                input_ids, pixel_values, image_sizes, batch_num_images, image_index, image_features, **recorded
            )
        elif pixel_values is not None:
            raise ValueError("Images need `input_ids`: `inputs_embeds` must already hold the image features.")
        if embeddings_only:
            return LLaDAMedVModelOutput(last_hidden_state=inputs_embeds, image_outputs=images)
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        if turn_ids is not None or segment_ids is not None:
            attention_mask = self._structured_mask(inputs_embeds, attention_mask, turn_ids, segment_ids)
        if query_mask is not None:
            positions = positions_in_rows(query_mask)
            if positions.shape[1] < query_mask.shape[1]:
                query_positions = positions
                query_mask = query_mask.gather(1, positions)
        if query_positions is not None:
            kwargs["query_positions"] = query_positions  # for the last layer; the others pass it by
        # By place: the cache is called `past_key_values` before Transformers 5.24 and `cache` from there on.
        outputs = self.language_model(
            None, attention_mask, position_ids, cache, inputs_embeds, return_dict=True, **kwargs
        )
        hidden = outputs.last_hidden_state
        return LLaDAMedVModelOutput(
            last_hidden_state=hidden if query_mask is None else hidden[query_mask],
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=images,
        )

    def _structured_mask(self, inputs_embeds, attention_mask, turn_ids, segment_ids):
        """Attention mask, in the form that the current implementation wants, that hides later turns and other
        segments."""
        implementation = self.language_model.config._attn_implementation
        if "flash" in implementation:
            raise ValueError(
                f"`turn_ids` and `segment_ids` cannot be used with attn_implementation={implementation!r}, which has "
                "no arbitrary masks; use 'sdpa', 'eager' or 'flex_attention'."
            )

        def allowed(batch, head, query, key):
            seen = query >= 0
            if turn_ids is not None:
                seen = seen & (turn_ids[batch, key] <= turn_ids[batch, query])
            if segment_ids is not None:
                segment = segment_ids[batch, key]
                seen = seen & ((segment == 0) | (segment == segment_ids[batch, query]))
            return seen

        return create_bidirectional_mask(
            config=self.language_model.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            and_mask_function=allowed,
        )


def count_tiles(grid: tuple[int, int] | None) -> int:
    """The overview and the tiles of the grid."""
    return 1 if grid is None else 1 + grid[0] * grid[1]


def _unpad(plane: torch.Tensor, original_height: int, original_width: int) -> torch.Tensor:
    """Cut off what padding an image to its grid has added to the features `(hidden, height, width)`, rounded as in
    LLaVA-OneVision."""
    height, width = plane.shape[1:]
    if original_width / original_height > width / height:
        padding = (height - int(round(original_height * (width / original_width), 7))) // 2
        return plane[:, padding : height - padding]
    padding = (width - int(round(original_width * (height / original_height), 7))) // 2
    return plane[:, :, padding : width - padding]


class LLaDAMedVForConditionalGeneration(
    LLaDAMedVPreTrainedModel, LLaDAMedVGenerationMixin, LLaDAMedVInfillingMixin, LLaDAMedVScoringMixin,
    LLaDAMedVEvidenceMixin, GenerationMixin,
):  # fmt: skip
    """LLaDA-MedV with its output layer, the denoising [`~LLaDAMedVGenerationMixin.generate`],
    [`~LLaDAMedVInfillingMixin.infill`], which fills in templates, [`~LLaDAMedVScoringMixin.score`], which says how
    likely given answers are, and [`~LLaDAMedVEvidenceMixin.explain_image`], which says where in a picture they come
    from."""

    generation_config_class = LLaDAMedVGenerationConfig

    def __init__(self, config: LLaDAMedVConfig):
        super().__init__(config)
        self.model = LLaDAMedVModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_submodule(self, target):
        # All of PEFT's ways to learn a prompt begin by looking for this module.
        if target == "embeddings.word_embeddings":
            raise ValueError(
                "Adapters that learn a prompt (prompt, prefix and P-tuning, CPT, cartridges) are not supported: the "
                "denoising loop would ignore them. Use adapters of layers, such as `peft.LoraConfig`."
            )
        return super().get_submodule(target)

    def get_image_features(self, *args, **kwargs) -> BaseModelOutputWithPooling:
        """See [`LLaDAMedVModel.get_image_features`]."""
        return self.model.get_image_features(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        batch_num_images: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LLaDAMedVOutput:
        """One bidirectional pass and the logits: `logits[:, i]` predicts the token AT position `i` (no shift).

        Args:
            logits_to_keep (`int` or `torch.Tensor`): which positions get logits, as everywhere in Transformers: the
                last `n` (0: all), a 1-D tensor of positions, a 2-D integer tensor of positions per row, or a boolean
                `(batch, sequence)` mask, which gives `(number of True, vocab_size)` and spares the last layer the
                positions that no row of the batch reads.
            labels: not accepted, because a masked-diffusion loss needs to know the noise.

        The other arguments, and `kwargs`, are those of [`LLaDAMedVModel.forward`].

        Returns:
            [`LLaDAMedVOutput`] with `logits` `(batch, positions, vocab_size)`.

        Raises:
            ValueError: if `labels` is given, or for the reasons of [`LLaDAMedVModel.forward`].
        """
        if labels is not None:
            raise ValueError(
                "`labels` is not accepted: the next-token loss does not apply to a masked-diffusion model. Noise the "
                "tokens and weigh the loss as lladamedv.trainers does."
            )
        # PEFT notes the configurations of adapters here.
        if any(getattr(each, "alora_invocation_tokens", None) for each in getattr(self, "peft_config", {}).values()):
            raise ValueError(
                "`alora_invocation_tokens` is set in the adapters' configuration; activated LoRA counts from the end "
                "of a text, which a canvas moves: only other LoRA is allowed."
            )
        queries = self._queries(logits_to_keep, **kwargs)
        outputs = self.model(
            input_ids,
            pixel_values,
            image_sizes,
            batch_num_images,
            attention_mask,
            return_dict=True,
            **queries,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        logits = self.lm_head(hidden if queries else slice_logits_to_keep(hidden, logits_to_keep))
        return LLaDAMedVOutput(
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=outputs.image_outputs,
        )

    def _queries(self, logits_to_keep, output_attentions=None, output_hidden_states=None, **kwargs):
        """`logits_to_keep` as an argument of the model, where the last layer can be told of it."""
        config = self.model.language_model.config
        recorded = (output_attentions, output_hidden_states, config.output_attentions, config.output_hidden_states)
        if any(recorded) or not isinstance(logits_to_keep, torch.Tensor):  # what is recorded must be whole
            return {}
        if logits_to_keep.dtype == torch.bool:
            return {"query_mask": logits_to_keep}
        return {"query_positions": logits_to_keep} if logits_to_keep.dim() == 2 else {}


LLaDAMedVModel.register_for_auto_class("AutoModel")
LLaDAMedVForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = [
    "LLaDAMedVForConditionalGeneration",
    "LLaDAMedVModel",
    "LLaDAMedVModelOutput",
    "LLaDAMedVOutput",
    "LLaDAMedVPreTrainedModel",
]
