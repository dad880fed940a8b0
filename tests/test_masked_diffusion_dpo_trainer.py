"""The trainer of preferences: TRL's columns, references and metrics, over processes, resumed, and with bad rows."""

import json
import logging
import math
from functools import partial
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from trl import DPOConfig

from lladamedv.trainers import MaskedDiffusionDPOTrainer
from lladamedv.trainers.answer_table import AnswerTableCallback
from tests import training
from tests.tiny import random_image
from tests.training import LORA, ROWS, adapters, changed, losses, tiny_model, tiny_processor, turn, weights_of


METRICS = {
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "rewards/margins_variance",
    "logps/chosen", "logps/rejected",
}  # fmt: skip


rows = ROWS["dpo"]
arguments, make_trainer, trained = (
    partial(each, "dpo") for each in (training.arguments, training.make_trainer, training.trained)
)


# The reference


REFERENCES = {
    "adapters": lambda: {"peft_config": adapters()}, "copy": dict, "given": lambda: {"ref_model": tiny_model()},
    "precomputed": lambda: {"precompute_ref_log_probs": True},
    "adapters, precomputed": lambda: {"peft_config": adapters(), "precompute_ref_log_probs": True},
}  # fmt: skip


@pytest.mark.parametrize(
    "reference", [pytest.param(each, marks=pytest.mark.slow if "," in each else ()) for each in REFERENCES]
)
def test_training_starts_at_log_2_and_learns(tmp_path, reference):
    """Every reference is the model as it was: exactly at the first step (precomputed, in batches of other rows, but for
    rounding), and still when the model has moved."""
    near = 1e-6 if "precomputed" in reference else 1e-7
    trainer = make_trainer(tmp_path, eval_dataset=rows(4), max_steps=12, **REFERENCES[reference]())
    before = weights_of(trainer.model)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=near)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=near)
    moved = changed(trainer.model, before)
    assert moved and all("lora_" in name for name in moved) == ("adapters" in reference)
    after = trainer.evaluate()
    assert {f"eval_{name}" for name in METRICS} <= set(after) and after["eval_rewards/accuracies"] > 0.9
    assert after["eval_loss"] < 0.65 and trainer.evaluate()["eval_loss"] == after["eval_loss"]
    margin = after["eval_rewards/chosen"] - after["eval_rewards/rejected"]
    assert after["eval_rewards/margins"] == pytest.approx(margin, rel=1e-4)


def test_the_reference_is_the_exact_one_of_score(tmp_path):
    """Rewards after training, by `score` of the trained model and of the one that training began with."""
    data = rows(1, prompt="Is it small?", chosen="Yes", rejected="No")
    trainer = trained(tmp_path, dataset=data, eval_dataset=data, per_device_train_batch_size=1)
    trainer.args.num_draws = 512
    found = trainer.evaluate()
    batch = trainer.data_collator([trainer.eval_dataset[0]])
    answers = [own[own != -100].tolist() for own in batch["labels"]]
    prompt = batch["input_ids"][:1, : (batch["labels"][0] == -100).int().argmin()]
    images = {name: batch[name] for name in ("pixel_values", "image_sizes")}
    now, start = (model.eval().score(prompt, answers, append_eos=False, **images).log_likelihood[0]
                  for model in (trainer.model, tiny_model()))  # fmt: skip
    rewards = 0.2 * (now - start)
    spread = 4 * found["eval_rewards/margins_variance"] ** 0.5 + 1e-3
    for name, expected in zip(("chosen", "rejected"), rewards.tolist()):
        assert found[f"eval_rewards/{name}"] == pytest.approx(expected, abs=spread)
        assert found[f"eval_logps/{name}"] == pytest.approx(float(now[int(name == "rejected")]), rel=0.1)


