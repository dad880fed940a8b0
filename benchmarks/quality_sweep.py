"""What decoding otherwise does to answers: the shipped demo model on held-out questions, option by option.

    python benchmarks/quality_sweep.py --questions 300 --json sweep.json
    python benchmarks/quality_sweep.py --modes exact "image guidance 0.5" --noise 60
    python benchmarks/quality_sweep.py --modes exact "image guidance 0.5" --hidden 0.25

Closed accuracy, open recall and description recall as `lladamedv demo` counts them, the tokens a row commits per
forward pass, and the time as a ratio to exact decoding in the same run.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lladamedv.demo import DEMO_MODEL, HELD_OUT_SEED, load_model, score
from lladamedv.processing.phantoms import PhantomVQA


CACHE = {"use_cache": True}
MODES = {
    "exact": {},
    "half the steps": {"steps": 12},
    "third of the steps": {"steps": 6, "block_length": 12},
    "margin, half the steps": {"steps": 12, "remasking": "margin"},
    "entropy, half the steps": {"steps": 12, "remasking": "entropy"},
    "random, half the steps": {"steps": 12, "remasking": "random"},
    "shift 1/3, half the steps": {"steps": 12, "schedule_shift": 1 / 3},
    "threshold 0.9": {"confidence_threshold": 0.9},
    "threshold 0.7": {"confidence_threshold": 0.7},
    "threshold 0.9, block 24": {"confidence_threshold": 0.9, "block_length": 24},
    "factor 1": {"factor": 1.0},
    "entropy bound 0.1": {"entropy_bound": 0.1},
    "entropy bound 0.5": {"entropy_bound": 0.5},
    "prefix cache": CACHE | {"cache_implementation": "prefix"},
    "dual cache": CACHE,
    "dual cache, refresh 2": CACHE | {"cache_refresh_interval": 2},
    "dual, threshold 0.9": CACHE | {"confidence_threshold": 0.9},
    "dual, threshold 0.9, block 24": CACHE | {"confidence_threshold": 0.9, "block_length": 24},
    "dual, entropy bound 0.1, block 24": CACHE | {"entropy_bound": 0.1, "block_length": 24},
    "dual, drift bound 0.01": CACHE | {"cache_drift_bound": 0.01},
    **{f"speculation {depth}": {"speculation_depth": depth} for depth in (1, 2, 3, 7)},
    **{f"dual, speculation {depth}": CACHE | {"speculation_depth": depth} for depth in (1, 3)},
    "dual, threshold 0.9, speculation 3": CACHE | {"confidence_threshold": 0.9, "speculation_depth": 3},
    "growing canvas": {"initial_canvas_length": 8},
    "no suffix blocks": {"suffix_blocks": 0},
    "dual, threshold 0.9, no suffix": CACHE | {"confidence_threshold": 0.9, "suffix_blocks": 0},
    "repetition penalty 1.2": {"repetition_penalty": 1.2},
    "no bigram twice": {"no_repeat_ngram_size": 2},
    **{f"image guidance {scale}": {"image_guidance_scale": scale} for scale in (0.5, 1.0, 2.0)},
    "image guidance 1.0, no cutoff": {"image_guidance_scale": 1.0, "image_guidance_cutoff": 0.0},
    "prompt guidance 1.0": {"cfg_scale": 1.0},
}


def disturbed(image: Image.Image, noise: float, hidden: float, random: np.random.Generator) -> Image.Image:
    """A picture with normal noise of so many grey levels, and a square of its area's share in its median colour."""
    pixels = np.asarray(image).astype(float)
    side = round(hidden**0.5 * min(image.size))
    top, left = (int(random.integers(0, length - side + 1)) for length in pixels.shape[:2])
    pixels[top : top + side, left : left + side] = np.median(pixels, axis=(0, 1))
    return Image.fromarray((pixels + noise * random.standard_normal(pixels.shape)).clip(0, 255).astype(np.uint8))


def answer_all(model, processor, examples, options: dict, batch_size: int = 64) -> tuple[list[str], float, float]:
    """Answers, tokens committed per forward pass and row, and seconds."""
    answers, tokens, forwards = [], 0, 0
    start = time.perf_counter()
    for first in range(0, len(examples), batch_size):
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": one.image}, _text(one.question)]}]
            for one in examples[first : first + batch_size]
        ]
        inputs = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True},
        )  # fmt: skip
        output = model.generate(**inputs, return_dict_in_generate=True, **options)
        new = output.sequences[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        tokens += int((output.commit_step >= 0).sum())
        forwards += int(output.num_forwards.sum())
    return answers, tokens / forwards, time.perf_counter() - start


def _text(question: str) -> dict:
    return {"type": "text", "text": question}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--modes", nargs="*", choices=MODES, default=list(MODES))
    parser.add_argument("--noise", type=float, default=0.0, help="normal noise in the pictures, in grey levels")
    parser.add_argument("--hidden", type=float, default=0.0, help="share of each picture under a square")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(2)
    model, processor = load_model(options.model)
    examples = list(PhantomVQA(HELD_OUT_SEED, options.questions, image_size=model.config.vision_config.image_size))
    random, rows = np.random.default_rng(0), []
    if options.noise or options.hidden:
        examples = [replace(one, image=disturbed(one.image, options.noise, options.hidden, random)) for one in examples]
    for name in options.modes:
        torch.manual_seed(0)
        answers, per_forward, seconds = answer_all(model, processor, examples, MODES[name])
        scores = score(examples, answers)
        rows.append(
            {
                "mode": name, "closed": scores.closed, "open": scores.open, "description": scores.description,
                "tokens_per_forward": per_forward, "seconds": seconds,
            }
        )  # fmt: skip
        print(
            f"{name:34} closed {scores.closed:6.1%}  open {scores.open:6.1%}  description {scores.description:6.1%}  "
            f"{per_forward:5.2f} tokens a pass  {rows[0]['seconds'] / seconds:5.2f}x as fast as {options.modes[0]}",
            flush=True,
        )
    if options.json is not None:
        told = {name: value for name, value in vars(options).items() if name not in ("json", "model")}
        options.json.write_text(json.dumps({**told, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
