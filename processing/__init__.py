"""Images and chat into model inputs, and the synthetic demo data."""

from .image_processing_lladamedv import LLaDAMedVImageProcessor
from .processing_lladamedv import LLaDAMedVProcessor


__all__ = ["LLaDAMedVImageProcessor", "LLaDAMedVProcessor"]
