"""Draws the animation of the README: a demo answer being denoised, then where one of its words comes from.

    python benchmarks/denoising_animation.py docs/images/denoising.gif
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lladamedv.conversation import MASK, find_evidence
from lladamedv.demo import load_model
from lladamedv.evidence import draw_evidence
from lladamedv.explanation import explain_answer
from lladamedv.processing.phantoms import PhantomVQA


QUESTION, WORD = "Describe the image.", "two"
WIDTH, HEIGHT, SIDE, MARGIN = 880, 300, 260, 20
INK, GREY, MASKED, NEW = "#222222", "#777777", "#c9ced6", "#d55e00"


def draw(picture, said, canvas, step, marked=None):
    """One frame: the picture on the left, question and canvas on the right; masks are boxes, new tokens orange."""
    frame = Image.new("RGB", (WIDTH, HEIGHT), "white")
    frame.paste(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (MARGIN, MARGIN))
    pen, large, small = ImageDraw.Draw(frame), ImageFont.load_default(21), ImageFont.load_default(16)
    left, top = SIDE + 2 * MARGIN + 10, MARGIN
    pen.text((left, top), QUESTION, INK, large)
    pen.text((left, HEIGHT - MARGIN - 18), said, GREY, small)
    x, y = left, top + 52
    for number, token in enumerate(canvas):
        text = token.text or ""
        width = 44 if text == MASK else pen.textlength(text, large)
        if x + width > WIDTH - MARGIN:
            x, y, text = left, y + 36, text.lstrip()
            width = 44 if text == MASK else pen.textlength(text, large)
        if text == MASK:
            pen.rounded_rectangle((x + 3, y + 2, x + width - 3, y + 24), 5, MASKED)
        else:
            pen.text((x, y), text, NEW if number == marked or token.step == step else INK, large)
        x += width
    return frame


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    model, processor = load_model()
    image = PhantomVQA(seed=9000, length=6)[4].image
    answer = explain_answer(model, processor, image, QUESTION)
    frames, seconds = [], []
    last = max(token.step for token in answer.tokens)
    for step in range(last + 1):
        canvas = [each if each.step <= step else each._replace(text=MASK) for each in answer.tokens]
        frames.append(draw(image, f"step {step} of {last}", canvas, step))
        seconds.append(1.2 if step == 0 else 0.3)
    frames.append(draw(image, f"{last} steps; confidence {answer.confidence:.0%}", answer.tokens, None))
    seconds.append(1.5)
    number, (_, place) = next((n, each) for n, each in enumerate(answer.words) if each[0].strip() == WORD)
    evidence = find_evidence(model, processor, image, QUESTION, answer, word=number)
    said = f'where "{WORD}" comes from: hiding what is orange makes it less likely'
    map_frame = draw_evidence(image, evidence.values, legend=False)
    frames.append(draw(map_frame, said, answer.tokens, None, marked=place[0]))
    seconds.append(4)
    frames = [each.quantize(96, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE) for each in frames]
    frames[0].save(
        output, save_all=True, append_images=frames[1:], duration=[round(1000 * each) for each in seconds], loop=0
    )
    print(f"{output}: {len(frames)} frames, {output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
