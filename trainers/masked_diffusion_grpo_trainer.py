"""Rewards for LLaDA-MedV's own answers: the trainer with TRL's GRPO columns, options and metrics."""

from __future__ import annotations

import json
import logging
import math
import statistics
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.utils import gather_object
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import repeat_iterable_dataset

from .data_collator import DataCollatorForMaskedDiffusionPrompts
from .masked_diffusion_grpo_config import MaskedDiffusionGRPOConfig
from .masked_diffusion_loss import IGNORE_INDEX, answer_log_probs
from .policy_gradient_loss import (
    POLICY_LOSSES,
    group_advantages,
    masked_prompt,
    policy_estimate,
    policy_gradient_loss,
    policy_masks,
)
from .reward_trainer import RewardTrainer
from .rollouts import OF_IMAGES, Group, batch_of_answers, gathered, sample_groups
from .rows import RepeatedSampler


_OF_THE_MODEL = ("input_ids", "attention_mask", "labels", *OF_IMAGES)
logger = logging.getLogger(__name__)


class MaskedDiffusionGRPOTrainer(RewardTrainer):
    """Trainer for rewards: the model answers each prompt several times, and answers that are better than their group
    become more likely (GRPO, arXiv 2402.03300), by one of the estimates of likelihood in `policy_gradient_loss.py`.

    It takes what TRL's `GRPOTrainer` takes for vision-language models, and logs what that logs: `reward`, `reward_std`,
    `rewards/NAME/mean` and `rewards/NAME/std`, `frac_reward_zero_std` (the share of groups without a difference, from
    which nothing is learned), `completions/mean_length`, `completions/clipped_ratio` (of answers without an end), `kl`
    and `clip_ratio/region_mean`. Rewards see the text of an answer as the evaluation sees it.

    The answers of a group are one call of `generate`, whose seed depends on the step and on the prompt's place in the
    whole batch: they are the same over any number of processes, and in a run that is resumed. An answer is what was
    committed, up to its end, which belongs to it; behind it the canvas stays masked, as when it was generated.

    Args:
        model: as for [`MaskedDiffusionSFTTrainer`].
        reward_funcs: one or more functions in TRL's form or names in `REWARDS`, see [`Rewards`]; by default those that
            `args` name.
        args ([`MaskedDiffusionGRPOConfig`], `GRPOConfig` or `TrainingArguments`, *optional*): the arguments.
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Rows with `prompt` (chat messages or a text), `images` (or `image`), and the columns that reward functions
            take.
        ref_model: as for [`MaskedDiffusionDPOTrainer`]; none is kept, and none allowed, if `beta` is 0.
        options: the other arguments of [`MaskedDiffusionSFTTrainer`].

    Raises:
        TypeError, ValueError: as [`MaskedDiffusionDPOTrainer`] and [`Rewards`]; for a column that a reward function
            needs and a data set lacks.
    """

    _tag_names = ["trl", "masked-diffusion-grpo"]
    _name = "Masked-diffusion GRPO"
    _config_class, _collator_class = MaskedDiffusionGRPOConfig, DataCollatorForMaskedDiffusionPrompts

    def __init__(self, model, reward_funcs=None, args=None, train_dataset=None, **options):
        self._answered = self._records = None  # the batches of answers that are learned from, and the last answers
        super().__init__(model, reward_funcs, args, train_dataset, **options)
        self._without_difference = False  # whether it was said that nothing is learned
        self._base_model.resolve_generation_config(**self._generation_options())

    def _collator_options(self):
        return super()._collator_options() | {"max_completion_length": self.args.max_completion_length}

    # Prompts

    def _check_columns(self, columns, name):
        super()._check_columns(columns, name)
        if self.args.log_answers and "answer" not in columns:
            raise ValueError(f"`log_answers` is {self.args.log_answers}, but `{name}` has no column `answer`.")

    def _get_dataloader(self, dataset, description, batch_size, sampler_fn=None, is_training=False, **options):
        """Batch sizes are of answers, batches of prompts."""
        args = self.args
        batch_size = max(1, batch_size // self._group_size(is_training))
        if is_training and args.num_iterations > 1:
            whole = batch_size * args.world_size * args.gradient_accumulation_steps
            if isinstance(dataset, torch.utils.data.IterableDataset):
                dataset = repeat_iterable_dataset(dataset, 1, whole, args.num_iterations)
            else:
                sampler = RepeatedSampler(len(dataset), whole, args.num_iterations, args.seed)
                sampler_fn = lambda _: sampler  # noqa: E731
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, **options)

    def _group_size(self, training: bool) -> int:
        return self.args.num_generations if training else self.args.num_generations_eval or self.args.num_generations

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in `Trainer`; prompts come back answered, and so for `num_iterations` steps."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and (self._answered is None or self.state.global_step % self.args.num_iterations == 0):
            self._answered = self._roll_out(batches)
        return batches and self._answered, num_items_in_batch

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Answers as in training, the same to the same prompt whenever it comes."""
        inputs = self._roll_out([self._prepare_inputs(inputs)])[0]
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    # Answers and rewards

    def _generation_options(self) -> dict:
        args = self.args
        own = {"max_new_tokens": args.max_completion_length, "temperature": args.temperature}
        return own | (args.generation_kwargs or {})

    @torch.no_grad()
    def _roll_out(self, batches: list[dict]) -> list[dict]:
        """Batches of prompts as batches of answers, with their advantages."""
        args, training, step = self.args, "whole" in batches[0], self.state.global_step
        size = self._group_size(training)
        # Of a stream that ends within a step, the last batch comes again, to learn nothing from it.
        own = [each for number, each in enumerate(batches)
               if not number or each["whole"] != batches[number - 1]["whole"]]  # fmt: skip
        unwrapped = nullcontext(self.accelerator.unwrap_model(self.model))
        if self.is_deepspeed_enabled:
            unwrapped = unwrap_model_for_generation(self.model_wrapped, self.accelerator)
        with unwrapped as model, gathered(model, self.accelerator):
            was_training = model.training
            model.eval()
            sampled = [self._sample(model, batch, size) for batch in own]
            model.train(was_training)
        records = [self._rewarded(batch, groups) for batch, groups in zip(own, sampled)]
        everyone = torch.tensor(gather_object([record["reward"] for each in records for record in each]))
        answered = []
        for batch, groups, each in zip(own, sampled, records):
            rewards = torch.tensor([record["reward"] for record in each]).view(-1, size)
            advantages = group_advantages(rewards, args.scale_rewards, everyone)
            for record, advantage in zip(each, advantages.flatten().tolist()):
                record["advantage"] = advantage
            pad = self.processing_class.tokenizer.pad_token_id
            answered.append(batch_of_answers(batch, groups, advantages, args.beta > 0, pad))
        self._measure(gather_object([record for each in records for record in each]), size, training)
        if not training:
            return answered
        tokens = sum(group.learned.sum() for groups in sampled for group in groups)
        tokens, answers = int(self.accelerator.gather(tokens).sum()), own[0]["whole"][1] * size
        for batch, each in zip(own, answered):
            each["places"] = [batch["whole"][0] * size + place for place in each["places"]]
            each["step"], each["divisor"] = step, tokens if POLICY_LOSSES[args.loss_type] == "tokens" else answers
            # What each later step compares with is asked before any step.
            each["old"] = [self._estimate_of(each, step + number)(self.model)
                           for number in range(1, args.num_iterations) if args.loss_type != "spg"]  # fmt: skip
        nothing = answered[-1] | {"labels": torch.full_like(answered[-1]["labels"], IGNORE_INDEX)}
        return answered + [nothing] * (len(batches) - len(own))

    def _sample(self, model, batch: dict, size: int) -> list[Group]:
        keys = [("fixed", ids[attended == 1].tolist())
                for ids, attended in zip(batch["input_ids"], batch["attention_mask"])]  # fmt: skip
        if "whole" in batch:
            keys = [(self.state.global_step, batch["whole"][0] + number) for number in range(len(keys))]
        seeds = [self.noise.seed_of("answers", *key) for key in keys]
        mask, options = self._base_model.config.mask_token_id, self._generation_options()
        groups = sample_groups(model, self.processing_class, batch, size, seeds, mask, options)
        if self.args.mask_truncated_completions:
            for group in groups:
                group.learned[torch.tensor(group.clipped)] = False
        return groups

    def _rewarded(self, batch: dict, groups: list[Group]) -> list[dict]:
        """What each answer earned, and what else is logged of it."""
        size = len(groups[0].texts)
        columns = {name: [value for value in values for _ in range(size)] for name, values in batch["columns"].items()}
        texts = [text for group in groups for text in group.texts]
        ids = [own[learned].tolist() for group in groups for own, learned in zip(group.canvas, group.learned)]
        found = self._rewards_of(columns, texts, ids)
        rows = [row for row in batch["row_ids"] for _ in range(size)]
        clipped = [each for group in groups for each in group.clipped]
        return [
            {"id": row, "completion": text, **dict(zip(self.rewards.names, rewards)), "reward": total,
             "tokens": len(own), "clipped": cut}
            for row, text, rewards, total, own, cut in zip(
                rows, texts, found.tolist(), self.rewards.total(found).tolist(), ids, clipped)
        ]  # fmt: skip

    def _measure(self, records: list[dict], size: int, training: bool) -> None:
        """Log what every process's answers earned."""
        metrics = self._metrics["train" if training else "eval"]
        for name, label in (("reward", "reward"), *((each, f"rewards/{each}") for each in self.rewards.names)):
            values = [record[name] for record in records if not math.isnan(record[name])]
            if values:
                metrics[label + "/mean" * (name != "reward")].append(statistics.fmean(values))
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                metrics[label + ("_std" if name == "reward" else "/std")].append(spread)
        same = [all(not record["advantage"] for record in records[start : start + size])
                for start in range(0, len(records), size)]  # fmt: skip
        metrics["frac_reward_zero_std"].append(statistics.fmean(same))
        metrics["completions/mean_length"].append(statistics.fmean(record["tokens"] for record in records))
        metrics["completions/clipped_ratio"].append(statistics.fmean(record["clipped"] for record in records))
        if training:
            self._records = records

    def log(self, logs, start_time=None):
        """As in `Trainer`; says once if no group had a difference since the last log, and keeps the last answers."""
        if self.model.training:
            shares = self._metrics["train"].get("frac_reward_zero_std")
            if shares and min(shares) == 1 and not self._without_difference:
                self._without_difference = True
                logger.warning(
                    "Step %d: in no group since the last log did rewards differ, so that nothing was learned. Answers "
                    "may be all right, all wrong or all the same: try other prompts, a higher `temperature` or more "
                    "`num_generations`.", self.state.global_step,
                )  # fmt: skip
            if self.args.log_completions and self._records and self.is_world_process_zero():
                with (Path(self.args.output_dir) / "completions.jsonl").open("a", encoding="utf-8") as file:
                    for record in self._records:
                        file.write(json.dumps({"step": self.state.global_step, **record}, ensure_ascii=False) + "\n")
            self._records = None
        super().log(logs, start_time)

    # The loss

    def _estimate_of(self, inputs, step: int):
        """[`policy_estimate`] of a model for this batch, with the noise of a step; in an evaluation, of the answers."""
        args, labels = self.args, inputs["labels"]
        batch = {name: inputs[name] for name in _OF_THE_MODEL if name in inputs}
        learned, config = labels != IGNORE_INDEX, self._base_model.config
        keys = [("fixed", row[row != IGNORE_INDEX].tolist()) for row in labels.cpu()]
        if "step" in inputs:
            keys = [(step, place) for place in inputs["places"]]
        masked = policy_masks(args.loss_type, self.noise, labels, keys, args.num_draws)
        if args.p_mask_prompt and args.loss_type == "diffu_grpo":
            ids = batch["input_ids"]
            kept = learned | (batch["attention_mask"] == 0) | (ids == config.image_token_id)
            hidden = masked_prompt(self.noise, ids.masked_fill(kept, IGNORE_INDEX), keys, args.p_mask_prompt)
            batch["input_ids"] = ids.masked_fill(hidden, config.mask_token_id)

        def estimate(model):
            log_probs, row_of = answer_log_probs(model, batch, masked, config.mask_token_id), inputs["row_of"]
            of_answers = log_probs[:, row_of], masked[:, row_of], learned[row_of], inputs["advantages"]
            return policy_estimate(args.loss_type, *of_answers, args.eubo_beta, args.mix_weight)

        return estimate

    def _loss(self, model, inputs):
        args, step = self.args, self.state.global_step
        learned = (inputs["labels"] != IGNORE_INDEX)[inputs["row_of"]]
        estimate_of, iteration = self._estimate_of(inputs, step), step - inputs.get("step", step)
        reference = self._reference_bounds(inputs, estimate_of) if args.beta else None
        result = policy_gradient_loss(
            args.loss_type, estimate_of(model), inputs["old"][iteration - 1] if iteration and inputs["old"] else None,
            reference, learned, inputs["advantages"], args.beta, args.epsilon, args.epsilon_high,
        )  # fmt: skip
        shown = {} if args.loss_type == "spg" else {"clip_ratio/region_mean": result.clipped}
        shown |= {"kl": result.kl} if args.beta else {}
        self._log_means({name: each.detach() for name, each in shown.items()},
                        torch.zeros_like(result.kl), learned.any(dim=1))  # fmt: skip
        if "step" not in inputs:
            return result.loss.mean()
        self._count_tokens(inputs, args.num_draws * (1 + (args.loss_type == "espo")))
        return result.loss.sum() * self.accelerator.num_processes / max(1, inputs["divisor"])

    def _objective(self):
        args = self.args
        return (
            f", tuned to earn the reward {self._named_rewards()} by the objective {args.loss_type} "
            f"(beta {args.beta:g}, {args.num_generations} answers a prompt at temperature {args.temperature:g})"
        )


__all__ = ["MaskedDiffusionGRPOTrainer"]
