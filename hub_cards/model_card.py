"""The model card: what a reader must know about weights before using them, for all ways in which they come about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils.sha import sha_fileobj

from .evaluation_results import EvaluationResults, eval_result_files
from .licences import Component, strictest_licence
from .privacy import is_hub_id, scrub
from .training_facts import TrainingFacts


KINDS = ("converted", "initialized", "trained", "demo")
_TRAINED_KINDS = ("trained", "demo")
RELATIONS = ("finetune", "adapter", "quantized", "merge")
PAPERS = {
    "2508.01617": "LLaDA-MedV: Exploring Large Language Diffusion Models for Biomedical Image Understanding",
    "2306.00890": "LLaVA-Med: Training a Large Language-and-Vision Assistant for Biomedicine in One Day",
    "2505.16933": "LLaDA-V: Large Language Diffusion Models with Visual Instruction Tuning",
    "2502.09992": "Large Language Diffusion Models",
}
CARD_FILE = "README.md"
_TEMPLATE = files(__package__) / "templates" / "model_card.md"


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
        relation: to these, one of `RELATIONS`.
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
        if self.kind not in KINDS:
            raise ValueError(f"`kind` is {self.kind!r}; allowed are {KINDS}.")
        if self.relation not in (None, *RELATIONS):
            raise ValueError(f"`relation` is {self.relation!r}; allowed are {RELATIONS} and None.")
        if (self.kind in _TRAINED_KINDS) != (self.training is not None):
            given = "not given" if self.training is None else "given"
            raise ValueError(f"`training` is {given} for the kind {self.kind!r}; it belongs to {_TRAINED_KINDS} alone.")
        for field_name in ("base_models", "datasets"):
            if wrong := [name for name in getattr(self, field_name) if not is_hub_id(name)]:
                raise ValueError(
                    f"`{field_name}` holds {', '.join(map(repr, wrong))}; allowed are Hub ids, OWNER/NAME."
                )

    @property
    def is_adapter(self) -> bool:
        return self.training is not None and self.training.is_adapter

    @property
    def all_components(self) -> list[Component]:
        """Those of the model and those of its training data, each once."""
        data = []
        if self.training is not None:  # of a run that did not say what it read nobody knows the licence
            data = [source.component for source in self.training.data] or [Component("the training data", None)]
        return list(dict.fromkeys((*self.components, *data)))

    @property
    def papers(self) -> dict[str, str]:
        """Titles by arXiv id: all for medical models, those of their part for the others."""
        ids = list(PAPERS) if self.medical else list(PAPERS)[-1:] if self.text_only else list(PAPERS)[-2:]
        return {paper: PAPERS[paper] for paper in ids}


def build_model_card(facts: ModelFacts) -> ModelCard:
    """The card, with the front matter that the Hub reads.

    The licence is the strictest one of all components. If one of them is unknown, the front matter states none, and the
    text says what is missing. Paths and tokens that facts may hold are removed.
    """
    components = facts.all_components
    unknown = [each.title for each in components if each.licence is None]
    known = [each for each in components if each.licence is not None]
    licence = strictest_licence(known) if known else None
    settled = licence is not None and not unknown
    tags = ["lladamedv", "masked-diffusion", *(["medical", "research-only", "not-a-medical-device"] * facts.medical)]
    datasets = list(facts.datasets)
    if facts.training is not None:
        datasets += [each.hub_id for each in facts.training.data if each.hub_id]
    name = scrub(facts.name)
    data = ModelCardData(
        language="en",
        **(licence.metadata if settled else {}),
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag="text-generation" if facts.text_only else "image-text-to-text",
        base_model=list(facts.base_models) or None,
        base_model_relation=facts.relation if facts.base_models else None,
        datasets=list(dict.fromkeys(datasets)) or None,
        tags=[*tags, *(["lora"] * facts.is_adapter), *facts.tags],
        model_name=name,
        eval_results=[each for result in facts.results for each in result.to_eval_results()] or None,
    )
    if data.eval_results is None:
        data.pop("model_name")  # it is the name in `model-index` and nothing else
    card = ModelCard.from_template(
        data, template_str=_TEMPLATE.read_text(encoding="utf-8"), facts=facts, name=name, components=components,
        unknown=unknown, licence=licence,
    )  # fmt: skip
    card.text = scrub(card.text).rstrip() + "\n"
    return card


def save_model_card(facts: ModelFacts, folder: str | Path, eval_results: bool = False) -> ModelCard:
    """Write the card into a model's folder.

    Args:
        facts: of the model.
        folder: to write `README.md` to.
        eval_results: also write the files of [`eval_result_files`].
    """
    card = build_model_card(facts)
    card.save(Path(folder) / CARD_FILE)
    for name, text in eval_result_files(facts.results).items() if eval_results else ():
        file = Path(folder) / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return card


def hash_files(folder: str | Path, pattern: str = "*.safetensors") -> dict[str, str]:
    """SHA-256 of the files of a folder, by their names."""
    hashes = {}
    for path in sorted(Path(folder).glob(pattern)):
        with open(path, "rb") as file:
            hashes[path.name] = sha_fileobj(file).hex()
    return hashes


__all__ = ["KINDS", "PAPERS", "RELATIONS", "ModelFacts", "build_model_card", "hash_files", "save_model_card"]
