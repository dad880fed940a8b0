"""What a frozen vision tower sees in each image, kept on disk: in later epochs and runs the tower need not run.

A folder belongs to one tower, one set of image processor settings and one precision, which its `manifest.json` names;
with any other the features would be silently wrong, so they are refused. Every image has a file of its own, named after
a hash of its pixels, which appears whole or not at all: several processes may share a folder, and any may be killed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration
from lladamedv.processing import LLaDAMedVProcessor


logger = logging.getLogger(__name__)

FORMAT = "lladamedv image features, version 1"
MANIFEST = "manifest.json"
# Settings that say where a class comes from or what wrote a file, but nothing about features; so do those with a
# leading underscore. The dtype has an entry of its own.
NOISE = {"auto_map", "image_processor_type", "processor_class", "architectures", "transformers_version", "dtype"}


class ImageFeatureCache:
    """Features of a frozen vision tower, from a folder where they are there.

    Args:
        folder (`str` or `Path`): the trainer's `cache_image_features`; made if need be.
        model ([`LLaDAMedVForConditionalGeneration`]): whose tower it is; not wrapped by PEFT.
        processor ([`LLaDAMedVProcessor`]): what makes `pixel_values`.

    Attributes:
        hits, misses (`int`): images that the tower was spared, and images that it ran on.

    Raises:
        ValueError: if the model has no vision tower, or one that is trained; or if the folder holds anything but
            features of this tower, with these processor settings, in this dtype.
    """

    def __init__(self, folder: str | Path, model: LLaDAMedVForConditionalGeneration, processor: LLaDAMedVProcessor):
        self.folder = Path(folder)
        self.hits = self.misses = 0
        if model.config.text_only:
            raise ValueError(
                f"`cache_image_features` is {str(folder)!r}, but this model is text-only: it has no vision tower."
            )
        self._require_frozen(model)
        tower = model.model.vision_tower
        self.dtype = tower.dtype
        manifest = {
            "format": FORMAT,
            "dtype": str(tower.dtype).removeprefix("torch."),
            "image_processor": _without_noise(json.loads(processor.image_processor.to_json_string())),
            "vision_tower": _fingerprint(tower),
        }
        self._claim_folder(manifest)
        # Part of every file's name: if two runs with different towers claim an empty folder in the same instant, the
        # loser's files are never taken for the winner's.
        self._identity = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode())

    def vision_features(
        self,
        model: LLaDAMedVForConditionalGeneration,
        pixel_values: torch.FloatTensor,
        image_sizes: torch.LongTensor | None = None,
        batch_num_images: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
    ) -> torch.FloatTensor:
        """What `model.model.get_vision_features` returns, from disk where it is there; else computed, without gradient
        and without dropout, and stored.

        The tower runs on the images that are missing, each once, and on nothing else. Bits of its output may depend on
        how many images it runs on at a time; those that were stored first stay.

        Args:
            model: the model that the cache was made for.
            pixel_values, image_sizes, batch_num_images, image_index: see [`LLaDAMedVModel.get_image_features`].

        Returns:
            `(num_images, num_tiles, patches, vision width)` in the tower's dtype and on its device, zero where an image
            has fewer tiles.

        Raises:
            ValueError: if the tower is trained, or for the reasons of [`LLaDAMedVModel.get_image_features`].
        """
        self._require_frozen(model)
        device = model.model.vision_tower.device
        counts = model.model._tile_counts(pixel_values, "pixel_values", 5, image_sizes, batch_num_images, image_index)
        sizes = [None] * len(counts) if image_sizes is None else image_sizes.tolist()
        keys = [
            self._key(image[:count], size, device)
            for image, count, size in zip(pixel_values, counts, sizes, strict=True)
        ]
        vision = model.config.vision_config
        shape = ((vision.image_size // vision.patch_size) ** 2, vision.hidden_size)
        found = {key: self._read(key, (count, *shape)) for key, count in zip(keys, counts)}
        missing = {key: number for number, key in enumerate(keys) if found[key] is None}
        if missing:
            numbers = list(missing.values())
            tiles = [counts[number] for number in numbers]
            features = self._run_tower(model, pixel_values[numbers].to(device), tiles)
            for key, image in zip(missing, features.split(tiles)):  # (tiles, patches, vision width)
                self._write(key, image)
                found[key] = image
        self.misses += len(missing)
        self.hits += len(keys) - len(missing)
        return torch.nn.utils.rnn.pad_sequence([found[key].to(device) for key in keys], batch_first=True)

    def _require_frozen(self, model):
        for name, parameter in model.model.vision_tower.named_parameters():
            if parameter.requires_grad:
                raise ValueError(
                    f"`cache_image_features` is {str(self.folder)!r}, but the vision tower is trained ({name} requires "
                    "a gradient): what it sees changes with every step. Freeze it, or leave `cache_image_features` out."
                )

    def _claim_folder(self, manifest):
        """Make the folder, or check that it is one for this manifest."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"`cache_image_features` is {str(self.folder)!r}, which is a file; it must be a folder.")
        self.folder.mkdir(parents=True, exist_ok=True)
        # Listed before the manifest is looked for: whatever another process of this run adds comes after its manifest.
        # One that is being written, or that a killed process left, is no foreign file.
        others = [entry.name for entry in self.folder.iterdir() if not entry.name.startswith(MANIFEST)]
        path = self.folder / MANIFEST
        if path.exists():
            differences = _differences(_read_manifest(path), manifest)
            if differences:
                raise ValueError(
                    f"`cache_image_features` is {str(self.folder)!r}, which holds features of something else. "
                    f"Different are: {'; '.join(differences)}. Name another folder, or delete this one."
                )
        elif others:
            raise ValueError(
                f"`cache_image_features` is {str(self.folder)!r}, which has no {MANIFEST} but holds other files "
                f"({min(others)!r}, …); it must be an empty or new folder, or one that was made for this."
            )
        else:
            _write_whole(path, (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode())

    def _key(self, tiles, size, device) -> str:
        """Name of an image's file: a hash of its pixels `(tiles, 3, height, width)` and its (height, width)."""
        digest = self._identity.copy()
        # Under autocast the same tower computes something else.
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        digest.update(repr((size, str(autocast))).encode())
        _hash_tensor(digest, "pixel_values", tiles)
        return digest.hexdigest()

    def _path(self, key) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, key, shape) -> torch.FloatTensor | None:
        """An image's features `(tiles, patches, vision width)`, or `None` if they must be computed."""
        try:
            features = load(self._path(key).read_bytes())["features"]
        except FileNotFoundError:
            return None
        except (SafetensorError, KeyError) as error:
            problem = repr(error)
        else:
            if features.shape == shape and features.dtype == self.dtype:
                return features
            problem = f"{features.dtype} {tuple(features.shape)} instead of {self.dtype} {shape}"
        logger.warning("The cached image features %s are damaged and are made anew: %s", self._path(key), problem)
        return None

    def _write(self, key, features):
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        _write_whole(path, save({"features": features.contiguous()}))

    @torch.no_grad()
    def _run_tower(self, model, pixel_values, tiles):
        tower = model.model.vision_tower
        training = tower.training
        tower.eval()  # one draw of a dropout mask must not be kept for all epochs
        features = model.model._run_tower(pixel_values, tiles).last_hidden_state
        tower.train(training)
        return features.to(self.dtype)


