"""The trainer: what is trained and with which noise, resumed, accumulated, packed, with adapters; and bad rows."""

import copy
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from lladamedv import LLaDAMedVConfig, LLaDAMedVForConditionalGeneration, LLaDAMedVProcessor
from lladamedv.demo import DEMO_MODEL
from lladamedv.trainers import MaskedDiffusionSFTConfig, MaskedDiffusionSFTTrainer
from lladamedv.trainers.masked_diffusion_loss import TIME_SAMPLINGS, AnswerNoise, add_noise
from tests.test_data_collator import chat
from tests.tiny import random_image, randomize


QUESTIONS = [
    ("Is it small?", "Yes."), ("Where is it?", "On the left side."), ("What is it?", "A lung."), ("Big?", "No."),
]  # fmt: skip


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


def rows(count=8, images=True):
    data = [
        chat(*QUESTIONS[number % 4], images=[random_image(seed=number // 4)] if images else [], id=f"row-{number}")
        for number in range(count)
    ]
    return datasets.Dataset.from_list(data).cast_column("images", datasets.List(datasets.Image()))


def arguments(folder, **options):
    options = {
        "per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "learning_rate": 1e-2, "bf16": False, "use_cpu": True, "activation_checkpointing": False, "seed": 3,
        "disable_tqdm": True, **options,
    }  # fmt: skip
    return MaskedDiffusionSFTConfig(output_dir=str(folder), **options)


def make_trainer(folder, model=None, dataset=None, processor=None, **options):
    peft_config, evaluation = options.pop("peft_config", None), options.pop("eval_dataset", None)
    return MaskedDiffusionSFTTrainer(
        model=model or tiny_model(), args=arguments(folder, **options),
        train_dataset=rows() if dataset is None else dataset,
        eval_dataset=evaluation, processing_class=processor or tiny_processor(), peft_config=peft_config,
    )  # fmt: skip


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_weights(model, expected, **tolerances):
    """Those of another model, or of a file."""
    expected = expected if isinstance(expected, dict) else weights_of(expected)
    for name, weight in weights_of(model).items():
        torch.testing.assert_close(weight, expected[name], **tolerances or {"rtol": 0, "atol": 0}, msg=name)


def assert_logits(trainer, model, **tolerances):
    """Those of the trained model; returns the inputs."""
    batch = trainer.data_collator([trainer.train_dataset[0]])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        expected, got = trainer.model.eval()(**inputs).logits, model.eval()(**inputs).logits
    torch.testing.assert_close(got, expected, **tolerances)
    return inputs


def changed(model, before):
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# What is trained


@pytest.mark.parametrize(
    ("trainable", "trained"),
    [
        ("projector", ("multi_modal_projector",)),
        ("projector+language_model", ("multi_modal_projector", "language_model", "lm_head")),
        ("all", ("multi_modal_projector", "language_model", "lm_head", "vision_tower")),
    ],
)
def test_the_trained_parts_change_and_the_others_do_not(tmp_path, trainable, trained):
    trainer = make_trainer(tmp_path, trainable=trainable)
    before = weights_of(trainer.model)
    trainer.train()
    moved = changed(trainer.model, before)
    for name in before:
        expected = any(part in name for part in trained)
        some_rows = expected and any(part in name for part in ("embed_tokens", "lm_head", "bias"))
        assert some_rows or (name in moved) == expected, name
    assert all(map(math.isfinite, losses(trainer))) and len(losses(trainer)) == 4


@pytest.mark.parametrize("options", [{"activation_checkpointing": True}, {"bf16": True}], ids=str)
def test_checkpointing_and_half_precision(tmp_path, options):
    """The same run: to the last bits, or to the precision of bfloat16."""
    plain, other = make_trainer(tmp_path), make_trainer(tmp_path, **options)
    for trainer in (plain, other):
        trainer.train()
    assert losses(other) == pytest.approx(losses(plain), rel=0.05 if "bf16" in options else 1e-5)
    assert ("bf16" in options) == (losses(other) != pytest.approx(losses(plain), rel=1e-5))


def test_a_learning_rate_for_each_part(tmp_path):
    options = {"trainable": "all", "projector_learning_rate": 1e-3, "vision_learning_rate": 2e-6}
    trainer = make_trainer(tmp_path, lr_scheduler_type="constant", warmup_steps=0, **options)
    trainer.create_optimizer()
    names = {id(weight): name for name, weight in trainer.model.named_parameters()}
    seen = {}
    for group in trainer.optimizer.param_groups:
        for weight in group["params"]:
            seen[names[id(weight)]] = (group["lr"], group["weight_decay"])
    assert len(seen) == len(names) == sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    for name, (rate, _) in seen.items():
        rates = {"multi_modal_projector": 1e-3, "vision_tower": 2e-6}
        assert rate == next((value for part, value in rates.items() if part in name), 1e-2), name
    trainer.train()
    assert math.isfinite(losses(trainer)[-1])


def test_the_head_and_the_tower_run_where_they_must(tmp_path):
    """Two rows about one image: one image in the tower, and in the last layer only as many positions as are masked."""
    trainer = make_trainer(tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    towers, positions, masked = [], [], []
    language_model = trainer.model.model.language_model
    trainer.model.model.vision_tower.register_forward_hook(lambda *a: towers.append(a[1][0].shape[0]))
    language_model.layers[-1].mlp.register_forward_hook(lambda *a: positions.append(a[2].shape[1]))
    trainer.model.get_input_embeddings().register_forward_hook(
        lambda *a: masked.append((a[1][0] == trainer.model.config.mask_token_id).sum(dim=1).max())
    )
    batches, _ = trainer.get_batch_samples(iter([batch]), 1, "cpu")
    trainer.compute_loss(trainer.model, batches[0])
    assert towers == [1]
    assert positions == [max(1, int(masked[0]))]


@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora(tmp_path, variant, checkpointing):
    config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q|v)_proj", task_type="CAUSAL_LM", **variant)
    trainer = make_trainer(tmp_path, peft_config=config, activation_checkpointing=checkpointing)
    before = weights_of(trainer.model)
    trainer.train()
    moved = changed(trainer.model, before)
    assert moved and all("lora_" in name for name in moved)
    trainer.save_model(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*.safetensors"))
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    inputs = assert_logits(trainer, again, atol=1e-4, rtol=1e-3)
    answers = [each.generate(**inputs, max_new_tokens=4, block_length=4, steps=4) for each in (trainer.model, again)]
    assert torch.equal(*answers) and answers[0].shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["multi_modal_projector"]}, {"use_dora": True}], ids=str)
def test_given_adapters_stay_what_is_trained(tmp_path, options):
    """Two sets of them, of which the second goes on training; what is saved gives the logits of what was trained."""
    base = tiny_model()
    config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q|v)_proj", task_type="CAUSAL_LM", **options)
    model = get_peft_model(copy.deepcopy(base), config, "first")
    model.add_adapter("second", config)
    model.set_adapter("second")
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    before = weights_of(model)
    trainer = make_trainer(tmp_path, model=model)
    trainer.train()
    moved = changed(model, before)
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == trainable
    assert moved and moved <= trainable and all(".second." in name for name in moved)
    trainer.save_model()
    assert_logits(trainer, PeftModel.from_pretrained(base, tmp_path / "second"), atol=1e-5, rtol=1e-5)
    trainer.create_model_card("adapters")


