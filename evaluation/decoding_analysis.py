"""What the number of denoising steps, the canvas and the block do to answers: length, time, repetition, accuracy.

LLaDA-MedV's paper (arXiv 2508.01617) shows it for one model in Table 3, its ablations and Figure 5; this is the same
for any model and questions, with repetition in numbers. Fewer steps are faster and fill the canvas with "the the the".
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration
from lladamedv.processing import LLaDAMedVProcessor
from lladamedv.processing.datasets.readers import undecoded

from .answering import answer_batch, device_name, open_image, question_about
from .image_controls import noise_picture
from .medical_vqa.medical_vqa import MedicalVQA, complete_reference
from .published import PUBLISHED_ABLATION, PUBLISHED_EFFICIENCY
from .reports import document, interval_of_mean, line_plots, markdown_table, number, write_report
from .run_settings import decoding_in_force, run_settings
from .runs import process_state, replace_file, run_items
from .text_repetition.text_repetition import TextRepetition


NGRAM_SIZES = (1, 2, 3, 4)
_SWEPT = ("max_new_tokens", "block_length", "steps")
_SCORES = ("closed_accuracy", "open_recall")
_FIGURES = {
    "repetition.png": {
        "rep-2 of tokens": "token_rep_2", "longest run of a token, mean": "token_mean_longest_run",
        "closed accuracy, %": "closed_accuracy", "open recall, %": "open_recall",
    },
    "time.png": {"seconds per question": "seconds_per_question", "seconds per word": "seconds_per_word"},
}  # fmt: skip
_COLUMNS = {
    "L": "max_new_tokens", "B": "block_length", "Z": "steps",
    "T/Q, s": "seconds_per_question", "W/Q": "words_per_question", "T/W, s": "seconds_per_word",
    "forwards/Q": "forwards_per_question", "tokens/forward": "tokens_per_forward",
    "rep-1, words": "rep_1", "rep-2, words": "rep_2", "rep-2, tokens": "token_rep_2",
    "longest run, tokens": "token_mean_longest_run",
    "closed accuracy, %": "closed_accuracy", "open recall, %": "open_recall",
}  # fmt: skip
_PUBLISHED = (
    "## Published",
    "Table 3 and the ablations of LLaDA-MedV (arXiv 2508.01617): an 8-billion-parameter model on its authors' "
    "hardware, asked 193 questions about biomedical images. The rows above are another model, other hardware and "
    "other questions, unless these are exactly the same: compare how the numbers change with Z, not the numbers. "
    "Overall is the score of the judge relative to text-only GPT-4, which is not measured here.",
    markdown_table(
        ["model", "T/Q, s", "W/Q", "T/W, s", "Z", "Overall, %"], [map(number, row) for row in PUBLISHED_EFFICIENCY]
    ),
    "LLaDA-MedV there: L 256, B 64.",
    markdown_table(["L", "B", "Z", "Overall, %"], [map(number, row) for row in PUBLISHED_ABLATION]),
)


def analyze_decoding(
    model: LLaDAMedVForConditionalGeneration,
    processor: LLaDAMedVProcessor,
    records: Sequence[dict] | Dataset,
    folder: str | Path,
    *,
    steps: Sequence[int],
    max_new_tokens: Sequence[int],
    block_length: Sequence[int],
    batch_size: int = 1,
    full_canvas: bool = False,
    extra_options: dict | None = None,
    name: str = "model",
    example_id: str | None = None,
    bootstrap_samples: int = 1000,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> dict:
    """Answer all questions with every combination of canvas, block and steps, and compare.

    Each combination is a run of its own in a sub-folder (`L256-B64-Z128`): interrupted, it continues where it was, and
    several processes (torchrun, `accelerate launch`) share it. Times are from the chat template to the text; before its
    first batch a process answers that batch once untimed, because the first pass of a shape is slow.

    Args:
        model, processor: as loaded.
        records: each with `id`, `image`, `question` and, to be scored, `answer`, `answer_type` and `image_id`: dicts,
            or the rows of `load_vqa`. Those without an answer are asked and not scored.
        folder: where the runs and the reports are.
        steps, max_new_tokens, block_length: denoising steps for the whole canvas (Z), its length (L) and that of its
            blocks (B), in tokens; their cross product is taken. Combinations that `generate` does not allow are listed.
        batch_size: questions at a time; the seconds per question are those of a batch divided by its size.
        full_canvas: let nothing end an answer (no end or padding token is proposed, stop strings do not count), which
            shows the repetition that early ends hide. Scores then say little: text behind the true answer counts too.
        extra_options: further options of `generate`, the same for all combinations.
        name: what to call the model.
        example_id: the question to show the answers of; by default the one with the longest answer, in words, at the
            most steps of the first canvas and block.
        bootstrap_samples: how often the images are drawn anew for the 95 % intervals; 0 computes none.
        seed: of these draws, and of sampling where the options sample.
        report: called with each line of text, in the main process.

    Returns:
        JSON-able, and also in `summary.json` and, shorter, in `summary.md` and `decoding.csv`; the arguments,
        num_questions, num_scored, the example's answers in pieces of one token, `not_allowed` combinations with their
        `reason`, the names of the `plots` (none without matplotlib), and for each of the `combinations`, with `None`
        where nothing could be counted:
        - words_per_question, seconds_per_question and seconds_per_word, their quotient (Table 3's W/Q, T/Q, T/W);
        - forwards_per_question, tokens_per_forward (of the answer, up to its end);
        - distinct_n and rep_n for n from 1 to 4, longest_run and mean_longest_run, of words (the metric
          `text_repetition`), and the same of tokens with `token_` before the name: tokens that follow each other
          without white space are one word. The answer is tokenised anew for that;
        - closed_accuracy and open_recall from 0 to 100 (the metric `medical_vqa`);
        - with `bootstrap_samples`, `_ci95` of rep_n and of both scores;
        - measured_on: the devices, data types, CPU threads and batch sizes of the times, and how many questions each;
          more than one entry means mixed times.

    Raises:
        ValueError: before any question is asked, for a value that is not allowed, records without what is needed, or if
            no combination is allowed; and as `run_items` does.
    """
    # 1. Check everything before the first question.
    extra_options, records = extra_options or {}, _as_stored(records)
    items = _read_items(records, bootstrap_samples)
    ids = [item["id"] for item in items]
    swept = dict(zip(_SWEPT, (max_new_tokens, block_length, steps)))
    allowed, not_allowed = _combinations(model, swept, extra_options, full_canvas)
    if example_id is not None and example_id not in ids:
        raise ValueError(f"`example_id` is {example_id!r}; allowed are the ids of the records.")
    folder, state = Path(folder), process_state()
    say = report if state.is_main_process else lambda line: None
    for combination in not_allowed:
        say(f"left out {_folder_name(combination)}: {combination['reason']}")

    # 2. Answer and measure, one combination after the other.
    asked = ({key: row[key] for key in ("id", "question", "image")} for row in records)
    common = {"seed": seed, **run_settings(model, processor, allowed[0][1], asked)}
    results, texts = [], []
    for combination, options in allowed:
        settings = {**common, "decoding": decoding_in_force(model, options)}
        answer = _answering(model, processor, records, options, batch_size, seed)
        predictions = run_items(ids, answer, folder / _folder_name(combination), settings, batch_size)
        results.append({**combination, **_measure(predictions, items, processor.tokenizer, bootstrap_samples, seed)})
        texts.append([prediction["prediction"] for prediction in predictions])
        shown = {key: number(value) for key, value in results[-1].items()}
        say(
            "{0}: {words_per_question} words and {seconds_per_question} s per question, rep-2 {rep_2}, closed "
            "{closed_accuracy}, open {open_recall}".format(_folder_name(combination), **shown)
        )

    # 3. Compare.
    example = _wordiest(results, texts) if example_id is None else ids.index(example_id)
    answers = [_pieces(processor.tokenizer, of_one[example]) for of_one in texts]
    summary = {
        "name": name, "num_questions": len(items), "num_scored": sum(item["answer"] is not None for item in items),
        "full_canvas": full_canvas, "extra_options": extra_options, "bootstrap_samples": bootstrap_samples,
        "seed": seed, "example_id": ids[example],
        "example": {"question": items[example]["question"], "answers": answers},
        "combinations": results, "not_allowed": not_allowed, "plots": [],
    }  # fmt: skip
    if state.is_main_process:
        _write_reports(folder, summary, say)
    state.wait_for_everyone()
    return summary


def _as_stored(records: Sequence[dict] | Dataset) -> Sequence[dict] | Dataset:
    """Records whose images `datasets` does not decode, because it reads no DICOM."""
    return undecoded(records) if isinstance(records, Dataset) else records


def _wordiest(results: list[dict], texts: list[list[str]]) -> int:
    """The place of the longest answer, in words, at the most steps of the first canvas and block."""
    first = [results[0][name] for name in ("max_new_tokens", "block_length")]
    alike = [place for place, one in enumerate(results) if [one["max_new_tokens"], one["block_length"]] == first]
    slowest = max(alike, key=lambda place: results[place]["steps"])
    lengths = [len(text.split()) for text in texts[slowest]]
    return lengths.index(max(lengths))


def noise_pictures(records: Sequence[dict] | Dataset, seed: int = 0) -> list[dict]:
    """The same questions about pictures of uniform noise, 64 x 64 pixels.

    A model that is sure of every word hardly repeats itself even with few steps. Noise makes it unsure, which shows the
    repetition.

    Args:
        records: as for [`analyze_decoding`].
        seed: of the noise.
    """
    random = np.random.default_rng(seed)
    return [{**record, "image": noise_picture((64, 64), random)} for record in _as_stored(records)]


def _read_items(records, bootstrap_samples: int) -> list[dict]:
    """The records without images, which are read when their question is asked."""
    if not isinstance(records, (Sequence, Dataset)) or not len(records):
        raise ValueError(
            f"`records` is a {type(records).__name__}; allowed are a list or a Dataset with records in it."
        )
    items = []
    for place, row in enumerate(records):
        item = {key: row.get(key) for key in ("id", "image_id", "question", "answer", "answer_type")}
        missing = [key for key in ("id", "question") if not isinstance(item[key], str) or not item[key].strip()]
        if missing or "image" not in row:
            raise ValueError(f"`records` has no {(missing or ['image'])[0]} in record {place}.")
        item["answer"] = item["answer"] or None  # some published rows have an empty one
        if item["answer"] is not None:
            item |= complete_reference("", item, "")
            if bootstrap_samples and not item["image_id"]:
                raise ValueError(f"`records` has no image_id for {item['id']!r}; `bootstrap_samples` draw images.")
        items.append(item)
    return items


def _combinations(
    model, swept: dict[str, Sequence[int]], extra_options: dict, full_canvas: bool
) -> tuple[list[tuple[dict, dict]], list[dict]]:
    """The allowed combinations, each with its options, and the others, each with the reason."""
    taken = sorted({*swept, *(_endless(model, 1) if full_canvas else ())} & set(extra_options))
    if taken:
        raise ValueError(f"`extra_options` has {taken}, which are set by arguments of their own.")
    allowed, not_allowed = [], []
    for values in product(*(dict.fromkeys(values) for values in swept.values())):
        combination = dict(zip(swept, values))
        options = {**extra_options, **combination}
        if full_canvas:
            options |= _endless(model, combination["max_new_tokens"])
        try:
            decoding_in_force(model, options)
            allowed.append((combination, options))
        except ValueError as error:
            not_allowed.append({**combination, "reason": str(error)})
    if not allowed:  # also where a list of values is empty
        reasons = " ".join(f"{_folder_name(one)}: {one['reason']}" for one in not_allowed)
        raise ValueError(f"No combination of `max_new_tokens`, `block_length` and `steps` is allowed. {reasons}")
    return allowed, not_allowed


def _endless(model, canvas: int) -> dict:
    """Options with which every place of the canvas is filled with text."""
    defaults = model.generation_config
    eos = defaults.eos_token_id
    ends = {*(eos if isinstance(eos, list) else [eos]), defaults.pad_token_id} - {None}
    held_back = {"eos_token_id": sorted(ends), "min_new_tokens": canvas} if ends else {}
    return {**held_back, "stop_strings": None}


def _folder_name(combination: dict) -> str:
    return "L{max_new_tokens}-B{block_length}-Z{steps}".format(**combination)


def _answering(model, processor, records, options, batch_size, seed) -> Callable[[list[int]], list[dict]]:
    """What answers batches of one combination, for `run_items`."""
    measured_on = {
        "device": device_name(model), "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(), "batch_size": batch_size,
    }  # fmt: skip
    warm = False

    def answer(places: list[int]) -> list[dict]:
        nonlocal warm
        asked = [records[place] for place in places]
        chats = [question_about(open_image(processor, row["image"], row["id"]), row["question"]) for row in asked]
        if not warm:  # the first pass of a shape is slow
            answer_batch(model, processor, chats, **options)
            warm = True
        torch.manual_seed(seed + places[0])  # the same draws, whenever a run continues
        answers = answer_batch(model, processor, chats, **options)
        return [
            {"id": row["id"], **given.as_record(), "measured_on": measured_on} for row, given in zip(asked, answers)
        ]

    return answer


def _measure(predictions: list[dict], items: list[dict], tokenizer, bootstrap_samples: int, seed: int) -> dict:
    """The numbers of one combination."""
    texts = [prediction["prediction"] for prediction in predictions]
    tokens = [" ".join("".join(piece.split()) for piece in _pieces(tokenizer, text)) for text in texts]
    images = [item["image_id"] or item["id"] for item in items]
    repetition, metric = {}, TextRepetition(keep_in_memory=True)
    for prefix, units in (("", texts), ("token_", tokens)):
        found = metric.compute(predictions=units, ngram_sizes=NGRAM_SIZES, return_items=True)
        names = [f"{kind}_{size}" for size in NGRAM_SIZES for kind in ("distinct", "rep")]
        repetition |= {f"{prefix}{name}": found[name] for name in (*names, "longest_run", "mean_longest_run")}
        for size in NGRAM_SIZES if bootstrap_samples else ():
            shares = ((one[f"distinct_{size}"], image) for one, image in zip(found["items"], images))
            repeated = [(1 - share, image) for share, image in shares if share is not None]
            repetition[f"{prefix}rep_{size}_ci95"] = interval_of_mean(repeated, bootstrap_samples, seed)
    scored = [(text, item) for text, item in zip(texts, items) if item["answer"] is not None]
    scores = {}
    if scored:
        answers, references = map(list, zip(*scored))
        scores = MedicalVQA(keep_in_memory=True).compute(
            predictions=answers, references=references, bootstrap_samples=bootstrap_samples, seed=seed
        )
    names = [f"{name}{end}" for end in ("", "_ci95")[: 1 + bool(bootstrap_samples)] for name in _SCORES]
    costs = ("seconds", "num_forwards", "num_tokens")
    seconds, forwards, tokens = (sum(one[name] for one in predictions) / len(predictions) for name in costs)
    words = sum(len(text.split()) for text in texts) / len(texts)
    measured = Counter(json.dumps(one["measured_on"]) for one in predictions)
    return {
        "words_per_question": words,
        "seconds_per_question": seconds,
        "seconds_per_word": seconds / words if words else None,
        "forwards_per_question": forwards,
        "tokens_per_forward": tokens / forwards if forwards else None,
        **repetition,
        **{name: scores.get(name) for name in names},
        "measured_on": [{**json.loads(one), "questions": count} for one, count in measured.items()],
    }


def _pieces(tokenizer, text: str) -> list[str]:
    """The text cut where its tokens begin; put together, the pieces are the text."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    starts = sorted({0, *(start for start, _ in offsets)}) if text else []
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)])]


