"""The browser app over real HTTP: answers, the denoising on the way, several turns, files, and what must not happen."""

import base64
import copy
import io
import logging
import os
import re
import signal
import socket
import time
from contextlib import ExitStack
from threading import Event, Thread

import nibabel
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from lladamedv import cli, cli_common
from lladamedv.app import build_app
from lladamedv.conversation import LEVELS, find_evidence, reply_to
from lladamedv.demo import answer
from lladamedv.evidence import evidence_legend
from lladamedv.explanation import image_as_url
from lladamedv.modeling_lladamedv.continuous_batching_lladamedv import ContinuousBatch
from lladamedv.processing.medical_images import read_medical_image
from tests.dicom_files import SECRET, dataset, item, sequence, to_bytes
from tests.faces import Gate, black_png, conversation, free_port, generated, two_frames, until
from tests.html_pages import Page, contrast


gradio = pytest.importorskip("gradio")
httpx = pytest.importorskip("httpx")
SLIDERS = (24, 8, 24, 0)  # the demo model's own options
ATTACK = "<img src=x onerror=alert(1)></span><script>alert(2)</script> ${alert(3)} {{value}} `\"'&amp;"
LIMIT = 100_000  # bytes of an upload
AGAIN = object()  # in place of a question


@pytest.fixture(scope="module")
def blind(shipped):
    """Another model: the same one, which sees nothing."""
    model = copy.deepcopy(shipped[0])
    for parameter in model.model.multi_modal_projector.parameters():
        parameter.data.zero_()
    return model, shipped[1]


