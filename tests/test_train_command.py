"""`lladamedv train`, and the script behind it: what it loads, what it trains, what it leaves, and what it refuses."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import accelerate.commands.launch
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from typer.testing import CliRunner

from lladamedv import LLaDAMedVForConditionalGeneration, LLaDAMedVProcessor
from lladamedv.cli import app
from lladamedv.demo import DEMO_MODEL, load_model
from lladamedv.hub_cards.checks import PROJECTOR
from lladamedv.processing.phantoms import PhantomVQA
from lladamedv.processing.processing_lladamedv import CHAT_TEMPLATES
from lladamedv.trainers import DataCollatorForMaskedDiffusion, recipes, sft
from tests import released
from tests.tiny import tiny_tokenizer


# What every run here has in common: a few quick steps on the CPU, in float32, without progress bars.
QUICK = {
    "model_name_or_path": "demo", "max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False,
    "disable_tqdm": True, "report_to": "none", "logging_steps": 1, "save_strategy": "no", "warmup_steps": 0,
    "activation_checkpointing": False, "learning_rate": 1e-3,
}  # fmt: skip


def flags(**options):
    """Options as the command line has them."""
    words = []
    for name, value in (QUICK | options).items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def arguments(**options):
    return sft.make_parser().parse_args_and_config(flags(train_data="phantoms:1:8", **options))


def train(tmp_path, name="out", **options):
    """Train in this process and return the output folder."""
    sft.main(flags(**{"train_data": "phantoms:1:8", "output_dir": tmp_path / name} | options))
    return tmp_path / name


def weights(folder):
    return LLaDAMedVForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict()


def changed(folder, origin=DEMO_MODEL):
    """The parts of the model that training has changed, as the beginnings of their weights' names."""
    before, after = weights(origin), weights(folder)
    return {".".join(name.split(".")[:2]) for name in before if not torch.equal(before[name], after[name])}


def llava_med_file(tmp_path, count, missing=()):
    """A file in LLaVA-Med's alignment format about phantoms, without some of their images."""
    records = []
    (tmp_path / "images").mkdir()
    for number, example in enumerate(PhantomVQA(3, count)):
        if number not in missing:
            example.image.save(tmp_path / "images" / f"{number}.png")
        turns = [{"from": "human", "value": f"{example.question}\n<image>"}, {"from": "gpt", "value": example.answer}]
        records.append({"id": f"pair {number}", "image": f"{number}.png", "conversatons": turns})
    file = tmp_path / "alignment.json"
    file.write_text(json.dumps(records))
    return file


def test_methods(tmp_path, capsys):
    """By a flag, or by a line of a recipe; arguments of the other method are unknown to this one."""
    options = {"train_data": "phantoms:1:8:closed", "loss_type": ["sigmoid", "sft"], "num_draws": 2, "use_peft": True}
    folder = train(tmp_path, method="dpo", **options)
    assert "1 × sigmoid + 1 × sft" in (folder / "README.md").read_text()
    options = {"train_data": "phantoms:1:8:closed,open", "reward_funcs": ["choice", "candidate_format"]}
    folder = train(tmp_path, method="expected_reward", **options, use_peft=True)
    assert "1 × choice + 1 × candidate_format, by closed form" in (folder / "README.md").read_text()
    recipe = tmp_path / "own.yaml"
    recipe.write_text("method: dpo\nbeta: 0.3\n")
    for words in (["--config", str(recipe)], ["--method", "dpo", "--beta", "0.3"]):
        parser = sft.make_parser(sft.method_of(words))
        assert parser.parse_args_and_config(words + flags(output_dir="out"))[1].beta == 0.3
    refused = [(["--beta", "1"], "unrecognized arguments: --beta"), (["--method", "ppo"], "invalid choice")]
    for words, message in refused:
        with pytest.raises(SystemExit):
            sft.main(flags(train_data="phantoms:1:8") + words)
        assert message in capsys.readouterr().err


# The command


