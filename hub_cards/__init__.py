"""Model and dataset cards: what a reader must know before using weights or data, with licences and measured numbers."""

from .cards import ModelFacts, build_dataset_card, build_model_card, hash_files, save_model_card
from .licences import (
    COMPONENTS,
    Component,
    Licence,
    component_of_model,
    find_component,
    may_redistribute,
    strictest_licence,
)
from .privacy import is_hub_id, scrub
from .results import EvaluationResults, eval_result_files
from .training_facts import TrainingFacts, gather_training_facts, software_versions


__all__ = [
    "COMPONENTS", "Component", "EvaluationResults", "Licence", "ModelFacts", "TrainingFacts", "build_dataset_card",
    "build_model_card", "component_of_model", "eval_result_files", "find_component", "gather_training_facts",
    "hash_files", "is_hub_id", "may_redistribute", "save_model_card", "scrub", "software_versions",
    "strictest_licence",
]  # fmt: skip
