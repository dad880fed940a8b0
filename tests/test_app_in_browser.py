"""The app in headless Chromium: what a person gets to see, with a mouse, with the keyboard alone, or read out.

Needs the extra `browser-tests` and an installed Chromium, and is skipped without them.
"""

import base64
import math
import re
import shutil
from itertools import pairwise

import pytest

from lladamedv.app import build_app
from lladamedv.conversation import find_evidence, reply_to
from lladamedv.demo import HELD_OUT_SEED, answer, one_per_domain
from lladamedv.explanation import image_as_url
from lladamedv.processing.medical_images import read_medical_image
from lladamedv.processing.phantoms import PhantomVQA
from tests.dicom_files import SECRET
from tests.faces import Gate, conversation, generated, two_frames
from tests.html_pages import contrast


pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
expect = sync_api.expect
expect.set_options(timeout=30_000)  # a busy machine is no fault of the page
ASKED = "Is there a lesion?"
FRAME = "range slider for Frame (from 0)"
FOCUS = """() => {
    const element = document.activeElement, style = getComputedStyle(element);
    const name = element.getAttribute("aria-label") || element.placeholder || element.value || element.innerText;
    return [element.tagName, name, style.outlineStyle, parseFloat(style.outlineWidth)];
}"""
CONTRAST = """element => {
    let behind = element;
    while (getComputedStyle(behind).backgroundColor == "rgba(0, 0, 0, 0)") behind = behind.parentElement;
    return [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
}"""
LINES = """tokens => tokens.flatMap(token => [...token.getClientRects()].map(({top, bottom}) => [top, bottom]))"""

COPY = """async picture => {
    const response = await fetch(`data:image/png;base64,${picture}`);
    await navigator.clipboard.write([new ClipboardItem({"image/png": await response.blob()})]);
}"""


