"""The model: configuration, network, denoising loop, and conversion of released checkpoints.

Classes are imported when they are asked for: options of `generate` can be checked without PyTorch.
"""

from importlib import import_module


_MODULES = {
    "fit_confidence_temperature": "confidence_lladamedv",
    "LLaDAMedVConfig": "configuration_lladamedv",
    "LLaDAMedVGenerationConfig": "generation_config_lladamedv",
    "LLaDAMedVGenerationMixin": "generation_lladamedv",
    "LLaDAMedVGenerationOutput": "generation_lladamedv",
    "LLaDAMedVForConditionalGeneration": "modeling_lladamedv",
    "LLaDAMedVModel": "modeling_lladamedv",
    "LLaDAMedVPreTrainedModel": "modeling_lladamedv",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


__all__ = [
    "LLaDAMedVConfig",
    "LLaDAMedVForConditionalGeneration",
    "LLaDAMedVGenerationConfig",
    "LLaDAMedVGenerationMixin",
    "LLaDAMedVGenerationOutput",
    "LLaDAMedVModel",
    "LLaDAMedVPreTrainedModel",
    "fit_confidence_temperature",
]
