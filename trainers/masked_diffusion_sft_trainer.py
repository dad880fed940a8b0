"""Supervised fine-tuning of LLaDA-MedV: TRL's `SFTTrainer` with the masked-diffusion loss instead of its own."""

from __future__ import annotations

import json
import logging
import platform
from dataclasses import fields
from functools import partial
from os import PathLike
from pathlib import Path

import datasets
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import PrinterCallback, ProgressCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTTrainer

from lladamedv.hub_cards import (
    ModelFacts,
    component_of_model,
    find_component,
    gather_training_facts,
    is_hub_id,
    save_model_card,
    software_versions,
)
from lladamedv.hub_cards.push import push_folder
from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration
from lladamedv.processing import LLaDAMedVProcessor
from lladamedv.processing.datasets.messages import images_of
from lladamedv.processing.datasets.readers import undecoded

from .answer_table import AnswerTableCallback
from .data_collator import DataCollatorForMaskedDiffusion
from .masked_diffusion_loss import IGNORE_INDEX, AnswerNoise, LossArguments, masked_diffusion_loss
from .masked_diffusion_sft_config import TRAINABLE, MaskedDiffusionSFTConfig
from .rows import pack_rows, prepare_rows
from .training_progress import LossCurveCallback, TrainingProgressCallback


# How the names of the parameters of each part begin, within the model that is trained.
_PARTS = {
    "projector": ("model.multi_modal_projector.", "model.image_newline"),
    "vision": ("model.vision_tower.",),
    "language_model": ("model.language_model.", "lm_head."),
}
_COLLATOR_OPTIONS = (
    "eos_padding", "eos_padding_to_multiple_of", "eos_padding_token", "train_on_template_tokens", "turn_mask",
    "pad_to_multiple_of", "max_length",
)  # fmt: skip
_NO_LOGITS = "no logits are kept; `log_answers` shows answers, `lladamedv eval` scores them"
logger = logging.getLogger(__name__)


