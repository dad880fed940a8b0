"""DICOM files of every kind become the pixels that hand arithmetic and pydicom's own functions give."""

import re
import struct
from functools import partial

import numpy as np
import pydicom
import pydicom.pixels
import pytest
from PIL import Image
from pydicom import uid
from pydicom.data import get_testdata_file
from pydicom.pixels.decoders.base import Decoder

from lladamedv.processing.medical_images import MedicalImageError, read_dicom_series
from tests.dicom_files import dataset, encapsulated, implicit, item, look_up_table, sequence, to_bytes
from tests.jpeg_lossless import encode
from tests.reading import assert_shows, encoded, grey, pixels, ramp, read, said


STORED = np.array([[0, 864, 964, 1064, 1263, 1264, 4095]], np.uint16)
HU = STORED - 1024.0  # −1024, −160, −60, 40, 239, 240 and 3071
CT = {"RescaleSlope": "1", "RescaleIntercept": "-1024"}
WINDOW = {"WindowCenter": "40", "WindowWidth": "400"}
EXACT = {**WINDOW, "VOILUTFunction": "LINEAR_EXACT"}
# The whole range of 8 bits, and 12 bits from 0 to 4000.
AS_IT_IS = {"WindowCenter": "127.5", "WindowWidth": "255", "VOILUTFunction": "LINEAR_EXACT"}
UP_TO_4000 = {"WindowCenter": "2000", "WindowWidth": "4000", "VOILUTFunction": "LINEAR_EXACT"}
GRADIENT = np.arange(256, dtype=np.uint8).reshape(16, 16)
BYTES = np.array([[0, 1, 2]], np.uint8)
ct = partial(dataset, STORED, bits=12)
refused = partial(pytest.raises, MedicalImageError)


def lacking(*names, data=None):
    data = ct() if data is None else data
    for name in names:
        del data[name]
    return data


# Windows and rescaling


@pytest.mark.parametrize(("data", "options", "expected", "step"), [
    (ct(**CT, **WINDOW), {}, ramp(HU, -160, 239), "40/400 (level/width) from the file, LINEAR"),
    (ct(**CT, **EXACT), {}, ramp(HU, -160, 240), "40/400 (level/width) from the file, LINEAR_EXACT"),
    (ct(**CT, **WINDOW, VOILUTFunction="SIGMOID"), {}, 255 / (1 + np.exp(-(HU - 40) / 100)),
     "40/400 (level/width) from the file, SIGMOID"),
    (ct(**CT, WindowCenter=["40", "-600"], WindowWidth=["400", "1500"]), {}, ramp(HU, -160, 239),
     "40/400 (level/width) from the file (first of 2), LINEAR"),
    (ct(**CT, **WINDOW), {"window": "lung"}, ramp(HU, -1350, 149), "-600/1500 (level/width, preset lung), LINEAR"),
    (ct(**CT), {"window": "brain"}, ramp(HU, 0, 79), "40/80 (level/width, preset brain), LINEAR"),
    (ct(**CT, Modality="MR"), {"window": (40, 80)}, ramp(HU, 0, 79), "40/80 (level/width), LINEAR"),
    (dataset(BYTES, WindowCenter="1", WindowWidth="0.5"), {}, [[0, 128, 255]],
     "from the file, LINEAR_EXACT (LINEAR needs a width of at least 1)"),
    # Everything up to level − 0.5 is black.
    (dataset(BYTES, WindowCenter="1", WindowWidth="1"), {}, [[0, 255, 255]], "1/1 (level/width) from the file, LINEAR"),
    (ct(**EXACT, RescaleIntercept="-1024"), {}, ramp(HU, -160, 240), "slope 1 (not stated), intercept -1024"),
    (ct(**EXACT, RescaleIntercept="-1024", RescaleSlope=""), {}, ramp(HU, -160, 240),
     "slope 1 (not stated), intercept -1024"),
    (ct(**EXACT, RescaleIntercept="-1024", RescaleSlope="0"), {}, ramp(HU, -160, 240),
     "slope 1 (the file says 0), intercept -1024"),
    (ct(**UP_TO_4000, RescaleSlope="2"), {}, ramp(2.0 * STORED, 0, 4000), "slope 2, intercept 0 (not stated)"),
    (ct(**EXACT, RescaleSlope="-1", RescaleIntercept="1104"), {}, ramp(1104.0 - STORED, -160, 240),
     "slope -1, intercept 1104"),
    (dataset(GRADIENT), {"full_range": True}, GRADIENT, "full range of 8 bits: 0 to 255"),
    (dataset(np.array([[-2048, 0, 2047]], np.int16), bits=12, **CT), {"full_range": True}, [[0, 128, 255]],
     "full range of 12 bits: -2048 to 2047"),
])  # fmt: skip
def test_windows_and_rescaling(data, options, expected, step):
    picture = assert_shows(data, expected, **options)
    assert step in "; ".join(said(picture)) and picture.size == (data.Rows, data.Columns)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("kind", [np.uint16, np.int16])
