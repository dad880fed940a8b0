"""The browser app over real HTTP: answers, the denoising on the way, several turns, files, and what must not happen."""

import base64
import io
import logging
import os
import re
import signal
import socket
import struct
import sys
import time
import zlib
from contextlib import ExitStack
from threading import Event, Semaphore, Thread

import nibabel
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from lladamedv import cli, cli_common, loading
from lladamedv.app import build_app
from lladamedv.conversation import LEVELS
from lladamedv.demo import answer
from lladamedv.processing.phantoms import PhantomVQA
from tests.dicom_files import SECRET, dataset, item, sequence, to_bytes
from tests.html_pages import Page, contrast


SLIDERS = (24, 8, 24, 0)  # the demo model's own options
ATTACK = "<img src=x onerror=alert(1)></span><script>alert(2)</script> ${alert(3)} {{value}} `\"'&amp;"
LIMIT = 100_000  # bytes of an upload


@pytest.fixture(scope="module")
def example():
    return next(iter(PhantomVQA(5, 1, ("description",))))


@pytest.fixture(scope="module")
def picture(example, tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "phantom.png"
    example.image.save(path)
    return path


@pytest.fixture(scope="module")
def served(shipped, tmp_path_factory):
    """URL of the running app, and the folder of its temporary files."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("gradio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        app = build_app(*shipped, max_file_size=LIMIT)
        _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
        yield url, folder
        app.close()


class Browser:
    """A session with the app, as a browser tab has one."""

    def __init__(self, url):
        from gradio_client import Client

        self.client = Client(url, verbose=False)

    def submit(self, question, *files, sliders=SLIDERS):
        from gradio_client import handle_file

        message = {"text": question, "files": [handle_file(str(file)) for file in files]}
        return self.client.submit(message, *sliders, api_name="/ask")

    def ask(self, *arguments, **options):
        """All that came of a question: (box, picture, conversation, message), as one HTML string or `None` each."""
        job = self.submit(*arguments, **options)
        job.result(timeout=60)
        return [(box, *map(self._html, parts[:3])) for box, *parts in job.outputs()]

    @staticmethod
    def _html(part):
        return part if isinstance(part, str) else None  # an update of nothing

    def choose(
        self, place=0, volume=0, axis="axial", window="default", background="default", burned_in=False
    ):  # fmt: skip
        """The same without the box, of choosing another picture from the file."""
        parts = self.client.predict(place, volume, axis, window, background, burned_in, api_name="/choose")
        return tuple(map(self._html, parts[:3]))

    def choices(self, *arguments, **options):
        """What can be chosen after a question, each as its update or `None`: (place, volume, axis, window, background,
        burned_in)."""
        job = self.submit(*arguments, **options)
        job.result(timeout=60)
        return [choice if choice["visible"] else None for choice in job.outputs()[0][4:]]


@pytest.fixture
def browser(served):
    return Browser(served[0])


def answers(conversation):
    return [text.strip() for text in Page(conversation).texts(None, "ldm-text")]


def question_about(image, *texts):
    """A chat of alternating questions and answers."""
    chat = []
    for index, text in enumerate(texts):
        content = [{"type": "text", "text": text}]
        if index == 0:
            content.insert(0, {"type": "image", "image": image})
        chat.append({"role": "assistant" if index % 2 else "user", "content": content})
    return chat


def test_an_answer_appears_while_it_is_denoised(browser, shipped, example, picture):
    seen = browser.ask(example.question, picture)
    expected = answer(*shipped, [example.messages()])[0]
    assert len(expected.split()) > 10
    assert answers(seen[-1][2]) == [expected]
    drafts = [part[2] for part in seen if part[2] and 'aria-busy="true"' in part[2]]
    masks = [len(Page(draft).texts(None, "ldm-mask")) for draft in drafts]
    assert masks[0] == 24 and masks == sorted(masks, reverse=True) and len(set(masks)) > 10
    assert "ldm-mask" not in seen[-1][2] and seen[-1][0] == {"text": "", "files": []} and seen[-1][3] == ""

    assert re.search(r'<img src="data:image/png;base64,[^"]+" alt="[^"]*64 by 64 pixels"', seen[0][1])
    assert "read as it is" in seen[0][1]
    titles = [attributes["title"] for attributes in Page(seen[-1][2]).attributes("ldm-token")]
    table = re.findall(r"<td>([\d.]+%)</td>", seen[-1][2])
    assert len(titles) > 10 and titles == [f"confidence {value}" for value in table]


def test_shown_confidence_is_that_of_the_model(browser, shipped, example, picture):
    """Of finished answers, and while they are denoised."""
    model, processor = shipped
    inputs = processor.apply_chat_template(
        example.messages(), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, return_dict_in_generate=True)
    length = output.sequences.shape[1] - inputs["input_ids"].shape[1]
    seen = [part[2] for part in browser.ask(example.question, picture) if part[2]]
    sure = output.commit_confidence[0, :length].tolist()
    assert re.findall(r"<td>([\d.]+%)</td>", seen[-1]) == [f"{each:.1%}" for each in sure]
    step = output.commit_step[0, :length].tolist()
    drafts = [draft for draft in seen if 'aria-busy="true"' in draft]
    assert len(drafts) == int(output.num_forwards[0]) + 1
    for passes, draft in enumerate(drafts):
        shown = [(token["title"], token["class"]) for token in Page(draft).attributes("ldm-token")]
        expected = [each for each, committed in zip(sure, step) if committed < passes]
        levels = [sum(each < least for least in (0.9, 0.7, 0.5)) for each in expected]
        assert shown == [
            (f"confidence {each:.1%}", f"ldm-token ldm-level-{level}") for each, level in zip(expected, levels)
        ]


def test_follow_up_questions_are_about_the_same_image(browser, shipped, example, picture):
    first = "Is there a lesion?"
    one = answers(browser.ask(first, picture)[-1][2])
    both = answers(browser.ask(example.question)[-1][2])
    assert both == [*one, answer(*shipped, [question_about(example.image, first, one[0], example.question)])[0]]
    assert both[1] != answer(*shipped, [example.messages()])[0], "the first turn must matter in this test"

    again = browser.ask(first, picture)[-1][2]
    assert answers(again) == one, "another image begins another conversation"
    browser.client.predict(api_name="/clear")
    assert "There is no image yet" in browser.ask(first)[-1][3]


def test_sessions_do_not_see_each_other(browser, served, picture):
    browser.ask("Is there a lesion?", picture)
    assert "There is no image yet" in Browser(served[0]).ask("Is there a lesion?")[-1][3]


def test_dicom(browser, shipped, example, tmp_path):
    grey = np.asarray(example.image.convert("L")).astype(np.uint16)
    file = tmp_path / f"{SECRET}.dcm"
    file.write_bytes(to_bytes(dataset(grey * 16, bits=12, WindowCenter=2040.5, WindowWidth=4081)))
    seen = browser.ask("What shape is the lesion?", file)
    assert "window" in seen[0][1] and "2040.5" in seen[0][1]
    low, high = 2040.5 - 0.5 - 4080 / 2, 2040.5 - 0.5 + 4080 / 2  # DICOM PS3.3, C.11.2.1.2.1
    levels = np.clip((grey * 16.0 - low) / (high - low), 0, 1) * 255
    assert np.abs(levels - grey).max() <= 1, "the window shows the grey values that the phantom had"
    expected = answer(
        *shipped, [question_about(example.image.convert("L").convert("RGB"), "What shape is the lesion?")]
    )
    assert answers(seen[-1][2]) == expected
    assert SECRET not in str(seen)


def shown_pixels(html):
    """Grey values of the picture in the page."""
    data = re.search(r'<img src="data:image/png;base64,([^"]+)"', html)[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L")).astype(int)


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """A DICOM file of 12 bits with two frames, and what they show."""
    grey = np.stack([np.asarray(example.image.convert("L")) for example in PhantomVQA(5, 2)]).astype(np.uint16)
    path = tmp_path_factory.mktemp("dicom") / "frames.dcm"
    path.write_bytes(
        to_bytes(dataset(grey * 16, bits=12, WindowCenter=2040.5, WindowWidth=4081, RescaleSlope=1, RescaleIntercept=0))
    )
    return path, grey.astype(int)


def test_another_frame_begins_another_conversation(browser, shipped, frames):
    path, grey = frames
    question = "What shape is the lesion?"
    last = browser.ask(question, path)[-1]
    seen, conversation, message = browser.choose(place=0)
    assert np.abs(shown_pixels(seen) - grey[0]).max() <= 1 and np.abs(shown_pixels(seen) - grey[1]).max() > 50
    assert "<li>frame 0 of 2 (from 0)</li>" in seen and message == ""
    assert answers(conversation) == [] and "the conversation begins anew" in conversation

    shown = Image.fromarray(shown_pixels(seen).astype(np.uint8)).convert("RGB")
    expected = answer(*shipped, [question_about(shown, question)])
    assert answers(browser.ask(question)[-1][2]) == expected != answers(last[2])
    assert browser.choose(place=0) == (None, None, None), "what is chosen already changes nothing"
    assert len(answers(browser.ask(question)[-1][2])) == 2


def test_window(browser, frames):
    path, grey = frames
    browser.ask("", path)
    seen, _, message = browser.choose(place=1, window=" 1000/500 ")
    expected = np.clip((grey[1] * 16 - (1000 - 0.5 - 499 / 2)) / 499, 0, 1) * 255  # DICOM PS3.3, C.11.2.1.2.1
    assert np.abs(shown_pixels(seen) - expected).max() <= 1 and "window 1000/500 (level/width)" in seen
    assert "preset lung" in browser.choose(place=1, window="lung")[0]
    assert "window 2040.5/4081 (level/width) from the file" in browser.choose(place=1)[0]
    browser.ask("Is there a lesion?")
    for wrong, message in (
        ("bones", "Window is 'bones'; allowed are lung, mediastinum"),
        ("1/2/3", "Window is '1/2/3'"),
        ("40/-1", "with a width above 0"),
        ("40/nan", "with a width above 0"),
    ):
        picture, conversation, shown = browser.choose(place=1, window=wrong)
        assert message in Page(shown).texts(None, "ldm-alert")[0] and (picture, conversation) == (None, None)
    assert len(answers(browser.ask("Is there a lesion?")[-1][2])) == 2, "nothing is lost"


def test_full_range_and_background(browser, frames, tmp_path):
    path, grey = frames
    browser.ask("", path)
    seen, _, _ = browser.choose(place=1, window="full range")
    assert np.abs(shown_pixels(seen) - grey[1] * 16 * 255 / 4095).max() <= 1
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "red.png")
    browser.ask("", tmp_path / "red.png")
    assert (shown_pixels(browser.choose(background="white")[0]) == 255).all()
    assert (shown_pixels(browser.choose(background="#000000")[0]) == 0).all()
    shown = browser.choose(background="no colour")[2]
    assert "Background is 'no colour'; allowed are names of colours" in Page(shown).texts(None, "ldm-alert")[0]


def test_text_burned_in_is_shown_on_request(browser, example, tmp_path):
    grey = np.asarray(example.image.convert("L")).astype(np.uint16)
    path = tmp_path / "burned.dcm"
    path.write_bytes(to_bytes(dataset(grey, bits=8, BurnedInAnnotation="YES", WindowCenter=128, WindowWidth=256)))
    *_, burned_in = browser.choices("", path)
    assert burned_in["visible"] and burned_in["value"] is False
    last = browser.ask("Is there a lesion?", path)[-1]
    assert (
        "may tell who the patient is" in Page(last[3]).texts(None, "ldm-alert")[0] and "tick Burned-in text" in last[3]
    )
    seen, _, message = browser.choose(burned_in=True)
    assert np.abs(shown_pixels(seen) - grey.astype(int)).max() <= 1 and message == ""
    assert len(answers(browser.ask("Is there a lesion?")[-1][2])) == 1
    message = browser.choose(burned_in=False)[2]
    assert "may tell who the patient is" in message


def test_volumes(browser, tmp_path):
    volume = np.random.default_rng(0).uniform(0, 100, (6, 7, 8, 3)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "volume.nii.gz")
    place, times, axis, window, *others = browser.choices("", tmp_path / "volume.nii.gz")
    assert others == [None] * 2 and "full range" not in str(window["choices"])
    assert (place["label"], place["maximum"], place["value"]) == ("Axial slice (from 0)", 7, 4)
    assert (times["label"], times["maximum"], times["value"]) == ("Volume (from 0)", 2, 0)
    assert (axis["value"], window["value"]) == ("axial", "default")

    def levels(plane):
        """As radiologists see it: up is anterior or superior, the patient's right or front is on the left."""
        return np.clip((plane[::-1, ::-1].T - 30) / 40, 0, 1) * 255

    options = {"window": "50/40"}
    seen = browser.choose(place=2, volume=1, **options)[0]
    assert np.abs(shown_pixels(seen) - levels(volume[:, :, 2, 1])).max() <= 1
    chosen = (2, 1, "sagittal", "50/40", "default", False)
    seen, _, _, place, *_ = browser.client.predict(*chosen, api_name="/choose")
    assert np.abs(shown_pixels(seen) - levels(volume[3, :, :, 1])).max() <= 1, "the middle one of the new axis"
    assert (place["label"], place["maximum"], place["value"]) == ("Sagittal slice (from 0)", 5, 3)
    seen = browser.choose(place=5, volume=1, axis="sagittal", **options)[0]
    assert np.abs(shown_pixels(seen) - levels(volume[5, :, :, 1])).max() <= 1


def test_a_volume_of_one_slice_can_be_cut_otherwise(browser, tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.ones((6, 1, 8), np.float32), np.eye(4)), tmp_path / "volume.nii")
    browser.ask("", tmp_path / "volume.nii")
    assert "6 by 8 pixels" in browser.choose(place=4, axis="coronal")[0]
    assert "6 by 1 pixels" in browser.choose(axis="axial")[0]


