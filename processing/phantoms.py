"""Synthetic biomedical pictures with questions whose answers are known: the data of the demo and of the tests.

No medical image can ship with a package, yet a newcomer should see a masked-diffusion vision-language model answer
real questions in seconds. So this module draws its own: five domains (chest X-ray, MRI, CT, histology, gross
pathology, as in the biomedical chat benchmark of LLaVA-Med), each with the same few attributes, and asks about them.
The drawings are cartoons; nothing here says anything about how a model does on patients.

*Left* and *right* are always the sides of the IMAGE as displayed, never the patient's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image


DOMAINS = ("chest_xray", "mri", "ct", "histology", "gross")
SIDES = ("left", "right")
SHAPES = ("solid", "ring", "star")
SIZES = ("small", "large")
PLANES = ("axial", "coronal")
KINDS = ("closed", "open", "description")
# A question that no demo model was trained on, to see whether fine-tuning teaches it: never drawn unless asked for.
NEW_KIND = "new"
NEW_CLOSED_KIND = "new_closed"  # another one, answered by Yes or No
# The wrong answer to a closed question.
OPPOSITE = {"Yes": "No", "No": "Yes", "Axial": "Coronal", "Coronal": "Axial"}

_MODALITY = {
    "chest_xray": "chest X-ray",
    "mri": "MRI scan",
    "ct": "CT scan",
    "histology": "histology slide",
    "gross": "gross photograph",
}
_ORGAN = {"chest_xray": "lungs", "mri": "brain", "ct": "abdomen", "histology": "tissue", "gross": "liver"}
_SIGN = {
    "chest_xray": "an enlarged heart",
    "mri": "enlarged ventricles",
    "ct": "a rim of fluid",
    "histology": "a brown stain",
    "gross": "a scale bar",
}
_COUNT = ("no", "one", "two", "three")

# Topics of the closed and the open questions, with two wordings each; `{x}` is filled in from the picture's domain.
_WORDINGS = {
    "is_domain": ("Is this a {x}?", "Does the image show a {x}?"),
    "any_lesion": ("Is there a lesion?", "Does the image show any lesion?"),
    "sign": ("Is there {x}?", "Does the image show {x}?"),
    "on_left": ("Is the lesion on the left side?", "Does the left side of the image show a lesion?"),
    "several": ("Is there more than one lesion?", "Does the image show several lesions?"),
    "is_large": ("Is the lesion large?", "Does the image show a large lesion?"),
    "which_plane": ("Is the plane axial or coronal?", "Which plane is shown, axial or coronal?"),
    "modality": ("What is the imaging modality?", "What kind of image is this?"),
    "side": ("Which side is the lesion on?", "Where is the lesion?"),
    "count": ("How many lesions are there?", "What is the number of lesions?"),
    "shape": ("What shape is the lesion?", "What is the form of the lesion?"),
    "organ": ("Which organ is shown?", "What part of the body is this?"),
    "description": ("Describe the image.", "What does the image show?"),
    "free_side": ("Which side is free of lesions?", "Which side shows no lesion?"),
    "only_one": ("Is there only one lesion?", "Does the image show just one lesion?"),
}
_TOPICS = {
    "closed": ("is_domain", "any_lesion", "sign", "on_left", "several", "is_large", "which_plane"),
    "open": ("modality", "side", "count", "shape", "organ"),
    "description": ("description",),
    NEW_KIND: ("free_side",),
    NEW_CLOSED_KIND: ("only_one",),
}
# The possible answers of topics whose answers are not yes or no.
_CANDIDATES = {
    "which_plane": PLANES,
    "modality": (*_MODALITY.values(),),
    "side": SIDES,
    "free_side": SIDES,
    "count": ("none", *_COUNT[1:]),
    "shape": SHAPES,
    "organ": (*_ORGAN.values(),),
}
_KIND_OF = {topic: kind for kind, topics in _TOPICS.items() for topic in topics}
# `SEED:COUNT`, `SEED:COUNT:KINDS` or `SEED:COUNT:KINDS:QUESTIONS`.
_SETS = re.compile(r"(\d+):(\d+)(?::([^:]*)(?::(0*[1-9]\d*))?)?", re.ASCII)
_NEED_A_LESION = ("on_left", "several", "is_large", "side", "shape", "free_side", "only_one")


@dataclass(frozen=True)
class PhantomAttributes:
    """What is in a phantom. All its lesions have the same side, shape and size.

    Attributes:
        domain: one of `DOMAINS`.
        count: number of lesions, 0 to 3.
        side: one of `SIDES` (of the image).
        shape: one of `SHAPES`.
        size: one of `SIZES`.
        sign: whether the domain's incidental sign is present (enlarged heart, enlarged ventricles, rim of fluid,
            brown stain, scale bar).
        plane: one of `PLANES`; only MRI and CT look different for it.
    """

    domain: str
    count: int
    side: str
    shape: str
    size: str
    sign: bool
    plane: str

    def __post_init__(self):
        allowed = {"domain": DOMAINS, "count": (0, 1, 2, 3), "side": SIDES, "shape": SHAPES, "size": SIZES}
        allowed |= {"sign": (False, True), "plane": PLANES}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; allowed are {values}.")

    @property
    def has_plane(self) -> bool:
        """Whether the plane can be seen in the picture."""
        return self.domain in ("mri", "ct")

    def describe(self) -> str:
        """One sentence that names everything there is to see."""
        plane = f"{self.plane} " if self.has_plane else ""
        lesions = "no lesion"
        if self.count:
            plural = "s" if self.count > 1 else ""
            lesions = f"{_COUNT[self.count]} {self.size} {self.shape} lesion{plural} on the {self.side}"
        sign = f" and {_SIGN[self.domain]}" if self.sign else ""
        return f"The {plane}{_MODALITY[self.domain]} of the {_ORGAN[self.domain]} shows {lesions}{sign}."


@dataclass(frozen=True)
class PhantomExample:
    """One question about one phantom.

    Attributes:
        image: RGB `PIL.Image`, `image_size` pixels square.
        question: the question, without any image placeholder.
        answer: the reference answer.
        kind: one of `KINDS`, `NEW_KIND` or `NEW_CLOSED_KIND`; closed answers are Yes, No, Axial or Coronal.
        topic: what is asked about, for example `"on_left"`.
        attributes: what was drawn.
        lesions: the pixels of each lesion, at least half covered by it: bool `(count, image_size, image_size)`.
    """

    image: Image.Image
    question: str
    answer: str
    kind: str
    topic: str
    attributes: PhantomAttributes
    lesions: np.ndarray = field(compare=False, repr=False)

    def messages(self) -> list[dict]:
        """The question as chat messages for `processor.apply_chat_template`."""
        content = [{"type": "image", "image": self.image}, {"type": "text", "text": self.question}]
        return [{"role": "user", "content": content}]


def parse_phantoms(text: str) -> dict:
    """Arguments of [`PhantomVQA`] from `SEED:COUNT`, `SEED:COUNT:KINDS` or `SEED:COUNT:KINDS:QUESTIONS`, as in
    `7:2000:closed,is_domain,open:8`, which asks eight questions about each picture.

    Raises:
        ValueError: for other texts; the message says what is allowed.
    """
    match, allowed = _SETS.fullmatch(text), tuple(dict.fromkeys((*_TOPICS, *_KIND_OF)))
    kinds = list(KINDS) if match is None or match[3] is None else match[3].split(",")
    if match is None or not set(kinds) <= set(allowed):
        raise ValueError(
            f"allowed is SEED:COUNT, SEED:COUNT:KINDS or SEED:COUNT:KINDS:QUESTIONS, with kinds of {allowed}, "
            "separated by commas, and 1 or more questions about each picture"
        )
    numbers = {"seed": match[1], "length": match[2], "questions_per_picture": match[4]}
    return {name: int(number) for name, number in numbers.items() if number is not None} | {"kinds": kinds}


class PhantomVQA(Sequence):
    """A seeded, endless-looking set of phantom questions: example `i` depends on the other arguments and `i` only.

    With one question about each picture, every closed question is as often answered one way as the other and every
    short open answer is equally likely, so a model that cannot see stays near chance. With more, the pictures come
    first and the answers are as frequent as what they show.

    Args:
        seed (`int`): the set; use different seeds for training and for testing.
        length (`int`): how many examples `len()` reports and iteration yields.
        kinds (sequence of `str`): which kinds of question, or single topics, drawn with equal probability per
            repetition, so that `("closed", "closed", "open")` asks closed questions twice as often as open ones.
        image_size (`int`): side of the pictures in pixels, at least 16.
        questions_per_picture (`int`): how many examples in a row are about the same picture. With more than one, each
            topic that a picture allows is asked about once before any is a second time.

    Raises:
        ValueError: for a kind or topic that does not exist, a negative length or seed, a smaller image, no questions.
    """

    def __init__(
        self,
        seed: int,
        length: int,
        kinds: Sequence[str] = KINDS,
        image_size: int = 64,
        questions_per_picture: int = 1,
    ):
        unknown = set(kinds) - set(_TOPICS) - set(_KIND_OF)
        if unknown or not kinds:
            raise ValueError(
                f"`kinds` is {tuple(kinds)}; allowed are one or more of {tuple(_TOPICS)}, or topics: {tuple(_KIND_OF)}."
            )
        if seed < 0 or length < 0:
            raise ValueError(f"`seed` is {seed} and `length` is {length}; both must be 0 or more.")
        if image_size < 16:
            raise ValueError(f"`image_size` is {image_size}; at least 16 pixels are needed.")
        if questions_per_picture < 1:
            raise ValueError(f"`questions_per_picture` is {questions_per_picture}; it must be 1 or more.")
        self.seed, self.length, self.kinds, self.image_size = seed, length, tuple(kinds), image_size
        self.questions_per_picture = questions_per_picture
        self.topics = {topic: (topic,) for topic in _KIND_OF} | _TOPICS

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> PhantomExample:
        if not isinstance(index, (int, np.integer)):
            raise TypeError(f"`index` is {index!r}; a PhantomVQA set is indexed by single integers.")
        index = range(self.length)[index]  # negative indices and IndexError as for a list
        picture, number = divmod(int(index), self.questions_per_picture)
        rng = np.random.default_rng([self.seed, picture])
        if self.questions_per_picture == 1:
            topics = self.topics[self.kinds[rng.integers(len(self.kinds))]]
            topic = topics[rng.integers(len(topics))]
            attributes, filler = _choose_picture(topic, rng)
            wording = rng.integers(2)
        else:
            topics = []
            while not topics:
                attributes = sample_attributes(rng)
                topics = [
                    topic
                    for kind in dict.fromkeys(self.kinds)
                    for topic in self.topics[kind]
                    if _can_be_asked(topic, attributes)
                ]
            topic = topics[rng.permutation(len(topics))[number % len(topics)]]
            of_question = np.random.default_rng([self.seed, picture, number])
            filler = _fill_in(topic, attributes, bool(of_question.integers(2)), of_question)
            wording = of_question.integers(2)
        question = _WORDINGS[topic][wording].format(x=filler)
        image, lesions = _draw_phantom(attributes, rng, self.image_size)
        answer = _answer(topic, attributes, filler)
        return PhantomExample(image, question, answer, _KIND_OF[topic], topic, attributes, lesions)


def sample_attributes(rng: np.random.Generator) -> PhantomAttributes:
    """Draw independent attributes; 40 % of the phantoms have no lesion."""
    return PhantomAttributes(
        domain=_pick(rng, DOMAINS),
        count=int(rng.choice(4, p=[0.4, 0.2, 0.2, 0.2])),
        side=_pick(rng, SIDES),
        shape=_pick(rng, SHAPES),
        size=_pick(rng, SIZES),
        sign=bool(rng.integers(2)),
        plane=_pick(rng, PLANES),
    )


def _pick(rng, values):
    return values[rng.integers(len(values))]


def _choose_picture(topic, rng):
    """Choose the answer first and then a phantom that has it: this is what balances the questions.

    Returns the attributes and the text for the wording's `{x}`.
    """
    attributes = sample_attributes(rng)
    yes = bool(rng.integers(2))
    with_lesion = replace(attributes, count=int(rng.integers(1, 4)))
    filler = _fill_in(topic, attributes, yes, rng)
    if topic in _NEED_A_LESION:
        attributes = with_lesion
    if topic == "any_lesion":
        attributes = with_lesion if yes else replace(attributes, count=0)
    changes = {
        "sign": lambda: {"sign": yes},
        "on_left": lambda: {"side": "left" if yes else "right"},
        "several": lambda: {"count": int(rng.integers(2, 4)) if yes else 1},
        "only_one": lambda: {"count": 1 if yes else int(rng.integers(2, 4))},
        "is_large": lambda: {"size": "large" if yes else "small"},
        "which_plane": lambda: {"domain": _pick(rng, ("mri", "ct"))},
        "count": lambda: {"count": int(rng.integers(4))},
    }
    return replace(attributes, **changes.get(topic, dict)()), filler


def _can_be_asked(topic, attributes) -> bool:
    if topic == "which_plane":
        return attributes.has_plane
    return attributes.count > 0 or topic not in _NEED_A_LESION


def _fill_in(topic, attributes, yes, rng) -> str | None:
    """The text for the wording's `{x}`: what the picture is, or else what it is not; or the sign of its domain."""
    if topic == "is_domain":
        others = [domain for domain in DOMAINS if domain != attributes.domain]
        return _MODALITY[attributes.domain if yes else _pick(rng, others)]
    return _SIGN[attributes.domain] if topic == "sign" else None


