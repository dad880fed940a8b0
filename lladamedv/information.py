"""What `lladamedv info` prints: versions, devices, extras and where models are, which reports of faults need, too."""

from __future__ import annotations

import itertools
import json
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import torch
from huggingface_hub import scan_cache_dir
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import CacheNotFound
from packaging.requirements import Requirement

from lladamedv.modeling_lladamedv import LLaDAMedVConfig
from lladamedv.modeling_lladamedv.released_lladamedv import RELEASED_MODEL_TYPES

from .loading import DEMO_MODEL, find_device


def describe_installation() -> dict[str, dict]:
    """Sections of what is installed; of each its lines, by their names."""
    return {"Versions": _versions(), "Devices": _devices(), "Extras": _extras(), "Models": _models()}


def _versions() -> dict[str, str]:
    needed = [each.name for each in _requirements() if each.marker is None]
    return {"Python": f"{platform.python_version()} on {platform.platform()}"} | {
        name: version(name) for name in ("lladamedv", *needed)
    }


def _requirements() -> list[Requirement]:
    return [Requirement(line) for line in distribution("lladamedv").requires or ()]


def _devices() -> dict[str, str]:
    found = {"CPU": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        found[f"cuda:{number}"] = f"{device.name}, {device.total_memory / 1e9:.0f} GB"
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    return found | {"used by default": str(find_device("auto"))}


def _extras() -> dict[str, str]:
    """What each extra still lacks."""
    found = {}
    for extra in distribution("lladamedv").metadata.get_all("Provides-Extra"):
        lacking = dict.fromkeys(_lacking(extra))
        found[extra] = f'lacks {", ".join(lacking)}: pip install "lladamedv[{extra}]"' if lacking else "installed"
    return found


def _lacking(extra: str) -> Iterator[str]:
    for each in _requirements():
        if each.marker is None or not each.marker.evaluate({"extra": extra}):
            continue
        if each.name == "lladamedv":  # an extra that is made of others
            yield from itertools.chain.from_iterable(map(_lacking, each.extras))
            continue
        try:
            found = version(each.name)
        except PackageNotFoundError:
            yield each.name
        else:
            if not each.specifier.contains(found, prereleases=True):
                yield f"{each.name}{each.specifier} ({found} is installed)"


def _models() -> dict[str, str]:
    """The demo model, and those of the Hub's cache that this package loads."""
    found = {"demo": str(DEMO_MODEL), "Hub cache": HF_HUB_CACHE}
    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return found
    for repository in sorted(repositories, key=lambda each: each.repo_id):
        for revision in repository.revisions:
            if repository.repo_type == "model" and _is_ours(revision.snapshot_path / "config.json"):
                size = f"{revision.size_on_disk / 1e9:.1f} GB"
                found[repository.repo_id] = f"{size}, {revision.commit_hash[:7]}, {revision.snapshot_path}"
    return found


def _is_ours(config: Path) -> bool:
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return False
    return kind in (LLaDAMedVConfig.model_type, *RELEASED_MODEL_TYPES)


__all__ = ["describe_installation"]
