"""Speed and memory of a training step against the plain one of `naive_training.py`, and what packing questions gains.

    python benchmarks/bench_training.py --size cpu --repeats 3 --json results.json

Same random weights, batch and draws, all in one run; the modes take turns, and medians are given. A step is forward,
backward and AdamW; memory is what it needs on top of the weights and the optimizer's states. It is measured twice: as
resident in these steps, and as in use, in a process of its own whose allocator gives back at once what is freed, which
is slower. Sizes: `tiny` (a smoke test) and `cpu` (hidden 512, 8 layers, the true vocabulary, 729 image tokens and 64
text tokens, four rows).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from bench_generation import SIZES, PeakMemory, build_model
from naive_training import loss as naive_loss
from trl.models import enable_selective_activation_checkpointing
from trl.trainer.utils import add_fused_lm_head

from lladamedv.trainers.masked_diffusion_loss import IGNORE_INDEX, LossArguments, masked_diffusion_loss


TEXT, ANSWER = 64, 32  # tokens of question and answer, of the answer
QUESTIONS = {"tiny": 2, "cpu": 8}  # about a picture


def build_batch(model, rows: int, questions: int = 1, pictures: int | None = None, answer: int = ANSWER) -> dict:
    """Rows of an image and one question, or several that do not see each other, with draws; answers of random ids.

    The rows show `pictures` different images in turn; by default each has its own.
    """
    generator = torch.Generator().manual_seed(0)
    vision = model.config.vision_config
    image = torch.full((rows, (vision.image_size // vision.patch_size) ** 2), model.config.image_token_id)
    text = torch.randint(0, 100_000, (rows, questions * TEXT), generator=generator)
    learned = (torch.arange(questions * TEXT) % TEXT >= TEXT - answer).expand(rows, -1)
    labels = torch.cat([torch.full_like(image, IGNORE_INDEX), text.masked_fill(~learned, IGNORE_INDEX)], dim=1)
    segment = torch.arange(questions).repeat_interleave(TEXT)
    answers = torch.cat([torch.zeros_like(image), segment + questions * torch.arange(rows)[:, None]], dim=1)
    pictures = pictures or rows
    shape = (pictures, 1, 3, vision.image_size, vision.image_size)
    batch = {
        "input_ids": torch.cat([image, text], dim=1), "labels": labels, "answer_ids": answers,
        "pixel_values": torch.randn(shape, generator=generator), "image_index": torch.arange(rows) % pictures,
        "t": torch.rand(rows * questions, generator=generator)[answers],
        "uniform": torch.rand(labels.shape, generator=generator),
    }  # fmt: skip
    if questions > 1:
        width = image.shape[1]
        batch["segment_ids"] = torch.cat([torch.zeros_like(image), (segment + 1).expand(rows, -1)], dim=1)
        places = torch.cat([torch.arange(width), width + torch.arange(questions * TEXT) % TEXT])
        batch["position_ids"] = places.expand(rows, -1)
    return batch


def our_loss(model, batch: dict) -> torch.FloatTensor:
    batch = dict(batch)
    draws = batch.pop("t"), batch.pop("uniform")
    return masked_diffusion_loss(model, batch, lambda *_: draws, LossArguments(), model.config.mask_token_id).loss


def plain_loss(model, batch: dict) -> torch.FloatTensor:
    pixels = batch["pixel_values"][batch["image_index"]]
    return naive_loss(model, batch["input_ids"], batch["labels"], batch["t"][:, -1], batch["uniform"], pixels)


def halves(batch: dict) -> list[dict]:
    """A batch with a picture and an answer a row as two of half the rows, whose gradients add up: accumulation."""
    parts = [{name: rows.chunk(2)[part] for name, rows in batch.items()} for part in range(2)]
    for part in parts:
        number = torch.arange(len(part["input_ids"]))
        part |= {"image_index": number, "answer_ids": number[:, None].expand_as(part["input_ids"])}
    return parts


def run_step(model, optimizer, batches, compute, checkpoint) -> dict:
    """`checkpoint` turns the checkpointing of activations on; `None` leaves it off."""
    if checkpoint is not None:
        checkpoint({"use_reentrant": False})
    with PeakMemory("cpu") as memory:
        start, total = time.perf_counter(), 0.0
        for batch in batches:
            loss = compute(model, batch) / len(batches)
            loss.backward()
            total += loss.item()
        optimizer.step()
        seconds = time.perf_counter() - start
    optimizer.zero_grad()
    if checkpoint is not None:
        model.gradient_checkpointing_disable()
    return {"seconds": seconds, "bytes": memory.bytes, "loss": total}


def gradient_difference(model, batch) -> float:
    """Largest distance of a weight's gradients from those of the plain step, relative to their size."""
    gradients = []
    for compute in (plain_loss, our_loss):
        model.zero_grad()
        compute(model, batch).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    model.zero_grad()
    return max(
        float((gradients[1][name] - value).norm() / value.norm()) for name, value in gradients[0].items() if value.any()
    )


