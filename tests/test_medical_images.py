"""What all kinds of medical image files have in common: told by content, arguments checked, nobody identified."""

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

from lladamedv.processing import LLaDAMedVImageProcessor
from lladamedv.processing.medical_images import (
    READING_OPTIONS,
    WINDOW_PRESETS,
    MedicalImageError,
    read_dicom_series,
    read_medical_image,
)
from tests.dicom_files import SECRET, SECRET_DATE, SECRET_UID, dataset, item, sequence, to_bytes
from tests.reading import said


PIXELS = np.arange(256, dtype=np.uint16).reshape(16, 16)


def files():
    """One file of each kind, full of marked texts."""
    nifti = nibabel.Nifti1Image(PIXELS[..., None].astype(np.int16), np.eye(4))
    nifti.header["descrip"], nifti.header["db_name"], nifti.header["aux_file"] = SECRET, SECRET, SECRET
    png = io.BytesIO()
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Patient", SECRET)
    exif = Image.Exif()
    exif[0x010E], exif[0x0132] = SECRET, SECRET_DATE
    Image.fromarray(PIXELS).save(png, "PNG", pnginfo=texts, exif=exif)
    tiff = io.BytesIO()
    Image.fromarray(PIXELS).save(tiff, "TIFF", description=SECRET)
    enhanced = dataset(np.stack([PIXELS, PIXELS]))
    enhanced.PerFrameFunctionalGroupsSequence = sequence(
        *(item(FrameContentSequence=sequence(item(FrameComments=SECRET, StackID=SECRET))) for _ in range(2))
    )
    return {
        "DICOM": to_bytes(dataset(PIXELS)),
        "enhanced": to_bytes(enhanced),
        "NIfTI": nifti.to_bytes(),
        "NIfTI.gz": gzip.compress(nifti.to_bytes()),
        "PNG": png.getvalue(),
        "TIFF": tiff.getvalue(),
    }


FILES = files()


def assert_nobody_is_named(text):
    for secret in (SECRET, SECRET_DATE, SECRET_UID):
        assert secret not in text