def test_windows_agree_with_pydicom(function, kind):
    stored = np.random.default_rng(0).integers(-2000 if kind is np.int16 else 0, 2000, (8, 9)).astype(kind)
    data = dataset(stored, bits=12, WindowCenter="70.5", WindowWidth="311", VOILUTFunction=function)
    data.RescaleSlope, data.RescaleIntercept = "0.5", "-20"
    theirs = pydicom.pixels.apply_windowing(pydicom.pixels.apply_modality_lut(stored, data), data)
    # pydicom maps to the range of the stored bits in units of the modality: slope 0.5, intercept −20.
    low = (-2048 if kind is np.int16 else 0) * 0.5 - 20
    assert_shows(data, (theirs - low) / (4095 * 0.5) * 255)


@pytest.mark.parametrize(("name", "text", "reason"), [
    ("WindowCenter", b"2048,5", "its level or width is not a number"),
    ("WindowCenter", b"UNDEF ", "its level or width is not a number"),
    ("WindowWidth", b"4000,5", "its level or width is not a number"),
    ("WindowWidth", b"nan   ", "its level or width is not a number"),
    ("WindowCenter", b"      ", "its level or width is missing"),
    ("WindowWidth", b"-400.5", "its width is -400.5"),
    ("VOILUTFunction", b"LOGARI", "its function (VOILUTFunction) is not known"),
])  # fmt: skip
def test_windows_that_cannot_be_used_are_left_out(name, text, reason, caplog):
    window = {"WindowCenter": "2048.5", "WindowWidth": "4000.5", "VOILUTFunction": "LINEAR"}
    stored = np.arange(900, dtype=np.uint16).reshape(30, 30) * 4
    file = to_bytes(dataset(stored, bits=12, **window)).replace(window[name].encode(), text)
    picture = assert_shows(file, ramp(stored, *np.percentile(stored, [0.5, 99.5])))
    assert said(picture)[0] == f"window of the file not applied: {reason}" and reason in caplog.text
    assert_shows(file, ramp(stored, 0, 3599), window="1800/3600")


@pytest.mark.parametrize("elements", [
    CT, {"RescaleIntercept": "-1024"}, {**CT, "Modality": "XA", "RescaleType": "HU"}
])  # fmt: skip
def test_values_in_hounsfield_units(elements):
    assert "preset lung" in said(read(ct(**elements), window="lung"))[-1]


def test_empty_elements_count_as_absent():
    empty = ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth", "VOILUTFunction", "PixelPaddingValue")
    data = dataset(GRADIENT, **dict.fromkeys((*empty, "PresentationLUTShape", "BurnedInAnnotation")))
    data["PixelPaddingValue"].VR = "US"
    for name in ("ModalityLUTSequence", "VOILUTSequence", "SharedFunctionalGroupsSequence"):
        setattr(data, name, [])
    assert said(read(data)) == said(read(dataset(GRADIENT))) == ["percentiles 0.5-99.5: 1.275 to 253.725"]


# Padding and inversion


@pytest.mark.parametrize(("code", "elements"), [
    ("SS", {"PixelPaddingValue": -2000}),
    ("US", {"PixelPaddingValue": 65536 - 2000}),  # as many files have it
    ("SS", {"PixelPaddingValue": -2010, "PixelPaddingRangeLimit": -1980}),
])  # fmt: skip
def test_percentiles_leave_padding_out(code, elements):
    stored = np.random.default_rng(1).integers(100, 1000, (40, 40)).astype(np.int16)
    stored[:10] = -2000
    data = dataset(stored, bits=16, **elements)
    for name in elements:
        data[name].VR = code
    low, high = np.percentile(stored[10:], [0.5, 99.5])
    picture = assert_shows(data, ramp(stored, low, high))
    assert said(picture) == [f"percentiles 0.5-99.5: {low:g} to {high:g}", "400 padding pixels left out: black"]


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_whatever_is_white(photometric):
    stored = np.array([[7, 7, 1000, 2000, 3000, 4000]], np.uint16)
    shown = ramp(stored, 0, 4000)
    shown = 255 - shown if photometric == "MONOCHROME1" else shown
    data = dataset(stored, photometric, bits=12, PixelPaddingValue=7, **UP_TO_4000)
    assert_shows(data, np.where(stored == 7, 0, shown))
    assert (grey(data, full_range=True)[0, :2] == 0).all() and (grey(data, window=(9000, 100))[0, :2] == 0).all()
    del data.PixelPaddingValue
    assert_shows(data, shown)


