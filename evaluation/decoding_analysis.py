"""What the number of denoising steps, the canvas and the block do to answers: length, time, repetition, accuracy.

LLaDA-MedV's paper (arXiv 2508.01617) shows it for one model in Table 3, its ablations and Figure 5; this is the same
for any model and questions, with repetition in numbers. Fewer steps are faster and fill the canvas with "the the the".
"""

from __future__ import annotations

import csv
import io
import json
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration, LLaDAMedVGenerationConfig
from lladamedv.processing import LLaDAMedVProcessor

from . import plots
from .answering import answer_batch, decoding_in_force, open_image, question_about, run_settings, undecoded
from .medical_vqa.medical_vqa import MedicalVQA, bootstrap_intervals, complete_reference
from .runs import process_state, replace_file, run_items
from .tables import markdown_table
from .text_repetition.text_repetition import TextRepetition


SUMMARY_FILE, MARKDOWN_FILE, CSV_FILE = "summary.json", "summary.md", "decoding.csv"
NGRAM_SIZES = (1, 2, 3, 4)
_FIELDS = ("id", "image_id", "question", "answer", "answer_type")

# Source: Table 3 of LLaDA-MedV (arXiv 2508.01617): seconds per question, words per question, seconds per word, steps,
# overall relative score in percent. LLaDA-MedV has a canvas of 256 and blocks of 64.
PUBLISHED_EFFICIENCY = (
    ("LLaVA-Med", 1.317, 36.332, 0.036, None, 44.750),
    ("LLaVA-Med200", 1.392, 40.922, 0.034, None, 44.582),
    ("LLaDA-MedV", 38.382, 166.585, 0.230, 256, 52.605),
    ("LLaDA-MedV", 30.874, 170.399, 0.181, 128, 44.276),
    ("LLaDA-MedV", 21.234, 172.839, 0.123, 64, 28.523),
    ("LLaDA-MedV", 13.945, 182.596, 0.076, 32, 18.581),
    ("LLaDA-MedV", 8.595, 192.090, 0.045, 16, 13.525),
)
# Source: the ablations there: canvas, block, steps, overall relative score in percent.
PUBLISHED_ABLATION = (
    (32, 32, 32, 37.057), (64, 32, 64, 39.135), (128, 32, 128, 33.222), (256, 32, 256, 51.215),
    (256, 64, 256, 52.605), (256, 128, 256, 51.641), (256, 256, 256, 51.470),
    (256, 256, 128, 44.020), (256, 256, 64, 31.774), (256, 256, 32, 20.165),
)  # fmt: skip


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

    Each combination is a run of its own in a sub-folder (`L256-B64-Z128`): interrupted, it goes on where it was, and
    as several processes (torchrun, `accelerate launch`) they share it. Only the main process writes reports.

    Args:
        model, processor: as loaded.
        records: each with `id`, `image`, `question` and, to be scored, `answer`, `answer_type` and `image_id`: dicts,
            or the rows of `processing.datasets.load_vqa`. Those without an answer are asked and not scored.
        folder: where the runs and the reports are; made if it is not there.
        steps, max_new_tokens, block_length: denoising steps for the whole canvas (Z), its length (L) and that of its
            blocks (B), in tokens; their cross product is taken. Combinations that `generate` does not allow are listed.
        batch_size: questions at a time; the seconds per question are those of a batch divided by its size.
        full_canvas: let nothing end an answer: `min_new_tokens` is the canvas, end and padding tokens are not proposed,
            and stop strings do not count. Answers that end early hide the repetition, which grows where the canvas must
            be filled. Scores then say little: what follows the true answer is counted too.
        extra_options: further options of `generate`, the same for all combinations.
        name: what to call the model.
        example_id: the question to show the answers of; by default the one with the longest answer, in words, at the
            most steps of the first canvas and block.
        bootstrap_samples: how often the images are drawn anew for the 95 % intervals; 0 computes none.
        seed: of these draws, and of sampling where the options sample.
        report: called with each line of text.

    Returns:
        JSON-able, and also in `summary.json` and, shorter, in `summary.md` and `decoding.csv`:
        - name, num_questions, num_scored, full_canvas, extra_options, bootstrap_samples, seed, example_id;
        - combinations: for each, its max_new_tokens, block_length and steps, and
            - words_per_question, seconds_per_question and seconds_per_word, their quotient (Table 3's W/Q, T/Q, T/W);
            - forwards_per_question, tokens_per_forward (of the answer, up to its end);
            - distinct_n and rep_n for n from 1 to 4, longest_run and mean_longest_run, of words (the metric
              `text_repetition`), and the same of tokens with `token_` before the name: tokens that follow each other
              without white space are one word. The answer is tokenised anew for that;
            - closed_accuracy and open_recall from 0 to 100 (the metric `medical_vqa`);
            - with `bootstrap_samples`, `_ci95` of rep_n and of both scores;
            - measured_on: the devices, data type, CPU threads and batch size that the times are of, and how many
              questions each; times are kept when a run is taken up again, and more than one entry means mixed times;
        - not_allowed: the other combinations, each with its `reason`;
        - plots: names of the figures; none without matplotlib.
        Numbers are `None` where nothing could be counted.

    Raises:
        ValueError: before any question is asked, for a value that is not allowed, records without what is needed, or if
            no combination is allowed; and as `run_items` does.

    Times are from the chat template to the text, on the machine that answers. Before its first batch a process answers
    that batch once untimed, because the first pass of a shape is slow.
    """
    extra_options = dict(extra_options or {})
    swept = {"max_new_tokens": max_new_tokens, "block_length": block_length, "steps": steps}
    records = undecoded(records)
    items = _read_items(records, bootstrap_samples)
    asked = [
        {"id": item["id"], "question": item["question"], "image": record["image"]}
        for item, record in zip(items, records)
    ]
    allowed, not_allowed = _combinations(model, swept, extra_options, full_canvas)
    if example_id is not None and example_id not in {item["id"] for item in items}:
        raise ValueError(f"`example_id` is {example_id!r}; allowed are the ids of the records.")
    folder, state = Path(folder), process_state()
    say = report if state.is_main_process else lambda line: None
    for combination in not_allowed:
        say(f"left out {_folder_name(combination)}: {combination['reason']}")

    common = {"seed": seed, **run_settings(model, processor, allowed[0][1], asked)}
    results, texts = [], {}
    for combination, options in allowed:
        predictions = run_items(
            [item["id"] for item in items],
            _Answers(model, processor, records, items, options, batch_size, seed),
            folder / _folder_name(combination),
            {**common, "decoding": decoding_in_force(model, options)},
            batch_size,
        )
        numbers = _measure(predictions, items, processor.tokenizer, bootstrap_samples, seed)
        results.append({**combination, **numbers})
        texts[_folder_name(combination)] = [prediction["prediction"] for prediction in predictions]
        say(
            f"{_folder_name(combination)}: {_cell(numbers['words_per_question'])} words and "
            f"{_cell(numbers['seconds_per_question'])} s per question, rep-2 {_cell(numbers['rep_2'])}, "
            f"closed {_cell(numbers['closed_accuracy'])}, open {_cell(numbers['open_recall'])}"
        )
    example = _choose_example(items, results, texts, example_id)
    summary = {
        "name": name,
        "num_questions": len(items),
        "num_scored": sum(item["answer"] is not None for item in items),
        "full_canvas": full_canvas,
        "extra_options": extra_options,
        "bootstrap_samples": bootstrap_samples,
        "seed": seed,
        "example_id": items[example]["id"],
        "combinations": results,
        "not_allowed": not_allowed,
        "plots": [],
    }
    if state.is_main_process:
        try:
            summary["plots"] = _draw(folder, summary, processor, records[example], example, texts)
        except ImportError as error:
            say(f"No figures: {error}")
        replace_file(folder / CSV_FILE, _to_csv(results))
        replace_file(folder / MARKDOWN_FILE, to_markdown(summary))
        replace_file(folder / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
        say(f"Reports: {folder}")
    state.wait_for_everyone()
    return summary


def noise_pictures(records: Sequence[dict] | Dataset, seed: int = 0) -> list[dict]:
    """The same questions about pictures of noise: what a model says where there is nothing to see.

    A model that is sure of every word hardly repeats itself, however few steps it takes, because words that are sure
    agree with each other; one that cannot see is not sure.

    Args:
        records: as for [`analyze_decoding`].
        seed: of the noise, uniform in each of 3 x 64 x 64 values.
    """
    random, records = np.random.default_rng(seed), undecoded(records)
    return [
        {**record, "image": Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8))} for record in records
    ]


def _read_items(records, bootstrap_samples: int) -> list[dict]:
    """All but the images, which nobody decodes before their turn."""
    if not isinstance(records, (Sequence, Dataset)) or not len(records):
        raise ValueError(
            f"`records` is a {type(records).__name__}; allowed are a list or a Dataset with records in it."
        )
    if isinstance(records, Dataset):
        rows = records.select_columns([name for name in records.column_names if name in _FIELDS])
        has_image = ["image" in records.column_names] * len(records)
    else:
        rows, has_image = records, ["image" in record for record in records]
    items = []
    for number, (row, pictured) in enumerate(zip(rows, has_image)):
        item = {key: row.get(key) for key in _FIELDS}
        missing = [key for key in ("id", "question") if not isinstance(item[key], str) or not item[key].strip()]
        if missing or not pictured:
            raise ValueError(f"`records` has no {(missing or ['image'])[0]} in record {number}.")
        item["answer"] = item["answer"] or None  # some published rows have an empty one
        if item["answer"] is not None:
            item = {**item, **complete_reference("", item, "")}
            if bootstrap_samples and not item["image_id"]:
                raise ValueError(
                    f"`records` has no image_id for {item['id']!r}; `bootstrap_samples` are drawn of images."
                )
        items.append(item)
    return items


def _combinations(
    model, swept: dict[str, Sequence[int]], extra_options: dict, full_canvas: bool
) -> tuple[list[tuple[dict, dict]], list[dict]]:
    """The allowed combinations, each with its options, and the others, each with the reason."""
    own = {*swept, *(_endless(model, 1) if full_canvas else ())}
    taken = sorted(own & set(extra_options))
    if taken:
        raise ValueError(f"`extra_options` has {taken}, which are set by arguments of their own.")
    LLaDAMedVGenerationConfig(**extra_options)
    for option, values in swept.items():
        if not values:
            raise ValueError(f"`{option}` is {values!r}; at least one value is needed.")
        for value in values:
            LLaDAMedVGenerationConfig(**{option: value})
    allowed, not_allowed = [], []
    for values in product(*(dict.fromkeys(values) for values in swept.values())):
        combination = dict(zip(swept, values))
        options = {**extra_options, **combination}
        if full_canvas:
            options |= _endless(model, combination["max_new_tokens"])
        try:
            model.resolve_generation_config(**options, return_dict_in_generate=True)
            allowed.append((combination, options))
        except ValueError as error:
            not_allowed.append({**combination, "reason": str(error)})
    if not allowed:
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


class _Answers:
    """Answers batches of one combination, for `run_items`."""

    def __init__(self, model, processor, records, items, options, batch_size, seed):
        self.model, self.processor, self.records, self.items = model, processor, records, items
        self.options, self.seed, self.warm = options, seed, False
        self.measured_on = {
            "device": _device_name(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "batch_size": batch_size,
        }

    def __call__(self, places: list[int]) -> list[dict]:
        asked = [(self.records[place]["image"], self.items[place]) for place in places]
        chats = [
            question_about(open_image(self.processor, image, item["id"]), item["question"]) for image, item in asked
        ]
        if not self.warm:
            answer_batch(self.model, self.processor, chats, **self.options)
            self.warm = True
        torch.manual_seed(self.seed + places[0])  # the same draws, whenever a run is taken up again
        answers = answer_batch(self.model, self.processor, chats, **self.options)
        return [
            {
                "id": self.items[place]["id"], **answer.as_record(), "measured_on": self.measured_on,
            }
            for place, answer in zip(places, answers)
        ]  # fmt: skip


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}"
    return device.type


def _measure(predictions: list[dict], items: list[dict], tokenizer, bootstrap_samples: int, seed: int) -> dict:
    """The numbers of one combination."""
    texts = [prediction["prediction"] for prediction in predictions]
    words = _repetition(texts)
    tokens = _repetition([" ".join("".join(piece.split()) for piece in _pieces(tokenizer, text)) for text in texts])
    seconds = sum(prediction["seconds"] for prediction in predictions) / len(predictions)
    forwards = sum(prediction["num_forwards"] for prediction in predictions)
    numbers = {
        "words_per_question": words["words_per_answer"],
        "seconds_per_question": seconds,
        "seconds_per_word": seconds / words["words_per_answer"] if words["words_per_answer"] else None,
        "forwards_per_question": forwards / len(predictions),
        "tokens_per_forward": sum(one["num_tokens"] for one in predictions) / forwards if forwards else None,
    }
    kept = [f"{kind}_{size}" for size in NGRAM_SIZES for kind in ("distinct", "rep")]
    kept += ["longest_run", "mean_longest_run"]
    numbers |= {name: words[name] for name in kept}
    numbers |= {f"token_{name}": tokens[name] for name in kept}
    image_ids = [item["image_id"] or item["id"] for item in items]
    for size in NGRAM_SIZES if bootstrap_samples else ():
        for prefix, metrics in (("", words), ("token_", tokens)):
            values = [(one[f"distinct_{size}"], image) for one, image in zip(metrics["items"], image_ids)]
            values = [(1 - value, image) for value, image in values if value is not None]
            interval = None
            if values:
                scores, images = zip(*values)
                interval = bootstrap_intervals(np.array(scores)[:, None], images, bootstrap_samples, seed)
            numbers[f"{prefix}rep_{size}_ci95"] = None if interval is None else interval[0].tolist()
    scored = [(text, item) for text, item in zip(texts, items) if item["answer"] is not None]
    names = ["closed_accuracy", "open_recall"]
    names += [f"{name}_ci95" for name in names] if bootstrap_samples else []
    scores = {}
    if scored:
        answers, references = (list(column) for column in zip(*scored))
        scores = MedicalVQA(keep_in_memory=True).compute(
            predictions=answers, references=references, bootstrap_samples=bootstrap_samples, seed=seed
        )
    numbers |= {name: scores.get(name) for name in names}
    measured = Counter(json.dumps(prediction["measured_on"]) for prediction in predictions)
    return {**numbers, "measured_on": [{**json.loads(one), "questions": count} for one, count in measured.items()]}


def _repetition(texts: list[str]) -> dict:
    return TextRepetition(keep_in_memory=True).compute(predictions=texts, ngram_sizes=NGRAM_SIZES, return_items=True)


def _pieces(tokenizer, text: str) -> list[str]:
    """The text cut where its tokens begin; put together, the pieces are the text."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    starts = sorted({0, *(start for start, _ in offsets)}) if text else []
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)])]


