"""Image files of every format, damaged in every way, are read or refused by `read_medical_image` and the image
processor; what a file says about its size allocates nothing."""

from __future__ import annotations

import copy
import gzip
import io
import random
from functools import cache

import nibabel
import numpy as np
import pydicom
from PIL import Image, ImageCms
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

from lladamedv.processing.dicom import ELEMENTS
from tests.dicom_files import dataset, encapsulated, item, look_up_table, sequence, to_bytes
from tests.reading import encoded, read, tiff
from tests.tiny import tiny_processor

from .harness import Target, both_profiles
from .mutations import STRANGE_TEXTS, mend_png, mutate_bytes


RNG = np.random.default_rng(0)
GREY, COLOUR = RNG.integers(0, 256, (9, 13), dtype=np.uint8), RNG.integers(0, 256, (9, 13, 3), dtype=np.uint8)
DEEP, ALPHA = (GREY.astype(np.uint16) << 7), RNG.integers(0, 256, (9, 13, 4), dtype=np.uint8)
MAX_PIXELS = 10**6


def animation(kind) -> bytes:
    frames = [Image.fromarray(COLOUR), Image.fromarray(COLOUR[::-1].copy())]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


@cache
def whole_files() -> dict[str, list[bytes]]:
    """Whole files of each format, in the variants that take different ways through the reader."""
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    palette, picture, bits = Image.fromarray(COLOUR).convert("P"), Image.fromarray(COLOUR), Image.fromarray(GREY > 127)
    volume = RNG.integers(-1000, 2000, (5, 6, 7)).astype(np.int16)
    return {
        "png": [
            *(encoded(each) for each in (GREY, DEEP, COLOUR, ALPHA, bits)),
            encoded(GREY, transparency=3), encoded(palette, exif=exif, icc_profile=profile), animation("PNG"),
        ],
        "jpeg": [
            encoded(GREY, "JPEG"), encoded(picture, "JPEG", exif=exif), encoded(picture, "JPEG", progressive=True),
            encoded(picture.convert("CMYK"), "JPEG", icc_profile=profile), animation("MPO"),
        ],
        "jpeg2000": [
            encoded(COLOUR, "JPEG2000"), encoded(DEEP, "JPEG2000", no_jp2=True),
            encoded(GREY, "JPEG2000", num_resolutions=3, tile_size=(8, 8)),
        ],
        "gif": [encoded(palette, "GIF"), animation("GIF"), encoded(palette, "GIF", transparency=0, interlace=1)],
        "webp": [encoded(picture, "WEBP"), encoded(ALPHA, "WEBP", lossless=True, exif=exif), animation("WEBP")],
        "bmp and ppm": [
            *(encoded(each, "PPM") for each in (GREY, COLOUR, DEEP, bits)),
            *(encoded(each, "BMP") for each in (GREY, COLOUR, palette)),
            b"P2 # plain\n3 2 255\n0 1 2 3 4 255\n", b"P3 1 2 65535 1 2 3 4 5 6", b"P1 2 2 0 1 1 0",
        ],
        "tiff": [
            *(tiff(GREY.astype(each)) for each in ("u2", "i2", "u4", "i4", "u8", "f2", "f4", "f8", "c8")),
            *(tiff(each, compression="zlib", predictor=True) for each in (GREY, COLOUR, DEEP)),
            tiff(COLOUR, planarconfig="separate"), tiff(DEEP, tile=(16, 16)), tiff(GREY, big=True),
            *(encoded(GREY, "TIFF", compression=each) for each in ("tiff_lzw", "packbits", "tiff_adobe_deflate")),
            tiff(GREY, GREY[::-1]), tiff(DEEP, photometric="miniswhite", byteorder=">"),
        ],
        "nifti": [
            nibabel.Nifti1Image(volume, np.diag([-1, 2, 3, 1])).to_bytes(),
            nibabel.Nifti2Image(volume.astype("f4"), np.eye(4)).to_bytes(),
            nibabel.Nifti1Image(np.stack([volume] * 3, axis=-1).astype("u1"), np.eye(4)[[1, 0, 2, 3]]).to_bytes(),
            nibabel.Nifti1Image(volume.astype("f8") / 3, np.eye(4)).to_bytes(),
        ],
        "dicom": [to_bytes(data) for data in dicom_data_sets()],
    }  # fmt: skip


