"""Data sets as they are published, into rows of messages and images, or of questions and answers."""

from .chat_benchmark import load_chat_benchmark
from .llava_med import llava_med_rows, record_to_row, row_to_record
from .records import ImageFiles, InvalidRecordError, LoadReport, MissingImageError, ZippedImages, read_records
from .vqa import (
    BENCHMARKS,
    OWN_DATA,
    SOURCES,
    VQA_FEATURES,
    VQAReport,
    VQASource,
    check_image_overlap,
    image_source,
    load_own_vqa,
    load_vqa,
    record_to_messages,
    training_open_answers,
)


__all__ = [
    "BENCHMARKS",
    "OWN_DATA",
    "SOURCES",
    "VQA_FEATURES",
    "ImageFiles",
    "InvalidRecordError",
    "LoadReport",
    "MissingImageError",
    "VQAReport",
    "VQASource",
    "ZippedImages",
    "check_image_overlap",
    "image_source",
    "llava_med_rows",
    "load_chat_benchmark",
    "load_own_vqa",
    "load_vqa",
    "read_records",
    "record_to_messages",
    "record_to_row",
    "row_to_record",
    "training_open_answers",
]
