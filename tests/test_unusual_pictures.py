"""Distances of pictures: against the covariance written out, false alarms by simulation, and photographs."""

import math
from dataclasses import replace
from pathlib import Path

import gradio
import numpy as np
import pytest
from PIL import Image

from lladamedv.evaluation.answer_sets import picture_distances, picture_warning
from lladamedv.evaluation.answering import encode_chats
from lladamedv.evaluation.unusual_pictures import FEWEST_PICTURES, PictureModel, decode, picture_features
from lladamedv.modeling_lladamedv.continuous_batching_lladamedv import ContinuousBatch
from lladamedv.processing.phantoms import PhantomVQA


GRADIO = Path(gradio.__path__[0]) / "media_assets/images"  # a tower and animals


def features(rng, count):
    """Eight values of very different spread, and two that follow from others."""
    values = rng.standard_normal((count, 8)) * np.geomspace(1, 0.01, 8)
    return np.concatenate([values, values[:, :2] @ rng.standard_normal((2, 2))], axis=1) + 3


def test_distance_is_that_of_the_covariance():
    rng = np.random.default_rng(0)
    model = PictureModel.fit(features(rng, 400))
    directions = decode(model.directions).reshape(len(model.variances), -1)
    along = directions.T @ directions
    covariance = directions.T @ np.diag(model.variances) @ directions + model.rest * (np.eye(10) - along)
    asked = features(rng, 50)
    centered = asked - decode(model.mean)
    expected = np.sqrt(np.einsum("ni,ij,nj->n", centered, np.linalg.inv(covariance), centered))
    assert model.distance(asked) == pytest.approx(expected, rel=0.02)  # directions are kept in 16 bits


def test_false_alarms_are_one_in_a_hundred():
    """Over many calibrations, each with one new picture: at most 1 %, and not far below."""
    trials, alarms = 3000, 0
    rng = np.random.default_rng(0)
    for _ in range(trials):
        values = rng.standard_normal((FEWEST_PICTURES + 3, 4))  # 100 give the threshold, which is their largest
        model = PictureModel.fit(values[:-1])
        alarms += model.distance(values[-1:])[0] > model.threshold
    spread = 4 * math.sqrt(0.01 * 0.99 / trials)
    assert 0.0099 - spread < alarms / trials < 0.0099 + spread
    assert PictureModel.fit(values[: FEWEST_PICTURES - 1]) is None


def pixels(processor, images):
    return processor.image_processor(images, return_tensors="pt")["pixel_values"]


def test_photographs_warn_and_phantoms_do_not(shipped, photograph):
    model, processor = shipped
    for file in (photograph, *(GRADIO / name for name in ("tower.jpg", "lion.jpg", "cheetah1.jpg"))):
        for image in (Image.open(file).convert("RGB"), Image.open(file).convert("L").convert("RGB")):
            assert "unlike those of phantoms" in picture_warning(model, pixels(processor, [image])), file
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert picture_warning(model, pixels(processor, [Image.fromarray(noise)])) is not None
    phantoms = pixels(processor, [each.image for each in PhantomVQA(9_000, 300)])
    told = model.calibration.picture_model.distance(picture_features(model, phantoms))
    # With a chance of 1 % each, more than 9 of 300 have one of 0.1 %.
    assert (told > model.calibration.picture_model.threshold).sum() <= 9
    assert picture_warning(model, None) is None


def test_a_picture_among_others_is_found(shipped, photograph):
    model, processor = shipped
    phantom = PhantomVQA(9_000, 1)[0].image
    assert picture_warning(model, pixels(processor, [phantom, Image.open(photograph)])) is not None
    assert picture_warning(model, pixels(processor, [phantom, phantom])) is None


@pytest.mark.parametrize(
    "change",
    [
        {"rest": 0.0}, {"threshold": math.inf}, {"mean": "!"}, {"mean": ""}, {"mean": "AHwAfAB8"}, {"directions": ""},
        {"variances": [math.nan]},
    ],
)  # fmt: skip
def test_numbers_of_others_are_checked(change):
    model = PictureModel.fit(np.random.default_rng(0).standard_normal((FEWEST_PICTURES, 3)))
    with pytest.raises(Exception, match="validate_values"):
        replace(model, **change)


class Streamer:
    def put_descriptions(self, distances):
        self.distances = distances

    def put(self, tokens):
        pass

    def end(self):
        pass


def test_a_batch_measures_pictures_in_the_run_of_the_tower_that_it_needs_anyway(shipped, photograph):
    """Alone, beside others and when asked about again, a picture is as far from the calibration as by itself."""
    model, processor = shipped
    phantoms = [each.image for each in PhantomVQA(9_000, 2)]
    runs, hook = [], model.model.vision_tower.register_forward_hook(lambda _, args, __: runs.append(len(args[0])))
    batch = ContinuousBatch(model, describe_pictures=picture_distances(model))
    prompts = [[phantoms[0]], [Image.open(photograph), phantoms[0], phantoms[1]], [phantoms[1]]]
    for images in prompts:
        content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": "Is it round?"}]
        inputs = encode_chats(model, processor, [[{"role": "user", "content": content}]])
        streamer = Streamer()
        batch.submit(**inputs, max_new_tokens=8, streamer=streamer)
        batch.step()
        alone = model.calibration.picture_model.distance(picture_features(model, pixels(processor, images)))
        assert streamer.distances == pytest.approx(alone, rel=1e-3)
    hook.remove()
    assert sum(runs) == 3 + sum(map(len, prompts))  # the batch's, and those of this test
