"""Picture files made on the spot, and what `read_medical_image` makes of a source in the forms that tests compare."""

import io

import numpy as np
import tifffile
from PIL import Image
from pydicom import Dataset

from lladamedv.processing.medical_images import MedicalImage, read_medical_image
from tests.dicom_files import to_bytes


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def tiff(*pages: np.ndarray, byteorder: str = "<", big: bool = False, **options) -> bytes:
    file = io.BytesIO()
    with tifffile.TiffWriter(file, byteorder=byteorder, bigtiff=big) as writer:
        for page in pages:
            writer.write(page, contiguous=False, **options)
    return file.getvalue()


def read(source, **options) -> MedicalImage:
    return read_medical_image(to_bytes(source) if isinstance(source, Dataset) else source, **options)


def said(picture: MedicalImage) -> list[str]:
    """The steps as texts."""
    return [str(step) for step in picture.steps]


def pixels(source, **options) -> np.ndarray:
    """The picture as an array `(height, width, 3)`."""
    return np.asarray(read(source, **options).image)


def grey(source, **options) -> np.ndarray:
    """The picture, in which all channels must be equal, as an array `(height, width)`."""
    rgb = pixels(source, **options)
    assert (rgb == rgb[..., :1]).all()
    return rgb[..., 0]


def ramp(values, low: float, high: float) -> np.ndarray:
    """What values become that are black up to `low` and white from `high`, before they are rounded."""
    return np.clip((np.asarray(values, float) - low) / (high - low), 0, 1) * 255


def assert_shows(source, expected, **options) -> MedicalImage:
    """Check the grey levels, which may be off by the rounding alone, and return the picture."""
    picture = read(source, **options)
    shown = np.asarray(picture.image)
    assert (shown == shown[..., :1]).all() and np.abs(shown[..., 0] - np.asarray(expected)).max() <= 0.501
    return picture
