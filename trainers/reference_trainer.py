"""What trainers that compare the model with a reference share: where the reference comes from, and how it is asked."""

from __future__ import annotations

import copy
import logging
from contextlib import nullcontext
from os import PathLike

import datasets
import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import nn
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import add_fused_lm_head

from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration

from .masked_diffusion_sft_trainer import MaskedDiffusionSFTTrainer, arguments_as


logger = logging.getLogger(__name__)


class ReferenceTrainer(MaskedDiffusionSFTTrainer):
    """Base of trainers with a reference; not to be used by itself.

    Trainers that inherit have `_bounds_of(inputs)`, which returns a function of a model, the bounds on the answers of a
    batch with its noise, and `_bounds_of_rows(bounds, inputs)`, the same as one list a row. Their arguments have a
    `loss_type` and `precompute_ref_log_probs`.

    Args:
        model: as for [`MaskedDiffusionSFTTrainer`].
        ref_model ([`LLaDAMedVForConditionalGeneration`], `str` or `os.PathLike`, *optional*):
            The reference. By default, the model without its adapters if `peft_config` is given, else a copy of the
            model as it is now; with `precompute_ref_log_probs` no copy is kept. A run that is resumed begins with the
            model that it began with the first time.
        options: the other arguments of [`MaskedDiffusionSFTTrainer`].

    Raises:
        TypeError, ValueError: as [`MaskedDiffusionSFTTrainer`]; for a reference that would not be the model's start.
    """

    _made = False  # whether everything that was given to the constructor is ready
    _fall = ""  # the warning that answers to be kept have become less likely, with a place for nats
    _tolerated_fall = 0.0  # in nats

    def __init__(self, model, ref_model=None, args=None, data_collator=None, train_dataset=None, **options):
        args = arguments_as(self._config_class, args, model)
        if ref_model is model and not isinstance(model, (str, PathLike)):
            raise ValueError("`ref_model` is `model` itself, which changes; leave it out, and it is a copy.")
        if isinstance(model, PeftModel) and ref_model is None and args.beta and not args.precompute_ref_log_probs:
            instead = " or set `precompute_ref_log_probs=True`" * ("precompute_ref_log_probs" in vars(args))
            raise ValueError(
                "`model` comes with adapters, without which it is not what training starts from; give a `ref_model`"
                f"{instead}."
            )
        # SFTTrainer would refuse other names than its own.
        loss_type, args.loss_type = args.loss_type, "nll"
        try:
            super().__init__(model, args, data_collator, train_dataset, **options)
        finally:
            args.loss_type = loss_type
        self._totals = torch.zeros(3, dtype=torch.float64)  # of log-ratios since the last log
        self._warned = False
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

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += ["row_number", "ref_logps"]

    def _prepare_rows(self, dataset, name):
        if self._made and self.args.precompute_ref_log_probs:
            raise ValueError(
                f"`{name}` is new, but `precompute_ref_log_probs` needs all rows before training; give them to the "
                "trainer."
            )
        return super()._prepare_rows(dataset, name)

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
        """The rows with the reference's bounds, `ref_logps`, and the number that keys their noise. Each process
        computes its part."""
        if not isinstance(dataset, datasets.Dataset):
            raise ValueError(f"`precompute_ref_log_probs` is True, but `{name}` is a stream, which is never whole.")
        dataset, found, size = dataset.add_column("row_number", range(len(dataset))), {}, self.args.train_batch_size
        # Every process takes the same number of passes, which sharded models need.
        with self.accelerator.split_between_processes(list(range(len(dataset))), apply_padding=True) as numbers:
            for start in range(0, len(numbers), size):
                rows = [dataset[number] for number in numbers[start : start + size]]
                inputs = self._prepare_inputs(self.data_collator(rows))
                with torch.no_grad(), self.compute_loss_context_manager():
                    bounds = self._bounds_of(inputs)(self.ref_model or self.model)
                found |= zip(inputs["row_numbers"], self._bounds_of_rows(bounds, inputs))
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

    def _row_keys(self, inputs) -> list[tuple] | None:
        """What keys the noise of each row: its place in the whole batch of a training step, its number if the reference
        is precomputed; `None` in an evaluation, where the same answers have the same noise."""
        if "row_numbers" in inputs:
            return [("pair", number) for number in inputs["row_numbers"]]
        if "whole" in inputs:
            first = inputs["whole"][0]
            return [(self.state.global_step, first + place) for place in range(len(inputs["row_ids"]))]
        return None

    # What is logged

    @torch.no_grad()
    def _log_means(self, values: dict[str, torch.Tensor], ratios: torch.Tensor, real: torch.BoolTensor):
        """Log the means of values, `(rows,)` each, over all processes' rows that are real; `ratios`, `(rows,)`, are the
        log-ratios to the reference of answers that are to stay likely."""
        sums = torch.stack([(each * real).sum() for each in (*values.values(), ratios, ratios**2, real)])
        *sums, total, squares, count = self.accelerator.gather(sums[None]).sum(dim=0).tolist()
        if not count:
            return
        for name, each in zip(values, sums):
            self._metrics["train" if self.model.training else "eval"][name].append(each / count)
        if self.model.training:
            self._totals += torch.tensor([count, total, squares], dtype=torch.float64)

    def log(self, logs, start_time=None):
        """As in `Trainer`; warns once when answers that are to stay likely have become less likely than under the
        reference, by more than two standard errors over the rows since the last log."""
        if self.model.training:
            count, total, squares = self._totals.tolist()
            self._totals.zero_()
            if count > 1 and not self._warned:
                mean = total / count
                error = (max(squares / count - mean**2, 0) / (count - 1)) ** 0.5
                self._warned = mean + 2 * error < -self._tolerated_fall
                if self._warned:
                    logger.warning(f"Step %d: {self._fall}", self.state.global_step, -mean)
        super().log(logs, start_time)


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
