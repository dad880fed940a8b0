"""What a command of the command line is: options that several share, their checks, how errors end, and how results
become text or JSON. The commands themselves are in `cli`.

Nothing here imports PyTorch before [`quiet`]: wrong usage must not wait for it.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from lladamedv.modeling_lladamedv.generation_options_lladamedv import OPTIONS, GenerationOptionError
from lladamedv.processing.medical_images import (
    READING_OPTIONS,
    MedicalImage,
    MedicalImageError,
    check_options,
    fetch_url,
    is_url,
    read_medical_image,
)

from . import loading


DEBUG = "LLADAMEDV_DEBUG"  # environment variable, so that processes that a command starts know of it, too
# Variables that keep libraries quiet which are imported later.
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error", "DATASETS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
# The same for all progress bars, in processes that a command starts, too; ours are those of huggingface_hub.
_NO_BARS = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


# Options and their checks


def checked(check: Callable[[Any], object]) -> Callable[[typer.CallbackParam, Any], Any]:
    """A callback of an option or argument, so that it is checked with the command line, before anything is imported."""

    def callback(param: typer.CallbackParam, value: Any) -> Any:
        try:
            if value is not None:
                check(value)
        except ValueError as error:  # Typer names the option itself
            raise typer.BadParameter(str(error).removeprefix(f"`{param.name}` is ")) from error
        return value

    return callback


def flag(kind: Any, help: str, *names: str, check: Callable[[Any], object] | None = None, **more) -> Any:
    """The annotation of an option; `names` where its flag is not the parameter's name, `more` is Typer's."""
    return Annotated[kind, typer.Option(*names, help=help, callback=check and checked(check), **more)]


def word(kind: Any, metavar: str, help: str, check: Callable[[Any], object] | None = None, **more) -> Any:
    """The annotation of a positional argument."""
    return Annotated[kind, typer.Argument(metavar=metavar, help=help, callback=check and checked(check), **more)]


def one_of(*allowed: str) -> Callable[[str], None]:
    """The check of an option with a few allowed values."""

    def check(value: str) -> None:
        if value not in allowed:
            raise ValueError(f"{value!r}; allowed are {', '.join(allowed)}.")

    return check


def check_exists(path: str | Path) -> None:
    if not os.path.exists(os.path.expanduser(path)):
        raise ValueError(f"{str(path)!r}; there is no such file or folder.")


def usage(flag: str, message: str) -> typer.BadParameter:
    """An error of wrong usage that is seen only when several options are looked at."""
    return typer.BadParameter(message, param_hint=flag)


AsJson = flag(bool, "Print the result as JSON; all else goes to standard error.", "--json")


class Group(NamedTuple):
    """Options that several commands share.

    Attributes:
        parameters: annotation and default of each, by the parameter's name; `...` for one that is required.
        read: makes the command's argument of the values of these, and of all values that were given; `None` where the
            command takes them by their own names.
    """

    parameters: dict[str, tuple[Any, Any]]
    read: Callable[[dict, dict], Any] | None = None


def takes(**groups: Group) -> Callable[[Callable], Callable]:
    """Give a command the options of groups; a group that is read is one argument, under the name given here."""

    def decorate(command: Callable) -> Callable:
        @wraps(command)
        def wrapped(**given):
            own = {name: {each: given.pop(each) for each in group.parameters} for name, group in groups.items()}
            everything = {name: value for values in own.values() for name, value in values.items()} | given
            for name, group in groups.items():
                given |= own[name] if group.read is None else {name: group.read(own[name], everything)}
            return command(**given)

        parameters = [each for name, each in inspect.signature(command).parameters.items() if name not in groups]
        for group in groups.values():
            for name, (annotation, default) in group.parameters.items():
                default = inspect.Parameter.empty if default is ... else default
                each = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
                parameters.append(each)
        _sign(wrapped, parameters)
        return wrapped

    return decorate


def calls(target: str) -> Callable[[Callable], Callable]:
    """Make a command of its signature: it calls a function with all that was given, and prints a result as JSON.

    Args:
        target: the function, as `module:name`. It takes the command's parameters, and as `report` where lines on the
            way to the result go.
    """

    def decorate(command: Callable) -> Callable:
        @wraps(command)
        def wrapped(as_json: bool, **given):
            command(**given)  # what it checks
            quiet()
            module, _, name = target.partition(":")
            result = getattr(import_module(module), name)(**given, report=progress(as_json))
            if as_json:
                print_json(result)

        as_json = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=AsJson)
        _sign(wrapped, [*inspect.signature(command).parameters.values(), as_json])
        return wrapped

    return decorate


def _sign(command: Callable, parameters: list[inspect.Parameter]) -> None:
    """Let Typer see parameters that the command's own `def` does not have."""
    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


# The model


