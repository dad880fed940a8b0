"""What all medical image files have in common: recognised by content, arguments checked, no patient identified."""

import gzip
import inspect
import io
import pickle
import sys
import traceback

import nibabel
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from lladamedv.processing.medical_images import (
    READING_OPTIONS,
    WINDOW_PRESETS,
    MedicalImageError,
    read_dicom_series,
    read_medical_image,
)
from tests.dicom_files import SECRET, SECRET_DATE, SECRET_UID, dataset, item, sequence, to_bytes
from tests.reading import encoded, pixels, read, said, tiff


PIXELS = np.arange(256, dtype=np.uint16).reshape(16, 16)


def files():
    """One file of each kind, full of marked texts."""
    nifti = nibabel.Nifti1Image(PIXELS[..., None].astype(np.int16), np.eye(4))
    nifti.header["descrip"], nifti.header["db_name"], nifti.header["aux_file"] = SECRET, SECRET, SECRET
    texts, exif = PngImagePlugin.PngInfo(), Image.Exif()
    texts.add_text("Patient", SECRET)
    exif[0x010E], exif[0x0132] = SECRET, SECRET_DATE
    enhanced = dataset(np.stack([PIXELS, PIXELS]))
    enhanced.PerFrameFunctionalGroupsSequence = sequence(
        *(item(FrameContentSequence=sequence(item(FrameComments=SECRET, StackID=SECRET))) for _ in range(2))
    )
    return {
        "DICOM": to_bytes(dataset(PIXELS)),
        "enhanced": to_bytes(enhanced),
        "NIfTI": nifti.to_bytes(),
        "NIfTI.gz": gzip.compress(nifti.to_bytes()),
        "PNG": encoded(PIXELS, pnginfo=texts, exif=exif),
        "TIFF": encoded(PIXELS, "TIFF", description=SECRET),
    }


FILES = files()


def assert_names_no_patient(text):
    for secret in (SECRET, SECRET_DATE, SECRET_UID):
        assert secret not in text


