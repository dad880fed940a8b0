"""Pictures of every form become the same tiles, as many tokens as are counted, or an error that says why."""

import numpy as np
import pytest
import torch
from PIL import Image

from lladamedv import LLaDAMedVImageProcessor
from lladamedv.processing.image_processing_lladamedv import parse_grid_pinpoints
from tests.reading import encoded
from tests.tiny import random_image, tiny_model, tiny_processor


@pytest.fixture(scope="module")
def square():
    return tiny_processor("square").image_processor


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_kind_of_input_gives_the_same_pixels(square, mode, tmp_path):
    image = random_image().convert(mode)
    file, array = tmp_path / "image.png", np.asarray(image)
    image.save(file)
    channels_first = np.moveaxis(array, -1, 0) if mode == "RGB" else array[None]
    expected = square(image.convert("RGB"), return_tensors="pt")["pixel_values"]
    assert expected.shape == (1, 1, 3, 32, 32) and expected.dtype == torch.float32
    for kind in (
        file,
        str(file),
        file.read_bytes(),
        image,
        array,
        channels_first,
        torch.tensor(array),
        [image],
        [[image]],
    ):
        assert torch.equal(square(kind, return_tensors="pt")["pixel_values"], expected), type(kind)


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
    processor, model = tiny_processor("anyres_max_4").image_processor, tiny_model("anyres_max_4")
    sizes = np.random.default_rng(0).integers(1, 400, (40, 2)).tolist()
    for width, height in [*sizes, [1, 1], [1, 300], [300, 1], [32, 32]]:
        inputs = processor(random_image(width, height), return_tensors="pt")
        count = processor.get_number_of_image_tokens(height, width)
        assert len(model.get_image_features(**inputs).pooler_output[0]) == count, (width, height)


BOMB = bytearray(encoded(Image.new("1", (10, 10))))
BOMB[16:24] = (30_000).to_bytes(4, "big") * 2


@pytest.mark.parametrize(("image", "error", "message"), [
    (b"not an image", ValueError, "type bytes that cannot be read"),
    (b"", ValueError, "cannot be read"),
    (encoded(random_image(200, 200))[:2000], ValueError, "cannot be read"),
    (bytes(BOMB), ValueError, "cannot be read"),
    ("/no/such/file.png", ValueError, "'/no/such/file.png' that cannot be read: there is no such file"),
    (np.zeros((0, 5, 3), np.uint8), ValueError, "5 by 0 pixels"),
    (np.broadcast_to(np.uint8(0), (20_000, 20_000, 3)), ValueError, "20000 by 20000 pixels; allowed are"),
    (np.zeros((5, 5, 3)), ValueError, r"array of shape \(5, 5, 3\) and type float64"),
    (torch.zeros((5, 5), device="meta"), ValueError, "a tensor on meta, torch.strided; allowed are dense ones"),
    (3.5, TypeError, "of type float; allowed are PIL images"),
    (None, TypeError, "of type NoneType"),
    ([], ValueError, "`images` is empty"),
])  # fmt: skip
def test_bad_images(square, image, error, message):
    with pytest.raises(error, match=message):
        square(image)


def test_padding_to_a_square_that_is_too_large():
    with pytest.raises(ValueError, match="30000 by 1 pixels, which is to be padded to a square"):
        tiny_processor("pad").image_processor(np.zeros((1, 30_000), np.uint8))


@pytest.mark.parametrize(("options", "message"), [
    ({"vision_aspect_ratio": "wide"}, "`vision_aspect_ratio` is 'wide'"),
    ({"vision_aspect_ratio": "anyres_max_0"}, "`vision_aspect_ratio` is 'anyres_max_0'"),
    ({"size": {"height": 384, "width": 100}}, "tiles are square"),
    ({"patch_size": 385}, "`patch_size` is 385; allowed are whole numbers from 1 to the 384 pixels"),
    ({"image_grid_pinpoints": "1x1"}, "must look like"),
    ({"image_grid_pinpoints": "(axb),...,(6x6)"}, "must look like"),
    ({"image_grid_pinpoints": "(1x1),...,(100x100)"}, "allowed are at most 4096 grids"),
    ({"image_grid_pinpoints": [[384, 384]] * 5000}, "allowed are lists of at most 4096 grids"),
    ({"image_grid_pinpoints": [[384, 100]]}, "multiples of the tile size 384"),
])  # fmt: skip
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LLaDAMedVImageProcessor(**options)


def test_too_many_tokens():
    processor = LLaDAMedVImageProcessor(patch_size=1, vision_aspect_ratio="anyres_max_9")
    with pytest.raises(ValueError, match=r"`patch_size` is 1 and `size` 384, which makes .* tokens"):
        processor.get_number_of_image_tokens(4000, 4000)


def test_pinpoints_as_text_and_round_trip(tmp_path):
    assert parse_grid_pinpoints("(1x1),...,(2x2)", 384) == [[384, 384], [768, 384], [384, 768], [768, 768]]
    processor = LLaDAMedVImageProcessor(vision_aspect_ratio="anyres_max_9", image_grid_pinpoints="(1x1),...,(2x2)")
    processor.save_pretrained(tmp_path)
    again = LLaDAMedVImageProcessor.from_pretrained(tmp_path)
    assert again.image_grid_pinpoints == processor.image_grid_pinpoints and again.vision_aspect_ratio == "anyres_max_9"