class MaskedDiffusionSFTTrainer(SFTTrainer):
    """Trainer for the masked-diffusion SFT of LLaDA (arXiv 2502.09992, algorithm 2), LLaDA-V and LLaDA-MedV.

    The loss is [`masked_diffusion_loss`]; [`MaskedDiffusionSFTConfig`] has the variants. Images that several rows show
    are encoded once, and a frozen vision tower keeps no activations.

    Args:
        model ([`LLaDAMedVForConditionalGeneration`], `PeftModel`, `str` or `os.PathLike`):
            The model; the folder or Hub id of one, loaded with `args.model_init_kwargs`, by default in float32; or a
            model with adapters, of which those that are trainable stay the only weights that are trained.
        args ([`MaskedDiffusionSFTConfig`], `SFTConfig` or `TrainingArguments`, *optional*): the arguments.
        data_collator ([`DataCollatorForMaskedDiffusion`], *optional*): by default the one that `args` describe.
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Rows with `messages` (chat messages, contents as text or parts) and `images` (or `image`); an `id` is named
            in messages where there is one. A stream that ends before `max_steps` begins anew.
        eval_dataset (the same, or a `dict` of them, *optional*): rows for `eval_loss`.
        processing_class ([`LLaDAMedVProcessor`], *optional*): by default the one beside the model.
        callbacks, optimizers, optimizer_cls_and_kwargs, quantization_config: as for `SFTTrainer`.
        peft_config (`peft.PeftConfig`, *optional*): adapters to train instead of the model's own weights.
        compute_loss_func, compute_metrics, preprocess_logits_for_metrics, formatting_func: only `None` is allowed.

    Attributes:
        row_reports (`dict[str, RowReport]`): what became of the rows of each data set.
        trained_parts (`list[str]`): the parts of the model with weights that are trained.

    Raises:
        TypeError: for arguments of another type.
        ValueError: before training, for rows or options that cannot be trained on; during training, when the loss is
            not finite: the ids of the batch are then in `output_dir/not_finite.json`.
    """

    _tag_names = ["trl", "masked-diffusion-sft"]
    _name = "Masked-diffusion SFT"
    # What trainers that inherit have of their own.
    _config_class, _collator_class = MaskedDiffusionSFTConfig, DataCollatorForMaskedDiffusion
    _columns = ("messages",)
    # The whole batch's numbers of answers and tokens are known, and divided by, in `compute_loss`.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        compute_loss_func=None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        optimizer_cls_and_kwargs=None,
        preprocess_logits_for_metrics=None,
        quantization_config=None,
        peft_config=None,
        formatting_func=None,
    ):
        refused = {
            "compute_loss_func": (compute_loss_func, "`loss_weighting` and `loss_normalization` shape the loss"),
            "compute_metrics": (compute_metrics, _NO_LOGITS),
            "preprocess_logits_for_metrics": (preprocess_logits_for_metrics, _NO_LOGITS),
            "formatting_func": (formatting_func, "rows hold `messages`; `map` the data set to them beforehand"),
        }
        for name, (value, instead) in refused.items():
            if value is not None:
                raise ValueError(f"`{name}` does not apply to masked diffusion: {instead}.")
        if train_dataset is None:
            raise ValueError("`train_dataset` is required.")
        args = arguments_as(self._config_class, args, model)
        if isinstance(model, (str, PathLike)):
            model, quantization_config = _load(model, args, quantization_config), None
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type != LLaDAMedVForConditionalGeneration.config_class.model_type:
            raise ValueError(f"`model` is a {type(model).__name__}; needed is a LLaDAMedVForConditionalGeneration.")
        processing_class = _processor(processing_class, model, args)
        _freeze(model, args.trainable, peft_config)
        self.args, self.row_reports = args, {}
        self.data_collator = self._make_collator(data_collator, processing_class, model.config)
        train_dataset = self._prepare_rows(train_dataset, "train_dataset")
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self._prepare_rows(rows, f"eval_dataset[{name!r}]")
                            for name, rows in eval_dataset.items()}  # fmt: skip
        elif eval_dataset is not None:
            eval_dataset = self._prepare_rows(eval_dataset, "eval_dataset")
        self.noise = AnswerNoise(args.seed if args.noise_seed is None else args.noise_seed, args.time_sampling)
        super().__init__(
            model=model, args=args, data_collator=self.data_collator, train_dataset=train_dataset,
            eval_dataset=eval_dataset, processing_class=processing_class, callbacks=callbacks, optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs, quantization_config=quantization_config,
            peft_config=peft_config,
        )  # fmt: skip
        for own in (PrinterCallback, ProgressCallback):  # a notebook's stays
            if self.pop_callback(own) is not None:
                self.add_callback(TrainingProgressCallback())
        self.add_callback(LossCurveCallback())
        trained = {part_of(name) for name, weight in self.model.named_parameters() if weight.requires_grad}
        self.trained_parts = [part for part in _PARTS if part in trained]
        self._check_what_is_trained()
        if args.log_answers:
            rows = next(iter(eval_dataset.values())) if isinstance(eval_dataset, dict) else eval_dataset
            if rows is None:
                raise ValueError(f"`log_answers` is {args.log_answers}, but there is no `eval_dataset`.")
            fetch = processing_class.image_processor.fetch_images
            asked = [self._row_to_answer(row, fetch(images_of(row))) for row in rows.take(args.log_answers)]
            self.add_callback(AnswerTableCallback(self, asked))

    def _make_collator(self, collator, processor, config) -> DataCollatorForMaskedDiffusion:
        """The collator that the arguments describe, or the given one if it does not contradict them."""
        context = config.get_text_config().max_position_embeddings
        options = self._collator_options()
        if collator is None:
            collator = self._collator_class(processor, **options | {"max_length": self.args.max_length or context})
        elif type(collator) is not self._collator_class:
            raise TypeError(
                f"`data_collator` is a {type(collator).__name__}; needed is a {self._collator_class.__name__}."
            )
        for name, value in options.items():
            if value != getattr(collator, name) and (value or name not in _COLLATOR_OPTIONS):
                raise ValueError(
                    f"`args` ask for {name}={value!r}, but `data_collator` has {getattr(collator, name)!r}; set it "
                    "there."
                )
        if collator.max_length is None or collator.max_length > context:
            raise ValueError(f"`max_length` is {collator.max_length}; the model's context allows {context}.")
        return collator

    def _collator_options(self) -> dict:
        options = {name: getattr(self.args, name) for name in _COLLATOR_OPTIONS}
        return options | {"packed": self.args.pack_questions is not None}

    def _row_to_answer(self, row: dict, images: list) -> dict:
        """A row of `log_answers`, which ends with the answer to compare with."""
        return self.data_collator.conversations(row, images)[0][0]

    def _check_what_is_trained(self) -> None:
        """
        Raises:
            ValueError: for arguments that mean weights which are not trained, or are not whole in a process.
        """
        parallel = self.accelerator.parallelism_config
        if parallel is not None and max(parallel.tp_size, parallel.cp_size, parallel.sp_size) > 1:
            raise ValueError(f"`parallelism_config` is {parallel}; rows and layers cannot be split, dp_* may be > 1.")
        for part in _PARTS:
            if (rate := getattr(self.args, f"{part}_learning_rate")) is not None and part not in self.trained_parts:
                raise ValueError(
                    f"`{part}_learning_rate` is {rate}, but nothing of that part is trained, only "
                    f"{' and '.join(self.trained_parts)}; leave it out, or see `trainable`."
                )
        if self.optimizer is not None:
            held = {id(weight) for group in self.optimizer.param_groups for weight in group["params"]}
            if not any(each.requires_grad and id(each) in held for each in self.model.parameters()):
                raise ValueError(
                    "`optimizers` holds an optimizer of none of the weights that are trained; make it of these, or "
                    "leave it to `args`."
                )

    @property
    def _base_model(self) -> LLaDAMedVForConditionalGeneration:
        """The model without adapters or wrappers."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if isinstance(model, PeftModel) else model

    def _prepare_rows(self, dataset, name):
        """The rows to train on, packed if asked for."""
        args, data_collator = self.args, self.data_collator
        if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
            raise TypeError(
                f"`{name}` is of type {type(dataset).__name__}; allowed are `datasets.Dataset`, which "
                "`Dataset.from_list(rows)` makes of a list, and `datasets.IterableDataset`."
            )
        made = isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom"  # by a transform
        columns = (not made and dataset.column_names) or list(next(iter(dataset), {}))
        if not columns:
            raise ValueError(f"`{name}` is empty; at least one row is needed.")
        if not set(self._columns) <= set(columns):
            needed = ", ".join(f"`{each}`" for each in self._columns)
            raise ValueError(f"`{name}` has the columns {sorted(columns)}; needed are {needed} and `images`.")
        dataset, report = prepare_rows(dataset, name, data_collator, args)
        if args.pack_questions is not None:
            dataset = pack_rows(dataset, args.pack_questions)
            report.packed_into = len(dataset)
        self.row_reports[name] = report
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        if args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            if isinstance(dataset, datasets.IterableDataset):
                raise ValueError(
                    f"`train_sampling_strategy` is {args.train_sampling_strategy!r}, but `{name}` is a stream, whose "
                    "rows come in their own order."
                )
            if args.length_column_name not in columns:
                lengths = [data_collator.row_length(row) for row in undecoded(dataset)]
                dataset = dataset.add_column(args.length_column_name, lengths)
        if "images" not in columns and "image" not in columns:  # TRL knows by this column that rows may hold images
            dataset = dataset.map(lambda row: {"images": []})
        return dataset

    def _set_signature_columns_if_needed(self):
        self._signature_columns = [*self._columns, "image", "images", "id", self.args.length_column_name]

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        """As in `Trainer`; rows that are given here are checked, as those given to the trainer were."""
        if eval_dataset is not None and not isinstance(eval_dataset, (dict, str)):  # of a dict, each comes by itself
            eval_dataset = self._prepare_rows(eval_dataset, "eval_dataset")
        return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset, *args, **kwargs):
        """As in `Trainer`, of rows that are checked; it returns metrics and no predictions."""
        return super().predict(self._prepare_rows(test_dataset, "test_dataset"), *args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """As in `Trainer`; all that is measured is named after the data set. TRL has one name for those of all."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        found = self._metrics["eval"]
        output.metrics.update({f"{metric_key_prefix}_{name}": sum(each) / len(each) for name, each in found.items()})
        found.clear()
        return output

    # How a run begins, goes on and ends

    def train(self, *args, **kwargs):
        """As in `Trainer`, but the special tokens of the model's configurations stay what they are.

        Transformers would put the tokenizer's end token among, and before, those that end an answer. Without a
        tokenizer it does not; `_inner_training_loop` comes next.
        """
        processing_class, self.processing_class = self.processing_class, None
        self._with_processor = lambda: setattr(self, "processing_class", processing_class)
        try:
            return super().train(*args, **kwargs)
        finally:
            self.processing_class = processing_class

    def _inner_training_loop(self, *args, **kwargs):
        self._with_processor()
        return super()._inner_training_loop(*args, **kwargs)

    def _init_training_state(self, max_steps, steps_per_epoch, num_epochs, resume_from_checkpoint, trial):
        epoch, batches = super()._init_training_state(
            max_steps, steps_per_epoch, num_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None and isinstance(self.train_dataset, datasets.IterableDataset):
            # Of a stream, Transformers takes `max_steps` for an epoch and counts epochs in it: see `state.epoch`.
            state = TrainerState.load_from_json(Path(resume_from_checkpoint, TRAINER_STATE_NAME))
            epoch, part = divmod(state.epoch, 1)
            epoch, part = (int(epoch), part) if part else (int(epoch) - 1, 1)
            batches = round(part * state.max_steps) * self.args.gradient_accumulation_steps
            batches *= not self.args.ignore_data_skip
        return epoch, batches

    def _run_epoch(self, *args, **kwargs):
        # Resumed from its last checkpoint, Transformers' trainer takes a step too many if that is not an epoch's end.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _save(self, output_dir=None, state_dict=None):
        weights = self.model.named_parameters() if state_dict is None else state_dict.items()
        if self.args.should_save:
            for name, weight in weights:
                if not bool(torch.isfinite(weight).all()):
                    raise ValueError(
                        f"After step {self.state.global_step}, {name} holds values that are not finite; nothing is "
                        "saved. Try a lower learning rate."
                    )
        super()._save(output_dir, state_dict)

    # Noise and loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in `Trainer`; each batch gets its place in the whole batch of this optimizer step, and its size."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:  # the end of a stream
            return batches, num_items_in_batch
        counts = [
            # A row of candidates is several of the batch; batches of another collator may have no ids.
            (
                len(each.get("row_ids", each["labels"])),
                int(each["answer_ids"].max()) + 1,
                int((each["labels"] != IGNORE_INDEX).sum()),
            )
            for each in batches
        ]
        everyone = self.accelerator.gather(torch.tensor([counts], device=device))  # (processes, batches, 3)
        num_rows, num_answers, num_tokens = everyone.sum(dim=(0, 1)).tolist()
        rows = everyone[..., 0].T.flatten()  # batch after batch, process after process
        first = (rows.cumsum(0) - rows).view(len(batches), -1)[:, self.accelerator.process_index].tolist()
        for batch, first_row in zip(batches, first):
            batch["whole"] = (first_row, num_rows, num_answers, num_tokens)
        # A stream may end within a step, which Transformers takes only with the last of its batches.
        nothing = batches[-1] | {"labels": torch.full_like(batches[-1]["labels"], IGNORE_INDEX)}
        return batches + [nothing] * (num_batches - len(batches)), num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError("`return_outputs` is True, but the full logits are never computed; only False is allowed.")
        loss = self._loss(model, inputs)
        self._stop_if_not_finite(loss, inputs)
        return loss

    def _loss(self, model, inputs):
        """The loss of a batch, of which the whole batch's, over processes and accumulation steps, is the mean."""
        args, batch = self.args, {name: value for name, value in inputs.items() if name not in ("row_ids", "whole")}
        loss_of = partial(masked_diffusion_loss, model, batch, mask_token_id=self._base_model.config.mask_token_id)
        if "whole" in inputs:
            first_row, num_rows, num_answers, num_tokens = inputs["whole"]
            noise = partial(self.noise, step=self.state.global_step, first_row=first_row, num_rows=num_rows)
            results = [loss_of(noise, args, num_answers=num_answers, num_tokens=num_tokens)]
            scale = self.accelerator.num_processes  # processes average their gradients; the sum is wanted
            self._count_tokens(inputs, 1 + args.complementary_masking)
        else:  # an evaluation, of each answer with the same times and masks whenever it comes
            plain = LossArguments(args.loss_weighting, args.max_loss_weight, args.loss_normalization)
            noises = [partial(self.noise.fixed, number=each, of=args.eval_time_steps)
                      for each in range(args.eval_time_steps)]  # fmt: skip
            results, scale = [loss_of(noise, plain) for noise in noises], 1 / len(noises)
        for _, found in results:
            right, asked = (int(self.accelerator.gather(each).sum())
                            for each in (found.sum(), torch.ones_like(found).sum()))  # fmt: skip
            if asked:
                self._metrics["train" if self.model.training else "eval"]["mean_token_accuracy"].append(right / asked)
        return scale * sum(loss for loss, _ in results)

    def _count_tokens(self, inputs, times):
        """Add those of a batch, each of whose rows came so many times."""
        # In the state, so that a resumed run goes on counting.
        seen = self.accelerator.gather((inputs["attention_mask"].sum(dim=1) * times).sum()).sum()
        self.state.num_input_tokens_seen += int(seen)
        self._metrics["train"]["num_tokens"] = [self.state.num_input_tokens_seen]

    def _track_num_input_tokens(self, inputs):
        """`compute_loss` counts them."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """`eval_loss` and nothing else: an answer's quality shows in answers, not in logits (see the answer table)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def _stop_if_not_finite(self, loss, inputs):
        if bool(torch.isfinite(loss)):
            return
        file = Path(self.args.output_dir) / f"not_finite{self.accelerator.process_index or ''}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        texts = self.processing_class.tokenizer.batch_decode(inputs["input_ids"])
        texts = [text.replace(self.processing_class.image_token, "") for text in texts]
        ids = inputs.get("row_ids")
        record = {"step": self.state.global_step, "loss": str(loss.item()), "row_ids": ids, "texts": texts}
        file.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        raise ValueError(
            f"The loss is {loss.item()} at step {self.state.global_step}; the batch's ids are in {file}. Try a lower "
            "learning rate, bf16 instead of fp16, or look at these rows."
        )

    # What is trained

    def create_optimizer(self, *args, **kwargs):
        """As in `Trainer`, with a learning rate of its own for each part that has one."""
        optimizer = super().create_optimizer(*args, **kwargs)
        rates = {part: getattr(self.args, f"{part}_learning_rate") for part in _PARTS}
        if not any(rates.values()) or any("part" in group for group in optimizer.param_groups):
            return optimizer
        part = {id(weight): part_of(name) for name, weight in self.model.named_parameters()}
        groups, optimizer.param_groups = optimizer.param_groups, []
        for group in groups:
            for name in _PARTS:
                weights = [weight for weight in group["params"] if part[id(weight)] == name]
                if weights:
                    rate = rates[name] or group["lr"]
                    optimizer.add_param_group({**group, "params": weights, "lr": rate, "part": name})
        return optimizer

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """The card of this run so far, with its loss curve, in `output_dir`.

        Args:
            model_name (`str`, *optional*): title; by default the name of `output_dir`.
            dataset_name (`str` or `list[str]`, *optional*): data on the Hub, besides those of `data_report.json`.
            tags (`str` or `list[str]`, *optional*): further tags.
        """
        if not self.is_world_process_zero():
            return
        args, folder = self.args, Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        # What differs from the defaults of the dataclass. A second object of it would reset Accelerate's state.
        changed = {each.name for each in fields(args) if getattr(args, each.name) not in (each.default, None, [], {})}
        model, base, report = self.accelerator.unwrap_model(self.model), self._base_model, folder / "data_report.json"
        adapter = model.peft_config[model.active_adapters[0]].to_dict() if isinstance(model, PeftModel) else None
        device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else platform.machine()
        precision = f"{self.accelerator.mixed_precision}, mixed"
        if self.accelerator.mixed_precision == "no":
            precision = str(base.dtype).removeprefix("torch.")
        software, name = software_versions(), base.config._name_or_path
        training = gather_training_facts(
            recipe={name: value for name, value in json.loads(args.to_json_string()).items() if name in changed},
            log_history=self.state.log_history,
            hardware=f"{self.accelerator.num_processes} × {device}, {precision}",
            trained_parts=self.trained_parts,
            data_reports=json.loads(report.read_text(encoding="utf-8")) if report.is_file() else (),
            adapter=adapter,
            software=software,
            picture=folder / "loss_curve.png",
        )
        named = [dataset_name] if isinstance(dataset_name, str) else dataset_name or ()
        facts = ModelFacts(
            name=model_name or folder.name,
            kind="trained",
            description=("Adapters for a LLaDA-MedV" if adapter else "A fine-tuned LLaDA-MedV") + self._objective(),
            components=[component_of_model(name), *map(find_component, named)],
            version=software.get("lladamedv"),
            base_models=[name] if is_hub_id(name) else [],
            relation="adapter" if adapter else "finetune",
            datasets=list(filter(is_hub_id, named)),
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or ())],
            training=training,
        )
        save_model_card(facts, folder)

    def _objective(self) -> str:
        """What the card says of the objective, besides the arguments."""
        return ""

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ):
        """Push model or adapters, processor and card as one checked commit (see [`~hub_cards.push.push_folder`]).

        Args:
            commit_message: of the commit.
            blocking: only `True` is allowed.
            token, revision: by default `hub_token` and `hub_revision`.
            private (`bool`, *optional*): by default `hub_private_repo`, and that is `True`.
            kwargs: those of [`~MaskedDiffusionSFTTrainer.create_model_card`], and `base_model`, the Hub id of the model
                that adapters belong to, if they were trained on a local folder.

        Returns:
            A [`~hub_cards.push.PushPlan`] in the main process.

        Raises:
            ValueError: in one line, if something about the folder or the repository is not what it should be.
        """
        if not blocking:
            raise ValueError(f"`blocking` is {blocking!r}; allowed is True.")
        args, base_model = self.args, kwargs.pop("base_model", None)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        repo = self.hub_model_id or args.hub_model_id or Path(args.output_dir).absolute().name
        self.create_model_card(kwargs.pop("model_name", repo.rpartition("/")[2]), **kwargs)
        return push_folder(
            args.output_dir, repo, private=(args.hub_private_repo if private is None else private) is not False,
            base_model=base_model, commit_message=commit_message,
            revision=revision or args.hub_revision, token=token or args.hub_token, report=logger.info,
        )  # fmt: skip

    def end(self):
        """As `Trainer.end`: the last line of a script that several processes run.

        PyTorch's wrapper of the model is freed first, because it holds the process group. If the group were freed last,
        by the interpreter's own end, gloo's threads could wait for the interpreter, and it for them.
        """
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        super().end()


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, by its name, also within adapters."""
    name = name.removeprefix("base_model.model.").removeprefix("module.")
    for part, beginnings in _PARTS.items():
        if name.startswith(beginnings):
            return part
    raise ValueError(f"{name!r} is no parameter of a LLaDA-MedV model.")


def arguments_as(config_class: type[MaskedDiffusionSFTConfig], args, model) -> MaskedDiffusionSFTConfig:
    """The arguments as ours; by default those for `output_dir=NAME-SFT`, as in TRL."""
    if isinstance(args, config_class) and args._suffix == config_class._suffix:
        return args
    if args is not None:
        return config_class.from_arguments(args)
    is_name = isinstance(model, (str, PathLike))
    name = model if is_name else getattr(getattr(model, "config", None), "_name_or_path", "")
    return config_class(
        f"{Path(name).name or 'LLaDA-MedV'}-{config_class._suffix}", use_cpu=not torch.accelerator.is_available()
    )


def _load(name: str | PathLike, args: MaskedDiffusionSFTConfig, quantization_config):
    options = {"dtype": torch.float32, **(args.model_init_kwargs or {})}
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    args.model_init_kwargs = None  # TRL would say that they are ignored
    return LLaDAMedVForConditionalGeneration.from_pretrained(name, **options)


def _processor(processor, model, args: MaskedDiffusionSFTConfig) -> LLaDAMedVProcessor:
    """The processor, by default the one beside the model, with the template that the arguments name."""
    if processor is None:
        processor = LLaDAMedVProcessor.from_pretrained(model.config._name_or_path)
    elif type(processor).__name__ != LLaDAMedVProcessor.__name__:  # remote code has a class of its own
        raise TypeError(
            f"`processing_class` is a {type(processor).__name__}; needed is the processor with tokenizer and image "
            "processor, which `AutoProcessor.from_pretrained` loads."
        )
    if (path := args.chat_template_path) is not None:  # TRL reads it, too, but only after the rows were looked at
        if not path.endswith((".jinja", ".j2")) or not Path(path).is_file():
            raise ValueError(
                f"`chat_template_path` is {path!r}; allowed is a Jinja file, .jinja or .j2. The template of another "
                "tokenizer would need tokens that the model does not have."
            )
        processor.chat_template = Path(path).read_text(encoding="utf-8")
    return processor


def _freeze(model, trainable: str, peft_config) -> None:
    """Freeze what is not trained.

    Raises:
        ValueError: for adapters that cannot be trained or would not be saved, and for a part that is frozen already.
    """
    load = "`PeftModel.from_pretrained(model, folder, is_trainable=True)`"
    adapted = isinstance(model, PeftModel)
    if not adapted and getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"`model` holds adapters of its own; to train them, load them into the plain model by {load}.")
    if getattr(peft_config, "is_prompt_learning", False):
        model.get_submodule("embeddings.word_embeddings")  # says why not; PEFT asks for it when all rows are checked
    if (adapted or peft_config is not None) and trainable != MaskedDiffusionSFTConfig.trainable:
        raise ValueError(
            f"`trainable` is {trainable!r}, but adapters are trained instead of the model's own weights; to train "
            "parts in full beside them, name these in `modules_to_save` of the adapters' configuration."
        )
    if adapted:
        _check_adapters(model, load)
    elif peft_config is None:
        parts = {name: part_of(name) for name, _ in model.named_parameters()}
        for name, weight in model.named_parameters():
            weight.requires_grad_(weight.requires_grad and parts[name] in TRAINABLE[trainable])
        trained = {parts[name] for name, weight in model.named_parameters() if weight.requires_grad}
        if frozen := {*parts.values()} & {*TRAINABLE[trainable]} - trained:
            raise ValueError(
                f"`trainable` is {trainable!r}, but `model` comes with a {max(frozen)} that is frozen; call "
                "`model.requires_grad_(True)` first, or choose another `trainable`."
            )


def _check_adapters(model: PeftModel, load: str) -> None:
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if not weights:
        raise ValueError(f"`model` has adapters, all of them frozen; load them by {load}.")
    names = set(model.peft_config)
    saved = {weight.data_ptr() for name in names for weight in get_peft_model_state_dict(
        model, adapter_name=name, save_embedding_layers=False).values()}  # fmt: skip
    for name, weight in weights.items():
        if names.isdisjoint(name.split(".")) and weight.data_ptr() not in saved:
            raise ValueError(
                f"{name} is trainable, but not saved with the adapters; freeze it, or name its module in "
                "`modules_to_save` of their configuration."
            )


__all__ = ["MaskedDiffusionSFTTrainer"]
