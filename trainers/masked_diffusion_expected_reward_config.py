"""Arguments of [`MaskedDiffusionExpectedRewardTrainer`]: those of supervised fine-tuning, and what rewards add."""

from __future__ import annotations

from dataclasses import dataclass, field

from lladamedv.modeling_lladamedv.scoring_lladamedv import MAX_EXACT_TOKENS

from .expected_reward import CANDIDATE_LOSSES
from .masked_diffusion_sft_config import MaskedDiffusionSFTConfig
from .rewards import REWARDS


_LOSS = "`loss_type` shapes the loss"
_END = "a candidate ends with one end token"


@dataclass
class MaskedDiffusionExpectedRewardConfig(MaskedDiffusionSFTConfig):
    r"""
    Configuration class for the [`MaskedDiffusionExpectedRewardTrainer`].

    This class includes only the parameters that candidates and rewards add or change; see [`MaskedDiffusionSFTConfig`]
    for the others.

    Parameters:
        reward_funcs (`list[str]`, *optional*):
            Names of reward functions in `REWARDS`, where the trainer is given none.
        reward_weights (`list[float]`, *optional*):
            What each counts; by default 1.
        loss_type (`str`, *optional*, defaults to `"closed_form"`):
            `"expected_reward"`, the mean reward under the probabilities of the candidates less `beta` times their
            divergence from the reference; or `"closed_form"`, the cross-entropy to the probabilities that are the
            optimum of that. The first does not learn answers whose probability is near 0, the second does.
        beta (`float`, *optional*, defaults to `0.1`):
            What a nat of divergence from the reference counts, in units of the reward. At the optimum, candidates whose
            rewards differ by r have odds of exp(r / `beta`) times the reference's. `"expected_reward"` may have 0, with
            which no reference is kept.
        temperature (`float`, *optional*, defaults to `1.0`):
            What scores are divided by before probabilities of candidates are made of them. Above 1, unlikely candidates
            have a larger part in the objective; which one is the likeliest stays the same.
        mass_weight (`float`, *optional*, defaults to `1.0`):
            What is added of the negative log of all candidates' likelihood together, so that the model goes on
            answering with one of them.
        max_exact_tokens (`int`, *optional*, defaults to `4`):
            Candidates of up to so many tokens L, the end token included, are scored exactly, which takes 2^L - 1 rows
            of a forward pass, or fewer where candidates have rows in common; at most 12.
        num_draws (`int`, *optional*, defaults to `8`):
            How many masks estimate the score of a longer one. Probabilities of candidates are then estimates, too, and
            not unbiased ones.
        precompute_ref_log_probs (`bool`, *optional*, defaults to `False`):
            Whether the reference's scores are computed once, before training, with the model as it is given. No second
            model is kept. Not of streamed rows.
        log_answers (`int`, *optional*, defaults to `0`):
            At every evaluation, answer the first so many prompts of `eval_dataset` and log the answers, beside the
            candidates with the highest reward, and the share of those that are equal, `eval_answer_accuracy`. The loss
            only sees the candidates; the model may answer something else.

    > [!NOTE]
    > `learning_rate` is `1e-6`, as in [`trl.GRPOConfig`].

    Raises:
        ValueError: for a value that is not allowed, or options that mean nothing here.
    """

    _objective = "rewards of candidates"
    _suffix = "ExpectedReward"
    _not_applicable = {
        **{name: why for name, why in MaskedDiffusionSFTConfig._not_applicable.items() if name != "loss_type"},
        "loss_weighting": _LOSS, "max_loss_weight": _LOSS, "loss_normalization": _LOSS,
        "complementary_masking": "use `max_exact_tokens` and `num_draws`",
        "eval_time_steps": "an evaluation has the masks of training",
        "pack_questions": "the candidates of a prompt are rows of their own; leave it out",
        "train_on_template_tokens": "candidates alone are scored",
        "time_sampling": "use `max_exact_tokens` and `num_draws`",
        "eos_padding": _END, "eos_padding_to_multiple_of": _END, "eos_padding_token": _END,
    }  # fmt: skip
    _least = MaskedDiffusionSFTConfig._least | {"num_draws": 1, "max_exact_tokens": 0}

    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate for AdamW."})
    reward_funcs: list[str] | None = field(default=None, metadata={"help": f"Reward functions: {', '.join(REWARDS)}."})
    reward_weights: list[float] | None = field(default=None, metadata={"help": "What each counts; by default 1."})
    loss_type: str = field(
        default="closed_form", metadata={"help": "What is optimised.", "choices": list(CANDIDATE_LOSSES)}
    )
    beta: float = field(default=0.1, metadata={"help": "What a nat of divergence from the reference counts."})
    temperature: float = field(default=1.0, metadata={"help": "What scores are divided by, for probabilities."})
    mass_weight: float = field(
        default=1.0, metadata={"help": "What the likelihood of all candidates together counts, so that it stays high."}
    )
    max_exact_tokens: int = field(
        default=4, metadata={"help": "Candidates of up to so many tokens are scored on all masks."}
    )
    num_draws: int = field(default=8, metadata={"help": "How many masks score a longer candidate."})
    precompute_ref_log_probs: bool = field(
        default=False, metadata={"help": "Whether the reference's scores are computed once, before training."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.max_exact_tokens > MAX_EXACT_TOKENS:
            raise ValueError(
                f"`max_exact_tokens` is {self.max_exact_tokens}; allowed are whole numbers up to {MAX_EXACT_TOKENS}."
            )
        if self.beta < 0 or (self.beta == 0 and self.loss_type == "closed_form"):
            raise ValueError(
                f"`beta` is {self.beta}; allowed are numbers above 0, or 0 with loss_type='expected_reward'."
            )
        if not self.temperature > 0:
            raise ValueError(f"`temperature` is {self.temperature}; allowed are numbers above 0.")
        if not self.mass_weight >= 0:
            raise ValueError(f"`mass_weight` is {self.mass_weight}; allowed are numbers of at least 0.")
        if self.precompute_ref_log_probs and not self.beta:
            raise ValueError("`precompute_ref_log_probs` is True, but `beta` is 0, with which there is no reference.")


__all__ = ["MaskedDiffusionExpectedRewardConfig"]
