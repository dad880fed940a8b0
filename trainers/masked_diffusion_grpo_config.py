"""Arguments of [`MaskedDiffusionGRPOTrainer`]: those of supervised fine-tuning, and what TRL's `GRPOConfig` adds."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field

from transformers import TrainingArguments
from trl import GRPOConfig

from .masked_diffusion_loss import TIME_SAMPLINGS
from .masked_diffusion_sft_config import MaskedDiffusionSFTConfig
from .policy_gradient_loss import POLICY_LOSSES
from .rewards import REWARDS


_LOSS = "`loss_type` shapes the loss"
_ANSWERS = "answers are the model's own"
_SCALINGS = ("none", "group", "batch")
_BELONGS_TO = {
    "p_mask_prompt": ("diffu_grpo",), "num_draws": ("espo", "spg"),
    **dict.fromkeys(("eubo_beta", "mix_weight"), ("spg",)),
    **dict.fromkeys(("beta", "epsilon", "epsilon_high"), ("diffu_grpo", "espo")),
}  # fmt: skip


@dataclass
class MaskedDiffusionGRPOConfig(MaskedDiffusionSFTConfig):
    r"""
    Configuration class for the [`MaskedDiffusionGRPOTrainer`].

    This class includes only the parameters that rewards add or change; see [`MaskedDiffusionSFTConfig`] for the others.
    As in TRL, `per_device_train_batch_size` counts answers; here every process has whole groups, so that it is a
    multiple of `num_generations`.

    Parameters:
        > The rewards

        reward_funcs (`list[str]`, *optional*):
            Names of reward functions in `REWARDS`, where the trainer is given none.
        reward_weights (`list[float]`, *optional*):
            What each counts; by default 1.
        scale_rewards (`str`, *optional*, defaults to `"none"`):
            What the difference of a reward from its group's mean is divided by: nothing (`"none"`, as d1, ESPO and SPG
            do; TRL's default is `"group"`), the group's standard deviation (`"group"`) or the batch's (`"batch"`).

        > The answers

        num_generations (`int`, *optional*, defaults to `8`):
            How many answers to each prompt make a group.
        num_generations_eval (`int`, *optional*):
            The same in evaluations; by default `num_generations`.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Length of the canvas, `max_new_tokens` of `generate`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Of the answers. At 0 all answers of a group would be the same.
        generation_kwargs (`dict`, *optional*):
            Other options of `generate`, such as `steps` and `block_length`; by default the model's own. With a
            `confidence_threshold` unlikely tokens are drawn again, so that less is explored.
        mask_truncated_completions (`bool`, *optional*, defaults to `False`):
            Whether nothing is learned from answers without an end.
        log_completions (`bool`, *optional*, defaults to `False`):
            Whether to write answers and rewards to `output_dir/completions.jsonl`, a line an answer, every
            `logging_steps` steps.

        > The loss

        loss_type (`str`, *optional*, defaults to `"espo"`):
            How likelihoods are estimated: `"diffu_grpo"` (d1, arXiv 2504.12216), `"espo"` (arXiv 2512.03759) or `"spg"`
            (arXiv 2510.09541).
        beta (`float`, *optional*, defaults to `0.0`):
            What a nat of divergence from the reference counts; without any no reference is kept, as in TRL. d1 uses
            0.04, ESPO 0.001 to 0.01; SPG has none.
        num_iterations (`int`, *optional*, defaults to `1`):
            How many optimizer steps learn from the same answers.
        epsilon (`float`, *optional*, defaults to `0.2`):
            Ratios are clipped to 1 - `epsilon` and 1 + `epsilon_high`. SPG has none.
        epsilon_high (`float`, *optional*):
            By default `epsilon`.
        num_draws (`int`, *optional*):
            How many masks (of ESPO, pairs of masks) estimate the likelihood of an answer, rows of one forward pass that
            encodes each image once; by default 2, and of d1 always 1.
        p_mask_prompt (`float`, *optional*, defaults to `0.3`):
            Of d1: with which probability each token of the prompt is masked, images never.
        eubo_beta (`float`, *optional*, defaults to `1.5`), mix_weight (`float`, *optional*, defaults to `0.5`):
            Of SPG: the exponent of the upper bound, and its share.
        time_sampling (`str`, *optional*, defaults to `"stratified"`):
            How the times of an answer's draws are drawn, see [`MaskedDiffusionDPOConfig`].

    > [!NOTE]
    > `learning_rate` is `1e-6`, as in [`trl.GRPOConfig`].

    Raises:
        ValueError: for a value that is not allowed, or options that mean nothing here.
    """

    _objective = "rewards"
    _suffix = "GRPO"
    _not_applicable = {
        **{name: why for name, why in MaskedDiffusionSFTConfig._not_applicable.items() if name != "loss_type"},
        "loss_weighting": _LOSS, "max_loss_weight": _LOSS, "loss_normalization": _LOSS,
        "complementary_masking": "use `num_draws`",
        "eval_time_steps": "an evaluation has `num_draws`",
        "pack_questions": "each prompt is answered by itself",
        "train_on_template_tokens": _ANSWERS, "eos_padding": _ANSWERS, "eos_padding_to_multiple_of": _ANSWERS,
        "eos_padding_token": _ANSWERS, "turn_mask": "answers are generated without one",
    }  # fmt: skip
    _least = MaskedDiffusionSFTConfig._least | {
        "num_generations": 2, "num_generations_eval": 1, "max_completion_length": 1, "num_iterations": 1,
        "num_draws": 1,
    }  # fmt: skip
    precompute_ref_log_probs = False  # answers are not known before

    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate for AdamW."})
    reward_funcs: list[str] | None = field(default=None, metadata={"help": f"Reward functions: {', '.join(REWARDS)}."})
    reward_weights: list[float] | None = field(default=None, metadata={"help": "What each counts; by default 1."})
    scale_rewards: str = field(
        default="none",
        metadata={"help": "What differences of rewards are divided by.", "choices": list(_SCALINGS)},
    )
    num_generations: int = field(default=8, metadata={"help": "How many answers to each prompt make a group."})
    num_generations_eval: int | None = field(
        default=None, metadata={"help": "The same in evaluations; by default `num_generations`."}
    )
    max_completion_length: int = field(default=256, metadata={"help": "Length of the canvas, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Of the answers, above 0."})
    generation_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Other options of `generate`, as JSON; by default the model's own."}
    )
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Whether nothing is learned from answers without an end."}
    )
    log_completions: bool = field(
        default=False, metadata={"help": "Whether to write answers and rewards to completions.jsonl."}
    )
    loss_type: str = field(
        default="espo", metadata={"help": "How likelihoods are estimated.", "choices": list(POLICY_LOSSES)}
    )
    beta: float = field(default=0.0, metadata={"help": "What a nat of divergence from the reference counts."})
    num_iterations: int = field(default=1, metadata={"help": "How many steps learn from the same answers."})
    epsilon: float = field(default=0.2, metadata={"help": "Ratios are clipped to 1 - epsilon and 1 + epsilon_high."})
    epsilon_high: float | None = field(default=None, metadata={"help": "By default `epsilon`."})
    num_draws: int | None = field(
        default=None, metadata={"help": "How many masks estimate a likelihood; by default 2, of diffu_grpo always 1."}
    )
    p_mask_prompt: float = field(
        default=0.3, metadata={"help": "Of diffu_grpo: with which probability each token of the prompt is masked."}
    )
    eubo_beta: float = field(default=1.5, metadata={"help": "Of spg: the exponent of the upper bound."})
    mix_weight: float = field(default=0.5, metadata={"help": "Of spg: the share of the upper bound."})
    time_sampling: str = field(
        default="stratified",
        metadata={"help": "How the times of an answer's draws are drawn.", "choices": list(TIME_SAMPLINGS)},
    )

    _VALID_DICT_FIELDS = [*MaskedDiffusionSFTConfig._VALID_DICT_FIELDS, "generation_kwargs"]

    def __post_init__(self):
        self.scale_rewards = {True: "group", False: "none"}.get(self.scale_rewards, self.scale_rewards)  # as in TRL
        super().__post_init__()
        for name, fits, allowed in (
            ("temperature", self.temperature > 0, "numbers above 0; at 0 all answers of a group would be the same"),
            ("beta", self.beta >= 0, "numbers of at least 0"),
            ("epsilon", 0 < self.epsilon < 1, "numbers between 0 and 1"),
            ("epsilon_high", self.epsilon_high is None or self.epsilon_high > 0, "numbers above 0"),
            ("p_mask_prompt", 0 <= self.p_mask_prompt < 1, "numbers of at least 0 and below 1"),
            ("eubo_beta", self.eubo_beta >= 1, "numbers of at least 1, with which it bounds from above"),
            ("mix_weight", 0 <= self.mix_weight <= 1, "numbers between 0 and 1"),
        ):
            if not fits:
                raise ValueError(f"`{name}` is {getattr(self, name)}; allowed are {allowed}.")
        if self.num_draws is None:
            self.num_draws = 1 if self.loss_type == "diffu_grpo" else 2
        for name, losses in _BELONGS_TO.items():
            value, without = getattr(self, name), 1 if name == "num_draws" else self.__dataclass_fields__[name].default
            if self.loss_type not in losses and value not in (without, None):
                raise ValueError(
                    f"`{name}` is {value}, but `loss_type` is {self.loss_type!r}; it belongs to {' and '.join(losses)}."
                )
        if self.per_device_train_batch_size % self.num_generations:
            raise ValueError(
                f"`per_device_train_batch_size` is {self.per_device_train_batch_size} and `num_generations` "
                f"{self.num_generations}; every process has whole groups: allowed are multiples."
            )
        if self.num_iterations > 1:
            if self.train_sampling_strategy != "random":
                raise ValueError(
                    f"`num_iterations` is {self.num_iterations} and `train_sampling_strategy` "
                    f"{self.train_sampling_strategy!r}; prompts that come again come in random order."
                )
            # A resumed run would answer anew, with another model.
            name = {"steps": "save_steps", "best": "eval_steps"}.get(self.save_strategy.value)
            if name is not None and getattr(self, name) % self.num_iterations:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)} and `num_iterations` {self.num_iterations}; checkpoints are "
                    "saved where no answers are left to be learned from: allowed are multiples."
                )

    @classmethod
    def from_arguments(cls, args: TrainingArguments) -> MaskedDiffusionGRPOConfig:
        """As of [`MaskedDiffusionSFTConfig`], of a `GRPOConfig`, too, but for its default of `loss_type`."""
        if isinstance(args, GRPOConfig):
            args = copy(args)
            if args.loss_type == GRPOConfig.loss_type:
                args.loss_type = cls.loss_type
            if args.steps_per_generation == args.gradient_accumulation_steps:  # what TRL makes of `None`
                args.steps_per_generation = args.generation_batch_size = None
        return super().from_arguments(args)


__all__ = ["MaskedDiffusionGRPOConfig"]
