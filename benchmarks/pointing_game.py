"""Whether maps of evidence point at what is asked about: phantoms' lesions, or the organs and lesions of SLAKE.

    python benchmarks/pointing_game.py --json game.json
    python benchmarks/pointing_game.py --model MODEL --slake path/to/Slake

The pointing game (Zhang et al., arXiv 1608.00507): a hit is a map whose largest cell touches the region. Deletion and
insertion (Petsiuk et al., arXiv 1806.07421): the mean probability of the answer while cells are painted over, or are
uncovered, in the order of the map; random orders stand beside it. Both paint the picture itself and ask `score`, which
checks the maps from outside.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lladamedv.demo import DEMO_MODEL, HELD_OUT_SEED, load_model
from lladamedv.evaluation.answering import question_about
from lladamedv.modeling_lladamedv.evidence_lladamedv import METHODS
from lladamedv.processing.datasets import load_vqa
from lladamedv.processing.datasets.readers import undecoded
from lladamedv.processing.phantoms import PhantomVQA


LESION_TOPICS = ("any_lesion", "count", "shape", "side")
STEPS = 8  # of a curve


@dataclass
class Item:
    """A question about a region of a picture, `(height, width)` bool."""

    image: Image.Image
    question: str
    answer: str
    topic: str
    region: np.ndarray


def phantom_items(count: int, topics, image_size: int) -> Iterator[Item]:
    """Questions about pictures with a lesion, held out from training."""
    examples = (each for each in PhantomVQA(HELD_OUT_SEED, 10**9, topics, image_size) if each.attributes.count)
    for _, each in zip(range(count), examples):
        yield Item(each.image, each.question, each.answer, each.topic, each.lesions.any(axis=0))


def slake_items(folder: Path, split: str) -> Iterator[Item]:
    """SLAKE's questions that name what detection.json, beside the picture, has a box of.

    The file is a list of objects with a name and [left, top, width, height] each. The region is what mask.png marks
    within these boxes, or the boxes where it marks nothing.

    Raises:
        ValueError: for a box that leaves the picture.
    """
    rows, _ = load_vqa("slake", split, path=folder)
    for row in undecoded(rows):
        place = Path(row["image"]["path"]).parent
        boxes = defaultdict(list)
        for entry in json.loads((place / "detection.json").read_text()):
            for name, box in entry.items():
                boxes[name.lower()].append(box)
        asked = f"{row['question']} {row['answer']}".lower()
        named = [box for name in boxes if re.search(rf"\b{re.escape(name)}s?\b", asked) for box in boxes[name]]
        if not named:
            continue
        image = Image.open(row["image"]["path"]).convert("RGB")
        region = np.zeros((image.height, image.width), dtype=bool)
        for left, top, width, height in named:
            if min(left, top) < 0 or left + width > image.width or top + height > image.height:
                raise ValueError(
                    f"{place / 'detection.json'} has the box {[left, top, width, height]}, which leaves the picture."
                )
            region[round(top) : round(top + height), round(left) : round(left + width)] = True
        marks = Image.open(place / "mask.png").convert("RGB").resize(image.size, Image.Resampling.NEAREST)
        marked = region & np.asarray(marks).any(axis=-1)
        yield Item(
            image, row["question"], row["answer"], row["meta"]["content_type"] or "", marked if marked.any() else region
        )


def cells_of(region: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Which share of each cell of a map of `shape` the region takes."""
    edges = [np.linspace(0, length, count + 1).round().astype(int) for length, count in zip(region.shape, shape)]
    return np.array([[region[slice(*y), slice(*x)].mean() for x in pairwise(edges[1])] for y in pairwise(edges[0])])


def overlap(values: np.ndarray, share: np.ndarray, rng) -> tuple[float, float]:
    """IoU of the region and the cells of at least half the largest value, and on average of as many random cells."""
    chosen, ious = (values >= values.max() / 2).flatten(), []
    for order in [np.arange(chosen.size), *(rng.permutation(chosen.size) for _ in range(20))]:
        inside = share.flatten()[chosen[order]].sum()
        ious.append(inside / (chosen.sum() + share.sum() - inside))
    return ious[0], float(np.mean(ious[1:]))


