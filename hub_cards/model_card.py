"""The card of a converted or newly initialised model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData


TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
_TITLES = {
    "2508.01617": "LLaDA-MedV: Exploring Large Language Diffusion Models for Biomedical Image Understanding",
    "2505.16933": "LLaDA-V: Large Language Diffusion Models with Visual Instruction Tuning",
    "2502.09992": "Large Language Diffusion Models",
}


@dataclass(frozen=True)
class ConversionFacts:
    """What the card of a converted or initialised model states.

    Args:
        name: of the model, as its title.
        description: what it is, in a sentence.
        source: the Hub ids or folder names that it was made from, by their part ("checkpoint", "language model", …).
        base_models: Hub ids of the models that it derives from.
        papers: arXiv ids.
        text_only: whether it takes no images.
        trained: whether all weights come from a checkpoint; `False` for a new model with an untrained projector.
        generation: generation options that are saved as its defaults.
        chat_template: name of its default prompt.
        key_report: lines of the report on the source's keys.
        num_parameters: weights, counted one by one.
        dtype: of the weights.
        version: of the package that wrote the folder.
    """

    name: str
    description: str
    source: dict[str, str]
    base_models: Sequence[str]
    papers: Sequence[str]
    text_only: bool
    trained: bool
    generation: dict
    chat_template: str
    key_report: Sequence[str]
    num_parameters: int
    dtype: str
    version: str


def build_model_card(facts: ConversionFacts) -> ModelCard:
    """The card, with the front matter that the Hub reads.

    The licence is the most restrictive one of the chain: LLaDA-8B is MIT and SigLIP2 Apache-2.0, but the weights of
    LLaDA-MedV are released for academic, non-commercial use only, and its training data are CC BY-NC 4.0.
    """
    medical = "2508.01617" in facts.papers
    data = ModelCardData(
        language="en",
        license="other" if medical else "mit" if facts.text_only else None,
        license_name="asu-non-commercial" if medical else None,
        license_link="https://github.com/LLM-VLM-GSL/LLaDA-MedV" if medical else None,
        library_name="transformers",
        pipeline_tag="text-generation" if facts.text_only else "image-text-to-text",
        base_model=list(facts.base_models),
        base_model_relation="finetune" if medical else None,
        tags=["lladamedv", "masked-diffusion", *(["medical", "research-only", "not-a-medical-device"] * medical)],
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        facts=facts,
        medical=medical,
        papers=[(_TITLES[paper], paper) for paper in facts.papers],
    )


__all__ = ["ConversionFacts", "build_model_card"]
