"""NIfTI volumes, however they are stored, are shown with the marked points where a radiologist looks for them."""

import gzip

import nibabel
import numpy as np
import pytest

from lladamedv.processing.medical_images import read_medical_image
from tests.reading import said


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
    assert not any("not to scale" in step for step in said(result))
    coronal = read_medical_image(file, axis="coronal", slice_index=ANTERIOR, window=WINDOW)
    # 8 slices of 5 mm by 6 columns of 0.5 mm: every slice becomes ten rows, and the point is brightest in their middle.
    assert coronal.size == (8, 6) and coronal.image.size == (6, 80)
    pixels = np.asarray(coronal.image)[..., 0]
    assert np.unravel_index(pixels.argmax(), pixels.shape)[1] == 5 - RIGHT
    assert 10 * (7 - SUPERIOR) <= pixels[:, 5 - RIGHT].argmax() < 10 * (8 - SUPERIOR)
    assert said(coronal)[-1] == "pixels are 5 high and 0.5 wide: stretched to 80 by 6 (height by width)"


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
    foreground = np.random.default_rng(0).uniform(100, 900, (4, 5))  # all different: no mask
    values[1:5, 1:6, 3] = foreground
    low, high = np.percentile(foreground, [1, 99])
    expected = np.clip((values[::-1, ::-1, 3].T - low) / (high - low), 0, 1) * 255
    result = read_medical_image(nifti(values), slice_index=3)
    assert np.abs(np.asarray(result.image)[..., 0] - expected).max() <= 0.501
    assert said(result)[-1] == f"percentiles 1-99: {low:g} to {high:g}"
    values[1, 1, 3] = np.nan
    values[0, 0, 3] = np.inf
    result = read_medical_image(nifti(values), slice_index=3)
    pixels = np.asarray(result.image)[..., 0]
    assert "2 values are not finite" in said(result)
    assert pixels[6 - 1, 5 - 1] == 0 and pixels[6, 5] == 255
    assert (grey(nifti(np.zeros(SHAPE, np.float32)), slice_index=3) == 0).all()


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 1], [0, 255]),
        ([0, 1, 3], [0, 85, 255]),
        ([-1024, 40], [0, 255]),
        ([0, 0.1, 0.5, 1], [0, 26, 128, 255]),
        ([0, 2, 3, 1035, 2035], [0, 64, 128, 191, 255]),  # would look alike: even steps
        ([7, 16777216, 16777217], [0, 128, 255]),  # float32 has no place for the last
        ([0, 1, 2, 30000], [0, 85, 170, 255]),
        ([0], [0]),
        ([-1000], [0]),
        ([1], [255]),  # inside of a mask
    ],
)
@pytest.mark.parametrize("rare", [False, True])
def test_every_label_of_a_mask_is_seen(labels, expected, rare):
    kind = np.float64 if any(label % 1 for label in labels) else np.int32
    values = np.full((40, 50, 2), labels[0], kind)
    for row, label in enumerate(labels):
        values[3 * row, 3 : 4 if rare else 40, 0] = label
    result = read_medical_image(nifti(values), slice_index=0)
    pixels = np.asarray(result.image)[::-1, ::-1, 0].T
    assert [pixels[3 * row, 3] for row in range(len(labels))] == expected
    assert (pixels[39] == expected[0]).all()
    one_value = len(labels) == 1
    assert any(step.startswith("the picture has one grey value only") for step in said(result)) == one_value


def test_labels_that_are_not_finite_and_labels_by_the_hundred():
    values = np.zeros((40, 50, 1), np.float32)
    values[:2, :2, 0] = [[np.nan, np.inf], [-np.inf, 1]]
    pixels = np.asarray(read_medical_image(nifti(values), slice_index=0).image)[::-1, ::-1, 0].T
    assert pixels[:2, :2].tolist() == [[0, 255], [0, 255]] and (pixels[2:] == 0).all()
    values[...] = 3
    values[0, :3, 0] = [np.nan, np.inf, -np.inf]
    inside = np.asarray(read_medical_image(nifti(values), slice_index=0).image)[::-1, ::-1, 0].T
    assert inside[0, :4].tolist() == [0, 255, 0, 255] and (inside[1:] == 255).all()
    atlas = np.repeat(np.arange(128) ** 2, 16).reshape(32, 64, 1).astype(np.uint16)
    assert len(np.unique(grey(nifti(atlas), slice_index=0))) == 128