def test_a_recipe_trains_through_the_command(tmp_path):
    """LLaVA-Med's records, a missing image, adapters, accelerate's launcher: all that a user would type."""
    file = llava_med_file(tmp_path, 12, missing=(3, 7))
    options = {"train_data": file, "image_folder": tmp_path / "images", "output_dir": tmp_path / "out"}
    options |= {"eval_strategy": "no", "log_answers": 0}
    command = [sys.executable, "-m", "lladamedv.cli", "train", "demo_lora", *flags(**options)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert result.returncode == 0, result.stderr
    assert "10 rows; 2 missing images: pair 3 (3.png), pair 7 (7.png)" in result.stdout
    assert "  train_loss " in result.stdout and f"wrote {tmp_path / 'out'}" in result.stdout
    report, checked = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert (report["use"], checked["data_set"], checked["kept"]) == ("train_data", "train_dataset", 10)
    assert report["rows"] == 10 and report["missing_images"] == [["pair 3", "3.png"], ["pair 7", "7.png"]]

    model, _ = load_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapted = PeftModel.from_pretrained(model, tmp_path / "out")
    adapters = [name for name, weight in adapted.named_parameters() if "lora_B" in name and weight.abs().max() > 0]
    assert len(adapters) == 7 * model.config.text_config.num_hidden_layers
    merged = adapted.merge_and_unload().state_dict()
    touched = {name for name in before if not torch.equal(before[name], merged[name])}
    assert touched and all(re.fullmatch(sft.LORA_TARGET_MODULES + r"\.weight", name) for name in touched)
    assert LLaDAMedVProcessor.from_pretrained(tmp_path / "out").tokenizer.get_vocab()


def environment():
    """For a process that finds this package wherever it runs."""
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1"}


TWO_PROCESSES = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_machines: 1\nnum_processes: 2\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["--train_data", "me/none"], 1, "--train_data holds 'me/none', of which train cannot be loaded: "),
        (["--model_name_or_path", "nobody/nothing"], 1, "--model_name_or_path is 'nobody/nothing', which cannot"),
        (["--learning_rate", "abc"], 2, "argument --learning_rate/--learning-rate: invalid float value: 'abc'"),
        (["--accelerate", "two.yaml", "--learning_rate", "abc"], 2, "argument --learning_rate/--learning-rate: inv"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(tmp_path, words, code, line):
    (tmp_path / "two.yaml").write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "lladamedv.cli", "train", "demo_lora", *words]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert result.returncode == code and "Traceback" not in result.stderr and "usage:" not in result.stderr
    ours = result.stderr[result.stderr.index("lladamedv: ") :].splitlines()
    assert ours[0].startswith(f"lladamedv: {line}")
    assert len(ours) == 1 or "--accelerate" in words, "torchrun says itself which process failed"


@pytest.mark.slow
def test_ctrl_c(tmp_path):
    """As a terminal does it: the signal goes to all processes at once, while they train."""
    options = {"max_steps": 10_000, "train_data": "phantoms:1:64", "output_dir": tmp_path, "eval_strategy": "no"}
    command = [sys.executable, "-m", "lladamedv.cli", "train", "demo_lora", *flags(**options, log_answers=0)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=environment() | {"PYTHONUNBUFFERED": "1"},
    ) as running:  # fmt: skip
        seen = next(line for line in running.stdout if "'loss'" in line)
        os.killpg(running.pid, signal.SIGINT)
        _, errors = running.communicate(timeout=60)
    assert seen and running.returncode == 130 and "Traceback" not in errors


def test_a_model_is_pushed(hub, tmp_path, capsys):
    """Through the script: privately, complete, and nothing of the run itself."""
    options = {"push_to_hub": True, "hub_model_id": "me/tuned", "max_steps": 1, "trainable": "projector"}
    folder = train(tmp_path, **options)
    assert "pushed to me/tuned" in capsys.readouterr().out
    files = hub.repos["me/tuned"]
    assert {"model.safetensors", "processor_config.json", "modeling_lladamedv.py", "README.md"} <= set(files)
    assert not {"training_args.bin", "data_report.json"} & set(files) and hub.private["me/tuned"]
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert str(tmp_path).encode() not in files["README.md"]


