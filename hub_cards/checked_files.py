"""What may leave this machine: the files of a model's folder, checked one by one and together before they are pushed.

Only what is known to belong to a model is allowed. Pickles can run code when they are loaded, and tokens and paths are
private.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_imports

from .privacy import SECRET


CARD = "README.md"
AUTO_CLASSES = (
    "AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor",
)  # fmt: skip
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OTHER_WEIGHTS = ("mm_projector.safetensors",)  # of stage 1, beside the model
_MODEL_FILES = (
    CARD, "config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja",
)  # fmt: skip
_ADAPTER_FILES = (CARD, ADAPTER_CONFIG, ADAPTER_WEIGHTS)
_ALLOWED = (
    CARD, "LICENSE*", "NOTICE*", "*.json", "*.safetensors", "*.py", "*.jinja", "*.txt", "*.png", "*.jpg", "*.svg",
    ".gitattributes", ".eval_results/*.yaml",
)  # fmt: skip
# What a training leaves in its folder for itself (`lladamedv demo --train` in `progress`), by names of files and
# folders: pickles, states of the optimiser, and reports that quote the data. Left out.
OF_TRAINING = (
    "checkpoint-*", "checkpoints*", "optimizer*", "scheduler*", "scaler*", "rng_state*", "global_step*", "latest",
    "zero_to_fp32.py", "trainer_state.json", "training_args.bin", "data_report.json", "answers.jsonl",
    "not_finite*.json", "runs", "wandb", "mlruns", "events.out.tfevents.*", "progress",
)  # fmt: skip
# What is refused and why; the first pattern counts that the file's path, or a folder's above it, has.
_REFUSED = {
    ("*.new", "*.tmp", "*.partial", "*.incomplete", "*.lock"): "is left over from an interrupted write",
    ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt"): (
        "is a pickle, which can run code when it is loaded; only safetensors are allowed"
    ),
    (".*",): "is hidden",
}
_TEXTS = (".json", ".md", ".py", ".jinja", ".txt", ".yaml")
_PATH = re.compile(r"(?<![\w./<~])/([\w.+-]+)(?:/[\w.+-]+)+|\bfile://|\b[A-Za-z]:(?:\\{1,2}[\w.+-]+){2,}")
_ROOTS = {"home", "Users", "root", "tmp", "mnt", "media", "scratch", "Volumes", "workspace", "data", "private", "var"}


def checked_files(
    folder: Path,
    leave_out: Sequence[str],
    check: Callable[[dict[str, Path | bytes]], Iterator[str]],
    secret: str | None,
    changes: dict[str, bytes] | None = None,
) -> tuple[dict[str, Path | bytes], tuple[str, ...]]:
    """What of a folder can be pushed.

    Args:
        folder: it and its files are only read.
        leave_out: patterns of files and folders that are not to be pushed, besides `OF_TRAINING`.
        check: yields what is wrong with the files: [`check_model_files`] or [`check_adapter_files`].
        secret: a token to search the files for, besides what looks like one.
        changes: contents of files that are pushed instead of what is in the folder.

    Returns:
        Files by their names in the repository, and the names of those left out.

    Raises:
        ValueError: with everything that is wrong.
    """
    files, left_out, problems = {}, [], []
    for name, path in _walk(folder):
        if any(fnmatchcase(part, pattern) for part in _lineage(name) for pattern in (*leave_out, *OF_TRAINING)):
            left_out.append(name)
        elif problem := _why_not(folder, name, path):
            problems.append(f"{name} {problem}")
        else:
            files[name] = path
    files |= changes or {}
    problems = problems or [*check(files)] or [*_private_texts(files, secret)]
    if problems:
        raise ValueError(
            f"`folder` is {str(folder)!r}, which is not pushed: {'; '.join(problems)}. What is not to be pushed can be "
            "named in `leave_out`."
        )
    return files, tuple(left_out)


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """All files, and folders that are links, with their names relative to `folder`."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        links = [name for name in folders if Path(place, name).is_symlink()]
        for name in sorted([*names, *links]):
            path = Path(place, name)
            yield path.relative_to(folder).as_posix(), path


def _lineage(name: str) -> list[str]:
    """A file's name in the repository and those of the folders above it, in full and alone."""
    parts = name.split("/")
    return [*parts, *("/".join(parts[:depth]) for depth in range(2, len(parts) + 1))]


def _why_not(folder: Path, name: str, path: Path) -> str | None:
    """Why a file does not belong in a repository."""
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        return "is a link to what is outside the folder"
    if not path.is_file():
        return "is no file"
    allowed = any(fnmatchcase(name, pattern) for pattern in _ALLOWED)
    for patterns, reason in _REFUSED.items():
        if any(fnmatchcase(part, pattern) for part in name.split("/") for pattern in patterns):
            if reason != "is hidden" or not allowed:
                return reason
    return None if allowed else "is no part of a model"


