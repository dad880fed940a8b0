"""Pictures of every depth, mode and format become 8-bit RGB by arithmetic that can be done by hand."""

import io
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageCms

from lladamedv.processing.medical_images import MedicalImageError, read_medical_image
from tests.reading import assert_shows, encoded, grey, pixels, ramp, read, said, tiff


VALUES = np.array([[0, 255, 256, 1000, 65535]], np.uint16)
RNG = np.random.default_rng(0)
UPPER_BITS = "16 bits per channel: the upper 8 are used"


# Grey


@pytest.mark.parametrize("source", [
    VALUES,
    VALUES.astype(np.int64),
    Image.fromarray(VALUES),
    encoded(VALUES),
    encoded(VALUES, "TIFF"),
    tiff(VALUES),
    tiff(VALUES, byteorder=">"),
    tiff(VALUES.astype(np.uint32)),
    tiff(VALUES.astype(np.int32)),
    tiff(VALUES.astype(np.uint64)),
    b"P5 5 1 65535\n" + VALUES.astype(">u2").tobytes(),
], ids="array int64 pil png tiff tiff_little tiff_big uint32 int32 uint64 pgm".split())  # fmt: skip
def test_sixteen_bits_are_not_clipped(source):
    assert grey(source, full_range=True).tolist() == [[0, 1, 1, 4, 255]]
    assert grey(source, window=(628, 744)).tolist() == [[0, 0, 0, 255, 255]]
    assert grey(source, window=(500, 1000)).tolist() == [[0, 65, 65, 255, 255]]
    low, high = np.percentile(VALUES, [0.5, 99.5])
    picture = assert_shows(source, ramp(VALUES, low, high))
    assert said(picture)[-1] == f"percentiles 0.5-99.5: {low:g} to {high:g}" and picture.size == (1, 5)


@pytest.mark.parametrize("make", [np.asarray, tiff])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_floating_point(kind, make):
    source = make(np.array([[-1.5, 0, 0.25, 1, np.nan]], kind))
    assert grey(source, window=(0.5, 1)).tolist() == [[0, 0, 64, 255, 0]]
    assert grey(source)[0, [0, 4]].tolist() == [0, 0] and "1 values are not finite" in said(read(source))
    with pytest.raises(MedicalImageError, match="`full_range` is given, but `source` has values other than"):
        read(source, full_range=True)


@pytest.mark.parametrize(("source", "options", "expected"), [
    (np.array([[-1000, 0, 1000]], np.int16), {"window": (0, 2000)}, [[0, 128, 255]]),
    (tiff(np.array([[-1000, 0, 1000]], np.int16)), {"window": (0, 2000)}, [[0, 128, 255]]),
    (tiff(np.array([[-1000, 0, 1000]], np.int16), byteorder=">"), {"window": (0, 2000)}, [[0, 128, 255]]),
    (np.array([[-100, 0, 100]], np.int8), {"window": (0, 200)}, [[0, 128, 255]]),
    (tiff(np.array([[-100, 0, 100]], np.int8)), {"window": (0, 200)}, [[0, 128, 255]]),
    (tiff(VALUES, photometric="miniswhite"), {"full_range": True}, [[255, 254, 254, 251, 0]]),
    (tiff(VALUES.astype(np.uint64), photometric="miniswhite"), {"full_range": True}, [[255, 254, 254, 251, 0]]),
    (tiff(np.array([[0, 1, 200]], np.uint8), photometric="miniswhite"), {}, [[255, 254, 55]]),
    (np.array([[False, True]]), {}, [[0, 255]]),
    (encoded(Image.fromarray(np.array([[False, True]]))), {}, [[0, 255]]),
    (np.full((1, 2), 7, np.uint16), {}, [[255, 255]]),  # within a mask
    (np.zeros((1, 2), np.uint16), {}, [[0, 0]]),
    (np.full((1, 2), np.nan, np.float32), {}, [[0, 0]]),
    (np.ma.masked_greater([[0, 1, 2, 3, 60000]], 50000), {"window": (1.5, 3)}, [[0, 85, 170, 255, 0]]),
])  # fmt: skip
def test_grey_values(source, options, expected):
    assert grey(source, **options).tolist() == expected


