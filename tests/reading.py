"""What `read_medical_image` makes of a source, in the forms that tests compare."""

import numpy as np

from lladamedv.processing.medical_images import MedicalImage, read_medical_image


def said(picture: MedicalImage) -> list[str]:
    """The steps as texts."""
    return [str(step) for step in picture.steps]


def pixels(source, **options) -> np.ndarray:
    """The picture as an array `(height, width, 3)`."""
    return np.asarray(read_medical_image(source, **options).image)


def grey(source, **options) -> np.ndarray:
    """The picture, in which all channels must be equal, as an array `(height, width)`."""
    rgb = pixels(source, **options)
    assert (rgb == rgb[..., :1]).all()
    return rgb[..., 0]