@pytest.fixture(scope="module")
def url(shipped, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        app = build_app(*shipped, max_file_size=100_000)
        _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
        yield url
        app.close()


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def look():
    """Options of the window: a test may have its own."""
    return {}


@pytest.fixture
def page(chromium, url, look):
    """The page, which must ask no other server for anything, raise no error and keep nothing."""
    page = chromium.new_context(**{"viewport": {"width": 1200, "height": 1000}} | look).new_page()
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(url)
    expect(page.get_by_role("textbox")).to_be_visible()
    yield page
    assert not errors
    assert all(each.startswith((url, "data:", "blob:")) for each in asked)
    assert page.evaluate("async () => [localStorage.length, (await indexedDB.databases()).length]") == [0, 0]
    page.context.close()


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    path = tmp_path_factory.mktemp("dicom") / "frames.dcm"
    two_frames(path)
    return path


def attach(page, path):
    """It is shown at once, and the box is free for the next one."""
    shown = page.locator(".ldm-picture img")
    before = shown.get_attribute("src") if shown.count() else ""
    page.set_input_files("input[type=file]", path)
    expect(shown).not_to_have_attribute("src", before)
    expect(page.get_by_role("button", name="Remove file")).to_have_count(0)


def ask(page, question):
    page.get_by_role("textbox").fill(question)
    page.keyboard.press("Enter")


def answers(page, count, turns=None):
    """The texts of all answers, once there are `count`, to as many questions or `turns`."""
    log = page.get_by_role("log")
    expect(log.get_by_role("article")).to_have_count(count if turns is None else turns)
    expect(log.locator(".ldm-answer")).to_have_count(count)
    expect(log).to_have_attribute("aria-busy", "false")
    expect(log.locator(".ldm-mask")).to_have_count(0)
    return [text.strip() for text in log.locator(".ldm-text").all_inner_texts()]


def tab_to(page, name):
    """Press Tab until what is so named has the focus, which must be visible all the way."""
    seen = []
    while name not in seen:
        page.keyboard.press("Tab")
        tag, focused, style, width = page.evaluate(FOCUS)
        assert len(seen) < 60, f"{name} is not reached: {seen}"
        if tag != "BODY":  # the way on begins at the top
            seen.append(focused.split("\n")[0])
            assert style == "solid" and width >= 2, f"no focus to be seen at {focused}"
    return seen


def test_masks_become_an_answer(page, shipped, example, picture, monkeypatch):
    gate = Gate(monkeypatch, shipped[0])
    attach(page, picture)
    ask(page, example.question)
    log = page.get_by_role("log")
    masks = log.locator(".ldm-mask")
    expect(masks).to_have_count(24)
    expect(log).to_have_attribute("aria-busy", "true")
    expect(masks.first).to_be_visible()
    assert log.locator(".ldm-text").inner_text().strip("░") == ""
    for passes, left in ((1, 23), (4, 19), (6, 13)):
        gate.let(passes)
        expect(masks).to_have_count(left)
    shaded = log.locator(".ldm-token").first
    expect(shaded).to_have_attribute("title", re.compile(r"confidence \d+\.\d%"))
    assert shaded.evaluate("token => getComputedStyle(token).backgroundColor") != "rgba(0, 0, 0, 0)"
    assert re.search(r"\w+", log.locator(".ldm-text").inner_text().replace("░", "")), "some of the words are there"
    gate.let(1_000)
    expected = answer(*shipped, [example.messages()])
    assert answers(page, 1) == expected
    expect(page.get_by_role("textbox")).to_have_value("")


@pytest.mark.parametrize("look", [{"viewport": {"width": 390, "height": 844}}])
@pytest.mark.parametrize("with_key", [False, True])
def test_stop_and_new_conversation(page, shipped, picture, monkeypatch, with_key):
    gate, box = Gate(monkeypatch, shipped[0]), page.get_by_role("textbox")
    stop = page.get_by_role("button", name="Stop")
    attach(page, picture)
    expect(stop).to_be_hidden()
    box.fill("Describe")
    box.press("Shift+Enter")
    box.press_sequentially("the image.")
    box.press("Enter")
    gate.let(2)
    masks = page.get_by_role("log").locator(".ldm-mask")
    expect(masks).to_have_count(22)
    expect(stop).to_be_in_viewport()
    page.keyboard.press("Escape") if with_key else stop.click()
    expect(masks).to_have_count(0)
    expect(stop).to_be_hidden()
    gate.let(1_000)
    expect(box).to_have_value("Describe\nthe image.")
    expect(box).to_be_focused()
    page.wait_for_timeout(1_000)  # Gradio takes no other question while it clears away
    ask(page, ASKED)
    assert len(answers(page, 1)) == 1
    expect(stop).to_be_hidden()
    page.get_by_role("button", name="New conversation").click()
    assert answers(page, 0) == []
    expect(page.get_by_text("No image yet.")).to_be_visible()


@pytest.mark.parametrize("look", [{"viewport": {"width": width, "height": 844}} for width in (1280, 390)], ids=str)
def test_an_example_is_asked_with_one_click(page, shipped):
    first = page.locator("[data-example]").first
    example = one_per_domain(list(PhantomVQA(HELD_OUT_SEED, 60)))[0]
    expect(first).to_have_text(example.question)
    expect(first).to_be_in_viewport()
    for each in ("textbox", "note"):
        expect(page.get_by_role(each)).to_be_in_viewport(ratio=1)
    first.click()
    assert answers(page, 1) == answer(*shipped, [example.messages()])
    expect(page.locator(".ldm-picture img")).to_have_attribute("src", image_as_url(example.image))
    expect(page.locator(".ldm-answer")).to_be_in_viewport(ratio=1)
    expect(page.get_by_role("textbox")).to_be_focused()
    for place in ("0", "document.body.scrollHeight / 2", "document.body.scrollHeight"):
        page.evaluate(f"scrollTo(0, {place})")
        expect(page.get_by_role("textbox")).to_be_in_viewport(ratio=1)
    covering = "box => box.contains(document.elementFromPoint(innerWidth / 2, box.getBoundingClientRect().y + 20))"
    assert page.locator("#ldm-ask").evaluate(covering)


def test_two_settings_and_a_saved_page(page, chromium, shipped, example, picture, tmp_path):
    attach(page, picture)
    page.get_by_role("button", name="How to denoise").click()
    page.get_by_role("checkbox", name="Compare").check()
    page.get_by_role("spinbutton", name="B: Steps").fill("6")
    ask(page, example.question)
    both = answers(page, 2, turns=1)
    assert both == [answer(*shipped, [example.messages()], **options)[0] for options in ({}, {"steps": 6})]
    boxes = [each.bounding_box() for each in page.locator(".ldm-answer").all()]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as HTML").click()
    download.value.save_as(tmp_path / download.value.suggested_filename)
    saved = chromium.new_page()
    saved.goto((tmp_path / "conversation.html").as_uri())
    assert saved.locator(".ldm-text").all_inner_texts() == both
    assert saved.get_by_role("img", name="Image 1").evaluate("image => image.complete && image.naturalWidth") == 64
    saved.close()


def test_sliders_are_options_of_generate(page, shipped, example, picture, monkeypatch):
    page.get_by_role("button", name="How to denoise").click()
    length, block, steps, threshold = (
        page.get_by_role("slider", name=f"({option})")
        for option in ("max_new_tokens", "block_length", "steps", "confidence_threshold")
    )
    page.wait_for_timeout(1_000)  # Gradio sets sliders once more as soon as they are shown
    length.press("ArrowRight")
    expect(steps).to_have_value("25")
    assert 25 % int(block.input_value()) == 0, "the block length follows"
    number = page.get_by_role("spinbutton", name="(max_new_tokens)")
    number.fill("40")
    number.press("Tab")
    expect(steps).to_have_value("40")
    expect(block).to_have_value("8")
    for _ in range(30):
        threshold.press("ArrowRight")
    expect(threshold).to_have_value("0.3")

    gate = Gate(monkeypatch, shipped[0])
    attach(page, picture)
    ask(page, example.question)
    expect(page.get_by_role("log").locator(".ldm-mask")).to_have_count(40)
    gate.let(1_000)
    options = {"max_new_tokens": 40, "block_length": 8, "steps": 40, "confidence_threshold": 0.3}
    output = generated(shipped, example.image, example.question, **options).output
    assert answers(page, 1) == answer(*shipped, [example.messages()], **options)
    assert output.num_forwards[0] < 20
    expect(page.get_by_text(f"{int(output.num_forwards[0])} forward passes")).to_be_visible()


@pytest.mark.parametrize("look", [{"viewport": {"width": 390, "height": 1000}}], ids=str)
def test_a_click_on_a_word_shows_where_it_comes_from(page, shipped, example, picture):
    attach(page, picture)
    ask(page, example.question)
    answers(page, 1)
    reply = reply_to(*shipped, example.image, example.question)
    number = next(number for number, (text, _) in enumerate(reply.words) if text == " lesions")
    shown = page.get_by_role("img", name="with a map of where “lesions” comes from")
    page.locator(".ldm-token", has_text="lesions").click()
    found = find_evidence(*shipped, example.image, example.question, reply, word=number)
    expect(shown).to_have_attribute("src", image_as_url(example.image, found))
    expect(page.locator(".ldm-where")).to_contain_text("hiding the whole picture makes it less likely")
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    chosen = page.get_by_role("combobox", name="Show where it comes from")
    expect(chosen).to_have_value(f"{number + 1}: lesions")
    chosen.click()
    page.get_by_role("option", name="the whole answer").click()
    expect(page.get_by_role("img", name="with a map of where the answer comes from")).to_be_visible()
    chosen.click()
    page.get_by_role("option", name="nothing").click()
    expect(page.locator(".ldm-where")).to_have_count(0)


def test_frames_and_windows(page, shipped, frames):
    expect(page.get_by_role("slider", name="Frame")).to_have_count(0)
    attach(page, frames)
    frame, shown = page.get_by_role("slider", name=FRAME), page.locator(".ldm-picture")
    expect(shown).to_contain_text("frame 1 of 2 (from 0)")
    expect(frame).to_have_value("1")
    ask(page, ASKED)
    assert len(answers(page, 1)) == 1

    frame.press("ArrowLeft")
    expect(shown).to_contain_text("frame 0 of 2 (from 0)")
    expect(page.get_by_role("log")).to_contain_text("About image 2: frame 0 of 2 (from 0)")
    expect(page.get_by_role("log")).to_contain_text("No question about it yet")
    image = read_medical_image(frames, frame=0).image
    assert page.get_by_role("img").first.get_attribute("src") == image_as_url(image)
    ask(page, ASKED)
    assert answers(page, 2)[1:] == answer(*shipped, [conversation(image, ASKED)])

    window = page.get_by_role("combobox", name="Window")
    window.fill("nonsense")
    window.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("Window is 'nonsense'; allowed are lung")
    expect(window).to_have_value("default")
    assert len(answers(page, 2)) == 2
    window.fill("40/40")
    window.press("Enter")
    expect(shown).to_contain_text("window 40/40 (level/width)")
    expect(page.get_by_role("alert")).to_have_count(0)
    window.click()
    page.get_by_role("option", name="bone").click()
    expect(shown).to_contain_text("preset bone")
    expect(shown).to_contain_text("frame 0 of 2 (from 0)")


def test_wheel_and_drag_over_the_picture(page, shipped, frames):
    """What is shown is what is read so, and what the model is asked about."""
    attach(page, frames)
    shown, window = page.locator(".ldm-picture img"), page.get_by_role("combobox", name="Window")
    shown.hover()
    page.mouse.wheel(0, -100)
    expect(page.get_by_role("slider", name=FRAME)).to_have_value("0")
    expect(shown).to_have_attribute("src", image_as_url(read_medical_image(frames, frame=0).image))
    page.mouse.down()
    box = shown.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2 - 60, box["y"] + box["height"] / 2 + 30, steps=8)
    page.mouse.up()
    level, width = 2040.5 + 4081 * 30 / 400, 4081 * math.exp(-60 / 200)
    expect(window).to_have_value(f"{level:.4g}/{width:.4g}")
    image = read_medical_image(frames, frame=0, window=f"{level:.4g}/{width:.4g}").image
    expect(shown).to_have_attribute("src", image_as_url(image))
    ask(page, ASKED)
    assert answers(page, 1) == answer(*shipped, [conversation(image, ASKED)])
    expect(page.get_by_role("log")).to_contain_text(f"window {level:.4g}/{width:.4g} (level/width)")
    assert SECRET not in page.content()


