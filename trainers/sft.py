"""Fine-tuning from the command line: `accelerate launch -m lladamedv.trainers.sft --config RECIPE --flag value`.

`lladamedv train RECIPE --flag value` is the same, with the recipes of this package by name. A recipe is a YAML file of
the arguments below; flags have the last word. Messages name an argument by its flag.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path

import torch
import yaml
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForImageTextToText, set_seed
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from lladamedv.hub_cards import is_hub_id
from lladamedv.hub_cards.checks import PROJECTOR, check_model
from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration, LLaDAMedVGenerationConfig
from lladamedv.modeling_lladamedv.presets_lladamedv import PRESETS, SPECIAL_TOKENS
from lladamedv.modeling_lladamedv.released_lladamedv import Checkpoint, resolve_source
from lladamedv.processing import LLaDAMedVProcessor
from lladamedv.processing.datasets import LoadReport
from lladamedv.processing.processing_lladamedv import CHAT_TEMPLATES
from lladamedv.processing.released import checkpoint_processor

from .data import STOPPING_STRATEGIES, DataSource, load_dataset_mixture
from .masked_diffusion_dpo_config import MaskedDiffusionDPOConfig
from .masked_diffusion_dpo_trainer import MaskedDiffusionDPOTrainer
from .masked_diffusion_expected_reward_config import MaskedDiffusionExpectedRewardConfig
from .masked_diffusion_expected_reward_trainer import MaskedDiffusionExpectedRewardTrainer
from .masked_diffusion_grpo_config import MaskedDiffusionGRPOConfig
from .masked_diffusion_grpo_trainer import MaskedDiffusionGRPOTrainer
from .masked_diffusion_sft_config import MaskedDiffusionSFTConfig
from .masked_diffusion_sft_trainer import MaskedDiffusionSFTTrainer
from .rows import split_by_image


logger = logging.getLogger(__name__)
METHODS = {
    "sft": (MaskedDiffusionSFTConfig, MaskedDiffusionSFTTrainer, "answers"),
    "dpo": (MaskedDiffusionDPOConfig, MaskedDiffusionDPOTrainer, "pairs"),
    "expected_reward": (MaskedDiffusionExpectedRewardConfig, MaskedDiffusionExpectedRewardTrainer, "prompts"),
    "grpo": (MaskedDiffusionGRPOConfig, MaskedDiffusionGRPOTrainer, "prompts"),
}
DEMO = "demo"  # as a model: the tiny one that comes with the package
# The language model's matrices alone: the tower has layers of the same names.
LORA_TARGET_MODULES = r"model\.language_model\.layers\.\d+\.\w+\.(q|k|v|o|gate|up|down)_proj"
# In full, because Transformers matches a name from its beginning. What is not here is the language model's layers.
QUANTIZATION_SKIP_MODULES = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
_ADAPTER_FLAGS = {each.name for each in fields(ModelConfig) if "lora" in each.name or "dora" in each.name}
_TRACKERS = ("tensorboard", "trackio", "wandb")  # that are extras of this package
_FULL = 2**20  # bytes that are free on a full disk, at most


@dataclass
class SFTScriptArguments:
    """What the script needs besides [`MaskedDiffusionSFTConfig`] and [`trl.ModelConfig`]; each field has its `help`."""

    method: str = field(
        default="sft",
        metadata={"help": "What to learn from: answers (sft), preferences between two (dpo), "
                  "rewards of the possible ones (expected_reward), or rewards of the model's own (grpo).",
                  "choices": list(METHODS)},
    )  # fmt: skip
    train_data: list[DataSource] = field(
        default_factory=list,
        metadata={"help": "Hub ids, folders, files, vqa:BENCHMARK, phantoms:SEED:COUNT; in a recipe also all fields of "
                  "a DataSource."},
    )  # fmt: skip
    eval_data: list[DataSource] = field(
        default_factory=list,
        metadata={"help": "The same, for `eval_loss`, if `eval_strategy` asks for it. What a recipe names belongs to "
                  "its own `train_data`: with other training data on the command line it is not used."},
    )  # fmt: skip
    eval_split: float | None = field(
        default=None,
        metadata={"help": "Instead of `eval_data`: about which part of the rows of `train_data` to hold out, as in "
                  "0.1. Drawn by image with `seed`: rows about the same picture are on the same side."},
    )  # fmt: skip
    image_folder: str | None = field(
        default=None, metadata={"help": "The `image_folder` of sources that do not have one of their own."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Whether to read the training data while training; needs `max_steps`."}
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "Streamed rows to draw from at random; they wait in memory, undecoded."}
    )
    stopping_strategy: str = field(
        default="first_exhausted",
        metadata={"help": "Where a weighted mixture ends.", "choices": list(STOPPING_STRATEGIES)},
    )
    processor: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the processor, if it is not beside the model."}
    )
    chat_template: str | None = field(
        default=None,
        metadata={"help": "The prompt to train with; by default the processor's own.", "choices": list(CHAT_TEMPLATES)},
    )
    from_scratch: bool = field(
        default=False,
        metadata={"help": "Whether to take only the model's configuration and generation options, and random weights."},
    )
    quantization_skip_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Full names of modules that `load_in_4bit` and `load_in_8bit` leave as they are; by default "
                  "the vision tower, the projector and the output layer."},
    )  # fmt: skip

    def __post_init__(self):
        for name in ("train_data", "eval_data"):  # a recipe may name a single source
            value = getattr(self, name)
            setattr(self, name, list(value) if isinstance(value, (list, tuple)) else [value])
        if self.eval_split is not None and not 0 < self.eval_split < 1:
            raise ValueError(f"--eval_split is {self.eval_split}; allowed are numbers between 0 and 1, as in 0.1.")
        if self.eval_split is not None and self.streaming:
            raise ValueError(
                f"--eval_split is {self.eval_split} and --streaming is given; to be split, data must be read whole."
            )
        if self.shuffle_buffer < 1:
            raise ValueError(f"--shuffle_buffer is {self.shuffle_buffer}; allowed are whole numbers of at least 1.")


class _Parser(TrlParser):
    """Wrong flags end in one line and exit code 2: the usage that argparse prints would fill some screens."""

    def error(self, message: str):
        self.exit(2, f"lladamedv: {message}\n")

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:  # Transformers refuses them only after the others are parsed
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def parse_args_and_config(self, args=None, *others, **options):
        args = list(sys.argv[1:] if args is None else args)
        script, training, model = super().parse_args_and_config(args, *others, **options)
        flags = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in args if word.startswith("--")}
        _settle_evaluation(script, training, flags)
        adapters = sorted(flags & _ADAPTER_FLAGS)
        if adapters and not model.use_peft:
            raise ValueError(
                f"--{adapters[0]} is given without --use_peft, so that the weights themselves would be trained; add "
                "--use_peft, or leave it out."
            )
        return script, training, model


def _settle_evaluation(script: SFTScriptArguments, training: MaskedDiffusionSFTConfig, flags: set[str]) -> None:
    """What is evaluated where flags change a recipe.

    Raises:
        ValueError: if flags contradict each other.
    """
    if script.eval_data and "eval_data" not in flags and flags & {"train_data", "eval_split"}:
        script.eval_data = []
        if script.eval_split is None and "eval_strategy" not in flags:
            training.eval_strategy, training.do_eval = IntervalStrategy.NO, False
            if "log_answers" not in flags:
                training.log_answers = 0
            logger.warning(
                "The recipe's own eval_data belongs to its train_data, so nothing is evaluated. To evaluate, add "
                "--eval_data DATA, or --eval_split 0.1 to hold rows out."
            )
    if script.eval_data and script.eval_split is not None:
        raise ValueError(f"--eval_split is {script.eval_split}, but --eval_data is given, too; allowed is one of them.")
    for name in flags & {"eval_data", "eval_split"}:
        if training.eval_strategy == IntervalStrategy.NO:
            raise ValueError(
                f"--{name} is given, but --eval_strategy is 'no', so that nothing would be evaluated; add "
                "--eval_strategy epoch, or steps."
            )
    if training.eval_strategy != IntervalStrategy.NO and not script.eval_data and script.eval_split is None:
        raise ValueError(
            f"--eval_data is empty, but --eval_strategy is {training.eval_strategy.value!r}; name data, or hold rows "
            "out with --eval_split."
        )


def make_parser(method: str = "sft") -> TrlParser:
    """The parser of recipes and flags of one of `METHODS`."""
    return _Parser((SFTScriptArguments, METHODS.get(method, METHODS["sft"])[0], ModelConfig), allow_abbrev=False)


def method_of(arguments: Sequence[str]) -> str:
    """The method that flags name, or else the recipe: which arguments there are depends on it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--method", "--config"):
        parser.add_argument(name)
    flags, _ = parser.parse_known_args(arguments)
    recipe = flags.config and not flags.method and yaml.safe_load(Path(flags.config).read_text(encoding="utf-8"))
    return flags.method or (recipe or {}).get("method", "sft")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as a recipe and flags say; by default those of the command line.

    Raises:
        SystemExit: with one line of text, if an argument, the model or the data is not what it should be; with 130 for
            Ctrl-C.
    """
    try:
        _run(arguments)
    except KeyboardInterrupt:
        sys.exit(130)


def _run(arguments: Sequence[str] | None) -> None:
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        script_args, training_args, model_args = make_parser(method_of(arguments)).parse_args_and_config(arguments)
        _check_trackers(training_args.report_to)
        checkpoint = find_checkpoint(training_args.resume_from_checkpoint, training_args.output_dir)
        trainer, reports = build_trainer(script_args, training_args, model_args)
    except (OSError, ValueError) as error:
        sys.exit(f"lladamedv: {' '.join(str(error).splitlines())}")
    try:
        if not script_args.streaming:
            _write_reports(trainer, script_args, reports)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(_internal_call=True)  # not pushed yet
        if script_args.streaming:  # the reports are complete only now
            _write_reports(trainer, script_args, reports)
        trainer.create_model_card(Path(training_args.output_dir).name)
        if training_args.should_save and training_args.trainable == "projector" and not model_args.use_peft:
            _write_projector(training_args.output_dir)
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        # PyTorch raises RuntimeError for a full disk, and for much else that needs its traceback.
        if isinstance(error, RuntimeError) and free_space(training_args.output_dir) > _FULL:
            raise
        lines = str(error).splitlines() or [type(error).__name__]
        # A dataloader worker sends its whole traceback, which ends with the error.
        sys.exit(f"lladamedv: training stopped: {lines[-1] if 'Original Traceback' in str(error) else ' '.join(lines)}")
    trainer.accelerator.print(f"wrote {training_args.output_dir}")
    if training_args.push_to_hub:
        names = [report.source.partition("@")[0] for report in reports[: len(script_args.train_data)]]
        hub_ids = [name for name in names if not os.path.exists(name) and ":" not in name]
        try:
            trainer.push_to_hub(dataset_name=hub_ids or None)
        except ValueError as error:
            sys.exit(f"lladamedv: the model is in {training_args.output_dir}, but: {error}")
        trainer.accelerator.print(f"pushed to {trainer.hub_model_id}")
    trainer.end()


def _check_trackers(names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: for a tracker that there is none of, that is not installed, or that would only be refused by its
            server, after model and data are loaded.
    """
    known, installed = sorted(INTEGRATION_TO_CALLBACK), get_available_reporting_integrations()
    for name in names:
        if name not in known:
            raise ValueError(f"--report_to is {name!r}; allowed are none, all, {', '.join(known)}.")
        if name not in installed:
            package = f'"lladamedv[{name}]"' if name in _TRACKERS else name
            raise ValueError(
                f"--report_to is {name!r}, whose package is not installed; install it (pip install {package}), or "
                "report to none."
            )
    if "wandb" in names:
        import wandb

        problem = None
        try:
            if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
                problem = "no API key is known"
        except wandb.Error as error:
            problem = str(error).rstrip(".")
        if problem is not None:
            raise ValueError(
                f"--report_to is 'wandb', which is not logged in: {problem}. Run wandb login, or set "
                "WANDB_MODE=offline, which sends nothing."
            )


