"""DICOM files of every kind become the pixels that hand arithmetic and pydicom's own functions give."""

import io
import re
import struct
import warnings

import numpy as np
import pydicom
import pydicom.pixels
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import Decoder
from pydicom.uid import (
    UID,
    BasicTextSRStorage,
    DeflatedExplicitVRLittleEndian,
    EncapsulatedPDFStorage,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    MediaStorageDirectoryStorage,
    RLELossless,
    RTStructureSetStorage,
)

from lladamedv.processing.medical_images import MedicalImageError, read_dicom_series, read_medical_image
from tests.dicom_files import dataset, item, look_up_table, sequence, to_bytes
from tests.jpeg_lossless import encode
from tests.reading import said


# Hounsfield units −1024, −160, −60, 40, 239, 240 and 3071 at an intercept of −1024.
STORED = np.array([[0, 864, 964, 1064, 1263, 1264, 4095]], np.uint16)
CT = {"RescaleSlope": "1", "RescaleIntercept": "-1024"}
GRADIENT = np.arange(256, dtype=np.uint8).reshape(16, 16)


def read(data, **options):
    return read_medical_image(to_bytes(data), **options)


def grey(data, **options):
    pixels = np.asarray(read(data, **options).image)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def encapsulated(pixels, photometric, syntax, frames, **elements):
    data = dataset(pixels, photometric, **elements)
    data.PixelData = encapsulate(frames)
    data["PixelData"].VR = "OB"
    data.file_meta.TransferSyntaxUID = syntax
    return data


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (None, [0, 0, 63.91, 127.82, 255, 255, 255]),
        ("LINEAR", [0, 0, 63.91, 127.82, 255, 255, 255]),
        ("LINEAR_EXACT", [0, 0, 63.75, 127.5, 254.363, 255, 255]),
        ("SIGMOID", [0.006, 30.397, 68.579, 127.5, 224.257, 224.603, 255]),
    ],
)
def test_window_functions(function, expected):
    elements = {"VOILUTFunction": function} if function else {}
    result = read(dataset(STORED, bits=12, WindowCenter="40", WindowWidth="400", **CT, **elements))
    assert np.abs(np.asarray(result.image)[0, :, 0] - np.array(expected)).max() <= 0.501
    assert result.size == (1, 7)
    assert said(result) == [
        "modality LUT: slope 1, intercept -1024",
        f"window 40/400 (level/width) from the file, {function or 'LINEAR'}",
    ]


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("kind", [np.uint16, np.int16])
def test_windows_agree_with_pydicom(function, kind):
    stored = np.random.default_rng(0).integers(-2000 if kind is np.int16 else 0, 2000, (8, 9)).astype(kind)
    data = dataset(stored, bits=12, WindowCenter="70.5", WindowWidth="311", VOILUTFunction=function)
    data.RescaleSlope, data.RescaleIntercept = "0.5", "-20"
    theirs = pydicom.pixels.apply_windowing(pydicom.pixels.apply_modality_lut(stored, data), data)
    # pydicom maps to the range of the stored bits in units of the modality: slope 0.5, intercept −20.
    low = (-2048 if kind is np.int16 else 0) * 0.5 - 20
    expected = (theirs - low) / (4095 * 0.5) * 255
    assert np.abs(grey(data) - expected).max() <= 0.501


def test_window_that_is_multi_valued_narrow_or_impossible():
    result = read(dataset(STORED, bits=12, WindowCenter=["40", "-600"], WindowWidth=["400", "1500"], **CT))
    assert "window 40/400 (level/width) from the file (first of 2), LINEAR" in said(result)
    assert np.asarray(result.image)[0, 3, 0] == 128
    narrow = dataset(np.array([[0, 1, 2]], np.uint8), WindowCenter="1", WindowWidth="0.5")
    assert grey(narrow).tolist() == [[0, 128, 255]]
    assert "LINEAR needs a width" in said(read(narrow))[0]
    step = dataset(np.array([[0, 1, 2]], np.uint8), WindowCenter="1", WindowWidth="1")
    assert grey(step).tolist() == [[0, 255, 255]]  # everything up to level − 0.5 is black
    none = read(dataset(np.array([[0, 1, 2]], np.uint8), WindowCenter="1", WindowWidth="0"))
    assert said(none)[0] == "window of the file not applied: its width is 0" and "percentiles" in said(none)[1]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("WindowCenter", b"2048,5", "its level or width is not a number"),
        ("WindowCenter", b"UNDEF ", "its level or width is not a number"),
        ("WindowWidth", b"4000,5", "its level or width is not a number"),
        ("WindowWidth", b"nan   ", "its level or width is not a number"),
        ("WindowCenter", b"      ", "its level or width is missing"),
        ("WindowWidth", b"-400.5", "its width is -400.5"),
        ("VOILUTFunction", b"LOGARI", "its function (VOILUTFunction) is not known"),
    ],
)
def test_windows_that_cannot_be_used_are_left_out(name, text, reason, caplog):
    window = {"WindowCenter": "2048.5", "WindowWidth": "4000.5", "VOILUTFunction": "LINEAR"}
    stored = np.arange(900, dtype=np.uint16).reshape(30, 30) * 4
    file = to_bytes(dataset(stored, bits=12, **window)).replace(window[name].encode(), text)
    result = read_medical_image(file)
    assert said(result)[0] == f"window of the file not applied: {reason}" and reason in caplog.text
    low, high = np.percentile(stored, [0.5, 99.5])
    expected = np.clip((stored - low) / (high - low), 0, 1) * 255
    assert np.abs(np.asarray(result.image)[..., 0] - expected).max() <= 0.501
    own = np.asarray(read_medical_image(file, window="1800/3600").image)[..., 0]
    assert np.abs(own - np.clip(stored / 3599 * 255, 0, 255)).max() <= 0.501