def test_padding_does_not_decide_about_labels():
    stored = np.repeat(np.int16([-2000, 0, 10, 20, 290]), 20).reshape(10, 10)
    assert_shows(dataset(stored, PixelPaddingValue=-2000), ramp(stored, 0, 290))


@pytest.mark.parametrize(("photometric", "shape", "inversions"), [
    ("MONOCHROME2", None, 0),
    ("MONOCHROME2", "IDENTITY", 0),
    ("MONOCHROME1", None, 1),
    ("MONOCHROME1", "INVERSE", 1),
    ("MONOCHROME2", "INVERSE", 1),
])  # fmt: skip
def test_inversion_happens_once(photometric, shape, inversions):
    data = dataset(GRADIENT, photometric, **AS_IT_IS, PresentationLUTShape=shape)
    picture = assert_shows(data, 255 - GRADIENT if inversions else GRADIENT)
    assert sum("inverted" in step for step in said(picture)) == inversions


# Tables


def table_over(values, first, entries, bits=8, vr="US", **elements):
    """A data set with a VOI LUT whose first mapped value is written like this, of either sign."""
    table = look_up_table(0, bits, entries)
    table["LUTDescriptor"].VR = vr
    table.LUTDescriptor = [len(entries), first, bits]
    return dataset(values, VOILUTSequence=sequence(table), **elements)


def modality_table(values, first, entries, vr="US", **elements):
    table = item(LUTDescriptor=[len(entries), first, 16], LUTData=entries)
    table["LUTDescriptor"].VR = table["LUTData"].VR = vr
    return dataset(values, ModalityLUTSequence=sequence(table), **elements)


