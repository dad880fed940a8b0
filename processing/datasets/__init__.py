"""Data sets as they are published, into rows of messages and images, or of questions and answers."""

from ..vqa_sources import BENCHMARKS, SOURCES, VQASource
from .chat_benchmark import load_chat_benchmark
from .columns import InvalidRecordError
from .messages import ROW_FEATURES, image_source, record_to_row
from .readers import ImageFiles, LoadReport, MissingImageError, read_records
from .vqa import (
    OWN_DATA,
    VQA_FEATURES,
    VQAReport,
    load_own_vqa,
    load_vqa,
    record_to_messages,
    shared_images,
    training_open_answers,
)  # fmt: skip


__all__ = [
    "BENCHMARKS", "OWN_DATA", "ROW_FEATURES", "SOURCES", "VQA_FEATURES", "ImageFiles", "InvalidRecordError",
    "LoadReport", "MissingImageError", "VQAReport", "VQASource", "image_source",
    "load_chat_benchmark", "load_own_vqa", "load_vqa", "read_records", "record_to_messages", "record_to_row",
    "shared_images", "training_open_answers",
]  # fmt: skip