def test_rescaling_that_is_stated_in_part():
    window = {"WindowCenter": "40", "WindowWidth": "400", "VOILUTFunction": "LINEAR_EXACT"}
    expected = np.clip((STORED[0] - 1024.0 + 160) / 400, 0, 1) * 255
    for rescaling, step in (
        ({"RescaleIntercept": "-1024"}, "slope 1 (not stated), intercept -1024"),
        ({"RescaleIntercept": "-1024", "RescaleSlope": ""}, "slope 1 (not stated), intercept -1024"),
        ({"RescaleIntercept": "-1024", "RescaleSlope": "0"}, "slope 1 (the file says 0), intercept -1024"),
    ):
        result = read(dataset(STORED, bits=12, **window, **rescaling))
        assert np.abs(np.asarray(result.image)[0, :, 0] - expected).max() <= 0.501
        assert said(result)[0] == f"modality LUT: {step}"
    doubled = dataset(STORED, bits=12, RescaleSlope="2", WindowCenter="2048", WindowWidth="4096")
    assert np.abs(grey(doubled)[0] - np.clip((2 * STORED[0] - 2047.5) / 4095 + 0.5, 0, 1) * 255).max() <= 0.501
    negative = dataset(STORED, bits=12, RescaleSlope="-1", RescaleIntercept="1104", **window)
    assert np.abs(grey(negative)[0] - np.clip((1104.0 - STORED[0] + 160) / 400, 0, 1) * 255).max() <= 0.501
    comma = to_bytes(dataset(STORED, bits=12, RescaleSlope="1.5", RescaleIntercept="0")).replace(b"1.5 ", b"1,5 ")
    with pytest.raises(MedicalImageError, match="RescaleSlope or RescaleIntercept that is not a number"):
        read_medical_image(comma)


def test_hounsfield_windows_need_hounsfield_units():
    for elements in (
        {},
        {"RescaleSlope": "1", "RescaleIntercept": "0", "RescaleType": "US"},
        {**CT, "Modality": "MR"},
        {**CT, "Modality": None},
    ):
        data = dataset(STORED, bits=12, **elements)
        with pytest.raises(
            MedicalImageError, match="`window` is 'lung', a window in Hounsfield units, but `source` is"
        ):
            read(data, window="lung")
        assert said(read(data, window="40/400"))[-1] == "window 40/400 (level/width), LINEAR"
    for elements in (CT, {"RescaleIntercept": "-1024"}, {**CT, "Modality": "XA", "RescaleType": "HU"}):
        assert "preset lung" in said(read(dataset(STORED, bits=12, **elements), window="lung"))[-1]


def test_presets_and_own_windows():
    data = dataset(STORED, bits=12, WindowCenter="0", WindowWidth="10", **CT)
    # −600/1500 from −1350 to 149; 40/80 from 0 to 79.
    lung = np.clip((np.array([-1024, -160, -60, 40, 239, 240, 3071]) + 1350) / 1499, 0, 1) * 255
    assert np.abs(grey(data, window="lung")[0] - lung).max() <= 0.501
    assert grey(data, window="brain").tolist() == grey(data, window=(40, 80)).tolist()
    assert grey(data, window="brain")[0, 3] == round(40 / 79 * 255)
    assert said(read(data, window="lung"))[-1] == "window -600/1500 (level/width, preset lung), LINEAR"
    data.Modality = "MR"
    with pytest.raises(ValueError, match=r"`window` is 'lung', a window in Hounsfield units"):
        read(data, window="lung")
    assert grey(data, window=(40, 80))[0, 3] == round(40 / 79 * 255)