def test_list():
    plain, as_json = (CliRunner().invoke(app, ["train", "--list", *more]) for more in ([], ["--json"]))
    assert dict(line.split(None, 1) for line in plain.output.splitlines()) == recipes.describe_recipes()
    assert json.loads(as_json.stdout) == recipes.describe_recipes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "No recipe is given."),
        (["train", "--model", "X"], "No recipe is given."),
        (["train", "--model", "X", "--dataset", "gone.csv"], "--dataset is 'gone.csv'; there is no such file"),
        (["train", "--config", "my.yaml"], "--config is the first word, RECIPE, here"),
        (["train", "demo_lora", "--train_data", "gone.csv"], "--train_data is 'gone.csv'; there is no such file"),
        (["train", "demo_lora", "--train_data", "a/b", "--eval_data=/gone"], "--eval_data is '/gone'; there is no"),
        (["train", "stage4"], "RECIPE is 'stage4'"),
        (["train", "demo_lora", "--accelerate", "fsdp3"], "--accelerate is 'fsdp3'; allowed are cpu, ddp"),
    ],
)
def test_names_that_do_not_exist(words, message):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1 and message in result.output and "Traceback" not in result.output


@pytest.fixture
def launched(monkeypatch):
    """Arguments of accelerate's launcher, whose script fails with exit code 7."""
    launched = []

    def launch_command(arguments):
        launched.append(arguments)
        raise subprocess.CalledProcessError(7, "script")

    monkeypatch.setattr(accelerate.commands.launch, "launch_command", launch_command)
    return launched


def test_everything_else_is_passed_on(launched):
    """To accelerate's own launcher, and its exit code back."""
    others = ["--max_steps", "3", "--from_scratch", "--train_data", "a", "b"]
    result = CliRunner().invoke(app, ["train", "demo_lora", "--accelerate", "fsdp2", *others])
    assert result.exit_code == 7 and result.stderr == "recipe: demo_lora\n"
    (arguments,) = launched
    assert arguments.module and arguments.training_script == "lladamedv.trainers.sft"
    assert arguments.config_file == str(recipes.ACCELERATE / "fsdp2.yaml")
    assert arguments.training_script_args == ["--config", str(recipes.RECIPES / "demo_lora.yaml"), *others]


def test_quiet(launched):
    """No line of the command's own, and no bars of the processes that it starts."""
    result = CliRunner().invoke(app, ["train", "-q", "demo_lora"])
    assert result.exit_code == 7 and not result.output and os.environ["TQDM_DISABLE"] == "1"
    assert launched[0].training_script_args == ["--config", str(recipes.RECIPES / "demo_lora.yaml")]


def test_other_trainers_names(launched):
    """A model and data are enough; the recipe that is taken is said."""
    words = ["--model", "me/model", "--dataset-name=me/data", "--output", "out", "--lr", "1e-4", "--epochs", "2"]
    result = CliRunner().invoke(app, ["train", *words])
    assert result.exit_code == 7 and "recipe: lora_one_gpu" in result.stderr
    assert CliRunner().invoke(app, ["train", "--model=demo", "--data", "me/data"]).exit_code == 7
    assert [each.training_script_args for each in launched] == [
        ["--config", str(recipes.RECIPES / "lora_one_gpu.yaml"), "--model_name_or_path", "me/model", "--train_data",
         "me/data", "--output_dir", "out", "--learning_rate", "1e-4", "--num_train_epochs", "2"],
        ["--config", str(recipes.RECIPES / "demo_lora.yaml"), "--model_name_or_path", "demo", "--train_data",
         "me/data"],
    ]  # fmt: skip


# What is trained and what is left


def test_stage_one_leaves_a_projector_to_go_on_with(tmp_path):
    out = train(tmp_path, trainable="projector", chat_template="llada_plain")
    assert changed(out) == {"model.multi_modal_projector"}
    projector = load_file(out / PROJECTOR)
    saved = {name: weight for name, weight in load_file(out / "model.safetensors").items() if name in projector}
    assert len(projector) == 4 and all(torch.equal(projector[name], weight) for name, weight in saved.items())
    assert LLaDAMedVProcessor.from_pretrained(out).chat_template == CHAT_TEMPLATES["llada_plain"]


def test_a_run_goes_on_from_its_last_checkpoint(tmp_path):
    whole = train(tmp_path, "whole", max_steps=4, save_strategy="steps", save_steps=2)
    unfinished = whole / "checkpoint-9"  # as a killed process leaves it
    unfinished.mkdir()
    (whole / "checkpoint-4" / "trainer_state.json").unlink()
    expected = weights(whole)
    again = train(tmp_path, "whole", max_steps=4, resume_from_checkpoint="last")
    assert all(torch.equal(expected[name], weight) for name, weight in weights(again).items())
    assert not (whole / PROJECTOR).exists()