def _write_reports(folder: Path, summary: dict, say: Callable[[str], None]) -> None:
    try:
        _draw(folder, summary)
    except ImportError as error:
        say(f"No figures: {error}")
    replace_file(folder / "decoding.csv", _to_csv(summary["combinations"]))
    write_report(folder, summary, to_markdown(summary))
    say(f"Reports: {folder}")


def _draw(folder: Path, summary: dict) -> None:
    """Draw all figures, with a line for each canvas and block, and add their names to the summary."""
    results = sorted(summary["combinations"], key=lambda one: [one[key] for key in _SWEPT])
    canvas = "full canvas" if summary["full_canvas"] else "answers end where the model ends them"
    title = f"{summary['name']}, {summary['num_questions']} questions, {canvas}"
    for file, labels in _FIGURES.items():
        panels = {}
        for label, column in labels.items():
            for one in results if any(one[column] is not None for one in results) else ():
                line = f"L {one['max_new_tokens']}, B {one['block_length']}"
                panels.setdefault(label, {}).setdefault(line, []).append((one["steps"], one[column]))
        line_plots(folder / file, panels, "steps Z", title)
        summary["plots"].append(file)


def _to_csv(results: list[dict]) -> str:
    """One line per combination; of an interval its two ends, of the machines their JSON."""
    rows = []
    for one in results:
        row = {key: value for key, value in one.items() if not key.endswith("_ci95")}
        row["measured_on"] = json.dumps(row["measured_on"])
        for key in sorted(one.keys() - row.keys()):
            row[f"{key}_low"], row[f"{key}_high"] = one[key] or (None, None)
        rows.append(row)
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def to_markdown(summary: dict) -> str:
    """The summary as Markdown, beside the published numbers."""
    results, rows, machines = summary["combinations"], [], set()
    for one in results:
        row = [number(one[column]) for column in _COLUMNS.values()]
        ends = [one.get(f"{column}_ci95") for column in _COLUMNS.values()]
        rows.append([cell + (f" [{number(end[0])}, {number(end[1])}]" if end else "") for cell, end in zip(row, ends)])
        machines |= {
            "{device}, {dtype}, {threads} CPU threads, {batch_size} questions at a time".format(**used)
            for used in one["measured_on"]
        }
    answers = [[*row[: len(_SWEPT)], _marked(pieces)] for row, pieces in zip(rows, summary["example"]["answers"])]
    options = ", ".join(f"{key} {value}" for key, value in summary["extra_options"].items())
    mixed = any(len(one["measured_on"]) > 1 for one in results)
    not_allowed = "\n".join(f"- {_folder_name(one)}: {one['reason']}" for one in summary["not_allowed"])
    paragraphs = [
        f"# Decoding: {summary['name']}",
        markdown_table(list(_COLUMNS), rows),
        f"{summary['num_questions']} questions, {summary['num_scored']} of them scored. L is the canvas, B the block, "
        "Z the steps; T/Q and W/Q are seconds and words per question, T/W is T/Q divided by W/Q; rep-n is the share of "
        "repeated n-grams, and as the longest run of one token a mean over the answers. In brackets: 95 % intervals of "
        "a bootstrap over images.",
        "Nothing ended an answer before the canvas was full; the scores count what follows the true answer too."
        if summary["full_canvas"]
        else "Answers end where the model ends them, which hides repetition behind the end.",
        f"Times were measured on: {'; '.join(sorted(machines))}.",
        f"Options: {options}." if options else "",
        "**Some combinations were measured under more than one of these; their times are mixed.**" if mixed else "",
        f"Not allowed, and left out:\n\n{not_allowed}" if not_allowed else "",
        *(f"![{name}]({name})" for name in summary["plots"]),
        f"## Answers to question {summary['example_id']}",
        f"{_escaped(summary['example']['question'])} Bold: repeats the token before.",
        markdown_table([*list(_COLUMNS)[: len(_SWEPT)], "answer"], answers),
        *_PUBLISHED,
    ]
    return document(paragraphs)


def _marked(pieces: list[str]) -> str:
    """An answer in a cell of a table, with pieces in bold that repeat the one before."""
    shown, previous = "", None
    for piece in pieces:
        core, text = piece.strip().lower(), _escaped(piece)
        shown += text.replace(text.strip(), f"**{text.strip()}**") if core and core == previous else text
        previous = core or previous
    return shown.strip() or "–"


def _escaped(text: str) -> str:
    """Text in one line, with Markdown's marks escaped."""
    return re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", re.sub(r"\s", " ", text))


__all__ = ["analyze_decoding", "noise_pictures", "to_markdown"]
