"""The only place that checks the files of a folder: before a model is loaded from it, and before it is pushed.

Folders come from anywhere. To load one (`check_model`), its files must keep to it and state sizes that are there. To
push one (`checked_files`), only what is known to belong to a model is allowed, and texts may hold no token and no path
of this machine.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from lladamedv.modeling_lladamedv import LLaDAMedVConfig, LLaDAMedVForConditionalGeneration
from lladamedv.modeling_lladamedv.released_lladamedv import FILES, Checkpoint, read_checkpoint
from lladamedv.modeling_lladamedv.stored_weights_lladamedv import read_header, read_json, read_weights

from .licences import CARD
from .privacy import SECRET


AUTO_CLASSES = (
    "AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor",
)  # fmt: skip
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PROJECTOR = "mm_projector.safetensors"  # of stage 1, beside the model
_TOWERS = ("*/config.json", "*/*/config.json")  # of vision towers in subfolders
# What libraries raise for values that they do not expect.
_BUILD_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_LARGEST_JSON = 2**24  # bytes of a configuration or an index: Python takes about twenty times that to read it
_MODEL_FILES = (
    CARD, "config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja",
)  # fmt: skip
# What a training leaves in its folder for itself, by names of files and folders: pickles, states of the optimiser, and
# reports that quote the data. Left out.
OF_TRAINING = (
    "checkpoint-*", "checkpoints*", "optimizer*", "scheduler*", "scaler*", "rng_state*", "global_step*", "latest",
    "zero_to_fp32.py", "trainer_state.json", "training_args.bin", "data_report.json", "answers.jsonl",
    "answers.html", "completions.jsonl", "not_finite*.json", "runs", "wandb", "mlruns", "events.out.tfevents.*",
    "progress",
)  # fmt: skip
# What is wrong with a file of another name; the first line counts that fits. A reason goes by the names of the file and
# of the folders above it, a permission (`None`) by the whole path.
_RULES = {
    ("*.new", "*.tmp", "*.partial", "*.incomplete", "*.lock"): "is left over from an interrupted write",
    ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt"): (
        "is a pickle, which can run code when it is loaded; only safetensors are allowed"
    ),
    (".gitattributes", ".eval_results/*.yaml"): None,
    (".*",): "is hidden",
    (CARD, "LICENSE*", "NOTICE*", "*.json", "*.py", "*.jinja", "*.txt", "*.png", "*.jpg", "*.svg", "model.safetensors",
     "model-*-of-*.safetensors", PROJECTOR, ADAPTER_WEIGHTS): None,
    ("*",): "is no part of a model",
}  # fmt: skip
_TEXTS = (".json", ".md", ".py", ".jinja", ".txt", ".yaml")
_PATH = re.compile(r"(?<![\w./<~])/([\w.+-]+)(?:/[\w.+-]+)+|\bfile://|\b[A-Za-z]:(?:\\{1,2}[\w.+-]+){2,}")
_ROOTS = {"home", "Users", "root", "tmp", "mnt", "media", "scratch", "Volumes", "workspace", "data", "private", "var"}


# Before a model is loaded


def check_model(folder: Path, source: str | Path | None = None, with_weights: bool = True) -> Checkpoint:
    """Check a folder before a model is loaded from it, and before memory is taken for its weights.

    Args:
        folder: of a model of this package or in a released layout; of a Hub repository, its snapshot.
        source: the name that led to the folder, such as a Hub id.
        with_weights: whether weights are going to be loaded, or the configuration alone.

    Raises:
        ValueError: for the reasons of [`check_folder`] and [`read_checkpoint`]; if weights of the model are missing or
            have other shapes, or the folder holds others, or its configuration names other files.
    """
    checkpoint, expected = _described_model(check_folder(folder), source)
    if "transformers_weights" in checkpoint.original:
        raise ValueError("`transformers_weights` in config.json names other files; allowed is model.safetensors.")
    files = list(checkpoint.folder.glob("*.safetensors"))
    # Quantised weights, and those that several devices have saved, have names and shapes of their own.
    by_devices = any(file.name.startswith("shard-") for file in files)
    if by_devices or checkpoint.original.get("quantization_config"):
        if not by_devices or (checkpoint.folder / SAFE_WEIGHTS_INDEX_NAME).exists():
            read_weights([*checkpoint.folder.iterdir()])
        stored = sum(file.stat().st_size for file in files)
        needed = sum(torch.Size(shape).numel() for shape in expected.values())
        if 4 * stored < needed:  # two bits a weight
            raise ValueError(
                f"The checkpoint {checkpoint.source!r} has {stored} bytes, too few for its {needed} weights."
            )
    elif with_weights:
        checkpoint.compare(expected)[1].check(checkpoint.source)
    return checkpoint


def _described_model(folder: Path, source: str | Path | None) -> tuple[Checkpoint, dict[str, tuple[int, ...]]]:
    """The checkpoint of a folder, and names and shapes of the weights that its configuration describes.

    Libraries build the parts of a model, and their errors do not name the field: it is the one without which the model
    can be built.
    """
    original = read_json(folder / "config.json")

    def build(config: dict) -> tuple:
        if not isinstance(config.get("auto_map", {}), dict):
            raise TypeError("it must be an object")
        checkpoint = read_checkpoint(folder, source=source, original=copy.deepcopy(config))
        return checkpoint, LLaDAMedVForConditionalGeneration.parameter_shapes(checkpoint.config)

    try:
        return build(original)
    except _BUILD_ERRORS as error:
        found = _odd_field(original, build)
        if found is None or found[0].rpartition(".")[2] in str(error):
            raise
        field, value = found
        cause = error.__cause__ or error
        raise ValueError(
            f"`{field}` in {str(folder / 'config.json')!r} is {value!r:.200}, with which no model can be built "
            f"({type(cause).__name__}: {' '.join(str(cause).split())})."
        ) from error


def _odd_field(config: dict, build: Callable[[dict], object]) -> tuple[str, object] | None:
    """The first field, also of a part, without which a configuration can be built, and its value."""
    for name, value in config.items():
        others = {each: config[each] for each in config if each != name}
        if isinstance(value, dict) and name.endswith("_config"):
            found = _odd_field(value, lambda part, others=others, name=name: build(others | {name: part}))
            if found is not None:
                return f"{name}.{found[0]}", found[1]
        with suppress(*_BUILD_ERRORS):
            build(others)
            return name, value
    return None


def check_folder(folder: str | Path) -> Path:
    """See that the files of a local folder keep to that folder, and that its JSON can be read.

    Links may lead to other files of the folder. The Hub's cache is made of links, which lead to the blobs of the same
    repository or of the whole cache.

    Args:
        folder: of a model, of adapters, of a part of a model, or of a tokenizer.

    Returns:
        The folder.

    Raises:
        ValueError: for a file that is a link to elsewhere or none that can be read, such as a pipe; or a configuration
            or an index of more than 16 MB.
    """
    folder = Path(folder)
    for file in (file for pattern in (*FILES, "*.safetensors", *_TOWERS) for file in folder.glob(pattern)):
        if problem := _irregular(file, folder):
            raise ValueError(
                f"{str(file)!r} {problem}; allowed are files, and links to what is within the same folder. Copy what a "
                "link leads to, if that can be trusted."
            )
        is_read = file.name.endswith(("config.json", "calibration.json")) or ".index." in file.name
        if is_read and file.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"{str(file)!r} has {file.stat().st_size} bytes; allowed are at most {_LARGEST_JSON}.")
    return folder


def _irregular(file: Path, folder: Path) -> str | None:
    """What a path of a folder is, if it is neither a file nor a folder in it."""
    # Not `Path.resolve`, which raises RuntimeError for links in a circle.
    place, home = Path(os.path.realpath(file)), Path(os.path.realpath(folder))
    homes = [home]
    for repository in home.parents:  # models--OWNER--NAME/snapshots/REVISION
        if repository.name.startswith("models--") and home.relative_to(repository).parts[0] == "snapshots":
            homes += [repository, repository.parent / "blobs"]
    if not any(place.is_relative_to(each) for each in homes):
        return f"is a link to what is outside the folder ({str(place)!r})"
    # Reading a pipe may never end.
    return None if place.is_file() or place.is_dir() else "is no file"


# Before a folder is pushed


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
    files, left_out, problems, indexed = {}, [], [], _indexed_files(folder)
    for place, folders, names in os.walk(folder):
        folders.sort()
        links = [name for name in folders if Path(place, name).is_symlink()]
        for path in (Path(place, name) for name in sorted([*names, *links])):
            relative = path.relative_to(folder)
            name = relative.as_posix()
            lineage = [*relative.parts, name, *(parent.as_posix() for parent in relative.parents[:-1])]
            if any(fnmatchcase(each, pattern) for each in lineage for pattern in (*leave_out, *OF_TRAINING)):
                left_out.append(name)
            elif problem := _irregular(path, folder) or (
                "is no file" if path.is_dir() else name not in indexed and _why_not(relative)
            ):
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


def _indexed_files(folder: Path) -> set[str]:
    """The files that a folder's index says hold weights, whatever their names; what is wrong with it is found later."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    with suppress(*_BUILD_ERRORS):
        places = read_json(index)["weight_map"].values() if index.is_file() else ()
        return {name for name in places if name.endswith(".safetensors")}
    return set()


