"""`lladamedv chat`, and the options that it shares with `lladamedv ask`."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from .cli_common import Device, Dtype, Model, Revision, quiet
from .cli_evaluation import parse_options
from .loading import DEMO, load_model


Window = Annotated[
    str | None, typer.Option(help="Grey values to show: LEVEL/WIDTH, as 40/400, or lung, bone, brain, abdomen, …")
]
Frame = Annotated[int | None, typer.Option(help="Frame of a DICOM file, from 0.")]
SliceIndex = Annotated[int | None, typer.Option("--slice", help="Slice of a NIfTI volume, from 0.")]
Page = Annotated[int | None, typer.Option(help="Page of a TIFF file, from 0.")]
Options = Annotated[
    list[str] | None, typer.Option("--option", help="An option of generate, as NAME=VALUE; several times.")
]


def parse_window(text: str | None) -> str | tuple[float, float] | None:
    """Level and width, or the name of a preset as it is."""
    level, separator, width = (text or "").partition("/")
    try:
        return (float(level), float(width)) if separator else text
    except ValueError:
        return text


def chat(
    image: Annotated[
        str | None, typer.Argument(help="File (also DICOM, NIfTI and 16-bit pictures); or later, by /image FILE.")
    ] = None,
    model: Model = DEMO,
    revision: Revision = None,
    window: Window = None,
    frame: Frame = None,
    slice_index: SliceIndex = None,
    page: Page = None,
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
    quiet()
    from lladamedv.chat import Chat, say
    from lladamedv.conversation import NOTICE
    from lladamedv.processing.medical_images import read_medical_image

    options = parse_options(option)
    read_image = partial(
        read_medical_image, window=parse_window(window), frame=frame, slice_index=slice_index, page=page
    )
    picture = None if image is None else read_image(image)
    session = Chat(*load_model(model, dtype, device, revision), options, read_image, show_steps, as_json)
    say(NOTICE)
    if picture is not None:
        session.look_at(picture)
    session.run()