@pytest.mark.parametrize("kind", list(FILES))
def test_no_patient_is_named(kind, tmp_path, caplog, recwarn, capsys):
    caplog.set_level("INFO")
    for library in ("lladamedv", "pydicom", "nibabel"):  # Pillow logs the tags of TIFF files at level DEBUG
        caplog.set_level("DEBUG", library)
    file = FILES[kind]
    assert SECRET.encode() in (gzip.decompress(file) if kind.endswith("gz") else file)
    path = tmp_path / f"{SECRET}_{SECRET_DATE}.bin"
    path.write_bytes(file)
    result = read_medical_image(path)
    texts = [repr(result), str(result.image.info), *said(result)]
    assert not result.image.info and not result.image.getexif() and not hasattr(result.image, "filename")
    for broken in (file[:-40], file[: len(file) // 2], file[:200], file[100:], b"", SECRET.encode() * 50):
        path.write_bytes(broken)
        for source in (path, broken):
            try:
                read(source, frame=5 if kind == "enhanced" else None)
            except MedicalImageError as error:
                texts += traceback.format_exception(error)
    path.write_bytes(file)
    wrong = ({"frame": 99}, {"page": 99}, {"slice_index": 99}, {"window": "lungs"}, {"time_index": 7})
    for source, options in (*((path, each) for each in wrong), (tmp_path / SECRET, {}), (tmp_path, {})):
        with pytest.raises(MedicalImageError) as failure:
            read(source, **options)
        texts += traceback.format_exception(failure.value)
    assert len(texts) > 20
    texts += [caplog.text, *(str(warning.message) for warning in recwarn), *capsys.readouterr()]
    assert_names_no_patient("\n".join(texts))


def test_series_names_no_patient(tmp_path):
    (tmp_path / SECRET).write_bytes(FILES["DICOM"])
    for folder in (tmp_path, tmp_path / SECRET):
        with pytest.raises(MedicalImageError) as failure:
            read_dicom_series(folder)
        assert_names_no_patient("".join(traceback.format_exception(failure.value)))


# Sources


class Pipe(io.RawIOBase):
    """A file that cannot seek."""

    def __init__(self, content):
        self.content = io.BytesIO(content)

    def readable(self):
        return True

    def readinto(self, buffer):
        return self.content.readinto(buffer)


@pytest.mark.parametrize("kind", list(FILES))
def test_content_counts_not_names_and_sources_of_all_kinds_agree(kind, tmp_path):
    expected = pixels(FILES[kind])
    path = tmp_path / "picture.jpg"
    path.write_bytes(FILES[kind])
    opened = io.BytesIO(FILES[kind])
    opened.seek(7)
    for source in (path, str(path), opened, Pipe(FILES[kind])):
        assert np.array_equal(pixels(source), expected)
    assert not opened.closed


@pytest.mark.parametrize("source", [None, 3, io.StringIO("text"), [PIXELS]])
def test_sources_of_other_kinds(source):
    with pytest.raises(MedicalImageError, match=r"`source` is of type .*; allowed are paths, bytes, binary files"):
        read(source)


def test_paths_that_are_no_files(tmp_path):
    for path, reason in ((tmp_path, "it is a folder"), (tmp_path / "x", "there is no such file"), ("\0", "ValueError")):
        with pytest.raises(MedicalImageError, match=rf"`source` is a path that cannot be opened \({reason}"):
            read(path)


# Options


@pytest.mark.parametrize(("kind", "argument"), [
    ("DICOM", {"page": 0}),
    ("DICOM", {"slice_index": 0}),
    ("DICOM", {"axis": "axial"}),
    ("DICOM", {"background": "black"}),
    ("NIfTI", {"frame": 0}),
    ("NIfTI", {"full_range": True}),
    ("NIfTI", {"background": "black"}),
    ("PNG", {"frame": 0}),
    ("PNG", {"time_index": 0}),
    ("PNG", {"allow_burned_in": True}),
    ("array", {"page": 0}),
])  # fmt: skip
def test_arguments_that_do_not_apply(kind, argument):
    (name,) = argument
    with pytest.raises(MedicalImageError, match=rf"`{name}` is given, but `source` is a .*; allowed for it are `"):
        read(PIXELS if kind == "array" else FILES[kind], **argument)


@pytest.mark.parametrize("window", [
    "lungs",
    (40,),
    (40, 0),
    (40, -1),
    (40, float("nan")),
    ("40", 400),
    40,
    [1, 2, 3],
    "40/0",
    "40,400",
    "40/400/4",
    "",
])  # fmt: skip
def test_windows_are_checked_first(window, tmp_path):
    with pytest.raises(MedicalImageError, match=r"`window` is .*; allowed are lung, mediastinum.* and LEVEL/WIDTH"):
        read(tmp_path / "no file", window=window)


@pytest.mark.parametrize("window", ["40/400", " 40 / 400", "4e1/400", "abdomen", (40, 400), [40.0, 400]])
def test_windows_as_they_are_typed(window):
    picture = read(np.array([[-160, 42, 240]]), window=window)
    assert np.asarray(picture.image)[0, :, 0].tolist() == [0, 129, 255]
    preset = ", preset abdomen" if window == "abdomen" else ""
    assert said(picture) == [f"window 40/400 (level/width{preset}), LINEAR_EXACT"]


def test_presets_are_the_published_windows_in_hounsfield_units():
    assert WINDOW_PRESETS == {
        **{"lung": (-600, 1500), "mediastinum": (50, 350), "abdomen": (40, 400), "liver": (60, 160)},
        **{"brain": (40, 80), "stroke": (40, 40), "subdural": (75, 215), "bone": (400, 1800)},
    }
    for unsigned in (PIXELS, PIXELS.astype(np.uint8), Image.fromarray(PIXELS.astype(np.uint8)), FILES["PNG"]):
        with pytest.raises(MedicalImageError, match="'lung', a window in Hounsfield units, but `source` has"):
            read(unsigned, window="lung")


def test_windows_and_full_ranges_exclude_each_other():
    with pytest.raises(MedicalImageError, match="`window` and `full_range` are both given; allowed is one of the two"):
        read(PIXELS, window="lung", full_range=True)


@pytest.mark.parametrize(("background", "allowed"), [
    *((colour, True) for colour in ("yellow", "#FFFF00", "#ff0", (255, 255, 0), [255, 255, 0])),
    *((colour, False) for colour in ("yello", "#ffff0080", (255, 255), (256, 0, 0), 3, 0)),
])  # fmt: skip
def test_backgrounds_as_they_are_typed(background, allowed):
    clear = Image.new("RGBA", (1, 1), (0, 0, 0, 0))
    if allowed:
        assert pixels(clear, background=background)[0, 0].tolist() == [255, 255, 0]
    else:
        with pytest.raises(MedicalImageError, match=r"`background` is .*; allowed are names of colours such as black"):
            read(clear, background=background)


def test_options_are_those_of_the_reader_and_errors_use_the_names_of_an_interface():
    arguments = inspect.signature(read_medical_image).parameters
    assert {option.argument for option in READING_OPTIONS} == {*arguments} - {"source", "max_pixels"}
    flags = {option.argument: f"--{option.name.replace('_', '-')}" for option in READING_OPTIONS} | {"source": "IMAGE"}
    with pytest.raises(MedicalImageError) as failure:
        read(FILES["DICOM"], slice_index=3)
    for error in (failure.value, pickle.loads(pickle.dumps(failure.value))):
        assert error.missing is None and str(error).startswith("`slice_index` is given, but `source` is")
        assert error.told(flags.get) == (
            "--slice is given, but IMAGE is a DICOM file; allowed for it are --frame, --window, --full-range, "
            "--allow-burned-in."
        )
    with pytest.raises(MedicalImageError) as failure:
        read(nibabel.Nifti1Image(np.zeros((2, 2, 2, 3), np.int16), np.eye(4)).to_bytes())
    assert failure.value.missing == "time_index"


@pytest.mark.parametrize(
    ("file", "library"),
    [(FILES["DICOM"], "pydicom"), (FILES["NIfTI"], "nibabel"), (tiff(PIXELS.astype(np.float64)), "tifffile")],
)
def test_missing_library_names_the_extra(file, library, monkeypatch):
    read(file)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf'needs {library}: pip install "lladamedv\[medical\]"'):
        read(file)
    read(FILES["PNG"])  # needs none of them


# Results


def test_every_label_is_seen_through_every_door():
    """Of a label map with few marked pixels, which the percentiles of all pixels would hide."""
    labels = np.zeros((40, 40), np.uint16)
    labels[0, :3], labels[20:, :] = [1, 3, 5], 2
    volume = nibabel.Nifti1Image(labels[::-1, ::-1].T[..., None], np.eye(4)).to_bytes()
    picture = encoded(labels.astype(np.float32), "TIFF")
    for source in (labels, labels.astype(float), encoded(labels), picture, dataset(labels), volume):
        result = read(source)
        shown = np.asarray(result.image)[..., 0]
        assert [shown[0, 5], *shown[0, :3], shown[30, 0]] == [0, 51, 153, 255, 102]
        assert "least and greatest value (as of a mask, different ones: 5): 0 to 5" in said(result)


def test_steps_are_logged(caplog):
    with caplog.at_level("INFO"):
        steps = read(FILES["DICOM"]).steps
        read(dataset(np.stack([PIXELS] * 3)))
    assert len(steps) == 1 and steps[0].kind == "levels" and not steps[0].warns
    first, warning, _ = caplog.records
    assert str(steps[0]) in first.getMessage() and "16 by 16 pixels" in first.getMessage()
    assert warning.levelname == "WARNING" and "frame 1 of 3 (from 0): the middle one" in warning.getMessage()


@pytest.mark.parametrize("kind", ["DICOM", "NIfTI", "PNG"])
@pytest.mark.parametrize("options", [{}, {"window": "90/120"}])
def test_the_window_that_is_shown_is_known(kind, options):
    """Read with it, a file is the same picture, but for what the function of the file makes of its ends."""
    shown = read_medical_image(FILES[kind], **options)
    again = read_medical_image(FILES[kind], window=shown.window)
    assert np.abs(np.asarray(again.image, int) - np.asarray(shown.image, int)).max() <= (kind == "DICOM")
    if options:
        assert shown.window == (90, 120)


def test_colours_have_no_window():
    assert read_medical_image(Image.new("RGB", (4, 4), "red")).window is None
