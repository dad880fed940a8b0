"""From a picture to tiles: the three ways in which LLaVA-style models cut an image, on the PIL backend."""

import math
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BatchFeature, select_best_resolution
from transformers.image_utils import ImageInput
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorKwargs,
    LlavaOnevisionImageProcessorPil,
)
from transformers.processing_utils import Unpack

from .medical_images import fetch_url, is_url, read_medical_image
from .medical_shared import MAX_IMAGE_PIXELS, MedicalImageError


_GRIDS = re.compile(r"[ (]*(\d+)x(\d+)[ )]*,\.\.\.,[ (]*(\d+)x(\d+)[ )]*")
_MAX_GRIDS, _MAX_TILES = 4096, 1024  # of a list, and of a grid
_MAX_IMAGE_TOKENS = 2**20


class LLaDAMedVImageProcessorKwargs(LlavaOnevisionImageProcessorKwargs, total=False):
    """
    vision_aspect_ratio (`str`): `"square"`, `"pad"` or `"anyres_max_N"`; see [`LLaDAMedVImageProcessor`].
    patch_size (`int`): side of the vision tower's patches in pixels, to count image tokens.
    return_pixel_values (`bool`): `False` returns sizes alone, which is all that counting image tokens needs.
    """

    vision_aspect_ratio: str
    patch_size: int
    return_pixel_values: bool


