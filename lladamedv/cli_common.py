"""What all commands share: how errors end, where lines of progress go, and how results become JSON."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import loading


DEBUG = "LLADAMEDV_DEBUG"  # environment variable, so that processes that a command starts know of it, too
# How libraries that are imported later are told to be quiet.
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error", "DATASETS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def checked(check: Callable[[Any], object]) -> Callable[[Any], Any]:
    """A callback of an option or argument, so that it is checked with the command line, before anything is imported."""

    def callback(value: Any) -> Any:
        try:
            if value is not None:
                check(value)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        return value

    return callback


def _check_device_name(device: str) -> None:
    if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:\d+)?", device):
        raise ValueError(f"{device!r}; allowed are auto, cpu, cuda, mps and xpu, also with a number, as in cuda:1.")


Model = Annotated[
    str,
    typer.Option(
        help="Folder or Hub id of a model or of adapters, or `demo` for the tiny one that comes with this.",
        callback=checked(loading.find_folder),
    ),
]
Dtype = Annotated[
    loading.Dtype, typer.Option(help="What to compute in; auto is the checkpoint's on a GPU and float32 on a CPU.")
]
Device = Annotated[
    str,
    typer.Option(help="cpu, cuda, cuda:1, mps…; auto is a GPU if there is one.", callback=checked(_check_device_name)),
]
Revision = Annotated[str | None, typer.Option(help="Revision of the model on the Hub.")]
Host = Annotated[str, typer.Option(help="Address to listen on; others than 127.0.0.1 let others in.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON; all else goes to standard error.")]


class CommandLine(TyperGroup):
    """Ends errors in one line and exit code 1; `--debug` shows where they come from.

    Wrong usage is exit code 2 and Ctrl-C 130, as typer has it.
    """

    def main(self, *args, **options) -> Any:
        try:
            return super().main(*args, **options)
        except Exception as error:
            if os.environ.get(DEBUG):
                raise
            # A message that was written for users names what is wrong; others say at least what kind of error it was.
            text = str(error)
            if not text or not isinstance(error, (ValueError, ImportError)):
                text = ": ".join(part for part in (type(error).__name__, text) if part) + " (--debug shows where)"
            typer.echo(f"lladamedv: {' '.join(text.splitlines())}", err=True)
            raise SystemExit(1) from error


def quiet() -> None:
    """Import PyTorch, Transformers and the model's classes without a line of theirs, now or later, among the answers.

    To be called when the arguments have been checked, and before other modules are imported. Errors of the libraries
    and what this package reports are shown; `--debug`, Python's `-W` and the libraries' own variables show more.
    """
    if not os.environ.get(DEBUG):
        for variable, value in _QUIET.items():
            os.environ.setdefault(variable, value)
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        logging.getLogger().setLevel(logging.ERROR)
    ours = logging.getLogger("lladamedv")
    ours.setLevel(logging.WARNING)
    if not ours.handlers:
        ours.addHandler(_ToStandardError())

    import torch  # noqa: F401  sets the level of its loggers

    if not os.environ.get(DEBUG):
        logging.getLogger("torch").setLevel(logging.ERROR)
    import transformers

    transformers.logging.disable_progress_bar()
    import lladamedv.auto_classes  # noqa: F401


class _ToStandardError(logging.Handler):
    """The message alone, a line each."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(" ".join(record.getMessage().split()), err=True)


def progress(as_json: bool) -> Callable[[str], None]:
    """Where lines on the way to a result go: with `--json` the result alone is on standard output."""
    return lambda line: typer.echo(line, err=as_json)


def print_json(result: Any) -> None:
    """One line of JSON; dataclasses become objects, paths texts."""
    typer.echo(json.dumps(result, default=_plain))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form.")
