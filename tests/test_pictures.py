"""Pictures of every depth, mode and format become 8-bit RGB by arithmetic that can be done by hand."""

import io
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from lladamedv.processing.medical_images import MedicalImageError, read_medical_image
from tests.reading import said


VALUES = np.array([[0, 255, 256, 1000, 65535]], np.uint16)
RNG = np.random.default_rng(0)


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def encode_tiff(*pages, **options):
    file = io.BytesIO()
    with tifffile.TiffWriter(file, **options.pop("file", {})) as writer:
        for page in pages:
            writer.write(page, contiguous=False, **options)
    return file.getvalue()


def pixels(source, **options):
    return np.asarray(read_medical_image(source, **options).image)


def grey(source, **options):
    rgb = pixels(source, **options)
    assert (rgb == rgb[..., :1]).all()
    return rgb[..., 0]


@pytest.mark.parametrize(
    "source",
    [
        VALUES,
        VALUES.astype(np.int64),
        Image.fromarray(VALUES),
        encode(VALUES),
        encode(VALUES, "TIFF"),
        encode_tiff(VALUES),
        encode_tiff(VALUES, file={"byteorder": ">"}),
        encode_tiff(VALUES.astype(np.uint32)),
        encode_tiff(VALUES.astype(np.int32)),
        encode_tiff(VALUES.astype(np.uint64)),
        b"P5 5 1 65535\n" + VALUES.astype(">u2").tobytes(),
    ],
    ids="array int64 pil png tiff tiff_little tiff_big uint32 int32 uint64 pgm".split(),
)
def test_sixteen_bits_are_not_clipped(source):
    assert grey(source, full_range=True).tolist() == [[0, 1, 1, 4, 255]]
    assert grey(source, window=(628, 744)).tolist() == [[0, 0, 0, 255, 255]]
    assert grey(source, window=(500, 1000)).tolist() == [[0, 65, 65, 255, 255]]
    low, high = np.percentile(VALUES, [0.5, 99.5])
    result = read_medical_image(source)
    expected = np.clip((VALUES - low) / (high - low), 0, 1) * 255
    assert np.abs(np.asarray(result.image)[..., 0] - expected).max() <= 0.501
    assert said(result)[-1] == f"percentiles 0.5-99.5: {low:g} to {high:g}"
    assert result.size == (1, 5)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_floating_point(kind):
    values = np.array([[-1.5, 0, 0.25, 1, np.nan]], kind)
    for source in (values, encode_tiff(values)):
        assert grey(source, window=(0.5, 1)).tolist() == [[0, 0, 64, 255, 0]]
        result = read_medical_image(source)
        assert "1 values are not finite" in said(result)
        assert np.asarray(result.image)[0, :, 0].tolist()[0::4] == [0, 0]
        with pytest.raises(ValueError, match="`full_range` is given, but `source` has values other than"):
            read_medical_image(source, full_range=True)


def test_signed_values_are_signed():
    values = np.array([[-1000, 0, 1000]], np.int16)
    for source in (values, encode_tiff(values), encode_tiff(values, file={"byteorder": ">"})):
        assert grey(source, window=(0, 2000)).tolist() == [[0, 128, 255]]
    small = np.array([[-100, 0, 100]], np.int8)
    for source in (small, encode_tiff(small)):
        assert grey(source, window=(0, 200)).tolist() == [[0, 128, 255]]


def test_few_marked_pixels_are_seen():
    mask = np.zeros((100, 100), np.uint16)
    mask[50, 50] = 1
    assert np.argwhere(grey(mask)).tolist() == [[50, 50]] and grey(mask).max() == 255
    mask[0, 0] = 2
    assert (grey(mask)[50, 50], grey(mask)[0, 0]) == (128, 255)
    assert (grey(np.full((3, 3), 7, np.uint16)) == 255).all()  # within a mask
    assert (grey(np.zeros((3, 3), np.uint16)) == 0).all()
    assert (grey(np.full((3, 3), np.nan, np.float32)) == 0).all()


def test_white_is_zero():
    for values in (VALUES, VALUES.astype(np.uint64)):
        source = encode_tiff(values, photometric="miniswhite")
        assert grey(source, full_range=True).tolist() == [[255, 254, 254, 251, 0]]
    small = np.array([[0, 1, 200]], np.uint8)
    assert grey(encode_tiff(small, photometric="miniswhite")).tolist() == [[255, 254, 55]]