def curves(model, processor, item: Item, answer: list[int], order: np.ndarray, shape) -> tuple[float, float]:
    """Mean probability of the answer while cells are painted over in this order, and while they are uncovered in it."""
    rank = np.empty(order.size)
    rank[order] = np.arange(order.size) / order.size
    rows, columns = (np.arange(edge) * count // edge for edge, count in zip(item.region.shape, shape))
    rank = rank.reshape(shape)[rows][:, columns]  # of the cell of each pixel
    pixels = np.asarray(item.image)
    colour = np.median(pixels.reshape(-1, 3), axis=0).astype(np.uint8)
    pictures = [
        Image.fromarray(np.where((rank < step / STEPS)[..., None] == deletes, colour, pixels))
        for deletes in (True, False)
        for step in range(STEPS + 1)
    ]
    inputs = make_inputs(processor, [question_about(picture, item.question) for picture in pictures]).to(model.device)
    likely = model.score(**inputs, candidates=[answer], max_exact_tokens=2, num_samples=8).log_likelihood.exp()
    return tuple(likely.view(2, -1).mean(dim=1).tolist())


def make_inputs(processor, chats):
    return processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip


def play(model, processor, items: Iterator[Item], *, num_curves: int = 0, cells: int | None = None, **options) -> dict:
    """The game for each method: shares of hits by topic, overlaps, and curves of the first `num_curves` items."""
    played = defaultdict(list)
    rng = np.random.default_rng(0)
    for number, item in enumerate(items):
        inputs = make_inputs(processor, [question_about(item.image, item.question)]).to(model.device)
        ids = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :].tolist()
        if not ids:
            continue
        said = processor.decode(ids, skip_special_tokens=True).strip()
        for method in METHODS:
            start = time.perf_counter()
            output = model.explain_image(**inputs, answer=ids, method=method, cells=cells, **options)
            values = output.maps[0][0].numpy()
            share = cells_of(item.region, values.shape)
            result = {"topic": item.topic, "right": said.lower() == item.answer.lower()}
            result |= {"seconds": time.perf_counter() - start, "rows": output.num_rows}
            result |= {"hit": bool(share.flat[values.argmax()] > 0), "chance": float((share > 0).mean())}
            result["iou"], result["chance_iou"] = overlap(values, share, rng)
            if number < num_curves:
                for name, order in (("", (-values).argsort(axis=None)), ("random_", rng.permutation(values.size))):
                    result[f"{name}deletion"], result[f"{name}insertion"] = curves(
                        model, processor, item, ids, order, values.shape
                    )
            played[method].append(result)
        print(f"\r{number + 1} questions", end="", flush=True)
    print("\r", end="")
    return {method: summary(results) for method, results in played.items()}


def summary(results: list[dict]) -> dict:
    """Means over the questions that have a value; of hits also by topic."""

    def mean(name, rows=results):
        return float(np.mean([each[name] for each in rows if name in each]))

    topics = defaultdict(list)
    for each in results:
        topics[each.pop("topic")].append(each)
    by_topic = {topic: {"hit": mean("hit", rows), "questions": len(rows)} for topic, rows in sorted(topics.items())}
    return {"questions": len(results), **{name: mean(name) for name in results[0]}, "by_topic": by_topic}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--questions", type=int, default=300, help="of phantoms")
    parser.add_argument("--topics", nargs="+", default=LESION_TOPICS, help="of phantoms")
    parser.add_argument("--slake", type=Path, help="folder of SLAKE, with test.json and imgs, instead of phantoms")
    parser.add_argument("--split", default="test", help="of SLAKE")
    parser.add_argument("--cells", type=int, help="of a map, along the longer side")
    parser.add_argument("--max-rows", type=int, default=256)
    parser.add_argument("--curves", type=int, default=100, help="questions with curves of deletion and insertion")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, processor = load_model(options.model)
    if options.slake is not None:
        items = slake_items(options.slake, options.split)
    else:
        items = phantom_items(options.questions, options.topics, model.config.vision_config.image_size)
    results = play(model, processor, items, num_curves=options.curves, cells=options.cells, max_rows=options.max_rows)
    for method, each in results.items():
        topics = ", ".join(f"{topic} {of['hit']:.2f} ({of['questions']})" for topic, of in each["by_topic"].items())
        print(
            f"{method:10} hits {each['hit']:.3f} (chance {each['chance']:.3f}; {each['questions']} questions): {topics}"
        )
        print(f"{'':10} IoU {each['iou']:.3f} (random {each['chance_iou']:.3f}); {each['seconds']:.2f} s a map")
        if "deletion" in each:
            print(
                f"{'':10} probability under deletion {each['deletion']:.3f} (random {each['random_deletion']:.3f}), "
                f"insertion {each['insertion']:.3f} (random {each['random_insertion']:.3f})"
            )
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
