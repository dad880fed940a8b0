"""DICOM files into 8-bit pixels, in the order that the standard fixes: modality LUT, VOI LUT or window, inversion.

Only the elements that say how pixels are shown are read from a file; who the patient is, when and where, never is.
"""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .medical_shared import (
    WINDOW_FUNCTIONS,
    WINDOW_PRESETS,
    MedicalImageError,
    apply_percentiles,
    apply_range,
    apply_window,
    arg,
    check_bytes,
    check_size,
    check_window,
    choose_index,
    describe_window,
    require,
)


PERCENTILES = (0.5, 99.5)
_GREY, _COLOUR = ("MONOCHROME1", "MONOCHROME2"), ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_PALETTE = "PALETTE COLOR"
_PALETTE_TABLES = [
    f"{segmented}{colour}PaletteColorLookupTable{part}"
    for colour in ("Red", "Green", "Blue")
    for segmented, part in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data"))
]
_ELEMENTS = [
    *("Modality", "BurnedInAnnotation", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated"),
    *("BitsStored", "PixelRepresentation", "PhotometricInterpretation", "PresentationLUTShape"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept"),
    *("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *_PALETTE_TABLES,
]
# What gdcm itself prints must not come between.
_DECODE_WITH_GDCM = """
import io, os, sys
import numpy
from pydicom.pixels import pixel_array
output = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
pixels = pixel_array(io.BytesIO(sys.stdin.buffer.read()), index=int(sys.argv[1]), decoding_plugin="gdcm")
whole = io.BytesIO()
numpy.save(whole, pixels)
output.write(whole.getvalue())
"""
_DECODING_SECONDS = 60


def is_dicom(head: bytes) -> bool:
    """Whether a file that begins with these 132 bytes is a DICOM file: a preamble, then `DICM`."""
    return head[128:132] == b"DICM"


def read_dicom(
    file: BinaryIO,
    steps: list[str],
    *,
    frame: int | None,
    window,
    full_range: bool,
    allow_burned_in: bool,
    max_pixels: int,
) -> np.ndarray:
    """One frame as 8-bit pixels.

    Args:
        file: open binary file.
        steps: what is done is added to it.
        frame, window, full_range, allow_burned_in, max_pixels: see [`read_medical_image`].

    Returns:
        `uint8` `(height, width)`, or `(height, width, 3)` for colour.

    Raises:
        MedicalImageError, ImportError: see [`read_medical_image`].
    """
    header = _read_header(file)
    if header.get("BurnedInAnnotation") == "YES" and not allow_burned_in:
        raise MedicalImageError(
            f"{arg('source')} says that text is burned into its pixels (BurnedInAnnotation is YES), which may tell who "
            f"the patient is; allowed are files that do not say so, or {arg('allow_burned_in')}."
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
    if isinstance(window, str) and window in WINDOW_PRESETS and header.get("Modality", "CT") != "CT":
        raise MedicalImageError(
            f"{arg('window')} is {window!r}, a window in Hounsfield units, but {arg('source')} is not a CT; allowed is "
            "LEVEL/WIDTH in the image's units."
        )
    if not header.file_meta.TransferSyntaxUID.is_compressed:
        check_bytes(file, header.Rows * header.Columns * header.BitsAllocated // 8, compressed=False)
    frames = int(header.get("NumberOfFrames") or 1)
    chosen = choose_index("frame", frame, frames, "frame", steps)
    _apply_functional_groups(header, chosen)
    pixels = _decode(file, header, chosen)

    if photometric == _PALETTE:
        steps.append("palette colour to RGB")
        return _apply_palette(pixels, header)
    if photometric in _COLOUR:
        if photometric != "RGB":
            steps.append(f"{photometric} to RGB")
        return pixels if header.BitsStored == 8 else apply_range(pixels, 0, 2**header.BitsStored - 1)
    if full_range:
        low = -(2 ** (header.BitsStored - 1)) if header.PixelRepresentation else 0
        steps.append(f"full range of {header.BitsStored} bits: {low} to {low + 2**header.BitsStored - 1}")
        grey = apply_range(pixels, low, low + 2**header.BitsStored - 1)
    else:
        grey = _apply_voi(_apply_modality(pixels, header, steps), _not_padding(pixels, header), header, window, steps)
    # Each of the two says that the least value is white; said twice it still means one inversion.
    for reason in (f"{photometric}", f"PresentationLUTShape {header.get('PresentationLUTShape')}"):
        if reason in ("MONOCHROME1", "PresentationLUTShape INVERSE"):
            steps.append(f"inverted: {reason}")
            return 255 - grey
    return grey


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
    pydicom = require("pydicom")
    found, series, orientations = [], set(), []
    if not Path(folder).is_dir():
        raise MedicalImageError("`folder` is not a folder; allowed are folders with the files of one series.")
    wanted = ["SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient"]
    for path in sorted(entry for entry in Path(folder).iterdir() if entry.is_file()):
        with path.open("rb") as file:
            if not is_dicom(file.read(132)):
                continue
            file.seek(0)
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=wanted)
            if not header.get("ImagePositionPatient") or not header.get("ImageOrientationPatient"):
                raise MedicalImageError(
                    "`folder` holds a DICOM file without ImagePositionPatient and ImageOrientationPatient; allowed are "
                    "folders with the single-frame slices of one series."
                )
        series.add(header.get("SeriesInstanceUID"))
        orientations.append([float(number) for number in header.ImageOrientationPatient])
        found.append((path, [float(number) for number in header.ImagePositionPatient]))
    if not found:
        raise MedicalImageError("`folder` holds no DICOM files; allowed are folders with the files of one series.")
    if len(series) > 1 or not np.allclose(orientations, orientations[0], atol=1e-3):
        raise MedicalImageError(
            f"`folder` holds files of {len(series)} series, or of different orientations; allowed is one series of "
            "parallel slices."
        )
    normal = np.cross(orientations[0][:3], orientations[0][3:])
    return [path for path, position in sorted(found, key=lambda item: float(np.dot(item[1], normal)))]


def _read_header(file: BinaryIO):
    """The elements that are needed, without the pixels.

    A deflated data set can only be read as a whole, however much comes out of it, so it is refused.
    """
    pydicom = require("pydicom")
    file.seek(132)  # behind the preamble and `DICM`
    meta = pydicom.filereader.read_dataset(
        file, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, vr, length: tag.group != 2
    )
    if meta.TransferSyntaxUID.is_deflated:
        raise MedicalImageError(f"{arg('source')} is deflated as a whole; allowed are the transfer syntaxes of images.")
    file.seek(0)
    header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_ELEMENTS)
    file.seek(0)
    return header


def _apply_functional_groups(header, frame: int) -> None:
    """Enhanced CT and MR: slope and window of a frame, which are kept in functional groups, into the header itself."""
    shared = header.get("SharedFunctionalGroupsSequence") or []
    per_frame = header.get("PerFrameFunctionalGroupsSequence") or []
    for group in (*shared, *([per_frame[frame]] if per_frame else [])):
        for macro in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for item in group.get(macro) or []:
                header.update(item)


def _decode(file: BinaryIO, header, frame: int) -> np.ndarray:
    """Stored values of one frame, `(height, width)` or `(height, width, 3)`; YBR is RGB afterwards."""
    from pydicom.pixels import get_decoder, pixel_array

    syntax = header.file_meta.TransferSyntaxUID
    name = syntax.name if syntax.is_transfer_syntax else "an unknown transfer syntax"
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise MedicalImageError(f"the pixels of the file are stored as {name}; allowed are those of images.") from None
    if not decoder.is_available:
        raise ImportError(f'The pixels are compressed as {name}: pip install "lladamedv[medical-codecs]"')
    plugins = sorted(decoder.available_plugins, key="gdcm".__eq__)  # gdcm last
    for plugin in plugins if syntax.is_encapsulated else [""]:
        try:
            if plugin == "gdcm":
                return _decode_with_gdcm(file, frame)
            return pixel_array(file, index=frame, decoding_plugin=plugin)
        except RuntimeError:
            continue
    raise MedicalImageError(
        f"the pixels of the file, stored as {name}, cannot be decoded: the file is broken, or a more able decoder "
        'is needed (pip install "lladamedv[medical-codecs]").'
    )


def _decode_with_gdcm(file: BinaryIO, frame: int) -> np.ndarray:
    """As `pydicom.pixels.pixel_array`, in a process of its own: some broken files abort the one that gdcm runs in.

    Raises:
        RuntimeError: if that process fails, or takes longer than a minute.
    """
    file.seek(0)
    command = [sys.executable, "-P", "-c", _DECODE_WITH_GDCM, str(frame)]
    try:
        done = subprocess.run(command, input=file.read(), capture_output=True, check=True, timeout=_DECODING_SECONDS)
    except subprocess.SubprocessError as error:
        raise RuntimeError(str(error)) from error
    return np.load(io.BytesIO(done.stdout))


def _look_up(values: np.ndarray, first: int, table: np.ndarray) -> np.ndarray:
    """Values through a table that begins at `first`; beyond its ends its first and last entry count."""
    return table[np.clip(values.astype(np.int64) - first, 0, len(table) - 1)]


def _table(descriptor, data, header) -> tuple[int, np.ndarray, int]:
    """First value mapped, entries, and their greatest possible value of a look-up table (PS3.3, C.11.1.1.1)."""
    count, first, bits = descriptor
    order = "<" if header.file_meta.TransferSyntaxUID.is_little_endian else ">"
    if not isinstance(data, bytes):
        data = np.atleast_1d(np.asarray(data, dtype=f"{order}u2")).tobytes()
    count = count or 2**16
    table = np.frombuffer(data, np.uint8 if len(data) < 2 * count else f"{order}u2")[:count]
    return first, table, 2 ** min(bits, 8 * table.itemsize) - 1


def _apply_palette(pixels: np.ndarray, header) -> np.ndarray:
    if "SegmentedRedPaletteColorLookupTableData" in header:
        from pydicom.pixels import apply_color_lut

        count, first, bits = header.RedPaletteColorLookupTableDescriptor
        # pydicom wraps around beyond the end of the table, where the last entry counts.
        colours = apply_color_lut(np.clip(pixels, first, first + (count or 2**16) - 1), header)
        return apply_range(colours, 0, 2**bits - 1)
    channels = []
    for colour in ("Red", "Green", "Blue"):
        name = f"{colour}PaletteColorLookupTable"
        first, table, greatest = _table(header[f"{name}Descriptor"].value, header[f"{name}Data"].value, header)
        channels.append(apply_range(_look_up(pixels, first, table), 0, greatest))
    return np.stack(channels, axis=-1)


def _apply_modality(pixels: np.ndarray, header, steps: list[str]) -> np.ndarray:
    """Stored values into the units of the modality, such as Hounsfield units (PS3.3, C.11.1)."""
    if header.get("ModalityLUTSequence"):
        item = header.ModalityLUTSequence[0]
        first, table, _ = _table(item.LUTDescriptor, item.LUTData, header)
        steps.append(f"modality LUT: table of {len(table)} entries")
        return _look_up(pixels, first, table)
    if header.get("RescaleSlope") is None or header.get("RescaleIntercept") is None:
        return pixels
    slope, intercept = float(header.RescaleSlope), float(header.RescaleIntercept)
    steps.append(f"modality LUT: slope {slope:g}, intercept {intercept:g}")
    return pixels.astype(np.float64) * slope + intercept


def _not_padding(pixels: np.ndarray, header) -> np.ndarray | None:
    """Which pixels are not padding (PS3.3, C.7.5.1.1.2), or `None` if the file names no padding value."""
    if header.get("PixelPaddingValue") is None:
        return None
    # As a value of the pixels' type: files write that of signed pixels unsigned, too.
    ends = [header.PixelPaddingValue, header.get("PixelPaddingRangeLimit", header.PixelPaddingValue)]
    low, high = sorted(np.asarray(ends).astype(pixels.dtype).tolist())
    return (pixels < low) | (pixels > high)


def _apply_voi(values: np.ndarray, used, header, window, steps: list[str]) -> np.ndarray:
    """Values into 8 bits: by the caller's window, the file's table, the file's window, or percentiles."""
    function = header.get("VOILUTFunction") or "LINEAR"
    if function not in WINDOW_FUNCTIONS:
        raise MedicalImageError(
            f"VOILUTFunction of the file is not known; allowed are {', '.join(map(repr, WINDOW_FUNCTIONS))}."
        )
    if window is not None:
        level, width = check_window(window)
        function = "LINEAR_EXACT" if function == "LINEAR" and width < 1 else function
        steps.append(describe_window(window, level, width, function))
        return apply_window(values, level, width, function)
    if header.get("VOILUTSequence"):
        items = header.VOILUTSequence
        first, table, greatest = _table(items[0].LUTDescriptor, items[0].LUTData, header)
        steps.append(f"VOI LUT of the file: table of {len(table)} entries{_first_of(len(items))}")
        return apply_range(_look_up(np.rint(values), first, table), 0, greatest)
    stated = (header.get(name) for name in ("WindowCenter", "WindowWidth"))
    levels, widths = (np.atleast_1d([] if value is None else value) for value in stated)
    if levels.size and widths.size:
        level, width = float(levels[0]), float(widths[0])
        if width > 0:
            exact = function == "LINEAR" and width < 1
            function = "LINEAR_EXACT" if exact else function
            note = " (LINEAR needs a width of at least 1)" if exact else ""
            steps.append(
                f"window {level:g}/{width:g} (level/width) from the file{_first_of(levels.size)}, {function}{note}"
            )
            return apply_window(values, level, width, function)
        steps.append(f"window of the file not applied: its width is {width:g}")
    if used is not None:
        steps.append(f"{int((~used).sum())} padding pixels left out of the percentiles")
    return apply_percentiles(values, steps, PERCENTILES, used)


def _first_of(count: int) -> str:
    return f" (first of {count})" if count > 1 else ""