@pytest.mark.parametrize("image", ["crop", "blank"])
def test_losses_of_the_picture(tmp_path, image):
    """mDPO's terms: at the start each is log 2, and the chosen answer comes to need its picture."""
    options = {"loss_type": ["sigmoid", "image_conditional", "anchor", "sft"], "loss_weights": [1.0, 1.0, 1.0, 0.0]}
    trainer = make_trainer(tmp_path, eval_dataset=rows(4), max_steps=16, conditional_image=image, **options)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(3 * math.log(2), abs=1e-6)
    trainer.train()
    assert trainer.evaluate()["eval_rewards/image_accuracies"] > 0.7
    batch = trainer.data_collator([trainer.train_dataset[0]])
    picture, other = (batch["pixel_values"][batch["image_index"][place], 0] for place in (0, 2))
    if image == "blank":
        torch.testing.assert_close(other, other[:, :1, :1].expand_as(other))
        assert (other[:, 0, 0] - picture.flatten(1).median(dim=1).values).abs().max() < 0.05
    else:  # smoother than noise, and no copy of it
        assert other.std() < picture.std() and (other - picture).abs().max() > 0.1


def test_a_crop_is_a_small_part_of_the_picture(tmp_path):
    """Of a picture whose colours say where each pixel is: the crop's corners are those of a box of 1 to 20 %."""
    place = np.stack(np.broadcast_arrays(np.arange(240)[:, None], np.arange(160), 0), axis=2).astype(np.uint8)
    collator = make_trainer(tmp_path, loss_type="image_conditional").data_collator
    areas = []
    for number in range(40):
        place[..., 2] = number
        row = {"prompt": "?", "chosen": "a", "rejected": "b"}
        (_, (crop,)) = collator.conversations(row, [Image.fromarray(place)])[2]
        shown = np.asarray(crop).astype(int)
        assert shown.shape == place.shape and (shown[..., 2] == number).all()
        assert (np.diff(shown[..., 0], axis=0) >= 0).all() and (np.diff(shown[..., 1], axis=1) >= 0).all()
        height, width = (shown[-1, -1] - shown[0, 0] + 1)[:2]
        areas.append(height * width / 240 / 160)
    assert 0.005 < min(areas) < 0.06 and 0.14 < max(areas) < 0.22


def test_rewards_about_shuffled_pictures(tmp_path, caplog):
    """Of two answers, each right for one of two pictures: learned, the rewards follow the picture; exchanged, they are
    always wrong. The pictures are the other row's, and the masks those of the right pictures."""
    data = datasets.Dataset.from_list([
        {"prompt": "Which?", "images": [random_image(seed=seed)], "chosen": chosen, "rejected": rejected}
        for seed, chosen, rejected in ((1, "Left.", "Right."), (2, "Right.", "Left."))
    ]).cast_column("images", datasets.List(datasets.Image()))  # fmt: skip
    options = {"loss_type": ["sigmoid", "image_conditional"], "conditional_image": "shuffled"}
    trainer = make_trainer(
        tmp_path, dataset=data, eval_dataset=data, log_shuffled_images=True, max_steps=40, **options
    )
    batch = next(iter(trainer.get_eval_dataloader()))
    pictures = batch["pixel_values"][batch["image_index"]]
    others = batch["shuffled"]["pixel_values"][batch["shuffled"]["image_index"]]
    torch.testing.assert_close(others, pictures[[1, 0, 3, 2]])
    torch.testing.assert_close(pictures[4:], pictures[[1, 0]])  # of "image_conditional"
    assert batch["shuffled"]["exchanged"].tolist() == [True, True]
    assert torch.equal(batch["shuffled"]["labels"], batch["labels"][:4])
    trainer.train()
    found = trainer.evaluate()
    assert (found["eval_rewards/accuracies"], found["eval_rewards/image_accuracies"]) == (1, 1)
    assert found["eval_rewards/shuffled_accuracies"] == 0
    assert "rewards/shuffled_accuracies" not in {name for entry in trainer.state.log_history for name in entry}
    with caplog.at_level(logging.WARNING):
        assert "eval_rewards/shuffled_accuracies" not in trainer.evaluate(data.select([0, 0]))
    assert "a batch of the evaluation shows one picture alone" in caplog.text


# Noise and batches


