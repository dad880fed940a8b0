"""The dataset card: what a copy, a subset or a recipe of a data set holds, and whether its pictures may be in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files

from huggingface_hub import DatasetCard, DatasetCardData

from lladamedv.processing.datasets import LoadReport, VQAReport

from .licences import find_component, may_redistribute
from .privacy import is_on_hub, scrub


_TEMPLATE = files(__package__) / "templates" / "dataset_card.md"
_SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}


def build_dataset_card(
    report: Mapping | LoadReport,
    name: str,
    version: str,
    component: str | None = None,
    recipe: str | None = None,
    has_images: bool = False,
) -> DatasetCard:
    """The card of a data set, with the front matter that the Hub reads.

    Args:
        report: what was loaded, a [`VQAReport`], for other data a [`LoadReport`], or either as a dictionary.
        name: of the data set, as its title.
        version: of the package that built it.
        component: what the data are, a name for `find_component`; by default the report's benchmark.
        recipe: Python code or commands that build it; by default the call of [`load_vqa`] that made the report.
        has_images: whether pictures are published with the card.

    Raises:
        ValueError: if it is not known what the data are or how they are built, or if `has_images` and their licence
            does not allow it.
    """
    facts = report.as_dict() if isinstance(report, VQAReport) else report
    facts = dict(facts) if isinstance(facts, Mapping) else asdict(facts)
    benchmark = facts.get("benchmark")
    known = component or benchmark
    if known is None:
        raise ValueError("`component` is None, but the report names no benchmark; needed is the name of the data.")
    if recipe is None and benchmark is None:
        raise ValueError("`recipe` is None, but the report names no benchmark; needed is what builds the data.")
    part, (allowed, reason) = find_component(known), may_redistribute(known)
    if has_images and not allowed:
        raise ValueError(f"`has_images` is True; allowed is False: {reason}.")
    on_hub = is_on_hub(facts)
    drawn = facts["source"].startswith("phantoms:")
    origin = None if drawn else f"extended|{facts['source'].partition('@')[0]}" if on_hub else "extended"
    counts = {"questions" if benchmark else "rows": facts["rows"]}
    counts |= {count: facts[count] for count in ("images", "open", "closed") if benchmark}
    data = DatasetCardData(
        language="en",
        pretty_name=scrub(name),
        **({} if part.licence is None else part.licence.metadata),
        size_categories=next((size for limit, size in _SIZES.items() if facts["rows"] < limit), "1M<n<10M"),
        source_datasets=origin and [origin],
        task_categories=["visual-question-answering"],
        tags=["medical", "research-only", "lladamedv"],
    )
    card = DatasetCard.from_template(
        data, template_str=_TEMPLATE.read_text(encoding="utf-8"), report=facts, name=scrub(name), version=version,
        component=part, counts=counts, has_images=has_images, allowed=allowed, reason=reason,
        source=facts["source"] if on_hub or drawn else "local data", on_hub=on_hub, drawn=drawn,
        recipe=recipe or _load_call(facts, on_hub, drawn),
    )  # fmt: skip
    card.text = scrub(card.text).rstrip() + "\n"
    return card


def _load_call(report: Mapping, on_hub: bool, drawn: bool) -> str:
    """The call of [`load_vqa`] that made a report."""
    arguments = [repr(report["benchmark"]), repr(report["split"])]
    if drawn:
        arguments.append(f"path={report['source'].partition(':')[2]!r}")
    else:
        arguments.append(f"source={report['reference']!r}")
        if not on_hub:
            arguments.append('path="…"')
        elif report["revision"] is not None:
            arguments.append(f"revision={report['revision']!r}")
    call = f"dataset, report = load_vqa({', '.join(arguments)})"
    return f"from lladamedv.processing.datasets import load_vqa\n\n{call}"


__all__ = ["build_dataset_card"]
