"""Model cards: what a reader must know about a checkpoint before using it."""

from .model_card import ConversionFacts, build_model_card


__all__ = ["ConversionFacts", "build_model_card"]