def test_draws_share_one_encoding_of_the_picture(tmp_path):
    """Four pairs about one picture, of eight draws: one image in the tower for the policy, one for the reference."""
    trainer, towers = make_trainer(tmp_path, num_draws=8, peft_config=adapters()), []
    tower = trainer._base_model.model.vision_tower
    tower.register_forward_hook(lambda *a: towers.append(a[1][0].shape[0]))
    batches, _ = trainer.get_batch_samples(iter([trainer.data_collator(list(rows(4)))]), 1, "cpu")
    trainer.compute_loss(trainer.model, batches[0])
    assert towers == [1, 1]


def test_each_mask_of_an_answer_is_computed_once(tmp_path):
    """Of an answer of two tokens there are three masks, of one of three seven; the bounds are those of each draw by
    itself, also of rows about different numbers of pictures."""
    few = datasets.Dataset.from_list([
        {"prompt": "?", "chosen": "a", "rejected": "b c", "images": [random_image(seed=seed) for seed in shown]}
        for shown in ([1, 2], [3])
    ])  # fmt: skip
    trainer = make_trainer(tmp_path, num_draws=32)
    batch, seen = trainer.data_collator(list(few)), []
    lengths = (batch["labels"] != -100).sum(dim=1)
    trainer._base_model.model.language_model.register_forward_hook(
        lambda *call: seen.append(len(call[2].last_hidden_state))
    )
    with torch.no_grad():
        bounds_of = trainer._bounds_of(batch)
        together = bounds_of(trainer.model)
        times, uniform = bounds_of.keywords["t"], bounds_of.keywords["uniform"]
        apart = [bounds_of(trainer.model, t=times[[draw]], uniform=uniform[[draw]]) for draw in range(32)]
    torch.testing.assert_close(together, torch.cat(apart))
    assert lengths.tolist() == [2, 2, 3, 3] and seen[0] == 2 * (3 + 7) and set(seen[1:]) == {4}


def test_only_the_last_answer_is_compared(tmp_path):
    """Earlier turns are the prompt; end tokens behind the answer belong to it."""
    prompt = [*turn("user", "Is it big?"), *turn("assistant", "No."), *turn("user", "Small?")]
    trainer = make_trainer(tmp_path, dataset=rows(2, prompt=prompt), eos_padding=2, eos_padding_token="<|eot_id|>")
    batch, tokenizer = trainer.data_collator([trainer.train_dataset[0]]), trainer.processing_class.tokenizer
    learned = [tokenizer.decode(own[own != -100]) for own in batch["labels"]]
    assert learned == ["Yes.<|eot_id|><|eot_id|><|eot_id|>", "No.<|eot_id|><|eot_id|><|eot_id|>"]


# What is said


def test_a_fall_of_the_chosen_answers_is_warned_of(tmp_path, caplog):
    """Pairs whose chosen answers fall, because the loss lowers what is rejected and both share their words."""
    data = rows(4, chosen="It is on the left.", rejected="It is on the left side.")
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, dataset=data, max_steps=6, per_device_train_batch_size=4)
        trainer._reference_bounds = lambda inputs, bounds_of: bounds_of(trainer.model).detach() + 3.0
        trainer.train()
    assert caplog.text.count("the chosen answers have become less likely than under the reference, by 3.00 nats") == 1


def test_a_fall_of_the_answers_is_warned_of(tmp_path, caplog):
    """By McNemar's test at two standard errors: of 8 right answers 4 may be lost (4 = 2 √4), but not 6; 7 are too many
    also where 1 is won."""
    processor, given = tiny_processor(), []

    class Model(torch.nn.Module):
        device = "cpu"

        def generate(self, input_ids, **options):
            ids = processor.tokenizer(given.pop(0), add_special_tokens=False, return_tensors="pt").input_ids
            return SimpleNamespace(sequences=torch.cat([input_ids, ids], dim=1), answer_confidence=torch.ones(1))

    trainer = SimpleNamespace(
        model=Model(), processing_class=processor, accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        callback_handler=SimpleNamespace(callbacks=[]), log=lambda logs: None,
    )  # fmt: skip
    asked = [{"messages": turn("user", "Big?") + turn("assistant", "Yes")}] * 9

    def warned(*rights):
        callback = AnswerTableCallback(trainer, asked)
        caplog.clear()
        for step, right in enumerate(rights):
            given.extend("Yes" if each == "+" else "No" for each in right)
            state = SimpleNamespace(global_step=step, is_world_process_zero=True)
            callback.on_evaluate(SimpleNamespace(output_dir=tmp_path), state, None, {})
        return [record.message for record in caplog.records]

    with caplog.at_level(logging.WARNING):
        assert warned("++++++++-", "----++++-", "++++++++-") == []
        (message,) = warned("++++++++-", "------++-", "---------")
        assert message.startswith("Step 1: 6 of 9 answers are no longer right, and 0 have become so")
        assert warned("++++++++-", "-------++") and not warned("------++-", "++++++++-")


