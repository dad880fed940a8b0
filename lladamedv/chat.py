"""The chat in the terminal: lines that are typed, answers that appear while they are denoised, and nothing that acts on
the terminal.

On standard output are answers, and their steps if they are asked for; everything else goes to standard error. What
people, files and the model say is escaped, and never read as markup. Nothing is saved.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial

import typer
from PIL import Image
from rich.console import Console
from rich.live import Live
from rich.text import Text

from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration, LLaDAMedVGenerationOutput
from lladamedv.processing import LLaDAMedVProcessor
from lladamedv.processing.medical_images import MedicalImage

from .cli_common import print_json
from .conversation import LEVELS, MASK, CanvasStreamer, chat_about, generate_answer, level_of, pieces, printable
from .explanation import answer_length, answer_tokens, summarize


with suppress(ImportError):  # not on Windows
    import readline  # noqa: F401  makes `input` a line editor


_STYLES = ("", "underline", "bold underline", "reverse")  # of the levels of confidence: no colours
_HELP = """\
/image FILE  ask about another image, in a new conversation
/new         forget the conversation and keep the image
/help        show this
/quit        end, as Ctrl-D does; Ctrl-C stops an answer
How a token looks is its confidence: """ + ", ".join(
    f"{style or 'plain'} {level.name}" for style, level in zip(_STYLES, LEVELS)
)


class Chat:
    """A conversation about one image, read from standard input.

    Args:
        model, processor: as loaded.
        options: those of `generate`.
        read_image: reads an image file, with what the command line says about windows, frames and so on.
        show_steps: print the canvas after every step, one line each, instead of redrawing it in place.
        as_json: print each answer as one line of JSON.

    Raises:
        ValueError: for options that are not allowed.
    """

    def __init__(
        self,
        model: LLaDAMedVForConditionalGeneration,
        processor: LLaDAMedVProcessor,
        options: dict,
        read_image: Callable[[str], MedicalImage],
        show_steps: bool = False,
        as_json: bool = False,
    ):
        self._model, self._processor, self._options, self._read_image = model, processor, options, read_image
        self._prepared = model.resolve_generation_config(**options, return_dict_in_generate=True)
        self._show_steps, self._as_json = show_steps, as_json
        self._live = sys.stdout.isatty() and not (show_steps or as_json)
        self._console = Console(highlight=False)
        self._decode = partial(processor.decode, skip_special_tokens=True)
        self._picture: Image.Image | None = None
        self._turns: list[tuple[str, str]] = []

    def look_at(self, image: MedicalImage) -> None:
        """Begin a new conversation, about this image."""
        self._picture, self._turns = image.image, []
        height, width = image.size
        say("; ".join([f"image: {width} by {height} pixels", *image.steps]))

    def run(self) -> None:
        """Read lines and obey them until `/quit` or the end of the input.

        Raises:
            KeyboardInterrupt: for Ctrl-C, except while an answer is given to somebody who types.
        """
        for stream in (sys.stdin, sys.stdout):
            stream.reconfigure(errors="replace")  # rather than end the chat
        typing = sys.stdin.isatty()
        prompt = "> " if typing and sys.stdout.isatty() else ""
        while True:
            try:
                line = input(prompt).strip()
            except EOFError:
                line = "/quit"
            if line == "/quit":
                return
            try:
                self._obey(line)
            except (ValueError, ImportError) as error:
                say(f"{error} (/new forgets the conversation.)" if line[0] != "/" and self._turns else str(error))
            except KeyboardInterrupt:
                if not typing:
                    raise
                say("stopped; this question is not part of the conversation")

    def _obey(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if line and not line.startswith("/"):
            self._ask(line)
        elif command == "/image" and argument:
            self.look_at(self._read_image(os.path.expanduser(argument.strip())))
        elif line == "/new":
            self._turns = []
        elif line == "/help":
            typer.echo(_HELP, err=True)
        elif line:
            raise ValueError(f"{line!r} is no command; allowed are /image FILE, /new, /help and /quit.")

    def _ask(self, question: str) -> None:
        if self._picture is None:
            raise ValueError("There is no image yet; /image FILE takes one.")
        canvases: list[list[int]] = []

        def show(canvas, _):
            if self._live:
                live.update(self._draft(canvas, canvases[-1] if canvases else canvas), refresh=True)
            elif canvases:  # the first is before the first step
                line = "".join(f" {MASK}" if text is None else text for text, _ in self._pieces(canvas))
                typer.echo(f"{len(canvases):4} {printable(line.strip(), keep='')}", err=self._as_json)
            canvases.append(canvas)

        with Live(console=self._console, auto_refresh=False) if self._live else nullcontext() as live:
            streamer = None
            if self._live or self._show_steps:
                streamer = CanvasStreamer(self._prepared.max_new_tokens, self._model.config.mask_token_id, show)
            messages = chat_about(self._picture, self._turns, question)
            ids, output = generate_answer(self._model, self._processor, messages, **self._options, streamer=streamer)
            if self._live:
                live.update(self._shade(ids, output), refresh=True)
        answer, confidence = self._decode(ids).strip(), float(output.answer_confidence[0])
        self._turns.append((question, answer))
        if self._live:
            self._console.print(Text(summarize(output), "dim"))
        elif self._as_json:
            confidence = None if math.isnan(confidence) else confidence
            print_json({"question": question, "answer": answer, "confidence": confidence})
        else:
            typer.echo(printable(answer))

    def _pieces(self, canvas):
        return pieces(canvas, self._decode, self._model.config.mask_token_id)

    def _draft(self, canvas: list[int], previous: list[int]) -> Text:
        """An unfinished answer: masks dim, what is new bold."""
        text = Text()
        for piece, places in self._pieces(canvas):
            if piece is None:
                text.append(f" {MASK}", "dim")
            else:
                new = any(previous[place] == self._model.config.mask_token_id for place in places)
                text.append(printable(piece), "bold" if new else "")
        return text

    def _shade(self, ids: list[int], output: LLaDAMedVGenerationOutput) -> Text:
        """An answer whose tokens look as sure as they are."""
        text = Text()
        for token in answer_tokens(ids, output, self._decode, self._model.config.mask_token_id):
            style = "dim" if token.confidence is None else _STYLES[level_of(token.confidence)]
            text.append(printable(token.text or ""), style)
        text.append(printable(self._decode(ids[answer_length(output) :])))  # a suffix that was given
        text.rstrip()
        return text[len(text.plain) - len(text.plain.lstrip()) :]


def say(text: str) -> None:
    """Print one line on standard error."""
    typer.echo(printable(" ".join(text.split())), err=True)


__all__ = ["Chat", "say"]
