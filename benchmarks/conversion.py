"""Peak memory and time of `lladamedv convert`, against loading the whole model and saving it.

    python benchmarks/conversion.py --layers 8 --shard-size 2GB --folder /where/there/is/room

Writes a checkpoint in LLaDA-MedV's released layout with the 8B model's widths, its full vision tower and `--layers` of
its 32 language layers (0.44 GB each in bfloat16, 3 GB for the rest), and converts it in a fresh process both ways.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub.serialization import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lladamedv import LLaDAMedVConfig, LLaDAMedVForConditionalGeneration
from lladamedv.modeling_lladamedv.presets_lladamedv import SPECIAL_TOKENS


_NAIVE = """
import sys
from lladamedv import LLaDAMedVForConditionalGeneration
LLaDAMedVForConditionalGeneration.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2], max_shard_size=sys.argv[3])
"""
_MEASURE = """
import re, runpy, sys, time
start = time.perf_counter()
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
# Not getrusage: its maximum is inherited from the process that started this one.
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
print("MEASURED", peak, time.perf_counter() - start)
"""


def write_source(folder: Path, layers: int, shard_size: str) -> int:
    """A checkpoint in the released layout; returns its bytes."""
    config = LLaDAMedVConfig(text_config={"num_hidden_layers": layers})
    shapes = LLaDAMedVForConditionalGeneration.parameter_shapes(config)
    names = {}
    for ours in shapes:
        name = ours.replace("model.language_model.", "model.")
        name = name.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")
        name = name.replace("multi_modal_projector.linear_1", "mm_projector.0")
        names[name.replace("multi_modal_projector.linear_2", "mm_projector.2")] = shapes[ours]
    split = split_state_dict_into_shards_factory(
        names, get_storage_size=lambda shape: 2 * torch.Size(shape).numel(),
        filename_pattern="model{suffix}.safetensors", max_shard_size=shard_size,
    )  # fmt: skip
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    for file, part in split.filename_to_tensors.items():
        shard = {}
        for name in part:
            count = torch.Size(names[name]).numel()
            shard[name] = noise.repeat(-(-count // len(noise)))[:count].view(names[name]).clone()
        save_file(shard, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": split.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    text = config.text_config
    original = {
        "model_type": "llava_llada", "hidden_size": text.hidden_size, "vocab_size": text.vocab_size,
        "num_attention_heads": text.num_attention_heads, "num_hidden_layers": layers,
        "intermediate_size": text.intermediate_size, "image_aspect_ratio": "anyres_max_4",
        "image_grid_pinpoints": "(1x1),...,(6x6)", "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(original))
    special = {number: token for token, number in SPECIAL_TOKENS.items()}
    vocabulary = {special.get(number, f"token{number}"): number for number in range(max(special) + 1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="token0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return sum(2 * torch.Size(shape).numel() for shape in names.values())


def measure(program: str | Path, *arguments: object) -> tuple[float, float]:
    """Peak resident memory (bytes, mapped file pages included) and seconds of a fresh process."""
    command = [sys.executable, "-c", _MEASURE, str(program), *map(str, arguments)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    _, peak, seconds = run.stdout.strip().splitlines()[-1].split()
    return float(peak), float(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--shard-size", default="2GB")
    parser.add_argument("--folder", type=Path, help="where to write (and delete) some 15 GB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        folder = Path(folder)
        (folder / "source").mkdir()
        size = write_source(folder / "source", options.layers, options.shard_size)
        naive = folder / "naive.py"
        naive.write_text(_NAIVE)
        nothing = folder / "nothing.py"
        nothing.write_text("import lladamedv.conversion\n")
        cli = Path(__file__).parents[1] / "lladamedv" / "cli.py"
        start, _ = measure(nothing)
        print(
            f"source: {size / 1e9:.2f} GB in bfloat16; a process that only imports: {start / 2**30:.2f} GiB", flush=True
        )
        results = {}
        for name, arguments in {
            "convert": (
                cli,
                "convert",
                folder / "source",
                folder / "converted",
                "--max-shard-size",
                options.shard_size,
            ),
            "load + save": (naive, folder / "source", folder / "saved", options.shard_size),
        }.items():
            os.sync()
            results[name] = measure(*arguments)
            peak, seconds = results[name]
            print(f"{name:12} peak {peak / 2**30:6.2f} GiB  {seconds:6.1f} s", flush=True)
        largest = max(file.stat().st_size for file in (folder / "converted").glob("*.safetensors"))
        over = results["convert"][0] - largest
        print(f"largest shard {largest / 2**30:.2f} GiB; convert's peak is {over / 2**30:+.2f} GiB over it")
        ratios = [naive / ours for naive, ours in zip(results["load + save"], results["convert"])]
        print(f"load + save needs {ratios[0]:.2f} times the memory and {ratios[1]:.2f} times the time")


if __name__ == "__main__":
    main()
