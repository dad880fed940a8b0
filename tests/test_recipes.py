"""Every recipe can be read, says what the paper says, and states memory that adds up; every accelerate file loads."""

import re

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from peft import LoraConfig, get_peft_model

from lladamedv import LLaDAMedVConfig, LLaDAMedVForConditionalGeneration
from lladamedv.demo import load_model
from lladamedv.processing.datasets import SOURCES
from lladamedv.trainers.recipes import ACCELERATE, RECIPES, accelerate_file, describe_recipes, recipe_file
from lladamedv.trainers.sft import LORA_TARGET_MODULES, make_parser, method_of


NAMES = [file.stem for file in sorted(RECIPES.glob("*.yaml"))]
STAGES = [name for name in NAMES if name.startswith("stage")]
ACCELERATE_NAMES = [file.stem for file in sorted(ACCELERATE.glob("*.yaml"))]
# LLaDA-V's, wherever the paper says nothing.
UNDISCLOSED = {
    "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "weight_decay", "warmup_steps",
    "lr_scheduler_type", "max_length",
}  # fmt: skip


def parse(name, *flags):
    """Script, training and model arguments; `use_cpu` because bf16 needs a GPU otherwise."""
    words = ["--config", str(RECIPES / f"{name}.yaml"), "--use_cpu", *flags]
    return make_parser(method_of(words)).parse_args_and_config(words)


