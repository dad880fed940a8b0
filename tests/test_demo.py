"""The shipped checkpoint really answers, the blind baseline does not, and the command line is friendly."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from typer.testing import CliRunner

from lladamedv import demo
from lladamedv.cli import app
from lladamedv.conversation import DEMO_NOTICE, demo_notice
from lladamedv.processing.phantoms import PhantomVQA


def test_the_shipped_model_looks_at_the_picture(shipped):
    examples = list(PhantomVQA(demo.HELD_OUT_SEED + 1, 90))
    sighted = demo.evaluate_demo(*shipped, examples)
    blind = demo.evaluate_demo(*shipped, examples, shuffled=True)
    assert sighted.questions == 90
    assert min(sighted.closed, sighted.open, sighted.description) > 0.85
    assert blind.closed < 0.75 and blind.open < 0.6 and blind.description < 0.8


def test_adapters_are_merged(shipped, tmp_path):
    """What a training with LoRA leaves is asked as any model: as PEFT computes without merging."""
    base, processor = demo.load_model()
    base.name_or_path = str(demo.DEMO_MODEL)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, _ = demo.load_model(tmp_path)
    chats = [example.messages() for example in PhantomVQA(3, 2)]
    inputs = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )
    with torch.no_grad():
        expected, before = adapted.eval()(**inputs).logits, shipped[0](**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(before, expected, atol=0.1)
    assert demo_notice(model) == DEMO_NOTICE
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be loaded: "):
        demo.load_model(tmp_path)


def test_other_models_are_not_taken_for_the_demo(model):
    assert demo_notice(model) is None


def test_size_of_the_shipped_checkpoint():
    files = list(demo.DEMO_MODEL.iterdir())
    assert sum(file.stat().st_size for file in files) < 10e6
    assert not list(demo.DEMO_MODEL.glob("*.bin")) and not list(demo.DEMO_MODEL.glob("*.pt"))


def test_scores_are_those_of_the_benchmarks():
    examples = [example for example in PhantomVQA(3, 60) if example.kind != "closed"][:1]
    examples += [example for example in PhantomVQA(3, 60) if example.kind == "closed"][:1]
    exact = demo.score(examples, [example.answer for example in examples])
    assert exact.closed == 1 and max(exact.open, exact.description) == 1
    words = examples[0].answer.split()
    half = demo.score(examples, [words[0], examples[1].answer + " indeed"])
    assert half.closed == 0 and max(half.open, half.description) == pytest.approx(1 / len(words), rel=0.3)


def test_demo_command(tmp_path):
    sheet = tmp_path / "sheet.png"
    result = CliRunner().invoke(app, ["demo", "--questions", "24", "--output", str(sheet)])
    assert result.exit_code == 0, result.output
    assert "closed accuracy" in result.output and "blind" in result.output and DEMO_NOTICE in result.output
    assert Image.open(sheet).size[0] == 1400