def _why_not(path: Path) -> str | None:
    """Why a file does not belong in a repository."""
    for patterns, reason in _RULES.items():
        names = path.parts if reason else [path.as_posix()]
        if any(fnmatchcase(name, pattern) for name in names for pattern in patterns):
            return reason


def check_model_files(files: dict[str, Path | bytes]) -> Iterator[str]:
    """What is wrong with a model's files."""
    contents = {}
    yield from _check_texts(files, _MODEL_FILES, contents)
    yield from _check_weights(files, contents)
    if "config.json" not in contents:
        return
    config = contents["config.json"]
    if config.get("model_type") != LLaDAMedVConfig.model_type:
        yield f"config.json is of a model of type {config.get('model_type')!r}, not 'lladamedv' (see lladamedv convert)"
        return
    auto_map = _texts_of(config, "auto_map")
    yield from (f"`auto_map` in config.json lacks {name}" for name in AUTO_CLASSES if name not in auto_map)
    if "AutoProcessor" not in _texts_of(contents.get("processor_config.json", {}), "auto_map"):
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


def _texts_of(content: dict, name: str) -> dict[str, str]:
    """The texts of an object in a file, none where there is no object."""
    found = content.get(name)
    return {key: value for key, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}


def check_adapter_files(files: dict[str, Path | bytes]) -> Iterator[str]:
    """What is wrong with adapters' files."""
    yield from _check_texts(files, (CARD, ADAPTER_CONFIG, ADAPTER_WEIGHTS), {})
    if ADAPTER_WEIGHTS in files:
        yield from _errors(read_header, files[ADAPTER_WEIGHTS])


