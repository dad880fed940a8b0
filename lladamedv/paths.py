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
    if file.suffix.lower() not in suffixes:
        reason = f"its name must end in {' or '.join(suffixes)}"
    elif not folder.is_dir():
        reason = f"there is no folder {str(folder)!r}"
    elif file.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
        reason = "it is a folder" if file.is_dir() else "that is not permitted"
    else:
        return
    raise ValueError(f"The file {str(file)!r} cannot be written: {reason}.")


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
    """Find out whether a folder can be made.

    Returns:
        Its absolute path.

    Raises:
        ValueError: if it exists and is not empty, or something on the way to it is no folder.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{str(folder)!r} exists already; allowed is a new or an empty folder.")
    check_folder_to_fill(folder)
    return folder


def check_folder_to_fill(folder: Path) -> None:
    """Find out whether a folder exists or can be made.

    Raises:
        ValueError: if it, or something on the way to it, is no folder, or may not be written.
    """
    folder = folder.absolute()
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "may not be written" if there.is_dir() else "is no folder"
        raise ValueError(f"The folder {str(folder)!r} cannot be used: {str(there)!r} {what}.")


def check_shard_size(size: int | str) -> None:
    """Find out whether a size of shards is one.

    Raises:
        ValueError: if it is neither bytes nor a text such as "2GB", or is none at all.
    """
    text = str(size).upper()
    if not re.fullmatch(r"\d+(\.\d+)?(KB|MB|GB|TB)|[1-9]\d*", text) or float(text.rstrip("KMGTB")) == 0:
        raise ValueError(f"`max_shard_size` is {size!r}; allowed are bytes, or a size such as 500MB or 2GB.")


__all__ = [
    "EXPLANATION_SUFFIXES", "check_folder_to_fill", "check_new_file", "check_new_folder", "check_shard_size",
    "whole_file",
]  # fmt: skip
