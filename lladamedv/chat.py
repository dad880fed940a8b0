"""The chat in the terminal: lines that are typed, answers that appear while they are denoised, and nothing that acts on
the terminal.

On standard output are answers, and their steps if they are asked for; everything else goes to standard error. What
people, files and the model say is escaped, and never read as markup. Nothing is saved.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration
from lladamedv.processing import LLaDAMedVProcessor
from lladamedv.processing.medical_images import MedicalImage

from .cli_common import print_json, read_option, tell
from .conversation import LEVELS, NOTICE, Token, demo_notice, printable, reply_to


with suppress(ImportError):  # not on Windows
    import readline  # noqa: F401  makes `input` a line editor


_STYLES = ("", "underline", "bold underline", "reverse")  # of the levels of confidence: no colours
_HELP = """\
/image FILE      ask about another image, in a new conversation
/clear           forget the conversation and keep the image
/set NAME=VALUE  change options of generation, such as steps=8 block_length=8; NAME= takes the default; /set shows them
/help            show this
/quit            end, as Ctrl-D does; Ctrl-C stops an answer
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
        self._show_steps, self._as_json = show_steps, as_json
        self._live = sys.stdout.isatty() and not (show_steps or as_json)
        self._console = Console(highlight=False)
        self._picture = None
        self._turns: list[tuple[str, str]] = []

    def run(self, picture: MedicalImage | None = None) -> None:
        """Read lines and obey them until `/quit` or the end of the input.

        Raises:
            ValueError: for options of `generate` that are not allowed.
            KeyboardInterrupt: for Ctrl-C, except while an answer is given and lines are typed, not piped.
        """
        self._model.resolve_generation_config(**self._options, return_dict_in_generate=True)
        for stream in (sys.stdin, sys.stdout):
            stream.reconfigure(errors="replace")  # rather than end the chat
        for notice in filter(None, (NOTICE, demo_notice(self._model))):
            tell(notice)
        if picture is not None:
            self._look_at(picture)
        typing = sys.stdin.isatty()
        prompt = "> " if typing and sys.stdout.isatty() else ""
        while True:
            try:
                line = input(prompt).strip()
            except EOFError:
                return
            if line == "/quit":
                return
            try:
                self._obey(line)
            except (ValueError, ImportError) as error:
                _say(f"{error} (/clear forgets the conversation.)" if line[0] != "/" and self._turns else str(error))
            except KeyboardInterrupt:
                if not typing:
                    raise
                _say("stopped; this question is not part of the conversation")

    def _look_at(self, picture: MedicalImage) -> None:
        self._picture, self._turns = picture.image, []
        height, width = picture.size
        tell(_line("; ".join([f"image: {width} by {height} pixels", *map(str, picture.steps)])))

    def _obey(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if line and not line.startswith("/"):
            self._ask(line)
        elif command == "/image" and argument:
            self._look_at(self._read_image(argument.strip()))
        elif line == "/clear":
            self._turns = []
        elif line == "/help":
            typer.echo(_HELP, err=True)
        elif command == "/set":
            self._set(argument.split())
        elif line:
            raise ValueError(f"{line!r} is no command; allowed are /image FILE, /clear, /set, /help and /quit.")

    def _set(self, words: list[str]) -> None:
        """Change options of `generate`, all of them or, if one is wrong, none."""
        options = dict(self._options)
        for word in words:
            name, is_set, value = word.partition("=")
            if not is_set:
                raise ValueError(f"{word!r} is no NAME=VALUE, as steps=8 is.")
            options.pop(name, None)
            if value:
                options[name] = read_option(name, value)
        self._model.resolve_generation_config(**options, return_dict_in_generate=True)
        self._options = options
        own = ", ".join(f"{name}={value}" for name, value in options.items())
        _say(f"options: {own or 'as the model has them'}")

    def _ask(self, question: str) -> None:
        if self._picture is None:
            raise ValueError("There is no image yet; /image FILE takes one.")
        step = -1  # the first canvas is before the first step

        def show(tokens: list[Token]) -> None:
            nonlocal step
            step += 1
            if self._live:
                live.update(_draft(tokens, step), refresh=True)
            elif step:
                line = "".join(_spaced(token) for token in tokens)
                typer.echo(f"{step:4} {printable(line.strip(), keep='')}", err=self._as_json)

        with Live(console=self._console, auto_refresh=False) if self._live else nullcontext() as live:
            reply = reply_to(
                self._model, self._processor, self._picture, question, self._turns,
                show if self._live or self._show_steps else None, **self._options,
            )  # fmt: skip
            if self._live:
                live.update(_shade(reply.tokens, reply.suffix), refresh=True)
        if reply.warning is not None and not self._turns:  # once a picture
            _say(f"Warning: {reply.warning}")
        self._turns.append((question, reply.text))
        if self._live:
            self._console.print(Text(reply.summary, "dim"))
        elif self._as_json:
            known = {"confidence": reply.confidence, "image_reliance": reply.image_reliance}
            print_json({"question": question, "answer": reply.text, **known})
        else:
            typer.echo(printable(reply.text))


def _spaced(token: Token) -> str:
    return f" {token.text}" if token.step is None else token.text or ""


def _draft(tokens: Iterable[Token], step: int) -> Text:
    """An unfinished answer: masks dim, what is new bold."""
    text = Text()
    for token in tokens:
        style = "dim" if token.step is None else "bold" if token.step == step else ""
        text.append(printable(_spaced(token)), style)
    return text


def _shade(tokens: Iterable[Token], suffix: str) -> Text:
    """An answer whose tokens look as sure as they are, and what stands behind it."""
    text = Text()
    for token in tokens:
        text.append(printable(token.text or ""), "dim" if token.step is None else _STYLES[token.level])
    text.append(printable(suffix))
    text.rstrip()
    return text[len(text.plain) - len(text.plain.lstrip()) :]


def _say(text: str) -> None:
    """Print one line on standard error."""
    typer.echo(_line(text), err=True)


def _line(text: str) -> str:
    return printable(" ".join(text.split()))


__all__ = ["Chat"]