def _choose_example(items: list[dict], results: list[dict], texts: dict, example_id: str | None) -> int:
    if example_id is not None:
        return [item["id"] for item in items].index(example_id)
    first = [one for one in results if all(one[key] == results[0][key] for key in ("max_new_tokens", "block_length"))]
    slowest = texts[_folder_name(max(first, key=lambda one: one["steps"]))]
    return max(range(len(items)), key=lambda place: len(slowest[place].split()))


def _lines(results: list[dict], column: str) -> dict[str, list[tuple[int, float | None]]]:
    """For each canvas and block, a column against the steps, in their order."""
    lines = {}
    for one in sorted(results, key=lambda one: one["steps"]):
        lines.setdefault(f"L {one['max_new_tokens']}, B {one['block_length']}", []).append((one["steps"], one[column]))
    return dict(sorted(lines.items(), key=lambda line: [int(part) for part in line[0].replace(",", "").split()[1::2]]))


def _draw(folder: Path, summary: dict, processor, record: dict, place: int, texts: dict) -> list[str]:
    """Draw all figures; returns their names."""
    results, x_label = summary["combinations"], "steps Z"
    canvas = "full canvas" if summary["full_canvas"] else "answers end where the model ends them"
    title = f"{summary['name']}, {summary['num_questions']} questions, {canvas}"
    columns = {
        "repetition.png": {
            "rep-2 of tokens": "token_rep_2", "longest run of a token, mean": "token_mean_longest_run",
            "closed accuracy, %": "closed_accuracy", "open recall, %": "open_recall",
        },
        "time.png": {"seconds per question": "seconds_per_question", "seconds per word": "seconds_per_word"},
    }  # fmt: skip
    names = []
    for name, labels in columns.items():
        counted = {label: column for label, column in labels.items() if any(one[column] is not None for one in results)}
        plots.line_plots(
            folder / name, {label: _lines(results, column) for label, column in counted.items()}, x_label, title
        )
        names.append(name)
    groups, image = {}, open_image(processor, record["image"], record["id"])
    for one in sorted(results, key=lambda one: -one["steps"]):
        answer = _pieces(processor.tokenizer, texts[_folder_name(one)][place])
        groups.setdefault((one["max_new_tokens"], one["block_length"]), {})[f"Z {one['steps']}"] = answer
    for (length, block), answers in sorted(groups.items()):
        name = f"answers-L{length}-B{block}.png"
        title = f"{summary['name']}, L {length}, B {block}; red: repeats the token before"
        plots.answers_figure(folder / name, record["question"], answers, title, image)
        names.append(name)
    return names


