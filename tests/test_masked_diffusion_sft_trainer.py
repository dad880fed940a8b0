"""The trainer: what is trained and with which noise, resumed, accumulated, packed, with adapters; and bad rows."""

import base64
import copy
import itertools
import json
import math
from functools import partial
from io import BytesIO

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import TrainerCallback

from lladamedv import LLaDAMedVForConditionalGeneration, LLaDAMedVProcessor
from lladamedv.hub_cards.loss_curve import draw_loss_curve
from lladamedv.trainers import training_progress
from lladamedv.trainers.masked_diffusion_loss import AnswerNoise, add_noise
from tests import training
from tests.html_pages import Page
from tests.test_data_collator import chat
from tests.training import ANSWERS, LORA, QUESTIONS, ROWS, changed, logged, losses, tiny_model, weights_of


EXACTLY = {"atol": 0, "rtol": 0}


rows = ROWS["sft"]
arguments, make_trainer, trained = (
    partial(each, "sft") for each in (training.arguments, training.make_trainer, training.trained)
)


def seen_by(trainer):
    """The ids of the rows that the trainer asks its collator for, as they come."""
    collate, seen = trainer.data_collator.torch_call, []
    trainer.data_collator.torch_call = lambda batch: seen.extend(row["id"] for row in batch) or collate(batch)
    return seen


# What is trained


@pytest.mark.parametrize(
    ("trainable", "parts"),
    [
        ("projector", ("multi_modal_projector",)),
        ("projector+language_model", ("multi_modal_projector", "language_model", "lm_head")),
        ("all", ("multi_modal_projector", "language_model", "lm_head", "vision_tower")),
    ],
)
def test_the_trained_parts_change_and_the_others_do_not(tmp_path, trainable, parts):
    trainer = make_trainer(tmp_path, trainable=trainable)
    before = weights_of(trainer.model)
    trainer.train()
    moved = changed(trainer.model, before)
    for name in before:
        expected = any(part in name for part in parts)
        some_rows = expected and any(part in name for part in ("embed_tokens", "lm_head", "bias"))
        assert some_rows or (name in moved) == expected, name
    assert all(map(math.isfinite, losses(trainer))) and len(losses(trainer)) == 4


def test_what_was_frozen_stays_so(tmp_path):
    """As in TRL: `trainable` never unfreezes."""
    model = tiny_model()
    model.model.language_model.layers[0].requires_grad_(False)
    before = weights_of(model)
    moved = changed(trained(tmp_path, model=model).model, before)
    assert "lm_head.weight" in moved and not any(".layers.0." in name or "vision_tower" in name for name in moved)


@pytest.mark.parametrize("options", [{"activation_checkpointing": True}, {"bf16": True}], ids=str)
def test_checkpointing_and_half_precision(tmp_path, options):
    """The same run: to the last bits, or to the precision of bfloat16."""
    plain, other = losses(trained(tmp_path)), losses(trained(tmp_path, **options))
    assert other == pytest.approx(plain, rel=0.05 if "bf16" in options else 1e-5)
    assert ("bf16" in options) == (other != pytest.approx(plain, rel=1e-5))


def test_a_learning_rate_for_each_part(tmp_path):
    rates = {"multi_modal_projector": 1e-3, "vision_tower": 2e-6}
    options = {"trainable": "all", "projector_learning_rate": 1e-3, "vision_learning_rate": 2e-6, "max_steps": 1}
    trainer = trained(tmp_path, lr_scheduler_type="constant", warmup_steps=0, **options)
    rate_of = {id(weight): group["lr"] for group in trainer.optimizer.param_groups for weight in group["params"]}
    assert len(rate_of) == sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    for name, weight in trainer.model.named_parameters():
        assert rate_of[id(weight)] == next((rate for part, rate in rates.items() if part in name), 1e-2), name


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
    assert towers == [1] and positions == [max(1, int(masked[0]))]