def test_eight_bits_stay_as_they_are():
    values = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
    for source in (values, Image.fromarray(values), encode(values), encode_tiff(values), encode(values, "BMP")):
        assert np.array_equal(grey(source), values)
        assert np.array_equal(grey(source, full_range=True), values)
        assert np.array_equal(grey(source, window=(127.5, 255)), values)
        assert grey(source, window=(0, 1)).min() in (128, 255)  # 0 is the middle of this window
    assert grey(values > 100).tolist() == ((values > 100) * 255).tolist()
    assert grey(encode(Image.fromarray(values > 100))).tolist() == ((values > 100) * 255).tolist()
    rgb = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    for source in (rgb, Image.fromarray(rgb), encode(rgb), encode_tiff(rgb, photometric="rgb")):
        assert np.array_equal(pixels(source), rgb)
        with pytest.raises(ValueError, match=r"`window` is given, but `source` is a picture of mode 'RGB'"):
            read_medical_image(source, window=(40, 80))


def test_deep_colour():
    deep = RNG.integers(0, 65536, (4, 5, 3)).astype(np.uint16)
    upper = "16 bits per channel: the upper 8 are used"
    planes = encode_tiff(np.moveaxis(deep, -1, 0), photometric="rgb", planarconfig="separate")
    for source, steps in (
        (deep, [upper]),
        (np.moveaxis(deep, -1, 0), [upper]),
        (encode_tiff(deep, photometric="rgb"), [upper]),
        (planes, ["TIFF of uint16", upper]),
    ):
        result = read_medical_image(source)
        assert np.array_equal(np.asarray(result.image), deep >> 8)
        assert said(result) == steps


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float32"])
def test_tiff_files_show_what_their_array_shows(dtype, tile, compression, byteorder):
    """Pillow alone swaps the bytes of big-endian signed and floating-point numbers again after libtiff has."""
    values = (RNG.random((20, 24)) * 100).astype(dtype)
    file = encode_tiff(values, file={"byteorder": byteorder}, compression=compression, tile=tile)
    assert np.array_equal(pixels(file), pixels(values))


@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("samples", [3, 4])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_colour_tiff_files_show_what_their_array_shows(compression, dtype, samples, planes):
    values = RNG.integers(0, np.iinfo(dtype).max, (20, 24, samples)).astype(dtype)
    shown = values if planes == "contig" else np.moveaxis(values, -1, 0)
    extra = {"extrasamples": ["unspecified"]} if samples == 4 else {}  # neither colour nor transparency
    file = encode_tiff(shown, photometric="rgb", planarconfig=planes, compression=compression, **extra)
    assert np.array_equal(pixels(file), values[..., :3] >> (8 if dtype == "uint16" else 0))


def test_broken_tiff_files_print_nothing(capfd):
    picture = Image.fromarray(RNG.integers(0, 255, (64, 64, 3)).astype(np.uint8))
    picture.save(file := io.BytesIO(), "TIFF", compression="tiff_lzw")
    broken = bytearray(file.getvalue())
    broken[200:5000:37] = bytes(255 ^ value for value in broken[200:5000:37])
    for data in (bytes(broken), file.getvalue()[:6000]):
        with pytest.raises(ValueError, match="broken"):
            read_medical_image(data)
    assert capfd.readouterr() == ("", "")


def test_readers_in_threads_leave_the_warnings_of_others_alone():
    """As rows are checked; a reader that ends last must not bring back the silence that another one made."""
    file, before, interval = encode_tiff(VALUES), warnings.filters[:], sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(read_medical_image, [file] * 200))
    finally:
        sys.setswitchinterval(interval)
        after, warnings.filters[:] = warnings.filters[:], before
    assert after == before


def test_avif():
    Image.new("RGB", (8, 6), (10, 200, 30)).save(file := io.BytesIO(), "AVIF", quality=100)
    assert np.abs(pixels(file.getvalue()).astype(int) - (10, 200, 30)).max() <= 2


