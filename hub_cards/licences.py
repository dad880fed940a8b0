"""The licences of what a model or a data set is made of, and which of them governs the whole.

A model is as free as the strictest of its components. What is not in the table here has no licence that this package
knows, and makes nothing more permissive: the card then states none and says for what one is missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from lladamedv.processing.datasets import SOURCES

from .privacy import is_hub_id


CARD = "README.md"  # the name of a card's file

@dataclass(frozen=True)
class Licence:
    """A licence as the Hub's metadata name it.

    Args:
        license: the Hub's identifier, or `"other"`.
        title: in words.
        conditions: of passing the work on, in half a sentence.
        license_name, license_link: for `"other"`.
    """

    license: str
    title: str
    conditions: str
    license_name: str | None = None
    license_link: str | None = None

    @property
    def metadata(self) -> dict[str, str | None]:
        """Fields of the card's front matter."""
        return {name: getattr(self, name) for name in ("license", "license_name", "license_link")}


_CC0 = Licence("cc0-1.0", "CC0 1.0", "no conditions")
_MIT = Licence("mit", "MIT", "keep the copyright notice and the licence")
_APACHE = Licence("apache-2.0", "Apache 2.0", "keep licence and notices, state changes")
_CC_BY = Licence("cc-by-4.0", "CC BY 4.0", "name the authors and the licence, state changes")
_RESEARCH = Licence(
    "other",
    "CC BY-NC 4.0, for research only",
    "no commercial and no clinical use; name the authors and the licence, state changes; the terms of GPT-4's provider "
    "apply to what it wrote",
    "cc-by-nc-4.0-research-only",
    "https://creativecommons.org/licenses/by-nc/4.0/",
)
_ASU = Licence(
    "other",
    "ASU non-commercial",
    "academic, non-commercial use only, revocable; to pass it on, add the licence, keep its notices and add a notice "
    "of changes",
    "asu-non-commercial",
    "https://github.com/LLM-VLM-GSL/LLaDA-MedV",
)
# From the most permissive to the strictest; cards list the conditions of all components beside it.
_LICENCES = (_CC0, _MIT, _APACHE, _CC_BY, _RESEARCH, _ASU)


@dataclass(frozen=True)
class Component:
    """Something that a model or a data set is made of.

    Args:
        title: how to call it.
        licence: `None` if it is not known here.
        note: what the licence does not cover, or who says so.
        names: other names, such as Hub ids.
        redistribution: for data, whether copies may be published with a card, images included, and why.
    """

    title: str
    licence: Licence | None
    note: str = ""
    names: tuple[str, ...] = ()
    redistribution: tuple[bool, str] | None = None


def _names(benchmark: str) -> tuple[str, ...]:
    return (benchmark, *(source.hub_id for source in SOURCES[benchmark].values() if source.hub_id is not None))


COMPONENTS = {
    "llada-8b": Component(
        "LLaDA-8B weights", _MIT, names=("GSAI-ML/LLaDA-8B-Instruct", "GSAI-ML/LLaDA-8B-Base")
    ),
    "siglip2": Component("SigLIP2 weights", _APACHE, names=("google/siglip2-so400m-patch14-384",)),
    "llada-medv": Component(
        "LLaDA-MedV weights", _ASU,
        "a copy on the Hub is tagged apache-2.0, which contradicts its repository and its training data",
        ("XZDong123/LLaDA-MedV",),
    ),
    "llava-med-data": Component(
        "LLaVA-Med data", _RESEARCH, "each picture has the licence of its PMC article",
        ("llava-med-alignment", "llava-med-instruct", "llava-med-qa50"),
        (False, "LLaVA-Med's data are CC BY-NC 4.0 for research only, and its research licence forbids passing them "
         "on; publish how to make them instead"),
    ),
    "vqa-rad": Component(
        "VQA-RAD", _CC0, names=_names("vqa-rad"), redistribution=(True, "VQA-RAD is CC0 1.0, pictures included")
    ),
    "slake": Component(
        "SLAKE", _CC_BY, names=_names("slake"),
        redistribution=(True, "SLAKE is CC BY 4.0, pictures included; its authors must be named"),
    ),
    "path-vqa": Component(
        "PathVQA", _MIT, "of questions and answers; the pictures belong to publishers of textbooks and to PEIR",
        _names("path-vqa"),
        (False, "PathVQA's MIT licence is of its questions; the pictures are under the copyright of publishers of "
         "textbooks and of the PEIR digital library"),
    ),
    "phantoms": Component(
        "phantoms", _APACHE, "drawn by this package, whose licence it is", _names("phantoms"),
        (True, "phantoms are drawn by this package and show no person"),
    ),
}  # fmt: skip
_BY_NAME = {name.lower(): each for key, each in COMPONENTS.items() for name in (key, *each.names)}


def find_component(name: str) -> Component:
    """The component that a name stands for.

    Args:
        name: a key of `COMPONENTS`, a Hub id, also with `@revision`, or a source of training data (`phantoms:…`,
            `vqa:BENCHMARK…`).

    Returns:
        One of `COMPONENTS`; for any other name, one of that title and of unknown licence.
    """
    plain = name.partition("@")[0].removeprefix("vqa:").partition(":")[0].lower()
    return _BY_NAME.get(plain, Component(name, None))


def component_of_model(name_or_path: str) -> Component:
    """The model that another one is made from: by its Hub id, or, if it is a folder, by the card that lies in it."""
    folder = Path(name_or_path)
    if not name_or_path or not folder.exists():
        return find_component(name_or_path) if is_hub_id(name_or_path) else Component("base model", None)
    card, licence = folder / CARD, None
    with suppress(OSError, ValueError, yaml.YAMLError):  # without a card that can be read it is unknown
        data = ModelCard.load(card, ignore_metadata_errors=True).data
        stated = (data.get("license"), data.get("license_name"))
        licence = next((each for each in _LICENCES if (each.license, each.license_name) == stated), None)
    return Component(f"base model `{folder.name}`", licence, "as its card says" if licence is not None else "")


def strictest_licence(components: Iterable[Component]) -> Licence:
    """The licence that governs what is made of these components.

    Raises:
        ValueError: without a component, or with one of unknown licence, which it names.
    """
    components = list(components)
    if not components:
        raise ValueError("`components` is empty; at least one is needed to know a licence.")
    if unknown := [each.title for each in components if each.licence is None]:
        raise ValueError(
            f"`components` holds {', '.join(unknown)}, of unknown licence; known are those of {', '.join(COMPONENTS)}."
        )
    return max((each.licence for each in components), key=_LICENCES.index)


def may_redistribute(source: str) -> tuple[bool, str]:
    """Whether records and pictures of a data set may be published, and the reason.

    Args:
        source: as for [`find_component`].
    """
    known = find_component(source).redistribution
    return known or (False, "nothing is known here about a licence of these data")


__all__ = [
    "CARD", "COMPONENTS", "Component", "Licence", "component_of_model", "find_component", "may_redistribute",
    "strictest_licence",
]  # fmt: skip
