"""`lladamedv convert` and `init`: whole folders or none, prompts and options, the Hub, and what is refused."""

import errno
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from typer.testing import CliRunner

from lladamedv import LLaDAMedVForConditionalGeneration, LLaDAMedVProcessor
from lladamedv.cli import app
from lladamedv.conversion import convert_checkpoint, initialize_checkpoint
from lladamedv.hub_cards.checks import check_model_files
from lladamedv.processing.processing_lladamedv import CHAT_TEMPLATES
from tests import released
from tests.hub_folders import contents
from tests.hub_stub import environment, running_hub
from tests.tiny import random_image, tiny_tokenizer


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def source(tmp_path):
    return released.write_llava(tmp_path / "SLAKE_10E", num_shards=2)


def convert(source, out, tokenizer, **options):
    return convert_checkpoint(source, out, tokenizer, report=str, **options)


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def run_python(arguments, folder, **variables):
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@contextmanager
def refused(folder, message, error=ValueError):
    """See that an action fails and leaves a folder as it was."""
    before = everything(folder)
    with pytest.raises(error, match=message):
        yield
    assert everything(folder) == before


def test_a_complete_folder(tmp_path, source, tokenizer):
    out = tmp_path / "new" / "out"
    report = convert(source, out, tokenizer, max_shard_size=3_000_000)
    files = {path.name: path for path in out.iterdir()}
    assert not list(check_model_files(files))  # with all the code that it needs
    assert {name for name in files if not name.endswith(".py")} == {
        "README.md", "additional_chat_templates", "chat_template.jinja", "config.json", "conversion_report.json",
        "generation_config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    written = json.loads((out / "conversion_report.json").read_text())
    assert written["mapped"] == report.mapped and written["ignored"] == report.ignored and written["missing"] == []
    assert written["source"] == {"checkpoint": "SLAKE_10E", "tokenizer": tokenizer.name}
    for file in out.glob("*.json"):
        assert str(tmp_path) not in file.read_text(), "no paths of this machine"
    assert str(tmp_path) not in (out / "README.md").read_text()

    model = LLaDAMedVForConditionalGeneration.from_pretrained(out)
    direct = LLaDAMedVForConditionalGeneration.from_pretrained(source)
    assert model.dtype == torch.bfloat16 and model.config.dtype == torch.bfloat16
    assert all(torch.equal(value, direct.state_dict()[name]) for name, value in model.state_dict().items())
    processor = LLaDAMedVProcessor.from_pretrained(out)
    assert processor.image_processor.image_grid_pinpoints == model.config.image_grid_pinpoints
    assert processor.image_token_id == model.config.image_token_id == 126349
    content = [{"type": "image", "image": random_image()}, {"type": "text", "text": "What is it?"}]
    chat, wanted = [{"role": "user", "content": content}], {"return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, **wanted)
    sequences = model.generate(**inputs)
    # The preset of the name: 64 tokens, ended by <|eot_id|> if the model writes one.
    assert inputs["input_ids"].shape[1] < sequences.shape[1] <= inputs["input_ids"].shape[1] + 64
    assert not (sequences == model.config.mask_token_id).any()


def test_prompts(tmp_path, source, tokenizer):
    def default(folder):
        return LLaDAMedVProcessor.from_pretrained(folder).chat_template

    convert(source, tmp_path / "medv", tokenizer)
    assert default(tmp_path / "medv") == {"default": CHAT_TEMPLATES["llava_llada_med"], **CHAT_TEMPLATES}
    convert(source, tmp_path / "v", tokenizer, preset="llada-v")
    assert default(tmp_path / "v")["default"] == CHAT_TEMPLATES["llava_llada"]
    convert(released.write_olmo(tmp_path / "llada"), tmp_path / "text", tokenizer)
    assert default(tmp_path / "text")["default"] == CHAT_TEMPLATES["llada"]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hello"}]}]
    with pytest.raises(Exception, match="it takes no images"):
        LLaDAMedVProcessor.from_pretrained(tmp_path / "text").apply_chat_template(chat)


def test_text_only(tmp_path, tokenizer):
    convert(released.write_olmo(tmp_path / "llada"), tmp_path / "out", tokenizer, dtype="float32")
    model = LLaDAMedVForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.config.text_only and model.config.vision_config is None and model.dtype == torch.float32
    sequences = model.generate(torch.tensor([[126080, 5, 6]]), max_new_tokens=8, eos_token_id=None)
    assert sequences.shape == (1, 11)
    with pytest.raises(ValueError, match="text-only: it has no vision tower"):
        model(input_ids=torch.tensor([[126349]]), pixel_values=torch.zeros(1, 1, 3, 28, 28))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "mit" and card.data.pipeline_tag == "text-generation"
    assert "AutoModelForImageTextToText" not in card.text


def test_init(tmp_path, tokenizer):
    projector = tmp_path / "mm_projector.bin"
    torch.save(released.projector_weights(), projector)
    parts = (released.write_olmo(tmp_path / "llada"), released.write_tower(tmp_path / "siglip"))
    for name, file in (("untrained", None), ("aligned", projector)):
        out = tmp_path / name
        report = initialize_checkpoint(*parts, out, file, tokenizer, report=str)
        assert not report.missing and "siglip" in report.layout
        model = LLaDAMedVForConditionalGeneration.from_pretrained(out)
        assert model.config.vision_aspect_ratio == "anyres_max_4"
        weight = model.model.multi_modal_projector.linear_2.weight
        trained = torch.equal(weight, released.projector_weights()["model.mm_projector.2.weight"])
        assert trained == (file is not None)
        card = (out / "README.md").read_text()
        assert ("is untrained" in card) == (file is None)
        assert LLaDAMedVProcessor.from_pretrained(out).image_processor.patch_size == released.PATCH


def test_card(tmp_path, source, tokenizer):
    convert(source, tmp_path / "out", tokenizer)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "other" and data["license_name"] == "asu-non-commercial"
    assert data["pipeline_tag"] == "image-text-to-text" and data["library_name"] == "transformers"
    assert {"research-only", "not-a-medical-device", "masked-diffusion"} <= set(data["tags"])
    model = LLaDAMedVForConditionalGeneration.from_pretrained(tmp_path / "out")
    count = sum(weight.numel() for weight in model.parameters())
    for text in (f"{count:,}", "Not a medical device", "arXiv 2508.01617", "2 ignored", "| `steps` | 64 |", "bfloat16"):
        assert text in card.text
    # The example is a program: it runs as it stands, but for the folder and the picture.
    code = card.text.split("```python\n")[1].split("```")[0]
    code = code.replace('"…"', repr(str(tmp_path / "out"))).replace("picture.png", str(tmp_path / "picture.png"))
    random_image().save(tmp_path / "picture.png")
    run = run_python(["-c", code], tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]


# Whole or not at all


def test_out_must_be_new(tmp_path, source, tokenizer):
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty", tokenizer)
    (tmp_path / "file").write_text("x")
    for out, message in (
        ("empty", "' exists already; allowed is a new or an empty folder"),
        ("file", "file' cannot be used: '.*file' is no folder"),
        ("file/below", "below' cannot be used: '.*file' is no folder"),
    ):
        with refused(tmp_path, message):
            convert(source, tmp_path / out, tokenizer)


@pytest.mark.parametrize(("error", "expected", "message"), [
    (OSError(errno.ENOSPC, "No space left"), ValueError, "No space left"),
    (KeyboardInterrupt(), KeyboardInterrupt, None),
])  # fmt: skip
def test_failure_in_the_middle(tmp_path, source, tokenizer, monkeypatch, error, expected, message):
    calls = []

    def fail_at_the_second(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise error
        save_file(*arguments, **options)

    monkeypatch.setattr("lladamedv.modeling_lladamedv.convert_checkpoint.save_file", fail_at_the_second)
    with refused(tmp_path, message, expected):
        convert(source, tmp_path / "out", tokenizer, max_shard_size=3_000_000)
    assert len(calls) == 2


def test_no_disk_space(tmp_path, source, tokenizer, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=60_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with refused(tmp_path, r"`out` is .* needs 0\.07 GB; only 0\.06 GB are free"):
        convert(source, tmp_path / "out", tokenizer)


def test_another_process_and_its_leftovers(tmp_path, source, tokenizer):
    """What a killed process leaves is cleared by the next attempt; that it is no model, `tests/kills` shows."""
    partial = tmp_path / ".out.partial"
    (partial / "folder").mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"cut")
    with FileLock(partial / ".lock"), pytest.raises(ValueError, match="which another process is writing"):
        convert(source, tmp_path / "out", tokenizer)
    convert(source, tmp_path / "out", tokenizer)
    assert not partial.exists() and "folder" not in everything(tmp_path / "out")
    assert LLaDAMedVForConditionalGeneration.from_pretrained(tmp_path / "out")


# What is refused before anything is written


def swapped(text):
    return text.replace("mdm_mask", "#").replace("reserved_token_0", "mdm_mask").replace("#", "reserved_token_0")


@pytest.mark.parametrize(("change", "message"), [
    (None, r"holds no tokenizer\.json"), (lambda text: "{", "cannot be read"),
    (lambda text: text.replace("<|mdm_mask|>", "<|mask|>"), r"has <\|mdm_mask\|> None instead of 126336"),
    (swapped, r"not the one of these weights: it has <\|mdm_mask\|> 126084 instead of 126336"),
])  # fmt: skip
def test_tokenizers(tmp_path, source, tokenizer, change, message):
    folder = shutil.copytree(tokenizer, tmp_path / "tokenizer")
    text = json.dumps(json.loads((folder / "tokenizer.json").read_text()), ensure_ascii=False)
    (folder / "tokenizer.json").write_text(change(text)) if change else (folder / "tokenizer.json").unlink()
    with refused(tmp_path, message):
        convert(source, tmp_path / "out", folder)


@pytest.mark.parametrize(("options", "message"), [
    ({"dtype": "int8"}, "`dtype` is 'int8'; allowed are float32, bfloat16, float16"),
    ({"preset": "gpt"}, "`preset` is 'gpt'; allowed are llada-medv, "),
    ({"push": "not a name"}, "`push` is 'not a name', which is no Hub id"),
    ({"push": "me/model"}, "`push` is 'me/model', but the login at the Hub fails"),
    ({"vision_tower": "nowhere"}, "'nowhere' is no folder, and cannot be had from the Hub"),
    ({"preset": "llada"}, "`preset` is 'llada', but .* is a vision-language model"),
    ({"max_shard_size": "much"}, "`max_shard_size` is 'much'"), ({"max_shard_size": 0}, "`max_shard_size` is 0"),
])  # fmt: skip
def test_arguments(tmp_path, source, tokenizer, options, message):
    with refused(tmp_path, message):
        convert(source, tmp_path / "out", tokenizer, **options)


# The command line and the Hub


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_command_line(tmp_path, source, tokenizer):
    done = run("convert", source, tmp_path / "out", "--tokenizer", tokenizer, "--dtype", "float16")
    assert done.exit_code == 0, done.output
    for text in ("layout llava_llada", "2 ignored", "preset llada-medv-vqa", "wrote "):
        assert text in done.output
    failed = run("convert", source, tmp_path / "out", "--tokenizer", tokenizer)
    assert failed.exit_code == 2 and "'OUT': '" in failed.output and "exists already" in failed.output
    parts = ("--language-model", released.write_olmo(tmp_path / "llada"))
    parts += ("--vision-tower", released.write_tower(tmp_path / "siglip"), "--tokenizer", tokenizer)
    done = run("init", tmp_path / "new", *parts, "--aspect-ratio", "square", "--seed", 3)
    assert done.exit_code == 0 and "layout llada + siglip" in done.output
    failed = run("init", tmp_path / "newer", *parts, "--projector", tmp_path / "none.bin")
    assert failed.exit_code == 2 and "'--projector'" in failed.output and "does not exist" in failed.output
    assert not (tmp_path / "newer").exists()


def test_from_the_hub_and_back(tmp_path, source, tokenizer):
    """A source on the Hub is downloaded, the result uploaded as a private repository, and that one loads again."""
    with running_hub() as hub:
        files = contents(source)
        hub.repos["them/LLaDA-MedV"] = files | {"train.py": b"not wanted"}
        hub.repos["them/tokenizer"] = {file.name: file.read_bytes() for file in tokenizer.iterdir()}

        def lladamedv_in_a_process(*arguments, token="hf_test"):
            variables = environment(hub, tmp_path / "home", token)
            return run_python(["-m", "lladamedv.cli", *map(str, arguments)], tmp_path, **variables)

        arguments = ("convert", "them/LLaDA-MedV", tmp_path / "out", "--tokenizer", "them/tokenizer")
        failed = lladamedv_in_a_process(*arguments, "--push", "me/copy", token="hf_wrong")
        assert failed.returncode == 1 and "the login at the Hub fails" in failed.stderr
        assert not (tmp_path / "out").exists() and "me/copy" not in hub.repos
        done = lladamedv_in_a_process(*arguments, "--push", "me/copy")
        assert done.returncode == 0, done.stderr[-2000:]
        assert "preset llada-medv:" in done.stdout and "pushed to" in done.stdout
        assert not any("train.py" in request for request in hub.requests)
        assert hub.private["me/copy"] is True
        uploaded = {name: data for name, data in hub.repos["me/copy"].items() if name != ".gitattributes"}
        assert uploaded == contents(tmp_path / "out")
        again = lladamedv_in_a_process("convert", "me/copy", tmp_path / "again")
        assert again.returncode == 1 and "own names already" in again.stderr
        # Unconverted from the Hub, in this process's library.
        program = (
            "from lladamedv import LLaDAMedVForConditionalGeneration as M\n"
            "assert M.from_pretrained('them/LLaDA-MedV').config.image_token_id == 126349\n"
            "assert M.from_pretrained('me/copy').generation_config.max_new_tokens == 256\n"
        )
        loaded = run_python(["-c", program], tmp_path, **environment(hub, tmp_path / "other home"))
        assert loaded.returncode == 0, loaded.stderr[-2000:]