def _to_csv(results: list[dict]) -> str:
    """One line per combination; of an interval its two ends, of the machines their JSON."""
    file, rows = io.StringIO(), []
    for one in results:
        row = {}
        for key, value in one.items():
            if key.endswith("_ci95"):
                row[f"{key}_low"], row[f"{key}_high"] = value or (None, None)
            else:
                row[key] = json.dumps(value) if isinstance(value, list) else value
        rows.append(row)
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def to_markdown(summary: dict) -> str:
    """The summary for readers, beside the published numbers."""
    columns = {
        "L": "max_new_tokens", "B": "block_length", "Z": "steps",
        "T/Q, s": "seconds_per_question", "W/Q": "words_per_question", "T/W, s": "seconds_per_word",
        "forwards/Q": "forwards_per_question", "tokens/forward": "tokens_per_forward",
        "rep-1, words": "rep_1", "rep-2, words": "rep_2", "rep-2, tokens": "token_rep_2",
        "longest run, tokens": "token_mean_longest_run",
        "closed accuracy, %": "closed_accuracy", "open recall, %": "open_recall",
    }  # fmt: skip
    rows = [
        [_cell(one[column], one.get(f"{column}_ci95")) for column in columns.values()]
        for one in summary["combinations"]
    ]
    machines = {
        f"{used['device']}, {used['dtype']}, {used['threads']} CPU threads, {used['batch_size']} questions at a time"
        for one in summary["combinations"]
        for used in one["measured_on"]
    }
    lines = [f"# Decoding: {summary['name']}", "", *markdown_table(list(columns), rows)]
    lines += [
        f"{summary['num_questions']} questions, {summary['num_scored']} of them scored. L is the canvas, B the block, "
        "Z the steps; T/Q and W/Q are seconds and words per question, T/W is T/Q divided by W/Q; rep-n is the share of "
        "repeated n-grams, and as the longest run of one token a mean over the answers. In brackets: 95 % intervals of "
        "a bootstrap over images.",
        "",
        "Nothing ended an answer before the canvas was full; the scores count what follows the true answer too."
        if summary["full_canvas"]
        else "Answers end where the model ends them, which hides repetition behind the end.",
        "",
    ]
    if summary["extra_options"]:
        lines += [f"Options: {', '.join(f'{key} {value}' for key, value in summary['extra_options'].items())}.", ""]
    lines += [f"Times were measured on: {'; '.join(sorted(machines))}.", ""]
    if any(len(one["measured_on"]) > 1 for one in summary["combinations"]):
        lines += ["**Some combinations were measured under more than one of these; their times are mixed.**", ""]
    if summary["not_allowed"]:
        lines += ["Not allowed, and left out:", ""]
        lines += [*(f"- {_folder_name(one)}: {one['reason']}" for one in summary["not_allowed"]), ""]
    for name in summary["plots"]:
        lines += [f"![{name}]({name})", ""]
    lines += [
        "## Published",
        "",
        "Table 3 and the ablations of LLaDA-MedV (arXiv 2508.01617): an 8-billion-parameter model on its authors' "
        "hardware, asked 193 questions about biomedical images. The rows above are another model, other hardware and "
        "other questions, unless these are exactly the same: compare how the numbers change with Z, not the numbers. "
        "Overall is the score of the judge relative to text-only GPT-4, which is not measured here.",
        "",
    ]
    lines += markdown_table(
        ["model", "T/Q, s", "W/Q", "T/W, s", "Z", "Overall, %"],
        [[_cell(value) for value in row] for row in PUBLISHED_EFFICIENCY],
    )
    lines += ["LLaDA-MedV there: L 256, B 64.", ""]
    rows = [[_cell(value) for value in row] for row in PUBLISHED_ABLATION]
    lines += markdown_table(["L", "B", "Z", "Overall, %"], rows)
    return "\n".join(lines).rstrip() + "\n"


def _cell(value, interval: Sequence[float] | None = None) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    shown = f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}"
    return shown if interval is None else f"{shown} [{_cell(interval[0])}, {_cell(interval[1])}]"


__all__ = ["PUBLISHED_ABLATION", "PUBLISHED_EFFICIENCY", "analyze_decoding", "noise_pictures", "to_markdown"]
