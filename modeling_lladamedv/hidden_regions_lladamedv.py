"""Pictures of which a region is hidden, or all: to ask what of an answer comes from there, or from the picture at all.

What is hidden takes the picture's median colour. The question and the number of image tokens stay what they are, and
nothing is far from what the vision tower knows, as zeros or noise would be.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from transformers.image_processing_utils import get_patch_output_size
from transformers.image_utils import ChannelDimension


WHOLE = torch.tensor([[0, 0, 1, 1]], dtype=torch.float64)  # of a picture, as a region


@dataclass(frozen=True)
class PictureView:
    """A picture as the vision tower sees it: it takes `box` (top, left, bottom, right), in pixels, of a plane of `rows`
    by `columns` tiles of `side` pixels, of which tile `first` is the first."""

    first: int
    rows: int
    columns: int
    side: int
    box: tuple[float, float, float, float]

    @property
    def tiles(self) -> slice:
        return slice(self.first, self.first + self.rows * self.columns)


def picture_views(model, pixel_values, image_sizes=None, batch_num_images=None) -> list[list[PictureView]]:
    """Where each picture lies in its tiles.

    Args:
        model: an [`LLaDAMedVModel`].
        pixel_values, image_sizes, batch_num_images: as the processor returns them.

    Raises:
        ValueError: as `get_image_features`; or without `image_sizes` where pictures are padded.
    """
    grids, side = model.tile_grids(pixel_values, image_sizes, batch_num_images), pixel_values.shape[-1]
    whole = PictureView(0, 1, 1, side, (0, 0, side, side))
    if model.config.vision_aspect_ratio == "square":
        return [[whole]] * len(grids)
    if image_sizes is None:
        raise ValueError(
            f"`image_sizes` is None, but {model.config.vision_aspect_ratio!r} pads pictures: their (height, width) "
            "says which pixels are padding."
        )
    views = []
    for size, grid in zip(image_sizes.tolist(), grids):
        if grid is None:
            longest = max(size)
            top, left = ((longest - edge) // 2 for edge in size)
            box = tuple(edge * side / longest for edge in (top, left, top + size[0], left + size[1]))
            views.append([PictureView(0, 1, 1, side, box)])
        else:
            plane = [count * side for count in grid]
            height, width = get_patch_output_size(np.empty((1, *size)), plane, ChannelDimension.FIRST)
            top, left = (plane[0] - height) // 2, (plane[1] - width) // 2
            views.append([whole, PictureView(1, *grid, side, (top, left, top + height, left + width))])
    return views


def median_colour(tiles: torch.Tensor, views: list[PictureView]) -> torch.Tensor:
    """Of a picture `(tiles, 3, side, side)` in its first tile, which shows all of it: `(3, 1, 1)`."""
    (top, left), (bottom, right) = map(math.floor, views[0].box[:2]), map(math.ceil, views[0].box[2:])
    return tiles[0, :, top:bottom, left:right].flatten(1).median(dim=1).values[:, None, None]


def hide_regions(tiles: torch.Tensor, views: list[PictureView], regions: torch.Tensor) -> torch.Tensor:
    """A picture with each of `regions` hidden: its pixels take the picture's median colour in every tile that shows it.

    Args:
        tiles: those of the picture, `(tiles, 3, side, side)`.
        views: of the picture.
        regions: `(regions, 4)`, (top, left, bottom, right) in fractions of the picture, float64.

    Returns:
        `(regions, tiles, 3, side, side)`.
    """
    colour = median_colour(tiles, views)
    hidden = tiles.repeat(len(regions), 1, 1, 1, 1)
    for view in views:
        top, left, bottom, right = view.box
        edges = regions * torch.tensor([bottom - top, right - left] * 2) + torch.tensor([top, left] * 2)
        # A border pixel that shows a part of the picture is hidden with what is beside it.
        edges = torch.where(regions <= 0, edges.floor(), torch.where(regions >= 1, edges.ceil(), edges.round()))
        covered = inside(edges, view.rows * view.side, view.columns * view.side).to(tiles.device)
        # (regions, height, width) -> (regions, tiles, 1, side, side)
        covered = covered.view(len(regions), view.rows, view.side, view.columns, view.side).transpose(2, 3)
        covered = covered.flatten(1, 2)[:, :, None]
        hidden[:, view.tiles] = torch.where(covered, colour, hidden[:, view.tiles])
    return hidden


def inside(boxes: torch.Tensor, height: int, width: int) -> torch.BoolTensor:
    """Which places of a plane lie in each of `boxes` (top, left, bottom, right), `(boxes, height, width)`."""
    top, left, bottom, right = boxes.T[:, :, None]
    y, x = torch.arange(height), torch.arange(width)
    return ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None]


def neutral_pixel_values(model, pixel_values, image_sizes=None, batch_num_images=None) -> torch.Tensor:
    """`pixel_values` in which each picture is hidden; padding stays what it is.

    But for a pixel or two where a picture meets its padding, this is what the processor makes of a picture of one
    colour. Arguments and errors are those of [`picture_views`].
    """
    views = picture_views(model, pixel_values, image_sizes, batch_num_images)
    return torch.cat([hide_regions(tiles, of_picture, WHOLE) for tiles, of_picture in zip(pixel_values, views)])


__all__ = ["PictureView", "hide_regions", "neutral_pixel_values", "picture_views"]
