"""Model and data set cards: what a reader must know before using weights or data, for all ways they come about."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from huggingface_hub import CardData, DatasetCard, DatasetCardData, ModelCard, ModelCardData, RepoCard

from lladamedv.processing.datasets import VQAReport

from .licences import CARD, Component, find_component, may_redistribute, strictest_licence
from .privacy import is_hub_id, is_on_hub, scrub
from .results import EvaluationResults, eval_result_files
from .training_facts import TrainingFacts


_KINDS = ("converted", "initialized", "trained", "demo")
_TRAINED_KINDS = ("trained", "demo")
_RELATIONS = ("finetune", "adapter", "quantized", "merge")
_PAPERS = {
    "2508.01617": "LLaDA-MedV: Exploring Large Language Diffusion Models for Biomedical Image Understanding",
    "2306.00890": "LLaVA-Med: Training a Large Language-and-Vision Assistant for Biomedicine in One Day",
    "2505.16933": "LLaDA-V: Large Language Diffusion Models with Visual Instruction Tuning",
    "2502.09992": "Large Language Diffusion Models",
}
_SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}


def _render(kind: type[RepoCard], template: str, data: CardData, **facts) -> RepoCard:
    """A card from a template of ours, without paths and tokens that the facts may hold."""
    text = (files(__package__) / "templates" / template).read_text(encoding="utf-8")
    card = kind.from_template(data, template_str=text, **facts)
    card.text = scrub(card.text).rstrip() + "\n"
    return card


# Models


@dataclass(frozen=True)
class ModelFacts:
    """What the card of a model states.

    Args:
        name: of the model, as its title.
        kind: how it came about: `"converted"` from a released checkpoint; `"initialized"`, put together and not yet
            trained; `"trained"` by a run, in full or as adapters; `"demo"`, the tiny model that comes with the package.
        description: what it is, in a sentence without its full stop.
        components: all that it is made of; they decide its licence.
        version: of the package that made it, if it is known.
        base_models: Hub ids of the models that it derives from; of adapters, the model that they belong to.
        relation: to these, `"finetune"`, `"adapter"`, `"quantized"` or `"merge"`.
        medical: whether it is meant for medical images: such models are for research only.
        text_only: whether it takes no images.
        generation: generation options that are saved as its defaults.
        chat_template: name of its default prompt.
        num_parameters: weights, counted one by one.
        dtype: of the weights.
        source: what it was made from, by its part ("checkpoint", "language model", …): Hub ids or names of folders.
        key_report: lines of a conversion's report on the source's keys.
        hashes: SHA-256 of files beside the card, by name, as [`hash_files`] returns them.
        datasets: Hub ids of data that it was trained on, besides those of `training`.
        tags: further ones, for the front matter.
        training: the run that made it, for `"trained"` and `"demo"`.
        results: of evaluations.

    Raises:
        ValueError: for a value that is not allowed.
    """

    name: str
    kind: str
    description: str
    components: Sequence[Component]
    version: str | None
    base_models: Sequence[str] = ()
    relation: str | None = None
    medical: bool = True
    text_only: bool = False
    generation: Mapping = field(default_factory=dict)
    chat_template: str | None = None
    num_parameters: int | None = None
    dtype: str | None = None
    source: Mapping[str, str] = field(default_factory=dict)
    key_report: Sequence[str] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)
    datasets: Sequence[str] = ()
    tags: Sequence[str] = ()
    training: TrainingFacts | None = None
    results: Sequence[EvaluationResults] = ()

    def __post_init__(self):
        for name, allowed in (("kind", _KINDS), ("relation", (*_RELATIONS, None))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; allowed are {', '.join(map(repr, allowed))}.")
        if (self.kind in _TRAINED_KINDS) != (self.training is not None):
            given = "not given" if self.training is None else "given"
            raise ValueError(f"`training` is {given} for the kind {self.kind!r}; it belongs to {_TRAINED_KINDS} alone.")
        for name in ("base_models", "datasets"):
            if wrong := [each for each in getattr(self, name) if not is_hub_id(each)]:
                raise ValueError(f"`{name}` holds {', '.join(map(repr, wrong))}; allowed are Hub ids, OWNER/NAME.")

    @property
    def is_adapter(self) -> bool:
        return self.training is not None and self.training.is_adapter

    @property
    def all_components(self) -> list[Component]:
        """Those of the model and those of its training data, each once."""
        data = []
        if self.training is not None:  # the licence of data that a run did not name is unknown
            data = [source.component for source in self.training.data] or [Component("the training data", None)]
        return list(dict.fromkeys((*self.components, *data)))

    @property
    def papers(self) -> dict[str, str]:
        """Titles by arXiv id: all for medical models, those of their part for the others."""
        count = len(_PAPERS) if self.medical else 1 if self.text_only else 2
        return dict([*_PAPERS.items()][-count:])


def build_model_card(facts: ModelFacts) -> ModelCard:
    """The card, with the front matter that the Hub reads.

    The licence is the strictest one of all components. If one of them is unknown, the front matter states none, and the
    text says what is missing. Paths and tokens that facts may hold are removed.
    """
    components = facts.all_components
    unknown = [each.title for each in components if each.licence is None]
    known = [each for each in components if each.licence is not None]
    licence = strictest_licence(known) if known else None
    medical = ("medical", "research-only", "not-a-medical-device") if facts.medical else ()
    read = [each.hub_id for each in facts.training.data if each.hub_id] if facts.training is not None else []
    name = scrub(facts.name)
    data = ModelCardData(
        language="en",
        **(licence.metadata if licence is not None and not unknown else {}),
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag="text-generation" if facts.text_only else "image-text-to-text",
        base_model=list(facts.base_models) or None,
        base_model_relation=facts.relation if facts.base_models else None,
        datasets=list(dict.fromkeys([*facts.datasets, *read])) or None,
        tags=["lladamedv", "masked-diffusion", *medical, *(["lora"] * facts.is_adapter), *facts.tags],
        model_name=name,
        eval_results=[each for result in facts.results for each in result.to_eval_results()] or None,
    )
    if data.eval_results is None:
        data.pop("model_name")  # it is the name in `model-index` and nothing else
    return _render(
        ModelCard, "model_card.md", data, facts=facts, name=name, components=components, unknown=unknown,
        licence=licence,
    )  # fmt: skip


def save_model_card(facts: ModelFacts, folder: str | Path, eval_results: bool = False) -> ModelCard:
    """Write the card into a model's folder.

    Args:
        facts: of the model.
        folder: to write `README.md` to.
        eval_results: also write the files of [`eval_result_files`].
    """
    card = build_model_card(facts)
    card.save(Path(folder) / CARD)
    for name, text in eval_result_files(facts.results).items() if eval_results else ():
        file = Path(folder) / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return card


def state_in_card(card: str, title: str, text: str) -> str:
    """A card with a section of this title and text instead of one that it may have; without one for an empty text."""
    card = re.sub(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", "", card, flags=re.MULTILINE | re.DOTALL)
    head, mark, tail = card.partition("\n## Provenance\n")
    return f"{head.rstrip()}\n\n## {title}\n\n{scrub(text)}\n{mark}{tail}" if text else card


def hash_files(folder: str | Path) -> dict[str, str]:
    """SHA-256 of the safetensors files of a folder, by their names."""
    hashes = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


# Data sets


def build_dataset_card(report: Mapping | VQAReport, name: str, version: str, has_images: bool = False) -> DatasetCard:
    """The card of a VQA benchmark, with the front matter that the Hub reads and the program that loads it.

    Args:
        report: what was loaded, also as a dictionary. A report of several splits names them as "train, test".
        name: of the data set, as its title.
        version: of the package that built it.
        has_images: whether pictures are published with the card.

    Raises:
        ValueError: if `has_images` and their licence does not allow it.
    """
    facts = dict(report) if isinstance(report, Mapping) else report.as_dict()
    known = facts["benchmark"]
    part, (allowed, reason) = find_component(known), may_redistribute(known)
    if has_images and not allowed:
        raise ValueError(f"`has_images` is True; allowed is False: {reason}.")
    on_hub, drawn, splits = is_on_hub(facts), facts["source"].startswith("phantoms:"), facts["split"].split(", ")
    origin = f"extended|{facts['source'].partition('@')[0]}" if on_hub else "extended"
    counts = {"questions": facts["rows"]} | {count: facts[count] for count in ("images", "open", "closed")}
    data = DatasetCardData(
        language="en",
        pretty_name=scrub(name),
        **({} if part.licence is None else part.licence.metadata),
        size_categories=next((size for limit, size in _SIZES.items() if facts["rows"] < limit), "1M<n<10M"),
        source_datasets=None if drawn else [origin],
        task_categories=["visual-question-answering"],
        tags=["medical", "research-only", "lladamedv"],
    )
    return _render(
        DatasetCard, "dataset_card.md", data, report=facts, name=scrub(name), version=version, component=part,
        counts=counts, has_images=has_images, allowed=allowed, reason=reason, on_hub=on_hub, drawn=drawn,
        source=facts["source"] if on_hub or drawn else "local data", splits=splits,
    )  # fmt: skip


__all__ = ["ModelFacts", "build_dataset_card", "build_model_card", "hash_files", "save_model_card", "state_in_card"]
