"""DICOM files into 8-bit pixels, in the order that the standard fixes: modality LUT, VOI LUT or window, inversion.

Only the elements that say how pixels are shown are read from a file, and none that identifies a patient, place or time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from .gdcm_process import decode_with_gdcm
from .grey_levels_lladamedv import PERCENTILES, WINDOW_FUNCTIONS, Window, apply_percentiles, apply_range, apply_window
from .medical_shared import MedicalImageError, Steps, arg, check_bytes, check_size, choose_index, require, to_scale


_GREY, _COLOUR = ("MONOCHROME1", "MONOCHROME2"), ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_PALETTE = "PALETTE COLOR"
_PALETTES = [f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue")]
# Distances of rows and of columns, or their ratio, in the order in which they count.
_SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio")
_OVERLAYS = [(group, 0x0010) for group in range(0x6000, 0x6020, 2)]  # the rows of each
_NEEDED = ("SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated")
_NEEDED_FOR_WHOLE_NUMBERS = ("BitsStored", "PixelRepresentation")
_PIXEL_DATA = (b"\xe0\x7f\x10\0", b"\x7f\xe0\0\x10")  # its tag; floating-point pixels have others
_FUNCTIONAL_GROUPS = ("PixelValueTransformationSequence", "FrameVOILUTSequence", "PixelMeasuresSequence")
# All that is read of a file but its pixels.
ELEMENTS = [
    *("SOPClassUID", "Modality", "BurnedInAnnotation", "Rows", "Columns", "NumberOfFrames", "HighBit"),
    *("PlanarConfiguration", "PresentationLUTShape"),
    *_NEEDED,
    *_NEEDED_FOR_WHOLE_NUMBERS,
    *(f"{kind}PixelPadding{end}" for kind in ("", "Float", "DoubleFloat") for end in ("Value", "RangeLimit")),
    *("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "RescaleType"),
    *("ICCProfile", "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "TotalPixelMatrixRows"),
    *_SPACINGS,
    *(f"{name}{part}" for name in _PALETTES for part in ("Descriptor", "Data")),
    *(f"Segmented{name}Data" for name in _PALETTES),
]


def is_dicom(head: bytes) -> bool:
    """Whether a file that begins with these 132 bytes is a DICOM file: a preamble, then `DICM`."""
    return head[128:132] == b"DICM"


def read_dicom(
    file: BinaryIO,
    steps: Steps,
    *,
    frame: int | None,
    window: Window | None,
    full_range: bool,
    allow_burned_in: bool,
    max_pixels: int,
) -> tuple[Image.Image, tuple[int, int]]:
    """One frame, with square pixels."""
    # 1. What the header says, and whether that can be shown.
    header, as_stated = _read_header(file)
    _check_shown(header, window, full_range, allow_burned_in, max_pixels)
    photometric = header.PhotometricInterpretation
    # 2. One frame of the stored values.
    frames = int(header.get("NumberOfFrames") or 1)
    chosen = choose_index("frame", frame, frames, "frame", steps)
    if frames > 1 and (header.get("TotalPixelMatrixRows") or 0) > header.Rows:
        steps.add("left out", "the frame is one tile of a larger picture: only one of them is shown", warns=True)
    _apply_functional_groups(header, chosen)
    if window is not None and window.preset:
        _check_hounsfield(window, header)
    pixels = _decode(file, as_stated, header, chosen)
    if (pixels.ndim == 3) != (photometric in _COLOUR):
        raise MedicalImageError(
            f"{arg('source')} is {photometric}, but has {header.SamplesPerPixel} samples per pixel; allowed are 3 for "
            "colour and 1 for grey and palettes."
        )
    # 3. These as 8 bits.
    overlays = sum(tag in header for tag in _OVERLAYS)
    left_out = {
        f"overlays of the file not shown: {overlays}": overlays,
        "supplemental colours of the file not shown": photometric in _GREY and f"{_PALETTES[0]}Descriptor" in header,
        "colour profile of the file not applied": "ICCProfile" in header,
    }
    for text, there in left_out.items():
        if there:
            steps.add("left out", text)
    if photometric in _GREY:
        shown = _show_grey(pixels, header, window, full_range, steps)
    elif photometric == _PALETTE:
        steps.add("colour", "palette colour to RGB")
        shown = _apply_palette(pixels, header)
    else:
        if photometric != "RGB":
            steps.add("colour", f"{photometric} to RGB")
        as_it_is = pixels.dtype == np.uint8 and header.BitsStored == 8
        shown = pixels if as_it_is else apply_range(pixels, 0, 2**header.BitsStored - 1)
    return to_scale(shown, _spacing(header, steps), max_pixels, steps), shown.shape[:2]


def read_dicom_series(folder: str | Path) -> list[Path]:
    """The DICOM files of one series, in the order of their slices.

    Args:
        folder: a folder; files in it that are not DICOM are passed over, folders in it are not entered.

    Returns:
        Paths, sorted by position along the normal of the slices: from the right to the left, from front to back, or
        from the feet to the head of the patient for the usual sagittal, coronal and axial slices.

    Raises:
        MedicalImageError: if there are no such files, or they do not say where they lie, or they belong to several
            series or have different orientations.
        ImportError: if pydicom is not installed.
    """
    if not Path(folder).is_dir():
        raise MedicalImageError("`folder` is not a folder; allowed are folders with the files of one series.")
    found = []
    for path in sorted(entry.name for entry in Path(folder).iterdir() if entry.is_file()):
        with Path(folder, path).open("rb") as file:
            if is_dicom(file.read(132)):
                found.append(path)
    if not found:
        raise MedicalImageError("`folder` holds no DICOM files; allowed are folders with the files of one series.")
    series = [files for study in read_dicom_studies(folder, found) for files in study]
    if not all(file.is_placed for files in series for file in files):
        raise MedicalImageError(
            "`folder` holds a DICOM file without ImagePositionPatient and ImageOrientationPatient; allowed are "
            "folders with the single-frame slices of one series."
        )
    if len(series) > 1 or series[0][0].order != _BY_POSITION:
        raise MedicalImageError(
            f"`folder` holds files of {len(series)} series, or of different orientations; allowed is one series of "
            "parallel slices."
        )
    return [Path(folder, file.path) for file in series[0]]


class DicomFile(NamedTuple):
    """A file of a series.

    Attributes:
        path: of the file.
        frames: how many pictures it has; 0 for a file without any.
        is_placed: whether it says where it lies.
        order: by what the files of its series are in order.
    """

    path: str
    frames: int
    is_placed: bool
    order: str


_BY_POSITION, _BY_NUMBER, _BY_NAME = "position", "InstanceNumber", "file name"
_OF_SERIES = [
    "StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber", "InstanceNumber", "ImagePositionPatient",
    "ImageOrientationPatient", "NumberOfFrames", "Rows",
]  # fmt: skip


def read_dicom_studies(folder: str | Path, paths: Sequence[str]) -> list[list[list[DicomFile]]]:
    """The series of each study, and the files of each series in the order of their slices; only headers are read.

    Slices are in order by their position along the normal (see [`read_dicom_series`]) where all of a series lie
    parallel, else by InstanceNumber where all have one, else by the files' names.

    Args:
        folder: that the paths are below.
        paths: of DICOM files. One whose header is broken is a series of its own; those that name no study or
            series are of one with the others of their folder.

    Raises:
        ImportError: if pydicom is not installed.
    """
    pydicom = require("pydicom")
    studies: dict[str, dict[str, list[tuple]]] = {}
    for path in paths:
        try:
            header = pydicom.dcmread(Path(folder, path), stop_before_pixels=True, specific_tags=_OF_SERIES)
            study, series = (str(header.get(each) or os.path.dirname(path)) for each in _OF_SERIES[:2])
            frames = int(header.get("NumberOfFrames") or 1) if header.get("Rows") else 0
            numbers = [header.get(each) for each in _OF_SERIES[2:4]]
            series_number, number = (None if each in (None, "") else int(each) for each in numbers)
            place, directions = ([*map(float, header.get(each) or ())] for each in _OF_SERIES[4:6])
        except Exception:  # pydicom raises many kinds; reading the picture says what is wrong
            study, series, frames, series_number, number, place, directions = path, path, 1, None, None, [], []
        is_placed = len(place) == 3 and len(directions) == 6
        entry = (series_number, number, place, directions, DicomFile(path, frames, is_placed, ""))
        studies.setdefault(study, {}).setdefault(series, []).append(entry)
    return [
        [_in_order(files) for files in sorted(study.values(), key=lambda files: files[0][0] or 0)]
        for study in studies.values()
    ]


def _in_order(files: list[tuple]) -> list[DicomFile]:
    """The files of a series, in the order of their slices."""
    _, numbers, places, directions, found = zip(*files)
    if all(file.is_placed for file in found) and np.allclose(directions, directions[0], atol=1e-3):
        normal = np.cross(directions[0][:3], directions[0][3:])
        order, keys = _BY_POSITION, [float(np.dot(place, normal)) for place in places]
    elif None not in numbers:
        order, keys = _BY_NUMBER, numbers
    else:
        order, keys = _BY_NAME, [file.path for file in found]
    ranked = sorted(zip(keys, found), key=lambda each: (each[0], each[1].path))
    return [file._replace(order=order) for _, file in ranked]


def _read_header(file: BinaryIO):
    """The elements that are needed, without the pixels; and whether they are written as the transfer syntax says.

    A deflated data set can only be read as a whole, however much comes out of it, so it is refused.
    """
    pydicom = require("pydicom")
    file.seek(132)  # behind the preamble and `DICM`
    meta = pydicom.filereader.read_dataset(
        file, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, vr, length: tag.group != 2
    )
    syntax = meta.get("TransferSyntaxUID")
    if not syntax or not syntax.is_transfer_syntax:
        raise MedicalImageError(
            f"{arg('source')} does not say how it is stored (TransferSyntaxUID is missing or unknown); allowed are the "
            "transfer syntaxes of DICOM."
        )
    if syntax.is_deflated:
        raise MedicalImageError(f"{arg('source')} is deflated as a whole; allowed are the transfer syntaxes of images.")
    file.seek(0)
    header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=[*ELEMENTS, *_OVERLAYS])
    tag = file.read(4)  # it stopped at the pixels, or at the end
    rows = header.get_item("Rows")  # raw: once an element is accessed, how it was written is lost
    if rows is None or "Columns" not in header or not tag:
        kind = header.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID")
        name = kind.name if kind and kind.type else "an unknown class"
        raise MedicalImageError(
            f"{arg('source')} is a DICOM file without pixels ({name}); allowed are files that hold a picture."
        )
    needed = _NEEDED + _NEEDED_FOR_WHOLE_NUMBERS * (tag in _PIXEL_DATA)
    missing = [name for name in needed if header.get(name) in (None, "")]
    if missing:
        raise MedicalImageError(
            f"{arg('source')} is a DICOM file without {', '.join(missing)}; allowed are whole files."
        )
    if not syntax.is_compressed:
        check_bytes(file, header.Rows * header.Columns * header.BitsAllocated // 8, compressed=False)
    file.seek(0)
    return header, rows.is_implicit_VR == syntax.is_implicit_VR


def _check_shown(header, window: Window | None, full_range: bool, allow_burned_in: bool, max_pixels: int) -> None:
    """Refuse what must not or cannot be shown, before pixels are decoded."""
    if str(header.get("BurnedInAnnotation")).strip().upper() == "YES" and not allow_burned_in:
        raise MedicalImageError(
            f"{arg('source')} says that text is burned into its pixels (BurnedInAnnotation is YES), which may identify "
            f"the patient; allowed are files that do not say so, or {arg('allow_burned_in')}.",
            missing="allow_burned_in",
        )
    check_size(header.Rows, header.Columns, max_pixels)
    photometric = header.PhotometricInterpretation
    if photometric not in (*_GREY, _PALETTE, *_COLOUR):
        raise MedicalImageError(
            f"PhotometricInterpretation of the file is {photometric!r}; allowed are "
            f"{', '.join(map(repr, (*_GREY, _PALETTE, *_COLOUR)))}."
        )
    if photometric not in _GREY and (window is not None or full_range):
        raise MedicalImageError(
            f"{arg('full_range' if window is None else 'window')} is given, but {arg('source')} is in colour; it is "
            "allowed for grey images."
        )


def _apply_functional_groups(header, frame: int) -> None:
    """Slope, window and spacing of a frame of an enhanced file, kept in functional groups, into the header itself."""
    shared = header.get("SharedFunctionalGroupsSequence") or []
    per_frame = header.get("PerFrameFunctionalGroupsSequence") or []
    for group in (*shared, *([per_frame[frame]] if per_frame else [])):
        for macro in _FUNCTIONAL_GROUPS:
            for item in group.get(macro) or []:
                header.update(item)


def _check_hounsfield(window: Window, header) -> None:
    """Refuse a window in Hounsfield units for a file whose values are, as far as it says, in others."""
    unit = header.get("RescaleType") or ("HU" if header.get("Modality") == "CT" else None)
    rescaled = header.get("ModalityLUTSequence") or any(_rescaling(header))
    if unit not in ("HU", "HU_MOD") or not rescaled:
        raise MedicalImageError(
            f"{arg('window')} is {window.preset!r}, a window in Hounsfield units, but {arg('source')} is not a CT "
            "image whose values are rescaled to them; allowed is LEVEL/WIDTH in the image's units."
        )


def _numbers(header, name: str) -> list[float] | None:
    """The values of an element, none if it is missing or empty, or `None` if they are not finite numbers."""
    try:
        value = header.get(name)
        numbers = [float(number) for number in np.atleast_1d([] if value is None else value) if str(number).strip()]
    except (TypeError, ValueError):
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def _rescaling(header) -> tuple[list[float], list[float]]:
    """RescaleSlope and RescaleIntercept, each empty if it is missing."""
    slopes, intercepts = (_numbers(header, name) for name in ("RescaleSlope", "RescaleIntercept"))
    if slopes is None or intercepts is None:
        raise MedicalImageError(
            f"{arg('source')} states a RescaleSlope or RescaleIntercept that is not a number, so the units of its "
            "values are unknown; allowed are decimal numbers with a point."
        )
    return slopes, intercepts


def _spacing(header, steps: Steps) -> tuple[float, float] | None:
    """How high and how wide a pixel is, in any unit, if the file says it."""
    for name in _SPACINGS:
        numbers = _numbers(header, name)
        if numbers and len(numbers) == 2 and min(numbers) > 0:
            return numbers[0], numbers[1]
        if numbers != []:
            steps.add("geometry", f"{name} of the file left out: it is no pair of numbers above 0")
    return None


def _decode(file: BinaryIO, as_stated: bool, header, frame: int) -> np.ndarray:
    """Stored values of one frame, `(height, width)` or `(height, width, 3)`; YBR is RGB afterwards."""
    library, syntax = require("pydicom.pixels"), header.file_meta.TransferSyntaxUID
    pixel_array = library.pixel_array
    # pydicom reads single frames only from files whose elements are written as the transfer syntax says; some are not.
    source = file if as_stated else require("pydicom").dcmread(file, specific_tags=[*ELEMENTS, "PixelData"])
    try:
        decoder = library.get_decoder(syntax)
    except NotImplementedError:
        raise MedicalImageError(
            f"the pixels of {arg('source')} are stored as {syntax.name}; allowed are those of images."
        ) from None
    if not decoder.is_available:
        raise ImportError(f'The pixels are compressed as {syntax.name}: pip install "lladamedv[medical-codecs]"')
    if not syntax.is_encapsulated:
        if header.BitsAllocated == 1 and header.Rows * header.Columns % 8:
            # Frames that begin within a byte, of which pydicom alone reads the last bits only with all the others.
            pixels = pixel_array(source)
            return pixels[frame] if pixels.ndim == 3 else pixels
        stored, high = header.get("BitsStored"), header.get("HighBit")
        if header.SamplesPerPixel > 1 or high is None or not stored <= high < header.BitsAllocated:
            return pixel_array(source, index=frame)
        # Where the stored bits are not the lowest ones, which pydicom takes; below them may be overlays.
        pixels = pixel_array(source, index=frame, correct_unused_bits=False)
        return pixels << (header.BitsAllocated - 1 - high) >> (header.BitsAllocated - stored)
    for plugin in sorted(decoder.available_plugins, key="gdcm".__eq__):  # gdcm last, and for files alone
        try:
            if plugin != "gdcm":
                return pixel_array(source, index=frame, decoding_plugin=plugin)
            if as_stated:
                return decode_with_gdcm(file, frame)
        except RuntimeError:
            continue
    if syntax == require("pydicom.uid").JPEGExtended12Bit and header.BitsStored > 8:
        reason = "there is no decoder here for 12 bits; decompress the file first, for example with DCMTK's dcmdjpeg"
    elif find_spec("gdcm") is None:
        reason = 'the file is broken, or a more able decoder is needed (pip install "lladamedv[medical-codecs]")'
    else:
        reason = "the file is broken, or of a variant that is not supported"
    raise MedicalImageError(f"the pixels of {arg('source')}, stored as {syntax.name}, cannot be decoded: {reason}.")


def _show_grey(pixels: np.ndarray, header, window: Window | None, full_range: bool, steps: Steps) -> np.ndarray:
    """Stored grey values as they are shown: padding is always black."""
    whole = pixels.dtype.kind != "f"
    steps.choices |= dict.fromkeys(("window", "full_range") if whole else ("window",))
    padding = _padding(pixels, header)
    if full_range and not whole:
        raise MedicalImageError(
            f"{arg('full_range')} is given, but {arg('source')} has floating-point values; it is allowed for whole "
            "numbers."
        )
    if full_range:
        low = -(2 ** (header.BitsStored - 1)) if header.PixelRepresentation else 0
        high = low + 2**header.BitsStored - 1
        steps.add("levels", f"full range of {header.BitsStored} bits: {low} to {high}")
        grey = apply_range(pixels, low, high)
    else:
        grey = _apply_voi(_apply_modality(pixels, header, steps), ~padding, header, window, steps)
    # Each of the two says that the least value is white; said twice it still means one inversion.
    for reason in (header.PhotometricInterpretation, f"PresentationLUTShape {header.get('PresentationLUTShape')}"):
        if reason in ("MONOCHROME1", "PresentationLUTShape INVERSE"):
            steps.add("levels", f"inverted: {reason}")
            grey = 255 - grey
            break
    if padding.any():
        steps.add("levels", f"{int(padding.sum())} padding pixels left out: black")
    return np.where(padding, np.uint8(0), grey)


def _padding(pixels: np.ndarray, header) -> np.ndarray:
    """Which pixels are padding (PS3.3, C.7.5.1.1.2)."""
    kind = {"float32": "Float", "float64": "DoubleFloat"}.get(pixels.dtype.name, "")
    first, last = (header.get(f"{kind}PixelPadding{end}") for end in ("Value", "RangeLimit"))
    if first is None:
        return np.zeros(pixels.shape, bool)
    # As values of the pixels' type: files write those of signed pixels unsigned, too.
    low, high = sorted(np.asarray([first, first if last is None else last]).astype(pixels.dtype).tolist())
    return (pixels >= low) & (pixels <= high)


def _apply_modality(pixels: np.ndarray, header, steps: Steps) -> np.ndarray:
    """Stored values into the units of the modality, such as Hounsfield units (PS3.3, C.11.1)."""
    if header.get("ModalityLUTSequence"):
        values, table, _ = _look_up(pixels, header.ModalityLUTSequence[0], pixels.dtype.kind == "i", header)
        steps.add("levels", f"modality LUT: table of {len(table)} entries")
        return values
    slopes, intercepts = _rescaling(header)
    if not slopes and not intercepts:
        return pixels
    slope, intercept = (*slopes, 1.0)[0] or 1.0, (*intercepts, 0.0)[0]
    note = " (not stated)" if not slopes else " (the file says 0)" if not slopes[0] else ""
    other = "" if intercepts else " (not stated)"
    steps.add("levels", f"modality LUT: slope {slope:g}{note}, intercept {intercept:g}{other}")
    return pixels.astype(np.float64) * slope + intercept


def _apply_voi(values: np.ndarray, used: np.ndarray, header, window: Window | None, steps: Steps) -> np.ndarray:
    """Values into 8 bits: by the caller's window, the file's table, the file's window, or percentiles."""
    function = str(header.get("VOILUTFunction") or "LINEAR").strip().upper()
    if window is not None:
        function = function if function in WINDOW_FUNCTIONS else "LINEAR"
        if function == "LINEAR" and (window.width < 1 or (values % 1).any()):  # it is made for whole numbers
            function = "LINEAR_EXACT"
        return apply_window(values, window, steps, function)
    if header.get("VOILUTSequence"):
        return _apply_voi_table(values, header, steps)
    levels, widths = (_numbers(header, name) for name in ("WindowCenter", "WindowWidth"))
    unusable = None
    if levels is None or widths is None:
        unusable = "its level or width is not a number"
    elif bool(levels) != bool(widths):
        unusable = "its level or width is missing"
    elif levels and widths[0] <= 0:
        unusable = f"its width is {widths[0]:g}"
    elif levels and function not in WINDOW_FUNCTIONS:
        unusable = "its function (VOILUTFunction) is not known"
    elif levels:
        note, origin = "", f" from the file{_first_of(len(levels))}"
        if function == "LINEAR" and widths[0] < 1:
            function, note = "LINEAR_EXACT", " (LINEAR needs a width of at least 1)"
        return apply_window(values, Window(levels[0], widths[0]), steps, function, origin, note)
    if unusable:
        steps.add("levels", f"window of the file not applied: {unusable}", warns=True)
    return apply_percentiles(values, steps, PERCENTILES, used)