@pytest.fixture(scope="module")
def served(shipped, blind, tmp_path_factory):
    """URL of the running app, and the folder of its temporary files."""
    folder = tmp_path_factory.mktemp("gradio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        app = build_app(*shipped, others={"blind": blind}, max_file_size=LIMIT)
        _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
        yield url, folder
        app.close()


class Browser:
    """A session with the app, as a browser tab has one."""

    def __init__(self, url):
        from gradio_client import Client

        self.client = Client(url, verbose=False)

    def submit(self, question, *files, sliders=SLIDERS, follow=True, compare=None, api_name="/ask"):
        """`compare` is a model's name and the values of its sliders."""
        from gradio_client import handle_file

        other, *more = compare or ("demo", *SLIDERS)
        message = [{"text": question, "files": [handle_file(str(file)) for file in files]}]
        message = [] if question == AGAIN else message
        return self.client.submit(*message, *sliders, follow, compare is not None, other, *more, api_name=api_name)

    def ask_again(self, **options):
        """The conversation, once the last question has been answered again."""
        return self.submit(AGAIN, api_name="/again", **options).result(timeout=60)[2]

    def ask(self, *arguments, **options):
        """All that came of a question: (box, picture, conversation, message), as one HTML string or `None` each."""
        job = self.submit(*arguments, **options)
        job.result(timeout=60)
        return [(box, *map(self._html, parts[:3])) for box, *parts in job.outputs()]

    @staticmethod
    def _html(part):
        return part if isinstance(part, str) else None  # an update of nothing

    def choose(self, place=0, volume=0, axis="axial", window="default", background="default", burned_in=False):
        """The same without the box, of choosing another picture from the file."""
        parts = self.client.predict(place, volume, axis, window, background, burned_in, api_name="/choose")
        return tuple(map(self._html, parts[:3]))

    def choices(self, file):
        """What can be chosen from a file: the updates of the controls that are shown."""
        job = self.submit("", file)
        job.result(timeout=60)
        names = ("place", "volume", "axis", "window", "background", "burned_in")
        return {name: choice for name, choice in zip(names, job.outputs()[0][4:]) if choice["visible"]}


@pytest.fixture
def browser(served):
    return Browser(served[0])


def answers(conversation):
    return [text.strip() for text in Page(conversation).texts(None, "ldm-text")]


def alert(message):
    (text,) = Page(message).texts(None, "ldm-alert")
    return text


def test_an_answer_appears_while_it_is_denoised(browser, shipped, example, picture):
    """Confidence is that of the model, of finished answers and on the way."""
    seen = browser.ask(example.question, picture)
    truth = generated(shipped, example.image, example.question)
    assert answers(seen[-1][2]) == answer(*shipped, [example.messages()])
    drafts = [part[2] for part in seen if part[2] and 'aria-busy="true"' in part[2]]
    assert len(drafts) == 1 + len(truth.canvases) > 10
    for draft, canvas in zip(drafts[1:], truth.canvases):
        page = Page(draft)
        shown = [(token["title"], token["class"]) for token in page.attributes("ldm-token")]
        assert len(page.texts(None, "ldm-mask")) == sum(step is None for _, step, _ in canvas)
        assert shown == [
            (f"confidence {sure:.1%}", f"ldm-token ldm-level-{sum(sure < least for least in (0.9, 0.7, 0.5))}")
            for _, _, sure in canvas if sure is not None
        ]  # fmt: skip
    table = re.findall(r"<td>([\d.]+%)</td>", seen[-1][2])
    assert table == [f"{sure:.1%}" for text, _, sure in truth.tokens if text != "end"]
    assert "ldm-mask" not in seen[-1][2] and seen[-1][0] == {"text": "", "files": []} and seen[-1][3] == ""
    assert re.search(r'<img src="data:image/png;base64,[^"]+" alt="[^"]*64 by 64 pixels"', seen[0][1])
    assert "read as it is" in seen[0][1]
    words = [word for least, word in ((0.9, "Sure"), (0.7, "Fairly sure"), (0.5, "Unsure"), (0, "Guessing"))
             if truth.output.answer_confidence[0] >= least]  # fmt: skip
    assert f"<b>{words[0]}</b>: confidence {truth.output.answer_confidence[0]:.1%}" in seen[-1][2]


def test_unusual_pictures_are_told(browser, example, picture, photograph):
    for file, told in ((photograph, True), (picture, False)):
        last = Page(browser.ask(example.question, file)[-1][2]).texts("div", "ldm-answer")[-1]
        assert ("The model does not know pictures like this. The picture is unlike" in last) is told


def test_follow_up_questions_are_about_the_same_image(browser, shipped, example, picture):
    first = "Is there a lesion?"
    one = answers(browser.ask(first, picture)[-1][2])
    both = answers(browser.ask(example.question)[-1][2])
    assert both == [*one, answer(*shipped, [conversation(example.image, first, one[0], example.question)])[0]]
    assert both[1] != answer(*shipped, [example.messages()])[0], "the first turn must matter in this test"
    alone = browser.ask(example.question, follow=False)[-1][2]
    assert answers(alone)[2:] == answer(*shipped, [example.messages()]) and "after 1 earlier question." in alone
    assert answers(browser.ask(first, picture)[-1][2])[3:] == one, "about another image, without the turns before"
    browser.client.predict(api_name="/clear")
    assert "There is no image yet" in browser.ask(first)[-1][3]


def test_where_an_answer_comes_from(browser, shipped, example, picture):
    browser.ask(example.question, picture)
    reply = reply_to(*shipped, example.image, example.question)
    number = next(number for number, (text, _) in enumerate(reply.words) if text == " lesions")
    for chosen, word in (("0-answer", None), (f"0-{number}", number)):
        found = find_evidence(*shipped, example.image, example.question, reply, word=word)
        shown, message = browser.client.predict(chosen, api_name="/look")
        assert image_as_url(example.image, found) in shown and message == ""
        said = [text.strip() for text in Page(shown).texts("li")]
        legend = zip(("orange: ", "blue: ", ""), evidence_legend(*found))
        assert said[:3] == [f"{colour}{line}" for colour, (_, line) in legend]
    assert f'data-word="0-0-{number}"' in browser.ask("Is there a lesion?")[0][2]
    assert image_as_url(example.image) in browser.client.predict("nothing", api_name="/look")[0]


@pytest.mark.parametrize("other", ["demo", "blind"])
def test_answers_side_by_side(browser, shipped, blind, example, picture, other):
    conversation = browser.ask(example.question, picture, compare=(other, 24, 24, 6, 0))[-1][2]
    texts = Page(conversation).texts("div", "ldm-answer")
    asked = [example.messages()]
    second = blind if other == "blind" else shipped
    expected = answer(*shipped, asked), answer(*second, asked, steps=6, block_length=24)
    assert answers(conversation) == [text for (text,) in expected]
    for text, title, settings in zip(texts, ("A, demo: ", f"B, {other}: "), ("8, steps 24", "24, steps 6")):
        assert text.startswith(title) and f"Canvas length 24, block length {settings}." in text
    number = next(number for number, (text, _) in enumerate(reply_to(*shipped, example.image, example.question).words))
    shown = browser.client.predict(f"1-{number}", api_name="/look")[0]
    assert re.search("Where “.*” of B comes from", shown)
    assert "B: Steps: `steps` is 7" in alert(browser.ask(example.question, compare=(other, 24, 8, 7, 0))[-1][3])


def test_sides_go_on_from_their_own_answers(browser, shipped, blind, example, picture):
    browser.ask("Describe the image.", picture, compare=("blind", *SLIDERS))
    second = answers(browser.ask(example.question, compare=("blind", *SLIDERS))[-1][2])
    for model, first, given in zip((shipped, blind), second[:2], second[2:]):
        assert [given] == answer(*model, [conversation(example.image, "Describe the image.", first, example.question)])
    assert second[0] != second[1]


def test_asking_again(browser, shipped, files):
    """With other settings it is another answer to the question; about another frame another question."""
    question = "Describe the image."
    first = browser.ask(question, files / "frames.dcm")[-1][2]
    again = browser.ask_again(sliders=(24, 24, 3, 0))
    pictures = [read_medical_image(files / "frames.dcm", frame=frame).image for frame in (0, 1)]
    expected = answer(*shipped, [conversation(pictures[1], question)], steps=3, block_length=24)
    assert answers(again) == answers(first) + expected and len(Page(again).texts("article")) == 1
    browser.choose(place=0)
    again = browser.ask_again()
    assert answers(again)[2:] == answer(*shipped, [conversation(pictures[0], question)])
    assert len(Page(again).texts("article")) == 2


def test_saved_conversations(browser, example, picture, photograph):
    """Both hold the same pictures and texts, and nothing in them does anything."""
    markdown_it = pytest.importorskip("markdown_it")
    question = f"{ATTACK}\n# 1. [a](b) ~~c~~ | *d*\n\n- e\n1. f"
    browser.ask(question, photograph, compare=("blind", 24, 24, 6, 0))
    browser.ask(example.question, picture)
    saved = {kind: browser.client.predict(api_name=f"/save_{kind}") for kind in ("html", "md")}
    rendered = markdown_it.MarkdownIt("commonmark", {"html": True}).render(saved["md"])
    for page in (Page(saved["html"]), Page(re.sub("<img (.*?) />", r"<img \1>", rendered).replace("<br />", "<br>"))):
        assert not page.tags & {"script", "a", "ol"} and len(page.texts("h1")) == 1
        sources = [attributes["src"] for tag, attributes, _ in page.elements if tag == "img"]
        shown = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]
        assert np.array_equal(np.asarray(shown[1]), np.asarray(example.image)) and shown[0].size == (512, 600)
        text = " ".join(" ".join(page.texts("body") or page.texts()).split())
        assert " ".join(question.split()) in text and "steps = 6" in text and "block_length = 24" in text
        assert "B, blind" in text and "does not know pictures like this" in text and "Not a medical device" in text