def free_space(folder: str | Path) -> int:
    """Bytes that can be written to a folder, also one that is not there yet."""
    existing = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def build_trainer(
    script_args: SFTScriptArguments, training_args: MaskedDiffusionSFTConfig, model_args: ModelConfig
) -> tuple[MaskedDiffusionSFTTrainer, list[LoadReport]]:
    """Load model, processor and data.

    Returns:
        The trainer, and what became of each source of the data.

    Raises:
        ValueError: if something is not what it should be; the message names the argument, its value and what is
            allowed.
    """
    if training_args.push_to_hub and model_args.use_peft and not is_hub_id(model_args.model_name_or_path or ""):
        raise ValueError(
            f"--push_to_hub is given, but the adapters' model is {model_args.model_name_or_path!r}, which others do "
            "not have; train on a model of the Hub, or push afterwards: lladamedv push FOLDER REPO --base-model HUB_ID."
        )
    set_seed(training_args.seed)  # of random weights
    model, processor = load_model(script_args, model_args)
    peft_config = lora_config(model, model_args)
    options = {
        "image_folder": script_args.image_folder, "seed": training_args.seed,
        "stopping_strategy": script_args.stopping_strategy, "invalid_records": training_args.invalid_rows,
        "form": METHODS[script_args.method][2],
    }  # fmt: skip
    with training_args.main_process_first(desc="loading data"):
        train_data, reports = load_dataset_mixture(
            script_args.train_data, streaming=script_args.streaming, argument="--train_data", **options
        )
        eval_data, held_out = None, None
        if script_args.eval_split is not None:
            share, seed = script_args.eval_split, training_args.seed
            train_data, eval_data, images = split_by_image(
                train_data, share, seed, processor.image_processor.fetch_images, training_args.disable_tqdm
            )
            held_out = {"share": share, "seed": seed, "images": images[1], "images_to_train_on": images[0]}
        elif training_args.eval_strategy != IntervalStrategy.NO:
            eval_data, more = load_dataset_mixture(script_args.eval_data, argument="--eval_data", **options)
            reports = reports + more
    if script_args.streaming:
        train_data = train_data.shuffle(training_args.seed, buffer_size=script_args.shuffle_buffer)
    trainer = METHODS[script_args.method][1](
        model=model, args=training_args, train_dataset=train_data, eval_dataset=eval_data, processing_class=processor,
        peft_config=peft_config,
    )  # fmt: skip
    if held_out is not None:
        trainer.row_reports["eval_dataset"].held_out = held_out
    folder, weights = training_args.output_dir, trainer.model.parameters()
    needed = sum(weight.nbytes for weight in weights if weight.requires_grad or peft_config is None)
    if (free := free_space(folder)) < needed:
        raise ValueError(
            f"--output_dir is {folder!r}, where {free / 1e6:.1f} MB are free; the weights to save have "
            f"{needed / 1e6:.1f} MB."
        )
    return trainer, reports