def candidates_of(topic: str) -> list[str] | None:
    """The possible answers of a topic, as questions about it are answered; `None` for descriptions."""
    if topic == "description":
        return None
    return [each[0].upper() + each[1:] for each in _CANDIDATES.get(topic, ("yes", "no"))]


def _answer(topic, attributes, filler) -> str:
    modality = _MODALITY[attributes.domain]
    answer = {
        "is_domain": filler == modality,
        "any_lesion": attributes.count > 0,
        "sign": attributes.sign,
        "on_left": attributes.side == "left",
        "several": attributes.count > 1,
        "only_one": attributes.count == 1,
        "is_large": attributes.size == "large",
        "which_plane": attributes.plane,
        "modality": modality,
        "side": attributes.side,
        "free_side": SIDES[1 - SIDES.index(attributes.side)],
        "count": _CANDIDATES["count"][attributes.count],
        "shape": attributes.shape,
        "organ": _ORGAN[attributes.domain],
        "description": attributes.describe(),
    }[topic]
    if isinstance(answer, bool):
        return "Yes" if answer else "No"
    return answer[0].upper() + answer[1:]


def draw_phantom(attributes: PhantomAttributes, rng: np.random.Generator, image_size: int = 64) -> Image.Image:
    """Draw one phantom.

    Args:
        attributes: what to draw.
        rng: source of everything that varies without being asked about (position, scale, brightness, texture, noise).
        image_size: side of the square picture in pixels.

    Returns:
        An RGB `PIL.Image`.
    """
    return _draw_phantom(attributes, rng, image_size)[0]