class Source(NamedTuple):
    """Which model to load, and how."""

    model: str | None
    revision: str | None
    dtype: str
    device: str

    def load(self, device: Any = None) -> tuple:
        """Model and processor; on `device` where the user leaves that open."""
        with _status(f"Loading {self.model} …"):
            return loading.load_model(
                self.model, self.dtype, device if device is not None and self.device == "auto" else self.device,
                self.revision,
            )  # fmt: skip


def _check_device_name(device: str) -> None:
    kind, _, number = device.partition(":")
    if device != "auto" and (kind not in ("cpu", "cuda", "mps", "xpu") or (":" in device and not number.isdecimal())):
        raise ValueError(f"{device!r}; allowed are auto, cpu, cuda, mps and xpu, also with a number, as in cuda:1.")


def model_options(default: Any = loading.DEMO, revision: str = "--revision") -> Group:
    """Which model: `default` if none is named; `revision` is the flag of its revision."""
    about = "Folder or Hub id of a model or of adapters, or `demo` for the tiny one that comes with this."
    dtypes = f"{', '.join(loading.DTYPES)}; auto is the checkpoint's on a GPU and float32 on a CPU."
    devices = "auto, cpu, cuda or mps; auto is a GPU if there is one."
    more = {"rich_help_panel": "Model"}
    parameters = {
        "model": (flag(str if default else str | None, about, check=loading.find_folder, **more), default),
        revision.strip("-").replace("-", "_"): (flag(str | None, "Revision of --model on the Hub.", **more), None),
        "dtype": (flag(str, dtypes, check=one_of(*loading.DTYPES), **more), "auto"),
        "device": (flag(str, devices, check=_check_device_name, **more), "auto"),
    }
    return Group(parameters, lambda own, given: Source(*own.values()))


# Reading images

_READING_FLAGS = {option.argument: f"--{option.name.replace('_', '-')}" for option in READING_OPTIONS}


class Reader:
    """Reads images, by their files' names or URLs, with the options of the reader.

    Raises:
        ValueError: if one cannot be read, or an option does not suit it; in the names of the command line.
    """

    def __init__(self, own: dict, given: dict):
        self.options = own
        self._told(check_options)

    @staticmethod
    def name_of(argument: str) -> str:
        """What the command line calls an argument of [`read_medical_image`]."""
        return _READING_FLAGS.get(argument, argument)

    def __call__(self, source: str) -> MedicalImage:
        def read(**options):
            return read_medical_image(fetch_url(source) if is_url(source) else os.path.expanduser(source), **options)

        return self._told(read, source)

    def _told(self, call: Callable, source: str = "") -> Any:
        try:
            return call(**self.options)
        except MedicalImageError as error:
            raise ValueError(error.told(lambda argument: _READING_FLAGS.get(argument, repr(source)))) from None


READING = Group(
    {
        option.argument: (
            flag(option.type if option.type is bool else option.type | None, option.help,
                 _READING_FLAGS[option.argument], rich_help_panel="Image"),
            False if option.type is bool else None,
        )
        for option in READING_OPTIONS
    },
    Reader,
)  # fmt: skip


# Options of `generate`

_PANEL = "Generation (by default as the model's own configuration says)"


def _is_shown(name: str) -> bool:
    """Whether an option changes what commands show: Python objects, and what only adds to the output, do not."""
    return OPTIONS[name].types != () and OPTIONS[name].role != "report"


def read_option(name: str, text: str) -> Any:
    """The value of an option of `generate`; of another name, which `generate` may know as autoregressive, as JSON.

    Raises:
        ValueError: for an option that there is not, or that changes nothing that is shown.
    """
    if name not in OPTIONS:
        if meant := difflib.get_close_matches(name, OPTIONS, 1, cutoff=0.8):
            raise ValueError(f"{name!r} is no option of generate; did you mean {meant[0]}?")
        with suppress(json.JSONDecodeError):
            return json.loads(text)
        return text
    if not _is_shown(name):
        raise ValueError(f"{name!r} changes nothing that a command shows.")
    return OPTIONS[name].parse(text)


def generation_options(without: Sequence[str] = (), **defaults: float) -> Group:
    """Flags for the options of `generate`, and `--option NAME=VALUE`, which takes the same.

    Args:
        without: options that the command has otherwise.
        defaults: the command's own; others are the model's.
    """
    parameters = {}
    for name, option in OPTIONS.items():
        if name not in without and option.role != "model" and _is_shown(name):
            is_switch = option.types == (bool,)
            more = {} if is_switch else {"metavar": f"<{option.type_names.partition(' ')[0]}>"}
            help = f"{option.meaning.partition('. ')[0].removesuffix('.')}."
            help += f" By default {defaults[name]}." if name in defaults else ""
            parameters[name] = (flag((bool if is_switch else str) | None, help, rich_help_panel=_PANEL, **more), None)
    parameters["option"] = (flag(list[str] | None, "NAME=VALUE", "--option", hidden=True), None)

    def read(own: dict, given: dict) -> dict:
        words = own.pop("option") or []
        if wrong := [each for each in words if "=" not in each[1:]]:
            raise usage("'--option'", f"{wrong[0]!r}; allowed is NAME=VALUE.")
        options = {}
        for name, value in (*own.items(), *(each.split("=", 1) for each in words)):
            if value is not None:
                if name in options:
                    raise usage("'--option'", f"{name} is given twice.")
                options[name] = value if isinstance(value, bool) else _told_as_usage(name, value)
        options = defaults | options
        check_generation(given.get("model"), options, partial=bool(without))
        return options

    return Group(parameters, read)