def test_quantised_base(tmp_path):
    """The language model in 4 bits, everything else as it was, adapters on top."""
    script, _, model_args = arguments(use_peft=True, load_in_4bit=True, output_dir=tmp_path)
    model, _ = sft.load_model(script, model_args)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            in_layers = name.startswith("model.language_model.layers.")
            assert (module.weight.dtype == torch.uint8) == in_layers, name
    out = train(tmp_path, use_peft=True, load_in_4bit=True, lora_dropout=0.0)
    assert any(weight.abs().max() > 0 for name, weight in load_file(out / "adapter_model.safetensors").items()
               if "lora_B" in name)  # fmt: skip


def test_from_scratch(tmp_path):
    options = {"dtype": "bfloat16", "attn_implementation": "eager"}
    asked = ({}, {"from_scratch": True}, {"from_scratch": True} | options)
    trained, new, other = (sft.load_model(*arguments(output_dir=tmp_path, **each)[::2])[0] for each in asked)
    assert other.dtype == torch.bfloat16 and other.config._attn_implementation == "eager"
    shapes = [{name: weight.shape for name, weight in each.state_dict().items()} for each in (trained, new)]
    assert shapes[0] == shapes[1] and not torch.equal(trained.lm_head.weight, new.lm_head.weight)
    assert new.generation_config.to_dict() == trained.generation_config.to_dict()


def test_a_released_checkpoint_loads_as_it_is(tmp_path):
    folder = released.write_llava(tmp_path / "LLaDA-MedV")
    tiny_tokenizer().save_pretrained(folder)
    script, _, model_args = arguments(model_name_or_path=folder, output_dir=tmp_path, chat_template="llava_llada")
    model, processor = sft.load_model(script, model_args)
    assert processor.image_token_id == model.config.image_token_id
    assert processor.chat_template["default"] == CHAT_TEMPLATES["llava_llada"]
    processor.save_pretrained(tmp_path / "processor")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="--processor is None; none can be loaded"):
        sft.load_model(script, model_args)
    script.processor = str(tmp_path / "processor")
    assert sft.load_model(script, model_args)[1].image_token_id == processor.image_token_id


def test_a_released_language_model_without_a_vision_tower(tmp_path):
    folder = tmp_path / "LLaDA"
    released.write(folder, released.LLAMA_CONFIG, released.llama_weights())
    tiny_tokenizer().save_pretrained(folder)
    script, _, model_args = arguments(model_name_or_path=folder, output_dir=tmp_path)
    model, processor = sft.load_model(script, model_args)
    assert model.config.text_only and processor.tokenizer.eos_token_id == model.config.text_config.eos_token_id
    # Without a system prompt, in training as in the model's own inference.
    user, collator = [{"role": "user", "content": "Where?"}], DataCollatorForMaskedDiffusion(processor)
    prompt = processor.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    assert prompt.startswith("<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nWhere?")
    row = collator([{"messages": [*user, {"role": "assistant", "content": "Left."}]}])["input_ids"][0]
    assert processor.tokenizer.decode(row).startswith(prompt)


# Adapters and checkpoints


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_target_modules": ["q_proj", "query"]}, r"--lora_target_modules holds 'query', which no module of"),
        ({"lora_target_modules": [r".*\.query"]}, r"holds '\.\*\\\\\.query', .*, q_proj, "),
        ({"lora_target_modules": ["proj"]}, "holds 'proj'"),
        ({"lora_modules_to_save": ["mm_projector"]}, "--lora_modules_to_save holds 'mm_projector'"),
    ],
)
def test_a_target_that_matches_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        sft.lora_config(load_model()[0], arguments(use_peft=True, **options)[2])


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["all-linear"], [r".*\.fc1"], ["self_attn.q_proj"]])
def test_targets_that_match(targets):
    options = {"lora_target_modules": targets, "lora_modules_to_save": ["multi_modal_projector"]}
    assert sft.lora_config(load_model()[0], arguments(use_peft=True, **options)[2]) is not None


