"""How the browser app looks, and the little JavaScript that Gradio has nothing for, all of it."""

from .conversation import level_styles


# Gradio sets the colour of all that is in its HTML, its subdued texts have too little contrast, and it does not show
# everywhere what has the keyboard's focus. The lines of an answer are so far apart that the shading of one leaves the
# underlines of the one above. Pages of saved conversations have the same classes, in a style of their own.
ANSWER_STYLE = """
.ldm-note, .ldm-note *, .ldm-alert, .ldm-alert *, .ldm-token { color: #111 !important; }
.ldm-note { border: 2px solid #8a4b00; background: #fff6e5; padding: 8px 12px; }
.ldm-alert { border: 2px solid #a40000; background: #ffecec; padding: 8px 12px; }
.ldm-turn { border-top: 1px solid #767676; padding: 8px 0; }
.ldm-answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(260px, 100%), 1fr)); gap: 8px 24px; }
.ldm-answer p { margin: 6px 0; }
.ldm-text, .ldm-question span { white-space: pre-wrap; overflow-wrap: anywhere; }
.ldm-text { line-height: 1.9; }
.ldm-token { padding-bottom: 7px; text-underline-offset: 2px; }
.ldm-mask { background: #767676; color: #767676 !important; border: 1px solid #fff; border-radius: 3px;
margin: 0 1px; display: inline-block; height: 1.3em; overflow: hidden; vertical-align: text-bottom; }
.ldm-table td, .ldm-table th { padding: 0 12px 0 0; text-align: left; white-space: pre; }
""" + level_styles("ldm-")
STYLE = (
    ANSWER_STYLE
    + """
.ldm-head h1 { margin: 0; } .ldm-head p { margin: 4px 0 0; }
.ldm-token[data-word] { cursor: pointer; }
.ldm-picture img { width: 100%; max-height: 70vh; object-fit: contain; object-position: left; }
.ldm-picture img[data-level] { cursor: crosshair; }
.ldm-picture figcaption { margin-top: 8px; }
.ldm-view { display: flex; gap: 12px; align-items: center; margin: 8px 0; }
.ldm-view img { width: 48px; height: 48px; object-fit: contain; background: #000; flex: none; }
.ldm-examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); gap: 12px; }
.gradio-container .ldm-examples button { border: 1px solid #767676; border-radius: 8px; padding: 8px; text-align: left;
font-weight: normal; font-size: inherit; display: block; background: var(--block-background-fill);
color: var(--body-text-color); cursor: pointer; }
.gradio-container .ldm-examples button:hover { border-color: var(--body-text-color); }
.ldm-examples img { width: 100%; border-radius: 4px; margin-bottom: 8px; }
.ldm-legend ul { display: flex; flex-wrap: wrap; gap: 4px 24px; list-style: none !important; padding: 0; }
.gradio-container { --body-text-color-subdued: var(--body-text-color);
--block-info-text-color: var(--body-text-color); --input-placeholder-color: #767676; }
.gradio-container :focus-visible { outline: 3px solid var(--body-text-color) !important; outline-offset: 2px; }
.dark .gradio-container, .dark.gradio-container { --input-placeholder-color: #9e9e9e; }
.gradio-container { overflow: clip !important; } /* Gradio hides what overflows, and then nothing sticks */
#ldm-ask { position: sticky; bottom: 0; z-index: 100; background: var(--body-background-fill); padding: 8px 0; }
#ldm-alert:not(:has(p)), .gradio-container:not(:has(.ldm-picture img, #ldm-alert p)) #ldm-new { display: none; }
#ldm-stop { align-self: center; width: auto; min-width: 160px; }
.ldm-turn { scroll-margin-bottom: 180px; }
.gradio-container:not(:has([role=log][aria-busy=true])) #ldm-stop { display: none; }
.gradio-container:has([role=log][aria-busy=true]) .ldm-after,
.gradio-container:not(:has(.ldm-turn)) .ldm-after { display: none; }
@media (hover: none) { .ldm-pointer { display: none; } }
@media (max-width: 700px) {
.ldm-picture img { max-height: 38vh; object-position: center; }
.ldm-examples { grid-template-columns: 1fr 1fr; } .ldm-note { font-size: 0.85rem; padding: 6px 8px; }
#ldm-options .block { min-width: 0; }
}
"""
)

