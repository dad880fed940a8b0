"""A model's answers to the open-ended biomedical chat benchmark, as a file that `judge_answers` takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration
from lladamedv.processing import LLaDAMedVProcessor

from .answering import answer_batch, open_image, question_about, run_settings
from .runs import PREDICTIONS_FILE, run_items


PAPER_DECODING = {"max_new_tokens": 256, "block_length": 64, "steps": 256}


def answer_chat_benchmark(
    model: LLaDAMedVForConditionalGeneration,
    processor: LLaDAMedVProcessor,
    records: Sequence[dict],
    folder: str | Path,
    *,
    model_name: str,
    options: dict | None = None,
    batch_size: int = 1,
) -> Path:
    """Answer the questions of the benchmark. Interrupted, it goes on where it stopped; `accelerate launch` shares it.

    Args:
        model, processor: as loaded; the model where it shall run.
        records: of `load_chat_benchmark`, with paths of images that are there.
        folder: of this run.
        model_name: what to call the model.
        options: of `generate`; by default the paper's for chat, a canvas of 256 tokens in blocks of 64 and 256 steps.
        batch_size: questions at a time.

    Returns:
        The file of answers, `predictions.jsonl`.

    Raises:
        ValueError: before anything is answered, for values that are not allowed, a folder of another run, or an image
            that cannot be read (when it is reached; what is answered stays).
    """
    options = PAPER_DECODING if options is None else options
    asked = [{name: record[name] for name in ("id", "image", "question")} for record in records]
    settings = {"model": model_name, **run_settings(model, processor, options, asked)}
    provenance = {name: settings[name] for name in ("model", "model_revision", "decoding")}

    def answer(places: list[int]) -> list[dict]:
        rows = [records[place] for place in places]
        images = [open_image(processor, row["image"], row["id"]) for row in rows]
        chats = [question_about(image, row["question"]) for image, row in zip(images, rows)]
        return [
            {
                "id": row["id"], "image_id": row["image_id"], "question": row["question"], **given.as_record(),
                **provenance,
            }
            for row, given in zip(rows, answer_batch(model, processor, chats, **options))
        ]  # fmt: skip

    run_items([record["id"] for record in records], answer, folder, settings, batch_size)
    return Path(folder) / PREDICTIONS_FILE


__all__ = ["PAPER_DECODING", "answer_chat_benchmark"]
