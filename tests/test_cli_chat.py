"""`lladamedv chat` in a pipe, and in a pseudo-terminal whose screen is followed: masks go away in place."""

import contextlib
import json
import os
import re
import select
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from lladamedv.cli import app
from lladamedv.conversation import DEMO_NOTICE, MASK
from lladamedv.evaluation.answering import answer_batch
from lladamedv.processing.phantoms import PhantomVQA
from tests.faces import conversation, generated


DESCRIBE, CLOSED = "Describe the image.", "Is there a lesion?"
HOSTILE = "\x1b[2J[bold]lesion[/bold]\r"  # what the model says instead of "lesion"
SHOWN = r"\x1b[2J[bold]lesion[/bold]\r"


@pytest.fixture(scope="module")
def example():
    return PhantomVQA(9000, 60, ("description",))[15]


def ask(shipped, image, *texts, **options):
    """Answer the last question of a conversation, asked in one go."""
    return answer_batch(*shipped, [conversation(image, *texts)], **options)[0]


def chat(*words, lines):
    result = CliRunner().invoke(app, ["chat", *map(str, words)], input="\n".join(lines))
    assert "Traceback" not in result.output
    return result


def test_in_a_pipe(shipped, example, picture):
    """Answers alone on standard output; the conversation is sent along, until a new one begins."""
    first = ask(shipped, example.image, DESCRIBE).text
    second = ask(shipped, example.image, DESCRIBE, first, CLOSED).text
    alone = ask(shipped, example.image, CLOSED).text
    assert second != alone, "the first turn must matter in this test"
    result = chat(picture, lines=[DESCRIBE, "", "  ", CLOSED, "/clear", CLOSED, f"/image {picture}", DESCRIBE, CLOSED])
    assert result.exit_code == 0 and result.stdout.splitlines() == [first, second, alone, first, second]
    notice, about_the_demo, image, again = result.stderr.splitlines()
    assert about_the_demo == DEMO_NOTICE
    assert notice.startswith("Research only. Not a medical device") and image == again == "image: 64 by 64 pixels"

    result = chat(lines=[CLOSED, f"/image {picture}", CLOSED, "/quit", CLOSED])
    assert result.exit_code == 0 and result.stdout == f"{alone}\n"
    assert "There is no image yet; /image FILE takes one." in result.stderr


def test_unusual_pictures_are_told_once(picture, photograph):
    result = chat(picture, lines=[CLOSED, f"/image {photograph}", CLOSED, CLOSED])
    assert result.stderr.count("Warning: The picture is unlike those of phantoms") == 1


def test_json(shipped, example, picture):
    result = chat(picture, "--json", "--confidence-threshold", 0.9, lines=[DESCRIBE, CLOSED])
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    first = ask(shipped, example.image, DESCRIBE, confidence_threshold=0.9)
    second = ask(shipped, example.image, DESCRIBE, first.text, CLOSED, confidence_threshold=0.9)
    assert lines == [
        {"question": question, "answer": given.text, "confidence": given.confidence, "image_reliance": None}
        for question, given in ((DESCRIBE, first), (CLOSED, second))
    ]


def test_options_are_set_in_the_chat(shipped, example, picture):
    """All of a line or none; an empty value takes the model's own again."""
    bad = ["/set steps=x", "/set stps=3", "/set 3", "/set block_length=7"]
    set_back = "/set steps= max_new_tokens="
    lines = ["/set steps=2 max_new_tokens=8", DESCRIBE, "/clear", *bad, DESCRIBE, "/clear", set_back, DESCRIBE]
    result = chat(picture, lines=lines)
    cut = {"steps": 2, "max_new_tokens": 8}
    short, own = (ask(shipped, example.image, DESCRIBE, **each).text for each in (cut, {}))
    assert short != own and result.stdout.splitlines() == [short, short, own]
    said = result.stderr.splitlines()[3:]
    assert said[0] == "options: steps=2, max_new_tokens=8" and said[-1] == "options: as the model has them"
    for line, words in zip(said[1:], ("`steps` is x", "did you mean steps?", "'3' is no NAME=VALUE", "block_length")):
        assert words in line