def _told_as_usage(name: str, text: str) -> Any:
    try:
        return read_option(name, text)
    except GenerationOptionError:
        raise
    except ValueError as error:
        raise usage("'--option'", str(error)) from None


def check_generation(model: str | None, options: dict, partial: bool = False) -> None:
    """Check options of `generate` without PyTorch: by themselves, and with a model whether they suit its own.

    A model's own options are known here only if it is a folder in this package's own format.

    Args:
        partial: whether the command adds others, so that they cannot be checked together.

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

    own = LLaDAMedVGenerationConfig(**options)
    folder = None if model is None or partial else loading.find_folder(model)
    if folder is None or not all((folder / file).is_file() for file in ("processor_config.json", "config.json")):
        return
    try:
        own = LLaDAMedVGenerationConfig.from_pretrained(folder)
    except (OSError, ValueError):  # loading the model reports what is wrong with it
        return
    resolve_generation_config(own, own, options | {"return_dict_in_generate": True})


# Serving: what `app` and `serve` share


def _check_host_name(host: str) -> None:
    if not host.strip():
        raise ValueError("it is empty; allowed are names and addresses of this computer.")


Host = flag(str, "Address to listen on; any but 127.0.0.1 is open to other computers.", check=_check_host_name)


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


# Errors, quiet and results


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
        except typer.BadParameter.__base__ as error:  # click's UsageError, or Typer's copy of it
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
            raise SystemExit(2 if isinstance(error, GenerationOptionError) else 1) from error

    def _in_flags(self, text: str) -> str:
        """A message in the names of the command line: Python's messages name arguments in backticks."""
        for parameter in getattr(self.called, "params", ()):
            is_option = parameter.param_type_name == "option"
            if is_option and not parameter.opts:  # a flag that says the opposite, --public for `private`
                continue
            name = max(parameter.opts, key=len) if is_option else parameter.metavar or parameter.name.upper()
            for each in (parameter.name, name.lstrip("-").replace("-", "_")):
                text = text.replace(f"`{each}`", name)
        for other in filter(str.isidentifier, text.split("`")):
            text = text.replace(f"`{other}`", other)
        return text


_hushed = False  # whether --quiet is given


class Commands(typer.Typer):
    """Commands that all take --quiet."""

    def command(self, *names: str, **more) -> Callable[[Callable], Callable]:
        register = super().command(*names, **more)
        quietly = flag(bool, "Print results, warnings and errors alone.", "--quiet", "-q")

        def decorate(command: Callable) -> Callable:
            @wraps(command)
            def wrapped(quiet: bool, **given):
                global _hushed
                _hushed = quiet
                os.environ.update(_NO_BARS if quiet else {})
                return command(**given)

            own = inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=quietly)
            _sign(wrapped, [*inspect.signature(command).parameters.values(), own])
            return register(wrapped)

        return decorate


def tell(line: str) -> None:
    """A line about what was done, on standard error; not with --quiet. A warning is none: `typer.echo` prints it."""
    if not _hushed:
        typer.echo(line, err=True)


def _status(text: str):
    """What is done now, on a terminal, as long as it takes."""
    if _hushed or not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(text)


def quiet() -> None:
    """Import PyTorch and Transformers without a line of theirs, now or later, among the answers.

    To be called when the arguments have been checked, and before other modules are imported. Errors of the libraries
    and what this package reports are shown; `--debug`, Python's `-W` and the libraries' own variables show more.
    """
    _silence()
    ours = logging.getLogger("lladamedv")
    ours.setLevel(logging.WARNING)
    if not ours.handlers:
        ours.addHandler(_ToStandardError())

    with _status("Starting PyTorch …"):
        import torch  # noqa: F401  sets the level of its loggers

        if not os.environ.get(DEBUG):
            logging.getLogger("torch").setLevel(logging.ERROR)
        import transformers

        transformers.logging.disable_progress_bar()


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
    return tell if as_json else typer.echo


@contextmanager
def row_counter() -> Iterator[Callable[[int, int], None]]:
    """Shows on a terminal how many rows of how many are done."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=_hushed or not console.is_terminal) as bar:
        task = bar.add_task("rows", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_json(result: Any) -> None:
    """One line of JSON; dataclasses become objects, all else that JSON lacks becomes text."""

    def plain(value: Any) -> Any:
        return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)

    typer.echo(json.dumps(result, default=plain))
