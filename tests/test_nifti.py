"""NIfTI volumes, however they are stored, are shown with the marked points where a radiologist looks for them."""

import gzip

import nibabel
import numpy as np
import pytest

from lladamedv.processing.medical_images import read_medical_image


SHAPE = (6, 7, 8)  # right, anterior, superior
RIGHT, ANTERIOR, SUPERIOR = 4, 5, 6
WINDOW = (50, 100)


def volume(dtype=np.int16):
    """In right-anterior-superior axes: 40 everywhere, and a bright point that is right, anterior and superior."""
    values = np.full(SHAPE, 40, dtype)
    values[RIGHT, ANTERIOR, SUPERIOR] = 100
    return values


def nifti(values, affine=None, version=nibabel.Nifti1Image, **header):
    image = version(values, np.eye(4) if affine is None else affine)
    for name, value in header.items():
        image.header[name] = value
    return image.to_bytes()


def grey(source, **options):
    return np.asarray(read_medical_image(source, **options).image)[..., 0]


def stored_as(values, orientation):
    """The same volume as a file whose array axes run towards, for example, L, P and S."""
    axes = [next(axis for axis, ends in enumerate(("RL", "AP", "SI")) if letter in ends) for letter in orientation]
    values, affine = values.transpose(axes), np.zeros((4, 4))
    for index, letter in enumerate(orientation):
        affine[axes[index], index] = 1 if letter in "RAS" else -1
        values = values if letter in "RAS" else np.flip(values, index)
    affine[3, 3] = 1
    return nibabel.Nifti1Image(values, affine)


@pytest.mark.parametrize("orientation", ["RAS", "LAS", "LPS", "PIR", "SAL", "ALI"])
def test_views_show_the_patient_as_radiologists_look(orientation):
    stored = stored_as(volume(), orientation)
    assert "".join(nibabel.aff2axcodes(stored.affine)) == orientation
    file = stored.to_bytes()
    # (axis, slice, height and width, row from the top, column from the left) of the point, by hand.
    for axis, index, size, row, column in (
        ("axial", SUPERIOR, (7, 6), 6 - ANTERIOR, 5 - RIGHT),  # anterior up, the patient's right on the left
        ("coronal", ANTERIOR, (8, 6), 7 - SUPERIOR, 5 - RIGHT),  # superior up, the same
        ("sagittal", RIGHT, (8, 7), 7 - SUPERIOR, 6 - ANTERIOR),  # superior up, anterior on the left
    ):
        result = read_medical_image(file, axis=axis, slice_index=index, window=WINDOW)
        pixels = np.asarray(result.image)[..., 0]
        assert pixels.shape == size == result.size
        assert np.argwhere(pixels == 255).tolist() == [[row, column]]
        assert (np.delete(pixels, row * size[1] + column) == 102).all()  # 40 of 100
        assert not (grey(file, axis=axis, slice_index=index - 1, window=WINDOW) == 255).any()


def test_rotated_and_scaled_affine():
    angle = 0.3
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([-0.5, 0.5, 5.0])  # towards the left, as scanners often store it
    affine[:3, 3] = [30, -40, 10]
    file = nifti(volume()[::-1], affine)
    result = read_medical_image(file, slice_index=SUPERIOR, window=WINDOW)
    assert np.argwhere(np.asarray(result.image)[..., 0] == 255).tolist() == [[6 - ANTERIOR, 5 - RIGHT]]
    assert not any("not to scale" in step for step in result.steps)
    coronal = read_medical_image(file, axis="coronal", slice_index=ANTERIOR, window=WINDOW)
    assert np.argwhere(np.asarray(coronal.image)[..., 0] == 255).tolist() == [[7 - SUPERIOR, 5 - RIGHT]]
    assert "pixels are 5 high and 0.5 wide, and stay so: the picture is not to scale" in coronal.steps


