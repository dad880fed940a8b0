"""What the files of a checkpoint hold: names, shapes and dtypes of weights, read from headers alone.

`read_weights` reads them and checks that the files agree with their index; a `KeyReport` says what became of every key.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


# What Transformers takes weights from, besides the files that an index names; others may lie beside them, such as a
# variant's.
_SHARDS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


@dataclass(frozen=True)
class StoredWeight:
    """A weight in a safetensors file: where it is, its shape, and its dtype as safetensors writes it ("BF16")."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


@dataclass
class KeyReport:
    """What became of every key."""

    layout: str  # one of `KEY_MAPPINGS`, or several joined by " + " where a model was put together from parts
    mapped: dict[str, str] = field(default_factory=dict)  # source key -> our name
    ignored: dict[str, str] = field(default_factory=dict)  # source key -> why it is not needed
    missing: list[str] = field(default_factory=list)  # our names that nothing in the source stands for
    unexpected: list[str] = field(default_factory=list)  # source keys that mean nothing here
    misshaped: dict[str, tuple] = field(default_factory=dict)  # source key -> the shape that it has, and the right one

    def add(self, part: KeyReport) -> None:
        """Account for another source that the same model is put together from."""
        self.layout += f" + {part.layout}"
        self.mapped |= part.mapped
        self.ignored |= part.ignored
        self.missing = [name for name in self.missing if name not in part.mapped.values()]

    def check(self, source: object) -> None:
        """Raise ValueError, naming keys, unless every weight is there, known and of the right shape."""
        shapes = [f"{key} {tuple(found)} instead of {tuple(due)}" for key, (found, due) in self.misshaped.items()]
        problems = {
            "holds keys that are not part of this layout": self.unexpected,
            "holds weights of the wrong shape": shapes,
            "lacks weights of the model": self.missing,
        }
        for problem, keys in problems.items():
            if keys:
                shown = ", ".join(sorted(keys)[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
                is_projector = self.mapped and all("mm_projector." in key for key in self.mapped)
                hint = " A projector is no model: `lladamedv init --projector` makes one with it." * bool(is_projector)
                raise ValueError(f"The checkpoint {str(source)!r} (layout {self.layout}) {problem}: {shown}.{hint}")

    def summary(self) -> list[str]:
        """Lines for people: counts, and the reasons for what was ignored."""
        counts = f"{len(self.mapped)} keys mapped, {len(self.ignored)} ignored, {len(self.missing)} missing"
        reasons = Counter(self.ignored.values()).items()
        return [f"layout {self.layout}: {counts}", *(f"  ignored {count}: {reason}" for reason, count in reasons)]


def read_json(file: Path) -> dict:
    """The object that a JSON file holds.

    Raises:
        ValueError: if there is no such file, or it holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"The folder {str(file.parent)!r} holds no {file.name}.") from error
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise ValueError(f"{str(file)!r} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(file)!r} holds a {type(content).__name__}; it must hold an object.")
    return content


def read_weights(files: list[Path]) -> dict[str, StoredWeight]:
    """Names, shapes and dtypes of all weights of a model, from the headers of its files.

    Args:
        files: of one folder; their index, what it names, and what has the names that Transformers gives to weights are
            looked at.

    Raises:
        ValueError: if there are none, a shard is missing, cut off or not in the index, or the index is wrong.
    """
    where = str(files[0].parent) if files else "."
    files = {file.name: file for file in sorted(files)}
    shards = [name for name in files if _SHARDS.fullmatch(name)]
    index, places = files.get(SAFE_WEIGHTS_INDEX_NAME), None
    if index is not None:
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict):
            raise ValueError(f"{str(index)!r} is not an index of weights: it has no object `weight_map`.")
        named = {name for name in places.values() if isinstance(name, str) and name.endswith(".safetensors")}
        shards = [name for name in files if name in shards or name in named]
        if absent := sorted({repr(name) for name in places.values() if name not in shards}):
            raise ValueError(f"The folder {where!r} lacks files that its index names: {', '.join(absent[:5])}.")
    elif not shards:
        pickled = [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
        hint = f" It holds {pickled[:3]}, but pickled weights are not loaded." if pickled else ""
        raise ValueError(f"The folder {where!r} holds no weights: no {SAFE_WEIGHTS_NAME}, nor shards of it.{hint}")
    elif shards != [SAFE_WEIGHTS_NAME]:
        raise ValueError(
            f"The folder {where!r} holds {', '.join(shards[:3])} without {SAFE_WEIGHTS_INDEX_NAME}, which says whether "
            "they are complete."
        )
    weights = [weight for name in shards for weight in read_header(files[name])]
    found = {(weight.key, weight.file.name) for weight in weights}
    if places is not None and (wrong := sorted(found ^ {*places.items()})):
        key = wrong[0][0]
        holders = " and ".join(sorted(file for each, file in found if each == key)) or "no file"
        raise ValueError(
            f"{len(dict(wrong))} weights are not where the index of {where!r} says, as {key}: it names "
            f"{places.get(key, 'no file')}, and the weight is in {holders}."
        )
    return {weight.key: weight for weight in weights}


def read_header(file: Path) -> list[StoredWeight]:
    """The weights of one safetensors file.

    Raises:
        ValueError: if it is cut off, or no safetensors file.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            views = {key: handle.get_slice(key) for key in handle.keys()}
            return [StoredWeight(file, key, tuple(each.get_shape()), each.get_dtype()) for key, each in views.items()]
    except (SafetensorError, OSError) as error:
        with file.open("rb") as handle:
            is_pointer = handle.read(24) == b"version https://git-lfs."
        hint = "it is a Git LFS pointer: run `git lfs pull`" if is_pointer else f"cut off or damaged ({error})"
        raise ValueError(f"{str(file)!r} cannot be read: {hint}.") from error
