"""Speed and memory of `generate`, option by option, against the plain loop of `naive_generation.py`.

    python benchmarks/bench_generation.py --size cpu --repeats 3 --json results.json

Same random weights, prompt and machine, all in one run; the modes take turns, and medians are given. Seconds are per
answer: a batch's time is divided by its rows. Sizes: `tiny` (a smoke test), `cpu` (hidden 512, 8 layers, the true
vocabulary, 729 image tokens, 64 new tokens) and `h200` (the 8B shape in bfloat16). Random weights give flat
distributions, so what an approximate mode costs in quality is not seen here.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import statistics
import time
from pathlib import Path

import torch
from naive_generation import generate as naive_generate
from transformers import CompileConfig

from lladamedv import LLaDAMedVConfig, LLaDAMedVForConditionalGeneration
from lladamedv.modeling_lladamedv.presets_lladamedv import PRESETS


SIZES = {
    "tiny": {
        "text": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 4},
        "vision": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                   "image_size": 56, "patch_size": 14},
        "dtype": torch.float32, "canvases": [(16, 8)], "question": 20,
    },
    "cpu": {
        "text": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
                 "num_key_value_heads": 8},
        "vision": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
        "dtype": torch.float32, "canvases": [(64, 64)], "question": 71,
    },
    "h200": {
        "text": {}, "vision": {}, "dtype": torch.bfloat16, "canvases": [(64, 64), (256, 64)], "question": 71,
    },
}  # fmt: skip
# Options of `generate` by the name that the table gives them; `steps` as a part of the tokens, and how many rows.
MODES = {
    "exact": {},
    "half the steps": {"steps": 0.5},
    "quarter of the steps": {"steps": 0.25},
    "prefix cache": {"use_cache": True, "cache_implementation": "prefix"},
    "dual cache": {"use_cache": True},
    "dual cache, refresh 16": {"use_cache": True, "cache_refresh_interval": 16},
    "dual cache, compiled": {"use_cache": True, "compile_config": CompileConfig(mode=None)},
    "dual, quarter of steps": {"use_cache": True, "steps": 0.25},
    "dual, quarter, compiled": {"use_cache": True, "steps": 0.25, "compile_config": CompileConfig(mode=None)},
    "exact, batch of 8": {"batch": 8},
    "dual cache, batch of 8": {"use_cache": True, "batch": 8},
}


def build_model(size: dict, device: str) -> LLaDAMedVForConditionalGeneration:
    """A model with random weights, large enough that proposals differ from place to place."""
    torch.manual_seed(0)
    config = LLaDAMedVConfig(text_config=size["text"], vision_config=size["vision"], vision_aspect_ratio="square")
    with torch.device(device):
        model = LLaDAMedVForConditionalGeneration._from_config(config, dtype=size["dtype"])
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=1.5 / weight.shape[-1] ** 0.5)
    return model.eval()


def build_inputs(model, size: dict, rows: int = 1) -> dict[str, torch.Tensor]:
    """An image's tokens and a question of random ids, for each row."""
    vision = model.config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2
    questions = torch.Generator().manual_seed(1)
    question = torch.cat([torch.randint(0, 100_000, (1, size["question"]), generator=questions) for _ in range(rows)])
    ids = torch.cat([torch.full((rows, tokens), model.config.image_token_id), question], dim=1)
    pictures = torch.Generator().manual_seed(2)
    shape = (1, 1, 3, vision.image_size, vision.image_size)
    pixels = torch.cat([torch.randn(shape, generator=pictures) for _ in range(rows)])
    return {"input_ids": ids.to(model.device), "pixel_values": pixels.to(model.device)}