def test_which_checkpoint(tmp_path):
    assert sft.find_checkpoint(None, tmp_path) is sft.find_checkpoint("false", tmp_path) is None
    assert sft.find_checkpoint("last", tmp_path) is None
    with pytest.raises(ValueError, match=r"--resume_from_checkpoint is 'true', but --output_dir .* no complete"):
        sft.find_checkpoint("true", tmp_path)
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step < 100:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    for word in ("true", True, "last"):
        assert sft.find_checkpoint(word, tmp_path) == str(tmp_path / "checkpoint-10")
    assert sft.find_checkpoint(str(tmp_path / "checkpoint-9"), tmp_path) == str(tmp_path / "checkpoint-9")
    for wrong in ("checkpoint-100", "none"):
        with pytest.raises(ValueError, match=f"--resume_from_checkpoint is '.*{wrong}', which is no checkpoint"):
            sft.find_checkpoint(str(tmp_path / wrong), tmp_path)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_name_or_path": "none/at-all"}, "--model_name_or_path is 'none/at-all', which cannot be loaded"),
        ({"model_name_or_path": "{llama}"}, "of a model of type 'llama'; allowed are 'lladamedv', and as released"),
        ({"load_in_8bit": True}, "--load_in_8bit is given without --use_peft"),
        ({"from_scratch": True, "load_in_4bit": True, "use_peft": True}, "--from_scratch needs"),
        ({"train_data": "phantoms:1:0"}, "--train_data holds a source without a row"),
        ({"shuffle_buffer": 0}, "--shuffle_buffer is 0"),
        ({"lora_r": 8}, "--lora_r is given without --use_peft"),
        ({"use_peft": True, "push_to_hub": True}, "the adapters' model is 'demo', which others do not have"),
        ({"resume_from_checkpoint": "none"}, "--resume_from_checkpoint is 'none'"),
        ({"trainable": "stage1"}, "invalid choice: 'stage1'"),
        ({"cache_image_features": "cache"}, "`cache_image_features` is 'cache', which .* removed in 0.2.0"),
        ({"lerning_rate": 3}, "^2lladamedv: unrecognized arguments: --lerning_rate 3\n$"),
        ({"stage": "1"}, "--stage"),
        ({"config": "{recipe}"}, r"lladamedv: Unknown arguments from config file: \['--train_dat'"),
        # What is evaluated
        ({"eval_strategy": "steps", "eval_steps": 1}, "--eval_data is empty, but --eval_strategy is 'steps'"),
        ({"eval_split": 0.1}, "--eval_split is given, but --eval_strategy is 'no'"),
        ({"eval_data": "phantoms:2:3"}, "--eval_data is given, but --eval_strategy is 'no'"),
        ({"eval_split": 1.5}, "--eval_split is 1.5; allowed are numbers between 0 and 1"),
        ({"eval_split": 0.1, "streaming": True}, "--eval_split is 0.1 and --streaming is given"),
        ({"eval_split": 0.1, "eval_data": "phantoms:2:3", "eval_strategy": "epoch"}, "--eval_data is given, too"),
    ],
)
def test_bad_arguments(tmp_path, capsys, options, message):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "recipe.yaml").write_text("model_name_or_path: demo\ntrain_dat: phantoms:1:2\n")
    places = {"{llama}": str(tmp_path), "{recipe}": str(tmp_path / "recipe.yaml")}
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, **{name: places.get(value, value) for name, value in options.items()})
    assert re.search(message, f"{stopped.value}{capsys.readouterr().err}")


def test_a_mixture_in_a_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "train_data:\n- path: phantoms:1:20:closed\n  weight: 3\n- path: phantoms:2:20:open\n  weight: 1\n"
        "stopping_strategy: all_exhausted\n"
    )
    script, training, model_args = sft.make_parser().parse_args_and_config(
        flags(config=tmp_path / "recipe.yaml", output_dir=tmp_path / "out")
    )
    trainer, reports = sft.build_trainer(script, training, model_args)
    assert [report.rows for report in reports] == [20, 20]
    ids = [row["id"] for row in trainer.train_dataset.remove_columns("images")]
    assert len({name for name in ids if name.startswith("phantoms/2/")}) == 20  # every row of every source