def _apply_voi_table(values: np.ndarray, header, steps: Steps) -> np.ndarray:
    items = header.VOILUTSequence
    slopes, intercepts = _rescaling(header)
    signed = header.get("PixelRepresentation") == 1 or any(number < 0 for number in (*slopes[:1], *intercepts[:1]))
    signed = signed and not header.get("ModalityLUTSequence")  # whose output is unsigned
    levels, table, bits = _look_up(np.rint(values), items[0], signed, header)
    greatest, most = 2**bits - 1, int(table.max())
    note = ""
    if most > greatest or (bits > 8 and most <= greatest // 2):
        note = f", {bits} bits declared, but scaled by its greatest value {most}"
        greatest = most
    steps.add("levels", f"VOI LUT of the file: table of {len(table)} entries{_first_of(len(items))}{note}")
    return apply_range(levels, 0, greatest)


def _apply_palette(pixels: np.ndarray, header) -> np.ndarray:
    segmented = f"Segmented{_PALETTES[0]}Data" in header
    kind = "Segmented" if segmented else ""
    if not all(header.get(f"{name}Descriptor") and header.get(f"{kind}{name}Data") for name in _PALETTES):
        raise MedicalImageError(
            f"{arg('source')} is PALETTE COLOR, but holds no whole palette; allowed are files that hold it."
        )
    if segmented:
        count, first, bits = header.RedPaletteColorLookupTableDescriptor
        # pydicom wraps around beyond the end of the table, where the last entry counts.
        within = np.clip(pixels, first, first + (count or 2**16) - 1)
        return apply_range(require("pydicom.pixels").apply_color_lut(within, header), 0, 2**bits - 1)
    found = [_look_up(pixels, header, pixels.dtype.kind == "i", header, name) for name in _PALETTES]
    bits, greatest = found[0][2], max(int(table.max()) for _, table, _ in found)
    # 8 bits that are written in words of 16, in the lower or the upper half of them, despite what is declared.
    bits = 16 if greatest >= 2**bits else 8 if greatest < 2**8 else bits
    return apply_range(np.stack([levels for levels, _, _ in found], axis=-1), 0, 2**bits - 1)


def _look_up(values, item, signed: bool, header, name: str = "LUT") -> tuple[np.ndarray, np.ndarray, int]:
    """Values through a look-up table (PS3.3, C.11.1.1.1 and C.11.2.1.1); beyond its ends its outermost entries count.

    pydicom's own functions take tables as they are declared; files declare first values and bits wrongly.

    Args:
        values: what is to be mapped, whole numbers.
        item: what holds the table.
        signed: whether such values can be negative. The standard ties the first value mapped to that, but implicit VR
            does not state it, and files write it the other way, too: 64512 for −1024.
        name: what the elements' names begin with.

    Returns:
        The values mapped, the table, and its bits per entry as declared.
    """
    count, first, bits = (int(number) for number in item[f"{name}Descriptor"].value)
    data = item[f"{name}Data"].value
    count = count % 2**16 or 2**16
    if signed and first >= 2**15 and first > values.max():
        first -= 2**16
    elif not signed and first + count <= 0:
        first += 2**16
    order = "<" if header.file_meta.TransferSyntaxUID.is_little_endian else ">"
    if not isinstance(data, bytes):
        data = (np.atleast_1d(data).astype(np.int64) % 2**16).astype(f"{order}u2").tobytes()
    kind = np.dtype(np.uint8 if bits <= 8 and len(data) < 2 * count else f"{order}u2")
    table = np.frombuffer(data, kind, len(data) // kind.itemsize)[:count]
    return table[np.clip(values.astype(np.int64) - first, 0, len(table) - 1)], table, bits


def _first_of(count: int) -> str:
    return f" (first of {count})" if count > 1 else ""
