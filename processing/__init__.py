"""Images and chat into model inputs, and the synthetic demo data.

The classes are imported when they are asked for: the command line reads pictures before it waits for torch.
"""

from importlib import import_module


_MODULES = {
    "LLaDAMedVImageProcessor": "image_processing_lladamedv",
    "LLaDAMedVProcessor": "processing_lladamedv",
}
__all__ = [*_MODULES]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