def dicom_data_sets() -> list[pydicom.Dataset]:
    """All kinds: grey, signed, inverted, colour, palette, tables, several frames, compressed, enhanced, other bytes."""
    signed, frames = DEEP.astype(np.int16) - 9000, np.stack([DEEP, DEEP.T.reshape(DEEP.shape)])
    table = look_up_table(0, 16, range(0, 65000, 250))
    tables = {
        f"{colour}PaletteColorLookupTable{part}": value
        for colour in ("Red", "Green", "Blue")
        for part, value in (("Descriptor", [256, 0, 16]), ("Data", np.arange(256, dtype="<u2").tobytes()))
    }
    groups = sequence(
        item(
            PixelValueTransformationSequence=sequence(item(RescaleSlope="2", RescaleIntercept="-5")),
            FrameVOILUTSequence=sequence(item(WindowCenter="400", WindowWidth="900")),
        )
    )
    implicit, big = dataset(DEEP), dataset(GREY)
    implicit.file_meta.TransferSyntaxUID, big.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian, ExplicitVRBigEndian
    rle = dataset(DEEP, bits=15, WindowCenter=["40", "-600"], WindowWidth=["400", "1500"])
    rle.compress(RLELossless)
    jpeg, jpeg_2000 = encoded(COLOUR, "JPEG"), encoded(GREY, "JPEG2000", no_jp2=True)
    return [
        dataset(DEEP, bits=15, WindowCenter="40", WindowWidth="400", RescaleSlope="1", RescaleIntercept="-1024"),
        dataset(signed, PixelPaddingValue=0, PresentationLUTShape="INVERSE"),
        dataset(GREY, "MONOCHROME1", VOILUTFunction="SIGMOID", WindowCenter="100", WindowWidth="9"),
        dataset(COLOUR, "RGB"),
        dataset(COLOUR, "YBR_FULL"),
        dataset(GREY, "PALETTE COLOR", **tables),
        dataset(DEEP, ModalityLUTSequence=sequence(table), VOILUTSequence=sequence(table)),
        dataset(
            frames, SharedFunctionalGroupsSequence=groups, PerFrameFunctionalGroupsSequence=sequence(*groups, *groups)
        ),
        implicit,
        big,
        rle,
        encapsulated(COLOUR, "YBR_FULL_422", JPEGBaseline8Bit, jpeg),
        encapsulated(GREY, "MONOCHROME2", JPEG2000Lossless, jpeg_2000),
    ]  # fmt: skip


WINDOWS = (None, None, None, "lung", (40, 400), (0, 1e-300), (1e308, 1e308), (0, 0), "bone marrow", 3)


def options_for(kind: str, rng: random.Random) -> dict:
    index = rng.choice((None, None, 0, 0, 1, 5, -1, 10**9, True, "0", 0.5))
    options = {"window": rng.choice(WINDOWS), "max_pixels": rng.choice((MAX_PIXELS, MAX_PIXELS, 50))}
    if kind == "nifti":
        indices = {"slice_index": index, "time_index": rng.choice((None, 0, 1))}
        return options | indices | {"axis": rng.choice(("axial", "coronal", "sagittal"))}
    options["full_range"] = rng.random() < 0.2
    if kind.startswith("dicom"):
        return options | {"frame": index, "allow_burned_in": rng.random() < 0.5}
    return options | {"page": index, "background": rng.choice((None, "red", (1, 2, 3)))}


def fitting(kind: str, rng: random.Random) -> dict:
    """Mostly options that whole files are read with: what is wrong is to be in the file."""
    if rng.random() < 0.2:
        return options_for(kind, rng)
    return {} if kind == "dicom" else {"time_index" if kind == "nifti" else "page": 0}


def damaged(kind: str, rng: random.Random):
    """A damaged file of a format, and options that sometimes suit it."""
    content = mutate_bytes(rng.choice(whole_files()[kind]), rng)
    if kind == "png" and rng.random() < 0.7:
        content = mend_png(content)
    if kind == "nifti" and rng.random() < 0.4:
        content = gzip.compress(content, 1, mtime=0)
        content = mutate_bytes(content, rng) if rng.random() < 0.5 else content
    return content, fitting(kind, rng)


