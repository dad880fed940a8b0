"""Pictures without content, to ask whether an answer comes from the picture: each in its median colour.

The question and the number of image tokens stay what they are, and nothing is far from what the vision tower knows, as
zeros or noise would be.
"""

import math

import torch


def picture_pixels(model, pixel_values, image_sizes=None, batch_num_images=None) -> torch.BoolTensor:
    """Which pixels show a picture, `(num_images, num_tiles, height, width)`: all but what the processor pads with.

    A pixel of which the resized picture covers a part counts. Tiles that fill up shorter rows show nothing.

    Args:
        model: an [`LLaDAMedVModel`].
        pixel_values, image_sizes, batch_num_images: as the processor returns them.

    Raises:
        ValueError: as `get_image_features`; or without `image_sizes` where pictures are padded.
    """
    grids = model.tile_grids(pixel_values, image_sizes, batch_num_images)
    side = pixel_values.shape[-1]
    shown = torch.zeros(pixel_values[:, :, 0].shape, dtype=torch.bool)
    if model.config.vision_aspect_ratio == "square":
        shown[:, 0] = True
        return shown.to(pixel_values.device)
    if image_sizes is None:
        raise ValueError(
            f"`image_sizes` is None, but {model.config.vision_aspect_ratio!r} pads pictures: their (height, width) "
            "says which pixels are padding."
        )
    for tiles, size, grid in zip(shown, image_sizes.tolist(), grids):
        if grid is None:
            tiles[0] = _covered(size, (max(size), max(size)), (side, side))
        else:
            plane = [count * side for count in grid]
            scale = min(whole / length for whole, length in zip(plane, size))
            resized = [min(math.ceil(length * scale), whole) for length, whole in zip(size, plane)]
            covered = _covered(resized, plane, plane).view(grid[0], side, grid[1], side)
            tiles[0] = True
            tiles[1 : 1 + grid[0] * grid[1]] = covered.transpose(1, 2).reshape(-1, side, side)
    return shown.to(pixel_values.device)


def neutral_pixel_values(model, pixel_values, image_sizes=None, batch_num_images=None) -> torch.Tensor:
    """`pixel_values` in which each picture is replaced by its median colour; padding stays what it is.

    The median is that of each channel over the first tile, which shows the whole picture; all tiles of an anyres grid
    get it. Several pictures of a prompt each get their own. But for a pixel or two where a picture meets its padding,
    this is what the processor makes of a picture of one colour.

    Arguments and errors are those of [`picture_pixels`].
    """
    shown = picture_pixels(model, pixel_values, image_sizes, batch_num_images)
    colors = [first[:, seen].median(dim=1).values for first, seen in zip(pixel_values[:, 0], shown[:, 0])]
    return torch.where(shown[:, :, None], torch.stack(colors)[:, None, :, None, None], pixel_values)


def _covered(size, frame, pixels) -> torch.BoolTensor:
    """Which of `pixels` (height, width) a picture of `size` covers that is centred in a `frame`, resized to these."""
    axes = []
    for length, whole, count in zip(size, frame, pixels):
        edges, start = torch.arange(count + 1) * whole, (whole - length) // 2 * count
        axes.append((edges[1:] > start) & (edges[:-1] < start + length * count))
    return axes[0][:, None] & axes[1]


__all__ = ["neutral_pixel_values", "picture_pixels"]
