"""Registers our classes with Transformers' Auto classes as soon as these are imported, and not before.

The Auto classes take seconds to import, with PyTorch, and Transformers has no lazy registration for classes of others.
So its modules, and those that lead to ours, are watched while they are imported, and the classes are registered when
the outermost one that imported the Auto classes is done. Other parts of Transformers need no PyTorch: the command line
checks options with them.
"""

import sys
from importlib.abc import MetaPathFinder


_AUTO = "transformers.models.auto"
_WATCHED = ("transformers.", "lladamedv.modeling_lladamedv.", "lladamedv.processing.")


def register() -> None:
    """Register the classes, once."""
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )

    from lladamedv.modeling_lladamedv import LLaDAMedVConfig, LLaDAMedVForConditionalGeneration, LLaDAMedVModel
    from lladamedv.processing import LLaDAMedVImageProcessor, LLaDAMedVProcessor

    AutoConfig.register("lladamedv", LLaDAMedVConfig)
    AutoModel.register(LLaDAMedVConfig, LLaDAMedVModel)
    AutoModelForCausalLM.register(LLaDAMedVConfig, LLaDAMedVForConditionalGeneration)
    AutoModelForImageTextToText.register(LLaDAMedVConfig, LLaDAMedVForConditionalGeneration)
    AutoModelForMultimodalLM.register(LLaDAMedVConfig, LLaDAMedVForConditionalGeneration)
    AutoImageProcessor.register(LLaDAMedVConfig, image_processor_classes={"pil": LLaDAMedVImageProcessor})
    AutoProcessor.register(LLaDAMedVConfig, LLaDAMedVProcessor)


class _WatchOfAutoClasses(MetaPathFinder):
    """Finds nothing itself: it has what others find counted while it is executed."""

    def __init__(self):
        self.executing = 0

    def find_spec(self, name, path=None, target=None):
        if not name.startswith(_WATCHED):
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = self._counted(spec.loader.exec_module)
        return spec

    def _counted(self, execute):
        def exec_module(module):
            self.executing += 1
            try:
                execute(module)
            finally:
                self.executing -= 1
            if not self.executing and self in sys.meta_path and _AUTO in sys.modules:
                sys.meta_path.remove(self)
                register()

        return exec_module


def install() -> None:
    """Register now if the Auto classes are imported already, or else when they are."""
    if _AUTO in sys.modules:
        register()
    elif not any(type(finder).__qualname__ == _WatchOfAutoClasses.__qualname__ for finder in sys.meta_path):
        # Two would ask each other without end, where the package is imported twice, as coverage.py does.
        sys.meta_path.insert(0, _WatchOfAutoClasses())


__all__ = ["install", "register"]