def test_percentiles_leave_padding_out():
    rng = np.random.default_rng(1)
    stored = rng.integers(100, 1000, (40, 40)).astype(np.int16)
    stored[:10] = -2000
    low, high = np.percentile(stored[10:], [0.5, 99.5])
    expected = np.clip((stored.astype(float) - low) / (high - low), 0, 1) * 255
    data = dataset(stored, bits=16, PixelPaddingValue=-2000)
    data["PixelPaddingValue"].VR = "SS"
    assert np.abs(grey(data) - expected).max() <= 0.501
    steps = said(read(data))
    assert steps == [f"percentiles 0.5-99.5: {low:g} to {high:g}", "400 padding pixels left out: black"]
    unsigned = dataset(stored, bits=16, PixelPaddingValue=65536 - 2000)  # as many files have it
    unsigned["PixelPaddingValue"].VR = "US"
    assert np.array_equal(grey(unsigned), grey(data))
    stored[:5] = -1990
    ranged = dataset(stored, bits=16, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1980)
    ranged["PixelPaddingValue"].VR = ranged["PixelPaddingRangeLimit"].VR = "SS"
    assert said(read(ranged)) == steps
    assert "padding" not in " ".join(said(read(dataset(stored, bits=16))))


def test_padding_is_black_whatever_is_white():
    stored = np.array([[7, 7, 1000, 2000, 3000, 4000]], np.uint16)
    window = {"WindowCenter": "2500", "WindowWidth": "5000", "VOILUTFunction": "LINEAR_EXACT"}
    shown = stored[0, 2:] / 5000 * 255
    for photometric, expected in (("MONOCHROME2", shown), ("MONOCHROME1", 255 - shown)):
        data = dataset(stored, photometric, bits=12, PixelPaddingValue=7, **window)
        assert np.abs(grey(data)[0] - [0, 0, *expected]).max() <= 0.501
        assert said(read(data))[-1] == "2 padding pixels left out: black"
    assert grey(data, full_range=True)[0, :2].tolist() == [0, 0]
    assert grey(data, window=(100, 100))[0].tolist() == [0, 0, 0, 0, 0, 0]
    del data.PixelPaddingValue
    assert grey(data)[0, 0] == 255


def test_inversion_happens_once():
    window = {"WindowCenter": "127.5", "WindowWidth": "255", "VOILUTFunction": "LINEAR_EXACT"}
    assert np.array_equal(grey(dataset(GRADIENT, **window)), GRADIENT)
    for photometric, shape in (("MONOCHROME1", None), ("MONOCHROME1", "INVERSE"), ("MONOCHROME2", "INVERSE")):
        elements = {"PresentationLUTShape": shape} if shape else {}
        result = read(dataset(GRADIENT, photometric, **window, **elements))
        assert np.array_equal(np.asarray(result.image)[..., 0], 255 - GRADIENT)
        assert sum("inverted" in step for step in said(result)) == 1
    assert np.array_equal(grey(dataset(GRADIENT, PresentationLUTShape="IDENTITY", **window)), GRADIENT)


def test_full_range_is_that_of_the_stored_bits():
    assert np.array_equal(grey(dataset(GRADIENT), full_range=True), GRADIENT)
    assert grey(dataset(np.array([[0, 4095]], np.uint16), bits=12), full_range=True).tolist() == [[0, 255]]
    signed = dataset(np.array([[-2048, 0, 2047]], np.int16), bits=12, **CT)
    assert grey(signed, full_range=True).tolist() == [[0, 128, 255]]
    assert said(read(signed, full_range=True)) == ["full range of 12 bits: -2048 to 2047"]