def test_pages(browser, tmp_path):
    pages = [Image.new("RGB", (8, 8), (level,) * 3) for level in (10, 100)]
    deep = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=[pages[1], deep])
    place, *others = browser.choices("", tmp_path / "pages.tif")
    assert (place["label"], place["maximum"], place["value"], others) == ("Page (from 0)", 2, 0, [None] * 5)
    assert (shown_pixels(browser.choose(place=1)[0]) == 100).all()
    assert "percentiles" in browser.choose(place=2)[0]
    assert "window 32000/64000" in browser.choose(place=2, window="32000/64000")[0]
    shown = browser.choose(place=0, window="32000/64000")[2]
    assert "of mode 'RGB'; allowed are windows" in Page(shown).texts(None, "ldm-alert")[0]


@pytest.mark.parametrize(
    ("name", "offered"),
    [
        ("colour.png", []),
        ("grey.png", []),
        ("deep.png", ["window"]),
        ("one.dcm", ["window"]),
        ("table.dcm", ["window"]),
        ("black.dcm", ["window"]),
        ("colour.dcm", []),
        ("frames.dcm", ["place", "window"]),
        ("animation.gif", ["place"]),
        ("transparent.png", ["background"]),
        ("volume.nii", ["place", "axis", "window"]),
    ],
)
def test_only_what_can_be_chosen_is_offered(browser, tmp_path, name, offered):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    colour = Image.fromarray(np.stack([grey, grey.T, grey[::-1]], axis=-1))
    deep = grey.astype(np.uint16) * 500
    voi = item(LUTDescriptor=[2, 0, 16])
    voi.add_new("LUTData", "OW", np.array([0, 65535], "<u2").tobytes())
    path = tmp_path / name
    if path.suffix == ".dcm":
        made = {
            "one": dataset(deep), "black": dataset(deep * 0), "frames": dataset(np.stack([deep] * 3)),
            "table": dataset(deep, VOILUTSequence=sequence(voi)),
            "colour": dataset(np.asarray(colour), photometric="RGB"),
        }  # fmt: skip
        path.write_bytes(to_bytes(made[path.stem]))
    elif path.suffix == ".nii":
        nibabel.save(nibabel.Nifti1Image(np.stack([deep] * 4, axis=-1).astype(np.int16), np.eye(4)), path)
    elif path.suffix == ".gif":
        colour.save(path, save_all=True, append_images=[colour.rotate(90)])
    else:
        made = {"colour": colour, "grey": Image.fromarray(grey), "deep": Image.fromarray(deep)}
        made["transparent"] = colour.convert("RGBA")
        made["transparent"].putalpha(Image.fromarray(grey))
        made[path.stem].save(path)
    choices = browser.choices("", path)
    names = ("place", "volume", "axis", "window", "background", "burned_in")
    assert [what for what, choice in zip(names, choices) if choice] == offered