def test_a_frame_that_is_not_there(page, frames):
    attach(page, frames)
    number = page.get_by_role("spinbutton", name="Frame")
    number.fill("0")
    expect(page.locator(".ldm-picture")).to_contain_text("frame 0 of 2 (from 0)")
    number.fill("7")
    expect(page.get_by_text("Value 7 is greater than maximum value 1.")).to_be_visible()
    number.press("Tab")
    expect(page.locator(".ldm-picture")).to_contain_text("frame 1 of 2 (from 0)")
    expect(number).to_have_value("1")


@pytest.mark.parametrize("look", [{"permissions": ["clipboard-read", "clipboard-write"]}])
def test_a_picture_can_be_pasted(page, shipped, example, picture):
    page.evaluate(COPY, base64.b64encode(picture.read_bytes()).decode())
    page.get_by_role("textbox").press("Control+V")
    expect(page.get_by_role("button", name="Remove file")).to_be_visible()
    ask(page, example.question)
    assert answers(page, 1) == answer(*shipped, [example.messages()])


def test_other_files_can_be_pasted(page, shipped, frames):
    """The event is made here: without a desktop there is nowhere to copy a file."""
    script = """([name, data]) => {
        const held = new DataTransfer();
        held.items.add(new File([Uint8Array.from(atob(data), letter => letter.charCodeAt(0))], name));
        const paste = {clipboardData: held, bubbles: true, cancelable: true};
        document.activeElement.dispatchEvent(new ClipboardEvent("paste", paste));
    }"""
    page.get_by_role("textbox").focus()
    page.evaluate(script, [frames.name, base64.b64encode(frames.read_bytes()).decode()])
    expect(page.get_by_role("button", name="Remove file")).to_have_count(1)
    ask(page, ASKED)
    image = read_medical_image(frames).image
    assert answers(page, 1) == answer(*shipped, [conversation(image, ASKED)])


