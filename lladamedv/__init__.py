"""lladamedv: the LLaDA-MedV masked-diffusion vision-language model for biomedical images.

Importing this package registers the classes with Transformers' Auto classes. The classes themselves are imported when
they are asked for, so that the command line can refuse wrong arguments before PyTorch is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from . import registration


if TYPE_CHECKING:
    from lladamedv.modeling_lladamedv import (
        LLaDAMedVConfig,
        LLaDAMedVForConditionalGeneration,
        LLaDAMedVGenerationConfig,
        LLaDAMedVGenerationMixin,
        LLaDAMedVGenerationOutput,
        LLaDAMedVModel,
        LLaDAMedVPreTrainedModel,
        fit_confidence_temperature,
    )
    from lladamedv.processing import LLaDAMedVImageProcessor, LLaDAMedVProcessor

__version__ = "0.2.0"
__all__ = [
    "LLaDAMedVConfig",
    "LLaDAMedVForConditionalGeneration",
    "LLaDAMedVGenerationConfig",
    "LLaDAMedVGenerationMixin",
    "LLaDAMedVGenerationOutput",
    "LLaDAMedVImageProcessor",
    "LLaDAMedVModel",
    "LLaDAMedVPreTrainedModel",
    "LLaDAMedVProcessor",
    "fit_confidence_temperature",
]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    folder = "processing" if name.endswith("Processor") else "modeling_lladamedv"
    return getattr(import_module(f".{folder}", __name__), name)


registration.install()