def test_an_answer_about_another_frame_ends(browser, shipped, frames, monkeypatch):
    browser.ask("", frames[0])
    gate = Gate(monkeypatch, shipped[0])
    job = browser.submit("Describe the image.")
    gate.let(1)
    next(job), next(job)
    assert "the conversation begins anew" in browser.choose(place=0)[1]
    gate.let(1)
    job.result(timeout=60)
    assert all('aria-busy="true"' in conversation for _, _, conversation, *_ in job.outputs()), "no answer came of it"
    gate.let(1_000)
    conversation = browser.ask("Is there a lesion?")[-1][2]
    assert len(answers(conversation)) == 1
    assert gate.passes == 3 + int(re.search(r"(\d+) forward passes", conversation)[1]), "one more may have begun"


def test_an_image_alone_is_shown(browser, picture):
    seen = browser.ask("", picture)
    assert len(seen) == 1 and "<img" in seen[0][1] and seen[0][3] == ""
    assert answers(browser.ask("Is there a lesion?")[-1][2])


def test_html_is_escaped(browser, shipped, example, picture, monkeypatch):
    """What a person, the model and an error say."""
    decode = type(shipped[1]).decode
    attack = lambda *words, **options: decode(*words, **options).replace("Yes", ATTACK)  # noqa: E731
    monkeypatch.setattr(type(shipped[1]), "decode", attack)
    for shown in [part[2] for part in browser.ask(f"{example.question}{ATTACK}", picture) if part[2]]:
        page = Page(shown)
        assert page.texts(None, "ldm-question") in ([], [f"You: {example.question}{ATTACK}"])
        known = {"section", "article", "p", "b", "span", "div", "details", "summary", "table"}
        assert page.tags <= known | {"thead", "tbody", "tr", "th", "td"}
        assert not re.search(r"[${}`]", shown), "Gradio's HTML is a template for JavaScript and for Handlebars"
    assert ATTACK in Page(shown).texts(None, "ldm-text")[0]
    alert = browser.choose(window=ATTACK)[2] or browser.ask("x" * 4_001)[-1][3]
    assert Page(alert).tags == {"p"}


