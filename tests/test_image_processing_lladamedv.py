import io

import numpy as np
import pytest
import torch
from PIL import Image

from lladamedv import LLaDAMedVImageProcessor
from lladamedv.processing.image_processing_lladamedv import parse_grid_pinpoints
from tests.tiny import random_image, tiny_model, tiny_processor


@pytest.fixture(scope="module")
def square():
    return tiny_processor("square").image_processor


def test_every_kind_of_input_gives_the_same_pixels(square, tmp_path):
    image = random_image()
    file = tmp_path / "image.png"
    image.save(file)
    array = np.asarray(image)
    expected = square(image, return_tensors="pt")["pixel_values"]
    assert expected.shape == (1, 1, 3, 32, 32) and expected.dtype == torch.float32
    kinds = [
        file,
        str(file),
        file.read_bytes(),
        array,
        np.moveaxis(array, -1, 0),
        torch.from_numpy(array.copy()),
        [image],
        [[image]],
    ]
    for kind in kinds:
        assert torch.equal(square(kind, return_tensors="pt")["pixel_values"], expected), type(kind)
    grey = image.convert("L")
    expected = square(grey.convert("RGB"), return_tensors="pt")["pixel_values"]
    for kind in (grey, np.asarray(grey), np.asarray(grey)[None]):
        assert torch.equal(square(kind, return_tensors="pt")["pixel_values"], expected)


def test_square_is_a_plain_pillow_resize(square):
    image = random_image(50, 20)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)) / 127.5 - 1
    got = square(image, return_tensors="np")["pixel_values"][0, 0]
    np.testing.assert_allclose(got, np.moveaxis(expected, -1, 0), atol=1e-6)


def test_pad_centres_on_grey():
    processor = tiny_processor("pad").image_processor
    pixels = processor(Image.new("RGB", (32, 16), "white"), return_tensors="np")["pixel_values"][0, 0]
    assert np.allclose(pixels[:, 12:20], 1) and np.allclose(pixels[:, :4], 127 / 127.5 - 1, atol=1e-6)


@torch.no_grad()
def test_token_counts_agree_with_the_model_for_random_sizes():
    processor = tiny_processor("anyres_max_4").image_processor
    model = tiny_model("anyres_max_4")
    rng = np.random.default_rng(0)
    sizes = [*rng.integers(1, 400, (40, 2)).tolist(), [1, 1], [1, 300], [300, 1], [32, 32]]
    for width, height in sizes:
        inputs = processor(random_image(width, height), return_tensors="pt")
        count = processor.get_number_of_image_tokens(height, width)
        assert len(model.get_image_features(**inputs).pooler_output[0]) == count, (width, height)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (b"not an image", ValueError, "type bytes that cannot be read"),
        (b"", ValueError, "cannot be read"),
        ("/no/such/file.png", ValueError, "'/no/such/file.png' that cannot be read: there is no such file"),
        (np.zeros((0, 5, 3), np.uint8), ValueError, "5 by 0 pixels"),
        (np.zeros((5, 5, 3)), ValueError, r"array of shape \(5, 5, 3\) and type float64"),
        (np.zeros((5, 5, 7), np.uint8), ValueError, r"shape \(5, 5, 7\)"),
        (np.zeros((5,), np.uint8), ValueError, r"shape \(5,\)"),
        (3.5, TypeError, "of type float; allowed are PIL images"),
        (None, TypeError, "of type NoneType"),
        ([], ValueError, "`images` is empty"),
    ],
)
def test_bad_images(square, image, error, message):
    with pytest.raises(error, match=message):
        square(image)


def test_truncated_file(square):
    buffer = io.BytesIO()
    random_image(200, 200).save(buffer, "PNG")
    with pytest.raises(ValueError, match="cannot be read"):
        square(buffer.getvalue()[:2000])


def test_absurdly_large(square):
    huge = np.broadcast_to(np.uint8(0), (20_000, 20_000, 3))
    with pytest.raises(ValueError, match="20000 by 20000 pixels; allowed are"):
        square(huge)
    header = io.BytesIO()
    Image.new("1", (10, 10)).save(header, "PNG")
    bomb = bytearray(header.getvalue())
    bomb[16:24] = (30_000).to_bytes(4, "big") * 2
    with pytest.raises(ValueError, match="cannot be read"):
        square(bytes(bomb))


@pytest.mark.parametrize(
    ("pinpoints", "message"),
    [
        ("1x1", "must look like"),
        ("(axb),...,(6x6)", "must look like"),
        ([[384, 100]], "multiples of the tile size 384"),
    ],
)
def test_bad_pinpoints(pinpoints, message):
    with pytest.raises(ValueError, match=message):
        parse_grid_pinpoints(pinpoints, 384)


def test_pinpoints_as_text_and_round_trip(tmp_path):
    assert parse_grid_pinpoints("(1x1),...,(2x2)", 384) == [[384, 384], [768, 384], [384, 768], [768, 768]]
    processor = LLaDAMedVImageProcessor(vision_aspect_ratio="anyres_max_9", image_grid_pinpoints="(1x1),...,(2x2)")
    processor.save_pretrained(tmp_path)
    again = LLaDAMedVImageProcessor.from_pretrained(tmp_path)
    assert again.image_grid_pinpoints == processor.image_grid_pinpoints and again.vision_aspect_ratio == "anyres_max_9"
    with pytest.raises(ValueError, match="`vision_aspect_ratio` is 'wide'"):
        LLaDAMedVImageProcessor(vision_aspect_ratio="wide")