def test_times_and_slices(caplog):
    values = np.stack([volume(), volume() // 2, volume() // 4], axis=-1)
    file = nifti(values)
    result = read_medical_image(file, slice_index=0, time_index=2, window=WINDOW)
    assert (np.asarray(result.image) == round(10 * 2.55)).all()
    assert {"volume 2 of 3 (from 0)", "axial slice 0 of 8 (from 0)"} <= set(said(result))
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
    assert "axial slice 4 of 8 (from 0): the middle one, none was chosen" in said(result)
    assert [record.levelname for record in caplog.records][:1] == ["WARNING"]
    single = read_medical_image(nifti(values[..., :1, None]), slice_index=0, window=WINDOW)
    assert (np.asarray(single.image) == 102).all()  # a fourth and a fifth dimension of one


def test_missing_orientation_is_told(caplog):
    file = bytearray(nifti(volume()))
    file[252:256] = bytes(4)  # qform_code and sform_code
    result = read_medical_image(bytes(file), slice_index=SUPERIOR, window=WINDOW)
    assert any(step.startswith("no orientation in the file (sform and qform)") for step in said(result))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    # Without them x runs to the left (the documented default of nibabel).
    assert np.argwhere(np.asarray(result.image)[..., 0] == 255).tolist() == [[6 - ANTERIOR, RIGHT]]
    caplog.clear()
    whole = read_medical_image(nifti(volume()), slice_index=SUPERIOR)
    assert not any("orientation" in step for step in said(whole)[:1]) and not caplog.records


def test_orientations_that_disagree(caplog):
    image = nibabel.Nifti1Image(volume(), np.eye(4))
    image.header.set_qform(np.diag([-1, 1, 1, 1]), 1)
    image.header.set_sform(np.eye(4), 1)
    result = read_medical_image(image.to_bytes(), slice_index=SUPERIOR, window=WINDOW)
    assert (
        said(result)[0]
        == "sform and qform of the file disagree about its axes: sform used, left and right may be exchanged"
    )
    assert "left and right may be exchanged" in caplog.text
    assert np.argwhere(np.asarray(result.image)[..., 0] == 255).tolist() == [[6 - ANTERIOR, 5 - RIGHT]]


def test_orientations_that_are_none(caplog):
    """An sform of zeros falls back to the qform, and both to the documented default; a voxel has a size nonetheless."""
    file = bytearray(nifti(volume()))
    file[280:328] = bytes(48)  # srow_x, srow_y, srow_z
    file[252:254] = bytes(2)  # qform_code
    result = read_medical_image(bytes(file), slice_index=SUPERIOR, window=WINDOW)
    assert said(result)[0] == "sform of the file left out: it is no orientation"
    assert np.argwhere(np.asarray(result.image)[..., 0] == 255).tolist() == [[6 - ANTERIOR, RIGHT]]
    image = nibabel.Nifti1Image(volume(), None)
    image.header.set_qform(np.diag([1, 1, 1, 1]), 1)
    image.header["sform_code"] = 1
    caplog.clear()
    result = read_medical_image(bytes(image.to_bytes()), slice_index=SUPERIOR, window=WINDOW)
    assert np.argwhere(np.asarray(result.image)[..., 0] == 255).tolist() == [[6 - ANTERIOR, 5 - RIGHT]]
    assert not caplog.records
    image.header["quatern_b"] = 5  # no rotation
    image.header["pixdim"][1:4] = [0, np.nan, -2]
    result = read_medical_image(bytes(image.to_bytes()), slice_index=SUPERIOR, window=WINDOW)
    assert np.argwhere(np.asarray(result.image)[..., 0] == 255).tolist() == [[6 - ANTERIOR, RIGHT]]
    assert [step.split(" ")[0] for step in said(result)[:2]] == ["sform", "qform"]
    assert any("left and right may be exchanged" in record.message for record in caplog.records)


def test_what_cannot_be_shown():
    with pytest.raises(ValueError, match="complex"):
        read_medical_image(nifti(volume(np.complex64)), slice_index=0)
    with pytest.raises(ValueError, match=r"shape \(6, 7, 8, 1, 2\)"):
        read_medical_image(nifti(np.zeros((*SHAPE, 1, 2), np.int16)), slice_index=0)
    for files in ({"magic": b"ni1"}, {"magic": b""}):
        for content in (nifti(volume(), **files)[:348], gzip.compress(nifti(volume(), **files)[:348])):
            with pytest.raises(ValueError, match=r"`source` is the header of a pair of files \(\.hdr and \.img\)"):
                read_medical_image(content)
    colours = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    with pytest.raises(ValueError, match=r"type \[\('R'.*; allowed are volumes of real numbers"):
        read_medical_image(nifti(colours), slice_index=0)
    with pytest.raises(ValueError, match="6 by 7 pixels; allowed are 1 to 41"):
        read_medical_image(nifti(volume()), slice_index=0, max_pixels=41)
    file = nifti(volume())
    for broken in (file[:360], gzip.compress(file)[:-30]):
        with pytest.raises(ValueError, match=r"cannot be read|too few for the"):
            read_medical_image(broken, slice_index=7, window=WINDOW)


@pytest.mark.parametrize("slope", [0, np.nan])
def test_slopes_that_mean_none(slope):
    file = bytearray(nifti(np.arange(336, dtype=np.int16).reshape(SHAPE)))
    file[112:120] = np.array([slope, 100], "<f4").tobytes()
    assert np.array_equal(
        grey(bytes(file), slice_index=3), grey(nifti(np.arange(336, dtype=np.int16).reshape(SHAPE)), slice_index=3)
    )


def test_named_windows_say_that_the_unit_is_taken_for_granted():
    result = read_medical_image(nifti(volume()), slice_index=0, window="brain")
    assert "values taken as Hounsfield units: NIfTI does not say what they are" in said(result)


def test_other_byte_orders_and_types_and_what_follows_the_volume():
    values = np.random.default_rng(0).integers(0, 5000, SHAPE)
    expected = grey(nifti(values.astype(np.int16)), slice_index=7)
    for kind in (np.int64, np.uint64, ">i2", ">f8", np.float32):
        image = nibabel.Nifti1Image(values.astype(kind), np.eye(4), dtype=np.dtype(kind).newbyteorder("="))
        if str(kind).startswith(">"):
            image = nibabel.Nifti1Image(values.astype(kind), np.eye(4), image.header.as_byteswapped(">"))
        assert np.array_equal(grey(image.to_bytes(), slice_index=7), expected)
    assert np.array_equal(grey(gzip.compress(nifti(values.astype(np.int16))) + b"rubbish", slice_index=7), expected)


def test_gzipped_files_of_any_size():
    """Larger than what gzip reads ahead."""
    values = np.random.default_rng(0).integers(0, 2**15, (64, 64, 64), np.int16)
    for content in (nifti(values), gzip.compress(nifti(values))):
        slice_ = grey(content, slice_index=40, window=(2**14, 2**15))
        assert np.abs(slice_ - values[::-1, ::-1, 40].T / 2**15 * 255).max() <= 1