@pytest.mark.parametrize("kind", ["array", "open", "PNG", "BMP", "TIFF"])
def test_eight_bits_stay_as_they_are(kind):
    make = {"array": np.asarray, "open": Image.fromarray}.get(kind, lambda values: encoded(values, kind))
    values, rgb = RNG.integers(0, 256, (5, 7), dtype=np.uint8), RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    for options in ({}, {"full_range": True}, {"window": (127.5, 255)}):
        assert np.array_equal(grey(make(values), **options), values)
    assert grey(make(values), window=(0, 1)).min() in (128, 255)  # 0 is the middle of this window
    assert np.array_equal(pixels(make(rgb)), rgb)
    with pytest.raises(MedicalImageError, match=r"`window` is given, but `source` is a picture of mode 'RGB'"):
        read(make(rgb), window=(40, 80))


# TIFF


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float32"])
def test_tiff_files_show_what_their_array_shows(dtype, tile, compression, byteorder):
    """Pillow alone swaps the bytes of big-endian signed and floating-point numbers again after libtiff has."""
    values = (RNG.random((20, 24)) * 100).astype(dtype)
    file = tiff(values, byteorder=byteorder, compression=compression, tile=tile)
    assert np.array_equal(pixels(file), pixels(values))


@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("samples", [3, 4])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_colour_tiff_files_show_what_their_array_shows(compression, dtype, samples, planes):
    values = RNG.integers(0, np.iinfo(dtype).max, (20, 24, samples)).astype(dtype)
    shown = values if planes == "contig" else np.moveaxis(values, -1, 0)
    extra = {"extrasamples": ["unspecified"]} if samples == 4 else {}  # neither colour nor transparency
    file = tiff(shown, photometric="rgb", planarconfig=planes, compression=compression, **extra)
    assert np.array_equal(pixels(file), values[..., :3] >> (8 if dtype == "uint16" else 0))


def test_deep_colour_is_said():
    deep = RNG.integers(0, 65536, (4, 5, 3)).astype(np.uint16)
    for source, more in (
        (deep, []),
        (np.moveaxis(deep, -1, 0), []),
        (tiff(deep, photometric="rgb"), []),
        (tiff(np.moveaxis(deep, -1, 0), photometric="rgb", planarconfig="separate"), ["TIFF of uint16"]),
    ):
        picture = read(source)
        assert np.array_equal(np.asarray(picture.image), deep >> 8) and said(picture) == [*more, UPPER_BITS]


def test_an_open_tiff_that_pillow_misreads_is_refused():
    image = Image.open(io.BytesIO(tiff(np.zeros((3, 4, 5), np.uint16), photometric="rgb", planarconfig="separate")))
    for _ in range(2):  # not loaded yet, and loaded
        with pytest.raises(MedicalImageError, match="misreads; give its path or bytes"):
            read(image)
        image.load()


def test_broken_tiff_files_print_nothing(capfd):
    file = encoded(RNG.integers(0, 255, (64, 64, 3)).astype(np.uint8), "TIFF", compression="tiff_lzw")
    broken = bytearray(file)
    broken[200:5000:37] = bytes(255 ^ value for value in broken[200:5000:37])
    for data in (bytes(broken), file[:6000]):
        with pytest.raises(MedicalImageError, match="broken"):
            read(data)
    assert capfd.readouterr() == ("", "")


def test_readers_in_threads_leave_the_warnings_of_others_alone():
    """As rows are checked; a reader that ends last must not bring back the silence that another one made."""
    file, before, interval = tiff(VALUES), warnings.filters[:], sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(read_medical_image, [file] * 200))
    finally:
        sys.setswitchinterval(interval)
        after, warnings.filters[:] = warnings.filters[:], before
    assert after == before


# Colour and transparency

RGBA = np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [200, 100, 0, 51]]], np.uint8)
GREY_ALPHA = np.array([[[100, 0], [100, 255], [100, 51]]], np.uint8)
PALETTE = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
PALETTE.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
KEYED = encoded(np.array([[7, 8]], np.uint8), transparency=7)
LEFT_OUT = "transparency left out, as in the released models' training: the colours that it hid are shown"