def check_model_files(files: dict[str, Path | bytes]) -> Iterator[str]:
    """What is wrong with a model's files."""
    yield from (f"{name} is missing" for name in _MODEL_FILES if name not in files)
    contents = {}
    yield from _check_texts(files, contents)
    yield from _check_weights(files, contents)
    if "config.json" not in contents:
        return
    config = contents["config.json"]
    if config.get("model_type") != "lladamedv":
        yield f"config.json is of a model of type {config.get('model_type')!r}, not 'lladamedv' (see lladamedv convert)"
        return
    auto_map = config.get("auto_map", {})
    yield from (f"`auto_map` in config.json lacks {name}" for name in AUTO_CLASSES if name not in auto_map)
    if "AutoProcessor" not in contents.get("processor_config.json", {}).get("auto_map", {}):
        yield "`auto_map` in processor_config.json lacks AutoProcessor"
    for reference in sorted(set(auto_map.values())):
        module, _, name = reference.rpartition(".")
        code = files.get(f"{module}.py")
        if code is None:
            yield f"`auto_map` in config.json names {module}.py, which is missing"
        elif f"class {name}(" not in _text(code):
            yield f"`auto_map` in config.json names {reference}, which {module}.py has not"
    for name, code in files.items():
        if name.endswith(".py"):
            missing = [module for module in get_relative_imports(code) if f"{module}.py" not in files]
            yield from (f"{name} imports {module}.py, which is missing" for module in missing)


def check_adapter_files(files: dict[str, Path | bytes]) -> Iterator[str]:
    """What is wrong with adapters' files."""
    yield from (f"{name} is missing" for name in _ADAPTER_FILES if name not in files)
    yield from _check_texts(files, {})
    for name, path in files.items():
        if name.endswith(".safetensors"):
            yield from _read_header(name, path, {})


def _check_texts(files: dict[str, Path | bytes], contents: dict[str, object]) -> Iterator[str]:
    """Texts that cannot be read; what JSON files hold is put into `contents`."""
    for name, file in files.items():
        if not name.endswith(_TEXTS):
            continue
        try:
            text = _text(file)
            if name.endswith(".json"):
                contents[name] = json.loads(text)
                if not isinstance(contents[name], dict) and name in _MODEL_FILES:
                    yield f"{name} is no JSON object"
            elif name == CARD and not ModelCard(text, ignore_metadata_errors=False).data.to_dict():
                yield f"{CARD} is no card: it has no front matter"
        except UnicodeDecodeError:
            yield f"{name} is not UTF-8"
        except (json.JSONDecodeError, RecursionError) as error:
            yield f"{name} is no JSON ({error})"
        except ValueError as error:
            yield f"{name} is no card: {' '.join(str(error).split())}"


def _check_weights(files: dict[str, Path | bytes], contents: dict[str, object]) -> Iterator[str]:
    """Shards that are damaged, missing, or others than the index says."""
    shards = [name for name in files if name.endswith(".safetensors") and name not in _OTHER_WEIGHTS]
    sizes, places = {}, {}
    for name in shards:
        yield from _read_header(name, files[name], places)
        sizes[name] = _data_size(files[name])
    if _INDEX not in files:
        if shards != [_WEIGHTS]:
            yield f"weights are {', '.join(shards) or 'missing'}; without {_INDEX} only {_WEIGHTS} is allowed"
        return
    index = contents.get(_INDEX, {})
    if "weight_map" not in index:
        yield f"{_INDEX} has no weight_map"
        return
    weight_map, named = index["weight_map"], set(index["weight_map"].values())
    yield from (f"{name} is named in {_INDEX} and missing" for name in sorted(named - set(shards)))
    yield from (f"{name} is not named in {_INDEX}" for name in sorted(set(shards) - named))
    if named == set(shards) and weight_map != places:
        wrong = sorted(key for key in {*weight_map, *places} if weight_map.get(key) != places.get(key))
        yield f"{len(wrong)} weights are not where {_INDEX} says, as {wrong[0]}"
    total = (index.get("metadata") or {}).get("total_size")
    if named == set(shards) and total is not None and total != sum(sizes.values()):
        yield f"weights have {sum(sizes.values())} bytes, but {_INDEX} says {total}"


def _read_header(name: str, path: Path, places: dict[str, str]) -> Iterator[str]:
    """What is wrong with a file of weights; its keys are put into `places`."""
    try:
        with safe_open(path, framework="np") as stored:  # also compares the header with the file's size
            places |= dict.fromkeys(stored.keys(), name)
    except (SafetensorError, OSError) as error:
        yield f"{name} is cut off or damaged ({error})"


def _data_size(path: Path) -> int:
    """Bytes of weights in a safetensors file, without the header that its first 8 bytes give the length of."""
    with open(path, "rb") as file:
        return max(0, path.stat().st_size - 8 - int.from_bytes(file.read(8), "little"))


def _private_texts(files: dict[str, Path | bytes], secret: str | None) -> Iterator[str]:
    """Tokens, and paths of this machine, that nobody else should read. A token is never quoted."""
    for name, file in files.items():
        if name.endswith(".safetensors"):
            with safe_open(file, framework="np") as stored:
                text = json.dumps(stored.metadata() or {})
        elif name.endswith(_TEXTS):
            text = _text(file)
        else:
            continue
        if SECRET.search(text) or (secret and secret in text):
            yield f"{name} holds what looks like a token"
        if name == "tokenizer.json":  # a vocabulary may have anything
            continue
        path = next((each for each in _PATH.finditer(text) if _is_local(each)), None)
        if path is not None:
            yield f"{name} holds the path {path[0]!r} of a machine"


def _is_local(path: re.Match) -> bool:
    return path[1] is None or path[1] in _ROOTS or Path("/", path[1]).exists()


def _text(file: Path | bytes) -> str:
    return file.decode() if isinstance(file, bytes) else file.read_text(encoding="utf-8")


__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "AUTO_CLASSES",
    "CARD",
    "check_adapter_files",
    "check_model_files",
    "checked_files",
]
