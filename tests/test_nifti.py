"""NIfTI volumes, however they are stored, are shown with the marked points where a radiologist looks for them."""

import gzip

import nibabel
import numpy as np
import pytest

from lladamedv.processing.medical_images import MedicalImageError
from tests.reading import assert_shows, grey, ramp, read, said


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


def patched(file, place, content):
    return file[:place] + content + file[place + len(content) :]


def scaled(values, slope, intercept):
    return patched(nifti(values), 112, np.array([slope, intercept], "<f4").tobytes())


def marked(source, **options):
    """Where the bright point is, as (row from the top, column from the left)."""
    return np.argwhere(grey(source, window=WINDOW, **options) == 255).tolist()


def stored_as(values, orientation):
    """The same volume as a file whose array axes run towards, for example, L, P and S."""
    axes = [next(axis for axis, ends in enumerate(("RL", "AP", "SI")) if letter in ends) for letter in orientation]
    values, affine = values.transpose(axes), np.zeros((4, 4))
    for index, letter in enumerate(orientation):
        affine[axes[index], index] = 1 if letter in "RAS" else -1
        values = values if letter in "RAS" else np.flip(values, index)
    affine[3, 3] = 1
    return nibabel.Nifti1Image(values, affine)


# Geometry


@pytest.mark.parametrize(("axis", "index", "size", "point"), [  # by hand
    ("axial", SUPERIOR, (7, 6), [6 - ANTERIOR, 5 - RIGHT]),  # anterior up, the patient's right on the left
    ("coronal", ANTERIOR, (8, 6), [7 - SUPERIOR, 5 - RIGHT]),  # superior up, the same
    ("sagittal", RIGHT, (8, 7), [7 - SUPERIOR, 6 - ANTERIOR]),  # superior up, anterior on the left
])  # fmt: skip
@pytest.mark.parametrize("orientation", ["RAS", "LAS", "LPS", "PIR", "SAL", "ALI"])
def test_views_show_the_patient_as_radiologists_look(orientation, axis, index, size, point):
    stored = stored_as(volume(), orientation)
    assert "".join(nibabel.aff2axcodes(stored.affine)) == orientation
    expected = np.full(size, 102)  # 40 of 100
    expected[tuple(point)] = 255
    picture = assert_shows(stored.to_bytes(), expected, axis=axis, slice_index=index, window=WINDOW)
    assert picture.size == size
    assert marked(stored.to_bytes(), axis=axis, slice_index=index - 1) == []


def test_rotated_and_scaled_affine():
    angle = 0.3
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([-0.5, 0.5, 5.0])  # towards the left, as scanners often store it
    affine[:3, 3] = [30, -40, 10]
    file = nifti(volume()[::-1], affine)
    assert marked(file, slice_index=SUPERIOR) == [[6 - ANTERIOR, 5 - RIGHT]]
    # 8 slices of 5 mm by 6 columns of 0.5 mm: every slice becomes ten rows, and the point is brightest in their middle.
    coronal = read(file, axis="coronal", slice_index=ANTERIOR, window=WINDOW)
    assert coronal.size == (8, 6) and coronal.image.size == (6, 80)
    row, column = divmod(int(np.asarray(coronal.image)[..., 0].argmax()), 6)
    assert column == 5 - RIGHT and 10 * (7 - SUPERIOR) <= row < 10 * (8 - SUPERIOR)
    assert said(coronal)[-1] == "pixels are 5 high and 0.5 wide: stretched to 80 by 6 (height by width)"


def with_orientations(sform=None, qform=None, **header):
    image = nibabel.Nifti1Image(volume(), None)
    for name, diagonal in (("sform", sform), ("qform", qform)):
        if diagonal is not None:
            getattr(image.header, f"set_{name}")(np.diag(diagonal), 1)
    for name, value in header.items():
        image.header[name] = value
    return image.to_bytes()


RAS, LAS = (1, 1, 1, 1), (-1, 1, 1, 1)
EXCHANGED = "left and right may be exchanged"
NEITHER = f"no orientation in the file (sform and qform): axes taken as left, anterior, superior, {EXCHANGED}"
LEFT_OUT = "of the file left out: it is no orientation"