def _errors(check: Callable, *arguments) -> Iterator[str]:
    """The error that a check raises, if it does."""
    try:
        check(*arguments)
    except ValueError as error:
        yield str(error)


def _check_texts(files: dict[str, Path | bytes], needed: Sequence[str], contents: dict[str, dict]) -> Iterator[str]:
    """Files that are missing and texts that cannot be read; JSON objects are put into `contents`."""
    yield from (f"{name} is missing" for name in needed if name not in files)
    for name, file in files.items():
        if not name.endswith(_TEXTS):
            continue
        try:
            text = _text(file)
            if name.endswith(".json"):
                content = json.loads(text)
                if isinstance(content, dict):
                    contents[name] = content
                elif name in needed:
                    yield f"{name} is no JSON object"
            elif name == CARD and not ModelCard(text, ignore_metadata_errors=False).data.to_dict():
                yield f"{CARD} is no card: it has no front matter"
        except UnicodeDecodeError:
            yield f"{name} is not UTF-8"
        except (json.JSONDecodeError, RecursionError) as error:
            yield f"{name} is no JSON ({error})"
        except (ValueError, yaml.YAMLError) as error:
            yield f"{name} is no card: {' '.join(str(error).split())}"


def _check_weights(files: dict[str, Path | bytes], contents: dict[str, dict]) -> Iterator[str]:
    """Shards that are damaged, missing, or others than the index says."""
    weights = [file for name, file in files.items() if isinstance(file, Path) and "/" not in name]
    problems = [*_errors(read_weights, weights)]
    yield from problems
    if PROJECTOR in files:
        yield from _errors(read_header, files[PROJECTOR])
    index = contents.get(SAFE_WEIGHTS_INDEX_NAME, {})
    metadata = index.get("metadata") or {}
    if not isinstance(metadata, dict):
        yield f"`metadata` in {SAFE_WEIGHTS_INDEX_NAME} is no JSON object"
        return
    total = metadata.get("total_size")
    if total is not None and not problems:
        shards = [files[name] for name in {*index["weight_map"].values()}]
        # The first 8 bytes of a file are the length of its header.
        size = sum(file.stat().st_size - 8 - int.from_bytes(file.open("rb").read(8), "little") for file in shards)
        if total != size:
            yield f"weights have {size} bytes, but {SAFE_WEIGHTS_INDEX_NAME} says {total}"


def _private_texts(files: dict[str, Path | bytes], secret: str | None) -> Iterator[str]:
    """Tokens, and paths of this machine. A token is never quoted."""
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
        for path in _PATH.finditer(text):
            if path[1] is None or path[1] in _ROOTS or Path("/", path[1]).exists():
                yield f"{name} holds the path {path[0]!r} of a machine"
                break


def _text(file: Path | bytes) -> str:
    return file.decode() if isinstance(file, bytes) else file.read_text(encoding="utf-8")


__all__ = [
    "ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "AUTO_CLASSES", "PROJECTOR", "check_adapter_files", "check_folder",
    "check_model", "check_model_files", "checked_files",
]  # fmt: skip