def test_look_up_tables():
    stored = np.array([[0, 9, 10, 11, 12, 200]], np.uint8)
    data = dataset(stored, VOILUTSequence=sequence(look_up_table(10, 12, [0, 819, 4095]), look_up_table(0, 8, [7])))
    data.WindowCenter, data.WindowWidth = "1", "2"
    assert grey(data).tolist() == [[0, 0, 0, 51, 255, 255]]
    assert said(read(data)) == ["VOI LUT of the file: table of 3 entries (first of 2)"]
    # A table of more than 256 entries of 8 bits, packed two to a word; and one behind a rescaling to negative values.
    packed = item(LUTDescriptor=[1024, 0, 8], LUTData=(np.arange(1024) // 4).astype(np.uint8).tobytes())
    packed["LUTData"].VR, packed["LUTDescriptor"].VR = "OW", "US"
    wide = dataset(np.array([[0, 500, 1023, 4000]], np.uint16), bits=12, VOILUTSequence=sequence(packed))
    assert grey(wide).tolist() == [[0, 125, 255, 255]]
    negative = dataset(STORED, bits=12, VOILUTSequence=sequence(look_up_table(-161, 8, [0, 10, 20])), **CT)
    assert grey(negative).tolist() == [[0, 10, 20, 20, 20, 20, 20]]
    modality = dataset(stored, ModalityLUTSequence=sequence(look_up_table(9, 16, [500, 1000, 900, 40])))
    modality.WindowCenter, modality.WindowWidth, modality.VOILUTFunction = "500", "1000", "LINEAR_EXACT"
    assert np.abs(grey(modality)[0] - np.array([500, 500, 1000, 900, 40, 40]) * 0.255).max() <= 0.501


def table_over(values, first, entries, bits, syntax=None, vr="US", **elements):
    """A file with a VOI LUT whose first mapped value is written like this, whatever its sign."""
    table = look_up_table(0, bits, entries)
    table["LUTDescriptor"].VR = vr
    table.LUTDescriptor = [len(entries), first, bits]
    data = dataset(values, VOILUTSequence=sequence(table), **elements)
    if syntax is None:
        return to_bytes(data)
    data.file_meta.TransferSyntaxUID = syntax
    file = io.BytesIO()
    pydicom.dcmwrite(file, data, implicit_vr=True, little_endian=True)
    return file.getvalue()


def test_first_mapped_value_of_either_sign():
    """PS3.3 C.11.2.1.1: it has the sign of what comes out of the modality LUT; 64512 and −1024 are the same 16 bits."""
    entries = np.minimum(np.arange(4096) * 2, 4095)
    expected = np.minimum(STORED[0] * 2, 4095) / 4095 * 255
    for file in (
        table_over(STORED, 64512, entries, 12, **CT),
        table_over(STORED, 64512, entries, 12, ImplicitVRLittleEndian, **CT),
        table_over(STORED, -1024, entries, 12, vr="SS", **CT),
        table_over(STORED.astype(np.int16) - 1024, 64512, entries, 12, ImplicitVRLittleEndian),
    ):
        assert np.abs(np.asarray(read_medical_image(file).image)[0, :, 0] - expected).max() <= 0.501
    unsigned = np.array([[64511, 64512, 64513, 65535]], np.uint16)
    for first, vr in ((64512, "US"), (-1024, "SS")):
        shown = read_medical_image(table_over(unsigned, first, [0, 51, 255], 8, vr=vr)).image
        assert np.asarray(shown)[0, :, 0].tolist() == [0, 0, 51, 255]
    dark = read_medical_image(table_over(STORED, 64512, [7, 255], 8)).image  # nothing can be negative here
    assert (np.asarray(dark) == 7).all()
    modality = item(LUTDescriptor=[3, 65534, 16], LUTData=[100, 200, 300])
    modality["LUTDescriptor"].VR, modality["LUTData"].VR = "US", "US"
    data = dataset(np.array([[-3, -2, -1, 0, 1]], np.int16), ModalityLUTSequence=sequence(modality))
    assert grey(data, window=(150, 300))[0].tolist() == [85, 85, 171, 255, 255]  # LINEAR: from 0 to 299


@pytest.mark.parametrize(("bits", "entries"), [(16, [0, 1000, 4095]), (8, [0, 1000, 4095]), (12, [0, 1000, 4095])])
def test_tables_of_other_bits_than_declared(bits, entries):
    result = read(dataset(np.array([[0, 1, 2]], np.uint8), VOILUTSequence=sequence(look_up_table(0, bits, entries))))
    assert np.asarray(result.image)[0, :, 0].tolist() == [0, round(1000 / 4095 * 255), 255]
    assert (f"{bits} bits declared, but scaled by its greatest value 4095" in said(result)[0]) == (bits != 12)


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
    pixels = np.asarray(read(data).image)
    assert pixels[0].tolist() == [[255, 0, 1], [0, 255, 2], [10, 30, 255], [20, 40, 0], [20, 40, 0]]


@pytest.mark.parametrize("shift", [0, 8])
def test_palette_of_8_bits_in_words(shift):
    """In the lower or the upper half of words of 16 bits, with the other depth declared."""
    data = dataset(np.array([[0, 1]], np.uint8), "PALETTE COLOR")
    for name, entries in (("Red", [255, 10]), ("Green", [0, 20]), ("Blue", [1, 30])):
        data.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [2, 0, 16 if shift == 0 else 8])
        raw = (np.array(entries, "<u2") << shift).tobytes()
        data.add_new(f"{name}PaletteColorLookupTableData", "OW", raw)
    assert np.abs(np.asarray(read(data).image)[0].astype(int) - [[255, 0, 1], [10, 20, 30]]).max() <= 1
    del data.GreenPaletteColorLookupTableData
    with pytest.raises(MedicalImageError, match="PALETTE COLOR, but holds no whole palette"):
        read(data)


def test_colour_planes_and_ybr():
    rng = np.random.default_rng(2)
    rgb = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(read(dataset(rgb, "RGB")).image), rgb)
    planar = dataset(rgb, "RGB", PlanarConfiguration=1)
    planar.PixelData = np.moveaxis(rgb, -1, 0).tobytes()
    assert np.array_equal(np.asarray(read(planar).image), rgb)
    # PS3.3 C.7.6.3.1.2: luminance alone is grey; red has Y 76.245, CB 84.97, CR 255.5.
    ybr = np.array([[[90, 128, 128], [76, 85, 255], [0, 128, 128]]], np.uint8)
    result = read(dataset(ybr, "YBR_FULL"))
    assert np.abs(np.asarray(result.image).astype(int) - [[[90, 90, 90], [254, 0, 0], [0, 0, 0]]]).max() <= 1
    assert said(result) == ["YBR_FULL to RGB"]
    deep = rng.integers(0, 65536, (4, 6, 3), dtype=np.uint16)
    assert np.abs(np.asarray(read(dataset(deep, "RGB")).image) - deep / 257).max() <= 0.501
    with pytest.raises(ValueError, match="`window` is given, but `source` is in colour"):
        read(dataset(rgb, "RGB"), window="lung")
    with pytest.raises(ValueError, match="PhotometricInterpretation of the file is 'HSV'"):
        read(dataset(rgb, "HSV"))