def read_file(given) -> None:
    content, options = given
    options = {"max_pixels": MAX_PIXELS, **options}
    result = read(content, **options)
    assert result.image.mode == "RGB" and 0 < result.image.width * result.image.height <= options["max_pixels"]
    assert all(len(str(step)) < 500 for step in result.steps)


KINDS = ("png", "jpeg", "jpeg2000", "gif", "webp", "bmp and ppm", "tiff", "nifti", "dicom")
FILES = [
    Target(kind, lambda rng, kind=kind: damaged(kind, rng), read_file, share=2.0, documented=(ValueError, ImportError))
    for kind in KINDS
]


# Elements with absurd values


_VALUES = (
    None, "", 0, 1, -1, 7, 8, 16, 32, 64, 255, 65535, -32768, 2**31 - 1, "abc", "0", "-1", "1e400", "nan", "inf",
    "1\\2", "0\\0\\0\\0", "9" * 16, b"", b"\0", b"\xff" * 7, b"\0" * 1000, [], [0], [1, 2], [65535, 65535, 65535],
    ["a", "b"], [0, 0, 16], [0, -1, 8], [256, 0, 255], "YES", "MONOCHROME1", "PALETTE COLOR", "RGB", "YBR_FULL_422",
    "YBR_RCT", "INVERSE", "SIGMOID", "1.2.840.10008.1.2.4.50", "1.2.3", *STRANGE_TEXTS,
)  # fmt: skip
_CODES = ("CS", "DS", "IS", "US", "SS", "UL", "OW", "OB", "FD", "FL", "UI", "LO", "UN", "SQ", "AT")


def strange_data_set(rng: random.Random):
    """A DICOM file whose elements are missing, of other types or absurd, some of them deep in sequences."""
    names = [*ELEMENTS, "PixelData", "LUTDescriptor", "LUTData"]
    while True:
        data, other = (pydicom.dcmread(io.BytesIO(rng.choice(whole_files()["dicom"]))) for _ in range(2))
        for _ in range(rng.choice((1, 1, 2, 4))):
            place, name = data, rng.choice(names)
            for _ in range(rng.randrange(3)):
                inner = [element for element in place if element.VR == "SQ" and element.value]
                place = rng.choice(inner).value[0] if inner else place
            tag = pydicom.datadict.tag_for_keyword(name)
            if rng.random() < 0.2:
                place.pop(tag, None)
                continue
            code = rng.choice(_CODES) if rng.random() < 0.3 else pydicom.datadict.dictionary_VR(tag).split(" or ")[0]
            value = rng.choice(_VALUES)
            if code == "SQ":
                # A copy, because a data set within itself cannot be written.
                chosen = rng.choice((copy.deepcopy(other), item(), nested(rng.choice((1, 12)))))
                value = sequence(*([chosen] * rng.randrange(3)))
            try:
                place[tag] = pydicom.DataElement(tag, code, value, validation_mode=pydicom.config.IGNORE)
            except Exception:  # pydicom has no such element
                continue
        if rng.random() < 0.1:
            data.file_meta.TransferSyntaxUID = rng.choice(list(pydicom.uid.AllTransferSyntaxes))
        file, mode = io.BytesIO(), pydicom.config.settings.writing_validation_mode
        pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
        try:
            pydicom.dcmwrite(file, data)
        except Exception:  # nor can it be written
            continue
        finally:
            pydicom.config.settings.writing_validation_mode = mode
        return file.getvalue(), fitting("dicom", rng)


def nested(depth: int) -> pydicom.Dataset:
    inner = item(RescaleSlope="1")
    for _ in range(depth):
        inner = item(PixelValueTransformationSequence=sequence(inner))
    return inner


# The image processor


@cache
def image_processor():
    return tiny_processor("anyres_max_4").image_processor


def damaged_picture(rng: random.Random) -> bytes:
    kind = rng.choice(KINDS[:-2])
    content = mutate_bytes(rng.choice(whole_files()[kind]), rng)
    return mend_png(content) if kind == "png" and rng.random() < 0.7 else content


TARGETS = [
    *FILES,
    Target("dicom elements", strange_data_set, read_file, share=3.0, documented=(ValueError, ImportError)),
    Target(
        "image processor files", damaged_picture, lambda given: image_processor().fetch_images(given), share=2.0,
        megabytes=2500,
    ),
]  # fmt: skip


@both_profiles(TARGETS)
def test_damaged_files(target, first, count):
    target.hunt(first, count)