@pytest.mark.parametrize("make", [
    np.asarray,
    Image.fromarray,
    encoded,
    lambda rgba: tiff(rgba, photometric="rgb", extrasamples=[2]),
    lambda rgba: tiff(np.moveaxis(rgba, -1, 0), photometric="rgb", planarconfig="separate", extrasamples=[2]),
])  # fmt: skip
def test_transparency_of_colours(make):
    source = make(RGBA)
    assert pixels(source)[0].tolist() == RGBA[0, :, :3].tolist()  # as in tests/parity
    assert LEFT_OUT in said(read(source))
    # A fifth of the last colour, four fifths of white.
    assert pixels(source, background="white")[0].tolist() == [[255, 255, 255], [10, 20, 30], [244, 224, 204]]
    assert pixels(source, background=(255, 0, 0))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(("source", "background", "expected"), [
    (GREY_ALPHA, None, [100, 100, 100]),
    (GREY_ALPHA, "black", [0, 100, 20]),
    (encoded(GREY_ALPHA), "white", [255, 100, 224]),
    (encoded(PALETTE), None, [[10, 20, 30], [40, 50, 60], [70, 80, 90]]),
    (encoded(PALETTE, transparency=1), None, [[10, 20, 30], [40, 50, 60], [70, 80, 90]]),
    (encoded(PALETTE, transparency=1), "white", [[10, 20, 30], [255, 255, 255], [70, 80, 90]]),
    (KEYED, None, [7, 8]),
    (KEYED, "black", [0, 8]),
])  # fmt: skip
def test_transparency_of_other_modes(source, background, expected):
    expected = np.array(expected)
    expected = expected[:, None] if expected.ndim == 1 else expected
    assert (pixels(source, background=background)[0] == expected).all()


def test_opaque_pictures_have_no_transparency():
    picture = read(np.full((2, 2, 4), 255, np.uint8))
    assert said(picture) == ["transparency left out: everything is opaque"] and not picture.choices


def test_cmyk():
    cmyk = Image.fromarray(np.array([[[0, 0, 0, 0], [255, 255, 0, 0], [0, 0, 0, 255]]], np.uint8), "CMYK")
    expected = [[255, 255, 255], [0, 0, 255], [0, 0, 0]]
    unusable = encoded(cmyk, "TIFF", icc_profile=b"no profile")
    for source in (cmyk, encoded(cmyk, "TIFF"), unusable):
        assert pixels(source)[0].tolist() == expected
    assert "unusable" in said(read(unusable))[0]
    wide = cmyk.resize((48, 16), Image.Resampling.NEAREST)  # blocks of JPEG
    jpeg = encoded(wide, "JPEG", quality=100, subsampling=0)
    assert np.abs(pixels(jpeg)[8, 8::16].astype(int) - expected).max() <= 3


def test_colour_profile_of_cmyk_applies(monkeypatch):
    """No CMYK profile ships with Pillow, so what LittleCMS is asked for is recorded."""
    asked = []

    def convert(image, source, target, **options):
        asked.append((image.mode, source.profile.profile_description, target, options))
        return Image.new("RGB", image.size, (1, 2, 3))

    monkeypatch.setattr(ImageCms, "profileToProfile", convert)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert pixels(encoded(Image.new("CMYK", (2, 2)), "TIFF", icc_profile=profile))[0, 0].tolist() == [1, 2, 3]
    ((mode, description, target, output),) = asked
    assert (mode, output) == ("CMYK", {"outputMode": "RGB"}) and "Lab" in description
    assert ImageCms.ImageCmsProfile(target).profile.profile_description.startswith("sRGB")
    rgb = read(encoded(np.zeros((2, 2, 3), np.uint8), icc_profile=profile))
    assert said(rgb) == ["colour profile of the file not applied"]


# Orientation, pages, size

