"""Preference tuning of LLaDA-MedV: the trainer of supervised fine-tuning with TRL's DPO columns, losses and metrics."""

from __future__ import annotations

import copy
import logging
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from os import PathLike

import datasets
import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import nn
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import add_fused_lm_head

from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration
from lladamedv.processing.datasets.messages import PREFERENCE

from .data_collator import DataCollatorForMaskedDiffusionPreference
from .masked_diffusion_dpo_config import MaskedDiffusionDPOConfig
from .masked_diffusion_loss import IGNORE_INDEX, answer_bounds
from .masked_diffusion_sft_trainer import MaskedDiffusionSFTTrainer, arguments_as
from .preference_loss import IMAGE_CONDITIONAL, preference_loss, preference_noise


_NOT_THE_MODELS = ("row_ids", "whole", "pair_numbers", "ref_logps", "shuffled", "exchanged")
logger = logging.getLogger(__name__)


class MaskedDiffusionDPOTrainer(MaskedDiffusionSFTTrainer):
    """Trainer for preferences: DPO on masked-diffusion bounds with the variance reduction of VRPO (LLaDA 1.5, arXiv
    2505.19223), and the terms about the picture of mDPO (arXiv 2406.11839).

    It takes what TRL's `DPOTrainer` takes for vision-language models, and logs what that logs: `rewards/chosen`,
    `rewards/rejected`, `rewards/accuracies`, `rewards/margins`, `logps/chosen` and `logps/rejected`, where `logps` are
    bounds; and `rewards/margins_variance`, the estimate's variance because of the masks, of draws taken to be
    independent. Rewards say which answer is preferred, not what the model answers: see `log_answers`.

    Args:
        model: as for [`MaskedDiffusionSFTTrainer`].
        ref_model ([`LLaDAMedVForConditionalGeneration`], `str` or `os.PathLike`, *optional*):
            The reference. By default, the model without its adapters if `peft_config` is given, else a copy of the
            model as it is now; with `precompute_ref_log_probs` no copy is kept. A run that is resumed begins with the
            model that it began with the first time.
        args ([`MaskedDiffusionDPOConfig`], `DPOConfig` or `TrainingArguments`, *optional*): the arguments.
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Rows with `prompt`, `chosen` and `rejected` (chat messages or texts), and `images` (or `image`).
        options: the other arguments of [`MaskedDiffusionSFTTrainer`].

    Raises:
        TypeError, ValueError: as [`MaskedDiffusionSFTTrainer`]; for a reference that would not be the model's start.
    """

    _tag_names = ["trl", "masked-diffusion-dpo"]
    _name = "Masked-diffusion DPO"
    _config_class, _collator_class = MaskedDiffusionDPOConfig, DataCollatorForMaskedDiffusionPreference
    _columns = PREFERENCE
    _made = False  # whether everything that was given to the constructor is ready

    def __init__(self, model, ref_model=None, args=None, data_collator=None, train_dataset=None, **options):
        args = arguments_as(self._config_class, args, model)
        if ref_model is model and not isinstance(model, (str, PathLike)):
            raise ValueError("`ref_model` is `model` itself, which changes; leave it out, and it is a copy.")
        if isinstance(model, PeftModel) and ref_model is None and not args.precompute_ref_log_probs:
            raise ValueError(
                "`model` comes with adapters, without which it is not what training starts from; set "
                "`precompute_ref_log_probs=True`, or give a `ref_model`."
            )
        self._conditional_image = args.conditional_image if IMAGE_CONDITIONAL in args.loss_type else None
        # SFTTrainer would refuse other names than its own.
        loss_type, args.loss_type = args.loss_type, "nll"
        try:
            super().__init__(model, args, data_collator, train_dataset, **options)
        finally:
            args.loss_type = loss_type
        self._totals = torch.zeros(3, dtype=torch.float64)  # of the chosen answers' log-ratios since the last log
        self._warned = self._warned_of_pictures = False
        _without_dropout(self.model)
        self.ref_model = self._reference(ref_model)
        if args.precompute_ref_log_probs:
            self.train_dataset = self._with_reference(self.train_dataset, "train_dataset")
            if isinstance(self.eval_dataset, dict):
                self.eval_dataset = {name: self._with_reference(rows, f"eval_dataset[{name!r}]")
                                     for name, rows in self.eval_dataset.items()}  # fmt: skip
            elif self.eval_dataset is not None:
                self.eval_dataset = self._with_reference(self.eval_dataset, "eval_dataset")
            self.ref_model = None
        self._made = True

    def _collator_options(self):
        return super()._collator_options() | {"conditional_image": self._conditional_image}

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += ["pair_number", "ref_logps"]

    def _prepare_rows(self, dataset, name):
        if self._made and self.args.precompute_ref_log_probs:
            raise ValueError(
                f"`{name}` is new, but `precompute_ref_log_probs` needs all rows before training; give them to the "
                "trainer."
            )
        return super()._prepare_rows(dataset, name)

    def get_eval_dataloader(self, eval_dataset=None):
        """As in `Trainer`; its batches hold other rows' pictures, too, if they are asked for."""
        collator = self.data_collator
        self.data_collator = replace(collator, shuffled=self.args.log_shuffled_images)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    # The reference

    def _reference(self, ref_model):
        """The second model, ready to run, or `None` where the model itself is asked."""
        if ref_model is None:
            if self.args.precompute_ref_log_probs or isinstance(self.model, PeftModel):
                return None
            ref_model = copy.deepcopy(self.model)
            del ref_model.forward  # TRL's, which runs the model that was copied
        elif isinstance(ref_model, (str, PathLike)):
            ref_model = LLaDAMedVForConditionalGeneration.from_pretrained(ref_model, dtype=self._base_model.dtype)
        add_fused_lm_head(ref_model, outputs=("log_probs", "is_top1"))
        _without_dropout(ref_model.requires_grad_(False))
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(ref_model, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(ref_model, self.accelerator)
        return self.accelerator.prepare_model(ref_model, evaluation_mode=True)

    def _with_reference(self, dataset, name):
        """The rows with the reference's bounds, `ref_logps` `(conversations, draws)`, and the number that keys their
        noise. Each process computes its part."""
        if not isinstance(dataset, datasets.Dataset):
            raise ValueError(f"`precompute_ref_log_probs` is True, but `{name}` is a stream, which is never whole.")
        dataset, found, size = dataset.add_column("pair_number", range(len(dataset))), {}, self.args.train_batch_size
        # Every process takes the same number of passes, which sharded models need.
        with self.accelerator.split_between_processes(list(range(len(dataset))), apply_padding=True) as numbers:
            for start in range(0, len(numbers), size):
                rows = [dataset[number] for number in numbers[start : start + size]]
                inputs = self._prepare_inputs(self.data_collator(rows))
                with torch.no_grad(), self.compute_loss_context_manager():
                    bounds = self._bounds_of(inputs)(self.ref_model or self.model)
                bounds = bounds.view(len(bounds), -1, len(rows)).permute(2, 1, 0)  # (rows, conversations, draws)
                found |= {row["pair_number"]: own for row, own in zip(rows, bounds.tolist())}
        everyone = {number: own for part in gather_object([found]) for number, own in part.items()}
        return dataset.add_column("ref_logps", [everyone[number] for number in range(len(dataset))])

    def _reference_bounds(self, inputs, bounds_of):
        """On the draws that the policy has."""
        if "ref_logps" in inputs:
            return inputs["ref_logps"]
        model = self.accelerator.unwrap_model(self.model)
        without = model.disable_adapter() if self.ref_model is None else nullcontext()
        with torch.no_grad(), without:
            return bounds_of(self.ref_model or self.model)

    # Noise and loss

    def _bounds_of(self, inputs):
        """`answer_bounds` of a model for this batch, with its noise: of a training step by the place of each pair in
        the whole batch, of rows with a precomputed reference by their number, of an evaluation by the answer alone."""
        batch = {name: value for name, value in inputs.items() if name not in _NOT_THE_MODELS}
        labels, pairs = inputs["labels"], len(inputs["row_ids"])
        conversations = len(labels) // pairs
        if "pair_numbers" in inputs:
            keys = [("pair", number) for number in inputs["pair_numbers"]] * conversations
        elif "whole" in inputs:
            first = inputs["whole"][0] // conversations
            keys = [(self.state.global_step, first + number) for number in range(pairs)] * conversations
        else:
            keys = [("fixed", row[row != IGNORE_INDEX].tolist()) for row in labels.cpu()]
        # The chosen answer has the same draws with its picture and without.
        keys = [(key, number // pairs == 1) for number, key in enumerate(keys)]
        t, uniform = preference_noise(self.noise, labels, keys, self.args.num_draws)
        mask = self._base_model.config.mask_token_id
        return partial(answer_bounds, batch=batch, t=t, uniform=uniform, mask_token_id=mask)

    def _loss(self, model, inputs):
        args, pairs, bounds_of = self.args, len(inputs["row_ids"]), self._bounds_of(inputs)
        policy = bounds_of(model)
        reference = self._reference_bounds(inputs, bounds_of)
        lengths = (inputs["labels"] != IGNORE_INDEX).sum(dim=1)
        losses, ratios = preference_loss(
            policy, reference, lengths, pairs, args.loss_type, args.loss_weights, args.beta
        )
        self._measure(policy.detach(), reference, ratios, lengths[:pairs] > 0)
        if "shuffled" in inputs:
            self._measure_shuffled(model, inputs["shuffled"])
        if "whole" not in inputs:
            return losses.mean()
        self._count_tokens(inputs, args.num_draws)
        whole = inputs["whole"][1] * pairs // len(lengths)  # pairs of the whole batch
        return losses.sum() * self.accelerator.num_processes / whole

    @torch.no_grad()
    def _measure(self, policy, reference, ratios, real):
        """Add this batch to what is logged; `real` pairs are counted."""
        pairs, draws, beta = len(real), len(policy), self.args.beta
        logged = {
            "rewards/chosen": beta * ratios.chosen, "rewards/rejected": beta * ratios.rejected,
            "rewards/accuracies": (ratios.delta > 0).float(), "rewards/margins": beta * ratios.delta,
            "logps/chosen": ratios.bound, "logps/rejected": policy[:, pairs : 2 * pairs].mean(dim=0),
        }  # fmt: skip
        if draws > 1:
            spread = (policy - reference)[:, : 2 * pairs].var(dim=0) / draws
            logged["rewards/margins_variance"] = beta**2 * (spread[:pairs] + spread[pairs:])
        if ratios.conditional is not None:
            logged["rewards/image_accuracies"] = (ratios.chosen > ratios.conditional).float()
        values = [*logged.values(), ratios.chosen**2, torch.ones_like(ratios.chosen)]
        sums = torch.stack([(each * real).sum() for each in values])
        *sums, squares, count = self.accelerator.gather(sums[None]).sum(dim=0).tolist()
        if not count:
            return
        for name, total in zip(logged, sums):
            self._metrics["train" if self.model.training else "eval"][name].append(total / count)
        if self.model.training:
            self._totals += torch.tensor([count, sums[0] / beta, squares], dtype=torch.float64)

    @torch.no_grad()
    def _measure_shuffled(self, model, inputs):
        """How often the chosen answer has the higher reward where both are about another row's picture."""
        bounds_of = self._bounds_of(inputs)
        chosen, rejected = (bounds_of(model) - self._reference_bounds(inputs, bounds_of)).mean(dim=0).chunk(2)
        right = torch.stack([(chosen > rejected) * inputs["exchanged"], inputs["exchanged"]], dim=1)
        right, count = self.accelerator.gather(right.sum(dim=0)[None]).sum(dim=0).tolist()
        if count:
            self._metrics["eval"]["rewards/shuffled_accuracies"] += [right / count] * count
        elif not self._warned_of_pictures:
            self._warned_of_pictures = True
            logger.warning(
                "`log_shuffled_images` is True, but a batch of the evaluation shows one picture alone, and does not "
                "count; try a larger `per_device_eval_batch_size`, or rows in another order."
            )

    def log(self, logs, start_time=None):
        """As in `Trainer`; warns once when the chosen answers have become less likely than under the reference, by more
        than two standard errors over the pairs since the last log."""
        if self.model.training:
            count, total, squares = self._totals.tolist()
            self._totals.zero_()
            if count > 1 and not self._warned:
                mean = total / count
                error = (max(squares / count - mean**2, 0) / (count - 1)) ** 0.5
                self._warned = mean + 2 * error < 0
                if self._warned:
                    logger.warning(
                        "Step %d: the chosen answers have become less likely than under the reference, by %.2f nats in "
                        "the mean. Rewards only compare; the model may end up giving neither answer. Watch "
                        "`log_answers`; the loss 'sft' in `loss_type` keeps the chosen answers likely.",
                        self.state.global_step, -mean,
                    )  # fmt: skip
        super().log(logs, start_time)

    def _objective(self):
        args = self.args
        losses = " + ".join(f"{weight:g} × {name}" for name, weight in zip(args.loss_type, args.loss_weights))
        return f", tuned on preferences with the loss {losses} (beta {args.beta:g}, {args.num_draws} masks an answer)"


def _without_dropout(model: nn.Module) -> None:
    """Policy and reference are compared on the same masks, and differ by nothing else than their weights."""
    dropped = 0.0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            dropped, module.p = max(dropped, module.p), 0.0
        for name in ("attention_dropout", "dropout"):  # of attention layers of Transformers, numbers
            if isinstance(value := getattr(module, name, None), float):
                dropped = max(dropped, value)
                setattr(module, name, 0.0)
    if dropped:
        logger.warning("Dropout of %s is set to 0: policy and reference are compared on the same masks.", dropped)


__all__ = ["MaskedDiffusionDPOTrainer"]