def assert_logits(trainer, model):
    """Those of the trained model, and its answers."""
    batch = trainer.data_collator([trainer.train_dataset[0]])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    models = trainer.model.eval(), model.eval()
    with torch.no_grad():
        torch.testing.assert_close(*(each(**inputs).logits for each in models), atol=1e-4, rtol=1e-3)
    answers = [each.generate(**inputs, max_new_tokens=4, block_length=4, steps=4) for each in models]
    assert torch.equal(*answers) and answers[0].shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora(tmp_path, variant, checkpointing):
    config = LoraConfig(**LORA, **variant)
    trainer = make_trainer(tmp_path, peft_config=config, activation_checkpointing=checkpointing)
    before = weights_of(trainer.model)
    trainer.train()
    moved = changed(trainer.model, before)
    assert moved and all("lora_" in name for name in moved)
    trainer.save_model()
    assert not list(tmp_path.glob("model*.safetensors"))
    assert_logits(trainer, PeftModel.from_pretrained(tiny_model(), tmp_path))


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["multi_modal_projector"]}, {"use_dora": True}], ids=str)
def test_given_adapters_stay_what_is_trained(tmp_path, options):
    """Two sets of them, of which the second goes on training; what is saved gives the logits of what was trained."""
    base, config = tiny_model(), LoraConfig(**LORA, **options)
    model = get_peft_model(copy.deepcopy(base), config, "first")
    model.add_adapter("second", config)
    model.set_adapter("second")
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    before = weights_of(model)
    trainer = trained(tmp_path, model=model)
    moved = changed(model, before)
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == trainable
    assert moved and moved <= trainable and all(".second." in name for name in moved)
    trainer.save_model()
    assert_logits(trainer, PeftModel.from_pretrained(base, tmp_path / "second"))
    trainer.create_model_card("adapters")


def test_what_is_saved(tmp_path):
    """The trained weights, and the special tokens as they were, though the tokenizer's own end token is another."""
    model, ids = tiny_model(), {"eos_token_id": [586], "bos_token_id": 571, "pad_token_id": 572}
    model.generation_config.update(**ids)
    model.config.text_config.pad_token_id = 572
    before = model.generation_config.to_dict(), model.config.text_config.to_dict()
    trainer = trained(tmp_path, model=model, save_strategy="steps", save_steps=2)
    trainer.save_model()
    assert trainer.processing_class.tokenizer.eos_token_id not in ids["eos_token_id"]
    assert (model.generation_config.to_dict(), model.config.text_config.to_dict()) == before
    for folder in (tmp_path / "checkpoint-2", tmp_path):
        saved = json.loads((folder / "generation_config.json").read_text())
        assert {name: saved[name] for name in ids} == ids
        assert json.loads((folder / "config.json").read_text())["text_config"]["pad_token_id"] == 572
    loaded = LLaDAMedVForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(weights_of(loaded), weights_of(trainer.model), **EXACTLY)
    assert isinstance(LLaDAMedVProcessor.from_pretrained(tmp_path), type(trainer.processing_class))


# Noise


def test_the_same_seed_gives_the_same_run(tmp_path):
    first, again, other = (losses(trained(tmp_path, noise_seed=seed)) for seed in (None, None, 9))
    assert first == again != other


def test_draws_differ_by_step_seed_and_answer():
    """How they do not depend on padding and on how a batch is split: tests/properties/test_loss_properties.py."""
    labels, answers = torch.arange(20).view(4, 5), torch.tensor([0, 0, 0, 1, 1]) + 2 * torch.arange(4)[:, None]
    draws = [AnswerNoise(seed)(labels, answers, step, 0, 4) for seed, step in ((0, 7), (0, 8), (1, 7))]
    times, uniforms = (torch.stack(each) for each in zip(*draws))
    assert len(times.unique()) == 3 * 8 and len(uniforms.unique()) == 3 * 20


@pytest.mark.parametrize("normalization", ["answer_length", "tokens", "batch"])
@pytest.mark.parametrize("options", [{}, {"complementary_masking": True}, {"time_sampling": "stratified"}], ids=str)
def test_accumulation_changes_nothing(tmp_path, normalization, options):
    """Four rows at once, two and two, or one by one: the same noise, the same loss, the same weights."""
    options |= {"loss_normalization": normalization, "optim": "sgd", "learning_rate": 1e-3, "max_steps": 2}
    whole, *others = (
        trained(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, **options)
        for size in (4, 2, 1)
    )
    for other in others:
        assert losses(other) == pytest.approx(losses(whole), rel=1e-4)
        torch.testing.assert_close(weights_of(other.model), weights_of(whole.model), atol=1e-5, rtol=1e-3)


# Runs that go on


