"""Fine-tuning: the trainer, its arguments and its data collator, imported when asked for (TRL takes seconds)."""

import importlib


_FILES = {
    "DataCollatorForMaskedDiffusion": "data_collator",
    "MaskedDiffusionSFTConfig": "masked_diffusion_sft_config",
    "MaskedDiffusionSFTTrainer": "masked_diffusion_sft_trainer",
}
__all__ = list(_FILES)


def __getattr__(name):
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_FILES[name]}", __name__), name)