def _write_reports(trainer: MaskedDiffusionSFTTrainer, script_args: SFTScriptArguments, reports: list[LoadReport]):
    """Print what became of the data, and put it, with every row that was left out, into `output_dir/data_report.json`:
    an object for each source, and one for each data set whose rows were checked."""
    entries = []
    for number, report in enumerate(reports):
        use = "train_data" if number < len(script_args.train_data) else "eval_data"
        streamed = script_args.streaming and use == "train_data"
        entry, summary = {"use": use, **asdict(report), "streamed": streamed}, report.summary()
        if streamed and trainer.args.dataloader_num_workers:
            entry |= {"rows": None, "missing_images": None, "invalid": None}
            summary = f"{report.source}: streamed to dataloader workers, and not counted"
        trainer.accelerator.print(summary)
        entries.append(entry)
    for name, report in trainer.row_reports.items():
        trainer.accelerator.print(f"{name}: {report.summary()}")
        entries.append({"data_set": name, **vars(report)})
    if trainer.is_world_process_zero():
        file = Path(trainer.args.output_dir, "data_report.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_model(
    script_args: SFTScriptArguments, model_args: ModelConfig
) -> tuple[LLaDAMedVForConditionalGeneration, LLaDAMedVProcessor]:
    """The model to train, quantised if asked for, and its processor.

    Raises:
        ValueError: if the folder or Hub id holds no checkpoint of this model, or options contradict each other.
    """
    name = model_args.model_name_or_path
    if name is None:
        raise ValueError(f"--model_name_or_path is not given; allowed are a folder, a Hub id, or {DEMO!r}.")
    name = str(files("lladamedv") / "demo_model") if name == DEMO else os.path.expanduser(name)
    quantization = quantization_config(script_args, model_args)
    try:
        folder = resolve_source(name, model_args.model_revision)
        checkpoint = check_model(folder, name, with_weights=not script_args.from_scratch)
        if script_args.from_scratch:
            if quantization is not None or checkpoint.is_released:
                raise ValueError("--from_scratch needs a folder of this package's own format, without quantisation")
            model = _random_model(checkpoint, model_args)
        else:
            model = checkpoint.load(
                LLaDAMedVForConditionalGeneration, dtype=model_args.dtype, quantization_config=quantization,
                attn_implementation=model_args.attn_implementation,
            )  # fmt: skip
    except (OSError, ValueError) as error:
        raise ValueError(f"--model_name_or_path is {name!r}, which cannot be loaded: {error}") from error
    try:
        if script_args.processor is not None:
            processor = LLaDAMedVProcessor.from_pretrained(os.path.expanduser(script_args.processor))
        else:
            processor = checkpoint_processor(checkpoint, PRESETS, SPECIAL_TOKENS)
    except Exception as error:  # the tokenizers library has no kind of its own
        raise ValueError(f"--processor is {script_args.processor!r}; none can be loaded: {error}") from error
    if script_args.chat_template is not None:
        template = CHAT_TEMPLATES[script_args.chat_template]
        several = isinstance(processor.chat_template, dict)
        processor.chat_template = {**processor.chat_template, "default": template} if several else template
    return model, processor


