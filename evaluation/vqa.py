"""The VQA benchmarks from a model to a report: answers, scores that can be trusted, and what was published.

One folder holds a run: `run.json` (all that the answers depend on), `predictions.jsonl` (a line per question),
`summary.json` and `summary.md`, and figures of the calibration. It can be interrupted at any moment and continued by
the same call, and shared between the processes of `accelerate launch`.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from datasets import Dataset

from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration, fit_confidence_temperature
from lladamedv.processing import LLaDAMedVProcessor
from lladamedv.processing.datasets import LoadReport, VQAReport
from lladamedv.processing.datasets.readers import first_few, undecoded

from .answer_sets import attach_calibration, calibration_of
from .answering import (
    Answer,
    answer_batch,
    candidate_probabilities,
    device_name,
    encode_chats,
    open_image,
    question_about,
)
from .calibrating import answer_row, render_sets, summarize_sets
from .calibration import area_under_risk_coverage, calibration_bins, expected_calibration_error, risk_coverage
from .image_controls import CONTROLS, ControlPictures, control_tables, finding, summarize_controls
from .medical_vqa.medical_vqa import ANSWER_TYPES, HEADLINES, POLARITY, MedicalVQA, closed_polarity
from .published import PUBLISHED_VQA, VQA_DECODING
from .reports import document, markdown_table, reliability_diagram, risk_coverage_curve, write_report
from .run_settings import run_settings
from .runs import process_state, run_items
from .text_repetition.text_repetition import TextRepetition


logger = logging.getLogger(__name__)
SCORINGS = ("generate", "likelihood")


def evaluate_vqa(
    model: LLaDAMedVForConditionalGeneration,
    processor: LLaDAMedVProcessor,
    dataset: Dataset,
    report: VQAReport,
    folder: str | Path,
    *,
    model_name: str,
    options: dict | None = None,
    scoring: str = "generate",
    image_controls: bool = False,
    batch_size: int = 8,
    candidates: Sequence[str] | None = None,
    bootstrap_samples: int = 1000,
    seed: int = 0,
) -> dict:
    """Answer all questions of a data set, score the answers and write a report.

    Args:
        model, processor: as loaded; the model where it shall run.
        dataset, report: of [`load_vqa`], not streamed.
        folder: of this run. Called again with the same arguments, it continues where it stopped.
        model_name: what to call the model in the report.
        options: of `generate`; by default the paper's for short answers, a canvas of 64 tokens in one block and 64
            steps.
        scoring: `"generate"`, or `"likelihood"`: closed questions whose true answer says yes or no are answered by the
            likelier of the two (see [`~LLaDAMedVScoringMixin.score`]), all others still by generation.
        image_controls: ask each question three times more, about another picture of the set, about one of one colour
            and about noise, and say how much likelier the picture makes each answer (`image_reliance`): whether the
            scores come from the pictures. The summary begins with that, and has it as `image_controls`.
        batch_size: questions at a time.
        candidates: see the `medical_vqa` metric.
        bootstrap_samples: how often images are drawn anew for 95 % confidence intervals; 0 computes none.
        seed: of the bootstrap, and of the noise where `options` have a temperature. With one, answers depend on which
            questions are in a batch, and so on `batch_size`.

    Returns:
        The summary, in every process. `complete` is False if questions could not be answered because of their image, or
        if records were left out; the scores are then of the others, and the report says so first. `decoding` are the
        options in force, including the checkpoint's.

    Raises:
        ValueError: before anything is answered, for a value that is not allowed, an empty data set, one picture alone
            with `image_controls`, or a folder of a run with other options, weights, data, kind of device, ….
    """
    # 1. Everything that the answers depend on.
    if scoring not in SCORINGS:
        raise ValueError(f"`scoring` is {scoring!r}; allowed are {SCORINGS}.")
    if not len(dataset):
        raise ValueError(f"`dataset` is empty; at least one question is needed ({LoadReport.summary(report)}).")
    options = VQA_DECODING if options is None else options
    model.eval()
    dataset = undecoded(dataset)
    in_force = run_settings(model, processor, options, dataset)
    provenance = {
        "model": model_name, "model_revision": in_force["model_revision"], "dataset": report.source,
        "dataset_revision": report.revision, "split": report.split, "decoding": in_force["decoding"],
        "scoring": scoring,
    }  # fmt: skip
    settings = {**provenance, **in_force, "benchmark": report.benchmark, "seed": seed}
    if image_controls:
        settings["image_controls"] = True
        pictures = ControlPictures(processor, dataset, seed)
        options = {**options, "output_image_reliance": True}
    attach_calibration(model, processor)  # if it still fits
    if (calibration := calibration_of(model)) is not None:
        settings["calibration_sha256"] = calibration.sha256

    # 2. Answers.
    def answer(places: list[int]) -> list[dict]:
        rows = [dataset[place] for place in places]
        digest = hashlib.sha256("\n".join([str(seed), *(row["id"] for row in rows)]).encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # the same draws, whenever a run continues
        given = _answer_rows(model, processor, rows, options, scoring)
        for control in CONTROLS if image_controls else ():
            replaced = [pictures.replace(control, row) for row in rows]
            others = _answer_rows(model, processor, replaced, {**options, "output_image_reliance": False}, scoring)
            for answered, other in zip(given, others):
                answered.setdefault("controls", {})[control] = other
        for row, answered in zip(rows, given if image_controls else ()):
            if answered.get("method") == "likelihood":
                answered["image_reliance"] = pictures.reliance(model, row, answered["prediction"])
        return [
            {**_asked(processor, row), **answered, **answer_row(model, processor, row), **provenance}
            for row, answered in zip(rows, given)
        ]

    records = run_items(list(dataset["id"]), answer, folder, settings, batch_size)

    # 3. Scores, and the report.
    left_out = [name for name, _ in (*report.missing_images, *report.invalid)]
    scored = _summarize(records, candidates, bootstrap_samples, seed)
    summary = {
        **{name: settings[name] for name in ("benchmark", "split", "model", "model_revision", "model_sha256")},
        **scored, "answer_sets": summarize_sets(model, records, settings, bootstrap_samples, seed),
        "left_out": left_out, "complete": scored["complete"] and not left_out,
        "decoding": settings["decoding"], "scoring": scoring, "data": report.as_dict(),
        "data_summary": report.summary().splitlines(),
        "environment": {
            "device": device_name(model),
            "dtype": settings["dtype"], "batch_size": batch_size, "processes": process_state().num_processes,
            "torch": torch.__version__, "transformers": transformers.__version__,
        },
    }  # fmt: skip
    if process_state().is_main_process:
        write_summary(summary, folder)
    return summary


def _asked(processor, row: dict) -> dict:
    """The fields of a question in a line of predictions."""
    chat = question_about(None, row["question"])
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    fields = {name: row[name] for name in ("id", "image_id", "question", "answer_type")}
    return {**fields, "prompt": prompt, "reference": row["answer"]}


def _answer_rows(model, processor, rows: list[dict], options: dict, scoring: str) -> list[dict]:
    """For each row the fields of its answer, or without one `prediction` `None` and the `error`."""
    answers, chats = {}, {}  # by place
    for place, row in enumerate(rows):
        try:
            chat = question_about(open_image(processor, row["image"], row["id"]), row["question"])
        except ValueError as error:
            answers[place] = {"prediction": None, "error": str(error)}
            continue
        if scoring == "likelihood" and row["answer_type"] == "closed" and closed_polarity("", row["answer"])[1]:
            answers[place] = {**_likelier(model, processor, chat).as_record(), "method": "likelihood"}
        else:
            chats[place] = chat
    if chats:
        generated = answer_batch(model, processor, list(chats.values()), **options)
        answers |= {place: {**answer.as_record(), "method": "generate"} for place, answer in zip(chats, generated)}
    return [answers[place] for place in range(len(rows))]


def _likelier(model, processor, chat: list[dict]) -> Answer:
    """The likelier of yes and no, and its probability among the two."""
    started = time.perf_counter()
    inputs = encode_chats(model, processor, [chat])
    probabilities, scores = candidate_probabilities(model, processor, inputs, POLARITY)
    place = int(probabilities.argmax())
    # All subsets of an answer's tokens are masked once, each in a row of its own.
    rows = sum(2**count - 1 for count in scores.num_tokens[0].tolist())
    confidence = float(probabilities[place])
    return Answer(POLARITY[place], confidence, int(scores.num_tokens[0].max()), rows, time.perf_counter() - started)


def _summarize(records: list[dict], candidates, bootstrap_samples: int, seed: int) -> dict:
    """The part of the summary that follows from the records alone."""
    failed = [record["id"] for record in records if record["prediction"] is None]
    # No answer can be right or wrong where the reference is empty.
    unanswerable = [record["id"] for record in records if not record["reference"].strip()]
    scored = [record for record in records if record["id"] not in {*failed, *unanswerable}]
    summary = {
        "complete": not failed, "num_questions": len(records), "num_scored": len(scored),
        "coverage": len(scored) / len(records), "failed": failed, "without_reference": unanswerable,
        "scores": None, "image_controls": None, "repetition": None, "calibration": {}, "cost": None,
    }  # fmt: skip
    if not scored:
        return summary
    predictions = [record["prediction"] for record in scored]
    references = [{**record, "answer": record["reference"]} for record in scored]
    scores = MedicalVQA(keep_in_memory=True).compute(
        predictions=predictions, references=references, candidates=candidates, bootstrap_samples=bootstrap_samples,
        seed=seed, return_items=True,
    )  # fmt: skip
    items = scores.pop("items")
    repetition = TextRepetition(keep_in_memory=True).compute(predictions=predictions)
    for answer_type in ANSWER_TYPES:
        pairs = [
            (record["confidence"], item[HEADLINES[answer_type]])
            for record, item in zip(scored, items)
            if record["answer_type"] == answer_type and record["confidence"] is not None
        ]
        if pairs:
            summary["calibration"][answer_type] = _calibration(*zip(*pairs))
    totals = {name: sum(record[name] for record in scored) for name in ("seconds", "num_tokens", "num_forwards")}
    cost = {
        "seconds_per_question": totals["seconds"] / len(scored),
        "words_per_question": repetition["words_per_answer"],
        "forwards_per_question": totals["num_forwards"] / len(scored),
        "tokens_per_forward": totals["num_tokens"] / totals["num_forwards"],
    }
    if "controls" in scored[0]:
        summary["image_controls"] = summarize_controls(scored, bootstrap_samples, seed)
    return summary | {"scores": scores, "repetition": repetition, "cost": cost}


def _calibration(confidence: Sequence[float], correct: Sequence[float]) -> dict:
    bins = calibration_bins(confidence, correct)
    coverage, risk = risk_coverage(confidence, correct)
    temperature = fit_confidence_temperature(confidence, correct) if len(correct) > 1 else None
    return {
        "count": len(confidence), "mean_confidence": sum(confidence) / len(confidence),
        "accuracy": sum(correct) / len(correct), "expected_calibration_error": expected_calibration_error(bins),
        "area_under_risk_coverage": area_under_risk_coverage(coverage, risk),
        "fitted_confidence_temperature": temperature,
        # A temperature at an end of the searched range is no calibration.
        "temperature_is_at_an_end": temperature is not None and abs(math.log(temperature)) > 4.9,
        "bins": bins, "coverage": coverage, "risk": risk,
    }  # fmt: skip


def write_summary(summary: dict, folder: str | Path) -> None:
    """Write `summary.json`, `summary.md` and, where matplotlib is installed, figures of the calibration."""
    folder = Path(folder)
    write_report(folder, summary, render_summary(summary))
    for answer_type, calibration in summary["calibration"].items():
        title = f"{summary['benchmark']} {summary['split']}, {answer_type} questions (n = {calibration['count']})"
        try:
            reliability_diagram(folder / f"reliability_{answer_type}.png", calibration["bins"], title)
            curve = (calibration["coverage"], calibration["risk"])
            risk_coverage_curve(folder / f"risk_coverage_{answer_type}.png", *curve, title)
        except ImportError as error:
            logger.warning("%s", error)
            return


def render_summary(summary: dict) -> str:
    """The summary as Markdown."""
    scores, left_out, questions = summary["scores"], summary["left_out"], summary["data"]["questions"]
    asked_a_part = summary["num_questions"] < questions
    paragraphs = [f"# {summary['model']} on {summary['benchmark']} ({summary['split']})"]
    for names, problem in (
        (summary["failed"], f"of {summary['num_questions']} questions have no answer"),
        (left_out, f"of {questions + len(left_out)} records were not asked: no image, or invalid"),
    ):
        if names:
            paragraphs.append(f"**INCOMPLETE: {len(names)} {problem} ({first_few(names)}).**")
    if scores is None:
        return document([*paragraphs, "No question could be scored."])
    controls = summary["image_controls"]
    if controls is not None:
        paragraphs.append(finding(controls))
    counts = {name.removeprefix("num_").replace("_", " "): scores[name] for name in scores if name.startswith("num_")}
    if asked_a_part:
        counts[f"asked of {questions} questions"] = summary["num_questions"]
    paragraphs += [
        _score_table(scores),
        "Counts: " + ", ".join(f"{count} {name}" for name, count in counts.items()) + ".",
    ]
    if summary["without_reference"]:
        paragraphs.append(f"Left out, because their true answer is empty: {', '.join(summary['without_reference'])}.")
    if summary["benchmark"] in PUBLISHED_VQA and summary["data"]["is_published"] and not asked_a_part:
        paragraphs += [
            "Beside table 2 of LLaDA-MedV (arXiv 2508.01617), by its rules, which count repeated words and look for "
            "substrings. Published numbers are not all about the same questions.",
            _published_table(summary),
        ]
    if summary["calibration"]:
        names = ("mean_confidence", "accuracy", "expected_calibration_error", "area_under_risk_coverage")
        rows = [
            [answer_type, str(each["count"]), *(f"{each[name]:.4f}" for name in names)]
            for answer_type, each in summary["calibration"].items()
        ]
        paragraphs.append(markdown_table(["calibration", "n", "confidence", "accuracy", "ECE", "AURC"], rows))
    paragraphs += [] if controls is None else control_tables(controls)
    paragraphs.append(render_sets(summary["answer_sets"]))
    cost, repetition, environment = summary["cost"], summary["repetition"], summary["environment"]
    rep_2 = "none" if repetition["rep_2"] is None else f"{repetition['rep_2']:.4f}"
    decoding = ", ".join(f"{name}={value}" for name, value in summary["decoding"].items())
    paragraphs += [
        f"Answers: {cost['words_per_question']:.1f} words, repeated bigrams {rep_2}, longest run of one word "
        f"{repetition['longest_run']}; {cost['forwards_per_question']:.1f} forward passes, "
        f"{cost['tokens_per_forward']:.2f} tokens a pass, {cost['seconds_per_question']:.3f} s a question in batches "
        f"of {environment['batch_size']} on {environment['device']}, {environment['dtype']}"
        f"{'' if controls is None else ', of which image reliance is a part'}.",
        f"Decoding: {decoding}; answers by {summary['scoring']}.",
        "Data:",
        "\n".join(f"- {line}" for line in summary["data_summary"]),
    ]
    return document(paragraphs)


def _score_table(scores: dict) -> str:
    rows = []
    for name, value in scores.items():
        if value is None or name.endswith("_ci95") or name.startswith("num_"):
            continue
        interval = scores.get(f"{name}_ci95")
        interval = "" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"
        count = scores["num_open" if name.startswith("open") else "num_closed"]
        rows.append([name, f"{value:.2f}", interval, str(count)])
    return markdown_table(["score", "value", "95 % interval", "n"], rows)


def _published_table(summary: dict) -> str:
    own = (summary["scores"]["open_recall_llava_med"], summary["scores"]["closed_accuracy_llava_med"])
    rows = [
        [name, *("-" if value is None else f"{value:.2f}" for value in row)]
        for name, row in {**PUBLISHED_VQA[summary["benchmark"]], f"**{summary['model']}**": own}.items()
    ]
    return markdown_table(["model", "open recall", "closed accuracy"], rows)


__all__ = ["SCORINGS", "evaluate_vqa", "render_summary", "write_summary"]