def black_png(width, height):
    """A file of almost no bytes, whatever its size in pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    lines = zlib.compress(bytes((1 + -(-width // 8)) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def in_use(served, picture):
    """A session in which a question has been answered."""
    browser = Browser(served[0])
    assert answers(browser.ask("Is there a lesion?", picture)[-1][2]) == ["Yes"]
    return browser


@pytest.mark.parametrize(
    ("question", "content", "sliders", "message"),
    [
        ("What?", b"a text, named .png", SLIDERS, "The file is of no known format; allowed are DICOM"),
        ("What?", b"", SLIDERS, "The file is of no known format"),
        ("What?", b"\x89PNG\r\n\x1a\n broken", SLIDERS, "The file is "),
        ("What?", "cut", SLIDERS, "The file is a picture file that cannot be read"),
        ("What?", "bomb", SLIDERS, "The file has more pixels than Pillow allows; allowed are 1 to 33554432"),
        ("What?", "large", SLIDERS, "The file is 8000 by 8000 pixels; allowed are 1 to 33554432"),
        ("What?", None, (24, 7, 24, 0), "`block_length` is 7, which does not divide `max_new_tokens` (24)"),
        ("What?", None, (24, 8, 25, 0), "`steps` is 25, which is no multiple of the number of blocks"),
        ("  ", None, SLIDERS, "The question has 0 characters"),
        ("x" * 4_001, None, SLIDERS, "The question has 4001 characters; allowed are 1 to 4000"),
    ],
)
def test_what_is_not_allowed_gets_a_message(in_use, picture, tmp_path, question, content, sliders, message):
    made = {"cut": picture.read_bytes()[:2000], "bomb": black_png(20_000, 20_000), "large": black_png(8_000, 8_000)}
    (tmp_path / "file.png").write_bytes(made.get(content, content) or b"")
    files = [] if content is None else [tmp_path / "file.png"]
    box, _, conversation, shown = in_use.ask(question, *files, sliders=sliders)[-1]
    texts = Page(shown).texts(None, "ldm-alert")
    assert len(texts) == 1 and message in texts[0] and "Traceback" not in texts[0]
    assert answers(conversation) == ["Yes"] and box["text"] == question.strip(), "nothing is lost"


def test_a_message_goes_away(browser, picture):
    assert browser.ask("", picture)[-1][3] == "" != browser.ask("")[-1][3]
    assert browser.ask("Is there a lesion?")[-1][3] == ""


def test_a_picture_of_one_line_is_a_picture(browser, tmp_path):
    (tmp_path / "line.png").write_bytes(black_png(30_000, 1))
    seen = browser.ask("Is there a lesion?", tmp_path / "line.png")
    assert "30000 by 1 pixels" in seen[0][1] and seen[-1][3] == "" and "forward pass" in seen[-1][2]


def test_one_file_at_a_time(browser, picture, tmp_path):
    second = tmp_path / "second.png"
    second.write_bytes(picture.read_bytes())
    assert "2 files came with the question; allowed is one" in browser.ask("What?", picture, second)[-1][3]


def test_large_uploads_and_canvases_are_refused(browser, tmp_path):
    (tmp_path / "large.bin").write_bytes(bytes(LIMIT + 1))
    with pytest.raises(Exception, match=r"413|size"):
        browser.ask("What?", tmp_path / "large.bin")
    with pytest.raises(Exception, match="greater than maximum value 96"):
        browser.ask("What?", sliders=(97, 1, 97, 0))


def test_block_length_and_steps_follow_the_canvas(browser, picture):
    block_length, steps = browser.client.predict(40, api_name="/fit")
    assert (block_length, steps) == (8, 40)
    assert browser.ask("Is there a lesion?", picture, sliders=(40, block_length, steps, 0.5))[-1][3] == ""


def test_nothing_is_kept_or_logged(browser, served, shipped, picture, tmp_path, monkeypatch, caplog, capfd):
    def fail(*arguments, **options):
        raise RuntimeError(f"{SECRET} went wrong")

    named = tmp_path / f"{SECRET}.png"
    named.write_bytes(picture.read_bytes())
    broken = tmp_path / f"{SECRET}.dcm"
    broken.write_bytes(b"\0" * 128 + b"DICM" + SECRET.encode())
    with caplog.at_level(logging.DEBUG):
        assert browser.ask(f"{SECRET} lesion?", named)[-1][3] == ""
        assert browser.ask(f"{SECRET} lesion?", broken)[-1][3]
        monkeypatch.setattr(type(shipped[0]), "_denoising_step", fail)
        shown = browser.ask(f"{SECRET} lesion?", named)[-1][3]
    assert "could not be answered (RuntimeError)" in shown and SECRET not in shown
    assert "a question could not be answered: RuntimeError" in caplog.text
    own = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore", "asyncio"))]
    assert SECRET not in "".join(record.getMessage() for record in own)
    assert SECRET not in "".join(capfd.readouterr())
    assert not [path for path in served[1].rglob("*") if path.is_file()]


def config_of(served):
    import httpx

    return httpx.get(f"{served[0]}config").json()


def test_what_the_page_says_of_itself(served):
    """The configuration that the browser gets: the notice, names for all that can be used, and no tracking."""
    config = config_of(served)
    assert config["analytics_enabled"] is False and config["run_history"] is False and not config["footer_links"]
    texts = [component["props"].get("value") or "" for component in config["components"]]
    notice = next(text for text in texts if isinstance(text, str) and 'role="note"' in text)
    assert "Research only. Not a medical device" in notice and "it knows only the synthetic pictures" in notice
    usable = [
        component["props"] for component in config["components"] if component["type"] in ("multimodaltextbox", "slider")
    ]
    assert all(props["label"] for props in usable) and [props["visible"] for props in usable].count(True) == 5
    buttons = [component["props"]["value"] for component in config["components"] if component["type"] == "button"]
    assert buttons == ["Stop", "New conversation"]
    names = {dependency["api_name"] for dependency in config["dependencies"]}
    assert {"ask", "clear", "fit"} <= names and not any("flag" in str(name) for name in names)


def test_contrast_and_more_than_colour(served):
    style = config_of(served)["components"][1]["props"]["value"].partition("</style>")[0]
    assert style.startswith("<style>")
    backgrounds = re.findall(r"background: (#[0-9a-f]{6})", style)
    assert {level.color for level in LEVELS} < set(backgrounds)
    for color in backgrounds:
        if color != "#767676":  # of masks, which hold no text
            assert contrast(color, "#111111") >= 7
    looks = re.findall(r"ldm-level-\d { background: #\w{6}; (.*?)}", style)
    assert len(looks) == len(set(looks)) == 4


class Gate:
    """Holds every forward pass until it is let through, and counts."""

    def __init__(self, monkeypatch, model):
        self.passes, self._allowed, self._step = 0, Semaphore(0), type(model)._denoising_step
        monkeypatch.setattr(type(model), "_denoising_step", lambda model, state: self._run(model, state))

    def _run(self, model, state):
        assert self._allowed.acquire(timeout=60)
        self.passes += 1
        self._step(model, state)

    def let(self, count):
        self._allowed.release(count)


def test_an_abandoned_answer_stops(browser, shipped, example, picture, monkeypatch):
    browser.ask("", picture)
    gate = Gate(monkeypatch, shipped[0])
    job = browser.submit(example.question)
    gate.let(1)
    next(job), next(job)
    cancelling = Thread(target=job.cancel)  # answered when the pass that runs is over
    cancelling.start()
    time.sleep(0.5)
    gate.let(1)
    cancelling.join()
    gate.let(1_000)
    conversation = browser.ask("Is there a lesion?")[-1][2]
    assert gate.passes <= 4 + int(re.search(r"(\d+) forward passes", conversation)[1]), "more may have begun"


def test_the_queue_is_bounded_and_the_model_runs_once_at_a_time(shipped, example, picture, monkeypatch, tmp_path):
    pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    app = build_app(*shipped, queue_size=1, max_file_size=LIMIT)
    options = {"server_name": "127.0.0.1", "max_file_size": None}  # not Gradio's limit, but the app's own
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, **options)
    try:
        (tmp_path / "large.bin").write_bytes(bytes(2 * LIMIT))
        assert "The file has 0.2 MB; allowed are 0.1 MB" in Browser(url).ask("What?", tmp_path / "large.bin")[-1][3]
        tabs = [Browser(url) for _ in range(3)]
        for tab in tabs:
            assert tab.ask("", picture)[-1][3] == ""
        gate = Gate(monkeypatch, shipped[0])
        running = tabs[0].submit(example.question)
        next(running)
        waiting = tabs[1].submit(example.question)
        deadline = time.monotonic() + 30
        while not waiting.status().queue_size and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(Exception, match="full"):
            tabs[2].ask(example.question)
        assert gate.passes == 0
        gate.let(1_000)
        expected = answer(*shipped, [example.messages()])
        assert [answers(job.result()[2]) for job in (running, waiting)] == [expected, expected]
    finally:
        app.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"longest_canvas": 23}, "`longest_canvas` is 23; allowed are whole numbers of at least 24"),
        ({"max_file_size": "1mb"}, "`max_file_size` is '1mb'"),
        ({"queue_size": 0}, "`queue_size` is 0; allowed are whole numbers of at least 1"),
    ],
)
def test_arguments(shipped, options, message):
    pytest.importorskip("gradio")
    with pytest.raises(ValueError, match=message):
        build_app(*shipped, **options)


def command(*arguments, **environment):
    return CliRunner().invoke(cli.app, ["app", *arguments], env=environment)


@pytest.fixture
def unloaded(monkeypatch):
    """What is wrong must be told before a model, which may be large, is loaded."""

    def load(*arguments):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "load_model", load)


@pytest.mark.usefixtures("unloaded")
def test_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:  # the usual port may be another test's
        port = taken.getsockname()[1]
    result = command("--port", str(port))
    assert result.exit_code == 1
    assert result.stderr == 'lladamedv: The app needs Gradio: pip install "lladamedv[app]".\n'


@pytest.mark.parametrize(
    ("arguments", "launched", "warnings"),
    [
        ((), {"server_name": "127.0.0.1", "server_port": 7860, "share": False}, []),
        (("--host", "localhost", "--port", "81"), {"server_name": "localhost", "server_port": 81, "share": False}, []),
        (("--host", "0.0.0.0"), {"server_name": "0.0.0.0", "share": False}, ["anyone who can reach 0.0.0.0"]),
        (("--share",), {"server_name": "127.0.0.1", "share": True}, ["anyone with the link"]),
    ],
)
def test_command_line(monkeypatch, arguments, launched, warnings):
    gradio = pytest.importorskip("gradio")
    seen, tried = {}, []
    served = "http://127.0.0.1:7860/"
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **options: seen.update(options) or (None, served, None))
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda self: None)
    monkeypatch.setattr(cli_common.socket, "create_server", lambda address, **_: tried.append(address) or io.BytesIO())
    result = command(*arguments, GRADIO_SERVER_NAME="0.0.0.0", GRADIO_SHARE="True")
    assert result.exit_code == 130 and result.stdout == f"The app is at {served}\n"  # whereupon Ctrl-C ended it
    assert launched.items() <= seen.items() and seen["run_history"] is False and seen["max_file_size"] == 100_000_000
    assert tried == [(seen["server_name"], seen["server_port"])]
    assert len(result.stderr.splitlines()) == len(warnings)
    assert all(f"Warning: {warning}" in result.stderr for warning in warnings)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("::1", "--host is '::1'; allowed are names and IPv4 addresses"),
        ("203.0.113.1", "--port is 7860, which cannot be listened on at 203.0.113.1: "),
    ],
)
def test_addresses_are_tried_before_the_model(host, message):
    pytest.importorskip("gradio")
    result = command("--host", host)
    assert result.exit_code == 1 and message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.usefixtures("unloaded")
def test_a_taken_port(served):
    port = served[0].rstrip("/").rpartition(":")[2]
    result = command("--port", port)
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"lladamedv: --port is {port}, which cannot be listened on at 127.0.0.1: ")


def test_ctrl_c(tmp_path, monkeypatch):
    """A real signal, to this process, while the page is served."""
    gradio = pytest.importorskip("gradio")
    import httpx

    def press():
        assert serving.wait(60)
        pages.append(httpx.get(url))
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url, pages, serving = f"http://127.0.0.1:{port}", [], Event()
    block = gradio.Blocks.block_thread
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda self: (serving.set(), block(self)))
    thread = Thread(target=press)
    thread.start()
    result = command("--port", str(port))
    thread.join()
    assert pages[0].status_code == 200 and result.exit_code == 130
    assert url in result.stdout and "Traceback" not in result.output
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_uploads_are_deleted_at_the_end(tmp_path, monkeypatch):
    """By a real SIGTERM to this process; also those that no event has read, also those cut off."""
    gradio = pytest.importorskip("gradio")
    import httpx

    def files():
        return [path for path in tmp_path.rglob("*") if path.is_file()]

    def upload_and_end():
        try:
            assert serving.wait(60)
            address = f"http://127.0.0.1:{port}/gradio_api/upload"
            seen.append(httpx.post(address, files={"files": ("a.png", SECRET.encode())}).status_code)
            part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="b.png"\r\n\r\n' + SECRET.encode()
            cut = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            cut.sendall(
                b"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9999\r\n"
                b"Content-Type: multipart/form-data; boundary=b\r\n\r\n" + part + bytes(2_000)
            )
            deadline = time.monotonic() + 30
            while len(files()) < 2 and time.monotonic() < deadline:
                time.sleep(0.02)
            seen.append(len(files()))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    seen, serving = [], Event()
    block = gradio.Blocks.block_thread
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda self: (serving.set(), block(self)))
    with ExitStack() as stack:
        thread = Thread(target=upload_and_end)
        thread.start()
        result = command("--port", str(port))
        thread.join()
        assert seen == [200, 2] and result.exit_code == 128 + signal.SIGTERM
        assert not list(tmp_path.iterdir())
    assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path), "as it was"


def test_foreign_names_and_pages_are_kept_out(served):
    import httpx

    url = served[0].rstrip("/")
    own = url.partition("//")[2]
    for path in ("/", "/config", "/gradio_api/upload"):
        for headers in (
            {"Host": "evil.example"}, {"Host": f"127.0.0.1.evil.example:{own.rpartition(':')[2]}"},
            {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"},
        ):  # fmt: skip
            for method in ("GET", "POST"):
                reply = httpx.request(method, url + path, headers=headers)
                assert (reply.status_code == 403 and "allowed" in reply.text) or "may not" in reply.text
    assert httpx.get(f"{url}/config", headers={"Origin": url}).status_code == 200
    assert httpx.get(f"{url}/config", headers={"Host": own.replace("127.0.0.1", "localhost")}).status_code == 200