def test_what_was_frozen_stays_so(tmp_path):
    """As in TRL: `trainable` never unfreezes."""
    model = tiny_model()
    model.model.language_model.layers[0].requires_grad_(False)
    before = weights_of(model)
    make_trainer(tmp_path, model=model).train()
    moved = changed(model, before)
    assert "lm_head.weight" in moved and not any(".layers.0." in name or "vision_tower" in name for name in moved)


def test_training_leaves_the_special_tokens_alone(tmp_path):
    """In the model, its checkpoints and what is saved; the tokenizer's own end token is another one."""
    model = tiny_model()
    ids = {"eos_token_id": [586], "bos_token_id": 571, "pad_token_id": 572}
    model.generation_config.update(**ids)
    model.config.text_config.pad_token_id = 572
    generation, text = model.generation_config.to_dict(), model.config.text_config.to_dict()
    trainer = make_trainer(tmp_path, model=model, save_strategy="steps", save_steps=2)
    assert trainer.processing_class.tokenizer.eos_token_id not in ids["eos_token_id"]
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "checkpoint-2", tmp_path):
        saved = json.loads((folder / "generation_config.json").read_text())
        assert {name: saved[name] for name in ids} == ids
        assert json.loads((folder / "config.json").read_text())["text_config"]["pad_token_id"] == 572
    assert model.generation_config.to_dict() == generation and model.config.text_config.to_dict() == text
    assert isinstance(trainer.processing_class, LLaDAMedVProcessor)


