"""What all commands share: how errors end, where lines of progress go, and how results become JSON."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import os
import re
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lladamedv.modeling_lladamedv.generation_options_lladamedv import OPTIONS

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
            raise typer.BadParameter(re.sub(r"^`\w+` is ", "", str(error))) from error  # which Typer names
        return value

    return callback


def one_of(allowed: Sequence[str]) -> Callable[[str], None]:
    """What [`checked`] takes for an option with a few allowed values."""

    def check(value: str) -> None:
        if value not in allowed:
            raise ValueError(f"{value!r}; allowed are {', '.join(allowed)}.")

    return check


def _check_device_name(device: str) -> None:
    if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:\d+)?", device):
        raise ValueError(f"{device!r}; allowed are auto, cpu, cuda, mps and xpu, also with a number, as in cuda:1.")


def _check_host_name(host: str) -> None:
    if not host.strip():
        raise ValueError("it is empty; allowed are names and addresses of this computer.")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ValueError: if the address is none of this computer's, or the port is taken or not permitted.
    """
    try:
        socket.getaddrinfo(host, port)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"`host` is {host!r}, which cannot be listened on: {reason}.") from error
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]
        raise ValueError(f"`port` is {port}, which cannot be listened on at {host}: {reason}.") from error


def parse_options(given: list[str] | None, **named) -> dict:
    """Options of `generate` from the command line; values are JSON where they can be read so, or else text.

    Raises:
        ValueError: for one without a value, of a name that `generate` does not know, or of another type than it takes.
    """
    options = {name: value for name, value in named.items() if value is not None}
    parsed = {}
    for each in given or []:
        name, separator, value = each.partition("=")
        if not separator or not name:
            raise ValueError(f"{each!r}; allowed is NAME=VALUE.")
        if name in parsed:
            raise ValueError(f"{name} is given twice.")
        parsed[name] = _parse_value(name, value)
    return options | parsed


def check_generation(model: str | None, options: dict) -> None:
    """Check options of `generate` without PyTorch: by themselves, and with a model whether they suit its own.

    The own of a model that is not here, or that is adapters or as released, are not known yet.

    Raises:
        ValueError: for a value that is not allowed.
    """
    if not options:
        return
    _silence()
    from lladamedv.modeling_lladamedv.generation_config_lladamedv import (
        LLaDAMedVGenerationConfig,
        resolve_generation_config,
    )

    LLaDAMedVGenerationConfig(**options)
    folder = None if model is None else loading.find_folder(model)
    if folder is not None and all((folder / file).is_file() for file in ("processor_config.json", "config.json")):
        try:
            own = LLaDAMedVGenerationConfig.from_pretrained(folder)
        except (OSError, ValueError):  # loading the model tells what is wrong with it
            return
        resolve_generation_config(own, own, options | {"return_dict_in_generate": True})


