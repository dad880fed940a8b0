"""lladamedv: the LLaDA-MedV masked-diffusion vision-language model for biomedical images.

Importing this package registers the classes with Transformers' Auto classes.
"""

import sys
from pathlib import Path


# The top-level folders of the repository are subpackages of this distribution. An installation puts them here; in an
# uninstalled checkout (or when Python runs from the repository root) they are one level up.
if (Path(__file__).parent.parent / "pyproject.toml").exists():
    __path__.append(str(Path(__file__).parent.parent))

# The command line checks its arguments before it waits for torch, and imports the rest in `cli_common.quiet`. While
# Python looks for the module of `python -m lladamedv.cli`, sys.argv begins with "-m".
_is_command_line = Path(sys.argv[0]).stem == "lladamedv" or (sys.argv[0] == "-m" and "lladamedv.cli" in sys.orig_argv)
if not _is_command_line:
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