def test_markup_stays_text(page, picture):
    attack = "<img src=x onerror=alert(1)> ${alert(2)} {{value}} `"
    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    attach(page, picture)
    ask(page, attack)
    answers(page, 1)
    expect(page.locator(".ldm-question span")).to_have_text(attack)
    assert dialogs == []


def test_the_keyboard_is_enough(page, frames):
    page.on("filechooser", lambda chooser: chooser.set_files(frames))
    reached = tab_to(page, "Submit")[-4:]
    assert reached == ["How to denoise", "Upload a file", "Question about the image", "Submit"]
    tab_to(page, "How to denoise")
    page.keyboard.press("Enter")
    expect(page.get_by_role("slider", name="(steps)")).to_be_visible()
    tab_to(page, "range slider for Confidence threshold (confidence_threshold)")
    tab_to(page, "Upload a file")
    page.keyboard.press("Enter")
    expect(page.locator(".ldm-picture img")).to_be_visible()
    tab_to(page, "Question about the image")
    page.keyboard.type(ASKED)
    page.keyboard.press("Enter")
    assert len(answers(page, 1)) == 1
    reached = tab_to(page, "Confidence of every token")
    assert FRAME in reached and "Window (grey values to show)" in reached
    page.keyboard.press("Enter")
    expect(page.get_by_role("table")).to_be_visible()
    tab_to(page, FRAME)
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".ldm-picture")).to_contain_text("frame 0 of 2 (from 0)")
    tab_to(page, "Question about the image")
    page.keyboard.type(ASKED)
    tab_to(page, "Submit")
    page.keyboard.press("Enter")
    assert len(answers(page, 2)) == 2
    tab_to(page, "New conversation")
    page.keyboard.press("Space")
    expect(page.get_by_text("No image yet.")).to_be_visible()