def packed_table():
    """More than 256 entries of 8 bits, packed two to a word."""
    table = item(LUTDescriptor=[1024, 0, 8], LUTData=(np.arange(1024) // 4).astype(np.uint8).tobytes())
    table["LUTData"].VR, table["LUTDescriptor"].VR = "OW", "US"
    return dataset(np.array([[0, 500, 1023, 4000]], np.uint16), bits=12, VOILUTSequence=sequence(table))


TEN = np.array([[0, 9, 10, 11, 12, 200]], np.uint8)
DOUBLED = np.minimum(np.arange(4096) * 2, 4095)
HIGH = np.array([[64511, 64512, 64513, 65535]], np.uint16)


@pytest.mark.parametrize(("source", "expected", "options"), [
    (table_over(TEN, 10, [0, 819, 4095], 12, **AS_IT_IS), [[0, 0, 0, 51, 255, 255]], {}),
    (packed_table(), [[0, 125, 255, 255]], {}),
    (table_over(STORED, -161, [0, 10, 20], vr="SS", **CT), [[0, 10, 20, 20, 20, 20, 20]], {}),
    (modality_table(TEN, 9, [500, 1000, 900, 40]), np.array([[500, 500, 1000, 900, 40, 40]]) * 0.255,
     {"window": "500/1000.5"}),
    # The first mapped value has the sign of what comes out of the modality LUT (PS3.3 C.11.2.1.1); 64512 and −1024
    # are the same 16 bits.
    (table_over(STORED, 64512, DOUBLED, 12, **CT), ramp(2 * STORED, 0, 4095), {}),
    (implicit(table_over(STORED, 64512, DOUBLED, 12, **CT)), ramp(2 * STORED, 0, 4095), {}),
    (table_over(STORED, -1024, DOUBLED, 12, vr="SS", **CT), ramp(2 * STORED, 0, 4095), {}),
    (implicit(table_over(STORED.astype(np.int16) - 1024, 64512, DOUBLED, 12)), ramp(2 * STORED, 0, 4095), {}),
    (table_over(HIGH, 64512, [0, 51, 255]), [[0, 0, 51, 255]], {}),
    (table_over(HIGH, -1024, [0, 51, 255], vr="SS"), [[0, 0, 51, 255]], {}),
    (table_over(STORED, 64512, [7, 255]), 7, {}),  # nothing can be negative here
    (modality_table(np.array([[-3, -2, -1, 0, 1]], np.int16), 65534, [100, 200, 300]), [[85, 85, 171, 255, 255]],
     {"window": (150, 300)}),
])  # fmt: skip
def test_look_up_tables(source, expected, options):
    assert_shows(source, expected, **options)


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_tables_of_other_bits_than_declared(bits):
    tables = sequence(look_up_table(0, bits, [0, 1000, 4095]), look_up_table(0, 8, [7]))
    picture = assert_shows(dataset(BYTES, VOILUTSequence=tables), ramp([[0, 1000, 4095]], 0, 4095))
    note = "" if bits == 12 else f", {bits} bits declared, but scaled by its greatest value 4095"
    assert said(picture) == [f"VOI LUT of the file: table of 3 entries (first of 2){note}"]


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("segmented", [False, True], ids=["plain", "segmented"])
def test_palette(depth, segmented):
    data = dataset(np.array([[0, 5, 6, 7, 260]], np.uint16), "PALETTE COLOR")
    scale = 1 if depth == 8 else 257
    for name, entries in (("Red", [255, 0, 10, 20]), ("Green", [0, 255, 30, 40]), ("Blue", [1, 2, 255, 0])):
        setattr(data, f"{name}PaletteColorLookupTableDescriptor", [4, 4, depth])
        data[f"{name}PaletteColorLookupTableDescriptor"].VR = "US"
        entries = [entry * scale for entry in entries]
        values = [0, len(entries), *entries] if segmented else entries  # one discrete segment
        raw = np.asarray(values, "<u2" if depth == 16 else np.uint8).tobytes()
        data.add_new(f"{'Segmented' * segmented}{name}PaletteColorLookupTableData", "OW", raw)
    assert pixels(data)[0].tolist() == [[255, 0, 1], [0, 255, 2], [10, 30, 255], [20, 40, 0], [20, 40, 0]]


def palette_in_words(shift):
    """A palette of 8 bits in the lower or the upper half of words of 16 bits, with the other depth declared."""
    data = dataset(np.array([[0, 1]], np.uint8), "PALETTE COLOR")
    for name, entries in (("Red", [255, 10]), ("Green", [0, 20]), ("Blue", [1, 30])):
        data.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [2, 0, 16 if shift == 0 else 8])
        raw = (np.array(entries, "<u2") << shift).tobytes()
        data.add_new(f"{name}PaletteColorLookupTableData", "OW", raw)
    return data


@pytest.mark.parametrize("shift", [0, 8])
def test_palette_of_8_bits_in_words(shift):
    assert np.abs(pixels(palette_in_words(shift))[0] - [[255.0, 0, 1], [10, 20, 30]]).max() <= 1


# Stored values


def test_colour_planes_and_ybr():
    rng = np.random.default_rng(2)
    rgb = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    planar = dataset(rgb, "RGB", PlanarConfiguration=1)
    planar.PixelData = np.moveaxis(rgb, -1, 0).tobytes()
    for data in (dataset(rgb, "RGB"), planar, dataset(rgb.astype(np.uint16), "RGB", bits=8)):
        assert np.array_equal(pixels(data), rgb)
    deep = rng.integers(0, 65536, (4, 6, 3), dtype=np.uint16)
    assert np.abs(pixels(dataset(deep, "RGB")) - deep / 257).max() <= 0.501
    # PS3.3 C.7.6.3.1.2: luminance alone is grey; red has Y 76.245, CB 84.97, CR 255.5.
    picture = read(dataset(np.array([[[90, 128, 128], [76, 85, 255], [0, 128, 128]]], np.uint8), "YBR_FULL"))
    assert np.abs(np.asarray(picture.image).astype(int) - [[[90, 90, 90], [254, 0, 0], [0, 0, 0]]]).max() <= 1
    assert said(picture) == ["YBR_FULL to RGB"]


FRAMES = dataset(np.array([[[0, 10 * number]] for number in range(12)], np.uint8), **AS_IT_IS)


def test_frames(caplog):
    picture = assert_shows(FRAMES, [[0, 30]], frame=3)
    assert said(picture) == ["frame 3 of 12 (from 0)", "window 127.5/255 (level/width) from the file, LINEAR_EXACT"]
    assert picture.choices["frame"] == ("frame", 3, 12) and not caplog.records
    assert "the middle one" in said(assert_shows(FRAMES, [[0, 60]]))[0]
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_enhanced_functional_groups():
    """Slope and window that only the groups have: shared ones, and per frame, which win."""

    def transformation(slope, intercept):
        return sequence(item(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="HU"))

    def voi(center, width):
        return sequence(item(WindowCenter=center, WindowWidth=width, VOILUTFunction="LINEAR_EXACT"))

    data = dataset(np.stack([np.array([[0, 500, 1000]], np.uint16)] * 2), bits=12)
    data.SharedFunctionalGroupsSequence = sequence(
        item(PixelValueTransformationSequence=transformation("2", "-1000"), FrameVOILUTSequence=voi("0", "2000"))
    )
    assert_shows(data, [[0, 127.5, 255]], frame=1)  # −1000, 0, 1000
    data.PerFrameFunctionalGroupsSequence = sequence(
        item(FrameVOILUTSequence=voi("500", "1000")),
        item(PixelValueTransformationSequence=transformation("1", "0")),
    )
    first = assert_shows(data, [[0, 0, 255]], frame=0)  # −1000, 0, 1000 in 0 … 1000
    second = assert_shows(data, [[127.5, 191.25, 255]], frame=1)  # 0, 500, 1000 in −1000 … 1000
    assert "modality LUT: slope 2, intercept -1000" in said(first)
    assert "modality LUT: slope 1, intercept 0" in said(second)


@pytest.mark.parametrize("kind", [np.uint16, np.int16])
@pytest.mark.parametrize("high", [11, 12, 15])
def test_bits_beyond_the_stored_ones_do_not_count(kind, high):
    """Above them, or as in old files with overlays below: HighBit says where the stored ones are."""
    values = np.array([[0, 5, 2000, 2047] if kind is np.uint16 else [-2048, -7, 0, 2047]], kind)
    others = np.array(0xF000 if high == 11 else 1, np.uint16).astype(kind)
    data, plain = dataset((values << (high - 11)) | others, bits=12, HighBit=high), dataset(values, bits=12)
    for options in ({"full_range": True}, {"window": "1000/3000"}):
        assert np.array_equal(grey(data, **options), grey(plain, **options))


def test_frames_of_single_bits():
    """As in segmentations, where frames begin anywhere in a byte."""
    masks = np.random.default_rng(0).integers(0, 2, (3, 5, 7)).astype(np.uint8)
    data = dataset(masks, BitsAllocated=1, HighBit=0, BitsStored=1)
    data.PixelData = np.packbits(masks.ravel(), bitorder="little").tobytes()
    for frame in range(3):
        assert np.array_equal(grey(data, frame=frame), 255 * masks[frame])


def test_floating_point_pixels():
    values = np.linspace(-0.5, 1.5, 900, dtype=np.float32).reshape(30, 30)
    data = lacking("PixelData", "BitsStored", "HighBit", "PixelRepresentation", data=dataset(values))
    data.add_new("FloatPixelData", "OF", values.tobytes())
    assert_shows(data, ramp(values, 0, 1), window=(0.5, 1))
    data.FloatPixelPaddingValue = float(values[-1, -1])
    assert grey(data)[-1, -1] == 0 and said(read(data))[-1] == "1 padding pixels left out: black"
    with refused(match="`full_range` is given, but `source` has floating-point values"):
        read(data, full_range=True)


@pytest.mark.parametrize("syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian])
def test_other_uncompressed_syntaxes(syntax):
    data = ct(**WINDOW, **CT)
    data.file_meta.TransferSyntaxUID = syntax
    if syntax is uid.ExplicitVRBigEndian:
        data.PixelData = STORED.astype(">u2").tobytes()
    order = {"implicit_vr": syntax.is_implicit_VR, "little_endian": syntax.is_little_endian}
    assert_shows(to_bytes(data, **order), ramp(HU, -160, 239))


@pytest.mark.filterwarnings("ignore")
def test_elements_written_otherwise_than_the_transfer_syntax_says():
    file = get_testdata_file("SC_rgb_jpeg.dcm", download=False)
    assert np.array_equal(pixels(file), pydicom.dcmread(file).pixel_array)
    content = implicit(ct(**WINDOW, **CT))
    stated, true = (
        b"UI" + struct.pack("<H", len(code)) + code for code in (b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2\0")
    )
    assert true in content
    assert_shows(content.replace(true, stated), ramp(HU, -160, 239))


# Compressed pixels

NOISE = np.random.default_rng(3).integers(0, 4096, (32, 32)).astype(np.uint16)
SMOOTH = np.asarray(Image.fromarray(GRADIENT).resize((64, 48), Image.Resampling.BICUBIC))


def test_run_length_encoding():
    data = dataset(np.stack([STORED, STORED[:, ::-1]]), bits=12, **WINDOW, **CT)
    data.compress(uid.RLELossless)
    assert_shows(data, ramp(HU[:, ::-1], -160, 239), frame=1)


@pytest.mark.parametrize(("syntax", "bits", "frame"), [
    (uid.JPEG2000Lossless, 16, encoded(NOISE, "JPEG2000", irreversible=False, no_jp2=True)),
    (uid.JPEGLosslessSV1, 12, encode(NOISE, 12)),
])  # fmt: skip
def test_lossless_compression(syntax, bits, frame):
    data = encapsulated(NOISE, "MONOCHROME2", syntax, frame, bits=bits, **UP_TO_4000)
    assert_shows(data, ramp(NOISE, 0, 4000))


def test_jpeg_baseline():
    jpeg = encoded(SMOOTH, "JPEG", quality=95)
    assert_shows(encapsulated(SMOOTH, "MONOCHROME2", uid.JPEGBaseline8Bit, jpeg), pixels(jpeg)[..., 0], full_range=True)
    rgb = np.stack([SMOOTH, SMOOTH[::-1], SMOOTH[:, ::-1]], axis=-1)
    jpeg = encoded(rgb, "JPEG", quality=95, subsampling=0)
    shown = pixels(encapsulated(rgb, "YBR_FULL", uid.JPEGBaseline8Bit, jpeg))
    assert np.abs(shown.astype(int) - pixels(jpeg)).max() <= 2


def test_missing_decoder_names_syntax_and_extra(monkeypatch):
    data = encapsulated(STORED, "MONOCHROME2", uid.JPEGLosslessSV1, b"\xff\xd8\xff\xd9", bits=12)
    monkeypatch.setattr(pydicom.pixels, "get_decoder", Decoder)  # one without plugins
    with pytest.raises(ImportError, match=r'JPEG Lossless.*pip install "lladamedv\[medical-codecs\]"'):
        read(data)


# Geometry, and what is not shown

ROWS, COLUMNS = np.mgrid[-15:15:1.0, -15:15:0.5] + 0.25
DISC = np.where(ROWS**2 + COLUMNS**2 < 100, 200, 10).astype(np.uint8)


@pytest.mark.parametrize("elements", [
    {"PixelSpacing": ["1", "0.5"]},
    {"ImagerPixelSpacing": ["0.2", "0.1"]},
    {"NominalScannedPixelSpacing": ["1", "0.5"]},
    {"PixelAspectRatio": ["2", "1"]},
    {"SharedFunctionalGroupsSequence": [item(PixelMeasuresSequence=[item(PixelSpacing=["1", "0.5"])])]},
    {"PixelSpacing": ["1", "0.5"], "PixelAspectRatio": ["1", "1"]},
])  # fmt: skip
def test_pixels_that_are_not_square(elements):
    """A disc of 20 mm, sampled in steps of 1 mm down and 0.5 mm across, is as high as it is wide."""
    picture = read(dataset(DISC, **elements), full_range=True)
    assert picture.size == (30, 60) and picture.image.size == (60, 60)
    seen = np.asarray(picture.image)[..., 0] > 105
    assert abs(seen.any(1).sum() - seen.any(0).sum()) <= 1 and abs(seen.sum() / (np.pi * 400) - 1) < 0.03
    assert "high and " in said(picture)[-1] and "stretched to 60 by 60" in said(picture)[-1]


def test_pixels_of_colours_that_are_not_square():
    wide = read(dataset(np.stack([DISC.T] * 3, axis=-1), "RGB", PixelAspectRatio=["1", "2"]))
    assert wide.image.size == (60, 60) and wide.size == (60, 30)


@pytest.mark.parametrize(("elements", "warning"), [
    ({}, None),
    ({"PixelSpacing": ["0.5", "0.5"]}, None),
    ({"PixelAspectRatio": ["1", "1"]}, None),
    ({"PixelSpacing": ["0", "1"]}, "no pair of numbers above 0"),
    ({"PixelSpacing": ["1", "-1"]}, "no pair of numbers above 0"),
    ({"PixelSpacing": ["1"]}, "no pair of numbers above 0"),
    ({"PixelSpacing": ["1", "0.001"]}, "not to scale"),
    ({"PixelSpacing": ["1", "0.5"]}, "not to scale"),  # it would have more pixels than allowed
])  # fmt: skip
def test_pixels_that_stay_as_they_are(elements, warning):
    picture = read(dataset(DISC, **elements), full_range=True, max_pixels=3599)
    assert picture.image.size == (60, 30)
    assert re.search(warning or "full range", said(picture)[-1])


def test_what_is_not_shown_is_said(caplog):
    data = dataset(GRADIENT, ICCProfile=b"profile ", RedPaletteColorLookupTableDescriptor=[1, 0, 16])
    data["RedPaletteColorLookupTableDescriptor"].VR = "US"
    for element, code, value in ((0x0010, "US", 16), (0x0011, "US", 16), (0x3000, "OW", bytes(32))):
        data.add_new((0x6002, element), code, value)
    assert [step.text for step in read(data).steps if step.kind == "left out"] == [
        "overlays of the file not shown: 1",
        "supplemental colours of the file not shown",
        "colour profile of the file not applied",
    ]
    read(dataset(np.stack([GRADIENT] * 4), TotalPixelMatrixRows=32, TotalPixelMatrixColumns=32), frame=1)
    read(dataset(GRADIENT, WindowCenter="5000", WindowWidth="10"))
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "the frame is one tile of a larger picture: only one of them is shown",
        "the picture has one grey value only: 0",
    ]


@pytest.mark.parametrize("value", (0, 1))
def test_a_slice_within_a_segment_is_white(value):
    assert (grey(dataset(np.full((4, 4), value, np.uint8))) == 255 * value).all()


# What is refused


def without_pixels(storage):
    data = dataset(GRADIENT)
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = storage
    return lacking(*(element.keyword for element in data if element.tag.group in (0x0028, 0x7FE0)), data=data)


def of_syntax(code: str):
    return to_bytes(dataset(GRADIENT)).replace(uid.ExplicitVRLittleEndian.encode(), code.encode())


def deflated():
    data = ct()
    data.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    return data


def aborting():
    """gdcm throws through its own C++ when what follows the frame's header is no marker."""
    frame = bytearray(encode(STORED, 12))
    frame[15] = 0
    return encapsulated(STORED, "MONOCHROME2", uid.JPEGLosslessSV1, bytes(frame), bits=12)


RGB = dataset(np.zeros((4, 4, 3), np.uint8), "RGB")
BURNED_IN = dataset(GRADIENT, BurnedInAnnotation="YES")


@pytest.mark.parametrize(("source", "options", "message"), [
    (lacking("PixelData"), {}, r"a DICOM file without pixels \(CT Image Storage\)"),
    (without_pixels(uid.RTStructureSetStorage), {}, r"without pixels \(RT Structure Set Storage\)"),
    (without_pixels(uid.BasicTextSRStorage), {}, r"without pixels \(Basic Text SR Storage\)"),
    (without_pixels(uid.MediaStorageDirectoryStorage), {}, r"without pixels \(Media Storage Directory Storage\)"),
    (without_pixels(uid.EncapsulatedPDFStorage), {}, r"without pixels \(Encapsulated PDF Storage\)"),
    (without_pixels(uid.UID("1.2.3.4")), {}, r"without pixels \(an unknown class\)"),
    (lacking("PhotometricInterpretation"), {}, "without PhotometricInterpretation; allowed are whole files"),
    (lacking("BitsStored", "PixelRepresentation"), {}, "without BitsStored, PixelRepresentation; allowed are whole"),
    (of_syntax("1.2.840.10008.1.9.9"), {}, "TransferSyntaxUID is missing or unknown"),
    (of_syntax("1.2.3.4.5.6.7.8.9.1"), {}, "TransferSyntaxUID is missing or unknown"),
    (get_testdata_file("meta_missing_tsyntax.dcm", download=False), {}, "TransferSyntaxUID is missing or unknown"),
    (deflated(), {}, "deflated as a whole"),
    (dataset(np.zeros((4, 4, 3), np.uint8), "RGB", PhotometricInterpretation="MONOCHROME2"), {},
     "`source` is MONOCHROME2, but has 3 samples per pixel"),
    (RGB, {"window": "lung"}, "`window` is given, but `source` is in colour"),
    (RGB, {"full_range": True}, "`full_range` is given, but `source` is in colour"),
    (dataset(np.zeros((4, 4, 3), np.uint8), "HSV"), {}, "PhotometricInterpretation of the file is 'HSV'"),
    (to_bytes(ct(RescaleSlope="1.5")).replace(b"1.5 ", b"1,5 "), {}, "RescaleSlope .* that is not a number"),
    (lacking("GreenPaletteColorLookupTableData", data=palette_in_words(0)), {}, "holds no whole palette"),
    *((ct(**elements), {"window": "lung"}, "`window` is 'lung', a window in Hounsfield units, but `source` is")
      for elements in ({}, {**CT, "RescaleType": "US"}, {**CT, "Modality": "MR"}, {**CT, "Modality": None})),
    *((FRAMES, {"frame": frame}, f"`frame` is {frame}; allowed are whole numbers from 0 to 11")
      for frame in (12, -1, 1.0, True)),
    (BURNED_IN, {}, r"`source` says that text is burned into its pixels.*or `allow_burned_in`"),
    (ct(), {"max_pixels": 6}, "7 by 1 pixels; allowed are 1 to 6"),
    (to_bytes(ct())[132:], {}, "no known format"),  # without its preamble; nothing is guessed
    (to_bytes(ct())[:-5], {}, "`source` has .* bytes, too few|cannot be read"),
    *((to_bytes(ct())[:length], {}, "`source` is a DICOM file|`source` does not say") for length in (140, 200)),
    (aborting(), {}, r"JPEG Lossless.*cannot be decoded"),
    (encapsulated(GRADIENT, "MONOCHROME2", uid.JPEGBaseline8Bit, b"\xff\xd8\xff\xd9"), {},
     r"JPEG Baseline.*cannot be decoded"),
    (get_testdata_file("JPGExtended.dcm", download=False), {},
     r"JPEG Extended .*no decoder here for 12 bits; decompress"),
])  # fmt: skip
def test_refused(source, options, message):
    with refused(match=message):
        read(source, **options)


@pytest.mark.filterwarnings("ignore:Invalid value")
def test_text_burned_into_the_pixels():
    assert np.array_equal(grey(BURNED_IN, allow_burned_in=True, full_range=True), GRADIENT)
    assert np.array_equal(grey(dataset(GRADIENT, BurnedInAnnotation="NO"), full_range=True), GRADIENT)
    with refused(match="BurnedInAnnotation"):
        read(dataset(GRADIENT, BurnedInAnnotation="Yes"))


def test_what_identifies_a_patient_is_not_even_read(monkeypatch):
    headers, dcmread = [], pydicom.dcmread

    def recorded(*arguments, **options):
        headers.append(dcmread(*arguments, **options))
        return headers[-1]

    monkeypatch.setattr(pydicom, "dcmread", recorded)
    read(dataset(GRADIENT))
    (header,) = headers
    assert "Modality" in header and "BitsStored" in header
    for name in ("PatientName", "PatientID", "PatientBirthDate", "StudyDate", "SOPInstanceUID", "ImageComments"):
        assert name not in header


# Series


def test_series_is_sorted_along_its_normal(tmp_path):
    cosine, sine = np.cos(2), np.sin(2)
    normal = np.array([0, -sine, cosine])  # of slices tilted about the left-right axis
    for name, distance in (("a", 5.0), ("b", -10.0), ("c", 0.0), ("d", 7.5)):
        data = dataset(GRADIENT, ImageOrientationPatient=["1", "0", "0", "0", f"{cosine:.6f}", f"{sine:.6f}"])
        data.ImagePositionPatient = [f"{number:.6f}" for number in distance * normal + 3 * np.array([0, cosine, sine])]
        (tmp_path / name).write_bytes(to_bytes(data))
    (tmp_path / "notes.txt").write_text("no DICOM file")
    assert [path.name for path in read_dicom_series(tmp_path)] == ["b", "c", "a", "d"]
    data.SeriesInstanceUID += ".1"
    for other, message in ((data, "files of 2 series"), (dataset(GRADIENT), "without ImagePositionPatient")):
        (tmp_path / "e").write_bytes(to_bytes(other))
        with refused(match=message):
            read_dicom_series(tmp_path)
    (tmp_path / "empty").mkdir()
    for folder, message in (("empty", "no DICOM files"), ("a", "not a folder")):
        with refused(match=message):
            read_dicom_series(tmp_path / folder)