@pytest.mark.parametrize("version", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_both_versions_gzipped_paths_and_open_files(version, tmp_path):
    file = nifti(volume(), version=version)
    expected = grey(file, slice_index=6, window=WINDOW)
    assert (expected == 255).sum() == 1
    assert np.array_equal(grey(gzip.compress(file), slice_index=6, window=WINDOW), expected)
    path = tmp_path / "named like a picture.png"
    path.write_bytes(gzip.compress(file))
    assert np.array_equal(grey(path, slice_index=6, window=WINDOW), expected)
    with path.open("rb") as opened:
        assert np.array_equal(grey(opened, slice_index=6, window=WINDOW), expected)
        assert not opened.closed


def test_slope_and_intercept_of_the_file_apply():
    file = bytearray(nifti(np.full(SHAPE, 10, np.int16)))
    file[112:120] = np.array([4.0, -20.0], "<f4").tobytes()  # scl_slope, scl_inter: 10 means 20
    assert (grey(bytes(file), slice_index=0, window=(50, 100)) == 51).all()


def test_percentiles_of_the_foreground():
    values = np.zeros(SHAPE, np.float32)
    foreground = np.random.default_rng(0).uniform(100, 900, (4, 5))
    values[1:5, 1:6, 3] = foreground
    low, high = np.percentile(foreground, [1, 99])
    expected = np.clip((values[::-1, ::-1, 3].T - low) / (high - low), 0, 1) * 255
    result = read_medical_image(nifti(values), slice_index=3)
    assert np.abs(np.asarray(result.image)[..., 0] - expected).max() <= 0.501
    assert result.steps[-1] == f"percentiles 1-99: {low:g} to {high:g}"
    values[1, 1, 3] = np.nan
    values[0, 0, 3] = np.inf
    result = read_medical_image(nifti(values), slice_index=3)
    pixels = np.asarray(result.image)[..., 0]
    assert "2 values are not finite" in result.steps
    assert pixels[6 - 1, 5 - 1] == 0 and pixels[6, 5] == 255
    assert (grey(nifti(np.zeros(SHAPE, np.float32)), slice_index=3) == 0).all()


def test_times_and_slices(caplog):
    values = np.stack([volume(), volume() // 2, volume() // 4], axis=-1)
    file = nifti(values)
    result = read_medical_image(file, slice_index=0, time_index=2, window=WINDOW)
    assert (np.asarray(result.image) == round(10 * 2.55)).all()
    assert {"volume 2 of 3 (from 0)", "axial slice 0 of 8 (from 0)"} <= set(result.steps)
    with pytest.raises(ValueError, match="`time_index` is not given, but there are 3 volumes; allowed are 0 to 2"):
        read_medical_image(file, slice_index=0)
    with pytest.raises(ValueError, match="`time_index` is 3; allowed are whole numbers from 0 to 2"):
        read_medical_image(file, slice_index=0, time_index=3)
    with pytest.raises(ValueError, match="`slice_index` is 8; allowed are whole numbers from 0 to 7"):
        read_medical_image(nifti(volume()), slice_index=8)
    with pytest.raises(ValueError, match="`axis` is 'up'; allowed are sagittal, coronal, axial"):
        read_medical_image(nifti(volume()), axis="up")
    caplog.clear()
    marked = np.full(SHAPE, 40, np.int16)
    marked[..., 4] = 100
    result = read_medical_image(nifti(marked), window=WINDOW)
    assert (np.asarray(result.image) == 255).all()
    assert "axial slice 4 of 8 (from 0): the middle one, none was chosen" in result.steps
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_missing_orientation_is_told(caplog):
    file = bytearray(nifti(volume()))
    file[252:256] = bytes(4)  # qform_code and sform_code
    result = read_medical_image(bytes(file), slice_index=SUPERIOR, window=WINDOW)
    assert any(step.startswith("no orientation in the file (sform and qform)") for step in result.steps)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    # Without them x runs to the left (the documented default of nibabel).
    assert np.argwhere(np.asarray(result.image)[..., 0] == 255).tolist() == [[6 - ANTERIOR, RIGHT]]
    caplog.clear()
    assert not any("orientation" in step for step in read_medical_image(nifti(volume()), slice_index=0).steps[:1])
    assert not caplog.records


def test_what_cannot_be_shown():
    with pytest.raises(ValueError, match="complex"):
        read_medical_image(nifti(volume(np.complex64)), slice_index=0)
    with pytest.raises(ValueError, match=r"shape \(6, 7, 8, 1, 2\)"):
        read_medical_image(nifti(np.zeros((*SHAPE, 1, 2), np.int16)), slice_index=0)
    with pytest.raises(ValueError, match="6 by 7 pixels; allowed are 1 to 41"):
        read_medical_image(nifti(volume()), slice_index=0, max_pixels=41)
    file = nifti(volume())
    for broken in (file[:360], gzip.compress(file)[:-30]):
        with pytest.raises(ValueError, match=r"cannot be read|too few for the"):
            read_medical_image(broken, slice_index=7, window=WINDOW)


def test_gzipped_files_of_any_size():
    """Larger than what gzip reads ahead."""
    values = np.random.default_rng(0).integers(0, 2**15, (64, 64, 64), np.int16)
    for content in (nifti(values), gzip.compress(nifti(values))):
        slice_ = grey(content, slice_index=40, window=(2**14, 2**15))
        assert np.abs(slice_ - values[::-1, ::-1, 40].T / 2**15 * 255).max() <= 1