def trained_model(size_name: str) -> tuple:
    """A model whose tower is frozen, as in all stages of LLaDA-MedV, and its optimizer."""
    model = build_model(SIZES[size_name], "cpu").train()
    for weight in model.model.vision_tower.parameters():
        weight.requires_grad_(False)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.05)  # a loss of the size that training has
    add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    # The weights stay, so that all modes do the same work.
    return model, torch.optim.AdamW(weights, lr=0.0, fused=True)


def prepare(size_name: str) -> tuple:
    """Model, optimizer and modes: by name, how the loss is computed, from which batches, how many answers they hold,
    and what turns on the checkpointing of activations."""
    model, optimizer = trained_model(size_name)
    rows, questions = 4, QUESTIONS[size_name]
    batch = build_batch(model, rows)
    full = model.gradient_checkpointing_enable  # as TRL does by default
    enable_selective_activation_checkpointing(model)
    selective = model.gradient_checkpointing_enable  # as with {"selective": True}: attention is kept
    modes = {
        "plain": (plain_loss, [batch], rows, None),
        "ours": (our_loss, [batch], rows, None),
        "ours, accumulated": (our_loss, halves(batch), rows, None),
        "ours, checkpointed": (our_loss, [batch], rows, full),
        "ours, selectively": (our_loss, [batch], rows, selective),
        f"one picture, {questions} rows": (our_loss, [build_batch(model, questions, pictures=1)], questions, None),
        "one picture, packed": (our_loss, [build_batch(model, 1, questions)], questions, None),
        "four pictures, packed": (our_loss, [build_batch(model, rows, questions)], rows * questions, None),
    }
    return model, optimizer, modes


def measure_memory(model, optimizer, modes: dict) -> dict[str, int]:
    """Bytes of a step of each mode."""
    compute, batches, _, checkpoint = next(iter(modes.values()))
    run_step(model, optimizer, batches, compute, checkpoint)  # from now on the optimizer has its states
    return {
        name: run_step(model, optimizer, batches, compute, checkpoint)["bytes"]
        for name, (compute, batches, _, checkpoint) in modes.items()
    }


def memory_in_use(size_name: str, threads: int) -> dict[str, int]:
    """The same from a process in which glibc's allocator keeps nothing of a MiB or more when it is freed."""
    command = [sys.executable, sys.argv[0], "--size", size_name, "--threads", str(threads), "--memory"]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def measure(size_name: str, model, optimizer, modes: dict, repeats: int, report=print) -> dict:
    """Seconds, bytes and loss of a step of each mode."""
    in_use = memory_in_use(size_name, torch.get_num_threads())
    runs, found = {name: [] for name in modes}, {}
    for repeat in range(repeats + 1):
        for name, (compute, batches, _, checkpoint) in modes.items():
            result = run_step(model, optimizer, batches, compute, checkpoint)
            if repeat:  # the first is for threads, the allocator and the optimizer's states
                runs[name].append(result)
    for name, (_, batches, answers, _) in modes.items():
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        seconds = statistics.median(run["seconds"] for run in runs[name])
        resident = max(run["bytes"] for run in runs[name])
        found[name] = {
            "seconds": seconds, "peak_bytes": in_use[name], "resident_bytes": resident,
            "answers_per_second": answers / seconds, "tokens_per_second": tokens / seconds,
            "loss": runs[name][0]["loss"],
        }  # fmt: skip
        report(
            f"{name:22} {seconds:6.2f} s a step {in_use[name] / 2**20:6.0f} MiB in use {resident / 2**20:6.0f} resident"
            f" {answers / seconds:6.2f} answers/s {tokens / seconds:6.0f} tokens/s"
        )
    return found


def benchmark(size_name: str, repeats: int, report=print) -> dict:
    model, optimizer, modes = prepare(size_name)
    difference = gradient_difference(model, modes["ours"][1][0])
    report(f"gradients differ by at most {difference:.1e}, relative")
    found = measure(size_name, model, optimizer, modes, repeats, report)
    results = {"gradient_difference": difference, "modes": found}
    plain, ours, *others, separate, packed, packed_rows = found.values()
    for label, mode in zip(list(found)[1:], (ours, *others)):
        speedup, ratio = plain["seconds"] / mode["seconds"], plain["peak_bytes"] / mode["peak_bytes"]
        mode |= {"speedup": speedup, "memory_ratio": ratio}
        report(f"{label}: {speedup:.1f} times as fast as the plain step, with 1/{ratio:.1f} of its memory")
    results["packing_gain"] = {
        "one picture": packed["answers_per_second"] / separate["answers_per_second"],
        "four pictures": packed_rows["answers_per_second"] / ours["answers_per_second"],
    }
    for name, gain in results["packing_gain"].items():
        report(f"{QUESTIONS[size_name]} questions a picture, packed, {name}: {gain:.2f} times the answers per second")
    return results


def main(description: str, prepare, benchmark) -> None:
    """The command line of a benchmark of training steps."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "cpu"), default="tiny")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--memory", action="store_true", help="print the bytes that each mode needs, and nothing else")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        print(json.dumps(measure_memory(*prepare(options.size))))
        return
    results = benchmark(options.size, options.repeats)
    if options.json is not None:
        options.json.write_text(json.dumps(results | {"torch": torch.__version__}, indent=2) + "\n")


if __name__ == "__main__":
    main(__doc__, prepare, benchmark)
