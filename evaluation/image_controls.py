"""Whether scores come from the pictures: the same questions about another picture, an empty one and noise.

A model can be right about most closed questions without a look at the picture, and give the same answers to noise. What
a benchmark says about seeing is how much is lost with the wrong picture.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration
from lladamedv.processing import LLaDAMedVProcessor

from .answering import encode_chats, open_image, question_about
from .medical_vqa.medical_vqa import ANSWER_TYPES, HEADLINES, normalize_answer, score_closed, score_open
from .reports import interval_of_mean, markdown_table


CONTROLS = {
    "shuffled": "the picture of another question",
    "blank": "one colour, the median of the question's own picture",
    "noise": "uniform noise in the size of the question's own picture",
}


def noise_picture(size: tuple[int, int], random: np.random.Generator) -> Image.Image:
    """Uniform noise, `size` being width and height."""
    return Image.fromarray(random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


class ControlPictures:
    """The pictures that stand in for a question's own; the same whenever a run continues.

    Args:
        processor: reads pictures.
        dataset: of all questions, not decoded.
        seed: of the noise, and of the cycle through all pictures in which each is replaced by the next.

    Raises:
        ValueError: for fewer than two different pictures.
    """

    def __init__(self, processor: LLaDAMedVProcessor, dataset: Dataset, seed: int):
        self._processor, self._dataset, self._seed = processor, dataset, seed
        self._places = {image: place for place, image in enumerate(dataset["image_id"])}
        images = sorted(self._places)
        if len(images) < 2:
            raise ValueError(f"`dataset` has {len(images)} picture; `image_controls` need two to exchange.")
        cycle = [images[number] for number in np.random.default_rng(seed).permutation(len(images))]
        self._others = dict(zip(cycle, [*cycle[1:], cycle[0]]))

    def replace(self, control: str, row: dict) -> dict:
        """A question with the picture of a control; with its own if that cannot be read, as it is no answer then."""
        if control == "shuffled":
            return {**row, "image": self._dataset[self._places[self._others[row["image_id"]]]]["image"]}
        try:
            image = open_image(self._processor, row["image"], row["id"])
        except ValueError:
            return row
        if control == "blank":
            median = np.median(np.asarray(image), axis=(0, 1)).astype(int).tolist()
            return {**row, "image": Image.new("RGB", image.size, tuple(median))}
        digest = hashlib.sha256(f"{self._seed} {row['id']}".encode()).digest()
        return {**row, "image": noise_picture(image.size, np.random.default_rng([*digest]))}

    @torch.no_grad()
    def reliance(self, model: LLaDAMedVForConditionalGeneration, row: dict, answer: str) -> float:
        """The log-likelihood of an answer that was not generated, with a capital letter or without, in nats, less that
        behind the blank picture."""
        likelihoods = []
        for each in (row, self.replace("blank", row)):
            chat = question_about(open_image(self._processor, each["image"], row["id"]), row["question"])
            inputs = encode_chats(model, self._processor, [chat])
            candidates = [answer, answer.capitalize()]
            scores = model.score(**inputs, candidates=candidates, tokenizer=self._processor.tokenizer)
            likelihoods.append(float(scores.log_likelihood.logsumexp(dim=1)))
        return likelihoods[0] - likelihoods[1]


def summarize_controls(records: Sequence[dict], bootstrap_samples: int, seed: int) -> dict:
    """What is lost without the right picture.

    Args:
        records: lines of predictions with their `controls`, all with a reference.
        bootstrap_samples, seed: of the 95 % intervals, which draw images.

    Returns:
        `rests_on_pictures`: whether the interval of the drop with shuffled pictures, over all questions, lies above 0;
        `None` without an interval. For each of [`CONTROLS`], and for closed questions, open ones and `all`: `count` of
        those answered either way, `score` (closed accuracy or open recall, from 0 to 100) with the control, `drop` from
        that with the question's own picture to it, both with `_ci95`, of which that of the drop is paired by question,
        and `same_answers` (%). `image_reliance`: of the same groups `count`, `mean` with `mean_ci95` and `median` in
        nats, and `above_0` (%).
    """
    found = {control: {} for control in (*CONTROLS, "image_reliance")}
    for group in (*ANSWER_TYPES, "all"):
        members = [record for record in records if group in (record["answer_type"], "all")]
        for control in CONTROLS:
            rows = [
                (_score(record, record["prediction"]), _score(record, given), record["image_id"], _same(record, given))
                for record in members
                if (given := record["controls"][control]["prediction"]) is not None
            ]
            if rows:
                found[control][group] = {
                    "count": len(rows),
                    **_mean("score", [(row[1], row[2]) for row in rows], bootstrap_samples, seed, 100),
                    **_mean("drop", [(row[0] - row[1], row[2]) for row in rows], bootstrap_samples, seed, 100),
                    "same_answers": 100 * statistics.fmean(row[3] for row in rows),
                }
        values = [
            (record["image_reliance"], record["image_id"])
            for record in members
            if record.get("image_reliance") is not None
        ]
        if values:
            found["image_reliance"][group] = {
                "count": len(values), **_mean("mean", values, bootstrap_samples, seed),
                "median": statistics.median(value for value, _ in values),
                "above_0": 100 * statistics.fmean(value > 0 for value, _ in values),
            }  # fmt: skip
    interval = found["shuffled"].get("all", {}).get("drop_ci95")
    return {"rests_on_pictures": None if interval is None else interval[0] > 0, **found}


def _score(record: dict, prediction: str) -> float:
    scores = {"closed": score_closed, "open": score_open}[record["answer_type"]](prediction, record["reference"])
    return scores[HEADLINES[record["answer_type"]]]


def _same(record: dict, prediction: str) -> bool:
    return normalize_answer(record["prediction"]) == normalize_answer(prediction)


def _mean(name: str, values: Sequence[tuple[float, str]], samples: int, seed: int, factor: float = 1) -> dict:
    interval = interval_of_mean(values, samples, seed)
    return {
        name: factor * statistics.fmean(value for value, _ in values),
        f"{name}_ci95": None if interval is None else [factor * end for end in interval],
    }


def finding(controls: dict) -> str:
    """Whether the answers come from the pictures, in a sentence that says by what criterion."""
    if "all" not in controls["shuffled"]:
        return "**NOT KNOWN TO COME FROM THE PICTURES: no question was answered with another picture.**"
    of = controls["shuffled"]["all"]
    told = (
        f"with {CONTROLS['shuffled']} the score is {of['score']:.1f} instead of {of['score'] + of['drop']:.1f} and "
        f"{of['same_answers']:.1f} % of the answers stay the same; the drop is {of['drop']:.1f}"
    )
    if controls["rests_on_pictures"] is None:
        return f"**NOT KNOWN TO COME FROM THE PICTURES: {told}, without an interval.**"
    told += f", 95 % interval {_interval(of['drop_ci95'])}"
    if controls["rests_on_pictures"]:
        return f"The score comes from the pictures: {told}, above 0."
    if of["same_answers"] == 100:
        return f"**THE ANSWERS DO NOT DEPEND ON THE PICTURES: {told}.**"
    return f"**NOT SHOWN TO COME FROM THE PICTURES: {told}, not above 0.**"


def control_tables(controls: dict) -> list[str]:
    """Tables for the summary."""
    rows = [
        [
            control, group, _value(of, "score"), f"{of['score'] + of['drop']:.2f}", _value(of, "drop"),
            f"{of['same_answers']:.1f}", str(of["count"]),
        ]
        for control in CONTROLS
        for group, of in controls[control].items()
    ]  # fmt: skip
    reliance = [
        [group, _value(of, "mean"), f"{of['median']:.2f}", f"{of['above_0']:.1f}", str(of["count"])]
        for group, of in controls["image_reliance"].items()
    ]
    return [
        markdown_table(
            ["pictures", "questions", "score", "with their own", "drop, paired", "same answers, %", "n"], rows
        ),
        "Pictures: " + "; ".join(f"{name}, {meaning}" for name, meaning in CONTROLS.items()) + ". The score is closed "
        "accuracy or open recall, in brackets 95 % intervals.",
        markdown_table(["image reliance, nats", "mean", "median", "above 0, %", "n"], reliance),
    ]  # fmt: skip


def _value(of: dict, name: str) -> str:
    interval = of[f"{name}_ci95"]
    return f"{of[name]:.2f}" + ("" if interval is None else f" ({_interval(interval)})")


def _interval(interval: Sequence[float]) -> str:
    return f"{interval[0]:.2f} to {interval[1]:.2f}"


__all__ = ["CONTROLS", "ControlPictures", "control_tables", "finding", "noise_picture", "summarize_controls"]
