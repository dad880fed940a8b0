"""Arguments of [`MaskedDiffusionDPOTrainer`]: those of supervised fine-tuning, and what TRL's `DPOConfig` adds."""

from __future__ import annotations

from dataclasses import dataclass, field

from .data_collator import CONDITIONAL_IMAGES
from .masked_diffusion_loss import TIME_SAMPLINGS
from .masked_diffusion_sft_config import MaskedDiffusionSFTConfig
from .preference_loss import IMAGE_CONDITIONAL, PREFERENCE_LOSSES


_LOSS = "`loss_type` shapes the loss"


@dataclass
class MaskedDiffusionDPOConfig(MaskedDiffusionSFTConfig):
    r"""
    Configuration class for the [`MaskedDiffusionDPOTrainer`].

    This class includes only the parameters that preferences add or change; see [`MaskedDiffusionSFTConfig`] for the
    others.

    Parameters:
        beta (`float`, *optional*, defaults to `0.1`):
            How much the log-ratios of policy and reference count: higher means less deviation from the reference.
        loss_type (`list[str]`, *optional*, defaults to `["sigmoid"]`):
            `"sigmoid"` (DPO), `"hinge"`, `"ipo"`, `"sigmoid_norm"`, `"apo_zero"`, `"apo_down"` and `"sft"`, as in TRL,
            on bounds of likelihoods; `"image_conditional"`, the chosen answer is preferred with its picture to with
            another (`conditional_image`), and `"anchor"`, it is no less likely than under the reference (mDPO, arXiv
            2406.11839). Several are added.
        loss_weights (`list[float]`, *optional*):
            What each of `loss_type` counts; by default 1. `loss_type=["sigmoid", "sft"]` with `[1, a]` is what
            `rpo_alpha=a` was in earlier versions of TRL.
        conditional_image (`str`, *optional*, defaults to `"crop"`):
            The other picture of `"image_conditional"`: a random part of 1 to 20 % of its own, resized (`"crop"`, as
            mDPO's code does; here a picture's part is always the same), one colour, its median (`"blank"`), or that of
            another row of the batch (`"shuffled"`; `"blank"` where the batch has no other).
        num_draws (`int`, *optional*, defaults to `4`):
            How many masks estimate the bound of an answer: rows of one forward pass, which encodes each image once.
        precompute_ref_log_probs (`bool`, *optional*, defaults to `False`):
            Whether the reference's bounds are computed once, before training, with the model as it is given. A row then
            has the same masks in every epoch, and no second model is kept. Not of streamed rows.
        time_sampling (`str`, *optional*, defaults to `"stratified"`):
            How the times of an answer's draws are drawn: each in its own part of [0, 1) (`"stratified"`), independently
            (`"uniform"`, VRPO), or as t and 1 - t (`"antithetic"`).
        log_answers (`int`, *optional*, defaults to `0`):
            At every evaluation, answer the first so many prompts of `eval_dataset` and log the answers, beside the
            chosen ones, and the share of those that are equal, `eval_answer_accuracy`. Rewards do not say it.
        log_shuffled_images (`bool`, *optional*, defaults to `False`):
            At every evaluation, also compare the answers about the pictures of other rows of their batches, with the
            same masks, and log `eval_rewards/shuffled_accuracies`, of all pairs whose batch has another picture. Near
            0.5, the preferences need the picture. Doubles the passes of an evaluation.

    > [!NOTE]
    > `learning_rate` is `1e-6`, as in [`trl.DPOConfig`].

    Raises:
        ValueError: for a value that is not allowed, or options that mean nothing here.
    """

    _objective = "preferences"
    _suffix = "DPO"
    _not_applicable = {
        **{name: why for name, why in MaskedDiffusionSFTConfig._not_applicable.items() if name != "loss_type"},
        "loss_weighting": _LOSS, "max_loss_weight": _LOSS, "loss_normalization": _LOSS,
        "complementary_masking": "use `num_draws`",
        "eval_time_steps": "an evaluation has `num_draws`, always the same",
        "pack_questions": "the two answers of a pair are rows of their own; leave it out",
        "train_on_template_tokens": "answers alone are compared",
    }  # fmt: skip
    _least = MaskedDiffusionSFTConfig._least | {"num_draws": 1}

    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate for AdamW."})
    beta: float = field(default=0.1, metadata={"help": "Higher means less deviation from the reference."})
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": f"Losses that are added: {', '.join(PREFERENCE_LOSSES)}."},
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "What each of `loss_type` counts; by default 1."}
    )
    conditional_image: str = field(
        default="crop",
        metadata={"help": "The other picture of `image_conditional`.", "choices": list(CONDITIONAL_IMAGES)},
    )
    log_shuffled_images: bool = field(
        default=False, metadata={"help": "Whether evaluations also compare the answers about other rows' pictures."}
    )
    num_draws: int = field(default=4, metadata={"help": "How many masks estimate the bound of an answer."})
    precompute_ref_log_probs: bool = field(
        default=False, metadata={"help": "Whether the reference's bounds are computed once, before training."}
    )
    time_sampling: str = field(
        default="stratified",
        metadata={"help": "How the times of an answer's draws are drawn.", "choices": list(TIME_SAMPLINGS)},
    )

    def __post_init__(self):
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        super().__post_init__()
        unknown = set(self.loss_type) - set(PREFERENCE_LOSSES)
        if unknown or not self.loss_type:
            raise ValueError(f"`loss_type` is {self.loss_type}; allowed are one or more of {tuple(PREFERENCE_LOSSES)}.")
        if self.loss_weights is None:
            self.loss_weights = [1.0] * len(self.loss_type)
        if len(self.loss_weights) != len(self.loss_type):
            raise ValueError(f"`loss_weights` is {self.loss_weights}; `loss_type` names {len(self.loss_type)} losses.")
        if self.conditional_image != "crop" and IMAGE_CONDITIONAL not in self.loss_type:
            raise ValueError(
                f"`conditional_image` is {self.conditional_image!r}, but `loss_type` lacks {IMAGE_CONDITIONAL!r}."
            )
        shuffled = {"conditional_image": self.conditional_image == "shuffled",
                    "log_shuffled_images": self.log_shuffled_images}  # fmt: skip
        for name in (name for name, value in shuffled.items() if value and self.precompute_ref_log_probs):
            raise ValueError(
                f"`{name}` is {getattr(self, name)!r}, so that pictures depend on the batch, but "
                "`precompute_ref_log_probs` is True; only one of the two is allowed."
            )
        if not self.beta > 0:
            raise ValueError(f"`beta` is {self.beta}; allowed are numbers above 0.")


__all__ = ["MaskedDiffusionDPOConfig"]