class PeakMemory:
    """Bytes that a block needs on top of what is there before it."""

    def __init__(self, device: str):
        self.cuda = device != "cpu"

    def __enter__(self):
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed is not to be used again unseen
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            self.before = self._status("VmRSS")
        return self

    def __exit__(self, *exception):
        if self.cuda:
            torch.cuda.synchronize()
        self.bytes = (torch.cuda.max_memory_allocated() if self.cuda else self._status("VmHWM")) - self.before

    @staticmethod
    def _status(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def run_mode(model, size: dict, options: dict | None, length: int, block: int, device: str) -> dict:
    """One run: seconds an answer, forward passes, peak bytes and the first row's tokens; `None` is the plain loop."""
    suppressed = PRESETS["llada-medv"].generation_options()["suppress_tokens"]
    options = None if options is None else dict(options)
    rows = 1 if options is None else options.pop("batch", 1)
    inputs = build_inputs(model, size, rows)
    with PeakMemory(device) as memory:
        start = time.perf_counter()
        if options is None:
            tokens, forwards = naive_generate(
                model, **inputs, max_new_tokens=length, block_length=block, steps=length, suppressed=suppressed
            )
        else:
            blocks = length // block
            options["steps"] = max(1, int(options.pop("steps", 1) * block)) * blocks
            output = model.generate(
                **inputs, max_new_tokens=length, block_length=block, suppress_tokens=suppressed,
                return_dict_in_generate=True, **options,
            )  # fmt: skip
            tokens, forwards = output.sequences[0, inputs["input_ids"].shape[1] :], int(output.num_forwards[0])
        if device != "cpu":
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / rows
    return {"seconds": seconds, "forwards": forwards, "bytes": memory.bytes, "tokens": tokens.tolist()}


def benchmark(size_name: str, repeats: int, device: str, modes: list[str], report=print) -> list[dict]:
    """All modes in turns; a row per mode and canvas."""
    size = SIZES[size_name]
    # A model stays compiled, so that the compiled modes have one of their own, with the same weights.
    models = {False: build_model(size, device)}
    if any("compile_config" in MODES[name] for name in modes):
        models[True] = build_model(size, device)
    rows = []
    for length, block in size["canvases"]:
        settings = {"naive": None} | {name: MODES[name] for name in modes}
        runs = {name: [] for name in settings}

        def run(options, length=length, block=block):
            model = models[options is not None and "compile_config" in options]
            return run_mode(model, size, options, length, block, device)

        for options in settings.values():  # warm-up: threads, allocator, kernels, and what is to be compiled
            compiled = options is not None and "compile_config" in options
            short = min(block, 4)
            run(options, *(() if compiled else (short, short)))
        for _ in range(repeats):
            for name, options in settings.items():
                runs[name].append(run(options))
        reference = runs["naive"][0]
        for name, results in runs.items():
            tokens = results[0]["tokens"]
            ratios = [naive["seconds"] / own["seconds"] for naive, own in zip(runs["naive"], results)]
            rows.append(
                {
                    "size": size_name,
                    "max_new_tokens": length,
                    "block_length": block,
                    "mode": name,
                    "seconds": statistics.median(run["seconds"] for run in results),
                    "forwards": results[0]["forwards"],
                    "tokens_per_forward": length / results[0]["forwards"],
                    "peak_bytes": max(run["bytes"] for run in results),
                    "speedup": statistics.median(ratios),
                    "memory_ratio": max(run["bytes"] for run in runs["naive"]) / max(run["bytes"] for run in results),
                    "agreement": sum(a == b for a, b in zip(tokens, reference["tokens"])) / length,
                }
            )
            report(format_row(rows[-1]))
    return rows


def format_row(row: dict) -> str:
    return (
        f"{row['mode']:22} {row['seconds']:8.2f} s  {row['forwards']:4d} forwards  "
        f"{row['tokens_per_forward']:5.1f} tokens each  {row['peak_bytes'] / 2**20:7.0f} MiB  "
        f"{row['speedup']:6.1f}x faster  1/{row['memory_ratio']:.1f} memory  {row['agreement']:4.0%} as naive"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--modes", nargs="*", choices=MODES, default=list(MODES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = benchmark(options.size, options.repeats, options.device, options.modes)
    if options.json is not None:
        machine = {"device": options.device, "threads": options.threads, "torch": torch.__version__}
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