def test_sessions_do_not_see_each_other(browser, served, picture):
    browser.ask("Is there a lesion?", picture)
    assert "There is no image yet" in Browser(served[0]).ask("Is there a lesion?")[-1][3]


# Files from which several pictures can be read


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of them; `frames.dcm` holds two phantoms."""
    folder = tmp_path_factory.mktemp("files")
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    colour, deep = Image.fromarray(np.stack([grey, grey.T, grey[::-1]], axis=-1)), grey.astype(np.uint16) * 500
    transparent = colour.convert("RGBA")
    transparent.putalpha(Image.fromarray(grey))
    for name, image, *more in (
        ("colour.png", colour), ("deep.png", Image.fromarray(deep)),
        ("transparent.png", transparent), ("animation.gif", colour, colour.rotate(90)),
        ("pages.tif", colour, colour.rotate(90), Image.fromarray(deep)),
    ):  # fmt: skip
        image.save(folder / name, **({"save_all": True, "append_images": more} if more else {}))
    voi = item(LUTDescriptor=[2, 0, 16])
    voi.add_new("LUTData", "OW", np.array([0, 65535], "<u2").tobytes())
    for name, data in (
        ("one.dcm", dataset(deep)),
        ("table.dcm", dataset(deep, VOILUTSequence=sequence(voi))),
        ("colour.dcm", dataset(np.asarray(colour), photometric="RGB")),
        ("burned.dcm", dataset(deep, BurnedInAnnotation="YES", WindowCenter=9000, WindowWidth=9000)),
    ):  # fmt: skip
        (folder / name).write_bytes(to_bytes(data))
    two_frames(folder / "frames.dcm")
    volume = np.random.default_rng(0).uniform(0, 100, (6, 7, 8, 3)).astype(np.float32)
    for name, values in (("volumes.nii.gz", volume), ("flat.nii", volume[:, :1, :, 0])):
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / name)
    return folder


@pytest.mark.parametrize(
    ("name", "offered"),
    [
        ("colour.png", {}),
        ("deep.png", {"window": "default"}),
        ("transparent.png", {"background": "default"}),
        ("animation.gif", {"place": ("Page (from 0)", 1, 0)}),
        ("pages.tif", {"place": ("Page (from 0)", 2, 0)}),
        ("one.dcm", {"window": "default"}),
        ("table.dcm", {"window": "default"}),
        ("colour.dcm", {}),
        ("burned.dcm", {"burned_in": False}),
        ("frames.dcm", {"place": ("Frame (from 0)", 1, 1), "window": "default"}),
        ("volumes.nii.gz", {"place": ("Axial slice (from 0)", 7, 4), "volume": ("Volume (from 0)", 2, 0),
                            "axis": "axial", "window": "default"}),
    ],
)  # fmt: skip
def test_only_what_can_be_chosen_is_offered(browser, files, name, offered):
    choices = browser.choices(files / name)
    assert offered == {
        name: (each["label"], each["maximum"], each["value"]) if "maximum" in each else each["value"]
        for name, each in choices.items()
    }
    if "window" in choices:
        windows = [value for _, value in choices["window"]["choices"]]
        assert "lung" in windows and ("full range" in windows) == (name not in ("volumes.nii.gz"))


@pytest.mark.parametrize(
    ("name", "chosen", "arguments"),
    [
        ("frames.dcm", {"place": 0}, {"frame": 0}),
        ("frames.dcm", {"place": 1, "window": " 1000/500 "}, {"frame": 1, "window": "1000/500"}),
        ("frames.dcm", {"place": 0, "window": "lung"}, {"frame": 0, "window": "lung"}),
        ("frames.dcm", {"place": 1, "window": "full range"}, {"frame": 1, "full_range": True}),
        ("transparent.png", {"background": "white"}, {"background": "white"}),
        ("pages.tif", {"place": 1}, {"page": 1}),
        ("pages.tif", {"place": 2}, {"page": 2}),
        ("burned.dcm", {"burned_in": True}, {"allow_burned_in": True}),
        ("volumes.nii.gz", {"place": 2, "volume": 1, "window": "50/40"},
         {"slice_index": 2, "time_index": 1, "window": "50/40"}),
        ("volumes.nii.gz", {"place": 4, "volume": 1, "axis": "sagittal"}, {"axis": "sagittal", "time_index": 1}),
        ("flat.nii", {"axis": "coronal"}, {"axis": "coronal"}),
    ],
)  # fmt: skip
def test_another_picture_is_said_and_asked_about_alone(browser, files, name, chosen, arguments):
    first = answers(browser.ask("Is there a lesion?", files / name)[-1][2])
    seen, conversation, message = browser.choose(**chosen)
    picture = read_medical_image(files / name, **arguments)
    assert image_as_url(picture.image) in seen and message == ""
    assert Page(seen).texts("li") == [str(step) for step in picture.steps]
    assert answers(conversation) == first and ("No question about it yet" in conversation) is bool(first)
    conversation = browser.ask("Is there a lesion?")[-1][2]
    said = "; ".join(str(step) for step in picture.steps if step.kind in ("choice", "levels")) or "read as it is"
    assert Page(conversation).texts("p", "ldm-view")[-1] == f"About image {1 + len(first)}: {said}."
    assert len(answers(conversation)) == 1 + len(first) and "earlier question" not in conversation


def test_answers_are_about_the_chosen_frame(browser, shipped, files):
    question = "What shape is the lesion?"
    seen = browser.ask(question, files / "frames.dcm")
    assert SECRET not in str(seen) and "window" in seen[0][1]
    browser.choose(place=0)
    pictures = [read_medical_image(files / "frames.dcm", frame=frame).image for frame in (0, 1)]
    expected = answer(*shipped, [conversation(each, question) for each in pictures])
    both = answers(browser.ask(question)[-1][2])
    assert answers(seen[-1][2]) == both[:1] and both[::-1] == expected and len(set(expected)) == 2
    assert browser.choose(place=0) == (None, None, None), "what is chosen already changes nothing"


def test_slices_along_another_axis(browser, files):
    browser.ask("", files / "volumes.nii.gz")
    chosen = browser.client.predict(2, 1, "sagittal", "50/40", "default", False, api_name="/choose")
    place = chosen[3]
    assert (place["label"], place["maximum"], place["value"]) == ("Sagittal slice (from 0)", 5, 3)
    seen = browser.choose(place=5, volume=1, axis="sagittal", window="50/40")[0]
    options = {"axis": "sagittal", "slice_index": 5, "time_index": 1, "window": "50/40"}
    assert image_as_url(read_medical_image(files / "volumes.nii.gz", **options).image) in seen


@pytest.mark.parametrize(
    ("name", "chosen", "message"),
    [
        ("frames.dcm", {"place": 1, "window": "bones"}, "Window is 'bones'; allowed are lung, mediastinum"),
        ("transparent.png", {"background": "no colour"}, "Background is 'no colour'; allowed are names of colours"),
    ],
)
def test_a_wrong_choice_loses_nothing(browser, files, name, chosen, message):
    browser.ask("Is there a lesion?", files / name)
    picture, conversation, shown = browser.choose(**chosen)
    assert message in alert(shown) and (picture, conversation) == (None, None)
    assert len(answers(browser.ask("Is there a lesion?")[-1][2])) == 2


def test_a_window_is_not_kept_for_pages_of_colours(browser, files):
    browser.ask("", files / "pages.tif")
    assert "percentiles" in browser.choose(place=2)[0]
    assert "window 32000/64000" in browser.choose(place=2, window="32000/64000")[0]
    assert "of mode 'RGB'; allowed are windows" in alert(browser.choose(place=0, window="32000/64000")[2])


def test_text_burned_in_is_shown_on_request(browser, files):
    shown = browser.ask("Is there a lesion?", files / "burned.dcm")[-1][3]
    assert "may identify the patient" in alert(shown) and "tick Burned-in text" in shown
    assert browser.choose(burned_in=True)[2] == ""
    assert "may identify the patient" in browser.choose(burned_in=False)[2]


def test_an_answer_about_another_frame_ends(browser, shipped, files, monkeypatch):
    browser.ask("", files / "frames.dcm")
    gate = Gate(monkeypatch, shipped[0])
    job = browser.submit("Describe the image.")
    gate.let(1)
    next(job), next(job), next(job)
    assert 'aria-busy="false"' in browser.choose(place=0)[1]
    gate.let(1)
    job.result(timeout=60)
    *drafts, last = job.outputs()
    assert all('aria-busy="true"' in conversation for _, _, conversation, *_ in drafts), "no answer came of it"
    assert "The image has changed" in alert(last[3])
    gate.let(1_000)
    conversation = browser.ask("Is there a lesion?")[-1][2]
    assert len(answers(conversation)) == 1
    passes = int(re.search(r"(\d+) forward passes", conversation)[1])
    assert gate.passes in (2 + passes, 3 + passes), "one more may have begun"


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
        known = {"section", "article", "p", "b", "span", "div", "details", "summary", "table", "img", "button"}
        assert page.tags <= known | {"thead", "tbody", "tr", "th", "td"}
        assert not re.search(r"[${}`]", shown), "Gradio's HTML is a template for JavaScript and for Handlebars"
    assert ATTACK in Page(shown).texts(None, "ldm-text")[0]
    assert Page(browser.ask("x" * 4_001)[-1][3]).tags == {"p"}


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
        ("What?", "cut", SLIDERS, "The file is a picture file that cannot be read"),
        ("What?", "bomb", SLIDERS, "The file has more pixels than Pillow allows; allowed are 1 to 33554432"),
        ("What?", "large", SLIDERS, "The file is 8000 by 8000 pixels; allowed are 1 to 33554432"),
        ("What?", None, (24, 7, 24, 0), "Block length: `block_length` is 7, which does not divide `max_new_tokens`"),
        ("What?", None, (24, 8, 25, 0), "Steps: `steps` is 25, which is no multiple of the number of blocks"),
        ("  ", None, SLIDERS, "The question has 0 characters"),
        ("x" * 4_001, None, SLIDERS, "The question has 4001 characters; allowed are 1 to 4000"),
    ],
)
def test_what_is_not_allowed_gets_a_message(in_use, picture, tmp_path, question, content, sliders, message):
    made = {"cut": picture.read_bytes()[:2000], "bomb": black_png(20_000, 20_000), "large": black_png(8_000, 8_000)}
    (tmp_path / "file.png").write_bytes(made.get(content, content) or b"")
    files = [] if content is None else [tmp_path / "file.png"]
    box, _, conversation, shown = in_use.ask(question, *files, sliders=sliders)[-1]
    assert message in alert(shown) and "Traceback" not in shown
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
        monkeypatch.setattr(type(shipped[0]), "denoising_step", fail)
        shown = browser.ask(f"{SECRET} lesion?", named)[-1][3]
    assert "could not be answered (RuntimeError)" in shown and SECRET not in shown
    assert "a question could not be answered: RuntimeError" in caplog.text
    own = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore", "asyncio"))]
    assert SECRET not in "".join(record.getMessage() for record in own)
    assert SECRET not in "".join(capfd.readouterr())
    assert not [path for path in served[1].rglob("*") if path.is_file()]


def config_of(served):
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
    assert all(props["label"] for props in usable) and [props["visible"] for props in usable].count(True) == 9
    buttons = [component["props"]["value"] for component in config["components"] if component["type"] == "button"]
    assert {"Stop", "New conversation", "Ask again", "Save as HTML", "Save as Markdown"} < set(buttons)
    names = {dependency["api_name"] for dependency in config["dependencies"]}
    assert {"ask", "clear", "fit"} <= names and not any("flag" in str(name) for name in names)


def test_a_model_of_which_nothing_is_known(model, processor, tmp_path):
    """It has questions and no examples, and the page shows no folder of this computer."""
    app = build_app(model, processor, name=str(tmp_path))
    try:
        texts = [str(each["props"].get("value")) for each in app.get_config_file()["components"]]
    finally:
        app.close()
    page = Page(next(text for text in texts if "data-example" in text))
    assert "What is the imaging modality?" in [text.strip() for text in page.texts("button")] and "img" not in page.tags
    head = next(text for text in texts if 'role="note"' in text)
    assert f"<b>{tmp_path.name}</b>" in head and "demo" not in head and str(tmp_path.parent) not in str(texts)


def test_contrast_and_more_than_colour(served):
    style = config_of(served)["components"][1]["props"]["value"].partition("</style>")[0]
    assert style.startswith("<style>")
    backgrounds = re.findall(r"background: (#[0-9a-f]{6})", style)
    assert {level.color for level in LEVELS} < set(backgrounds)
    for color in backgrounds:
        if color != "#767676":  # of masks, which hold no text
            assert contrast(color, "#333333") >= 7  # the lightest text of an explanation
    looks = re.findall(r"ldm-level-\d { background: #\w{6}; (.*?)}", style)
    assert len(looks) == len(set(looks)) == 4


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


@pytest.mark.slow  # test_answers_side_by_side is its sister
def test_questions_are_answered_side_by_side_and_the_queue_is_bounded(shipped, example, picture, monkeypatch, tmp_path):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    app = build_app(*shipped, queue_size=1, max_file_size=LIMIT)
    options = {"server_name": "127.0.0.1", "max_file_size": None}  # not Gradio's limit, but the app's own
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, **options)
    try:
        (tmp_path / "large.bin").write_bytes(bytes(2 * LIMIT))
        assert "The file has 0.2 MB; allowed are 0.1 MB" in Browser(url).ask("What?", tmp_path / "large.bin")[-1][3]
        tabs = [Browser(url) for _ in range(10)]
        for tab in tabs:
            assert tab.ask("", picture)[-1][3] == ""
        gate, submit, submitted = Gate(monkeypatch, shipped[0]), ContinuousBatch.submit, []
        monkeypatch.setattr(ContinuousBatch, "submit", lambda *a, **k: (submit(*a, **k), submitted.append(0))[0])
        jobs = []
        for tab, sliders in zip(tabs, [SLIDERS] * 7 + [(8, 8, 2, 0)]):
            jobs.append(tab.submit(example.question, sliders=sliders))
            until(lambda: len(submitted) == len(jobs))
        *running, short = jobs
        waiting = tabs[8].submit(example.question)
        until(lambda: waiting.status().queue_size)
        with pytest.raises(Exception, match="full"):
            tabs[9].ask(example.question)
        gate.let(10)  # of both groups
        until(short.done)
        assert not any(job.done() for job in running)
        gate.let(1_000)
        expected = answer(*shipped, [example.messages()])
        assert [answers(job.result()[2]) for job in (*running, waiting)] == [expected] * 8
        assert gate.passes < 3 * 24, "they share passes"
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
    with pytest.raises(ValueError, match=message):
        build_app(*shipped, **options)


def command(*arguments, **environment):
    return CliRunner().invoke(cli.app, ["app", *arguments], env=environment)


@pytest.mark.parametrize(
    ("arguments", "launched", "warnings"),
    [
        ((), {"server_name": "127.0.0.1", "server_port": 7860, "share": False}, []),
        (("--host", "localhost", "--port", "81"), {"server_name": "localhost", "server_port": 81, "share": False}, []),
        (("--host", "0.0.0.0"), {"server_name": "0.0.0.0", "share": False}, ["anyone who can reach 0.0.0.0"]),
        (("--compare-with", "demo"), {"server_name": "127.0.0.1", "share": False}, []),
        (("--share",), {"server_name": "127.0.0.1", "share": True}, ["anyone with the link"]),
    ],
)
def test_command_line(monkeypatch, arguments, launched, warnings):
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


@pytest.fixture
def pressed(tmp_path, monkeypatch):
    """Runs the command; once it serves, the function in another thread, and at last a real signal to this process."""

    def run(use, number):
        def press():
            try:
                assert serving.wait(60)
                use(f"http://127.0.0.1:{port}")
            finally:
                os.kill(os.getpid(), number)

        thread = Thread(target=press)
        thread.start()
        result = command("--port", str(port))
        thread.join()
        return result

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    port, serving, block = free_port(), Event(), gradio.Blocks.block_thread
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda self: (serving.set(), block(self)))
    return run


def test_ctrl_c(pressed):
    pages = []
    result = pressed(lambda url: pages.append(httpx.get(url)), signal.SIGINT)
    assert pages[0].status_code == 200 and result.exit_code == 130
    assert str(pages[0].url).rstrip("/") in result.stdout and "Traceback" not in result.output
    with pytest.raises(httpx.ConnectError):
        httpx.get(pages[0].url)


def test_uploads_are_deleted_at_the_end(pressed, tmp_path):
    """By SIGTERM; also those that no event has read, also those cut off."""

    def files():
        return [path for path in tmp_path.rglob("*") if path.is_file()]

    def upload(url):
        address = f"{url}/gradio_api/upload"
        seen.append(httpx.post(address, files={"files": ("a.png", SECRET.encode())}).status_code)
        part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="b.png"\r\n\r\n' + SECRET.encode()
        cut = stack.enter_context(socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))))
        cut.sendall(
            b"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9999\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n" + part + bytes(2_000)
        )
        until(lambda: len(files()) == 2)
        seen.append(len(files()))

    seen = []
    with ExitStack() as stack:
        result = pressed(upload, signal.SIGTERM)
        assert seen == [200, 2] and result.exit_code == 128 + signal.SIGTERM
        assert not list(tmp_path.iterdir())
    assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path), "as it was"


def test_foreign_names_and_pages_are_kept_out(served):
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