def _draw_phantom(attributes, rng, image_size) -> tuple[Image.Image, np.ndarray]:
    """The picture and the pixels of each lesion `(count, image_size, image_size)`."""
    scale = rng.uniform(0.94, 1.06)
    shift_x, shift_y = rng.uniform(-0.05, 0.05, 2).tolist()
    axis = (np.arange(image_size, dtype=np.float32) + 0.5) * (2 / image_size) - 1
    canvas = _Canvas((axis[None, :] - shift_x) / scale, (axis[:, None] - shift_y) / scale, image_size)
    _DRAW[attributes.domain](canvas, attributes, rng)
    pixels = canvas.pixels * rng.uniform(0.88, 1.12) + rng.uniform(-0.04, 0.04)
    pixels = pixels + 0.03 * rng.standard_normal((*pixels.shape[:2], 1), dtype=np.float32)
    image = Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8), "RGB")
    return image, np.array(canvas.coverages).reshape(-1, image_size, image_size) >= 0.5


class _Canvas:
    """An RGB picture in −1…1 coordinates (x to the right, y down) on which shapes are blended with soft edges."""

    def __init__(self, x, y, image_size):
        self.x, self.y = np.broadcast_arrays(x, y)
        self.softness = image_size / 2  # a distance of one pixel is 1 after this factor
        self.pixels = np.zeros((image_size, image_size, 3), dtype=np.float32)
        self.coverages = []  # of the lesions, each 0…1

    def inside(self, signed_distance):
        """Coverage 0…1 from a distance that is negative inside: a sigmoid about one pixel wide."""
        return 0.5 - 0.5 * np.tanh(signed_distance * (1.5 * self.softness))

    def ellipse(self, cx, cy, rx, ry):
        radius = np.sqrt(((self.x - cx) / rx) ** 2 + ((self.y - cy) / ry) ** 2)
        return self.inside((radius - 1) * min(rx, ry))

    def box(self, x0, x1, y0, y1):
        outside_x = np.maximum(x0 - self.x, self.x - x1)
        outside_y = np.maximum(y0 - self.y, self.y - y1)
        return self.inside(np.maximum(outside_x, outside_y))

    def paint(self, coverage, color, opacity=1.0):
        """Blend `color` (grey level or RGB, or an array of them) over the picture where `coverage` is 1."""
        weight = (coverage * opacity)[..., None]
        self.pixels += weight * (np.asarray(color, dtype=np.float32) - self.pixels)

    def texture(self, rng, cells=5):
        """Smooth random field with values of about −1…1."""
        coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32), "F")
        return np.asarray(coarse.resize(self.x.shape[::-1], Image.Resampling.BICUBIC))

    def lesions(self, attributes, rng, color, center, reach):
        """Place the lesions one above the other around (±center[0], center[1]), moved by up to `reach`."""
        radius = 0.12 if attributes.size == "small" else 0.195
        sign = -1 if attributes.side == "left" else 1
        pitch = 2 * radius + 0.04
        spread = max(reach[1] - (attributes.count - 1) / 2 * pitch - radius, 0)
        drift = rng.uniform(-spread, spread)
        for index in range(attributes.count):
            offset = (index - (attributes.count - 1) / 2) * pitch
            cx = sign * (center[0] + rng.uniform(-reach[0], reach[0]))
            cy = center[1] + drift + offset
            dx, dy = np.abs(self.x - cx), np.abs(self.y - cy)
            if attributes.shape == "star":  # an astroid: four thin points
                distance = (dx**0.62 + dy**0.62) ** (1 / 0.62) - 1.35 * radius
            else:
                distance = np.sqrt(dx**2 + dy**2)
                ring = attributes.shape == "ring"
                distance = np.abs(distance - 0.74 * radius) - 0.26 * radius if ring else distance - radius
            self.coverages.append(self.inside(distance))
            self.paint(self.coverages[-1], color)


