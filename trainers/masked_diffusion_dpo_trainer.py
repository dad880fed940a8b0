"""Preference tuning of LLaDA-MedV: the trainer of supervised fine-tuning with TRL's DPO columns, losses and metrics."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import torch

from lladamedv.processing.datasets.messages import PREFERENCE

from .data_collator import DataCollatorForMaskedDiffusionPreference
from .masked_diffusion_dpo_config import MaskedDiffusionDPOConfig
from .masked_diffusion_loss import IGNORE_INDEX, answer_bounds
from .masked_diffusion_sft_trainer import arguments_as
from .preference_loss import IMAGE_CONDITIONAL, preference_loss, preference_noise
from .reference_trainer import ReferenceTrainer


_NOT_THE_MODELS = ("row_ids", "whole", "row_numbers", "ref_logps", "shuffled", "exchanged")
logger = logging.getLogger(__name__)


class MaskedDiffusionDPOTrainer(ReferenceTrainer):
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
    _fall = (
        "the chosen answers have become less likely than under the reference, by %.2f nats in the mean. Rewards only "
        "compare; the model may end up giving neither answer. Watch `log_answers`; the loss 'sft' in `loss_type` keeps "
        "the chosen answers likely."
    )

    def __init__(self, model, ref_model=None, args=None, data_collator=None, train_dataset=None, **options):
        args = arguments_as(self._config_class, args, model)
        self._conditional_image = args.conditional_image if IMAGE_CONDITIONAL in args.loss_type else None
        super().__init__(model, ref_model, args, data_collator, train_dataset, **options)
        self._warned_of_pictures = False

    def _collator_options(self):
        return super()._collator_options() | {"conditional_image": self._conditional_image}

    def get_eval_dataloader(self, eval_dataset=None):
        """As in `Trainer`; its batches hold other rows' pictures, too, if they are asked for."""
        collator = self.data_collator
        self.data_collator = replace(collator, shuffled=self.args.log_shuffled_images)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    # Noise and loss

    def _bounds_of(self, inputs):
        """`answer_bounds` of a model for this batch, with its noise, in an evaluation by the answer alone."""
        batch = {name: value for name, value in inputs.items() if name not in _NOT_THE_MODELS}
        labels, pairs = inputs["labels"], len(inputs["row_ids"])
        keys = self._row_keys(inputs)
        if keys is None:
            keys = [("fixed", row[row != IGNORE_INDEX].tolist()) for row in labels.cpu()]
        else:
            keys *= len(labels) // pairs
        # The chosen answer has the same draws with its picture and without.
        keys = [(key, number // pairs == 1) for number, key in enumerate(keys)]
        t, uniform = preference_noise(self.noise, labels, keys, self.args.num_draws)
        mask = self._base_model.config.mask_token_id
        return partial(answer_bounds, batch=batch, t=t, uniform=uniform, mask_token_id=mask)

    def _bounds_of_rows(self, bounds, inputs):
        rows = bounds.view(len(bounds), -1, len(inputs["row_ids"])).permute(2, 1, 0)  # (pairs, conversations, draws)
        return rows.tolist()

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
        return losses.sum() * self.accelerator.num_processes / inputs["whole"][1]

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
        self._log_means(logged, ratios.chosen, real)

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

    def _objective(self):
        args = self.args
        losses = " + ".join(f"{weight:g} × {name}" for name, weight in zip(args.loss_type, args.loss_weights))
        return f", tuned on preferences with the loss {losses} (beta {args.beta:g}, {args.num_draws} masks an answer)"


__all__ = ["MaskedDiffusionDPOTrainer"]
