"""Arguments of [`MaskedDiffusionSFTTrainer`]: TRL's `SFTConfig` and what masked diffusion adds to it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields

from accelerate.utils import get_int_from_env
from transformers import TrainingArguments
from trl import SFTConfig

from .masked_diffusion_loss import TIME_SAMPLINGS, LossArguments


# The parts of the model with weights that are trained, by `trainable`.
TRAINABLE = {
    "projector": ("projector",),
    "projector+language_model": ("projector", "language_model"),
    "all": ("projector", "language_model", "vision"),
}
_PACKING = "use `pack_questions`"
_HUB = "only at the end is everything checked that is pushed; allowed is `hub_strategy='end'`"
_METRICS = "evaluation computes `eval_loss` and no logits; `log_answers` shows answers, `lladamedv eval` scores them"
# Arguments of SFTConfig and TrainingArguments that would be accepted and do nothing, or something else than they say.
NOT_APPLICABLE = {
    "packing": _PACKING,
    "packing_strategy": _PACKING,
    "padding_free": _PACKING,
    "eval_packing": f"{_PACKING}, which packs evaluation rows, too",
    "completion_only_loss": "answers alone are learned anyway, see `train_on_template_tokens`",
    "loss_type": "use `loss_weighting`",
    "label_smoothing_factor": "the loss has no smoothed form",
    "router_aux_loss_coef": "the model has no experts",
    "dataset_text_field": "rows hold `messages`",
    "dataset_num_proc": "rows are checked by several threads of one process",
    "truncation_mode": "nothing is ever cut, see `long_rows`",
    "eos_token": "the chat template ends a turn, and `eos_padding_token` is what follows the last",
    "pad_token": "set `pad_token` of the processor's tokenizer",
    "use_cache": "training has no cache",
    "use_liger_kernel": "Liger has no kernels for this model",
    "liger_kernel_config": "Liger has no kernels for this model",
    "average_tokens_across_devices": "`loss_normalization` always goes over all processes",
    "include_num_input_tokens_seen": "padding is not counted; allowed are 'no' and 'non_padding'",
    "label_names": _METRICS,
    "include_for_metrics": _METRICS,
    "batch_eval_metrics": _METRICS,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "cache_image_features": "it was removed in 0.2.0, because it saved only 2 to 4 % of a step",
}
# Values besides the default that ask for nothing else than what happens.
_NEUTRAL = {"eval_packing": (False,), "router_aux_loss_coef": (0.0,), "include_num_input_tokens_seen": ("non_padding",)}

_LEAST = {
    "eos_padding": 0, "log_answers": 0, "eos_padding_to_multiple_of": 1, "eval_time_steps": 1, "max_length": 1,
    "pad_to_multiple_of": 1, "pack_questions": 2,
}  # fmt: skip


@dataclass
class MaskedDiffusionSFTConfig(LossArguments, SFTConfig):
    r"""
    Configuration class for the [`MaskedDiffusionSFTTrainer`].

    This class includes only the parameters that masked diffusion adds; see [`trl.SFTConfig`] for the others, and
    [`LossArguments`] for `loss_weighting`, `max_loss_weight`, `loss_normalization` and `complementary_masking`.

    Parameters:
        > The noise

        time_sampling (`str`, *optional*, defaults to `"uniform"`):
            How the times t of a batch are drawn: independently (`"uniform"`, LLaDA), each in its own part of [0, 1)
            over the whole batch of all processes (`"stratified"`, VDM's low-discrepancy sampler, arXiv 2107.00630), or
            as t and 1 - t for rows next to each other (`"antithetic"`).
        noise_seed (`int`, *optional*):
            Seed of times and masks; by default `seed`.

        > The data

        eos_padding (`int`, *optional*, defaults to `0`):
            How many end tokens follow the last answer of a row and belong to the loss. LLaDA's SFT fills answers up so
            (arXiv 2502.09992, appendix B.1); without any the model learns the end of turn alone.
        eos_padding_to_multiple_of (`int`, *optional*):
            More end tokens, until the last answer of a row fills a canvas of that many tokens, or a whole number of
            them. Generation starts from such a canvas, so the model need not guess from its length how long an answer
            should be; 64 is the paper's canvas for short answers.
        eos_padding_token (`str`, *optional*):
            That end token; by default the tokenizer's padding token, `<|endoftext|>`.
        train_on_template_tokens (`bool`, *optional*, defaults to `False`):
            Whether the special tokens of the template in every turn, and the assistant's header, belong to the loss, as
            in the code that LLaDA-MedV was trained with. By default the answers and their ends of turn do.
        turn_mask (`bool`, *optional*, defaults to `False`):
            Whether a token sees its own and earlier turns only (LLaDA-V, arXiv 2505.16933, section 3.2).
        pack_questions (`int`, *optional*):
            Put up to this many questions about one image into one row. Each sees the image and itself alone, at the
            positions that it would have alone; the image no longer sees the questions, unlike in the paper's fully
            bidirectional attention. Needs single-turn rows that begin with the image.
        long_rows (`str`, *optional*, defaults to `"error"`):
            What to do with rows of more than `max_length` tokens (by default the model's context): stop (`"error"`) or
            leave them out and report how many (`"drop"`). Nothing is ever cut.
        invalid_rows (`str`, *optional*, defaults to `"error"`):
            What to do with rows that cannot be trained on, such as rows without an answer, with messages of another
            form, with an image that is missing or broken, or with more `<image>` than images: stop (`"error"`) or leave
            them out and report how many (`"skip"`).

        > What is trained

        trainable (`str`, *optional*, defaults to `"projector+language_model"`):
            `"projector"` (stage 1 of LLaDA-MedV), `"projector+language_model"` (its stages 2 and 3) or `"all"`. What is
            frozen in the model stays so. With adapters these are trained instead, and whatever `modules_to_save` names.
        projector_learning_rate, vision_learning_rate, language_model_learning_rate (`float`, *optional*):
            Learning rates of these parts; by default `learning_rate`. Adapters belong to the part that they adapt.

        > Evaluation

        eval_time_steps (`int`, *optional*, defaults to `8`):
            `eval_loss` averages over this many times, spread evenly over [0, 1], with masks that are always the same.
        log_answers (`int`, *optional*, defaults to `0`):
            At every evaluation, answer the first so many rows of `eval_dataset` and log them as a table.
            `answers.html` in `output_dir` shows them with their pictures, and is never pushed.

    > [!NOTE]
    > These parameters have other default values than in [`trl.SFTConfig`]:
    > - `learning_rate`: `1e-5` instead of `2e-5` (LLaDA-V's; LLaDA-MedV does not say).
    > - `lr_scheduler_type`: `"cosine"`; `warmup_steps`: `0.03`, a part of all steps (LLaDA-V's).
    > - `max_length`: `None` instead of `1024`: image tokens are never cut off.
    > - `hub_private_repo`: `True`; `hub_strategy`: `"end"`, so that nothing is pushed that was not checked.

    Raises:
        ValueError: for a value that is not allowed, or options of `SFTConfig` that mean nothing here.
    """

    # Of this class and those that inherit: what arguments are refused for, with which reasons, and smallest values.
    _objective = "masked diffusion"
    _suffix = "SFT"
    _not_applicable = NOT_APPLICABLE
    _least = _LEAST

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The learning-rate schedule."})
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Warm-up, in steps, or as a part of all steps if below 1."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest row, in tokens; by default the model's context. Nothing is cut."}
    )

    hub_private_repo: bool | None = field(default=True, metadata={"help": "Whether to push to a private repository."})
    hub_strategy: str = field(default="end", metadata={"help": "When to push; only at the end is everything checked."})

    # The noise
    time_sampling: str = field(
        default="uniform", metadata={"help": "How times are drawn.", "choices": list(TIME_SAMPLINGS)}
    )
    noise_seed: int | None = field(default=None, metadata={"help": "Seed of times and masks; by default `seed`."})

    # The data
    eos_padding: int = field(default=0, metadata={"help": "End tokens after the last answer that are learned."})
    eos_padding_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Length of canvas that the last answer is filled up to with end tokens."}
    )
    eos_padding_token: str | None = field(
        default=None, metadata={"help": "That end token; by default the tokenizer's padding token."}
    )
    train_on_template_tokens: bool = field(
        default=False, metadata={"help": "Whether the template's special tokens belong to the loss."}
    )
    turn_mask: bool = field(default=False, metadata={"help": "Whether a token sees its own and earlier turns only."})
    pack_questions: int | None = field(
        default=None, metadata={"help": "Put up to this many questions about one image into one row."}
    )
    long_rows: str = field(
        default="error", metadata={"help": "What to do with rows that are too long.", "choices": ["error", "drop"]}
    )
    invalid_rows: str = field(
        default="error",
        metadata={"help": "What to do with rows that cannot be trained on.", "choices": ["error", "skip"]},
    )

    # What is trained
    trainable: str = field(
        default="projector+language_model", metadata={"help": "Which parts are trained.", "choices": list(TRAINABLE)}
    )
    projector_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the projector."})
    vision_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the vision tower."})
    language_model_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the language model and its output layer."}
    )
    cache_image_features: str | None = field(
        default=None, metadata={"help": "Removed in 0.2.0; only its absence is allowed."}
    )

    # Evaluation
    eval_time_steps: int = field(default=8, metadata={"help": "How many times t `eval_loss` averages over."})
    log_answers: int = field(default=0, metadata={"help": "How many evaluation rows to answer and log as a table."})

    def __post_init__(self):
        SFTConfig.__post_init__(self)
        LossArguments.__post_init__(self)
        _check_processes(self.world_size)
        for name, least in self._least.items():
            value = getattr(self, name)
            if value is not None and (value != int(value) or value < least):
                raise ValueError(f"`{name}` is {value!r}; allowed are whole numbers of at least {least}.")
        for name in ("projector_learning_rate", "vision_learning_rate", "language_model_learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` is {value!r}; allowed are numbers above 0.")
        for name in self._not_applicable.keys() & self.__dataclass_fields__.keys():
            value = getattr(self, name)
            if value not in (getattr(type(self), name, []), *_NEUTRAL.get(name, ())):
                raise ValueError(
                    f"`{name}` is {value!r}, which does not apply to {self._objective}: {self._not_applicable[name]}."
                )
        if set(self.dataset_kwargs or {}) - {"skip_prepare_dataset"}:
            raise ValueError(
                f"`dataset_kwargs` is {self.dataset_kwargs!r}; allowed is 'skip_prepare_dataset', which changes "
                "nothing: rows become tensors in the collator."
            )
        if self.accelerator_config.dispatch_batches:
            raise ValueError(
                "`accelerator_config` has dispatch_batches=True, which would part images from the rows that show "
                "them; allowed are False and None."
            )
        self.accelerator_config.dispatch_batches = False
        if self.activation_offloading and self.device.type == "cpu":
            raise ValueError("`activation_offloading` is True, but there is no GPU whose activations could be moved.")
        # Answers alone are learned anyway. TRL would look for a training template among its own.
        self.assistant_only_loss = False
        if self.pack_questions is not None and self.turn_mask:
            raise ValueError(
                f"`pack_questions` is {self.pack_questions} and `turn_mask` is True; a packed row holds questions of "
                "one turn: only one of the two is allowed."
            )

    def to_dict(self):
        """As of `TrainingArguments`, which hides whatever is named a token; those of the tokenizer are no secrets."""
        return super().to_dict() | {"eos_padding_token": self.eos_padding_token}

    @classmethod
    def from_arguments(cls, args: TrainingArguments) -> MaskedDiffusionSFTConfig:
        """Take over `TrainingArguments` or an `SFTConfig`, as `SFTTrainer` does.

        Three defaults are not taken over: a `max_length` of 1024, at which TRL cuts rows, `hub_strategy` and
        `hub_private_repo`.

        Raises:
            TypeError: for arguments of another type.
            ValueError: as for new arguments.
        """
        if not isinstance(args, TrainingArguments):
            raise TypeError(
                f"`args` is of type {type(args).__name__}; allowed are {cls.__name__}, SFTConfig and TrainingArguments."
            )
        values = args.to_dict()
        values |= {name: getattr(args, name) for name in values if name.endswith("_token")}  # `to_dict` hides them
        for name in ("max_length", "hub_strategy", "hub_private_repo"):
            if name in values and getattr(args, name) == getattr(type(args), name):
                del values[name]
        for each in fields(args):  # of arguments for another of TRL's trainers
            if each.name in values.keys() - cls.__dataclass_fields__.keys() and values.pop(each.name) != each.default:
                value = getattr(args, each.name)
                raise ValueError(f"`{each.name}` is {value!r}, which does not apply to {cls._objective}.")
        return cls(**values)


def _check_processes(num_processes: int) -> None:
    """Refuse processes that do not find each other: they would train apart, and write into one folder."""
    asked = get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 0)
    # `accelerate launch` with a configuration of several processes on CPUs starts one, and says nothing but this.
    alone = not asked and "MASTER_ADDR" in os.environ
    if alone or asked not in (0, num_processes):
        raise ValueError(
            f"This process was started as one of {asked or 'several'}, but trains as one of {num_processes}: each "
            "would train apart and write into the same folder. On CPUs, set `use_cpu=True` (--use_cpu true) and start "
            "them with torchrun or a configuration of accelerate of type MULTI_GPU or FSDP, for MULTI_CPU starts one. "
            "For a single process, unset WORLD_SIZE and MASTER_ADDR."
        )


__all__ = ["MaskedDiffusionSFTConfig"]