def text(name):
    return (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")


def test_all_recipes_are_there():
    assert NAMES == [
        "demo_closed_form", "demo_dpo", "demo_expected_reward", "demo_full", "demo_grpo", "demo_lora", "lora_one_gpu",
        "qlora_24gb", "stage1_alignment", "stage2_instruct", "stage3_pathvqa", "stage3_slake", "stage3_vqa_rad",
    ]  # fmt: skip
    assert ACCELERATE_NAMES == ["cpu", "ddp", "fsdp2", "multi_node", "one_gpu", "zero3"]
    assert list(described := describe_recipes()) == NAMES
    assert all(len(text) > 20 and "#" not in text for text in described.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_understood(name):
    script, training, model = parse(name)
    given = yaml.safe_load(text(name))
    for key, value in given.items():
        holder = next(each for each in (script, training, model) if hasattr(each, key))
        if key not in ("train_data", "eval_data", "accelerator_config"):
            assert getattr(holder, key) == value, key
    assert [source.path for source in script.train_data] == [given["train_data"]] and model.model_name_or_path
    assert training.bf16 == ("demo" not in name)
    assert parse(name, "--learning_rate", "3e-4")[1].learning_rate == 3e-4  # flags have the last word


@pytest.mark.parametrize("name", STAGES)
def test_what_the_paper_says(name):
    script, training, model = parse(name)
    epochs = {"stage1_alignment": 2, "stage2_instruct": 4, "stage3_vqa_rad": 2, "stage3_slake": 10, "stage3_pathvqa": 7}
    first = name == "stage1_alignment"
    assert training.num_train_epochs == epochs[name] and not model.use_peft
    assert training.trainable == ("projector" if first else "projector+language_model")
    assert script.chat_template == ("llada_plain" if first else "llava_llada_med")
    assert training.learning_rate == (1e-3 if first else 1e-5)
    assert training.weight_decay == 0 and training.warmup_steps == 0.03 and training.lr_scheduler_type == "cosine"
    assert 4 * training.per_device_train_batch_size * training.gradient_accumulation_steps == 64
    assert training.max_length == 8192 and not training.turn_mask
    if not first:  # without it, FSDP accumulates whole gradients
        assert training.accelerator_config.gradient_accumulation_kwargs == {"sync_each_batch": True}
    for line in text(name).splitlines():
        if line.partition(":")[0] in UNDISCLOSED:
            assert "# not disclosed: " in line and "LLaDA-V's" in line, line


@pytest.mark.parametrize("name", NAMES)
def test_hub_ids_are_pinned(name):
    for source in parse(name)[0].train_data:
        path = source.path
        if path.startswith("vqa:"):
            repository, publication = next(iter(SOURCES[path.removeprefix("vqa:")].items()))
            path = f"{repository}@{publication.revision}"
        local = path.startswith("phantoms:") or path.endswith(".json")
        assert local or re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", path)


@pytest.fixture(scope="module")
def counts():
    """Numbers of parameters that recipes calculate with, from the models themselves."""

    def adapters(model, rank):
        config = LoraConfig(r=rank, target_modules=LORA_TARGET_MODULES, task_type="CAUSAL_LM")
        return get_peft_model(model, config).num_parameters(only_trainable=True)

    def number(part, least=0):
        weights = model.named_parameters()
        return sum(weight.numel() for name, weight in weights if name.startswith(part) and weight.dim() >= least)

    with torch.device("meta"):
        model = LLaDAMedVForConditionalGeneration(LLaDAMedVConfig())
    every, newline, layers = number(""), number("model.image_newline"), "model.language_model.layers."
    matrices, demo = number(layers, 2), load_model()[0]
    return {
        every, every - newline, number("model.multi_modal_projector."), every - number("model.vision_tower."),
        number(f"{layers}0."), every - number(layers), every - newline - number(layers), number("lm_head."), matrices,
        every - matrices, demo.num_parameters(), adapters(model, 64), adapters(demo, 16),
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_memory_adds_up(name, counts):
    """Each line of the calculation, their sum, and that the numbers of parameters are the model's."""
    lines = re.findall(r"^#   (\w.*?)  +([\d(][\d .*/+()]*?)? *= +([\d.]+) GB$", text(name), flags=re.MULTILINE)
    *parts, (last, nothing, total) = lines
    assert last == "together" and not nothing and parts
    for what, expression, stated in (*parts, (last, "+".join(expression for _, expression, _ in parts), total)):
        assert abs(eval(expression) / 1e9 - float(stated)) <= 0.00501, what
        assert {int(value) for value in re.findall(r"\b\d+\b", expression) if int(value) > 20_000} <= counts, what
    limits = re.findall(r"GPUs? of (\d+) GB", text(name).partition("\n")[0])
    assert all(float(total) < int(limit) for limit in limits)


@pytest.mark.parametrize("name", ACCELERATE_NAMES)
def test_accelerate_configurations(name):
    file = str(ACCELERATE / f"{name}.yaml")
    config = load_config_from_file(file)
    assert config.num_processes == {"one_gpu": 1, "cpu": 1, "multi_node": 8}.get(name, 4)
    assert config.num_machines == (2 if name == "multi_node" else 1) and config.use_cpu == (name == "cpu")
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", file, "script"]))
    assert args.mixed_precision == ("no" if name == "cpu" else "bf16")
    ways = {"fsdp2": "use_fsdp", "multi_node": "use_fsdp", "zero3": "use_deepspeed", "ddp": "multi_gpu"}
    for way in ("use_fsdp", "use_deepspeed", "multi_gpu"):
        assert getattr(args, way) == (ways.get(name) == way)
    if not args.use_fsdp:
        return
    assert args.fsdp_version == 2 and args.fsdp_auto_wrap_policy == "TRANSFORMER_BASED_WRAP"
    with torch.device("meta"):
        model = LLaDAMedVForConditionalGeneration(LLaDAMedVConfig())
    wrapped = args.fsdp_transformer_layer_cls_to_wrap.split(",")
    found = [module for module in model.modules() if type(module).__name__ in wrapped]
    assert found == list(model.model.language_model.layers)


def test_names(tmp_path):
    assert recipe_file("demo_lora") == RECIPES / "demo_lora.yaml"
    assert accelerate_file("fsdp2") == ACCELERATE / "fsdp2.yaml"
    own = tmp_path / "own.yaml"
    own.touch()
    assert recipe_file(str(own)) == accelerate_file(str(own)) == own
    for name in ("demo", str(tmp_path), "own.yaml"):
        with pytest.raises(ValueError, match=rf"`recipe` is {name!r}; allowed are demo_c.*, or a YAML file"):
            recipe_file(name)
    with pytest.raises(ValueError, match="`accelerate` is 'fsdp'; allowed are cpu, ddp, fsdp2"):
        accelerate_file("fsdp")


def test_a_machine_without_a_gpu_uses_all_its_cores(tmp_path, monkeypatch):
    default = tmp_path / "default.yaml"
    monkeypatch.setattr("accelerate.commands.config.default_config_file", str(default))
    for has_gpu, has_default in ((False, False), (True, False), (True, True), (False, True)):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda has_gpu=has_gpu: has_gpu)
        if has_default:
            default.touch()
        assert accelerate_file(None) == (None if has_gpu or has_default else ACCELERATE / "cpu.yaml")