def _random_model(checkpoint: Checkpoint, model_args: ModelConfig) -> LLaDAMedVForConditionalGeneration:
    """A model of a checkpoint's configuration with random weights, and the checkpoint's generation options."""
    options = {"attn_implementation": model_args.attn_implementation}
    model = AutoModelForImageTextToText.from_config(checkpoint.config, **options)
    if not checkpoint.config.text_only:
        # SigLIP's own random position embeddings drown what small patches show; these are a ViT's.
        nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=0.02)
    model.generation_config = LLaDAMedVGenerationConfig.from_pretrained(checkpoint.folder)
    return model if model_args.dtype in (None, "auto") else model.to(getattr(torch, model_args.dtype))


def quantization_config(script_args: SFTScriptArguments, model_args: ModelConfig):
    """How to quantise the base of adapters, or `None`.

    Raises:
        ValueError: without adapters: quantised weights cannot be trained.
    """
    config = get_quantization_config(model_args)
    if config is None:
        return None
    if not model_args.use_peft:
        option = "load_in_4bit" if model_args.load_in_4bit else "load_in_8bit"
        raise ValueError(f"--{option} is given without --use_peft; quantised weights are trained with adapters only.")
    config.llm_int8_skip_modules = list(script_args.quantization_skip_modules or QUANTIZATION_SKIP_MODULES)
    config.llm_int8_threshold = 0.0  # the default lets rows of a batch change each other's logits
    return config


