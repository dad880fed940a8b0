"""Writes the gallery of answers, docs/gallery.md and its pictures: what the shipped demo model says, right or wrong.

    python benchmarks/gallery.py docs

Rules choose the questions, not people: the first held-out question of each topic, the first held-out questions that are
answered wrong, and two pictures that the model does not know.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from lladamedv.conversation import find_evidence, reply_to
from lladamedv.demo import HELD_OUT_SEED, answer, load_model, score
from lladamedv.evaluation.answering import question_about
from lladamedv.evidence import draw_evidence
from lladamedv.processing.phantoms import PhantomVQA


WRONG, SEARCHED, SIDE = 6, 1000, 160

PAGE = """\
# Gallery of answers

See what a model answers, how sure it is, and where in the picture the answer comes from. All answers here are the demo
model's, about pictures that the package draws. For a picture of your own:

```sh
lladamedv ask picture.png "Describe the image." --explain answer.html --where map.png --model path/or/hub-id
```

Each pair shows the picture and the map of the whole answer: orange where hiding a part makes the answer less likely,
blue where more likely ([how to read it](is_it_looking.md)). A map without colour says that no part decides alone:
one of two lesions is enough. A right answer has every word of the true one; to a closed question it is the same.
Confidence is what `generate` returns. `python benchmarks/gallery.py docs` makes this page.

## One of each topic

The first question of each topic among the held-out ones (seed {seed}).

{topics}

## Wrong answers

The first {wrong} that the model answers wrong, of {searched:,} held-out questions. It answers {count} of them wrong.

{mistakes}

## Pictures that it does not know

Pixels of uniform noise, and a picture of one grey. Answers sound alike whether or not there is anything to see. The
warning came for all four here, and [does not always come](answer_sets.md#unusual-pictures).

{unknown}
"""


def right(example, text: str) -> bool:
    return getattr(score([example], [text]), example.kind) == 1


def card(model, processor, image, shown: str, question: str, file: Path, truth: str | None, is_right: bool) -> str:
    """One picture, its map and what was said, as Markdown; draws the pair into a file. Alternative text is `shown`."""
    reply = reply_to(model, processor, image, question)
    evidence = find_evidence(model, processor, image, question, reply)
    pair = Image.new("RGB", (2 * SIDE + 6, SIDE), "white")
    for place, half in enumerate((image, draw_evidence(image, evidence.values, legend=False))):
        pair.paste(half.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (place * (SIDE + 6), 0))
    pair.quantize(64, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(file, optimize=True)
    verdict = "" if truth is None else "right; " if is_right else f"wrong, it is “{truth}”; "
    return "\n\n    ".join(
        (
            f"-   ![{shown} Beside it the map of the answer.](images/gallery/{file.name})",
            f"**{question}**",
            reply.text or "(nothing)",
            f"*{verdict}confidence {reply.confidence:.1%}{'; with a warning: unusual picture' * bool(reply.warning)}*",
        )
    )


def gallery(folder: Path) -> str:
    """The page; its pictures go into `folder / "images/gallery"`, which is made anew."""
    model, processor = load_model()
    pictures = folder / "images" / "gallery"
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir(parents=True)
    examples = list(PhantomVQA(HELD_OUT_SEED, SEARCHED))
    answers = answer(model, processor, [question_about(each.image, each.question) for each in examples])
    by_topic = {each.topic: number for number, each in reversed(list(enumerate(examples)))}
    wrong = [number for number, each in enumerate(examples) if not right(each, answers[number])]

    def cards(numbers) -> str:
        made = [
            card(
                model, processor, each.image, each.attributes.describe(), each.question, pictures / f"{number}.png",
                each.answer, right(each, answers[number]),
            )
            for number, each in ((number, examples[number]) for number in numbers)
        ]  # fmt: skip
        return grid(made)

    def grid(made: list[str]) -> str:
        return '<div class="grid cards" markdown>\n\n' + "\n\n".join(made) + "\n\n</div>"

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    unknown = {"noise": noise, "one grey": Image.new("RGB", (64, 64), "#777777")}
    questions = ("Describe the image.", "Is there a lesion?")
    return PAGE.format(
        seed=HELD_OUT_SEED, searched=SEARCHED, wrong=WRONG, count=len(wrong),
        topics=cards(sorted(by_topic.values())), mistakes=cards(wrong[:WRONG]),
        unknown=grid(
            [
                card(
                    model, processor, image, f"A picture of {name}.", question,
                    pictures / f"{name.split()[-1]}-{number}.png", None, False,
                )
                for name, image in unknown.items()
                for number, question in enumerate(questions)
            ]
        ),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("docs", type=Path, help="folder of the pages")
    folder = parser.parse_args().docs
    (folder / "gallery.md").write_text(gallery(folder), encoding="utf-8")


if __name__ == "__main__":
    main()
