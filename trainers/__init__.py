"""Fine-tuning: the trainers, their arguments and their data collators, imported when asked for (TRL takes seconds)."""

import importlib


_FILES = {
    "DataCollatorForMaskedDiffusion": "data_collator",
    "DataCollatorForMaskedDiffusionCandidates": "data_collator",
    "DataCollatorForMaskedDiffusionPreference": "data_collator",
    "DataCollatorForMaskedDiffusionPrompts": "data_collator",
    "MaskedDiffusionDPOConfig": "masked_diffusion_dpo_config",
    "MaskedDiffusionDPOTrainer": "masked_diffusion_dpo_trainer",
    "MaskedDiffusionExpectedRewardConfig": "masked_diffusion_expected_reward_config",
    "MaskedDiffusionExpectedRewardTrainer": "masked_diffusion_expected_reward_trainer",
    "MaskedDiffusionGRPOConfig": "masked_diffusion_grpo_config",
    "MaskedDiffusionGRPOTrainer": "masked_diffusion_grpo_trainer",
    "MaskedDiffusionSFTConfig": "masked_diffusion_sft_config",
    "MaskedDiffusionSFTTrainer": "masked_diffusion_sft_trainer",
}
__all__ = list(_FILES)


def __getattr__(name):
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_FILES[name]}", __name__), name)
