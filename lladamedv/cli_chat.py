"""`lladamedv chat`, and the options that it shares with `lladamedv ask`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Annotated

import typer

from lladamedv.processing.medical_images import (
    READING_OPTIONS,
    MedicalImage,
    MedicalImageError,
    check_options,
    fetch_url,
    is_url,
    read_medical_image,
)

from .cli_common import Device, Dtype, Model, Options, Revision, check_generation, parse_options, quiet
from .loading import DEMO, load_model


_FLAGS = {option.argument: f"--{option.name.replace('_', '-')}" for option in READING_OPTIONS}


def takes_reading_options(command: Callable) -> Callable:
    """Give a command the options of the reader of images instead of its parameter `reading`, a dict of them."""

    @wraps(command)
    def wrapped(**given):
        reading = {argument: given.pop(argument) for argument in _FLAGS}
        with _in_flags():
            check_options(**reading)
        return command(**given, reading=reading)

    options = [
        inspect.Parameter(
            option.argument,
            inspect.Parameter.KEYWORD_ONLY,
            default=False if option.type is bool else None,
            annotation=Annotated[
                bool if option.type is bool else option.type | None,
                typer.Option(_FLAGS[option.argument], help=option.help),
            ],
        )
        for option in READING_OPTIONS
    ]
    own = inspect.signature(command, eval_str=True).parameters.values()
    own = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in own if parameter.name != "reading"]
    wrapped.__signature__ = inspect.Signature([*own, *options])
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *options)}
    return wrapped


@contextmanager
def _in_flags(source: str = "") -> Iterator[None]:
    """Have the reader name options as the command line does, and the image as it was typed."""
    try:
        yield
    except MedicalImageError as error:
        raise ValueError(error.told(lambda argument: _FLAGS.get(argument, repr(source)))) from None


def read_picture(source: str, reading: dict) -> MedicalImage:
    """An image, by its file's name or its URL.

    Raises:
        ValueError: if it cannot be read, or an option does not suit it; in the names of the command line.
    """
    with _in_flags(source):
        return read_medical_image(fetch_url(source) if is_url(source) else os.path.expanduser(source), **reading)


@takes_reading_options
def chat(
    image: Annotated[
        str | None,
        typer.Argument(
            metavar="IMAGE", help="File (also DICOM, NIfTI and 16-bit pictures) or URL; or later, by /image FILE."
        ),
    ] = None,
    model: Model = DEMO,
    revision: Revision = None,
    reading: dict = {},  # noqa: B006  stands for all options of the reader
    option: Options = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    show_steps: Annotated[
        bool, typer.Option("--show-steps", help="Print the canvas after every step, one line each.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print question, answer and confidence as a line of JSON each.")
    ] = False,
) -> None:
    """Talk with a model about one image, and watch its answers being denoised.

    One question a line. /help lists the commands, Ctrl-C stops an answer, and Ctrl-D or /quit ends the chat. Options
    about images hold for all images of the chat.

    \b
    Examples:
      lladamedv chat picture.png
      lladamedv chat scan.dcm --window bone --model path/or/hub-id
      lladamedv chat picture.png --json < questions.txt > answers.jsonl
    """
    options = parse_options(option)
    check_generation(model, options)
    picture = None if image is None else read_picture(image, reading)
    quiet()
    from lladamedv.chat import Chat, say
    from lladamedv.conversation import NOTICE, demo_notice

    loaded, processor = load_model(model, dtype, device, revision)
    session = Chat(loaded, processor, options, partial(read_picture, reading=reading), show_steps, as_json)
    for notice in filter(None, (NOTICE, demo_notice(loaded))):
        say(notice)
    if picture is not None:
        session.look_at(picture)
    session.run()