def test_frames(caplog):
    frames = np.stack([np.full((2, 2), 10 * number, np.uint8) for number in range(12)])
    frames[:, 0, 0] = 0
    data = dataset(frames, WindowCenter="127.5", WindowWidth="255", VOILUTFunction="LINEAR_EXACT")
    with caplog.at_level("INFO"):
        result = read(data, frame=3)
    assert np.asarray(result.image)[1, 1, 0] == 30 and said(result)[0] == "frame 3 of 12 (from 0)"
    assert result.size == (2, 2)
    assert {record.levelname for record in caplog.records} == {"INFO"}
    result = read(data)
    assert np.asarray(result.image)[1, 1, 0] == 60 and "the middle one" in said(result)[0]
    assert [record.levelname for record in caplog.records if record.levelname == "WARNING"] == ["WARNING"]
    for frame in (12, -1, 1.0, True):
        with pytest.raises(ValueError, match=r"`frame` is .*; allowed are whole numbers from 0 to 11"):
            read(data, frame=frame)


def test_enhanced_functional_groups():
    """Slope and window that only the groups have: shared ones, and per frame, which win."""
    stored = np.stack([np.array([[0, 500, 1000]], np.uint16)] * 2)

    def transformation(slope, intercept):
        return sequence(item(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="HU"))

    def voi(center, width):
        return sequence(item(WindowCenter=center, WindowWidth=width, VOILUTFunction="LINEAR_EXACT"))

    data = dataset(stored, bits=12)
    data.SharedFunctionalGroupsSequence = sequence(
        item(PixelValueTransformationSequence=transformation("2", "-1000"), FrameVOILUTSequence=voi("0", "2000"))
    )
    assert grey(data, frame=1).tolist() == [[0, 128, 255]]  # −1000, 0, 1000
    data.PerFrameFunctionalGroupsSequence = sequence(
        item(FrameVOILUTSequence=voi("500", "1000")),
        item(PixelValueTransformationSequence=transformation("1", "0")),
    )
    assert grey(data, frame=0).tolist() == [[0, 0, 255]]  # −1000, 0, 1000 in 0 … 1000
    assert grey(data, frame=1).tolist() == [[128, 191, 255]]  # 0, 500, 1000 in −1000 … 1000
    assert "modality LUT: slope 2, intercept -1000" in said(read(data, frame=0))
    assert "modality LUT: slope 1, intercept 0" in said(read(data, frame=1))


def test_bits_beyond_the_stored_ones_do_not_count():
    overlaid = STORED | np.uint16(0xF000)
    window = {"WindowCenter": "40", "WindowWidth": "400", **CT}
    assert np.array_equal(grey(dataset(overlaid, bits=12, **window)), grey(dataset(STORED, bits=12, **window)))


@pytest.mark.parametrize("kind", [np.uint16, np.int16])
def test_bits_stored_above_the_lowest_ones(kind):
    """As in old files with overlays in the unused bits: HighBit says where the stored ones are."""
    values = np.array([[0, 5, 2000, 2047] if kind is np.uint16 else [-2048, -7, 0, 2047]], kind)
    for high in (12, 15):
        data = dataset((values << (high - 11)) | kind(1), bits=12, HighBit=high)
        assert np.array_equal(grey(data, full_range=True), grey(dataset(values, bits=12), full_range=True))
        assert np.array_equal(grey(data, window="1000/3000"), grey(dataset(values, bits=12), window="1000/3000"))


def test_frames_of_single_bits():
    """As in segmentations, where frames begin anywhere in a byte."""
    masks = np.random.default_rng(0).integers(0, 2, (3, 5, 7)).astype(np.uint8)
    data = dataset(masks, BitsAllocated=1, HighBit=0, BitsStored=1)
    data.PixelData = np.packbits(masks.ravel(), bitorder="little").tobytes()
    for frame in range(3):
        assert np.array_equal(grey(data, frame=frame), 255 * masks[frame])


def test_floating_point_pixels():
    values = np.linspace(-0.5, 1.5, 900, dtype=np.float32).reshape(30, 30)
    data = dataset(values)
    raw = data.PixelData
    for name in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation"):
        del data[name]
    data.add_new("FloatPixelData", "OF", raw)
    assert np.abs(grey(data, window=(0.5, 1)) - np.clip(values * 255, 0, 255)).max() <= 0.501
    data.FloatPixelPaddingValue = float(values[-1, -1])
    assert grey(data)[-1, -1] == 0 and said(read(data))[-1] == "1 padding pixels left out: black"
    with pytest.raises(MedicalImageError, match="`full_range` is given, but `source` has floating-point values"):
        read(data, full_range=True)


