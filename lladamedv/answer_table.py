"""Answers to many questions as a table that spreadsheets show as it is meant: CSV, JSON lines or Parquet."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .paths import whole_file


SUFFIXES = (".csv", ".jsonl", ".parquet")
# A spreadsheet takes a cell that begins so for a formula, whoever wrote it (OWASP, CSV Injection).
_FORMULA = re.compile(r"[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?(e[+-]?\d+)?", re.IGNORECASE)


def write_table(file: Path, columns: dict[str, type], rows: Sequence[dict[str, Any]]) -> int:
    """Write rows, whole or not at all.

    A .csv file is in UTF-8 with a byte order mark, by which Excel knows it, with commas, CRLF, and quotation marks
    around texts of several lines. A text that a spreadsheet would take for a formula gets an apostrophe before it; the
    other two kinds of file have all texts as they are.

    Args:
        file: its name ends in one of `SUFFIXES`.
        columns: names of the columns, and the type of what they hold: `str`, `float`, `int` or `bool`.
        rows: of each column what it holds, or `None`.

    Returns:
        How many texts got an apostrophe.

    Raises:
        ValueError: if writing fails.
    """
    marked = 0
    with whole_file(file) as partial:
        if file.suffix.lower() == ".parquet":
            import pyarrow
            import pyarrow.parquet

            rows = [{name: row[name] for name in columns} for row in rows]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, arrow_types(columns)), partial)
        elif file.suffix.lower() == ".jsonl":
            with partial.open("w", encoding="utf-8") as opened:
                for row in rows:
                    line = json.dumps({name: row[name] for name in columns}, ensure_ascii=False)
                    opened.write(line + "\n")
        else:
            with partial.open("w", encoding="utf-8-sig", newline="") as opened:
                writer = csv.writer(opened)
                writer.writerow(columns)
                for row in rows:
                    cells = [row[name] for name in columns]
                    risky = [isinstance(each, str) and is_formula(each) for each in cells]
                    marked += sum(risky)
                    writer.writerow([f"'{cell}" if mark else cell for cell, mark in zip(cells, risky)])
    return marked


def arrow_types(columns: dict[str, type]):
    """The `pyarrow.Schema` of columns."""
    import pyarrow

    types = {str: pyarrow.string(), float: pyarrow.float64(), int: pyarrow.int64(), bool: pyarrow.bool_()}
    return pyarrow.schema([(name, types[kind]) for name, kind in columns.items()])


def is_formula(text: str) -> bool:
    """Whether a spreadsheet may take a text for a formula; a number is none."""
    return bool(_FORMULA.match(text)) and not _NUMBER.fullmatch(text)


__all__ = ["SUFFIXES", "arrow_types", "is_formula", "write_table"]
