"""Calibrating a model for sets of answers (`answer_sets`), and what its sets are worth on other questions.

Pictures are the units of both: questions about one picture are answered well or badly together.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from datasets import Dataset

from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration
from lladamedv.processing import LLaDAMedVProcessor
from lladamedv.processing.datasets import VQAReport
from lladamedv.processing.datasets.columns import squash
from lladamedv.processing.datasets.readers import undecoded

from .answer_sets import (
    YES_NO,
    Calibration,
    answer_set,
    calibration_of,
    check_alpha,
    check_candidates,
    prompt_digest,
)
from .answering import candidate_probabilities, encode_chats, open_image, question_about
from .conformal import conformal_threshold, promised, wilson_interval
from .medical_vqa.medical_vqa import closed_polarity
from .reports import interval_of_mean, markdown_table
from .run_settings import model_fingerprint, run_settings
from .runs import run_items
from .unusual_pictures import PictureModel, decode, encode, picture_features


logger = logging.getLogger(__name__)


def calibrate(
    model: LLaDAMedVForConditionalGeneration,
    processor: LLaDAMedVProcessor,
    dataset: Dataset,
    report: VQAReport,
    folder: str | Path,
    *,
    alpha: float = 0.1,
    candidates: Sequence[Sequence[str]] = (YES_NO,),
    group_by: str | None = None,
) -> Calibration:
    """Score the candidates of questions with known answers, and find the thresholds.

    Args:
        model, processor: as loaded; the model where it shall run.
        dataset, report: of [`load_vqa`] or [`load_own_vqa`], not streamed. Questions that the model was trained on
            calibrate nothing.
        folder: of this run. Called again, it continues where it stopped; only `alpha` and `group_by` may differ.
        alpha: share of sets that may lack the true answer, in (0, 1).
        candidates: lists of answers, no answer in two of them. A question has the candidates of the list that its true
            answer is in; those in none are left out. That must follow from the question: then it is the same list that
            a user gives who does not know the answer.
        group_by: a column of `meta`, such as "modality": a threshold for each of its values that has enough pictures.

    Returns:
        The calibration; `save` puts it beside the model.

    Raises:
        ValueError: before anything is scored, for a value that is not allowed or a data set without such questions;
            as [`run_items`].
    """
    check_alpha(alpha)
    candidates = [list(each) for each in candidates]
    check_candidates(candidates)
    dataset = undecoded(dataset)
    rows = dataset.remove_columns("image").to_list()
    places = defaultdict(list)  # of the questions about each picture, with the numbers of their list and answer
    for place, row in enumerate(rows):
        if (found := find_answer(row, candidates)) is not None:
            places[row["image_id"]].append((place, *found))
    if not places:
        lists = " or ".join(map(",".join, candidates))
        raise ValueError(f"`dataset` has {len(rows)} questions, none with an answer of {lists} (`candidates`).")
    if group_by is not None and not any(row["meta"].get(group_by) for row in rows):
        there = [name for name in rows[0]["meta"] if any(row["meta"][name] for row in rows)]
        raise ValueError(f"`group_by` is {group_by!r}; the columns of this data set are {', '.join(there) or 'none'}.")
    model.eval()
    settings = run_settings(model, processor, {}, dataset)
    source = Path(report.source).name if report.local else report.source  # no folder of this machine
    pictures = list(places)

    def score(numbers: list[int]) -> list[dict]:
        return [_score_picture(model, processor, dataset, places[pictures[number]], candidates) for number in numbers]

    records = run_items(
        pictures, score, folder, {"dataset": source, "split": report.split, "candidates": candidates, **settings},
        unit="picture",
    )  # fmt: skip
    scored = [record for record in records if record["error"] is None]
    questions = [(question, record["id"]) for record in scored for question in record["questions"]]
    if not questions:
        raise ValueError(f"No picture of the {len(records)} can be read: {records[0]['error']}")

    if left_out := len(rows) - len(questions):
        logger.warning(
            "%d of %d questions are left out: their answer is none of the candidates, or their picture cannot be read.",
            left_out, len(rows),
        )  # fmt: skip

    def threshold_of(chosen: list[tuple[dict, str]]) -> float | None:
        scores = [1 - question["probabilities"][question["answer"]] for question, _ in chosen]
        found = conformal_threshold(scores, [picture for _, picture in chosen], alpha)
        return None if found == math.inf else found

    groups = defaultdict(list)
    for question, picture in questions:
        if group_by is not None and question["meta"][group_by]:
            groups[question["meta"][group_by]].append((question, picture))
    thresholds = {name: threshold_of(chosen) for name, chosen in groups.items()}
    return Calibration(
        alpha=float(alpha), dataset=source, revision=report.revision, split=report.split,
        data_sha256=settings["data_sha256"], model_sha256=model_fingerprint(model, any_dtype=True),
        prompt_sha256=prompt_digest(processor), dtype=settings["dtype"], version=version("lladamedv"),
        candidates=candidates, pictures=len(scored), questions=len(questions), left_out=left_out,
        threshold=threshold_of(questions), group_by=group_by,
        group_pictures={name: len({picture for _, picture in chosen}) for name, chosen in groups.items()},
        group_thresholds={name: value for name, value in thresholds.items() if value is not None},
        picture_model=PictureModel.fit(np.array([decode(record["features"]) for record in scored])),
    )  # fmt: skip


def find_answer(row: dict, candidates: Sequence[Sequence[str]]) -> tuple[int, int] | None:
    """The list of candidates that a question's true answer is in, and its place there; `None` if it is in none."""
    said = closed_polarity("", row["answer"])[1] if row["answer_type"] == "closed" else None  # "Yes, it is."
    for text in (row["answer"], said or ""):
        for number, texts in enumerate(candidates):
            names = [squash(each) for each in texts]
            if squash(text) in names:
                return number, names.index(squash(text))
    return None