@pytest.mark.parametrize("kind", list(FILES))
def test_nobody_is_named(kind, tmp_path, caplog, recwarn, capsys):
    caplog.set_level("INFO")
    for library in ("lladamedv", "pydicom", "nibabel"):  # Pillow tells the tags of TIFF files at level DEBUG
        caplog.set_level("DEBUG", library)
    file = FILES[kind]
    assert SECRET.encode() in (gzip.decompress(file) if kind.endswith("gz") else file)
    path = tmp_path / f"{SECRET}_{SECRET_DATE}.bin"
    path.write_bytes(file)
    result = read_medical_image(path)
    assert said(result) and any("percentiles" in step for step in said(result))
    texts = [repr(result), str(result.image.info), *said(result)]
    assert not result.image.info and not result.image.getexif() and not hasattr(result.image, "filename")
    for broken in (file[:-40], file[: len(file) // 2], file[:200], file[100:], b"", SECRET.encode() * 50):
        path.write_bytes(broken)
        for source in (path, broken):
            try:
                read_medical_image(source, frame=5 if kind == "enhanced" else None)
            except MedicalImageError as error:
                texts += traceback.format_exception(error)
    for wrong in ({"frame": 99}, {"page": 99}, {"slice_index": 99}, {"window": "lungs"}, {"time_index": 7}):
        path.write_bytes(file)
        with pytest.raises(MedicalImageError) as failure:
            read_medical_image(path, **wrong)
        texts += traceback.format_exception(failure.value)
    for missing in (tmp_path / SECRET, tmp_path):
        with pytest.raises(MedicalImageError, match=r"`source` is a path that cannot be opened") as failure:
            read_medical_image(missing)
        texts.append("".join(traceback.format_exception(failure.value)))
    assert len(texts) > 20
    assert_nobody_is_named("\n".join(texts))
    assert_nobody_is_named(caplog.text)
    assert_nobody_is_named("\n".join(str(warning.message) for warning in recwarn))
    assert_nobody_is_named("".join(capsys.readouterr()))


def test_series_names_nobody(tmp_path):
    (tmp_path / SECRET).write_bytes(FILES["DICOM"])
    for folder in (tmp_path, tmp_path / SECRET):
        with pytest.raises(MedicalImageError) as failure:
            read_dicom_series(folder)
        assert_nobody_is_named("".join(traceback.format_exception(failure.value)))


def test_content_counts_not_names_and_sources_of_all_kinds_agree(tmp_path):
    for kind, file in FILES.items():
        expected = np.asarray(read_medical_image(file).image)
        path = tmp_path / "picture.jpg"
        path.write_bytes(file)
        opened = io.BytesIO(file)
        opened.seek(7)
        for source in (path, str(path), opened):
            assert np.array_equal(np.asarray(read_medical_image(source).image), expected), kind
        assert not opened.closed


def test_file_objects_that_cannot_seek():
    class Pipe(io.RawIOBase):
        def __init__(self, content):
            self.content = io.BytesIO(content)

        def readable(self):
            return True

        def readinto(self, buffer):
            return self.content.readinto(buffer)

    assert np.array_equal(
        np.asarray(read_medical_image(Pipe(FILES["PNG"])).image), np.asarray(read_medical_image(PIXELS).image)
    )
    for source in (None, 3, io.StringIO("text"), [PIXELS]):
        with pytest.raises(ValueError, match=r"`source` is of type .*; allowed are paths, bytes, binary files"):
            read_medical_image(source)


@pytest.mark.parametrize(
    ("kind", "argument"),
    [
        ("DICOM", {"page": 0}),
        ("DICOM", {"slice_index": 0}),
        ("DICOM", {"axis": "coronal"}),
        ("NIfTI", {"frame": 0}),
        ("NIfTI", {"full_range": True}),
        ("PNG", {"frame": 0}),
        ("PNG", {"time_index": 0}),
        ("array", {"page": 0}),
        ("DICOM", {"axis": "axial"}),
        ("DICOM", {"background": "black"}),
        ("NIfTI", {"background": "black"}),
        ("PNG", {"allow_burned_in": True}),
    ],
)
def test_arguments_that_do_not_apply(kind, argument):
    (name,) = argument
    with pytest.raises(ValueError, match=rf"`{name}` is given, but `source` is a .*; allowed for it are `"):
        read_medical_image(PIXELS if kind == "array" else FILES[kind], **argument)


@pytest.mark.parametrize(
    "window",
    [
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
    ],
)
def test_windows_are_checked_first(window, tmp_path):
    with pytest.raises(ValueError, match=r"`window` is .*; allowed are lung, mediastinum.* and LEVEL/WIDTH"):
        read_medical_image(tmp_path / "no file", window=window)


def test_windows_in_hounsfield_units():
    published = {
        **{"lung": (-600, 1500), "mediastinum": (50, 350), "abdomen": (40, 400), "liver": (60, 160)},
        **{"brain": (40, 80), "stroke": (40, 40), "subdural": (75, 215), "bone": (400, 1800)},
    }
    assert WINDOW_PRESETS == published
    level, width = published["subdural"]
    values = np.array([[level - width / 2, level, level + width / 2 - 1e-3]])
    assert np.asarray(read_medical_image(values, window="subdural").image)[0, :, 0].tolist() == [0, 128, 255]
    for unsigned in (PIXELS, PIXELS.astype(np.uint8), Image.fromarray(PIXELS.astype(np.uint8)), FILES["PNG"]):
        with pytest.raises(
            MedicalImageError, match="`window` is 'lung', a window in Hounsfield units, but `source` has"
        ):
            read_medical_image(unsigned, window="lung")
    with pytest.raises(ValueError, match="`window` and `full_range` are both given; allowed is one of the two"):
        read_medical_image(PIXELS, window="lung", full_range=True)


def test_windows_and_backgrounds_as_they_are_typed():
    values = np.array([[-160, 42, 240]])
    for window in ("40/400", " 40 / 400", "4e1/400", "abdomen", (40, 400), [40.0, 400]):
        assert np.asarray(read_medical_image(values, window=window).image)[0, :, 0].tolist() == [0, 129, 255]
    assert said(read_medical_image(values, window="40/400")) == ["window 40/400 (level/width), LINEAR_EXACT"]
    clear = Image.new("RGBA", (1, 1), (0, 0, 0, 0))
    for background in ("yellow", "#FFFF00", "#ff0", (255, 255, 0), [255, 255, 0]):
        assert read_medical_image(clear, background=background).image.getpixel((0, 0)) == (255, 255, 0)
    for background in ("yello", "#ffff0080", (255, 255), (256, 0, 0), 3):
        with pytest.raises(MedicalImageError, match=r"`background` is .*; allowed are names of colours such as black"):
            read_medical_image(clear, background=background)


def test_options_are_those_of_the_reader_and_errors_use_the_names_of_an_interface():
    arguments = inspect.signature(read_medical_image).parameters
    assert {option.argument for option in READING_OPTIONS} == {*arguments} - {"source", "max_pixels"}
    flags = {option.argument: f"--{option.name.replace('_', '-')}" for option in READING_OPTIONS} | {"source": "IMAGE"}
    with pytest.raises(MedicalImageError) as failure:
        read_medical_image(FILES["NIfTI"], time_index=3)
    assert failure.value.told(flags.get) == "--time is 3; allowed are whole numbers from 0 to 0."
    assert str(failure.value) == "`time_index` is 3; allowed are whole numbers from 0 to 0."
    with pytest.raises(MedicalImageError) as failure:
        read_medical_image(FILES["DICOM"], slice_index=3)
    for error in (failure.value, pickle.loads(pickle.dumps(failure.value))):
        assert error.told(flags.get) == (
            "--slice is given, but IMAGE is a DICOM file; allowed for it are --frame, --window, --full-range, "
            "--allow-burned-in."
        )
        assert str(error).startswith("`slice_index` is given, but `source` is")
    volumes = nibabel.Nifti1Image(np.zeros((2, 2, 2, 3), np.int16), np.eye(4)).to_bytes()
    with pytest.raises(MedicalImageError, match="`time_index` is not given") as failure:
        read_medical_image(volumes)
    assert failure.value.missing == "time_index" and error.missing is None


@pytest.mark.parametrize(("kind", "library"), [("DICOM", "pydicom"), ("NIfTI", "nibabel"), ("float64", "tifffile")])
def test_missing_library_names_the_extra(kind, library, monkeypatch):
    import tifffile

    double = io.BytesIO()
    tifffile.imwrite(double, PIXELS.astype(np.float64))
    file = double.getvalue() if kind == "float64" else FILES[kind]
    read_medical_image(file)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf'needs {library}: pip install "lladamedv\[medical\]"'):
        read_medical_image(file)
    read_medical_image(FILES["PNG"])  # needs none of them


def test_every_label_is_seen_through_every_door():
    """Of a label map with few marked pixels, which the percentiles of all pixels would hide."""
    labels = np.zeros((40, 40), np.uint16)
    labels[0, :3], labels[20:, :] = [1, 3, 5], 2
    png, tiff = io.BytesIO(), io.BytesIO()
    Image.fromarray(labels).save(png, "PNG")
    Image.fromarray(labels.astype(np.float32)).save(tiff, "TIFF")
    volume = nibabel.Nifti1Image(labels[::-1, ::-1].T[..., None], np.eye(4)).to_bytes()
    for source in (labels, labels.astype(float), png.getvalue(), tiff.getvalue(), to_bytes(dataset(labels)), volume):
        result = read_medical_image(source)
        pixels = np.asarray(result.image)[..., 0]
        assert [pixels[0, 5], *pixels[0, :3], pixels[30, 0]] == [0, 51, 153, 255, 102]
        assert "least and greatest value (as of a mask, different ones: 5): 0 to 5" in said(result)


def test_steps_are_logged(caplog):
    with caplog.at_level("INFO"):
        result = read_medical_image(FILES["DICOM"])
    assert len(caplog.records) == 1 and all(step in caplog.text for step in said(result))
    assert "16 by 16 pixels" in caplog.text


def test_the_image_processor_takes_what_comes_out():
    processor = LLaDAMedVImageProcessor(size={"height": 28, "width": 28}, vision_aspect_ratio="square")
    result = read_medical_image(FILES["DICOM"])
    tiles = processor(result.image, return_tensors="np")
    assert tiles["pixel_values"].shape == (1, 1, 3, 28, 28)
    assert tuple(tiles["image_sizes"][0]) == result.size
