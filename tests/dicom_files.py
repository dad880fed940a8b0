"""DICOM files made on the spot, with marked texts wherever a patient could be named."""

import io

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian


SECRET = "9SECRET9"
SECRET_DATE = "19450102"
SECRET_UID = "1.2.826.0.1.3680043.8.498.777"


def dataset(pixels, photometric="MONOCHROME2", bits=None, **elements) -> FileDataset:
    """A data set of `pixels`: (height, width), (frames, height, width), or (height, width, 3) for colour."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = SECRET_UID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, SECRET_UID
    data.PatientName, data.PatientID, data.PatientBirthDate = f"{SECRET}^Name", f"{SECRET}-id", SECRET_DATE
    data.StudyDate, data.AccessionNumber, data.InstitutionName = SECRET_DATE, SECRET, SECRET
    data.StudyInstanceUID = data.SeriesInstanceUID = SECRET_UID
    data.StudyDescription, data.ImageComments, data.WindowCenterWidthExplanation = SECRET, SECRET, SECRET
    data.Modality = "CT"
    colour = pixels.shape[-1] == 3 and photometric not in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
    frames = pixels.shape[0] if pixels.ndim == 3 and not colour else None
    data.Rows, data.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 3 if colour else 1, photometric
    if colour:
        data.PlanarConfiguration = 0
    if frames is not None:
        data.NumberOfFrames = frames
    data.BitsAllocated = 8 * pixels.dtype.itemsize
    data.BitsStored = bits or data.BitsAllocated
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    raw = pixels.tobytes()
    data.PixelData = raw + b"\0" * (len(raw) % 2)
    data["PixelData"].VR = "OB" if data.BitsAllocated == 8 else "OW"
    for name, value in elements.items():
        setattr(data, name, value)
    return data


def encapsulated(pixels, photometric, syntax, frame: bytes, **elements) -> FileDataset:
    """A data set whose only frame is compressed; `pixels` give its size and type."""
    data = dataset(pixels, photometric, **elements)
    data.PixelData = encapsulate([frame])
    data["PixelData"].VR = "OB"
    data.file_meta.TransferSyntaxUID = syntax
    return data


def to_bytes(data: Dataset, **options) -> bytes:
    file = io.BytesIO()
    pydicom.dcmwrite(file, data, **(options or {"enforce_file_format": True}))
    return file.getvalue()


def implicit(data: Dataset) -> bytes:
    """The file with elements whose types are not written."""
    data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    return to_bytes(data, implicit_vr=True, little_endian=True)


def item(**elements) -> Dataset:
    result = Dataset()
    for name, value in elements.items():
        setattr(result, name, value)
    return result


def sequence(*items) -> Sequence:
    return Sequence(items)


def look_up_table(first, bits, entries) -> Dataset:
    table = item(LUTDescriptor=[len(entries), first, bits])
    table.add_new("LUTData", "OW", np.asarray(entries, "<u2").tobytes())
    table["LUTDescriptor"].VR = "SS" if first < 0 else "US"
    return table