_FIND_BOX = 'document.querySelector("#ldm-box textarea")'
# Where a keyboard is at hand; on a phone it would cover the answer.
FOCUS_ON_BOX = f'() => {{ if (matchMedia("(hover: hover)").matches) {_FIND_BOX}.focus(); }}'

# A file that is attached is shown at once: Gradio has no event for that, and one for every key would go to the server.
SHOW_ATTACHED = "message => { if (message.files.length) document.querySelector('#ldm-attached').click(); }"

# Gradio takes pasted pictures. Other files, copied where files are listed, go the way of those that are attached.
ON_LOAD = """() => {
    document.addEventListener("paste", event => {
        const file = [...event.clipboardData.files].find(file => !file.type.startsWith("image/"));
        if (!file) return;
        const input = document.querySelector("input[type=file]"), files = new DataTransfer();
        files.items.add(file);
        input.files = files.files;
        input.dispatchEvent(new Event("change", {bubbles: true}));
        event.preventDefault();
    });
    document.addEventListener("keydown", event => {
        const stop = document.querySelector("#ldm-stop");
        if (event.key == "Escape" && stop.offsetParent) stop.click();
    });
}"""

# A word of an answer is looked at, an example is asked; an answer is on the screen when it begins and when it is whole.
TELL_CLICK = """element.addEventListener("click", ({target}) => {
    const button = target.closest("[data-example]");
    if (button) trigger("select", {example: +button.dataset.example});
    else if (target.dataset.word) trigger("click", {word: target.dataset.word});
});
let wasBusy = false;
new MutationObserver(() => {
    const busy = !!element.querySelector("[aria-busy=true]");
    if (busy != wasBusy) setTimeout(() => {  // when all else on the page has its new height
        [...element.querySelectorAll(".ldm-turn")].pop()?.scrollIntoView({block: "nearest"});
    }, 300);
    wasBusy = busy;
}).observe(element, {childList: true, subtree: true, attributes: true});"""

# The wheel moves the slider, and at its ends the page; dragging with a mouse or pen sets the window. Gradio's
# "always_last" repeats the first of several events: here the newest window waits until the one before is shown.
TELL_POINTER = """let held = null, wanted = null, until = 0;
const send = () => {
    if (!wanted || Date.now() < until) return;
    trigger("input", {window: wanted});
    [wanted, until] = [null, Date.now() + 2000];
};
new MutationObserver(() => { until = 0; send(); }).observe(element, {childList: true, subtree: true, attributes: true});
element.addEventListener("wheel", event => {
    const slider = document.querySelector("#ldm-place input[type=range]");
    if (!slider || !event.target.closest("img")) return;
    const wanted = Math.max(0, Math.min(+slider.max, +slider.value + Math.sign(event.deltaY)));
    if (wanted == +slider.value) return;
    event.preventDefault();
    slider.value = wanted;
    slider.dispatchEvent(new Event("input", {bubbles: true}));
}, {passive: false});
element.addEventListener("pointerdown", event => {
    const {level, width} = event.target.dataset;
    if (width === undefined || event.pointerType == "touch" || event.button) return;
    event.preventDefault();
    held = {x: event.clientX, y: event.clientY, level: +level, width: +width};
});
document.addEventListener("pointermove", event => {
    if (!held) return;
    if (!event.buttons) { held = null; return; }
    const {x, y, level, width} = held, short = number => +number.toPrecision(4);
    if (Math.abs(event.clientX - x) + Math.abs(event.clientY - y) < 4) return;
    const wider = width * Math.exp((event.clientX - x) / 200);
    wanted = `${short(level + width * (event.clientY - y) / 400)}/${short(wider)}`;
    send();
});
document.addEventListener("pointerup", () => { if (held) setTimeout(send, 2000); held = null; });"""

# A file of what the server sends, which keeps none.
DOWNLOAD = """(name, text) => {
    if (!text) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text]));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}"""

__all__ = [
    "ANSWER_STYLE", "DOWNLOAD", "FOCUS_ON_BOX", "ON_LOAD", "SHOW_ATTACHED", "STYLE", "TELL_CLICK", "TELL_POINTER",
]  # fmt: skip