@pytest.mark.parametrize(("steps", "checkpoint", "logging"), [(6, 2, 1), (6, 2, 3), (6, 6, 1), (4, 4, 1)])
def test_resumed(tmp_path, steps, checkpoint, logging):
    """Losses, weights and the count of tokens are those of the uninterrupted run, whatever the step of the checkpoint
    and of the last log; after the last checkpoint, at the end of an epoch or within one, no further step is taken."""
    options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2, "logging_steps": logging}
    first = make_trainer(tmp_path, **options)
    length = {row["id"]: first.data_collator.row_length(row) for row in first.train_dataset}
    seen = seen_by(first)
    first.train()
    again = trained(tmp_path, f"checkpoint-{checkpoint}", model=tiny_model(seed=5), **options)
    assert again.state.global_step == steps and losses(again)[-1] == pytest.approx(losses(first)[-1], rel=1e-5)
    torch.testing.assert_close(weights_of(again.model), weights_of(first.model), atol=1e-5, rtol=1e-4)
    counts = [sum(length[name] for name in seen[: 2 * step]) for step in range(logging, steps + 1, logging)]
    assert logged(again, "num_tokens") == logged(first, "num_tokens") == counts


@pytest.mark.parametrize(("count", "accumulation", "checkpoint"), [(4, 1, 3), (7, 4, 2)])
def test_a_stream_begins_anew_and_resumes(tmp_path, count, accumulation, checkpoint):
    """A stream of fewer rows than the steps need, in batches of two: each pass gives every row once, in the order of
    that pass; a run that is resumed behind its end sees the rows that an uninterrupted one sees."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": accumulation}
    stream = rows(count).to_iterable_dataset().shuffle(seed=1, buffer_size=count)
    first = make_trainer(tmp_path, dataset=stream, **options)
    seen = seen_by(first)
    first.train()
    again = trained(tmp_path, f"checkpoint-{checkpoint}", model=tiny_model(seed=5), dataset=stream, **options)
    passes = [tuple(seen[begin : begin + count]) for begin in range(0, len(seen) - count + 1, count)]
    assert all(sorted(each) == [f"row-{number}" for number in range(count)] for each in passes) and len({*passes}) > 1
    assert losses(again) == pytest.approx(losses(first), rel=1e-5) and len(losses(first)) == 6
    assert logged(again, "num_tokens") == logged(first, "num_tokens")


def test_a_step_at_the_end_of_a_stream(tmp_path):
    """Three rows in two accumulated batches of two: the same step as one of a data set of these three."""
    options = {"gradient_accumulation_steps": 4, "optim": "sgd", "train_sampling_strategy": "sequential"}
    whole, streamed = (
        trained(tmp_path, dataset=data, max_steps=2, **options) for data in (rows(3), rows(3).to_iterable_dataset())
    )
    assert losses(streamed) == pytest.approx(losses(whole), rel=1e-5)
    torch.testing.assert_close(weights_of(streamed.model), weights_of(whole.model), atol=1e-6, rtol=1e-5)


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
    batches = [trainer.data_collator([row]) for row in trainer.eval_dataset]
    for batch, number in itertools.product(batches, range(3)):
        labels = batch["labels"]
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
    model, recorder = tiny_model(), Recorder()
    model.generation_config.update(max_new_tokens=8, block_length=8, steps=8)
    trainer = make_trainer(tmp_path, model, eval_dataset=rows(4), log_answers=3, eval_strategy="steps", eval_steps=2)
    trainer.add_callback(recorder)
    trainer.train()
    records = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 2, 2, 4, 4, 4] and len(recorder.tables) == 2
    assert [record["reference"] for record in records[:3]] == ANSWERS[:3]
    assert recorder.tables[1].count("\n") == 4 and "| Where is it? | On the left side. |" in recorder.tables[1]
    processor, (image,) = trainer.processing_class, trainer.eval_dataset[1]["images"]
    content = [{"type": "image", "image": image["bytes"]}, {"type": "text", "text": "Where is it?"}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    answer = trainer.model.eval().generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    assert records[4]["answer"] == processor.decode(answer, skip_special_tokens=True).strip()
    assert (tmp_path / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    # The page has each picture once, and each answer of this run alone, as text.
    page = Page((tmp_path / "answers.html").read_text())
    pictures = [attributes["src"] for tag, attributes, _ in page.elements if tag == "img"]
    opened = [Image.open(BytesIO(base64.b64decode(each.partition(",")[2]))) for each in pictures]
    expected = [processor.image_processor.fetch_images(row["images"])[0] for row in rows(4).take(3)]
    assert [image.tobytes() for image in opened] == [image.tobytes() for image in expected]
    cells, lines = page.texts("td"), []
    for first, last in zip(records[:3], records[3:]):  # an answer that stayed the same is one line
        spans = [("2 to 4", last)] if first["answer"] == last["answer"] else [("2", first), ("4", last)]
        lines += [[steps, each["answer"], f"{each['confidence']:.1%}"] for steps, each in spans]
    assert [cells[place : place + 3] for place in range(0, len(cells), 3)] == lines
    assert not any(attributes.get("http-equiv") == "refresh" for _, attributes, _ in page.elements)


def test_answers_of_one_run_do_not_mix_with_anothers(tmp_path, caplog):
    """A resumed run goes on from its checkpoint, another begins anew; what rows hold is no HTML."""
    options = {"log_answers": 1, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    model = tiny_model()
    model.generation_config.update(max_new_tokens=4, block_length=4, steps=4)
    held_out = broken(messages=[{"role": "user", "content": "<b>?"}, {"role": "assistant", "content": "<script>"}])
    options |= {"eval_dataset": held_out.select([2]), "max_steps": 3}
    for resume, expected in ((None, [1, 2, 3]), (tmp_path / "checkpoint-1", [1, 2, 3]), (None, [1, 2, 3])):
        make_trainer(tmp_path, copy.deepcopy(model), **options).train(resume_from_checkpoint=resume and str(resume))
        records = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == expected
    options["eval_dataset"] = rows(1)
    checkpoint = str(tmp_path / "checkpoint-2")
    page = (tmp_path / "answers.html").read_text()
    with caplog.at_level("WARNING"):
        make_trainer(tmp_path, copy.deepcopy(model), **options).train(resume_from_checkpoint=checkpoint)
    assert "holds answers to other rows" in caplog.text
    records = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [(record["step"], record["question"]) for record in records] == [(3, QUESTIONS[0])]
    assert "&lt;script&gt;" in page and "<script>" not in page and "<b>?" not in page


def test_what_a_training_writes_while_it_runs(tmp_path, capsys, monkeypatch):
    """Piped: a line a log, the time left, and no bars; the curve before the training ends."""
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((tmp_path / "loss_curve.png").exists())

    monkeypatch.setattr(training_progress, "_PAUSE", 10**9)  # drawn after the first step and at the end
    options = {"eval_dataset": rows(4), "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1, "max_steps": 3}
    trainer = make_trainer(tmp_path, **options)
    trainer.add_callback(Watch())
    capsys.readouterr()
    trainer.train()
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "2/3", "3/3", "3/3", "3/3"]
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert lines[1].startswith(f"step 2/3  loss {history[1]['loss']:.4g}  ") and lines[1].endswith(" left")
    assert "eval_loss" in lines[2] and "train_runtime" in lines[5] and " step " not in err
    assert seen == [False, True, True]
    draw_loss_curve(tmp_path / "whole.png", trainer.state.log_history)
    assert (tmp_path / "loss_curve.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


def test_what_cannot_be_written_to_look_at_ends_no_training(tmp_path, caplog):
    """A folder stands where the file belongs: to replace it fails, as on a full disk, or when a viewer holds it. The
    card goes without the curve, and nothing is left that a push would refuse."""
    for name in ("loss_curve.png", "answers.html"):
        (tmp_path / name / "held").mkdir(parents=True)
    trainer = make_trainer(tmp_path, eval_dataset=rows(4), log_answers=1, eval_strategy="steps", eval_steps=1)
    trainer.train()
    trainer.create_model_card()
    assert trainer.state.global_step == trainer.state.max_steps
    assert "loss_curve.png" not in (tmp_path / "README.md").read_text() and not [*tmp_path.glob("*.new")]
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == trainer.state.max_steps
    for name in ("loss_curve.png", "answers.html"):
        assert f"{name} is not up to date, the training goes on" in caplog.text


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
    trainer = trained(tmp_path, pack_questions=3, max_steps=2)  # two images of four questions each: 3 and 1
    assert trainer.train_dataset["id"][:2] == ["row-0 + row-1 + row-2", "row-3"] and len(trainer.train_dataset) == 4
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
        (chat("Is it?", " "), "no assistant turn"),
        ({"messages": chat("Is it?", "")["messages"] + chat("Where?", "No")["messages"]}, "an assistant turn is empty"),
        (chat("<image> or <image>?", "No."), "2 <image> for 1 images"),
        (chat("<ima<image>ge>?", "No."), "2 <image> for 1 images"),
        ({"images": []} | chat("<image>?", "No."), "1 <image> for 0 images"),
        ({"images": [{"path": "gone.png", "bytes": None}]}, "an image cannot be read: .*no such file"),
        (chat("Why? " * 100, "No."), r"more than 200 tokens: \d+\."),
    ],
)
def test_bad_rows(tmp_path, changes, reason):
    """They stop everything, or are left out and counted."""
    option, value = ("long_rows", "drop") if "tokens" in reason else ("invalid_rows", "skip")
    options = {"dataset": broken(**changes), "max_length": 200}
    with pytest.raises(ValueError, match=rf"row 2 \(row-2\) has a problem: {reason}.*{option}='{value}'"):
        make_trainer(tmp_path, **options)
    trainer = make_trainer(tmp_path, **options, **{option: value})
    report = trainer.row_reports["train_dataset"]
    assert report.kept == len(trainer.train_dataset) == 3
    assert sum(report.left_out.values()) == 1 and list(report.rows.values()) == [["row 2 (row-2)"]]
    assert reason.split(":")[0] in report.summary() and "row-2" in report.summary()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": datasets.Dataset.from_list([])}, "`train_dataset` is empty"),
        ({"dataset": datasets.Dataset.from_list([{"text": "a"}])}, "the columns \\['text'\\]; needed are `messages`"),
        ({"dataset": broken(messages=[]).select([2])}, "of which none can be trained on|no `messages`"),
        ({"max_length": 9999}, "`max_length` is 9999; the model's context allows 512"),
        ({"trainable": "everything"}, "`trainable` is 'everything'; allowed are"),
        ({"pack_questions": 1}, "`pack_questions` is 1; allowed are whole numbers of at least 2"),
        ({"pack_questions": 4, "turn_mask": True}, "only one of the two is allowed"),
        ({"pack_questions": 4, "dataset": rows(4, images=False)}, "`pack_questions` is 4, but row-0 has 0 images"),
        ({"max_loss_weight": 0.5}, "`max_loss_weight` is 0.5"),
        ({"max_loss_weight": 5.0}, "`max_loss_weight` is 5.0, but `loss_weighting` is 'inverse_probability'"),
        ({"eos_padding": 1.5}, "`eos_padding` is 1.5; allowed are whole numbers"),
        ({"vision_learning_rate": 0.1}, "`vision_learning_rate` is 0.1, but nothing of that part is trained, only pro"),
        ({"vision_learning_rate": -1.0}, "`vision_learning_rate` is -1.0"),
        ({"log_answers": 2}, "`log_answers` is 2, but there is no `eval_dataset`"),
        ({"dataset_kwargs": {"text": "a"}}, "`dataset_kwargs` is .*; allowed is 'skip_prepare_dataset'"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True, which would part images"),
        ({"activation_offloading": True}, "`activation_offloading` is True, but there is no GPU"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    """Also of one row in an evaluation, of which Transformers would average over the finite rest."""
    trainer = make_trainer(tmp_path, eval_dataset=rows(4), per_device_eval_batch_size=1)
    bad = next(iter(trainer.data_collator([trainer.eval_dataset[1]])["input_ids"][0, -3:]))
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[bad] = math.nan
    with pytest.raises(ValueError, match="The loss is nan at step 0; the batch's ids are in"):
        trainer.evaluate()
    with torch.no_grad():
        trainer.model.lm_head.weight[:] = math.nan
    with pytest.raises(ValueError, match="The loss is nan at step 0"):
        trainer.train()
    record = json.loads((tmp_path / "not_finite.json").read_text())
    assert len(record["row_ids"]) == 2 and all(name.startswith("row-") for name in record["row_ids"])
    assert "assistant" in record["texts"][0] and "<image>" not in record["texts"][0]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The last step of a run has a finite loss and ruins the weights."""
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(math.inf)
    with pytest.raises(ValueError, match=r"After step 0, .* holds values that are not finite; nothing is saved"):
        trainer.save_model()
    assert not list(tmp_path.glob("*.safetensors"))


def test_text_only_rows_and_streams(tmp_path):
    trained(tmp_path, dataset=rows(4, images=False).remove_columns("images"))
    streamed = trained(tmp_path, dataset=rows(8).to_iterable_dataset(), max_steps=3)
    assert len(losses(streamed)) == 3 and streamed.row_reports["train_dataset"].kept >= 6
