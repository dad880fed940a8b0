"""What trainers that learn from rewards share: the functions, the columns these take, and when there is a reference."""

from __future__ import annotations

from .masked_diffusion_sft_trainer import arguments_as
from .reference_trainer import ReferenceTrainer
from .rewards import Rewards


class RewardTrainer(ReferenceTrainer):
    """Base of trainers with reward functions; not to be used by itself.

    Their arguments have `reward_funcs`, `reward_weights` and `beta`, their batches `columns`, all columns of the rows
    by name, and they what [`ReferenceTrainer`] says.

    Args:
        model: as for [`MaskedDiffusionSFTTrainer`].
        reward_funcs: one or more functions in TRL's form or names in `REWARDS`, see [`Rewards`]; by default those that
            `args` name.
        ref_model: as for [`MaskedDiffusionDPOTrainer`]; none is kept, and none allowed, if `beta` is 0.
        options: the other arguments of [`MaskedDiffusionSFTTrainer`].

    Raises:
        TypeError, ValueError: as [`MaskedDiffusionDPOTrainer`] and [`Rewards`]; for a column that a reward function
            needs and a data set lacks.
    """

    _columns = ("prompt",)

    def __init__(
        self, model, reward_funcs=None, args=None, train_dataset=None, *, ref_model=None, data_collator=None, **options
    ):  # fmt: skip
        args = arguments_as(self._config_class, args, model)
        self.rewards = Rewards(reward_funcs or args.reward_funcs or [], args.reward_weights)
        if ref_model is not None and not args.beta:
            raise ValueError("`ref_model` is given, but `beta` is 0, with which nothing is compared with it.")
        super().__init__(model, ref_model, args, data_collator, train_dataset, **options)

    def _reference(self, ref_model):
        return super()._reference(ref_model) if self.args.beta else None

    def _prepare_rows(self, dataset, name):
        columns = dataset.column_names or list(next(iter(dataset), {}))
        if set(self._columns) <= set(columns):
            self._check_columns(columns, name)
        return super()._prepare_rows(dataset, name)

    def _check_columns(self, columns, name):
        self.rewards.check_columns(columns, name)

    def _remove_unused_columns(self, dataset, description=None):
        return dataset  # rewards may need any

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        return data_collator

    def _rewards_of(self, columns: dict[str, list], texts: list[str], ids: list[list[int]]):
        """What each reward function says of each text, an answer to the prompt of the same place in `columns`."""
        columns = dict(columns)
        prompts = columns.pop("prompt")
        completions = [text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
                       for prompt, text in zip(prompts, texts)]  # fmt: skip
        return self.rewards(prompts, completions, columns, completion_ids=ids, trainer_state=self.state)

    def _named_rewards(self) -> str:
        """The rewards and their weights, for the card."""
        weights = self.rewards.weights.tolist()
        return " + ".join(f"{weight:g} × {name}" for name, weight in zip(self.rewards.names, weights))
