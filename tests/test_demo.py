"""The shipped checkpoint really answers, and the blind baseline does not."""

import json

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


def test_scores_are_those_of_the_benchmarks():
    examples = list(PhantomVQA(3, 60))
    asked = [next(each for each in examples if (each.kind == "closed") == closed) for closed in (False, True)]
    exact = demo.score(asked, [example.answer for example in asked])
    assert exact.closed == 1 and max(exact.open, exact.description) == 1
    words = asked[0].answer.split()
    half = demo.score(asked, [words[0], asked[1].answer + " indeed"])
    assert half.closed == 0 and max(half.open, half.description) == pytest.approx(1 / len(words), rel=0.3)


def test_size_of_the_shipped_checkpoint():
    files = list(demo.DEMO_MODEL.iterdir())
    assert sum(file.stat().st_size for file in files) < 10e6
    assert not {file.suffix for file in files} & {".bin", ".pt"}


@pytest.mark.parametrize("as_json", [False, True])
def test_demo_command(tmp_path, as_json):
    sheet = tmp_path / "sheet.png"
    result = CliRunner().invoke(app, ["demo", "--questions", "24", "--output", str(sheet), *["--json"] * as_json])
    assert result.exit_code == 0, result.output
    assert Image.open(sheet).size[0] == 1400
    lines = result.stderr if as_json else result.stdout
    assert "closed accuracy" in lines and "blind" in lines and DEMO_NOTICE in lines
    if as_json:
        given = json.loads(result.stdout)
        assert given["output"] == str(sheet) and given["scores"]["looking at the picture"]["questions"] == 24
        assert f"{given['scores']['looking at the picture']['open']:.1%}" in lines