def lora_config(model: LLaDAMedVForConditionalGeneration, model_args: ModelConfig) -> PeftConfig | None:
    """The adapters to train, by default on all matrices of the language model's layers, or `None`.

    Raises:
        ValueError: for a name among `lora_target_modules` or `lora_modules_to_save` that no module has.
    """
    if not model_args.use_peft:
        return None
    if model_args.lora_target_modules is None and model_args.lora_target_parameters is None:
        model_args.lora_target_modules = LORA_TARGET_MODULES
    names = [name for name, _ in model.named_modules() if name]
    for argument in ("lora_target_modules", "lora_modules_to_save"):  # PEFT takes names of which some match
        value = getattr(model_args, argument)
        if value in (None, "all-linear"):
            continue
        if isinstance(value, str) and any(re.fullmatch(value, name) for name in names):
            continue
        value = [value] if isinstance(value, str) else value  # ModelConfig makes the only name of a list a text
        setattr(model_args, argument, value)
        absent = [each for each in value if not any(f".{name}".endswith(f".{each}") for name in names)]
        if absent:
            last = sorted({name.rpartition(".")[2] for name in names if not name[-1].isdigit()})
            raise ValueError(
                f"--{argument} holds {', '.join(map(repr, absent))}, which no module of the model is called; allowed "
                f"are a regular expression for whole names, or the ends of names: {', '.join(last)}."
            )
    return get_peft_config(model_args)


def find_checkpoint(value: str | bool | None, output_dir: str) -> str | None:
    """The folder of the checkpoint to go on from, or `None` for the start.

    Args:
        value: `resume_from_checkpoint`: `"true"` for the last complete checkpoint in `output_dir`; `"last"` for the
            same, or the start if there is none; a folder; or nothing.
        output_dir: where checkpoints are.

    Raises:
        ValueError: if there is no such checkpoint.
    """
    last_file, word = "trainer_state.json", str(value).lower()  # written after weights and optimizer
    if value is None or word == "false":
        return None
    if word not in ("true", "last"):
        if not Path(value, last_file).is_file():
            raise ValueError(
                f"--resume_from_checkpoint is {value!r}, which is no checkpoint; allowed are its folder, "
                "true, last and false."
            )
        return value
    found = [file.parent for file in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{last_file}")]
    if not found and word == "true":
        raise ValueError(
            f"--resume_from_checkpoint is {value!r}, but --output_dir {output_dir!r} holds no complete checkpoint; "
            "'last' would start anew."
        )
    return str(max(found, key=lambda folder: int(folder.name.rpartition("-")[2]))) if found else None


def _write_projector(folder: str | Path) -> None:
    """Put the projector of a saved model into a file of its own, for `lladamedv init --projector`."""
    weights = {}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            weights |= {name: stored.get_tensor(name) for name in stored.keys() if "multi_modal_projector" in name}
    save_file(weights, Path(folder) / PROJECTOR, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
