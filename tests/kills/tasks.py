"""The tasks that are killed. Called again, each goes on as a user's second call of the same command does."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lladamedv.conversion import convert_checkpoint
from lladamedv.demo import load_model
from lladamedv.evaluation.chat import judge_answers
from lladamedv.evaluation.judge import OpenAIJudge
from lladamedv.evaluation.vqa import evaluate_vqa
from lladamedv.hub_cards.push import push_folder
from lladamedv.processing.datasets import load_vqa
from lladamedv.processing.datasets.chat_benchmark import load_chat_benchmark
from lladamedv.trainers.sft import find_checkpoint
from tests.hub_stub import take_for_the_hub
from tests.test_masked_diffusion_sft_trainer import make_trainer


OPTIONS = {"max_new_tokens": 8, "block_length": 8, "steps": 8}


def convert(source: Path, out: Path, tokenizer: Path) -> None:
    if not out.exists():  # a second call would say that there is such a folder
        convert_checkpoint(source, out, tokenizer, report=str)


def train(folder: Path) -> None:
    torch.manual_seed(0)
    trainer = make_trainer(folder, max_steps=10, save_strategy="steps", save_steps=1, save_total_limit=2)
    trainer.train(resume_from_checkpoint=find_checkpoint("last", str(folder)))
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    (folder / "losses.json").write_text(json.dumps(losses))


def evaluate(folder: Path) -> None:
    dataset, report = load_vqa("phantoms", path="9000:24")
    evaluate_vqa(
        *load_model(), dataset, report, folder, model_name="demo", options=OPTIONS, batch_size=2, bootstrap_samples=20
    )


def judge(url: str, questions: Path, folder: Path) -> None:
    records, _ = load_chat_benchmark(questions)
    answers = {record["id"]: f"I see {record['id']}." for record in records}
    judge_answers(records, answers, OpenAIJudge("a-judge", url), folder, max_concurrent=2, report=str)


def push(url: str, home: Path, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        take_for_the_hub(SimpleNamespace(url=url), patch, home)
        push_folder(folder, "me/model", report=str)
