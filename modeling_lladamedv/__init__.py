"""The model: configuration, network, denoising loop, and conversion of released checkpoints."""

from .confidence_lladamedv import fit_confidence_temperature
from .configuration_lladamedv import LLaDAMedVConfig
from .generation_config_lladamedv import LLaDAMedVGenerationConfig
from .generation_lladamedv import LLaDAMedVGenerationMixin, LLaDAMedVGenerationOutput
from .modeling_lladamedv import LLaDAMedVForConditionalGeneration, LLaDAMedVModel, LLaDAMedVPreTrainedModel


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