def _draw_chest_xray(canvas, attributes, rng):
    canvas.paint(np.ones_like(canvas.x), 0.1)
    canvas.paint(canvas.ellipse(0, 0.02, 0.95, 1.0), 0.62)
    lungs = canvas.ellipse(-0.43, -0.1, 0.31, 0.64) + canvas.ellipse(0.43, -0.1, 0.31, 0.64)
    canvas.paint(np.clip(lungs, 0, 1), 0.24)
    ribs = np.sin(2 * np.pi * (canvas.y * 3.2 + canvas.x**2 * 1.2 + rng.uniform()))
    canvas.paint(np.clip(lungs, 0, 1) * (ribs > 0.4), 0.34, 0.6)
    canvas.paint(canvas.box(-0.08, 0.08, -1, 1), 0.78, 0.8)
    width = 0.40 if attributes.sign else 0.21
    canvas.paint(canvas.ellipse(0.04, 0.42, width, 0.26), 0.74)
    canvas.lesions(attributes, rng, 0.97, (0.45, -0.18), (0.06, 0.52))


def _draw_mri(canvas, attributes, rng):
    axial = attributes.plane == "axial"
    cy, rx, ry = (0.0, 0.72, 0.90) if axial else (-0.2, 0.72, 0.70)
    canvas.paint(np.ones_like(canvas.x), 0.03)
    if not axial:
        canvas.paint(canvas.box(-0.2, 0.2, 0.3, 1.2), 0.36)
    canvas.paint(canvas.ellipse(0, cy, rx, ry), 0.85)
    canvas.paint(canvas.ellipse(0, cy, rx - 0.06, ry - 0.06), 0.12)
    canvas.paint(canvas.ellipse(0, cy, rx - 0.1, ry - 0.1), 0.44)
    canvas.paint(canvas.ellipse(0, cy, rx - 0.1, ry - 0.1), 0.44 + 0.05 * canvas.texture(rng)[..., None])
    canvas.paint(canvas.box(-0.015, 0.015, cy - ry + 0.12, cy + ry - 0.12), 0.14)
    width = 0.15 if attributes.sign else 0.055
    for side in (-1, 1):
        canvas.paint(canvas.ellipse(side * (width + 0.01), cy, width, 0.24), 0.1)
    canvas.lesions(attributes, rng, 0.98, (0.40, cy), (0.04, ry - 0.2))


