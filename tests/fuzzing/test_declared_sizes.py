"""A few hundred bytes can state any size: what they state is refused before memory is taken for it or time is spent."""

from __future__ import annotations

import gzip
import struct
import subprocess
import sys
import zlib

import nibabel
import numpy as np
import pytest

from tests.dicom_files import dataset, to_bytes
from tests.reading import encoded, tiff

from .mutations import mend_png


GREY, DOUBLES = np.zeros((8, 8), np.uint8), np.zeros((8, 8))
MEGABYTES, SECONDS = 700, 60  # for one file: the memory above what the imports take, and the whole process


def patched(content: bytes, place: int, *numbers: int, form: str) -> bytes:
    piece = struct.pack(form, *numbers)
    return content[:place] + piece + content[place + len(piece) :]


def png_with(name: bytes, content: bytes) -> bytes:
    file = encoded(GREY, "PNG")
    chunk = struct.pack(">I", len(content)) + name + content
    return file[:33] + chunk + struct.pack(">I", zlib.crc32(name + content)) + file[33:]


def nifti(shape, kind=np.int16, **header) -> bytes:
    head = (nibabel.Nifti2Header if max(shape) > 32767 else nibabel.Nifti1Header)()
    head.set_data_shape(shape)
    head.set_data_dtype(kind)
    head.set_sform(np.eye(4), 1)
    head["magic"] = b"n+2" if max(shape) > 32767 else b"n+1"
    head["vox_offset"] = header.get("vox_offset", 544 if max(shape) > 32767 else 352)
    return head.binaryblock + b"\0" * 100


def dicom(**elements) -> bytes:
    data = dataset(GREY)
    for name, value in elements.items():
        setattr(data, name, value)
    return to_bytes(data)


def nested_dicom(depth: int) -> bytes:
    """Sequences in sequences, of undefined lengths, which the library reads one inside the other."""
    begin = struct.pack("<HH2sHI", 0x5200, 0x9229, b"SQ", 0, 2**32 - 1) + struct.pack("<HHI", 0xFFFE, 0xE000, 2**32 - 1)
    whole = to_bytes(dataset(GREY))
    place = whole.index(struct.pack("<HH", 0x7FE0, 0x0010))
    return whole[:place] + begin * depth + whole[place:]


def tiff_in_circles() -> bytes:
    file = tiff(DOUBLES, DOUBLES)
    first = struct.unpack_from("<I", file, 4)[0]
    entries = struct.unpack_from("<H", file, first)[0]
    return patched(file, first + 2 + 12 * entries, first, form="<I")  # the next directory is the same one


def wide_tiff(pixels: np.ndarray, width: int, height: int, **options) -> bytes:
    """A TIFF that says that it has this size; 64-bit values are read by tifffile, others by Pillow."""
    file = bytearray(tiff(pixels, **options))
    first = struct.unpack_from("<I", file, 4)[0]
    for entry in range(struct.unpack_from("<H", file, first)[0]):
        place = first + 2 + 12 * entry
        tag = struct.unpack_from("<H", file, place)[0]
        if tag in (256, 257):
            file[place + 2 : place + 12] = struct.pack("<HII", 4, 1, width if tag == 256 else height)
    return bytes(file)


def palette_of(count: int) -> bytes:
    tables = {f"{colour}PaletteColorLookupTableDescriptor": [count, 0, 16] for colour in ("Red", "Green", "Blue")}
    data = {f"{colour}PaletteColorLookupTableData": b"\0\0" for colour in ("Red", "Green", "Blue")}
    return to_bytes(dataset(GREY, "PALETTE COLOR", **tables, **data))


