"""`lladamedv demo`: load the shipped checkpoint, measure it on phantoms it has never seen, and show how it answers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from huggingface_hub.utils import tqdm
from PIL import Image

from lladamedv.evaluation.answering import answer_batch, question_about
from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration
from lladamedv.processing import LLaDAMedVProcessor
from lladamedv.processing.phantoms import KINDS, PhantomExample, PhantomVQA

from .conversation import DEMO_NOTICE
from .explanation import draw_explanation, explain_answer
from .loading import DEMO_MODEL, load_model
from .paths import check_new_file, whole_file


HELD_OUT_SEED = 9_000  # far from every seed that the recipe `demo_full` draws from
_SHEET = {"chest_xray": "description", "mri": "open", "ct": "closed", "histology": "description", "gross": "open"}


@dataclass(frozen=True)
class DemoScores:
    """Closed accuracy, open token recall and description token recall, each 0 to 1, and the number of questions."""

    closed: float
    open: float
    description: float
    questions: int


def answer(
    model: LLaDAMedVForConditionalGeneration,
    processor: LLaDAMedVProcessor,
    chats: Sequence[list[dict]],
    batch_size: int = 64,
    **options,
) -> list[str]:
    """Answer each chat; `options` are those of `generate`."""
    answers = []
    with tqdm(total=len(chats), unit="question", leave=False, disable=None) as progress:  # in terminals alone
        for start in range(0, len(chats), batch_size):
            batch = answer_batch(model, processor, chats[start : start + batch_size], **options)
            answers += [given.text for given in batch]
            progress.update(len(batch))
    return answers


def score(examples: Sequence[PhantomExample], answers: Sequence[str]) -> DemoScores:
    """Score answers the way the VQA benchmarks do: exact match for closed questions, token recall for the others."""
    values = {kind: [] for kind in KINDS}
    for example, given in zip(examples, answers):
        expected, got = (re.findall(r"[\w-]+", text.lower()) for text in (example.answer, given))
        recall = sum((Counter(expected) & Counter(got)).values()) / len(expected)
        values[example.kind].append(float(expected == got) if example.kind == "closed" else recall)
    means = {kind: sum(numbers) / max(len(numbers), 1) for kind, numbers in values.items()}
    return DemoScores(**means, questions=len(examples))


def evaluate_demo(model, processor, examples: Sequence[PhantomExample], shuffled: bool = False) -> DemoScores:
    """Answer and score `examples`, or, with `shuffled`, the same questions about each other's pictures."""
    # Rolling by a third gives every question another picture, and the same ones each time.
    shift = max(1, len(examples) // 3) if shuffled else 0
    pictured = [*examples[shift:], *examples[:shift]]
    chats = [question_about(other.image, example.question) for other, example in zip(pictured, examples)]
    return score(examples, answer(model, processor, chats))


def run_demo(questions: int = 300, output: Path = Path("lladamedv_demo.png"), report=print) -> dict[str, DemoScores]:
    """Everything that `lladamedv demo` prints and draws.

    Args:
        questions: how many held-out questions to ask, at least 3.
        output: where to save the sheet of pictures.
        report: called with each line of text.

    Returns:
        The scores by what the table's lines are called.

    Raises:
        ValueError: if there are too few questions or `output` cannot be written.
    """
    if questions < 3:
        raise ValueError(f"`questions` is {questions}; at least 3 are needed, one of each kind.")
    check_new_file(output, (".png",))
    model, processor = load_model()
    size = sum(file.stat().st_size for file in DEMO_MODEL.glob("*.safetensors")) / 1e6
    report(
        f"A {model.num_parameters() / 1e6:.1f} M parameter LLaDA-MedV ({size:.1f} MB), {questions} held-out questions"
    )
    examples = list(PhantomVQA(HELD_OUT_SEED, questions, image_size=model.config.vision_config.image_size))
    report(f"{'':24}{'closed accuracy':>18}{'open recall':>14}{'description recall':>21}")
    scores = {}
    for name, shuffled in (("looking at the picture", False), ("blind (shuffled)", True)):
        result = scores[name] = evaluate_demo(model, processor, examples, shuffled)
        report(f"{name:24}{result.closed:18.1%}{result.open:14.1%}{result.description:21.1%}")
    sheet = draw_sheet(model, processor, examples)
    with whole_file(output) as partial:
        sheet.save(partial, "PNG")
    report(f"Pictures, answers and denoising steps: {output}")
    report(DEMO_NOTICE)
    return scores


def one_per_domain(examples: Sequence[PhantomExample]) -> list[PhantomExample]:
    """Up to one example per domain, with questions of different kinds."""
    found = []
    for domain, kind in _SHEET.items():
        matching = [example for example in examples if example.attributes.domain == domain]
        found += sorted(matching, key=lambda each: each.kind != kind)[:1]
    return found


def draw_sheet(model, processor, examples: Sequence[PhantomExample]) -> Image.Image:
    """One picture per domain with a question, the answer, and the canvas after every forward pass."""
    panels = []
    for example in one_per_domain(examples):
        explanation = explain_answer(model, processor, example.image, example.question)
        right = score([example], [explanation.text]) == score([example], [example.answer])
        note = f"Reference: {example.answer} ({'right' if right else 'wrong'})"
        panels.append(np.asarray(draw_explanation(explanation, scale=1.4, note=note)))
    return Image.fromarray(np.vstack(panels))  # all are of one width