def test_pixels_that_are_not_square(caplog):
    """A disc of 20 mm, sampled in steps of 1 mm down and 0.5 mm across, is as high as it is wide."""
    rows, columns = np.mgrid[-15:15:1.0, -15:15:0.5] + 0.25
    disc = np.where(rows**2 + columns**2 < 100, 200, 10).astype(np.uint8)
    spacings = {
        "PixelSpacing": ["1", "0.5"],
        "ImagerPixelSpacing": ["0.2", "0.1"],
        "NominalScannedPixelSpacing": ["1", "0.5"],
        "PixelAspectRatio": ["2", "1"],
    }
    measures = sequence(item(PixelMeasuresSequence=sequence(item(PixelSpacing=["1", "0.5"]))))
    for elements in (
        *({name: value} for name, value in spacings.items()),
        {"SharedFunctionalGroupsSequence": measures},
        {"PixelSpacing": ["1", "0.5"], "PixelAspectRatio": ["1", "1"]},
    ):
        result = read(dataset(disc, **elements), full_range=True)
        assert result.size == (30, 60) and result.image.size == (60, 60)
        seen = np.asarray(result.image)[..., 0] > 105
        assert abs(seen.any(1).sum() - seen.any(0).sum()) <= 1 and abs(seen.sum() / (np.pi * 400) - 1) < 0.03
        assert "high and " in said(result)[-1] and "stretched to 60 by 60" in said(result)[-1]
    wide = read(dataset(np.stack([disc.T] * 3, axis=-1), "RGB", PixelAspectRatio=["1", "2"]))
    assert wide.image.size == (60, 60) and wide.size == (60, 30)
    for square in ({}, {"PixelSpacing": ["0.5", "0.5"]}, {"PixelAspectRatio": ["1", "1"]}):
        assert read(dataset(disc, **square), full_range=True).image.size == (60, 30)
    assert not caplog.records
    for unusable in (["0", "1"], ["1", "-1"], ["1"], ["1", "0.001"]):
        result = read(dataset(disc, PixelSpacing=unusable), full_range=True)
        assert result.image.size == (60, 30) and re.search("no pair of numbers above 0|not to scale", said(result)[-1])
    assert read(dataset(disc, PixelSpacing=["1", "0.5"]), full_range=True, max_pixels=3599).image.size == (60, 30)


def test_what_is_not_shown_is_said(caplog):
    data = dataset(GRADIENT)
    data.add_new((0x6002, 0x0010), "US", 16)
    data.add_new((0x6002, 0x0011), "US", 16)
    data.add_new((0x6002, 0x3000), "OW", bytes(32))
    assert said(read(data))[0] == "overlays of the file not shown: 1"
    data.ICCProfile, data.RedPaletteColorLookupTableDescriptor = b"profile ", [1, 0, 16]
    data["RedPaletteColorLookupTableDescriptor"].VR = "US"
    assert {"supplemental colours of the file not shown", "colour profile of the file not applied"} < {
        *said(read(data))
    }
    tiles = read(dataset(np.stack([GRADIENT] * 4), TotalPixelMatrixRows=32, TotalPixelMatrixColumns=32), frame=1)
    assert "the frame is one tile of a larger picture: only one of them is shown" in said(tiles)
    assert "only one of them is shown" in caplog.text
    blank = read(dataset(GRADIENT, WindowCenter="5000", WindowWidth="10"))
    assert said(blank)[-1] == "the picture has one grey value only: 0" and "one grey value only" in caplog.text


def test_files_without_pixels():
    for kind, name in (
        (RTStructureSetStorage, "RT Structure Set Storage"),
        (BasicTextSRStorage, "Basic Text SR Storage"),
        (MediaStorageDirectoryStorage, "Media Storage Directory Storage"),
        (EncapsulatedPDFStorage, "Encapsulated PDF Storage"),
        (UID("1.2.3.4"), "an unknown class"),
    ):
        data = dataset(GRADIENT)
        for element in [element.keyword for element in data if element.tag.group in (0x0028, 0x7FE0)]:
            del data[element]
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = kind
        with pytest.raises(MedicalImageError, match=rf"`source` is a DICOM file without pixels \({name}\)"):
            read(data)
    header = dataset(GRADIENT)
    del header.PixelData
    with pytest.raises(MedicalImageError, match=r"without pixels \(CT Image Storage\)"):
        read(header)
    unnamed = dataset(GRADIENT)
    whole = to_bytes(unnamed)
    for syntax in (b"1.2.840.10008.1.2.1", b"1.2.840.10008.1.9.9", b"1.2.3.4.5.6.7.8.9.1"):
        other = whole if syntax == b"1.2.840.10008.1.2.1" else whole.replace(b"1.2.840.10008.1.2.1", syntax)
        if other is whole:
            other = get_testdata_file("meta_missing_tsyntax.dcm", download=False)
        with pytest.raises(MedicalImageError, match="TransferSyntaxUID is missing or unknown"):
            read_medical_image(other)
    del unnamed.PhotometricInterpretation
    with pytest.raises(MedicalImageError, match="DICOM file without PhotometricInterpretation; allowed are whole"):
        read(unnamed)
    samples = dataset(np.zeros((4, 4, 3), np.uint8), "RGB", PhotometricInterpretation="MONOCHROME2")
    with pytest.raises(MedicalImageError, match="`source` is MONOCHROME2, but has 3 samples per pixel"):
        read(samples)