def _score_picture(model, processor, dataset: Dataset, places: list[tuple], candidates: list[list[str]]) -> dict:
    """The record of a picture: the features of it, and the probabilities of each question's candidates."""
    first = dataset[places[0][0]]
    record = {"id": first["image_id"], "error": None, "features": None, "questions": []}
    try:
        image = open_image(processor, first["image"], first["id"])
    except ValueError as error:
        return record | {"error": str(error)}
    for place, number, answer in places:
        row = dataset[place]
        inputs = encode_chats(model, processor, [question_about(image, row["question"])])
        probabilities, _ = candidate_probabilities(model, processor, inputs, candidates[number])
        record["questions"].append(
            {"id": row["id"], "list": number, "answer": answer, "probabilities": probabilities.tolist(),
             "meta": row["meta"]}
        )  # fmt: skip
    return record | {"features": encode(picture_features(model, inputs["pixel_values"])[0])}


# In evaluations


def answer_row(model, processor, row: dict) -> dict:
    """The fields of a row's set in a line of predictions; none without a calibration, or for an answer in no list."""
    calibration = calibration_of(model)
    found = None if calibration is None else find_answer(row, calibration.candidates)
    if found is None:
        return {}
    candidates = calibration.candidates[found[0]]
    group = row["meta"][calibration.group_by] if calibration.group_by else None
    try:
        image = open_image(processor, row["image"], row["id"])
    except ValueError:  # which the row's answer says
        return {}
    given = answer_set(model, processor, image, row["question"], candidates, group)
    return {
        "answer_set": list(given.answers), "probabilities": given.probabilities, "true_candidate": candidates[found[1]],
        "set_group": given.group, "unusual_picture": given.warning is not None,
    }  # fmt: skip


def summarize_sets(model, records: Iterable[dict], settings: dict, samples: int, seed: int) -> dict | None:
    """Coverage and size of the sets of an evaluation, of all and by group; `None` where there are none.

    Coverage is what the guarantee is about: the mean over pictures of the share of their sets that hold the true
    answer, with the Wilson interval of as many values as there are pictures. The interval of the size is the bootstrap
    over pictures.

    Args:
        model: as evaluated.
        records: of [`answer_row`], with the other fields of a line of predictions.
        settings: of the run.
        samples, seed: of the bootstrap.
    """
    calibration = calibration_of(model)
    asked = [record for record in records if "answer_set" in record]
    if not asked:
        return None
    groups = {"all": asked}
    for record in asked:
        if record["set_group"] is not None:
            groups.setdefault(record["set_group"], []).append(record)

    def measure(chosen: list[dict]) -> dict:
        held, sizes = defaultdict(list), []
        for record in chosen:
            held[record["image_id"]].append(record["true_candidate"] in record["answer_set"])
            sizes.append((float(len(record["answer_set"])), record["image_id"]))
        coverage = float(np.mean([np.mean(each) for each in held.values()]))
        single = [record for record in chosen if len(record["answer_set"]) == 1]
        right = sum(record["answer_set"] == [record["true_candidate"]] for record in single)
        return {
            "questions": len(chosen), "pictures": len(held),
            "coverage": coverage, "coverage_ci95": wilson_interval(coverage, len(held)),
            "size": sum(size for size, _ in sizes) / len(sizes), "size_ci95": interval_of_mean(sizes, samples, seed),
            "answered": len(single) / len(chosen), "answered_right": right / len(single) if single else None,
        }  # fmt: skip

    return {
        "alpha": calibration.alpha, "calibrated_on": calibration.dataset, "group_by": calibration.group_by,
        "same_data": calibration.data_sha256 == settings["data_sha256"],
        "unusual_pictures": len({record["image_id"] for record in asked if record["unusual_picture"]}),
        "groups": {name: measure(chosen) for name, chosen in groups.items()},
    }  # fmt: skip


def render_sets(summary: dict | None) -> str:
    """The paragraph and table of a report; nothing without sets."""
    if summary is None:
        return ""

    def interval(values: list[float] | None) -> str:
        return "" if values is None else f"{values[0]:.3f} to {values[1]:.3f}"

    rows = [
        [name, f"{each['coverage']:.3f}", interval(each["coverage_ci95"]), f"{each['size']:.3f}",
         interval(each["size_ci95"]), f"{each['answered']:.3f}",
         "" if each["answered_right"] is None else f"{each['answered_right']:.3f}",
         str(each["questions"]), str(each["pictures"])]
        for name, each in summary["groups"].items()
    ]  # fmt: skip
    header = ["sets", "coverage", "95 % interval", "size", "95 % interval", "one answer", "and right", "n", "pictures"]
    text = f"Sets of answers, made to hold the true one for {promised(summary['alpha'])} of the questions"
    text += f" (calibrated on {summary['calibrated_on']}); {summary['unusual_pictures']} pictures are unlike those."
    if summary["same_data"]:
        text += " **These are the questions that were calibrated on: their coverage says nothing about others.**"
    return f"{text}\n\n{markdown_table(header, rows)}"


__all__ = ["answer_row", "calibrate", "find_answer", "render_sets", "summarize_sets"]