def canvases(shipped, example, **options):
    """The canvas after every step, up to its end, as text without spaces."""
    shown = generated(shipped, example.image, DESCRIBE, **options).canvases[1:]
    return ["".join(text for text, _, _ in canvas).replace(" ", "") for canvas in shown]


# With blocks of 1 the last step finds the end alone.
@pytest.mark.parametrize(("as_json", "block_length"), [(False, 8), (True, 1)])
def test_steps(shipped, example, picture, as_json, block_length):
    words = ["--show-steps", "--option", f"block_length={block_length}", *["--json"] * as_json]
    result = chat(picture, *words, lines=[DESCRIBE])
    lines = result.stderr.splitlines()[3:] if as_json else result.stdout.splitlines()[:-1]
    expected = canvases(shipped, example, block_length=block_length)
    assert [line.split()[0] for line in lines] == [str(step) for step in range(1, len(expected) + 1)]
    assert [line[4:].replace(" ", "") for line in lines] == expected
    assert len(result.stdout.splitlines()) == (1 if as_json else len(expected) + 1)


def test_what_is_wrong_is_said_in_one_line_and_the_chat_goes_on(shipped, example, picture, tmp_path):
    bad = ["/no", "/image", "/images x", "/image /no/\x1b[2J.png", f"/image {tmp_path}", "/clear x", "/no\x1b[2J\x07"]
    long = "lesion " * 4_000
    result = chat(picture, lines=[*bad, long, CLOSED, long])
    assert result.exit_code == 0 and result.stdout.splitlines() == [ask(shipped, example.image, CLOSED).text]
    said = result.stderr.splitlines()[3:]
    assert len(said) == len(bad) + 2 and not re.search(r"[\x00-\x09\x0b-\x1f]", result.output)
    for line, command in zip(said, bad):
        named = command.partition(" ")[2].replace("\x1b", "\\x1b")
        assert "is no command" in line or f"'{named}' is a path that cannot be opened" in line, command
    assert "the model's context allows" in said[-2] and "/clear" not in said[-2]
    assert "the model's context allows" in said[-1] and said[-1].endswith("(/clear forgets the conversation.)")
    assert "/image FILE" in chat(picture, lines=["/help"]).stderr


def test_a_hostile_model_in_a_pipe(picture, shipped, monkeypatch):
    decode = type(shipped[1]).decode
    hostile = lambda *words, **options: decode(*words, **options).replace("lesion", HOSTILE)  # noqa: E731
    monkeypatch.setattr(type(shipped[1]), "decode", hostile)
    result = chat(picture, "--show-steps", lines=[DESCRIBE])
    assert all(SHOWN in line for line in result.stdout.splitlines()[-2:])
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", result.output)


class Screen:
    """What a terminal shows of the little that it is told here; anything else is an error."""

    def __init__(self):
        self.rows, self.row, self.column, self.styles = [""], 0, 0, set()
        self.frames = []  # the screen before each time that it is redrawn

    def feed(self, text):
        for match in re.finditer(r"\x1b\[([?\d;]*)([A-Za-z])|([^\x1b])", text):
            arguments, command, letter = match.groups()
            if letter == "\r":
                self.column = 0
            elif letter == "\n":
                self.row += 1
                self.rows += [""] * (self.row + 1 - len(self.rows))
            elif letter is not None:
                assert letter.isprintable(), repr(letter)
                line = self.rows[self.row].ljust(self.column)
                self.rows[self.row] = line[: self.column] + letter + line[self.column + 1 :]
                self.column += 1
            elif command == "A":
                self.row -= int(arguments or 1)
                assert self.row >= 0
            elif (arguments, command) == ("2", "K"):
                if text[: match.start()].endswith("\r"):
                    self.frames.append(self.text)
                self.rows[self.row] = ""
            elif command == "m":
                self.styles |= set(arguments.split(";"))
            else:
                assert (arguments, command) in {(mode, on) for mode in ("?25", "?2004") for on in "hl"}, match[0]

    @property
    def text(self):
        return "\n".join(self.rows)


