"""What all commands share: how errors end, where lines of progress go, and how results become JSON."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup


DEBUG = "LLADAMEDV_DEBUG"  # environment variable, so that processes that a command starts know of it, too
LOOPBACK = ("127.0.0.1", "localhost", "::1")

Model = Annotated[str | None, typer.Option(help="Folder or Hub id of a model; by default the tiny demo model.")]
Dtype = Annotated[str, typer.Option(help="What to compute in: float32, bfloat16 or float16.")]
Revision = Annotated[str | None, typer.Option(help="Revision of the model on the Hub.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps…")]
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
    """Keep Transformers' progress bars and notes away from the answers."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def check_device(device: str) -> None:
    """Try a device before a large model is loaded for it.

    Raises:
        ValueError: if it cannot be used.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`device` is {device!r}, which cannot be used: {error}") from error


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