@pytest.mark.parametrize(("file", "column", "steps", "warns"), [
    (with_orientations(sform=RAS, qform=RAS), 5 - RIGHT, [], False),
    (with_orientations(sform=RAS, qform=LAS), 5 - RIGHT,
     [f"sform and qform of the file disagree about its axes: sform used, {EXCHANGED}"], True),
    # Without them x runs to the left (the documented default of nibabel).
    (with_orientations(), RIGHT, [NEITHER], True),
    (with_orientations(sform_code=1), RIGHT, [f"sform {LEFT_OUT}", NEITHER], True),
    (with_orientations(qform=RAS, sform_code=1), 5 - RIGHT, [f"sform {LEFT_OUT}"], False),
    (with_orientations(qform=RAS, sform_code=1, quatern_b=5, pixdim=[1, 0, np.nan, -2, 1, 1, 1, 1]), RIGHT,
     [f"sform {LEFT_OUT}", f"qform {LEFT_OUT}", NEITHER], True),
])  # fmt: skip
def test_orientations_that_disagree_or_are_none(file, column, steps, warns, caplog):
    assert marked(file, slice_index=SUPERIOR) == [[6 - ANTERIOR, column]]
    assert (EXCHANGED in caplog.text) == warns
    oriented = [step.text for step in read(file, slice_index=SUPERIOR).steps if step.kind == "geometry"]
    assert oriented == [*steps, "oriented to the closest right-anterior-superior axes"]


# Values