class Terminal:
    """A process on a pseudo-terminal of 60 columns."""

    def __init__(self, *words):
        termios, fcntl = pytest.importorskip("termios"), pytest.importorskip("fcntl")
        self._master, terminal = os.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, b"\x18\x00\x3c\x00\x00\x00\x00\x00")
        environment = os.environ | {"TERM": "xterm", "NO_COLOR": "1", "PYTHONUTF8": "1"}

        def lead():  # so that Ctrl-C reaches the process
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            words, stdin=terminal, stdout=terminal, stderr=terminal, env=environment, preexec_fn=lead
        )
        os.close(terminal)
        self.output = ""

    def type(self, text):
        os.write(self._master, text.encode())

    def read_until(self, pattern):
        """All output up to the first match, which is behind what was returned before."""
        deadline, pending = time.monotonic() + 120, b""
        while not (match := re.search(pattern, self.output)):
            assert time.monotonic() < deadline, self.output
            if select.select([self._master], [], [], 1)[0]:
                pending += os.read(self._master, 65536)
                with contextlib.suppress(UnicodeDecodeError):  # in the middle of a character
                    self.output += pending.decode()
                    pending = b""
        found, self.output = self.output[: match.end()], self.output[match.end() :]
        return found

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._master)


# The model says hostile things, and the third pass of its second answer takes for ever.
SCRIPT = """
import os, sys, time
from lladamedv.cli import app
from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration as Model
from lladamedv.processing import LLaDAMedVProcessor as Processor

decode, step, passes = Processor.decode, Model.denoising_step, 0

def denoise(model, state):
    global passes
    passes += 1
    if passes == {passes} + 3:
        os.write(2, b"asleep")
        time.sleep(600)
    step(model, state)

Processor.decode = lambda *words, **options: decode(*words, **options).replace("lesion", {hostile!r})
Model.denoising_step = denoise
app(["chat", {picture!r}])
"""


def test_in_a_terminal(shipped, example, picture):
    given = ask(shipped, example.image, DESCRIBE)
    expected = [canvas.replace("lesion", SHOWN) for canvas in canvases(shipped, example)]
    script = SCRIPT.format(passes=given.num_forwards, hostile=HOSTILE, picture=str(picture))
    terminal = Terminal(sys.executable, "-c", script)
    try:
        start = terminal.read_until(r"(?<=\n)(\x1b\[\?2004h)?> ")
        assert start.count("Research only") == 1
        terminal.type(DESCRIBE + "\n")
        screen = Screen()
        screen.feed("> " + terminal.read_until(r"forward pass[^>]*> "))

        # Every redrawn frame is the canvas after one step, and nothing is left of it.
        frames = [frame.replace("\n", "").replace(" ", "") for frame in screen.frames]
        asked = f">{DESCRIBE}".replace(" ", "")
        frames = [frame.removeprefix(asked) for frame in frames if frame.startswith(asked)]
        seen = [frame for frame, following in zip(frames, [*frames[1:], ""]) if frame != following]
        assert seen == [MASK * 24, *expected]
        sure = f"confidence {given.confidence:.1%}, 21 tokens, {given.num_forwards} forward passes"
        answer = given.text.replace("lesion", SHOWN)
        shown = re.sub(r"\s+", " ", screen.text).strip()
        assert shown.replace(" ", "") == f"> {DESCRIBE}{answer}{sure}>".replace(" ", "")
        assert screen.styles <= {"", "0", "1", "2", "4", "7", "1;4"}, "and no colour"

        # Ctrl-C ends an answer, which is then no part of the conversation.
        terminal.type(CLOSED + "\n")
        assert MASK in terminal.read_until("asleep")
        terminal.type("\x03")
        assert "stopped" in terminal.read_until(r"conversation\s[^>]*> ")
        terminal.type(CLOSED + "\n")
        screen = Screen()
        screen.feed(terminal.read_until(r"forward pass[^>]*> "))
        told = ask(shipped, example.image, DESCRIBE, given.text.replace("lesion", HOSTILE), CLOSED)
        assert screen.text.splitlines()[1] == told.text.replace("lesion", SHOWN)
        assert MASK not in screen.text

        terminal.type("\x03")
        assert terminal.process.wait(60) == 130
    finally:
        terminal.close()