def test_saved_and_loaded(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    assert_weights(LLaDAMedVForConditionalGeneration.from_pretrained(tmp_path), trainer.model)
    assert isinstance(LLaDAMedVProcessor.from_pretrained(tmp_path), LLaDAMedVProcessor)
    trainer.create_model_card("tiny")
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card and "licence:" not in card and "research-only" in card


# Noise


def test_the_same_seed_gives_the_same_run(tmp_path):
    runs = []
    for noise_seed in (None, None, 9):
        trainer = make_trainer(tmp_path, noise_seed=noise_seed)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("normalization", ["answer_length", "tokens", "batch"])
@pytest.mark.parametrize("options", [{}, {"complementary_masking": True}, {"time_sampling": "stratified"}], ids=str)
def test_accumulation_changes_nothing(tmp_path, normalization, options):
    """Four rows at once, two and two, or one by one: the same noise, the same loss, the same weights."""
    results = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        trainer = make_trainer(
            tmp_path, max_steps=2, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
            loss_normalization=normalization, optim="sgd", learning_rate=1e-3, **options,
        )  # fmt: skip
        trainer.train()
        results.append((losses(trainer), weights_of(trainer.model)))
    for other_losses, other_weights in results[1:]:
        assert other_losses == pytest.approx(results[0][0], rel=1e-4)
        torch.testing.assert_close(other_weights, results[0][1], atol=1e-5, rtol=1e-3)


def test_resumed(tmp_path):
    whole = make_trainer(tmp_path / "whole", max_steps=6)
    whole.train()
    first = make_trainer(tmp_path / "parts", max_steps=6, save_strategy="steps", save_steps=2)
    first.train()
    other = tiny_model(seed=5)  # its weights must not matter
    again = make_trainer(tmp_path / "parts", model=other, max_steps=6, save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert losses(again)[-4:] == pytest.approx(losses(whole)[2:], rel=1e-5)
    assert_weights(again.model, whole.model, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("steps", [4, 6])
def test_resumed_when_all_is_done(tmp_path, steps):
    """At the end of an epoch and within one: a run that was killed after its last checkpoint takes no further step."""
    options = {"max_steps": steps, "save_strategy": "steps", "save_steps": steps, "lr_scheduler_type": "constant"}
    first = make_trainer(tmp_path, **options)
    first.train()
    again = make_trainer(tmp_path, model=tiny_model(seed=5), **options)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
    assert again.state.global_step == steps and losses(again) == losses(first)
    assert_weights(again.model, first.model)


@pytest.mark.parametrize(("count", "accumulation", "checkpoint"), [(4, 1, 3), (7, 4, 2)])
def test_a_stream_begins_anew_and_resumes(tmp_path, count, accumulation, checkpoint):
    """A stream of fewer rows than the steps need, in batches of two: each pass gives every row once, in the order of
    that pass; a run that is resumed behind its end sees the rows that an uninterrupted one sees."""
    runs = []
    for resume in (None, str(tmp_path / f"checkpoint-{checkpoint}")):
        stream = rows(count).to_iterable_dataset().shuffle(seed=1, buffer_size=count)
        trainer = make_trainer(
            tmp_path, model=tiny_model(seed=5 if resume else 0), dataset=stream, max_steps=6, save_strategy="steps",
            save_steps=1, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        collate, seen = trainer.data_collator.torch_call, []
        trainer.data_collator.torch_call = lambda batch, collate=collate, seen=seen: (
            seen.extend(row["id"] for row in batch) or collate(batch)
        )
        trainer.train(resume_from_checkpoint=resume)
        runs.append((losses(trainer), seen, [each.get("num_tokens") for each in trainer.state.log_history]))
    (expected, seen, tokens), (resumed, _, resumed_tokens) = runs
    for begin in range(0, len(seen) - count + 1, count):
        assert sorted(seen[begin : begin + count]) == [f"row-{number}" for number in range(count)]
    assert len({tuple(seen[begin : begin + count]) for begin in range(0, len(seen) - count + 1, count)}) > 1
    assert resumed == pytest.approx(expected, rel=1e-5) and len(expected) == 6
    assert resumed_tokens[:-1] == tokens[:-1] and tokens[0] > 0  # the last entry is about this part of the run


def test_a_step_at_the_end_of_a_stream(tmp_path):
    """Three rows in two accumulated batches of two: the same step as one of a data set of these three."""
    results = []
    for dataset in (rows(3), rows(3).to_iterable_dataset()):
        trainer = make_trainer(
            tmp_path, dataset=dataset, max_steps=2, gradient_accumulation_steps=4, optim="sgd",
            train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer.train()
        results.append((losses(trainer), weights_of(trainer.model)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    torch.testing.assert_close(*(weights for _, weights in results), atol=1e-6, rtol=1e-5)


def test_tokens_are_counted_on_after_a_resumption(tmp_path):
    """The sum of what the collator gives, whatever the step of the checkpoint and of the last log."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 3}
    first, seen = make_trainer(tmp_path, **options), []
    collate = first.data_collator.torch_call
    length = first.data_collator.row_length
    first.data_collator.torch_call = lambda rows: seen.extend(map(length, rows)) or collate(rows)
    first.train()
    again = make_trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    counted = [entry["num_tokens"] for entry in again.state.log_history if "num_tokens" in entry and "loss" in entry]
    assert counted == [sum(seen[:6]), sum(seen[:12])]  # a batch more is fetched


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
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-3000:]
    return [json.loads((Path(folder) / "losses.json").read_text()) for folder, _ in runs]


def test_killed_and_resumed(tmp_path):
    """SIGKILL while the run goes on behind its second checkpoint; the loss curve is that of an uninterrupted run."""
    options = {"max_steps": 16, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "whole", **(options | {"save_strategy": "no"}))
    whole.train()
    process = start_workers([(str(tmp_path / "killed"), options)])
    state = tmp_path / "killed" / "checkpoint-4" / "trainer_state.json"
    while not (state.exists() and state.read_text().endswith("}\n")):  # it is there before it is filled
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (tmp_path / "killed" / "losses.json").exists()
    resumed = make_trainer(tmp_path / "killed", **options)
    resumed.train(resume_from_checkpoint=get_last_checkpoint(str(tmp_path / "killed")))
    assert len(losses(whole)) == 16 and losses(resumed) == pytest.approx(losses(whole), rel=1e-4)


FSDP = {
    "fsdp": "full_shard",
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer", "LLaDAMedVLastDecoderLayer"]},
    "save_strategy": "steps", "save_steps": 2,
}  # fmt: skip


def check_sharded(tmp_path, file):
    """The weights of a sharded run, and of one resumed from its checkpoint, are those of the run in `two`."""
    expected = load_file(tmp_path / "two" / file)
    for folder in (tmp_path / "fsdp", tmp_path / "fsdp" / "resumed"):
        torch.testing.assert_close(load_file(folder / file), expected, atol=1e-6, rtol=1e-6)


def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    """Copied to two processes (DDP), with either loss, and sharded over them (FSDP2), also resumed."""
    variants = {"two": {}, "tokens": {"complementary_masking": True, "loss_normalization": "tokens"}, "fsdp": FSDP}
    common = {"max_steps": 4, "optim": "sgd"}
    half = common | {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    found = run_two_processes([(str(tmp_path / name), half | options) for name, options in variants.items()])
    for (name, options), two in zip(variants.items(), found):
        if name == "fsdp":
            assert two == pytest.approx(found[0], rel=1e-6)
            continue
        one = make_trainer(tmp_path / "one", **common, per_device_train_batch_size=4, **options)
        one.train()
        assert list(two.values()) == pytest.approx(losses(one), rel=1e-4) and len(two) == 4
        assert_weights(one.model, load_file(tmp_path / name / "model.safetensors"), atol=1e-5, rtol=1e-3)
    check_sharded(tmp_path, "model.safetensors")


@pytest.mark.slow
def test_adapters_in_shards(tmp_path):
    lora = {"r": 4, "target_modules": r".*language_model.*\.(q|v)_proj", "task_type": "CAUSAL_LM"}
    options = {"max_steps": 4, "ddp_backend": "gloo", "lora": lora}
    two, sharded = run_two_processes([(str(tmp_path / "two"), options), (str(tmp_path / "fsdp"), options | FSDP)])
    assert sharded == pytest.approx(two, rel=1e-6)
    check_sharded(tmp_path, "adapter_model.safetensors")


@pytest.mark.parametrize("sampling", TIME_SAMPLINGS)
def test_draws_do_not_depend_on_the_split(sampling):
    """And differ by step, seed and answer."""
    noise, labels = AnswerNoise(0, sampling), torch.arange(20).view(4, 5)
    answers = torch.tensor([0, 0, 0, 1, 1]) + 2 * torch.arange(4)[:, None]
    t, uniform = noise(labels, answers, 7, 0, 4)
    for first in (0, 2):
        part = slice(first, first + 2)
        part_t, part_uniform = noise(labels[part], answers[part] - 2 * first, 7, first, 4)
        assert torch.equal(part_t, t[part]) and torch.equal(part_uniform, uniform[part])
    assert not torch.equal(noise(labels, answers, 8, 0, 4)[0], t)
    assert not torch.equal(AnswerNoise(1, sampling)(labels, answers, 7, 0, 4)[0], t)
    assert len(t.unique()) == 8 and len(uniform.unique()) == 20


# Evaluation


def test_eval_loss(tmp_path):
    """A plain version of the bound, the same whatever the batch size, and the same again."""
    values = []
    for batch_size in (1, 2, 4):
        trainer = make_trainer(
            tmp_path, eval_dataset=rows(4), per_device_eval_batch_size=batch_size, eval_time_steps=3, noise_seed=1
        )
        values += [trainer.evaluate()["eval_loss"] for _ in range(2)]
    assert values == pytest.approx([values[0]] * 6, rel=1e-5)
    model, total = trainer.model.eval(), 0.0
    for row in trainer.eval_dataset:
        batch = trainer.data_collator([row])
        labels = batch["labels"]
        for number in range(3):
            t, uniform = AnswerNoise(1).fixed(labels, batch["answer_ids"], number, 3)
            torch.testing.assert_close(t, torch.full_like(t, (number + 0.5) / 3))
            noised = add_noise(batch["input_ids"], labels, t, uniform, model.config.mask_token_id)
            with torch.no_grad():
                logits = model(input_ids=noised.input_ids, pixel_values=batch["pixel_values"]).logits
            entropy = torch.nn.functional.cross_entropy(logits[noised.masked], labels[noised.masked], reduction="sum")
            total += (entropy / noised.probability[0, 0] / (labels != -100).sum() / 3).item()
    assert values[0] == pytest.approx(total / 4, rel=1e-4)


class Recorder(TrainerCallback):
    def __init__(self):
        self.tables = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.tables += [logs["answers"]] if "answers" in logs else []


def test_answers_are_logged(tmp_path):
    """To every callback that reports, as a table, and to a file; they are the answers that `generate` gives."""
    model = tiny_model()
    model.generation_config.update(max_new_tokens=8, block_length=8, steps=8)
    trainer = make_trainer(
        tmp_path, model, eval_dataset=rows(4), log_answers=3, eval_strategy="steps", eval_steps=2, max_steps=4
    )
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    records = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 2, 2, 4, 4, 4] and len(recorder.tables) == 2
    assert [record["reference"] for record in records[:3]] == ["Yes.", "On the left side.", "A lung."]
    assert recorder.tables[1].count("\n") == 4 and "| Where is it? | On the left side. |" in recorder.tables[1]
    processor, row = trainer.processing_class, trainer.eval_dataset[1]
    content = [{"type": "image", "image": row["images"][0]["bytes"]}, {"type": "text", "text": "Where is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    sequences = trainer.model.eval().generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    assert records[4]["answer"] == processor.decode(sequences, skip_special_tokens=True).strip()
    with pytest.raises(ValueError, match="`log_answers` is 2, but there is no `eval_dataset`"):
        make_trainer(tmp_path, log_answers=2)


# Packing


def test_packed_logits_are_those_of_each_question_alone(tmp_path):
    """Under the prefix mask: a question sees the image and itself, the image sees itself."""
    trainer = make_trainer(tmp_path, pack_questions=4)
    assert len(trainer.train_dataset) == 2 and trainer.row_reports["train_dataset"].packed_into == 2
    model = trainer.model.eval()
    packed = trainer.data_collator([trainer.train_dataset[0]])
    names = ("input_ids", "position_ids", "segment_ids", "pixel_values", "attention_mask")
    with torch.no_grad():
        together = model(**{name: packed[name] for name in names}).logits[0]
        for number, row in enumerate(rows(4)):
            own = trainer.data_collator([row])
            alone = model(**{name: own[name] for name in names}).logits[0]
            mine = packed["segment_ids"][0] == number + 1
            torch.testing.assert_close(together[mine], alone[own["segment_ids"][0] == 1], atol=2e-5, rtol=1e-4)
        full = model(input_ids=own["input_ids"], pixel_values=own["pixel_values"]).logits[0]
    assert not torch.allclose(full, alone, atol=1e-3), "fully bidirectional attention is something else"


def test_packed_training(tmp_path):
    trainer = make_trainer(tmp_path, pack_questions=3, max_steps=2)  # two images of four questions each: 3 and 1
    assert trainer.train_dataset["id"][:2] == ["row-0 + row-1 + row-2", "row-3"] and len(trainer.train_dataset) == 4
    trainer.train()
    assert all(map(math.isfinite, losses(trainer)))


# Bad input


def broken(**changes):
    data = rows(4).to_list()
    data[2] |= changes
    return datasets.Dataset.from_list(data)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"messages": [{"role": "user", "content": "Is it?"}]}, "no assistant turn"),
        ({"messages": [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": " "}]}, "no assistant"),
        ({"messages": [*chat("Is it?", "")["messages"], *chat("Where?", "Left.")["messages"]]}, "an assistant turn is"),
        ({"messages": chat("<image> or <image>?", "No.")["messages"]}, "2 <image> for 1 images"),
        ({"images": [{"path": "gone.png", "bytes": None}]}, "an image cannot be read: .*no such file"),
        ({"images": []} | chat("<image>?", "No."), "1 <image> for 0 images"),
    ],
)
def test_bad_rows(tmp_path, changes, reason):
    with pytest.raises(ValueError, match=rf"row 2 \(row-2\) has a problem: {reason}.*invalid_rows='skip'"):
        make_trainer(tmp_path, dataset=broken(**changes))
    trainer = make_trainer(tmp_path, dataset=broken(**changes), invalid_rows="skip")
    report = trainer.row_reports["train_dataset"]
    assert report.kept == len(trainer.train_dataset) == 3
    assert sum(report.left_out.values()) == 1 and list(report.rows.values()) == [["row 2 (row-2)"]]
    assert reason.split()[0] in report.summary() and "row-2" in report.summary()
    trainer.train()


def test_long_rows(tmp_path):
    long = broken(messages=chat("Why? " * 100, "No.")["messages"])
    with pytest.raises(ValueError, match=r"row 2 \(row-2\) has a problem: more than 200 tokens: \d+\..*long_rows='d"):
        make_trainer(tmp_path, dataset=long, max_length=200)
    trainer = make_trainer(tmp_path, dataset=long, max_length=200, long_rows="drop")
    assert len(trainer.train_dataset) == 3
    assert trainer.row_reports["train_dataset"].left_out == {"more than 200 tokens": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": datasets.Dataset.from_list([])}, "`train_dataset` is empty"),
        ({"dataset": datasets.Dataset.from_list([{"text": "a"}])}, "the columns \\['text'\\]; needed are `messages`"),
        ({"dataset": broken(messages=[]).select([2])}, "of which none can be trained on|no `messages`"),
        ({"max_length": 9999}, "`max_length` is 9999; the model's context allows 512"),
        ({"trainable": "everything"}, "`trainable` is 'everything'; allowed are"),
        ({"loss_weighting": "none"}, "`loss_weighting` is 'none'; allowed are"),
        ({"packing": True}, "`packing` is True, which does not apply to masked diffusion"),
        ({"completion_only_loss": True}, "`completion_only_loss` is True, which does not apply"),
        ({"pack_questions": 1}, "`pack_questions` is 1; allowed are whole numbers of at least 2"),
        ({"pack_questions": 4, "turn_mask": True}, "only one of the two is allowed"),
        ({"pack_questions": 4, "dataset": rows(4, images=False)}, "`pack_questions` is 4, but row-0 has 0 images"),
        ({"max_loss_weight": 0.5}, "`max_loss_weight` is 0.5"),
        ({"max_loss_weight": 5.0}, "`max_loss_weight` is 5.0, but `loss_weighting` is 'inverse_probability'"),
        ({"eval_time_steps": 0}, "`eval_time_steps` is 0"),
        ({"eos_padding": 1.5}, "`eos_padding` is 1.5; allowed are whole numbers"),
        ({"pad_to_multiple_of": -8}, "`pad_to_multiple_of` is -8; allowed are"),
        ({"max_length": 0}, "`max_length` is 0; allowed are"),
        ({"vision_learning_rate": 0.1}, "`vision_learning_rate` is 0.1, but nothing of that part is trained, only pro"),
        ({"vision_learning_rate": -1.0}, "`vision_learning_rate` is -1.0"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[:] = math.nan
    trainer = make_trainer(tmp_path, model=model)
    with pytest.raises(ValueError, match="The loss is nan at step 0; the batch's ids are in"):
        trainer.train()
    record = json.loads((tmp_path / "not_finite.json").read_text())
    assert len(record["row_ids"]) == 2 and all(name.startswith("row-") for name in record["row_ids"])
    assert "assistant" in record["texts"][0] and "<image>" not in record["texts"][0]


def test_an_evaluation_that_is_not_finite_stops(tmp_path):
    """Transformers would average over the finite rest."""
    model = tiny_model()
    trainer = make_trainer(tmp_path, model=model, eval_dataset=rows(4), per_device_eval_batch_size=1)
    bad = next(iter(trainer.data_collator([trainer.eval_dataset[1]])["input_ids"][0, -3:]))
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = math.nan
    with pytest.raises(ValueError, match="The loss is nan at step 0"):
        trainer.evaluate()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The last step of a run has a finite loss and ruins the weights."""
    trainer = make_trainer(tmp_path, max_steps=1, optim="sgd", learning_rate=1e30, warmup_steps=0, save_strategy="no")
    trainer.train()
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1e30)
    with pytest.raises(ValueError, match=r"After step 1, .* holds values that are not finite; nothing is saved"):
        trainer.save_model()
    assert not list(tmp_path.glob("*.safetensors"))


def test_text_only_rows_and_streams(tmp_path):
    trainer = make_trainer(tmp_path, dataset=rows(4, images=False).remove_columns("images"))
    trainer.train()
    streamed = make_trainer(tmp_path, dataset=rows(8).to_iterable_dataset(), max_steps=3)
    streamed.train()
    assert len(losses(streamed)) == 3 and streamed.row_reports["train_dataset"].kept >= 6
