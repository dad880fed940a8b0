"""Where results go and what they are called: checked by commands and functions alike, before any work is done."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


EXPLANATION_SUFFIXES = (".html", ".png")


def check_new_file(file: Path, suffixes: Sequence[str]) -> None:
    """Find out whether a file can be written; one that exists would be replaced.

    Raises:
        ValueError: if `file` has another suffix, is a folder, or cannot be written in the folder that it is to be in.
    """
    folder = file.absolute().parent
    problems = {
        f"its name must end in {' or '.join(suffixes)}": file.suffix.lower() not in suffixes,
        f"there is no folder {str(folder)!r}": not folder.is_dir(),
        "it is a folder": file.is_dir(),
        "that is not permitted": not os.access(file if file.exists() else folder, os.W_OK),
    }
    if reasons := [reason for reason, is_so in problems.items() if is_so]:
        raise ValueError(f"The file {str(file)!r} cannot be written: {reasons[0]}.")


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A file to write that becomes `file` when it is whole; until then what was there stays, also on a full disk.

    Raises:
        ValueError: if writing fails.
    """
    partial = file.with_name(f".{file.name}.partial")
    try:
        yield partial
        partial.replace(file)
    except OSError as error:
        raise ValueError(f"The file {str(file)!r} cannot be written: {error.strerror or error}.") from error
    finally:
        partial.unlink(missing_ok=True)


def check_new_folder(folder: str | Path) -> Path:
    """Find out whether a folder can be made, and return its absolute path.

    Raises:
        ValueError: if it exists and is not empty, or something on the way to it is no folder or may not be written.
    """
    folder = Path(folder).expanduser().absolute()
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "may not be written" if there.is_dir() else "is no folder"
        raise ValueError(f"The folder {str(folder)!r} cannot be used: {str(there)!r} {what}.")
    if there == folder and any(folder.iterdir()):
        raise ValueError(f"{str(folder)!r} exists already; allowed is a new or an empty folder.")
    return folder


def check_shard_size(size: int | str) -> None:
    """Find out whether a size of shards is one: bytes, or a text such as "2GB"; ValueError otherwise."""
    if not re.fullmatch(r"(?=.*[1-9])(\d+|\d+(\.\d+)?[KMGT]B)", str(size).upper()):
        raise ValueError(f"`max_shard_size` is {size!r}; allowed are bytes, or a size such as 500MB or 2GB.")
