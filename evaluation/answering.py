"""A model's answers to a batch of chats: the text, how sure the model is, and what the answer cost.

Everything here that asks a model (the benchmarks, the analysis of decoding, the lmms-eval plug-in) asks it this way.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from transformers import BatchFeature

from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration
from lladamedv.modeling_lladamedv.generation_lladamedv import LLaDAMedVGenerationOutput
from lladamedv.modeling_lladamedv.scoring_lladamedv import LLaDAMedVScoreOutput
from lladamedv.processing import LLaDAMedVProcessor
from lladamedv.processing.datasets import image_source


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: without special tokens and without white space around it.
        confidence: geometric mean of the probabilities of its tokens, in [0, 1]; `None` if nothing was decided.
        num_tokens: its length up to the token that ended it.
        num_forwards: forward passes that it took part in.
        seconds: wall-clock time of its batch, divided by the batch's size.
        image_reliance: of `generate`, in nats, if it was asked for (`output_image_reliance`) and there is one.
    """

    text: str
    confidence: float | None
    num_tokens: int
    num_forwards: int
    seconds: float
    image_reliance: float | None = None

    def as_record(self) -> dict:
        """The answer as a part of a line of predictions, where its text is called `prediction`."""
        fields = asdict(self)
        if self.image_reliance is None:
            del fields["image_reliance"]
        return {"prediction": fields.pop("text"), **fields}


def encode_chats(
    model: LLaDAMedVForConditionalGeneration, processor: LLaDAMedVProcessor, chats: Sequence[list[dict]], **options
) -> BatchFeature:
    """The model's inputs for chats, a row each, on its device; `options` are the processor's."""
    return processor.apply_chat_template(
        list(chats), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True, **options},
    ).to(model.device)  # fmt: skip


def answer_batch(
    model: LLaDAMedVForConditionalGeneration, processor: LLaDAMedVProcessor, chats: Sequence[list[dict]], **options
) -> list[Answer]:
    """Answer all chats in one batch. A row's answer does not depend on what it is batched with.

    Args:
        model, processor: as loaded.
        chats: each a list of messages with their images, as `apply_chat_template` takes them.
        options: those of `generate`.

    Returns:
        An [`Answer`] for each chat.

    Raises:
        ValueError: as `generate` does.
    """
    model.eval()  # dropout would make answers random
    started = time.perf_counter()
    inputs = encode_chats(model, processor, chats)
    output = model.generate(**inputs, tokenizer=processor.tokenizer, **options, return_dict_in_generate=True)
    return read_answers(processor, output, inputs["input_ids"].shape[1], time.perf_counter() - started)


def read_answers(
    processor: LLaDAMedVProcessor, output: LLaDAMedVGenerationOutput, prompt_length: int, seconds: float
) -> list[Answer]:
    """The answers that `generate` returned, behind prompts of a length, for all of which it took some seconds."""
    texts = processor.batch_decode(output.sequences[:, prompt_length:], skip_special_tokens=True)
    reliance = output.answer_confidence * math.nan if output.image_reliance is None else output.image_reliance
    confidences, reliance = (
        [None if math.isnan(value) else value for value in values.tolist()]
        for values in (output.answer_confidence, reliance)
    )
    forwards = output.num_forwards.tolist()
    lengths = (output.tokens_per_forward * output.num_forwards).round().long().tolist()
    rows = zip(texts, confidences, lengths, forwards, reliance)
    return [Answer(text.strip(), *row, seconds / len(texts), relies) for text, *row, relies in rows]


@torch.no_grad()
def candidate_probabilities(
    model: LLaDAMedVForConditionalGeneration, processor: LLaDAMedVProcessor, inputs: Mapping, candidates: Sequence[str]
) -> tuple[torch.DoubleTensor, LLaDAMedVScoreOutput]:
    """How probable each candidate is among all of them, by the likelihood of its text.

    Models are tuned to answers with a capital first letter or a small one: both are added up.

    Args:
        model, processor: as loaded.
        inputs: of one chat, as the processor returns them.
        candidates: the answers, each differently.

    Returns:
        `(candidates,)`, of sum 1, and the scores of all spellings.
    """
    spellings = [[*dict.fromkeys((text[:1].lower() + text[1:], text[:1].upper() + text[1:]))] for text in candidates]
    texts = [text for each in spellings for text in each]
    scores = model.score(**inputs, candidates=texts, tokenizer=processor.tokenizer)
    likelihoods = scores.log_likelihood[0].split([len(each) for each in spellings])
    return torch.stack([each.logsumexp(dim=0) for each in likelihoods]).softmax(dim=0), scores


def device_name(model: LLaDAMedVForConditionalGeneration) -> str:
    """The hardware that a model runs on, as reports call it."""
    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    if model.device.type == "cpu":
        return f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}"
    return model.device.type


def question_about(image, question: str) -> list[dict]:
    """A chat of one question about one image."""
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def open_image(processor: LLaDAMedVProcessor, image, question_id: str):
    """A question's image as an 8-bit RGB `PIL.Image`, read as everywhere (`fetch_images`), also from an archive.

    Raises:
        ValueError: naming the question, if it cannot be read.
    """
    try:
        return processor.image_processor.fetch_images(image_source(image))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"The image of question {question_id!r} cannot be read: {error}") from error


__all__ = [
    "Answer", "answer_batch", "candidate_probabilities", "device_name", "encode_chats", "open_image", "question_about",
    "read_answers",
]  # fmt: skip
