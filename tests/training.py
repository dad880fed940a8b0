"""Tiny trainings, of each trainer, in this process and in others; what is read off them."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from lladamedv import LLaDAMedVConfig, LLaDAMedVForConditionalGeneration, LLaDAMedVProcessor
from lladamedv import trainers as ours
from lladamedv.demo import DEMO_MODEL
from tests.tiny import random_image, randomize


LORA = {"r": 4, "target_modules": r".*language_model.*\.(q|v)_proj", "task_type": "CAUSAL_LM"}
FSDP = {
    "fsdp": "full_shard",
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer", "LLaDAMedVLastDecoderLayer"]},
    "save_strategy": "steps", "save_steps": 2,
}  # fmt: skip


def adapters():
    return LoraConfig(**LORA)


def tiny_processor():
    """The demo model's: its vocabulary is small, which keeps the runs short."""
    return LLaDAMedVProcessor.from_pretrained(DEMO_MODEL)


def tiny_model(seed=0):
    config = LLaDAMedVConfig.from_pretrained(DEMO_MODEL).to_dict()
    narrow = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config["text_config"] |= narrow | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}
    config["vision_config"] |= narrow
    torch.manual_seed(seed)  # of the tower's biases
    model = LLaDAMedVForConditionalGeneration(LLaDAMedVConfig(**config))
    randomize(model, seed)
    with torch.no_grad():  # small logits, so that a few steps change them smoothly
        model.lm_head.weight.mul_(0.1)
    return model


# The trainers


def turn(role, text):
    return [{"role": role, "content": text}]


def _rows(columns, count=8, images=True, **changes):
    """Four questions about each picture; `columns` are those of each question."""
    data = [
        {**columns[number % 4], "images": [random_image(seed=number // 4)] if images else [], "id": f"row-{number}",
         **changes} for number in range(count)
    ]  # fmt: skip
    return datasets.Dataset.from_list(data).cast_column("images", datasets.List(datasets.Image()))


def vowels(completions, answer, **_):
    return [sum(letter in "aeiou" for letter in completion[-1]["content"]) / 4 for completion in completions]


QUESTIONS = ["Is it small?", "Where is it?", "What is it?", "Big?"]
ANSWERS = ["Yes.", "On the left side.", "A lung.", "No."]
REJECTED = ["No.", "It is on the right.", "The brain.", "Yes, it is big."]
CANDIDATES = [["Yes", "No"], ["On the left", "Right", "Nowhere"], ["A lung", "The brain"], ["Yes", "No"]]
PROMPTS = [{"prompt": turn("user", question)} for question in QUESTIONS]


class Method(NamedTuple):
    trainer: type
    config: type
    columns: list[dict]
    options: dict
    given: dict = {}


METHODS = {
    "sft": Method(
        ours.MaskedDiffusionSFTTrainer, ours.MaskedDiffusionSFTConfig,
        [{"messages": turn("user", asked) + turn("assistant", said)} for asked, said in zip(QUESTIONS, ANSWERS)], {},
    ),
    "dpo": Method(
        ours.MaskedDiffusionDPOTrainer, ours.MaskedDiffusionDPOConfig,
        [prompt | {"chosen": turn("assistant", chosen), "rejected": turn("assistant", rejected)}
         for prompt, chosen, rejected in zip(PROMPTS, ANSWERS, REJECTED)],
        {"num_draws": 2, "beta": 0.2},
    ),
    "expected_reward": Method(
        ours.MaskedDiffusionExpectedRewardTrainer, ours.MaskedDiffusionExpectedRewardConfig,
        [prompt | {"candidates": candidates, "answer": answer}
         for prompt, candidates, answer in zip(PROMPTS, CANDIDATES, ["No", "Right", "A lung", "Yes"])],
        {"num_draws": 4, "max_exact_tokens": 3, "beta": 0.2, "reward_funcs": ["choice"], "mass_weight": 0.1},
    ),
    "grpo": Method(
        ours.MaskedDiffusionGRPOTrainer, ours.MaskedDiffusionGRPOConfig,
        [prompt | {"answer": answer} for prompt, answer in zip(PROMPTS, ["Yes.", "left", "A lung.", "No."])],
        {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 4},
        {"reward_funcs": vowels},
    ),
}  # fmt: skip
ROWS = {name: partial(_rows, method.columns) for name, method in METHODS.items()}


def arguments(method, folder, **options):
    options = {
        "per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "learning_rate": 1e-2, "bf16": False, "use_cpu": True, "activation_checkpointing": False, "seed": 3,
        "disable_tqdm": True, **METHODS[method].options, **options,
    }  # fmt: skip
    return METHODS[method].config(output_dir=str(folder), **options)


def make_trainer(method, folder, model=None, dataset=None, processor=None, **options):
    """`functions` are those that reward; what is no argument of the trainer is one of its configuration."""
    given = dict(METHODS[method].given)
    if "functions" in options:
        given["reward_funcs"] = options.pop("functions")
    given |= {name: options.pop(name) for name in ("peft_config", "eval_dataset", "ref_model") if name in options}
    return METHODS[method].trainer(
        model=model or tiny_model(), args=arguments(method, folder, **options),
        train_dataset=ROWS[method]() if dataset is None else dataset, processing_class=processor or tiny_processor(),
        **given,
    )  # fmt: skip


def trained(method, folder, resume=None, **options):
    """After training, if asked for from a checkpoint, by its path or its name in the folder."""
    trainer = make_trainer(method, folder, **options)
    trainer.train(resume_from_checkpoint=resume and str(folder / resume))
    return trainer


# What is read off them


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def changed(model, before):
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}


def logged(trainer, name="loss"):
    """Of the steps at which it was logged."""
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry and name in entry]


losses = logged


# Other processes


def start_workers(runs, processes=1):
    """Trainings in other processes: `runs` are the arguments of `tests.training_worker`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "tests.training_worker", json.dumps(runs)],
        cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip


def run_two_processes(runs):
    """Train in two processes. Returns the losses of each run."""
    process = start_workers(runs, processes=2)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:]
    return [json.loads((Path(folder) / "losses.json").read_text()) for folder, _ in runs]


def kill_behind(checkpoint, folder, options):
    """SIGKILL while a run goes on behind a checkpoint."""
    process = start_workers([(str(folder), options)])
    state = folder / checkpoint / "trainer_state.json"
    while not (state.exists() and state.read_text().endswith("}\n")):  # it is there before it is filled
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (folder / "losses.json").exists()


def check_sharded(tmp_path, file):
    """The weights of a sharded run, and of one resumed from its checkpoint, are those of the run in `two`."""
    expected = load_file(tmp_path / "two" / file)
    for folder in (tmp_path / "fsdp", tmp_path / "fsdp" / "resumed"):
        torch.testing.assert_close(load_file(folder / file), expected, atol=1e-6, rtol=1e-6)