TURNS = {  # how a camera stores what is seen upright: the inverse of what the tag asks for
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "float64"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotates_once(orientation, kind):
    upright = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)
    stored = upright.transpose(TURNS[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    if kind == "float64":  # which tifffile reads
        sources = [tiff(np.asarray(stored, np.float64), extratags=[(0x0112, "H", 1, orientation, True)])]
    else:
        file = encoded(stored, kind, exif=exif)
        sources = [file, Image.open(io.BytesIO(file))]
    for source in sources:
        picture = read(source, window=(127.5, 255))  # as it is
        assert np.array_equal(np.asarray(picture.image)[..., 0], np.asarray(upright)) and picture.size == (2, 3)
        turned = [step.text for step in picture.steps if step.kind == "geometry"]
        assert turned == ([f"turned upright (EXIF orientation {orientation})"] if orientation > 1 else [])
        assert np.array_equal(grey(picture.image), np.asarray(upright))  # not again


@pytest.mark.parametrize("kind", [np.uint16, np.float64])
def test_pages(kind):
    file = tiff(*(np.full((2, 3), 10 * number, kind) for number in range(3)))
    picture = assert_shows(file, np.full((2, 3), 127.5), page=2, window=(20, 40))
    assert "page 2 of 3 (from 0)" in said(picture)
    with pytest.raises(MedicalImageError, match="`page` is not given, but there are 3 pages; allowed are 0 to 2"):
        read(file)
    for page in (3, -1, "0"):
        with pytest.raises(MedicalImageError, match=r"`page` is .*; allowed are whole numbers from 0 to 2"):
            read(file, page=page)


def test_frames_of_an_animation():
    first, *others = [Image.fromarray(np.full((2, 3), 10 * number, np.uint8)) for number in range(3)]
    assert (pixels(encoded(first, "GIF", save_all=True, append_images=others), page=1) == 10).all()


BLOCKS = RNG.integers(0, 256, (6, 8), dtype=np.uint8)
LARGE = np.kron(BLOCKS, np.ones((64, 64), np.uint8))  # 384 by 512


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("JPEG2000", {"irreversible": False})])
def test_large_files_are_reduced_while_decoding(kind, options):
    file = encoded(LARGE, kind, **options)
    picture = read(file, max_pixels=20_000)
    assert picture.image.size == (128, 96) and picture.size == (384, 512)
    assert said(picture) == ["reduced by 4 while decoding, from 384 by 512 pixels (height by width)"]
    assert np.abs(np.asarray(picture.image)[8::16, 8::16, 0].astype(int) - BLOCKS).max() <= 4
    with pytest.raises(MedicalImageError, match="512 by 384 pixels; allowed are 1 to 3000"):
        read(file, max_pixels=3000)


def test_size_of_a_picture_that_is_turned_and_reduced():
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = read(encoded(LARGE, "JPEG", exif=exif), max_pixels=100_000)
    assert picture.image.size == (192, 256) and picture.size == (512, 384)


# What is refused

BOMB = bytearray(encoded(np.zeros((1, 1), np.uint8)))
BOMB[16:24] = (60_000).to_bytes(4, "big") * 2  # says that it has 3.6 thousand million pixels
BOMB[29:33] = zlib.crc32(BOMB[12:29]).to_bytes(4, "big")


@pytest.mark.parametrize(("source", "max_pixels", "message"), [
    (encoded(LARGE, "JPEG", progressive=True), 100_000, "512 by 384 pixels; allowed are 1 to 100000"),
    (encoded(LARGE)[:200], 100_000, "512 by 384 pixels; allowed are 1 to 100000"),  # before it is decoded
    (LARGE, 100_000, "512 by 384 pixels; allowed are 1 to 100000"),
    (Image.fromarray(LARGE), 100_000, "512 by 384 pixels; allowed are 1 to 100000"),
    (tiff(LARGE.astype(np.float64)), 100_000, "512 by 384 pixels; allowed are 1 to 100000"),
    (bytes(BOMB), 100_000, "more pixels than Pillow allows"),
    (LARGE, 10**10, "`max_pixels` is 10000000000; allowed are whole numbers from 1 to"),
    (np.zeros((3, 4, 4), np.float32), 100, "`source` is an array of shape"),
    (np.zeros((2, 2, 5), np.uint8), 100, "`source` is an array of shape"),
    (np.zeros(4, np.uint8), 100, "`source` is an array of shape"),
    (np.zeros((2, 2), complex), 100, "`source` is an array of shape"),
    (np.array([["a"]]), 100, "`source` is an array of shape"),
    (np.zeros((3, 0), np.uint16), 100, "0 by 3 pixels"),
    (tiff(np.zeros((4, 4, 4)), photometric="rgb", extrasamples=["assocalpha"]), 100, "RGB samples as float64"),
])  # fmt: skip
def test_refused(source, max_pixels, message):
    with pytest.raises(MedicalImageError, match=message):
        read(source, max_pixels=max_pixels)


def test_jpeg_beyond_pillows_own_limit_is_still_reduced(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert read(encoded(np.zeros((80, 80), np.uint8), "JPEG"), max_pixels=2000).image.size == (40, 40)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "JPEG2000", "BMP", "WEBP"])
def test_truncated_files(kind):
    file = encoded(RNG.integers(0, 256, (60, 60, 3), dtype=np.uint8), kind)
    read(file)
    for length in (len(file) // 2, 30):
        with pytest.raises(MedicalImageError, match="`source` is"):
            read(file[:length])


def test_avif():
    assert (
        np.abs(pixels(encoded(Image.new("RGB", (8, 6), (10, 200, 30)), "AVIF", quality=100)) - [10.0, 200, 30]).max()
        <= 2
    )
