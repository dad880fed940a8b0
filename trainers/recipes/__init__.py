"""The recipes and accelerate configurations that come with this package, by name, and how they are launched."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path


RECIPES = Path(__file__).parent
ACCELERATE = RECIPES / "accelerate"
# What other trainers' command lines call what the script calls otherwise.
_OTHER_NAMES = {
    **dict.fromkeys(("model", "model_name", "base_model"), "model_name_or_path"),
    **dict.fromkeys(("dataset", "dataset_name", "dataset_path", "data", "data_path", "train_file"), "train_data"),
    **dict.fromkeys(("eval_dataset", "validation_file"), "eval_data"),
    **dict.fromkeys(("output", "out"), "output_dir"),
    "test_size": "eval_split", "lr": "learning_rate", "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
}  # fmt: skip
_USAGE = "It comes first, and flags change it: lladamedv train lora_one_gpu --model MODEL --dataset DATA --output OUT."
_DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")


def recipe_file(name: str | None, words: Sequence[str] = ()) -> Path:
    """The file of a recipe.

    Args:
        name: of a recipe that comes with this package, or path of a YAML file.
        words: flags for the training script. Without a recipe, a model and data are enough: then it is a LoRA's.

    Raises:
        ValueError: if there is none.
    """
    flags = dict(zip(words, [*words[1:], ""]))
    if name is None and "--train_data" in flags and "--model_name_or_path" in flags:
        return RECIPES / ("demo_lora.yaml" if flags["--model_name_or_path"] == "demo" else "lora_one_gpu.yaml")
    if name is None:
        raise ValueError(f"No recipe is given. {_USAGE} Recipes are {', '.join(describe_recipes())}, or a YAML file.")
    return _resolve("recipe", name, RECIPES)


def read_flags(words: Sequence[str]) -> list[str]:
    """Flags for the training script, by its own names, looked at before it is started, which takes seconds.

    Raises:
        ValueError: for a data file that is not there.
    """
    flag, own = "", []
    for word in words:
        if word.startswith("--"):
            flag, is_set, word = word.removeprefix("--").replace("-", "_").partition("=")
            if flag == "config":
                raise ValueError(f"--config is the first word, RECIPE, here. {_USAGE}")
            given, flag = flag, _OTHER_NAMES.get(flag, flag)
            own += [f"--{flag}"] + [word] * bool(is_set)
        else:
            own.append(word)
        is_file = word.startswith(("/", "./", "../", "~")) or word.lower().endswith(_DATA_SUFFIXES)
        if flag in ("train_data", "eval_data") and is_file and not Path(word).expanduser().exists():
            raise ValueError(f"--{given} is {word!r}; there is no such file or folder.")
    return own


def accelerate_file(name: str | None) -> Path | None:
    """The file of an accelerate configuration.

    Args:
        name: of a configuration that comes with this package, or path of a file. `None` means accelerate's own default,
            or the one for CPUs where there is neither a default nor a GPU: accelerate would use a single thread.

    Returns:
        The file, or `None` for accelerate's own default.

    Raises:
        ValueError: if there is none.
    """
    if name is not None:
        return _resolve("accelerate", name, ACCELERATE)
    import torch
    from accelerate.commands.config import default_config_file

    alone = not torch.accelerator.is_available() and not Path(default_config_file).is_file()
    return ACCELERATE / "cpu.yaml" if alone else None


def describe_recipes() -> dict[str, str]:
    """What each recipe is for, by its name: the line that it begins with."""
    files = sorted(RECIPES.glob("*.yaml"))
    return {file.stem: file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ") for file in files}


def launch(configuration: Path | None, module: str, arguments: Sequence[str]) -> int:
    """Run `accelerate launch -m module arguments` in this process, as TRL's own command line does.

    Args:
        configuration: of accelerate; `None` for its default.

    Returns:
        The exit code of the script, of the first process that failed where there are several; 128 and the number of a
        signal such as Ctrl-C that ended them.

    Raises:
        KeyboardInterrupt: for Ctrl-C where there is one process.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    words = [] if configuration is None else ["--config_file", str(configuration)]
    try:
        launch_command(launch_command_parser().parse_args([*words, "-m", module, *arguments]))
    except subprocess.CalledProcessError as error:
        return error.returncode
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _resolve(argument: str, name: str | None, folder: Path) -> Path:
    shipped = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    if name is None or not Path(name).is_file():
        raise ValueError(f"`{argument}` is {name!r}; allowed are {', '.join(shipped)}, or a YAML file.")
    return Path(name)


__all__ = ["ACCELERATE", "RECIPES", "accelerate_file", "describe_recipes", "launch", "read_flags", "recipe_file"]
