"""lladamedv: the LLaDA-MedV masked-diffusion vision-language model for biomedical images.

Importing this package registers the classes with Transformers' Auto classes.
"""

import os
import sys
from pathlib import Path


# The top-level folders of the repository are subpackages of this distribution. An installation puts them here; in an
# uninstalled checkout (or when Python runs from the repository root) they are one level up.
if (Path(__file__).parent.parent / "pyproject.toml").exists():
    __path__.append(str(Path(__file__).parent.parent))

# Who asks the command line for help, or a shell what to complete, should not wait for torch.
_asks_for_help = Path(sys.argv[0]).stem == "lladamedv" and ({"--help", "--version"} & {*sys.argv} or len(sys.argv) == 1)
if not _asks_for_help and "_LLADAMEDV_COMPLETE" not in os.environ:
    import lladamedv.auto_classes  # noqa: F401 - registers them
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

__version__ = "0.1.0"
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