def test_transparency():
    rgba = np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [200, 100, 0, 51]]], np.uint8)
    white = [[255, 255, 255], [10, 20, 30], [244, 224, 204]]  # a fifth of the colour, four fifths of white
    left_out = "transparency left out, as in the released models' training: the colours that it hid are shown"
    for source in (rgba, Image.fromarray(rgba), encode(rgba), encode_tiff(rgba, photometric="rgb", extrasamples=[2])):
        assert pixels(source)[0].tolist() == rgba[0, :, :3].tolist()  # as in tests/parity
        assert left_out in said(read_medical_image(source))
        assert pixels(source, background="white")[0].tolist() == white
        assert pixels(source, background="black")[0].tolist() == [[0, 0, 0], [10, 20, 30], [40, 20, 0]]
        assert pixels(source, background=(255, 0, 0))[0, 0].tolist() == [255, 0, 0]
    grey_alpha = np.array([[[100, 0], [100, 255], [100, 51]]], np.uint8)
    for source in (grey_alpha, encode(grey_alpha)):
        assert grey(source).tolist() == [[100, 100, 100]]
        assert grey(source, background="black").tolist() == [[0, 100, 20]]
        assert grey(source, background="white").tolist() == [[255, 100, 224]]
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert pixels(encode(palette))[0].tolist() == [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    transparent = encode(palette, transparency=1)
    assert pixels(transparent)[0].tolist() == [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    assert pixels(transparent, background="white")[0].tolist() == [[10, 20, 30], [255, 255, 255], [70, 80, 90]]
    keyed = encode(np.array([[7, 8]], np.uint8), transparency=7)
    assert grey(keyed).tolist() == [[7, 8]]
    assert grey(keyed, background="black").tolist() == [[0, 8]]
    opaque = read_medical_image(np.full((2, 2, 4), 255, np.uint8))
    assert said(opaque) == ["transparency left out: everything is opaque"]
    for background in ("transparent thing", (0, 0), (0, 0, 256), 0):
        with pytest.raises(ValueError, match="`background` is "):
            read_medical_image(rgba, background=background)


def test_cmyk():
    cmyk = Image.fromarray(np.array([[[0, 0, 0, 0], [255, 255, 0, 0], [0, 0, 0, 255]]], np.uint8), "CMYK")
    expected = [[255, 255, 255], [0, 0, 255], [0, 0, 0]]
    assert pixels(cmyk)[0].tolist() == pixels(encode(cmyk, "TIFF"))[0].tolist() == expected
    wide = cmyk.resize((48, 16), Image.Resampling.NEAREST)  # blocks of JPEG
    jpeg = encode(wide, "JPEG", quality=100, subsampling=0)
    assert np.abs(pixels(jpeg)[8, 8::16].astype(int) - expected).max() <= 3
    unusable = read_medical_image(encode(cmyk, "TIFF", icc_profile=b"no profile"))
    assert np.asarray(unusable.image)[0].tolist() == expected and "unusable" in said(unusable)[0]


def test_colour_profile_of_cmyk_applies(monkeypatch):
    """No CMYK profile ships with Pillow, so what LittleCMS is asked for is recorded."""
    asked = []

    def convert(image, source, target, **options):
        asked.append((image.mode, source.profile.profile_description, target, options))
        return Image.new("RGB", image.size, (1, 2, 3))

    monkeypatch.setattr(ImageCms, "profileToProfile", convert)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    result = read_medical_image(encode(Image.new("CMYK", (2, 2)), "TIFF", icc_profile=profile))
    assert np.asarray(result.image)[0, 0].tolist() == [1, 2, 3]
    ((mode, description, target, output),) = asked
    assert (mode, output) == ("CMYK", {"outputMode": "RGB"}) and "Lab" in description
    assert ImageCms.ImageCmsProfile(target).profile.profile_description.startswith("sRGB")
    rgb = read_medical_image(encode(np.zeros((2, 2, 3), np.uint8), icc_profile=profile))
    assert said(rgb) == ["colour profile of the file not applied"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotates_once(orientation):
    upright = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)
    # How a camera stores what is seen upright: the inverse of what the tag asks for.
    stored = {
        1: lambda image: image,
        2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
        4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
        6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
        7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
        8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "TIFF"):
        file = encode(stored, kind, exif=exif)
        for source in (file, Image.open(io.BytesIO(file))):
            result = read_medical_image(source)
            assert np.array_equal(np.asarray(result.image)[..., 0], np.asarray(upright))
            assert result.size == (2, 3)
            assert said(result) == ([f"turned upright (EXIF orientation {orientation})"] if orientation > 1 else [])
            assert np.array_equal(grey(result.image), np.asarray(upright))  # not again
            assert not result.image.info and not result.image.getexif()


def test_pages():
    pages = [np.full((2, 3), 10 * number, np.uint16) for number in range(3)]
    small, double = encode_tiff(*pages), encode_tiff(*(page.astype(np.float64) for page in pages))
    for file in (small, double):
        result = read_medical_image(file, page=2, window=(20, 40))
        assert (np.asarray(result.image) == 128).all() and "page 2 of 3 (from 0)" in said(result)
        with pytest.raises(ValueError, match="`page` is not given, but there are 3 pages; allowed are 0 to 2"):
            read_medical_image(file)
        for page in (3, -1, "0"):
            with pytest.raises(ValueError, match=r"`page` is .*; allowed are whole numbers from 0 to 2"):
                read_medical_image(file, page=page)
    first, *others = [Image.fromarray(page.astype(np.uint8)) for page in pages]
    animation = encode(first, "GIF", save_all=True, append_images=others)
    assert (pixels(animation, page=1) == 10).all()


def test_large_files_are_reduced_while_decoding():
    blocks = RNG.integers(0, 256, (6, 8), dtype=np.uint8)
    large = np.kron(blocks, np.ones((64, 64), np.uint8))  # 384 by 512
    for kind, options in (("JPEG", {"quality": 95}), ("JPEG2000", {"irreversible": False})):
        file = encode(large, kind, **options)
        result = read_medical_image(file, max_pixels=20_000)
        assert result.image.size == (128, 96) and result.size == (384, 512)
        assert said(result) == ["reduced by 4 while decoding, from 384 by 512 pixels (height by width)"]
        assert np.abs(np.asarray(result.image)[8::16, 8::16, 0].astype(int) - blocks).max() <= 4
        with pytest.raises(ValueError, match="512 by 384 pixels; allowed are 1 to 3000"):
            read_medical_image(file, max_pixels=3000)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = read_medical_image(encode(large, "JPEG", exif=exif), max_pixels=100_000)
    assert turned.image.size == (192, 256) and turned.size == (512, 384)
    for source in (encode(large, "JPEG", progressive=True), encode(large), large, Image.fromarray(large)):
        with pytest.raises(ValueError, match="512 by 384 pixels; allowed are 1 to 100000"):
            read_medical_image(source, max_pixels=100_000)
    with pytest.raises(ValueError, match="512 by 384 pixels"):
        read_medical_image(encode_tiff(large.astype(np.float64)), max_pixels=100_000)


def test_bombs_are_not_decoded(monkeypatch):
    header = bytearray(encode(np.zeros((1, 1), np.uint8)))
    header[16:24] = (60_000).to_bytes(4, "big") * 2  # says that it has 3.6 thousand million pixels
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    with pytest.raises(ValueError, match="more pixels than Pillow allows"):
        read_medical_image(bytes(header))
    with pytest.raises(ValueError, match=r"`max_pixels` is 10000000000; allowed are whole numbers from 1 to"):
        read_medical_image(bytes(header), max_pixels=10**10)
    # A JPEG file beyond Pillow's own limit is still opened, to be reduced.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert read_medical_image(encode(np.zeros((80, 80), np.uint8), "JPEG"), max_pixels=2000).image.size == (40, 40)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "JPEG2000", "BMP", "WEBP"])
def test_truncated_files(kind):
    file = encode(RNG.integers(0, 256, (60, 60, 3), dtype=np.uint8), kind)
    read_medical_image(file)
    for length in (len(file) // 2, 30):
        with pytest.raises(MedicalImageError, match="`source` is"):
            read_medical_image(file[:length])


def test_arrays_that_are_no_pictures():
    for array in (
        np.zeros((3, 4, 4), np.float32),
        np.zeros((2, 2, 5), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((2, 2), complex),
        np.array([["a"]]),
    ):
        with pytest.raises(ValueError, match="`source` is an array of shape"):
            read_medical_image(array)
    with pytest.raises(ValueError, match="0 by 3 pixels"):
        read_medical_image(np.zeros((3, 0), np.uint16))


def test_tiff_that_pillow_does_not_read_is_treated_as_others_are():
    rgba = RNG.integers(0, 256, (4, 3, 5)).astype(np.uint8)
    planar = encode_tiff(rgba, photometric="rgb", planarconfig="separate", extrasamples=["unassalpha"])
    picture = Image.fromarray(np.moveaxis(rgba, 0, -1))
    expected = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    assert np.array_equal(pixels(planar, background="white"), np.asarray(expected))
    assert np.array_equal(pixels(planar), np.moveaxis(rgba[:3], 0, -1))

    values = np.arange(600, dtype=np.float64).reshape(20, 30)
    upright = grey(encode_tiff(values))
    turns = (0, upright), (3, upright[::-1, ::-1]), (6, np.rot90(upright, -1)), (8, np.rot90(upright))
    for orientation, expected in turns:
        tags = [(0x0112, "H", 1, orientation, True)]
        for kind in (np.float64, np.float32):  # tifffile, Pillow
            read = read_medical_image(encode_tiff(values.astype(kind), extratags=tags))
            assert np.array_equal(np.asarray(read.image)[..., 0], expected) and read.size == expected.shape


def test_an_open_tiff_that_pillow_misreads_is_refused():
    deep = RNG.integers(0, 65536, (3, 4, 5)).astype(np.uint16)
    planar = encode_tiff(deep, photometric="rgb", planarconfig="separate")
    image = Image.open(io.BytesIO(planar))
    for _ in range(2):  # not loaded yet, and loaded
        with pytest.raises(MedicalImageError, match="misreads; give its path or bytes"):
            pixels(image)
        image.load()
    assert np.array_equal(pixels(planar), np.moveaxis(deep >> 8, 0, -1))


def test_what_an_array_masks_is_black():
    values = np.arange(1000, 1600).reshape(20, 30)
    values[0, 0] = 60000
    masked = np.ma.masked_greater(values, 50000)
    assert grey(masked)[0, 0] == 0 and grey(masked)[-1, -1] == 255 and grey(masked)[10, 0] == pytest.approx(128, abs=2)