def _parse_value(name: str, text: str) -> Any:
    """The value of an option of `generate`; options of Transformers' own `generate` are left to our configuration."""
    if name in OPTIONS:
        if not OPTIONS[name].types or (OPTIONS[name].role == "report" and OPTIONS[name].default is False):
            raise ValueError(f"{name!r} changes nothing that a command shows.")
        return OPTIONS[name].parse(text)
    theirs = Path(find_spec("transformers").origin).parent / "generation" / "configuration_utils.py"
    if f'"{name}"' not in theirs.read_text(encoding="utf-8"):
        meant = difflib.get_close_matches(name, OPTIONS, 1)
        hint = f"did you mean {meant[0]}?" if meant else f"allowed are {', '.join(sorted(OPTIONS))}."
        raise ValueError(f"{name!r} is no option of generate; {hint}")
    with suppress(json.JSONDecodeError):
        return json.loads(text)
    return text


Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option", help="An option of generate, as NAME=VALUE; several times.", callback=checked(parse_options)
    ),
]
Model = Annotated[
    str,
    typer.Option(
        help="Folder or Hub id of a model or of adapters, or `demo` for the tiny one that comes with this.",
        callback=checked(loading.find_folder),
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help=f"{', '.join(loading.DTYPES)}; auto is the checkpoint's on a GPU and float32 on a CPU.",
        callback=checked(one_of(loading.DTYPES)),
    ),
]
Device = Annotated[
    str,
    typer.Option(help="cpu, cuda, cuda:1, mps…; auto is a GPU if there is one.", callback=checked(_check_device_name)),
]
Revision = Annotated[str | None, typer.Option(help="Revision of the model on the Hub.")]
Host = Annotated[
    str,
    typer.Option(help="Address to listen on; others than 127.0.0.1 let others in.", callback=checked(_check_host_name)),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON; all else goes to standard error.")]


_UsageError = typer.BadParameter.__base__  # click's, of which newer versions of Typer have a copy of their own


class CommandLine(TyperGroup):
    """Ends errors in one line: exit code 2 for wrong usage, 1 for others; `--debug` shows where these come from.

    Ctrl-C is exit code 130, as typer has it.
    """

    called = None  # the command, for the names of its options

    def get_command(self, ctx, cmd_name: str):
        found = super().get_command(ctx, cmd_name)
        ctx.find_root().command.called = found
        return found

    def main(self, *args, **options) -> Any:
        try:
            raise SystemExit(super().main(*args, **options | {"standalone_mode": False}))
        except _UsageError as error:
            if text := error.format_message():  # else help was asked for, and given
                text = " ".join(text.split())
                if errors := getattr(error.__cause__, "errors", None):  # Typer's own: pydantic knows what was given
                    text += f" ({errors()[0]['input']!r})"
                text += "" if text.endswith((".", "?")) else "."
                see = f" See {error.ctx.command_path} --help." if error.ctx else ""
                typer.echo(f"lladamedv: {text}{see}", err=True)
            raise SystemExit(error.exit_code) from error
        except Exception as error:
            if os.environ.get(DEBUG):
                raise
            # A message that was written for users names what is wrong; others say at least what kind of error it was.
            text = self._in_flags(str(error))
            if not text or not isinstance(error, (ValueError, ImportError)):
                text = ": ".join(part for part in (type(error).__name__, text) if part) + " (--debug shows where)"
            typer.echo(f"lladamedv: {' '.join(text.splitlines())}", err=True)
            raise SystemExit(1) from error

    def _in_flags(self, text: str) -> str:
        """A message with the names of the command line, where it names arguments as messages do: in backticks."""
        for parameter in getattr(self.called, "params", ()):
            is_option = parameter.param_type_name == "option"
            name = max(parameter.opts, key=len) if is_option else parameter.metavar or parameter.name.upper()
            for each in (parameter.name, name.lstrip("-").replace("-", "_")):
                text = text.replace(f"`{each}`", name)
        return re.sub(r"`(\w+)`", r"\1", text)


def quiet() -> None:
    """Import PyTorch, Transformers and the model's classes without a line of theirs, now or later, among the answers.

    To be called when the arguments have been checked, and before other modules are imported. Errors of the libraries
    and what this package reports are shown; `--debug`, Python's `-W` and the libraries' own variables show more.
    """
    _silence()
    ours = logging.getLogger("lladamedv")
    ours.setLevel(logging.WARNING)
    if not ours.handlers:
        ours.addHandler(_ToStandardError())

    import torch  # noqa: F401  sets the level of its loggers

    if not os.environ.get(DEBUG):
        logging.getLogger("torch").setLevel(logging.ERROR)
    import transformers

    transformers.logging.disable_progress_bar()
    import lladamedv.modeling_lladamedv.modeling_lladamedv  # noqa: F401  registers the Auto classes


def _silence() -> None:
    """Have libraries that are imported later be quiet."""
    if os.environ.get(DEBUG):
        return
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    # Some set levels of their own, to say which of their extensions were built for other machines.
    for name in (None, "torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


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
