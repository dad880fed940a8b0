"""Preference pairs from a VQA data set: the true answer is chosen; a wrong one of a model, or that of another picture
to the same question, is rejected.

A folder holds a run: `pairs.parquet` (with its pictures, in TRL's form), and as for benchmarks `run.json`,
`predictions.jsonl` (a line per question, with why it gives no pair) and `summary.json`.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset

from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration
from lladamedv.processing import LLaDAMedVProcessor
from lladamedv.processing.datasets import LoadReport, VQAReport, shared_images
from lladamedv.processing.datasets.messages import PAIR_FEATURES, record_to_pair
from lladamedv.processing.datasets.readers import embedded, undecoded

from .answering import answer_batch, open_image, question_about
from .medical_vqa.medical_vqa import HEADLINES, normalize_answer, score_closed, score_open
from .published import VQA_DECODING
from .reports import write_report
from .run_settings import data_fingerprint, run_settings
from .runs import process_state, run_items


REJECTED = ("model", "pictures", "both")
PAIRS_FILE = "pairs.parquet"
PAIR_DECODING = {**VQA_DECODING, "temperature": 1.0}


def build_pairs(
    model: LLaDAMedVForConditionalGeneration | None,
    processor: LLaDAMedVProcessor | None,
    dataset: Dataset,
    report: VQAReport,
    folder: str | Path,
    *,
    rejected: str = "both",
    tries: int = 4,
    options: dict | None = None,
    held_out: Mapping[str, Dataset] | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> dict:
    """Find a wrong answer to each question, and write the pairs.

    An answer is wrong if the headline score of the `medical_vqa` metric is below 1: another polarity or other words for
    closed questions, a word of the truth missing for open ones. Blank answers are not taken.

    Args:
        model, processor: as loaded; `None` if `rejected` is `"pictures"`.
        dataset, report: of [`load_vqa`] or [`load_own_vqa`], not streamed.
        folder: of this run. Called again with the same arguments, it continues where it stopped.
        rejected: what wrong answers are: sampled from the model (`"model"`), the true answers of other pictures to the
            same question (`"pictures"`), or sampled, and where no sample is wrong of another picture (`"both"`).
        tries: how often at most a question is sampled until an answer is wrong.
        options: of `generate`; by default those of [`evaluate_vqa`] at temperature 1.
        held_out: data sets to be evaluated on, by name. Questions about pictures that one of them has, too, by
            [`~processing.datasets.shared_images`], are left out.
        batch_size: questions at a time. Samples depend on it.
        seed: of the samples, and of which other picture's answer is taken.

    Returns:
        The summary, in every process: `pairs`, `rejected_from`, and `left_out`, how many questions give no pair, by
        reason.

    Raises:
        ValueError: for a value that is not allowed, temperature 0, if no question or no pair is left, and as
            [`run_items`].
    """
    options = PAIR_DECODING if options is None else options
    if rejected not in REJECTED:
        raise ValueError(f"`rejected` is {rejected!r}; allowed are {', '.join(REJECTED)}.")
    if tries < 1:
        raise ValueError(f"`tries` is {tries}; allowed are whole numbers of at least 1.")
    sampled = rejected != "pictures"
    if sampled and not options.get("temperature"):
        raise ValueError("`temperature` is 0, so that all samples are the same; allowed are numbers above 0.")
    # 1. Leave out what is evaluated on.
    dataset, held_out = undecoded(dataset), held_out or {}
    shared = {name: shared_images(dataset, other) for name, other in held_out.items()}
    banned = set().union(*shared.values())
    kept = dataset.select([place for place, image in enumerate(dataset["image_id"]) if image not in banned])
    if not len(kept):
        raise ValueError(
            f"`dataset` has {len(dataset)} questions ({LoadReport.summary(report)}), of which none is left: their "
            f"pictures are also in {', '.join(shared) or 'no other data'}."
        )
    # 2. A wrong answer to each question.
    settings = {"rejected": rejected, "seed": seed, "held_out": {name: len(each) for name, each in shared.items()}}
    if sampled:
        model.eval()
        settings |= {"tries": tries, "batch_size": batch_size, **run_settings(model, processor, options, kept)}
    else:
        settings["data_sha256"] = data_fingerprint(kept)
    others = _OtherAnswers(kept, seed)

    def find(places: list[int]) -> list[dict]:
        rows = [kept[place] for place in places]
        found = {row["id"]: {"left_out": "no word in the true answer"} for row in rows
                 if not normalize_answer(row["answer"]).strip()}  # fmt: skip
        if sampled:
            found |= _sample(model, processor, [row for row in rows if row["id"] not in found], options, tries, seed)
        if rejected != "model":
            found |= {row["id"]: {"rejected": text, "from": "pictures"} for row in rows if row["id"] not in found
                      if (text := others.wrong_for(row)) is not None}  # fmt: skip
        nothing = {"left_out": "no wrong answer found"}
        return [{"id": row["id"], "chosen": row["answer"], **found.get(row["id"], nothing)} for row in rows]

    records = run_items(list(kept["id"]), find, folder, settings, batch_size)
    # 3. The pairs, and what became of the others.
    reasons = Counter(record["left_out"] for record in records if "left_out" in record)
    if len(dataset) > len(kept):
        reasons["a picture that is held out"] = len(dataset) - len(kept)
    summary = {
        "questions": len(dataset), "pairs": sum("from" in record for record in records),
        "rejected_from": dict(Counter(record["from"] for record in records if "from" in record)),
        "left_out": dict(reasons), "held_out": settings["held_out"], "seed": seed, "data": report.summary(),
    }  # fmt: skip
    if not summary["pairs"]:
        raise ValueError(f"`dataset` has {len(dataset)} questions and gives no pair: {_listed(reasons)}.")
    if process_state().is_main_process:
        wrong = {place: record["rejected"] for place, record in enumerate(records) if "from" in record}
        pairs = kept.select(wrong).map(
            lambda row, number: _pair(row, [*wrong.values()][number]), with_indices=True,
            remove_columns=kept.column_names, features=PAIR_FEATURES,
        )  # fmt: skip
        with TemporaryDirectory(dir=folder) as unfinished:
            file = Path(unfinished) / PAIRS_FILE
            embedded(pairs, Path(unfinished) / "pairs.arrow").to_parquet(file)
            file.replace(Path(folder) / PAIRS_FILE)
        write_report(folder, summary, render_pairs(summary))
    return summary


def _pair(row: dict, wrong: str) -> dict:
    texts = {"prompt": row["question"], "chosen": row["answer"], "rejected": wrong, "image": row["image"]}
    return record_to_pair(texts, row["id"])


def is_wrong(row: dict, answer: str) -> bool:
    """Whether an answer to a question is wrong by the headline score of its type, and is not blank."""
    scores = (score_closed if row["answer_type"] == "closed" else score_open)(answer, row["answer"])
    return bool(answer.strip()) and scores[HEADLINES[row["answer_type"]]] < 1


def _sample(model, processor, rows: list[dict], options: dict, tries: int, seed: int) -> dict[str, dict]:
    """For each id the first sampled answer that is wrong, or that its picture cannot be read."""
    found, chats = {}, {}
    for row in rows:
        try:
            chats[row["id"]] = question_about(open_image(processor, row["image"], row["id"]), row["question"])
        except ValueError as error:
            found[row["id"]] = {"left_out": "the picture cannot be read", "error": str(error)}
    for number in range(tries):
        asked = [row for row in rows if row["id"] not in found]
        if not asked:
            break
        digest = hashlib.sha256("\n".join([str(seed), str(number), *(row["id"] for row in asked)]).encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        for row, answer in zip(asked, answer_batch(model, processor, [chats[row["id"]] for row in asked], **options)):
            if is_wrong(row, answer.text):
                found[row["id"]] = {"rejected": answer.text, "from": "model"}
    return found


class _OtherAnswers:
    """The true answers of other pictures to the same question."""

    def __init__(self, dataset: Dataset, seed: int):
        self._seed, self._answers = seed, defaultdict(dict)  # of each question: pictures by answer
        for row in dataset.remove_columns("image"):
            answers = self._answers[normalize_answer(row["question"])]
            answers.setdefault(row["answer"], set()).add(row["image_id"])

    def wrong_for(self, row: dict) -> str | None:
        """One of those that are wrong here, each as probable; `None` if there is none."""
        answers = self._answers[normalize_answer(row["question"])]
        own = random.Random(f"{self._seed} {row['id']}")
        for answer in own.sample(sorted(answers), len(answers)):
            if answers[answer] != {row["image_id"]} and is_wrong(row, answer):
                return answer
        return None


def render_pairs(summary: dict) -> str:
    """The summary as a few lines."""
    lines = [f"{summary['pairs']} pairs of {summary['questions']} questions; rejected: "
             + ", ".join(f"{count} from {source}" for source, count in summary["rejected_from"].items())]  # fmt: skip
    lines += [f"left out: {_listed(summary['left_out'])}"] * bool(summary["left_out"])
    lines += [f"{count} pictures are also in {name}" for name, count in summary["held_out"].items()]
    if not summary["held_out"]:
        lines.append("no pictures were compared with data to be evaluated on")
    return "\n".join([*lines, summary["data"]]) + "\n"


def _listed(counts: Mapping) -> str:
    return ", ".join(f"{count} ({reason})" for reason, count in counts.items())


__all__ = ["PAIRS_FILE", "PAIR_DECODING", "REJECTED", "build_pairs", "is_wrong", "render_pairs"]