def test_elements_written_otherwise_than_the_transfer_syntax_says():
    file = get_testdata_file("SC_rgb_jpeg.dcm", download=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = pydicom.dcmread(file).pixel_array
        assert np.array_equal(np.asarray(read_medical_image(file).image), expected)
    implicit = io.BytesIO()
    data = dataset(STORED, bits=12, WindowCenter="40", WindowWidth="400", **CT)
    data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    pydicom.dcmwrite(implicit, data, implicit_vr=True, little_endian=True)
    stated = b"1.2.840.10008.1.2.1\0"
    length = struct.pack("<H", len(ImplicitVRLittleEndian) + 1)
    place = implicit.getvalue().index(b"UI" + length + ImplicitVRLittleEndian.encode())
    content = bytearray(implicit.getvalue())
    content[place + 2 : place + 4 + 18] = struct.pack("<H", len(stated)) + stated
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shown = np.asarray(read_medical_image(bytes(content)).image)
    assert np.array_equal(shown, np.asarray(read_medical_image(implicit.getvalue()).image))


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_other_uncompressed_syntaxes(syntax):
    data = dataset(STORED, bits=12, WindowCenter="40", WindowWidth="400", **CT)
    expected = grey(data)
    data.file_meta.TransferSyntaxUID = syntax
    if syntax is ExplicitVRBigEndian:
        data.PixelData = STORED.astype(">u2").tobytes()
    file = io.BytesIO()
    little, implicit = syntax is not ExplicitVRBigEndian, syntax is ImplicitVRLittleEndian
    pydicom.dcmwrite(file, data, implicit_vr=implicit, little_endian=little)
    assert np.array_equal(np.asarray(read_medical_image(file.getvalue()).image)[..., 0], expected)


def test_run_length_encoding():
    data = dataset(np.stack([STORED, STORED[:, ::-1]]), bits=12, WindowCenter="40", WindowWidth="400", **CT)
    expected = grey(data, frame=1)
    data.compress(RLELossless)
    assert np.array_equal(grey(data, frame=1), expected)


def test_jpeg_baseline():
    smooth = np.asarray(Image.fromarray(GRADIENT).resize((64, 48), Image.Resampling.BICUBIC))
    file = io.BytesIO()
    Image.fromarray(smooth).save(file, "JPEG", quality=95)
    data = encapsulated(smooth, "MONOCHROME2", JPEGBaseline8Bit, [file.getvalue()])
    assert np.array_equal(grey(data, full_range=True), np.asarray(Image.open(file)))
    file = io.BytesIO()
    rgb = np.stack([smooth, smooth[::-1], smooth[:, ::-1]], axis=-1)
    Image.fromarray(rgb).save(file, "JPEG", quality=95, subsampling=0)
    data = encapsulated(rgb, "YBR_FULL", JPEGBaseline8Bit, [file.getvalue()])
    assert np.abs(np.asarray(read(data).image).astype(int) - np.asarray(Image.open(file)).astype(int)).max() <= 2


def test_jpeg_2000():
    stored = np.random.default_rng(3).integers(0, 4096, (32, 32)).astype(np.uint16)
    file = io.BytesIO()
    Image.fromarray(stored).save(file, "JPEG2000", irreversible=False, no_jp2=True)
    window = {"WindowCenter": "2000", "WindowWidth": "4000", "VOILUTFunction": "LINEAR_EXACT"}
    data = encapsulated(stored, "MONOCHROME2", JPEG2000Lossless, [file.getvalue()], **window)
    assert np.abs(grey(data) - np.clip(stored / 4000 * 255, 0, 255)).max() <= 0.501


def test_jpeg_lossless():
    stored = np.random.default_rng(3).integers(0, 4096, (32, 32)).astype(np.uint16)
    window = {"WindowCenter": "2000", "WindowWidth": "4000", "VOILUTFunction": "LINEAR_EXACT"}
    data = encapsulated(stored, "MONOCHROME2", JPEGLosslessSV1, [encode(stored, 12)], bits=12, **window)
    assert np.abs(grey(data) - np.clip(stored / 4000 * 255, 0, 255)).max() <= 0.501


def test_a_frame_that_aborts_its_decoder():
    """gdcm throws through its own C++ when what follows the frame's header is no marker."""
    frame = bytearray(encode(STORED, 12))
    frame[15] = 0
    data = encapsulated(STORED, "MONOCHROME2", JPEGLosslessSV1, [bytes(frame)], bits=12)
    with pytest.raises(MedicalImageError, match=r"JPEG Lossless.*cannot be decoded"):
        read(data)


def test_jpeg_of_12_bits_is_named():
    with pytest.raises(MedicalImageError, match=r"JPEG Extended .*no decoder here for 12 bits; decompress"):
        read_medical_image(get_testdata_file("JPGExtended.dcm", download=False))


def test_missing_decoder_names_syntax_and_extra(monkeypatch):
    data = encapsulated(STORED, "MONOCHROME2", JPEGLosslessSV1, [b"\xff\xd8\xff\xd9"], bits=12)
    monkeypatch.setattr(pydicom.pixels, "get_decoder", Decoder)  # one without plugins
    with pytest.raises(ImportError, match=r'JPEG Lossless.*pip install "lladamedv\[medical-codecs\]"'):
        read(data)


def test_broken_files():
    whole = to_bytes(dataset(STORED, bits=12, **CT))
    for broken in (whole[:-5], whole[:200], whole[:140]):
        with pytest.raises(MedicalImageError):
            read_medical_image(broken)
    with pytest.raises(MedicalImageError, match="no known format"):
        read_medical_image(whole[132:])  # without its preamble; nothing is guessed
    file = io.BytesIO()
    data = dataset(STORED, bits=12, **CT)
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    pydicom.dcmwrite(file, data, enforce_file_format=True)
    with pytest.raises(MedicalImageError, match="deflated"):
        read_medical_image(file.getvalue())
    broken = encapsulated(GRADIENT, "MONOCHROME2", JPEGBaseline8Bit, [b"\xff\xd8\xff\xd9"])
    with pytest.raises(MedicalImageError, match=r"JPEG Baseline.*cannot be decoded"):
        read(broken)
    with pytest.raises(MedicalImageError, match="7 by 1 pixels; allowed are 1 to 6"):
        read(dataset(STORED, bits=12), max_pixels=6)


def test_text_burned_into_the_pixels():
    data = dataset(GRADIENT, BurnedInAnnotation="YES")
    with pytest.raises(ValueError, match=r"`source` says that text is burned into its pixels.*or `allow_burned_in`"):
        read(data)
    assert np.array_equal(grey(data, allow_burned_in=True, full_range=True), GRADIENT)
    assert np.array_equal(grey(dataset(GRADIENT, BurnedInAnnotation="NO"), full_range=True), GRADIENT)


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
    (tmp_path / "e").write_bytes(to_bytes(data))
    with pytest.raises(ValueError, match="files of 2 series"):
        read_dicom_series(tmp_path)
    (tmp_path / "e").write_bytes(to_bytes(dataset(GRADIENT)))
    with pytest.raises(ValueError, match="without ImagePositionPatient"):
        read_dicom_series(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no DICOM files"):
        read_dicom_series(tmp_path / "empty")
    with pytest.raises(ValueError, match="not a folder"):
        read_dicom_series(tmp_path / "a")


def test_who_the_patient_is_is_not_even_read(monkeypatch):
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


def test_empty_elements_count_as_absent():
    empty = ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth", "VOILUTFunction", "PixelPaddingValue")
    data = dataset(GRADIENT, **dict.fromkeys((*empty, "PresentationLUTShape", "BurnedInAnnotation")))
    data["PixelPaddingValue"].VR = "US"
    for name in ("ModalityLUTSequence", "VOILUTSequence", "SharedFunctionalGroupsSequence"):
        setattr(data, name, [])
    assert said(read(data)) == said(read(dataset(GRADIENT))) == ["percentiles 0.5-99.5: 1.275 to 253.725"]


def test_padding_does_not_decide_about_labels():
    stored = np.repeat(np.int16([-2000, 0, 10, 20, 290]), 20).reshape(10, 10)
    shown = grey(dataset(stored, PixelPaddingValue=-2000))
    assert np.array_equal(shown, np.rint(np.clip(stored, 0, None) / 290 * 255))


@pytest.mark.parametrize("value", (0, 1))
def test_a_slice_within_a_segment_is_white(value):
    assert (grey(dataset(np.full((4, 4), value, np.uint8))) == 255 * value).all()


def test_colour_of_8_bits_in_words_of_16():
    colour = np.random.default_rng(0).integers(0, 256, (4, 4, 3)).astype(np.uint16)
    assert np.array_equal(np.asarray(read(dataset(colour, "RGB", bits=8)).image), colour)


@pytest.mark.parametrize("name", ("BitsStored", "PixelRepresentation"))
def test_elements_that_are_missing_are_named(name):
    data = dataset(STORED, bits=12)
    del data[name]
    with pytest.raises(MedicalImageError, match=f"without {name}; allowed are whole files"):
        read(data)


@pytest.mark.filterwarnings("ignore:Invalid value")
def test_burned_in_text_is_declared_in_any_case():
    with pytest.raises(MedicalImageError, match="BurnedInAnnotation"):
        read(dataset(STORED, bits=12, BurnedInAnnotation="Yes"))
