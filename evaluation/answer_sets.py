"""Sets of answers with a guarantee, for questions whose possible answers are known, and the file that holds it.

A model is calibrated once, on questions with known answers (`lladamedv calibrate`). `calibration.json` then lies beside
its weights and says what it rests on. From then on a set holds every answer that is not too improbable, and always the
most probable one: the true one is in it for at least 1 - alpha of the questions that are like those. A set of one
answer is an answer; a larger one is none.
"""

import hashlib
import json
import logging
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from PIL import Image

from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration
from lladamedv.modeling_lladamedv.stored_weights_lladamedv import read_json
from lladamedv.processing import LLaDAMedVProcessor
from lladamedv.processing.datasets.columns import squash

from .answering import candidate_probabilities, encode_chats, question_about
from .conformal import fewest_pictures, promised
from .run_settings import model_fingerprint
from .runs import replace_file
from .unusual_pictures import (
    FALSE_ALARMS,
    FEWEST_PICTURES,
    PictureModel,
    count_features,
    picture_features,
    tower_features,
)


logger = logging.getLogger(__name__)
CALIBRATION_FILE = "calibration.json"
YES_NO = ("Yes", "No")
_FORMAT = 1


@dataclass(frozen=True)
class AnswerSet:
    """What may be the answer to a question.

    Attributes:
        answers: the candidates that are not too improbable, the most probable first.
        probabilities: of each candidate among all of them.
        alpha: the true answer is missing from at most this share of the sets for questions like those calibrated on.
        group: the group of questions within which that holds; `None` for all questions together.
        notes: why the guarantee may not hold here, or says nothing, a sentence each.
        warning: that the picture is unlike those calibrated on, if it is.
    """

    answers: tuple[str, ...]
    probabilities: dict[str, float]
    alpha: float
    group: str | None
    notes: tuple[str, ...]
    warning: str | None

    @property
    def abstained(self) -> bool:
        """Whether the set gives no answer, which is whenever it holds more than one.

        `abstention_threshold` is for generated answers and changes nothing here.
        """
        return len(self.answers) > 1

    @property
    def summary(self) -> str:
        """All probabilities, and the promise, in one line."""
        each = ", ".join(f"{text} {value:.1%}" for text, value in self.probabilities.items())
        which = "questions" if self.group is None else f"questions of the group {self.group!r}"
        promise = f"at least {promised(self.alpha)} of the sets hold the true answer"
        return f"{each}; {promise}, for {which} like those calibrated on"

    def __str__(self) -> str:
        return "not sure: " * self.abstained + " or ".join(self.answers)