def test_what_is_read_out(page, frames, picture):
    """Roles, names and states, as Chromium gives them to a screen reader."""

    def check():
        nodes = session.send("Accessibility.getFullAXTree")["nodes"]
        said = [(node["role"]["value"], node.get("name", {}).get("value")) for node in nodes if not node["ignored"]]
        assert not [role for role, name in said if role in controls and not name]
        assert all(image.get_attribute("alt") is not None for image in page.locator("img").all())
        return said

    controls = {"button", "textbox", "slider", "spinbutton", "combobox", "radio", "checkbox", "link", "log", "region"}
    session = page.context.new_cdp_session(page)
    assert page.locator("html").get_attribute("lang") == "en" and page.title() == "LLaDA-MedV"
    assert [text for role, text in check() if role == "heading"] == ["LLaDA-MedV"]
    expect(page.get_by_role("main")).to_have_count(1)
    expect(page.get_by_role("note")).to_contain_text("Research only. Not a medical device")
    expect(page.get_by_role("log", name="Conversation")).to_have_attribute("aria-live", "polite")
    options = page.get_by_role("button", name="How to denoise")
    expect(options).to_have_attribute("aria-expanded", "false")
    options.click()
    expect(options).to_have_attribute("aria-expanded", "true")

    attach(page, picture)
    check()
    attach(page, frames)
    check()
    ask(page, ASKED)
    answers(page, 1)
    assert {("slider", FRAME), ("combobox", "Window (grey values to show)")} < set(check())
    expect(page.get_by_role("img", name="The image as it was read, 64 by 64 pixels")).to_be_visible()
    options.click()
    expect(options).to_have_attribute("aria-expanded", "false")


@pytest.mark.parametrize(
    "look",
    [
        {"color_scheme": "light"},
        {"color_scheme": "dark"},
        {"color_scheme": "dark", "viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
    ],
    ids=["light", "dark", "phone"],
)
def test_everything_can_be_read(page, look, frames):
    attach(page, frames)
    ask(page, "Describe the image.")
    expect(page.get_by_role("alert")).to_have_count(0)
    answers(page, 1)
    lines = sorted({tuple(line) for line in page.locator(".ldm-answer .ldm-token").evaluate_all(LINES)})
    assert len(lines) >= (2 if "viewport" in look else 1), "a phone is not as wide as the answer"
    assert all(above[1] <= below[0] for above, below in pairwise(lines)), "no line is painted over another"
    ask(page, "x" * 4_001)
    expect(page.get_by_role("alert")).to_be_visible()
    width = look.get("viewport", {"width": 1200})["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is beside the screen"
    for what in (".ldm-note", ".ldm-alert", "figcaption", ".ldm-question", ".ldm-token", ".ldm-legend p"):
        colors = page.locator(what).first.evaluate(CONTRAST)
        front, back = (
            "#" + "".join(f"{int(level):02x}" for level in re.findall(r"\d+", color)[:3]) for color in colors
        )
        assert contrast(front, back) >= 4.5, what  # WCAG 2.2, 1.4.3