def test_answers_are_counted(tmp_path):
    model = tiny_model()
    model.generation_config.update(max_new_tokens=4, block_length=4, steps=4)
    options = {"eval_dataset": rows(4), "log_answers": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    trainer = trained(tmp_path, model=model, **options)
    records = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    right = sum(record["answer"].lower() == record["reference"].lower() for record in records) / 2
    history = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    assert history["eval_answer_accuracy"] == right


def test_arguments_of_trl(tmp_path):
    """A DPOConfig is taken over; what means nothing here is refused."""
    config = DPOConfig(str(tmp_path), beta=0.3, loss_type=["sigmoid", "sft"], bf16=False, use_cpu=True, report_to=[])
    trainer = MaskedDiffusionDPOTrainer(
        tiny_model(), args=config, train_dataset=rows(2), processing_class=tiny_processor()
    )
    assert (trainer.args.beta, trainer.args.loss_type, trainer.args.learning_rate) == (0.3, ["sigmoid", "sft"], 1e-6)
    config.ld_alpha = 0.5
    with pytest.raises(ValueError, match=r"`ld_alpha` is 0\.5, which does not apply to preferences"):
        MaskedDiffusionDPOTrainer(tiny_model(), args=config, train_dataset=rows(2), processing_class=tiny_processor())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": rows(2).remove_columns("rejected")}, "needed are `prompt`, `chosen`, `rejected` and `images`"),
        ({"dataset": rows(2, chosen=turn("user", "Yes."))}, "`chosen` is not one assistant turn"),
        ({"dataset": rows(2, rejected=[])}, "`rejected` is not one assistant turn"),
        ({"dataset": rows(2, rejected="Yes.", chosen="Yes.")}, "`chosen` and `rejected` are the same"),
        ({"dataset": rows(2, prompt=[])}, "no `prompt`: .*extract_prompt"),
        ({"dataset": rows(2, images=[]), "loss_type": "image_conditional"}, "it has no image: .*changes the images"),
        ({"conditional_image": "blank"}, "`conditional_image` is 'blank', but `loss_type` lacks 'image_conditional'"),
        ({"log_shuffled_images": True, "precompute_ref_log_probs": True}, "`log_shuffled_images` is True, so that pic"),
        ({"dataset": rows(2).to_iterable_dataset(), "precompute_ref_log_probs": True}, "`train_dataset` is a stream"),
        ({"loss_normalization": "tokens"}, "`loss_normalization` is 'tokens', which does not apply to preferences"),
        ({"loss_type": ["sigmoid", "nll"]}, "`loss_type` is .*; allowed are one or more of"),
        ({"loss_weights": [1.0, 2.0]}, r"`loss_weights` is \[1.0, 2.0\]; `loss_type` names 1 losses"),
        ({"beta": 0.0}, "`beta` is 0.0; allowed are numbers above 0"),
    ],
)  # fmt: skip
def test_bad_rows_and_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


def test_given_adapters_go_on_from_where_they_are(tmp_path):
    model = get_peft_model(tiny_model(), adapters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    trainer = trained(tmp_path, model=model, precompute_ref_log_probs=True, max_steps=1)
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    with pytest.raises(ValueError, match="`eval_dataset` is new, but `precompute_ref_log_probs`"):
        trainer.evaluate(rows(2))


def test_dropout_is_set_to_zero(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = trained(tmp_path, peft_config=LoraConfig(**LORA, lora_dropout=0.5), max_steps=1)
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-7) and "Dropout of 0.5 is set to 0" in caplog.text
