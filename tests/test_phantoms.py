"""Phantoms: what is asked about them is there to be seen, and no answer can be guessed."""

from collections import Counter
from dataclasses import replace
from math import gamma, pi

import numpy as np
import pytest

from lladamedv.processing.phantoms import (
    DOMAINS,
    PhantomAttributes,
    PhantomVQA,
    draw_phantom,
    parse_phantoms,
)


BASE = PhantomAttributes("ct", 2, "left", "solid", "small", False, "axial")


def drawn(seed, **changes):
    return np.asarray(draw_phantom(replace(BASE, **changes), np.random.default_rng(seed)), dtype=float)


def test_examples_depend_on_seed_and_index_only():
    first, second = PhantomVQA(1, 100), PhantomVQA(1, 5)
    assert first[3].question == second[3].question and first[3].image.tobytes() == second[3].image.tobytes()
    assert PhantomVQA(2, 100)[3].image.tobytes() != first[3].image.tobytes()
    assert first[-1].image.tobytes() == first[99].image.tobytes() and len(list(second)) == 5


def test_closed_questions_are_balanced():
    answers = {}
    for example in PhantomVQA(5, 2_000, ("closed",), image_size=16):
        answers.setdefault(example.topic, Counter())[example.answer] += 1
    assert len(answers) == 7
    for topic, counts in answers.items():
        share = max(counts.values()) / counts.total()
        assert len(counts) == 2 and share < 0.62, (topic, counts)


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_lesions_are_drawn_on_their_side(domain, side):
    """Against the same drawing with lesions of another shape: what differs lies in that half of the image."""
    for seed in range(5):
        solid, star = (drawn(seed, domain=domain, side=side, size="large", shape=each) for each in ("solid", "star"))
        columns = np.nonzero(np.abs(solid - star).sum(-1).max(axis=0) > 100)[0]
        assert len(columns) and (columns.mean() < 32) == (side == "left")


@pytest.mark.parametrize("change", [
    {"domain": "mri"}, {"shape": "ring"}, {"size": "large"}, {"sign": True}, {"side": "right"}, {"plane": "coronal"}
])  # fmt: skip
def test_every_attribute_shows(change):
    assert (np.abs(drawn(1) - drawn(1, **change)).max(-1) > 60).sum() > 5


def test_description_names_everything():
    attributes = PhantomAttributes("mri", 3, "right", "ring", "large", True, "coronal")
    assert attributes.describe() == (
        "The coronal MRI scan of the brain shows three large ring lesions on the right and enlarged ventricles."
    )
    assert replace(attributes, count=0, sign=False).describe() == "The coronal MRI scan of the brain shows no lesion."


@pytest.mark.parametrize(("arguments", "message"), [
    ((0, 5, ("yes",)), "`kinds` is"),
    ((0, 5, ()), "`kinds` is"),
    ((-1, 5), "`seed` is -1"),
    ((0, 5, ("open",), 8), "`image_size` is 8"),
    ((0, 5, ("open",), 64, 0), "`questions_per_picture` is 0"),
])  # fmt: skip
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PhantomVQA(*arguments)


def test_bad_attributes_and_indices():
    with pytest.raises(ValueError, match="`count` is 4; allowed are"):
        replace(BASE, count=4)
    with pytest.raises(IndexError):
        PhantomVQA(0, 3)[3]
    with pytest.raises(TypeError, match="`index` is '1'"):
        PhantomVQA(0, 3)["1"]


def test_several_questions_about_a_picture():
    """Every answer is what the picture's description says; each topic is asked about once before any is again."""
    examples = list(PhantomVQA(3, 400, image_size=16, questions_per_picture=8))
    for number, example in enumerate(examples):
        first = examples[number // 8 * 8]
        assert example.image.tobytes() == first.image.tobytes() and example.attributes == first.attributes
        said, lesion = example.attributes.describe(), "no lesion" not in example.attributes.describe()
        yes = {
            "is_domain": example.question.removesuffix("?").split(" a ")[-1].split(" an ")[-1] in said,
            "any_lesion": lesion,
            "sign": " and " in said,
            "on_left": "on the left" in said,
            "several": " two " in said or " three " in said,
            "is_large": " large " in said,
        }
        if example.topic in yes:
            assert example.answer == ("Yes" if yes[example.topic] else "No"), (example, said)
        elif example.answer == "None":
            assert not lesion
        else:
            assert example.answer.lower() in said.lower() and (lesion or "lesion" not in example.question), example
    for start in range(0, 400, 8):
        topics = Counter(example.topic for example in examples[start : start + 8])
        assert max(topics.values()) - min(topics.values()) <= 1


def test_topics_as_kinds():
    examples = list(PhantomVQA(3, 60, ["is_domain", "open"]))
    assert {example.kind for example in examples} == {"closed", "open"}
    assert {example.topic for example in examples if example.kind == "closed"} == {"is_domain"}


@pytest.mark.parametrize(("text", "arguments"), [
    ("3:60", {"seed": 3, "length": 60, "kinds": ["closed", "open", "description"]}),
    ("3:60:is_domain,open", {"seed": 3, "length": 60, "kinds": ["is_domain", "open"]}),
    ("3:60:open:8", {"seed": 3, "length": 60, "kinds": ["open"], "questions_per_picture": 8}),
    *((text, None) for text in ("3", "3:60:", "3:60:is_it", "3:60:open:0", "3:60:open:x", "3:60:open:8:8", "3:²")),
])  # fmt: skip
def test_sets_as_text(text, arguments):
    if arguments is not None:
        assert parse_phantoms(text) == arguments
    else:
        with pytest.raises(ValueError, match="allowed is SEED:COUNT"):
            parse_phantoms(text)


def area(shape, radius):
    """Of a disk, of a ring whose inner radius is 0.48 of the outer one, and of an astroid |x|^p + |y|^p = a^p."""
    if shape == "star":
        power, reach = 0.62, 1.35 * radius
        return 4 * reach**2 * gamma(1 + 1 / power) ** 2 / gamma(1 + 2 / power)
    return pi * radius**2 * (1 - 0.48**2 if shape == "ring" else 1)


def test_the_pixels_of_lesions():
    """As many as the attributes say, on their side, and of the area of their shape."""
    for example in PhantomVQA(7, 60, ("open",), image_size=256):
        attributes, lesions = example.attributes, example.lesions
        assert lesions.shape == (attributes.count, 256, 256)
        radius = 128 * (0.12 if attributes.size == "small" else 0.195)
        for lesion in lesions:
            assert (np.nonzero(lesion)[1].mean() < 128) == (attributes.side == "left")
            assert lesion.sum() == pytest.approx(area(attributes.shape, radius), rel=0.2)  # drawn at 0.94 to 1.06
