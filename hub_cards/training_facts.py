"""What a card says about a training run, gathered from plain data that every trainer has, so that it is not typed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from .licences import Component, find_component
from .loss_curve import draw_loss_curve
from .privacy import is_on_hub, scrub_recipe


_TABLE_ROWS = 12
_SOFTWARE = ("lladamedv", "torch", "transformers", "trl", "peft", "datasets")
_ADAPTER_FIELDS = {
    "r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets", "use_dora": "DoRA",
    "use_rslora": "rank-stabilised", "modules_to_save": "trained in full beside it",
}  # fmt: skip


@dataclass(frozen=True)
class TrainingData:
    """A source of a run: how to call it, its Hub id if it is there, what it is, rows that it gave and left out (`None`
    where they were not counted), and whether it was streamed, so that only what was read is counted."""

    name: str
    hub_id: str | None
    component: Component
    rows: int | None
    left_out: int | None
    streamed: bool = False

    @property
    def counts(self) -> tuple[str, str]:
        """Rows and rows left out, as cells of a table."""
        if self.rows is None:
            return "streamed, not counted", "not counted"
        return f"{self.rows}{' read' * self.streamed}", str(self.left_out)


@dataclass(frozen=True)
class TrainingFacts:
    """What was trained, how, on what, and how that went.

    Args:
        recipe: YAML of the arguments, without anything private.
        data: the sources that it was trained on.
        eval_data: the sources that it was only evaluated on.
        data_notes: sentences about rows that were left out or held out.
        trained: what has gradients, as lines of a table.
        is_adapter: whether adapters were trained instead of the model's own weights.
        hardware: devices, processes, precision.
        software: versions by package.
        steps: optimizer steps so far.
        epochs: passes over the data so far, if the log says so.
        seconds: wall time, if the log says so, which it does at the end of a run.
        losses, eval_losses: `(step, loss)`.
        picture: name of the file beside the card with the curves; without it the card has a table.
    """

    recipe: str
    data: tuple[TrainingData, ...]
    trained: dict[str, str]
    is_adapter: bool
    hardware: str
    software: dict[str, str]
    steps: int
    epochs: float | None
    seconds: float | None
    losses: tuple[tuple[int, float], ...]
    eval_losses: tuple[tuple[int, float], ...]
    picture: str | None = None
    eval_data: tuple[TrainingData, ...] = ()
    data_notes: tuple[str, ...] = ()

    @property
    def loss_rows(self) -> list[tuple[int, str]]:
        """Up to twelve losses, evenly spread from the first to the last, as cells of a table."""
        rows = min(len(self.losses), _TABLE_ROWS)
        places = [round(number * (len(self.losses) - 1) / max(1, rows - 1)) for number in range(rows)]
        return [(step, f"{loss:.4f}") for step, loss in (self.losses[place] for place in places)]


def gather_training_facts(
    recipe: str | Mapping,
    log_history: Sequence[Mapping],
    hardware: str,
    trained_parts: Sequence[str],
    data_reports: Sequence[Mapping] = (),
    adapter: Mapping | None = None,
    software: Mapping[str, str] | None = None,
    picture: str | Path | None = None,
) -> TrainingFacts:
    """Sort what a trainer knows into what a card states.

    Args:
        recipe: the run's arguments, as YAML or a mapping. Comments, paths, and arguments about a machine or a user are
            left out.
        log_history: as of `transformers.TrainerState`.
        hardware: in words.
        trained_parts: names of the parts with gradients, if there is no adapter.
        data_reports: of each source, `source`, `rows`, `missing_images` and `invalid`, and of a benchmark `benchmark`,
            `reference` and `split` ([`LoadReport`] or [`VQAReport`] as dictionaries), with `use` "eval_data" for those
            that were not trained on. Only Hub ids, benchmarks and phantoms are named; everything else is "local data",
            of unknown licence. And of each data set whose rows were checked, `data_set` and the fields of `RowReport`.
        adapter: configuration of the adapters, as `PeftConfig.to_dict()`.
        software: versions, as [`software_versions`] returns them.
        picture: .png file to draw the curves to, beside the card. Without losses none is drawn.

    Raises:
        ValueError: if `recipe` is no YAML mapping.
    """
    losses, eval_losses = (
        tuple((int(entry["step"]), float(entry[name])) for entry in log_history if name in entry)
        for name in ("loss", "eval_loss")
    )
    last = {name: value for entry in log_history for name, value in entry.items()}
    sources = [each for each in data_reports if "source" in each]
    data, eval_data = (
        tuple(_training_data(each) for each in sources if each.get("use", "train_data") == use)
        for use in ("train_data", "eval_data")
    )
    drawn = picture is not None and draw_loss_curve(picture, log_history)
    return TrainingFacts(
        recipe=scrub_recipe(recipe), data=data, eval_data=eval_data,
        data_notes=tuple(note for report in data_reports if "data_set" in report for note in _data_notes(report)),
        trained={"weights": ", ".join(trained_parts)} if adapter is None else _adapter_lines(adapter),
        is_adapter=adapter is not None, hardware=hardware, software=dict(software or {}),
        steps=max((int(entry["step"]) for entry in log_history if "step" in entry), default=0),
        epochs=last.get("epoch"), seconds=last.get("train_runtime"), losses=losses, eval_losses=eval_losses,
        picture=Path(picture).name if drawn else None,
    )  # fmt: skip


def _training_data(report: Mapping) -> TrainingData:
    source, benchmark = report["source"], report.get("benchmark")
    name, component, hub_id = "local data", Component("local data", None), None
    if source.startswith("phantoms:"):
        name, component = source, find_component(source)
    elif is_on_hub(report):
        hub_id = source.partition("@")[0]
        name, component = source, find_component(benchmark or hub_id)
    elif benchmark is not None:
        name, component = f"{benchmark}, local data", find_component(benchmark)
    if "split" in report:
        name += f", {report['split']}"
    left_out = None if report["rows"] is None else len(report["missing_images"]) + len(report["invalid"])
    return TrainingData(name, hub_id, component, report["rows"], left_out, report.get("streamed", False))


def _data_notes(report: Mapping) -> list[str]:
    use = "training" if report["data_set"] == "train_dataset" else "evaluation"
    notes = []
    if report["left_out"]:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in report["left_out"].items())
        notes.append(f"Rows that were left out of {use} when they were checked: {reasons}.")
    if report["held_out"] is not None:
        held_out = report["held_out"]
        notes.append(
            f"Of the rows above, {report['kept']} were held out and used for evaluation only: all rows about "
            f"{held_out['images']} of {held_out['images'] + held_out['images_to_train_on']} pictures, drawn with seed "
            f"{held_out['seed']}. No picture is on both sides; different pictures of one patient may be."
        )
    return notes


def _adapter_lines(adapter: Mapping) -> dict[str, str]:
    kind = adapter["peft_type"]
    lines = {"weights": f"adapters, {getattr(kind, 'value', kind)}"}
    for field, title in _ADAPTER_FIELDS.items():
        value = adapter.get(field)
        values = sorted(value) if isinstance(value, (list, tuple, set)) else [value]
        if value is not None and value is not False:
            lines[title] = ", ".join(f"`{each}`" for each in values)
    return lines


def software_versions() -> dict[str, str]:
    """Versions of what a run depends on, as far as it is installed."""
    found = {name: next(iter(distributions(name=name)), None) for name in _SOFTWARE}
    return {name: distribution.version for name, distribution in found.items() if distribution is not None}


__all__ = ["TrainingData", "TrainingFacts", "gather_training_facts", "software_versions"]