@strict
@dataclass(kw_only=True)
class Calibration:
    """What a model was calibrated on, and the thresholds that came of it; what `calibration.json` holds.

    Args:
        alpha: share of sets that may lack the true answer, in (0, 1).
        dataset, revision, split, data_sha256: what it was calibrated on.
        model_sha256: digest of the weights, in whatever dtype they are loaded.
        prompt_sha256: digest of a question as the model gets it, in ids.
        dtype: that the answers were scored in.
        version: of this package.
        candidates: lists of answers; a question has those of the one list that its answer is in.
        pictures, questions: how many were calibrated on.
        left_out: questions whose answer is in no list, or whose picture could not be read.
        threshold: of 1 - the true answer's probability; `None` for too few pictures, with which sets hold everything.
        group_by: the column that makes the groups.
        group_pictures: how many pictures each group has.
        group_thresholds: of the groups that have enough.
        picture_model: `None` where there were too few pictures for it.
    """

    alpha: float
    dataset: str
    revision: str | None
    split: str
    data_sha256: str
    model_sha256: str
    prompt_sha256: str
    dtype: str
    version: str
    candidates: list[list[str]]
    pictures: int
    questions: int
    left_out: int
    threshold: float | None
    group_by: str | None
    group_pictures: dict[str, int]
    group_thresholds: dict[str, float]
    picture_model: PictureModel | None

    def validate_values(self):
        check_alpha(self.alpha)
        check_candidates(self.candidates)
        shown = [self.dataset, self.split, self.dtype, self.group_by or "", *self.group_pictures]
        for text in (*shown, *(text for texts in self.candidates for text in texts)):
            if not text.isprintable():  # but could act on a terminal
                raise ValueError(f"{text!r:.200} holds what cannot be printed")
        for threshold in (self.threshold, *self.group_thresholds.values()):
            if threshold is not None and not 0 <= threshold <= 1:
                raise ValueError(f"a threshold is {threshold}; allowed are numbers in [0, 1]")
        if unknown := self.group_thresholds.keys() - self.group_pictures.keys():
            raise ValueError(f"`group_pictures` lacks {sorted(unknown)!r:.200}")

    @property
    def sha256(self) -> str:
        """Of all that it holds."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(cls, folder: str | Path) -> "Calibration | None":
        """The calibration in a model's folder; `None` if there is none.

        Raises:
            ValueError: for a file that holds anything but a calibration, whole and within its bounds.
        """
        file = Path(folder) / CALIBRATION_FILE
        if not file.exists():
            return None
        content = read_json(file)
        try:
            if (found := content.pop("format", None)) != _FORMAT:
                raise ValueError(f"`format` is {found!r:.200}; allowed is {_FORMAT}")
            if isinstance(content.get("picture_model"), dict):
                content["picture_model"] = PictureModel(**content["picture_model"])
            return cls(**content)
        except (TypeError, ValueError, StrictDataclassError) as error:
            raise ValueError(f"{str(file)!r} is no calibration: {' '.join(str(error).split()):.400}") from error

    def save(self, folder: str | Path) -> None:
        """Write `calibration.json` into a model's folder; one that is there is replaced."""
        replace_file(Path(folder) / CALIBRATION_FILE, json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n")

    def list_of(self, candidates: Sequence[str]) -> list[str]:
        """The list of candidates that was calibrated, in whatever order and case it is given.

        Raises:
            ValueError: if there is none: nothing is known about other candidates.
        """
        for known in self.candidates:
            if sorted(map(squash, known)) == sorted(map(squash, candidates)):
                return known
        lists = " or ".join(map(",".join, self.candidates))
        raise ValueError(
            f"`candidates` is {','.join(candidates)}; the model is calibrated for {lists}. `lladamedv calibrate "
            "--candidates` calibrates it for others."
        )

    def choose(self, candidates: Sequence[str], probabilities: Sequence[float], group: str | None) -> tuple:
        """The answers of a set; the group whose threshold that is; and what is to be said about it.

        Sets by a threshold alone may be empty, where a model is right more often than it must; the most probable answer
        in them can only add to the coverage.
        """
        threshold, notes, fewest = self.threshold, [], fewest_pictures(self.alpha)
        if group in self.group_thresholds:
            threshold = self.group_thresholds[group]
        elif group is not None:
            notes.append(
                f"The calibration has {self.group_pictures.get(group, 0)} pictures of the group {group!r}, fewer than "
                f"the {fewest} needed: the set is that of all questions, and promises nothing within the group."
            )
            group = None
        if threshold is None:
            threshold = math.inf
            notes.append(
                f"The calibration has {self.pictures} pictures, fewer than the {fewest} that an alpha of "
                f"{self.alpha:g} needs: the set holds every candidate."
            )
        ranked = sorted(zip(probabilities, candidates), key=lambda each: -each[0])
        chosen = [text for value, text in ranked if 1 - value <= threshold]
        return tuple(chosen or [ranked[0][1]]), group, tuple(notes)

    def statement(self) -> str:
        """What the guarantee rests on, for a model's card."""
        source = f"{self.dataset} ({self.split})" + (f", revision {self.revision}" if self.revision else "")
        basis = (
            f"`{CALIBRATION_FILE}` makes sets of answers with these weights (`lladamedv ask --candidates`), of "
            f"{' or '.join(map(', '.join, self.candidates))}. It rests on {self.questions} questions about "
            f"{self.pictures} pictures of {source}."
        )
        promise = "**These are too few for any guarantee: the sets hold every candidate.**"
        if self.threshold is not None:
            promise = (
                f"For questions and pictures like these, at least {promised(self.alpha)} of the sets hold the true "
                "answer. For others, such as pictures of another hospital or device, that is not known."
            )
        named = ", ".join(
            f"{name} ({count} pictures{'' if name in self.group_thresholds else ': too few'})"
            for name, count in sorted(self.group_pictures.items())
        )
        groups = f"The same holds within each group by {self.group_by} that has enough pictures: {named}."
        unusual = f"The software warns of pictures farther from these than {promised(FALSE_ALARMS)} of them."
        if self.picture_model is None:
            unusual = f"Unusual pictures are not recognised: that needs {FEWEST_PICTURES} pictures."
        paragraphs = (f"{basis} {promise}", groups if named else "", unusual)
        return "\n\n".join(textwrap.fill(each, 120, break_on_hyphens=False) for each in paragraphs if each)


def check_alpha(alpha: float) -> None:
    """
    Raises:
        ValueError: if it is not between 0 and 1.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"`alpha` is {alpha}; allowed are numbers above 0 and below 1.")


def check_candidates(lists: Sequence[Sequence[str]]) -> None:
    """
    Raises:
        ValueError: for a list of fewer than two answers, or an answer that is in two places, whatever its case and
            marks: lists would not follow from the answers.
    """
    names = [squash(text) for candidates in lists for text in candidates]
    if not names or min(map(len, lists)) < 2 or "" in names or len({*names}) < len(names):
        raise ValueError(
            f"`candidates` is {' and '.join(map(','.join, lists))!r:.200}; allowed are lists of two or more answers, "
            "each with a letter or digit, and none twice."
        )


def attach_calibration(
    model: LLaDAMedVForConditionalGeneration, processor: LLaDAMedVProcessor, folder: str | Path | None = None
) -> None:
    """Let a model use a calibration, as `model.calibration`, if it was made for this model.

    One that was made for other weights or another prompt is not used, and a warning says so.

    Args:
        model, processor: as loaded.
        folder: of the calibration; by default it is the one that the model has, which its weights may have left behind.

    Raises:
        ValueError: as [`Calibration.load`], and for one whose pictures have other features than the model's.
    """
    found = calibration_of(model) if folder is None else Calibration.load(folder)
    model.calibration = None
    if found is None:
        return
    for what, there, here in (
        ("set of weights", found.model_sha256, lambda: model_fingerprint(model, any_dtype=True)),
        ("prompt", found.prompt_sha256, lambda: prompt_digest(processor)),
    ):
        if there != (here := here()):
            logger.warning(
                "The calibration on %s is not used, because it was made for another %s: %.12s there (%s), %.12s here "
                "(%s). `lladamedv calibrate` makes a new one.",
                found.dataset, what, there, found.dtype, here, str(model.dtype).removeprefix("torch."),
            )  # fmt: skip
            return
    if found.picture_model and found.picture_model.num_features != (count := count_features(model.config)):
        raise ValueError(
            f"`picture_model` of the calibration on {found.dataset} has {found.picture_model.num_features} features; "
            f"the model has {count}."
        )
    model.calibration = found


def calibration_of(model: LLaDAMedVForConditionalGeneration) -> Calibration | None:
    """The calibration that a model uses; `None` for one without."""
    return getattr(model, "calibration", None)


def answer_set(
    model: LLaDAMedVForConditionalGeneration,
    processor: LLaDAMedVProcessor,
    image: Image.Image,
    question: str,
    candidates: Sequence[str] = YES_NO,
    group: str | None = None,
) -> AnswerSet:
    """Which of some answers may be the true one, with the guarantee of the model's calibration.

    Args:
        model, processor: as [`load_model`] gives them, or after [`attach_calibration`].
        image, question: what is asked.
        candidates: the possible answers, all those of a list that was calibrated.
        group: of the question, as the calibration's column `group_by` calls it.

    Raises:
        ValueError: if the model has no calibration, or not for these candidates.
    """
    calibration = calibration_of(model)
    if calibration is None:
        raise ValueError("The model has no calibration, which sets of answers need: `lladamedv calibrate` makes one.")
    if group is not None and calibration.group_by is None:
        raise ValueError(f"`group` is {group!r}, but the model's calibration has no groups.")
    candidates = calibration.list_of(candidates)
    inputs = encode_chats(model, processor, [question_about(image, question)])
    probabilities = candidate_probabilities(model, processor, inputs, candidates)[0].tolist()
    answers, group, notes = calibration.choose(candidates, probabilities, group)
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype != calibration.dtype:
        notes += (f"The calibration was made in {calibration.dtype}, and the model runs in {dtype}.",)
    warning = picture_warning(model, inputs.get("pixel_values"))
    return AnswerSet(answers, dict(zip(candidates, probabilities)), calibration.alpha, group, notes, warning)


def picture_warning(model: LLaDAMedVForConditionalGeneration, pixel_values: torch.Tensor | None) -> str | None:
    """A sentence for users, if a picture is unlike those that the model was calibrated on; else `None`.

    Args:
        model: with or without a calibration.
        pixel_values: as the processor returns them.
    """
    calibration = calibration_of(model)
    if pixel_values is None or calibration is None or calibration.picture_model is None:
        return None
    return distance_warning(model, calibration.picture_model.distance(picture_features(model, pixel_values)).tolist())


def picture_distances(
    model: LLaDAMedVForConditionalGeneration,
) -> Callable[[Sequence[torch.Tensor]], list[float]] | None:
    """For `describe_pictures` of a `ContinuousBatch`: how far pictures are from those that the model was calibrated on,
    which [`distance_warning`] puts into words. `None` for a model without such a calibration."""
    calibration = calibration_of(model)
    if calibration is None or calibration.picture_model is None:
        return None
    return lambda states: calibration.picture_model.distance(tower_features(states)).tolist()


def distance_warning(model: LLaDAMedVForConditionalGeneration, distances: Sequence[float]) -> str | None:
    """[`picture_warning`], from what [`picture_distances`] has found of each picture."""
    calibration, distance = calibration_of(model), max(distances, default=0.0)
    if not distances or distance <= calibration.picture_model.threshold:
        return None
    return (
        f"The picture is unlike those of {calibration.dataset} that the model was calibrated on (distance "
        f"{distance:.1f}; {promised(FALSE_ALARMS)} of them are within {calibration.picture_model.threshold:.1f}): its "
        "answers may mean nothing, however sure it is."
    )


def prompt_digest(processor: LLaDAMedVProcessor) -> str:
    """Tells templates, tokenizers and numbers of image tokens apart."""
    chat = question_about(Image.new("RGB", (96, 64)), "Is there a lesion?")
    ids = processor.apply_chat_template([chat], add_generation_prompt=True, tokenize=True, return_dict=True)
    return hashlib.sha256(json.dumps([*map(int, ids["input_ids"][0])]).encode()).hexdigest()


__all__ = [
    "CALIBRATION_FILE", "YES_NO", "AnswerSet", "Calibration", "answer_set", "attach_calibration", "calibration_of",
    "check_alpha", "check_candidates", "distance_warning", "picture_distances", "picture_warning", "prompt_digest",
]  # fmt: skip