ZEROS = zlib.compress(b"\0" * 2**29, 9)  # half a gigabyte
FILES = {
    "png": mend_png(patched(encoded(GREY, "PNG"), 16, 60_000, 60_000, form=">II")),
    "png, longest line": mend_png(patched(encoded(GREY, "PNG"), 16, 2**31 - 1, 1, form=">II")),
    "png, text that grows": png_with(b"zTXt", b"a\0\0" + ZEROS),
    "png, profile that grows": png_with(b"iCCP", b"a\0\0" + ZEROS),
    "png, pixels that grow": png_with(b"IDAT", ZEROS),
    "bmp": patched(encoded(GREY, "BMP"), 18, 2**31 - 1, 2**31 - 1, form="<ii"),
    "bmp, upside down": patched(encoded(GREY, "BMP"), 18, 100_000, -100_000, form="<ii"),
    "gif": patched(encoded(GREY, "GIF"), 6, 65535, 65535, form="<HH"),
    "ppm": b"P6 999999 999999 255\n",
    "ppm, long number": b"P6 " + b"9" * 10_000 + b" 1 255\n",
    "jpeg 2000": encoded(GREY, "JPEG2000").replace(struct.pack(">II", 8, 8), struct.pack(">II", 2**31, 2**31)),
    "tiff": wide_tiff(GREY, 2**32 - 1, 2**32 - 1),
    "tiff of doubles": wide_tiff(DOUBLES, 2**32 - 1, 2**32 - 1),
    "tiff of doubles, below the limit": wide_tiff(DOUBLES, 13_000, 13_000),
    "tiff of doubles, compressed": wide_tiff(DOUBLES, 13_000, 13_000, compression="zlib"),
    "tiff in circles": tiff_in_circles(),
    "webp": encoded(GREY, "WEBP", lossless=True)[:21] + b"\xff\xff\xff\x0f" + b"\0" * 20,
    "dicom": dicom(Rows=65535, Columns=65535),
    "dicom, below the limit": dicom(Rows=13_000, Columns=13_000),
    "dicom, frames": dicom(NumberOfFrames=2**31 - 1),
    "dicom, bits": dicom(BitsAllocated=64, Rows=13_000, Columns=13_000),
    "dicom, element": to_bytes(dataset(GREY)).replace(struct.pack("<I", 64) + b"\0" * 8, struct.pack("<I", 2**32 - 16)),
    "dicom, nested": nested_dicom(20_000),
    "dicom, palette": palette_of(65535),
    "nifti": nifti((32767, 32767, 32767)),
    "nifti, many planes": nifti((4, 12_000, 12_000)),
    "nifti, long": nifti((1, 2**40, 100)),
    "nifti, far away": nifti((10, 10, 10), vox_offset=2**60),
    "nifti, gzipped": gzip.compress(nifti((12_000, 12_000, 12_000), np.float64)),
    "nifti, below the limit": nifti((12_000, 12_000, 1), np.float64),
    "nifti, volumes": nifti((10, 10, 10, 32767)),
}  # fmt: skip

# In a process of its own, whose memory is limited: an error by the limit is a `MemoryError`.
_CHILD = """
import resource, sys, time, warnings
from functools import partial
from pathlib import Path
warnings.simplefilter("ignore")
import nibabel, numpy, pydicom, pydicom.pixels, tifffile
from lladamedv.processing.image_processing_lladamedv import LLaDAMedVImageProcessor
from lladamedv.processing.medical_images import read_medical_image
folder, megabytes = Path(sys.argv[1]), int(sys.argv[2])
processor = LLaDAMedVImageProcessor()
in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + megabytes * 2**20,) * 2)
for path in sorted(folder.iterdir()):
    views = [partial(read_medical_image, axis=axis) for axis in ("axial", "coronal", "sagittal")]
    for read in (*views, processor.fetch_images):
        for source in (path, path.read_bytes()):
            began = time.perf_counter()
            try:
                outcome = type(read(source)).__name__
            except ValueError:
                outcome = "refused"
            except BaseException as error:
                outcome = repr(error)
            print(path.name, outcome, f"{time.perf_counter() - began:.2f}", sep="\\t", flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits on memory are Linux's")
def test_declared_sizes_take_no_memory(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(tmp_path), str(MEGABYTES)], capture_output=True, text=True, timeout=SECONDS
    )
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    print(done.stdout)
    assert done.returncode == 0, (lines[-1:], done.stderr[-2000:])
    assert len(lines) == 8 * len(FILES)
    assert {outcome for _, outcome, _ in lines} <= {"refused", "MedicalImage", "Image"}, lines
    read = {name for name, outcome, _ in lines if outcome != "refused"}
    # The pixels that are there are all that these need: what follows is not looked at.
    assert read == {"png, pixels that grow", "dicom, palette", "tiff in circles"}