class LLaDAMedVImageProcessor(LlavaOnevisionImageProcessorPil):
    """Cut images into tiles of the vision tower's size and normalise them to −1…1.

    - `vision_aspect_ratio="square"`: the image is resized to one tile, whatever its proportions.
    - `"pad"`: the image is padded to a square with mid-grey and resized to one tile.
    - `"anyres_max_N"`: a resized overview tile, then the image scaled into the best-fitting grid of
      `image_grid_pinpoints` (`[height, width]` in pixels), padded with black and cut into tiles. Images that share a
      prompt are padded instead (one tile each), as in LLaVA-OneVision.

    Args:
        size (`dict`): `{"height": …, "width": …}` of a tile in pixels; square.
        patch_size (`int`): side of the vision tower's patches.
        vision_aspect_ratio (`str`): see above.
        image_grid_pinpoints (`list[list[int]]` or `str`): grids for anyres; by default all of 1 to 6 by 1 to 6 tiles.
            A text such as `"(1x1),...,(6x6)"`, as in LLaVA's configs, is accepted too.
        do_resize, resample, do_rescale, rescale_factor, do_normalize, image_mean, image_std: as in Transformers.

    Returns (from calling it): `pixel_values` float32 `(num_images, num_tiles, 3, height, width)`, filled up with zero
    tiles, `image_sizes` `(num_images, 2)` (original height, width) and `batch_num_images` (images per prompt).

    Raises:
        ValueError: for an image that cannot be read, or has no pixels or more than about 179 million (padded to a
            square, where that is done).
        TypeError: for something that is no image.
    """

    valid_kwargs = LLaDAMedVImageProcessorKwargs
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    vision_aspect_ratio = "anyres_max_4"
    patch_size = 14
    image_grid_pinpoints = None

    def __init__(self, **kwargs: Unpack[LLaDAMedVImageProcessorKwargs]):
        super().__init__(**kwargs)
        side = self.size["height"]
        if side != self.size["width"] or not 1 <= side <= MAX_IMAGE_PIXELS**0.5:
            raise ValueError(
                f"`size` is {dict(self.size)}; tiles are square: height and width must be equal, and their product "
                f"from 1 to {MAX_IMAGE_PIXELS}."
            )
        if not isinstance(self.patch_size, int) or not 1 <= self.patch_size <= side:
            raise ValueError(
                f"`patch_size` is {self.patch_size!r:.200}; allowed are whole numbers from 1 to the {side} pixels of a "
                "tile (`size`)."
            )
        mode, _, tiles = self.vision_aspect_ratio.partition("anyres_max_")
        if self.vision_aspect_ratio not in ("square", "pad") and (mode or not tiles.isdecimal() or int(tiles) < 1):
            raise ValueError(
                f"`vision_aspect_ratio` is {self.vision_aspect_ratio!r}; allowed are 'square', 'pad' and "
                "'anyres_max_N' with a whole number N of at least 1."
            )
        self.image_grid_pinpoints = parse_grid_pinpoints(self.image_grid_pinpoints, side)

    def fetch_images(self, images):
        """Open an image of any accepted kind as an 8-bit RGB `PIL.Image`; lists keep their structure.

        Training, evaluation, the server and every command see a picture through this or through
        [`read_medical_image`], which it calls: grey values of more than 8 bits are spread between percentiles; 8-bit
        pictures stay as they are, without their transparency, as in the training of the released models.

        Args:
            images: a path, the bytes of a file, a URL (`http`, `https`, `data`), a `PIL.Image`, an array, a tensor, or
                `{"bytes": …, "path": …}` as `datasets` stores pictures. Files may be DICOM or NIfTI, too.

        Raises:
            ValueError: for an image that cannot be read, or has no pixels or too many.
            TypeError: for something that is no image.
            ImportError: if a library is missing that the file needs.
        """
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        return _read(images)

    def preprocess(self, images: ImageInput, **kwargs: Unpack[LLaDAMedVImageProcessorKwargs]) -> BatchFeature:
        """Tiles of one image, a list of images (one per prompt) or a list of lists (several per prompt)."""
        images = self.fetch_images(images)
        if not isinstance(images, list):
            images = [images]
        rows = [row if isinstance(row, list) else [row] for row in images]
        counts, flat = [len(row) for row in rows], [image for row in rows for image in row]
        if not flat:
            raise ValueError("`images` is empty; allowed are an image, or a list with at least one.")
        if not kwargs.pop("return_pixel_values", True):
            data = {"image_sizes": [(image.height, image.width) for image in flat], "batch_num_images": counts}
            return BatchFeature(data=data, tensor_type=kwargs.get("return_tensors"))
        return super(LlavaOnevisionImageProcessorPil, self).preprocess(flat, counts, **kwargs)

    def _preprocess(
        self, images, batch_num_images, size, vision_aspect_ratio, image_grid_pinpoints, resample, do_resize,
        do_rescale, rescale_factor, do_normalize, image_mean, image_std, return_tensors, **kwargs
    ) -> BatchFeature:  # fmt: skip
        pinpoints = parse_grid_pinpoints(image_grid_pinpoints, size.height)
        alone = [count == 1 for count in batch_num_images for _ in range(count)]
        prepared, image_sizes = [], []
        for image, tiled in zip(images, alone):  # (3, height, width), uint8
            image_sizes.append(image.shape[-2:])
            if vision_aspect_ratio == "square":
                tiles = [image]
            elif vision_aspect_ratio == "pad" or not tiled:
                if max(image.shape[-2:]) ** 2 > MAX_IMAGE_PIXELS:
                    raise ValueError(
                        f"`images` holds an image of {image.shape[-1]} by {image.shape[-2]} pixels, which is to be "
                        f"padded to a square; allowed are at most {MAX_IMAGE_PIXELS} pixels with the padding."
                    )
                tiles = [self.pad_to_square(image, tuple(int(mean * 255) for mean in image_mean))]
            else:
                tiles = self.get_image_patches(image, pinpoints, (size.height, size.width), size.height, resample)
            if do_resize:
                tiles = [self.resize(tile, size=size, resample=resample) for tile in tiles]
            pixels = np.stack(tiles).astype(np.float32)  # (tiles, 3, side, side)
            if do_rescale:
                pixels *= np.float32(rescale_factor)
            if do_normalize:
                mean, std = (np.asarray(values, dtype=np.float32)[:, None, None] for values in (image_mean, image_std))
                pixels -= mean  # in place: the tiles of one picture take 65 MB
                pixels /= std
            prepared.append(pixels)
        most = max(map(len, prepared))
        padded = [np.pad(tiles, [(0, most - len(tiles)), *[(0, 0)] * 3]) for tiles in prepared]
        data = {"pixel_values": padded, "image_sizes": image_sizes, "batch_num_images": batch_num_images}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def get_number_of_image_tokens(self, height: int, width: int, alone: bool = True) -> int:
        """How many embeddings the model makes of an image of this size.

        Args:
            height, width: size of the original image in pixels.
            alone: whether it is the only image of its prompt.

        Raises:
            ValueError: for more than about a million.
        """
        side = self.size["height"] // self.patch_size
        tokens = side * side
        if self.vision_aspect_ratio.startswith("anyres"):
            tokens += self._count_tile_tokens(height, width, side) if alone else 1
        if tokens > _MAX_IMAGE_TOKENS:
            raise ValueError(
                f"`patch_size` is {self.patch_size} and `size` {self.size['height']}, which makes {tokens} tokens of "
                f"an image of {width} by {height} pixels; allowed are at most {_MAX_IMAGE_TOKENS}."
            )
        return tokens

    def _count_tile_tokens(self, height: int, width: int, side: int) -> int:
        """The tokens of the tiles behind the overview, `side` by `side` a tile."""
        best_height, best_width = select_best_resolution((height, width), self.image_grid_pinpoints)
        rows, columns = (best // self.size["height"] * side for best in (best_height, best_width))
        # The padding that made the image fit the grid is cut off again …
        if width / height > columns / rows:
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        # … and what is still more than N tiles' worth is shrunk.
        shrink = math.sqrt(rows * columns / (int(self.vision_aspect_ratio.removeprefix("anyres_max_")) * side**2))
        if shrink > 1.1:
            rows, columns = int(rows // shrink), int(columns // shrink)
        return rows * (columns + 1)  # a newline behind every row


def parse_grid_pinpoints(pinpoints, tile_size: int) -> list[list[int]]:
    """Grids for anyres as `[height, width]` in pixels.

    Args:
        pinpoints: such a list, LLaVA's text form `"(1x1),...,(6x6)"` (columns x rows), or `None` for all grids of 1 to
            6 by 1 to 6 tiles, in LLaVA's order.
        tile_size: side of a tile in pixels.

    Raises:
        ValueError: for any other text, a grid that is not made of whole tiles or has more than 1024 of them or about
            179 million pixels, or more than 4096 grids.
    """
    if pinpoints is None:
        pinpoints = "(1x1),...,(6x6)"
    if isinstance(pinpoints, str):
        match = _GRIDS.fullmatch(pinpoints)
        if match is None:
            raise ValueError(f"`image_grid_pinpoints` is {pinpoints!r}; a text must look like '(1x1),...,(6x6)'.")
        first_column, first_row, last_column, last_row = map(int, match.groups())
        if (last_column - first_column + 1) * (last_row - first_row + 1) > _MAX_GRIDS:
            raise ValueError(f"`image_grid_pinpoints` is {pinpoints!r}; allowed are at most {_MAX_GRIDS} grids.")
        pinpoints = [
            [row * tile_size, column * tile_size]
            for column in range(first_column, last_column + 1)
            for row in range(first_row, last_row + 1)
        ]
    if not isinstance(pinpoints, (list, tuple)) or len(pinpoints) > _MAX_GRIDS:
        raise ValueError(
            f"`image_grid_pinpoints` is {pinpoints!r:.200}; allowed are lists of at most {_MAX_GRIDS} grids."
        )
    largest = min(MAX_IMAGE_PIXELS, _MAX_TILES * tile_size**2)
    for pinpoint in pinpoints:
        if (
            not isinstance(pinpoint, (list, tuple))
            or len(pinpoint) != 2
            or any(not isinstance(value, int) or value < tile_size or value % tile_size for value in pinpoint)
            or pinpoint[0] * pinpoint[1] > largest
        ):
            raise ValueError(
                f"`image_grid_pinpoints` holds {pinpoint!r:.200}; heights and widths must be multiples of the tile "
                f"size {tile_size}, and their product at most {largest}."
            )
    return [list(pinpoint) for pinpoint in pinpoints]


def _read(image) -> Image.Image:
    """One image of any accepted kind as 8-bit RGB."""
    # Nothing is left to do for a picture that was read before.
    if type(image) is Image.Image and image.mode == "RGB" and not image.info and not image.getexif():
        if 0 < image.width * image.height <= MAX_IMAGE_PIXELS:
            return image
    # Cut, because a text may be a whole picture in base64.
    described = f"{str(image)!r:.200}" if isinstance(image, (str, Path)) else f"of type {type(image).__name__}"
    try:
        if isinstance(image, dict) and {"bytes", "path"} & set(image):  # as `datasets` stores a picture
            image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
        if is_url(image):
            image = fetch_url(image)
        elif isinstance(image, (str, Path)) and not Path(image).exists():
            raise FileNotFoundError("there is no such file")
        if isinstance(image, torch.Tensor):
            if image.is_meta or image.layout != torch.strided:
                raise ValueError(f"it is a tensor on {image.device}, {image.layout}; allowed are dense ones")
            image = image.detach().cpu()
            image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
        if not isinstance(image, (bytes, str, Path, np.ndarray, Image.Image)):
            raise TypeError(
                f"`images` holds something {described}; allowed are PIL images, arrays and tensors, paths, URLs and "
                "the bytes of an image file."
            )
        return read_medical_image(image).image
    except (ImportError, MemoryError, TypeError):
        raise
    except MedicalImageError as error:
        reason = error.told(lambda name: "it" if name == "source" else f"`{name}`")
    except Exception as error:  # of the network and of URLs
        reason = f"{' '.join(str(error).split()):.300}"
    raise ValueError(f"`images` holds an image {described} that cannot be read: {reason}")


LLaDAMedVImageProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = ["LLaDAMedVImageProcessor"]
