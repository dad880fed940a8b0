"""Rewards for LLaDA-MedV's candidates: the trainer for questions with known possible answers, which samples nothing."""

from __future__ import annotations

from functools import partial

import torch

from .data_collator import DataCollatorForMaskedDiffusionCandidates
from .expected_reward import candidate_bounds, candidate_loss
from .masked_diffusion_expected_reward_config import MaskedDiffusionExpectedRewardConfig
from .masked_diffusion_loss import IGNORE_INDEX
from .reward_trainer import RewardTrainer


_NOT_THE_MODELS = ("row_ids", "whole", "row_numbers", "ref_logps", "columns", "candidates")


class MaskedDiffusionExpectedRewardTrainer(RewardTrainer):
    """Trainer for rewards of known possible answers: all candidates of a prompt are scored, in one forward pass that
    encodes each image once, and the objectives of `expected_reward.py` are exact where candidates are short.

    Rewards are functions in TRL's form, which get every candidate as a completion. It logs `reward` and
    `rewards/NAME/mean`, means under the model's probabilities of the candidates; `reward/accuracies`, how often the
    likeliest candidate has the highest reward; `entropy` of these probabilities; `frac_reward_zero_std`, the share of
    prompts whose candidates have the same reward, from which nothing but nearness to the reference is learned;
    `logps/candidates`, the log of the sum of exp(score); and `kl`. All of it is about candidates, and not about what
    the model answers: see `log_answers`.

    Args:
        model: as for [`MaskedDiffusionSFTTrainer`].
        reward_funcs: one or more functions in TRL's form or names in `REWARDS`, see [`Rewards`]; by default those that
            `args` name. From a prompt with a candidate to which none applies nothing is learned.
        args ([`MaskedDiffusionExpectedRewardConfig`] or `TrainingArguments`, *optional*): the arguments.
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Rows with `prompt` (chat messages or a text), `images` (or `image`), `candidates` (a list of two or more
            texts), and the columns that reward functions take.
        ref_model: as for [`MaskedDiffusionDPOTrainer`]; none is kept, and none allowed, if `beta` is 0.
        options: the other arguments of [`MaskedDiffusionSFTTrainer`].

    Raises:
        TypeError, ValueError: as [`MaskedDiffusionDPOTrainer`] and [`Rewards`]; for a column that a reward function
            needs and a data set lacks.
    """

    _tag_names = ["trl", "masked-diffusion-expected-reward"]
    _name = "Masked-diffusion expected reward"
    _config_class = MaskedDiffusionExpectedRewardConfig
    _collator_class = DataCollatorForMaskedDiffusionCandidates
    _columns = ("prompt", "candidates")
    _fall = (
        "the candidates have together become less likely than under the reference, by %.2f nats in the mean. The loss "
        "compares them; the model may end up answering something else. Watch `log_answers`, or raise `mass_weight`."
    )
    _tolerated_fall = 0.7  # half as likely

    def _row_to_answer(self, row, images):
        """The row with the candidate that has the highest reward."""
        read = self.data_collator.conversations(row, images)
        columns = {name: [value] * len(read) for name, value in {**row, "images": images}.items()}
        rewards = self.rewards.total(self._rewards_of(columns, row["candidates"], [[]] * len(read)))
        return read[int(rewards.nan_to_num(-torch.inf).argmax())][0]

    # Scores

    def _bounds_of(self, inputs):
        """[`candidate_bounds`] of a model for this batch."""
        args, batch = self.args, {name: value for name, value in inputs.items() if name not in _NOT_THE_MODELS}
        keys = self._row_keys(inputs) or [("fixed",)] * len(inputs["row_ids"])
        return partial(
            candidate_bounds, batch=batch, prompts=inputs["candidates"][:, 0],
            seeds=[self.noise.seed_of(*key) for key in keys], mask_token_id=self._base_model.config.mask_token_id,
            max_exact_tokens=args.max_exact_tokens, num_draws=args.num_draws,
        )  # fmt: skip

    def _bounds_of_rows(self, bounds, inputs):
        rows = [[] for _ in inputs["row_ids"]]
        for (row, _), bound in zip(inputs["candidates"].tolist(), bounds.tolist()):
            rows[row].append(bound)
        return rows

    def _reward_candidates(self, inputs):
        """What each function says of each candidate `(candidates of the batch, functions)`."""
        places = inputs["candidates"].tolist()
        columns = {name: [values[row] for row, _ in places] for name, values in inputs["columns"].items()}
        texts = [candidates[place] for candidates, (_, place) in zip(columns["candidates"], places)]
        ids = [row[row != IGNORE_INDEX].tolist() for row in inputs["labels"]]
        return self._rewards_of(columns, texts, ids)

    # The loss

    def _loss(self, model, inputs):
        args, bounds_of, device = self.args, self._bounds_of(inputs), inputs["labels"].device
        row, place = inputs["candidates"].T
        shape = (len(inputs["row_ids"]), int(place.max()) + 1)

        def by_prompt(values, fill):  # (prompts, candidates)
            return values.new_full(shape, fill).index_put((row, place), values)

        found = self._reward_candidates(inputs).to(device)
        rewards = by_prompt(self.rewards.total(found), torch.nan)
        bounds = bounds_of(model)
        policy = by_prompt(bounds, -torch.inf)
        reference = self._reference_bounds(inputs, bounds_of) if args.beta else bounds.detach()
        reference = by_prompt(reference, -torch.inf)
        result = candidate_loss(
            policy, reference, rewards, args.loss_type, args.beta, args.temperature, args.mass_weight
        )
        lengths = (inputs["labels"] != IGNORE_INDEX).sum(dim=1)
        real = by_prompt(lengths, 0)[:, 0] > 0
        self._measure(result, policy.detach(), reference, rewards, [by_prompt(each, 0.0) for each in found.T], real)
        if "whole" not in inputs:
            return result.loss.mean()
        masks = torch.where(lengths <= args.max_exact_tokens, 2**lengths - 1, args.num_draws)
        self._count_tokens(inputs, masks)
        return (result.loss * real).sum() * self.accelerator.num_processes / inputs["whole"][1]

    @torch.no_grad()
    def _measure(self, result, policy, reference, rewards, functions, real):
        """Add this batch to what is logged; `real` prompts are counted."""
        learned, probability = real & ~(rewards.isnan() & (policy > -torch.inf)).any(dim=1), result.probability
        best = rewards.nan_to_num(-torch.inf).amax(dim=1, keepdim=True)
        worst = rewards.nan_to_num(torch.inf).amin(dim=1, keepdim=True)
        right = rewards.gather(1, probability.argmax(dim=1, keepdim=True)) == best
        logged = {
            "reward": (probability * rewards.nan_to_num(0.0)).sum(dim=1), "reward/accuracies": right[:, 0].float(),
            "frac_reward_zero_std": (best == worst)[:, 0].float(),
        }  # fmt: skip
        for name, values in zip(self.rewards.names, functions):
            logged[f"rewards/{name}/mean"] = (probability * values.nan_to_num(0.0)).sum(dim=1)
        together = policy.logsumexp(dim=1)
        logged |= {"entropy": -torch.special.xlogy(probability, probability).sum(dim=1), "logps/candidates": together}
        if self.args.beta:
            logged["kl"] = result.kl
        self._log_means(logged, together - reference.logsumexp(dim=1), learned)

    def _objective(self):
        name = self.args.loss_type.replace("_", " ")
        return f", tuned on rewards of candidates, {self._named_rewards()}, by {name} (beta {self.args.beta:g})"


__all__ = ["MaskedDiffusionExpectedRewardTrainer"]
