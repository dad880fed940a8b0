"""Data sets as they are published, into rows of messages and images."""

from .llava_med import llava_med_rows, record_to_row, row_to_record
from .records import ImageFiles, InvalidRecordError, LoadReport, MissingImageError, read_records


__all__ = [
    "ImageFiles",
    "InvalidRecordError",
    "LoadReport",
    "MissingImageError",
    "llava_med_rows",
    "read_records",
    "record_to_row",
    "row_to_record",
]