def _draw_ct(canvas, attributes, rng):
    axial = attributes.plane == "axial"
    rx, ry = (0.94, 0.74) if axial else (0.76, 0.98)
    canvas.paint(np.ones_like(canvas.x), 0.03)
    canvas.paint(canvas.ellipse(0, 0, rx, ry), 0.3)
    # The sign is a dark rim of fluid inside the fat ring, so the soft tissue within it is smaller.
    inner = 0.17 if attributes.sign else 0.05
    canvas.paint(canvas.ellipse(0, 0, rx - 0.05, ry - 0.05), 0.16 if attributes.sign else 0.55)
    canvas.paint(canvas.ellipse(0, 0, rx - inner, ry - inner), 0.55)
    if axial:
        canvas.paint(canvas.ellipse(-0.38, -0.03, 0.36, 0.36), 0.68)
        canvas.paint(canvas.ellipse(0.48, -0.03, 0.24, 0.3), 0.64)
        canvas.paint(canvas.ellipse(0, 0.38, 0.12, 0.1), 0.98)
        canvas.paint(canvas.box(-0.03, 0.03, 0.44, 0.62), 0.95)
    else:
        canvas.paint(canvas.ellipse(-0.34, -0.2, 0.28, 0.36), 0.68)
        canvas.paint(canvas.ellipse(0.38, -0.2, 0.2, 0.3), 0.64)
        segments = (np.sin(2 * np.pi * (canvas.y * 3.5 + rng.uniform())) > -0.4).astype(np.float32)
        canvas.paint(canvas.box(-0.07, 0.07, -0.95, 0.95) * segments, 0.97)
        for side in (-1, 1):
            canvas.paint(canvas.ellipse(side * 0.36, 0.84, 0.14, 0.14), 0.95)
    canvas.lesions(attributes, rng, 0.04, (0.42, -0.04), (0.05, 0.58))