@pytest.mark.parametrize("version", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_both_versions_gzipped_paths_and_open_files(version, tmp_path):
    file, point = nifti(volume(), version=version), [[6 - ANTERIOR, 5 - RIGHT]]
    path = tmp_path / "named like a picture.png"
    path.write_bytes(gzip.compress(file))
    for source in (file, gzip.compress(file), gzip.compress(file) + b"rubbish", path):
        assert marked(source, slice_index=SUPERIOR) == point
    with path.open("rb") as opened:
        assert marked(opened, slice_index=SUPERIOR) == point and not opened.closed


@pytest.mark.parametrize("kind", [np.int64, np.uint64, ">i2", ">f8", np.float32])
def test_other_byte_orders_and_types(kind):
    values = np.random.default_rng(0).integers(0, 5000, SHAPE)
    image = nibabel.Nifti1Image(values.astype(kind), np.eye(4), dtype=np.dtype(kind).newbyteorder("="))
    if str(kind).startswith(">"):
        image = nibabel.Nifti1Image(values.astype(kind), np.eye(4), image.header.as_byteswapped(">"))
    assert np.array_equal(grey(image.to_bytes(), slice_index=7), grey(nifti(values.astype(np.int16)), slice_index=7))


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_files_larger_than_what_gzip_reads_ahead(pack):
    values = np.random.default_rng(0).integers(0, 2**15, (64, 64, 64), np.int16)
    slice_ = values[::-1, ::-1, 40].T
    assert_shows(pack(nifti(values)), ramp(slice_, 0, 2**15), slice_index=40, window=(2**14, 2**15))


@pytest.mark.parametrize(("slope", "intercept", "shown"), [(4, -20, 51), (0, 100, 26), (np.nan, 100, 26)])
def test_slope_and_intercept(slope, intercept, shown):
    """10 means 20; a slope of 0 means none."""
    assert (grey(scaled(np.full(SHAPE, 10, np.int16), slope, intercept), window=WINDOW) == shown).all()


def test_percentiles_of_the_foreground():
    values = np.zeros(SHAPE, np.float32)
    foreground = np.random.default_rng(0).uniform(100, 900, (4, 5))  # all different: no mask
    values[1:5, 1:6, 3] = foreground
    low, high = np.percentile(foreground, [1, 99])
    picture = assert_shows(nifti(values), ramp(values[::-1, ::-1, 3].T, low, high), slice_index=3)
    assert said(picture)[-1] == f"percentiles 1-99: {low:g} to {high:g}"
    values[1, 1, 3], values[0, 0, 3] = np.nan, np.inf
    pixels = grey(nifti(values), slice_index=3)
    assert "2 values are not finite" in said(read(nifti(values), slice_index=3))
    assert pixels[6 - 1, 5 - 1] == 0 and pixels[6, 5] == 255


@pytest.mark.parametrize(("labels", "expected"), [
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
])  # fmt: skip
@pytest.mark.parametrize("rare", [False, True])
def test_every_label_of_a_mask_is_seen(labels, expected, rare):
    kind = np.float64 if any(label % 1 for label in labels) else np.int32
    values = np.full((40, 50, 2), labels[0], kind)
    for row, label in enumerate(labels):
        values[3 * row, 3 : 4 if rare else 40, 0] = label
    picture = read(nifti(values), slice_index=0)
    pixels = np.asarray(picture.image)[::-1, ::-1, 0].T
    assert [pixels[3 * row, 3] for row in range(len(labels))] == expected
    assert (pixels[39] == expected[0]).all()
    assert ("the picture has one grey value only" in " ".join(said(picture))) == (len(labels) == 1)


@pytest.mark.parametrize(("inside", "outside"), [(1, 0), (3, 3)])
def test_labels_that_are_not_finite(inside, outside):
    values = np.full((40, 50, 1), outside, np.float32)
    values[0, :4, 0] = [np.nan, np.inf, -np.inf, inside]
    pixels = grey(nifti(values), slice_index=0)[::-1, ::-1].T
    assert pixels[0, :4].tolist() == [0, 255, 0, 255] and (pixels[1:] == (255 if outside else 0)).all()


def test_labels_by_the_hundred():
    atlas = np.repeat(np.arange(128) ** 2, 16).reshape(32, 64, 1).astype(np.uint16)
    assert len(np.unique(grey(nifti(atlas), slice_index=0))) == 128


def test_presets_say_that_the_unit_is_taken_for_granted():
    picture = read(nifti(volume()), slice_index=SUPERIOR, window="brain")
    assert said(picture)[-1].startswith("values taken as Hounsfield units")


# Indices


def test_times_and_slices(caplog):
    times = nifti(np.stack([volume(), volume() // 2, volume() // 4], axis=-1))
    picture = assert_shows(times, 25.5, slice_index=0, time_index=2, window=WINDOW)
    assert {"volume 2 of 3 (from 0)", "axial slice 0 of 8 (from 0)"} <= set(said(picture))
    assert picture.choices["time_index"] == ("volume", 2, 3)
    caplog.clear()
    middle = np.full(SHAPE, 40, np.int16)
    middle[..., 4] = 90
    picture = assert_shows(nifti(middle), ramp(90, 0, 100), window=WINDOW)
    assert "axial slice 4 of 8 (from 0): the middle one, none was chosen" in said(picture)
    assert caplog.records[0].levelname == "WARNING"
    assert_shows(nifti(volume()[..., None, None]), 102, slice_index=0, window=WINDOW)  # more dimensions, of one


# What is refused

PAIRS = [nifti(volume(), magic=magic)[:348] for magic in (b"ni1", b"")]
COLOURS = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])


@pytest.mark.parametrize(("file", "options", "message"), [
    (nifti(np.zeros((*SHAPE, 3), np.int16)), {}, "`time_index` is not given, but there are 3 volumes"),
    (nifti(volume()), {"time_index": 3}, "`time_index` is 3; allowed are whole numbers from 0 to 0"),
    (nifti(volume()), {"slice_index": 8}, "`slice_index` is 8; allowed are whole numbers from 0 to 7"),
    (nifti(volume()), {"axis": "up"}, "`axis` is 'up'; allowed are sagittal, coronal, axial"),
    (nifti(volume()), {"max_pixels": 41}, "6 by 7 pixels; allowed are 1 to 41"),
    (nifti(volume(np.complex64)), {}, "type complex64; allowed are volumes of real numbers"),
    (nifti(np.zeros((*SHAPE, 1, 2), np.int16)), {}, r"shape \(6, 7, 8, 1, 2\)"),
    (nifti(COLOURS), {}, r"type \[\('R'.*; allowed are volumes of real numbers"),
    (PAIRS[0], {}, r"`source` is the header of a pair of files \(\.hdr and \.img\)"),
    (PAIRS[1], {}, r"`source` is the header of a pair of files \(\.hdr and \.img\)"),
    (gzip.compress(PAIRS[0], mtime=0), {}, r"`source` is the header of a pair of files \(\.hdr and \.img\)"),
    (nifti(volume())[:360], {}, "too few for the"),
    (gzip.compress(nifti(volume()), mtime=0)[:-30], {"slice_index": 7}, "cannot be read"),
])  # fmt: skip
def test_refused(file, options, message):
    with pytest.raises(MedicalImageError, match=message):
        read(file, **options)
