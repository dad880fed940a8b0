"""Folders to push: the demo model and adapters for it, how to change them, and how to see that they are untouched."""

import hashlib
import json
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, get_peft_model

from lladamedv.demo import load_model
from lladamedv.trainers.sft import LORA_TARGET_MODULES


def write_model(folder: Path, max_shard_size="5GB", seed: int | None = None) -> Path:
    """The demo model with its code and a card; with a seed, with some other weights."""
    model, processor = load_model()
    if seed is not None:
        with torch.no_grad():
            noise = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(seed))
            model.lm_head.weight.add_(0.1 * noise)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    processor.save_pretrained(folder)
    write_card(folder)
    return folder


def write_adapter(folder: Path, base: str) -> Path:
    """Adapters that change what the demo model says."""
    model, processor = load_model()
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(target_modules=LORA_TARGET_MODULES, r=2))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_card(folder: Path) -> None:
    data = ModelCardData(license="apache-2.0", library_name="transformers", pipeline_tag="image-text-to-text")
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n# A model\n").save(folder / "README.md")


def change(file: Path, **values) -> None:
    """Change values of a JSON file; those that are objects keep what is not named."""
    content = json.loads(file.read_text())
    for name, value in values.items():
        both = isinstance(value, dict) and isinstance(content.get(name), dict)
        content[name] = content[name] | value if both else value
    file.write_text(json.dumps(content))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def state(folder: Path) -> dict[str, tuple]:
    """All that can be seen of a folder from outside: contents, times of change, modes, which say what is a link."""

    def seen(path: Path) -> tuple:
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        return digest, path.lstat().st_mtime_ns, path.lstat().st_mode

    return {path.relative_to(folder).as_posix(): seen(path) for path in sorted(folder.rglob("*"))}