def _draw_histology(canvas, attributes, rng):
    pink, brown = ((0.93, 0.72, 0.86), (0.55, 0.36, 0.70)), ((0.84, 0.74, 0.58), (0.52, 0.30, 0.10))
    stain, nucleus = brown if attributes.sign else pink
    field = np.asarray(stain, dtype=np.float32) + 0.09 * canvas.texture(rng, 6)[..., None]
    canvas.paint(np.ones_like(canvas.x), field)
    count = int(rng.integers(30, 46))
    cx, cy = rng.uniform(-1, 1, (2, count, 1, 1)).astype(np.float32)
    nearest = np.sqrt(((canvas.x - cx) ** 2 + (canvas.y - cy) ** 2).min(axis=0)) - 0.04
    canvas.paint(canvas.inside(nearest), nucleus, 0.85)
    canvas.lesions(attributes, rng, (0.20, 0.05, 0.40), (0.46, 0.0), (0.2, 0.85))


def _draw_gross(canvas, attributes, rng):
    blue = np.asarray((0.22, 0.42, 0.66)) + rng.uniform(-0.06, 0.06, 3)
    canvas.paint(np.ones_like(canvas.x), blue)
    organ = np.asarray((0.58, 0.17, 0.12)) + rng.uniform(-0.05, 0.05, 3)
    texture = organ + 0.08 * canvas.texture(rng)[..., None]
    canvas.paint(canvas.ellipse(0, -0.1, 0.8, 0.68), texture)
    canvas.lesions(attributes, rng, (0.96, 0.86, 0.52), (0.40, -0.1), (0.08, 0.58))
    if attributes.sign:
        stripes = np.where(np.sin(2 * np.pi * canvas.x * 6) > 0, 0.95, 0.05)[..., None]
        canvas.paint(canvas.box(-0.6, 0.6, 0.76, 0.88), np.repeat(stripes, 3, axis=-1))


_DRAW = {
    "chest_xray": _draw_chest_xray,
    "mri": _draw_mri,
    "ct": _draw_ct,
    "histology": _draw_histology,
    "gross": _draw_gross,
}