def _differences(found: dict, expected: dict) -> list[str]:
    """What differs between two manifests, in words."""
    if found.get("format") != expected["format"]:  # then the other entries may mean something else
        return [f"the format ({found.get('format')!r} there, {expected['format']!r} here)"]
    differences = []
    if found["dtype"] != expected["dtype"]:  # then the tower's bytes differ too, and that says nothing
        differences.append(f"the dtype ({found['dtype']} there, {expected['dtype']} here)")
    elif found["vision_tower"] != expected["vision_tower"]:
        towers = (found["vision_tower"][:12], expected["vision_tower"][:12])
        differences.append("the vision tower (sha256 {}… there, {}… here)".format(*towers))
    there, here = found["image_processor"], expected["image_processor"]
    changed = [
        f"{name} ({there.get(name)!r} there, {here.get(name)!r} here)"
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name)
    ]
    if changed:
        differences.append(f"the processor settings {', '.join(changed)}")
    return differences


def _read_manifest(path: Path) -> dict:
    """A manifest; an empty one if the file is somebody else's of that name."""
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # RecursionError: nested too deeply
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _fingerprint(tower: torch.nn.Module) -> str:
    """sha256 of a tower's configuration and weights."""
    config = _without_noise(json.loads(tower.config.to_json_string(use_diff=False)))
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, weight in sorted(tower.state_dict().items()):
        _hash_tensor(digest, name, weight)
    return digest.hexdigest()


def _hash_tensor(digest, name: str, tensor: torch.Tensor) -> None:
    digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
    # NumPy has no bfloat16, and a view of the memory copies nothing.
    digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())


def _without_noise(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if name not in NOISE and not name.startswith("_")}


def _write_whole(path: Path, data: bytes) -> None:
    """Write a file that nobody ever sees half of."""
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}")  # a killed process leaves it behind; nobody reads it
    try:
        unfinished.write_bytes(data)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


__all__ = ["ImageFeatureCache"]
