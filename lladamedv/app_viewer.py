"""The picture of the browser app: how a file becomes what is shown, which is what the model sees.

Frames, slices and windows are those of `read_medical_image`: each of them reads the file anew, so that no picture is on
the screen that the model does not get.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lladamedv.processing.medical_images import WINDOW_PRESETS, MedicalImage, MedicalImageError, read_medical_image
from lladamedv.processing.nifti import AXES

from .evidence import Evidence
from .explanation import image_as_url, render, show_legend


MAX_PIXELS = 2**25  # of an image that is kept in memory while it is shown: 100 MB
_DEFAULT, _FULL_RANGE = "default", "full range"  # of the controls
_INDICES = ("frame", "page", "slice_index")
# What the arguments of `read_medical_image` are called here.
CONTROLS = {
    "source": "The file", "frame": "Frame", "page": "Page", "slice_index": "Slice", "time_index": "Volume",
    "axis": "Axis", "window": "Window", "full_range": f"Window ({_FULL_RANGE})", "background": "Background",
    "allow_burned_in": "Burned-in text",
}  # fmt: skip
_BURNED_IN = (
    "The file says that text is burned into its pixels, which may identify the patient. If you know that it does not, "
    "tick Burned-in text."
)
_PICTURE = """\
<figure class="ldm-picture">
<img src="{{ url }}" alt="The image as it was read, {{ width }} by {{ height }} pixels
{%- if said %}, with a map of where {{ said }} comes from{% endif %}"
{%- if window %} data-level="{{ window[0] }}" data-width="{{ window[1] }}"{% endif %}>
<figcaption>{% if said %}<div class="ldm-where"><b>Where {{ said }} comes from:</b>{{ legend }}</div>{% endif %}
{% if unit %}<p class="ldm-pointer">Turn the wheel over the image for the next {{ unit }}.</p>{% endif %}
{% if window %}<p class="ldm-pointer">Drag on the image for another window: up and down its level, left and right its
width.</p>{% endif %}
{{ width }} by {{ height }} pixels (width by height). What was done to them:<ol>
{% for step in steps %}
<li>{{ step }}</li>
{% endfor %}
</ol></figcaption></figure>"""


@dataclass(frozen=True, eq=False)
class View:
    """What an answer keeps of the picture that it is about.

    Attributes:
        url, thumbnail: the picture, of at most 640 pixels a side, and a small one.
        size: (height, width) of the picture itself.
        steps: what was done to its pixels.
        said: which frame, slice or page it is and in which window, on one line.
    """

    url: str
    thumbnail: str
    size: tuple[int, int]
    steps: tuple[str, ...]
    said: str


@dataclass(frozen=True, eq=False)
class Shown:
    """The picture on the screen; another slice or window of the same file is another one.

    Attributes:
        picture: as it was read.
        source: the uploaded file, if another picture can be read from it.
        chosen: all arguments of `read_medical_image` that can be chosen for it, as they are.
        refusal: why there is no picture, although there is a file.
        upload: where the file was, to know it again.
        view: what answers about the picture keep of it.
    """

    picture: MedicalImage | None = None
    source: bytes = b""
    chosen: dict = field(default_factory=dict)
    refusal: str = ""
    upload: str = ""
    view: View | None = field(init=False, default=None)

    def __post_init__(self):
        if self.picture is None:
            return
        image, steps = self.picture.image, self.picture.steps
        said = "; ".join(str(step) for step in steps if step.kind in ("choice", "levels")) or "read as it is"
        url, thumbnail = image_as_url(image), image_as_url(image, side=64)
        view = View(url, thumbnail, self.picture.size, tuple(map(str, steps)) or ("nothing: read as it is",), said)
        object.__setattr__(self, "view", view)


def read_file(source: bytes, upload: str = "", **chosen) -> Shown:
    """The picture in a file; that of its first page or volume where one must be chosen and is not.

    Args:
        source: what is in the file.
        upload: where it was.
        chosen: arguments of `read_medical_image`.

    Raises:
        MedicalImageError, ImportError: as `read_medical_image` does.
    """
    read = partial(read_medical_image, source, max_pixels=MAX_PIXELS, **chosen)
    try:
        picture = read()
    except MedicalImageError as error:
        if error.missing == "allow_burned_in":
            return Shown(None, source, {"allow_burned_in": False}, _BURNED_IN, upload)
        if error.missing is None:
            raise
        picture = read(**{error.missing: 0})
    can_be_chosen = {name: index[1] if index else chosen.get(name) for name, index in picture.choices.items()}
    if "allow_burned_in" in chosen:
        can_be_chosen["allow_burned_in"] = True
    return Shown(picture, source if can_be_chosen else b"", can_be_chosen, upload=upload)


def read_upload(files: Sequence[str], max_file_size: int) -> Shown:
    """Read the uploaded file and delete it, whatever happens."""
    try:
        if len(files) > 1:
            raise ValueError(f"{len(files)} files came with the question; allowed is one.")
        size = Path(files[0]).stat().st_size
        if size > max_file_size:
            raise ValueError(f"The file has {size / 1e6:.1f} MB; allowed are {max_file_size / 1e6:.1f} MB.")
        return read_file(Path(files[0]).read_bytes(), files[0])
    finally:
        for file in map(Path, files):
            file.unlink(missing_ok=True)
            with suppress(OSError):  # named after the content; not empty if another file has the same
                file.parent.rmdir()


def show_picture(shown: Shown, evidence: Evidence | None = None, said: str = "") -> str:
    """The picture as it was read, and what was done to its pixels; over it where what was `said` comes from."""
    if shown.picture is None:
        return '<p class="ldm-picture">No image yet.</p>'
    (height, width), place = shown.view.size, _place(shown)
    url = shown.view.url if evidence is None else image_as_url(shown.picture.image, evidence)
    return str(render(
        _PICTURE, url=url, width=width, height=height, steps=shown.view.steps, said=said,
        window=shown.picture.window if "window" in shown.chosen else None, unit=place and place[0],
        legend="" if evidence is None else show_legend(evidence),
    ))  # fmt: skip


def _place(shown: Shown) -> tuple[str, int, int] | None:
    """What is counted of frames, pages or slices, which of them it is and how many there are, if there are several."""
    choices = {} if shown.picture is None else shown.picture.choices
    return next((choices[name] for name in _INDICES if choices.get(name)), None)


class Controls:
    """Sliders, menus and the like for another picture from the same file; each is shown where its file offers it."""

    def __init__(self, gradio):
        self._update = gradio.update
        self.place, self.volume = (
            gradio.Slider(0, 1, 0, step=1, precision=0, visible=False, label=label, buttons=[], elem_id=name)
            for label, name in (("Frame, page or slice", "ldm-place"), ("Volume", "ldm-volume"))
        )
        self.window = gradio.Dropdown(
            [_DEFAULT, *WINDOW_PRESETS], value=_DEFAULT, allow_custom_value=True, visible=False,
            label="Window (grey values to show)",
            info="A preset in Hounsfield units, or LEVEL/WIDTH, such as 40/400. The default is the file's own.",
        )  # fmt: skip
        self.axis = gradio.Radio([*reversed(AXES)], value="axial", visible=False, label="Axis")
        self.background = gradio.Dropdown(
            [_DEFAULT, "black", "white"], value=_DEFAULT, allow_custom_value=True, visible=False,
            label="Background (of transparent pixels)",
            info="A colour's name, or #rrggbb. The default shows the colours that transparency hid.",
        )  # fmt: skip
        self.burned_in = gradio.Checkbox(label="Burned-in text: read the file anyway", visible=False)
        self.all = [self.place, self.volume, self.axis, self.window, self.background, self.burned_in]

    def show(self, shown: Shown) -> dict:
        """Show the controls for what can be chosen from the file, and hide the others."""
        update, chosen = self._update, shown.chosen

        def slider(counted):
            unit, index, count = counted or ("frame", 0, 2)
            visible = counted is not None
            return update(visible=visible, label=f"{unit.capitalize()} (from 0)", maximum=count - 1, value=index)

        windows = [_DEFAULT, *([_FULL_RANGE] if "full_range" in chosen else []), *WINDOW_PRESETS]
        window = _FULL_RANGE if chosen.get("full_range") else chosen.get("window") or _DEFAULT
        return {
            self.place: slider(_place(shown)),
            self.volume: slider(shown.picture and shown.picture.choices.get("time_index")),
            self.axis: update(visible="axis" in chosen, value=chosen.get("axis") or "axial"),
            self.window: update(visible="window" in chosen, choices=windows, value=window),
            self.background: update(visible="background" in chosen, value=chosen.get("background") or _DEFAULT),
            self.burned_in: update(visible="allow_burned_in" in chosen, value=bool(chosen.get("allow_burned_in"))),
        }

    @staticmethod
    def wanted(shown: Shown, place, volume, axis, window, background, burned_in) -> dict:
        """Arguments of `read_medical_image` by the values of the controls, of which some may be of no use now."""
        values = [(text or _DEFAULT).strip() for text in (axis, window, background)]
        axis, window, background = (None if value == _DEFAULT else value for value in values)
        given = {
            "time_index": volume, "axis": None if axis == "axial" else axis, "background": background,
            "window": None if window == _FULL_RANGE else window, "full_range": window == _FULL_RANGE or None,
            "allow_burned_in": burned_in,
        }  # fmt: skip
        return {argument: given.get(argument, place) for argument in shown.chosen}


__all__ = ["CONTROLS", "MAX_PIXELS", "Controls", "Shown", "View", "read_file", "read_upload", "show_picture"]
