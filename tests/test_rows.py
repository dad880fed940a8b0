"""Rows as users have them: a wrong one is named by its number, and what is left out is counted."""

import dataclasses
import io
import json
import resource
import shutil
from collections import namedtuple
from pathlib import Path

import datasets
import numpy as np
import pydantic
import pytest
import torch

from lladamedv.processing.datasets.messages import normalize_messages
from lladamedv.trainers import MaskedDiffusionSFTConfig, MaskedDiffusionSFTTrainer, sft
from lladamedv.trainers.rows import split_by_image
from tests.test_train_command import arguments, llava_med_file, train
from tests.tiny import random_image


MESSAGES = datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})


@pytest.fixture
def make_trainer(shipped, tmp_path):
    def make(dataset, **options):
        args = MaskedDiffusionSFTConfig(
            str(tmp_path), report_to=[], bf16=False, use_cpu=True, save_strategy="no", activation_checkpointing=False,
            max_steps=2, per_device_train_batch_size=2, disable_tqdm=True, **options,
        )  # fmt: skip
        return MaskedDiffusionSFTTrainer(shipped[0], args, train_dataset=dataset, processing_class=shipped[1])

    return make


def stream(content):
    return datasets.IterableDataset.from_generator(lambda: iter(content))


def file(form="PNG", part=1.0):
    """The bytes of a picture file, or the first part of them."""
    random_image(64, 64).save(stored := io.BytesIO(), form)
    return stored.getvalue()[: int(len(stored.getvalue()) * part)]


def chat(question="Is there a lesion?", answer="Yes"):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def of_bytes(*contents):
    return [{"bytes": content, "path": None} for content in contents]


def row(images=None, messages=None, **others):
    images = of_bytes(file()) if images is None else images
    return {"messages": chat() if messages is None else messages, "images": images, **others}


BROKEN_IMAGES = [
    *(of_bytes(file(form, part=0.6)) for form in ("JPEG", "PNG", "TIFF", "WEBP")),
    of_bytes(file(), file(part=0.5)), of_bytes(b"no picture"), [{"bytes": None, "path": "gone.png"}],
    [{"bytes": None, "path": None}], of_bytes(b""), [{"bytes": None, "path": "https://example.org/a.png"}],
]  # fmt: skip
REASONS = {"an image cannot be read": 7, "an image is missing": 2, "an image is a URL": 1}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_broken_images_are_named_and_left_out(make_trainer, streaming):
    content = [each for images in BROKEN_IMAGES for each in (row(id=None), row(images, id="scan"))]
    dataset = datasets.Dataset.from_list(content)
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    with pytest.raises(ValueError, match=r"row 1 \(scan\) has a problem: an image cannot .*invalid_rows='skip'"):
        list(make_trainer(dataset).train_dataset)
    trainer = make_trainer(dataset, invalid_rows="skip")
    assert len(list(trainer.train_dataset)) == len(BROKEN_IMAGES)
    report = trainer.row_reports["train_dataset"]
    assert report.kept == len(BROKEN_IMAGES) and report.left_out == REASONS
    assert "row 1 (scan), row 3 (scan)" in report.summary()


ODD_MESSAGES = [
    None, "hello", 5, [], [5], ["hello"], [{"content": "x"}], [{"role": "user"}], chat(None), chat(b"x"), chat(["x"]),
    chat([["x"]]), chat()[1:], chat(answer=7), chat(answer=" "), chat("<image> and <image>"), chat("\ud800"),
    [{"role": "tool", "content": "x"}, *chat()], [chat()], chat()[:1],
    chat([{"type": "image", "image": "a.png"}, {"type": "text", "text": "x"}]), chat([{"type": "video"}]),
    chat(answer=[{"type": "image"}, {"type": "text", "text": "x"}]),
    [*chat()[:1], {"role": "assistant", "content": "x", "tool_calls": [{"name": "look"}]}],
    [*chat()[:1], {"role": "assistant", "content": "x", "loss": False}], chat([{"type": "image", "window": "lung"}]),
]  # fmt: skip
ODD_IMAGES = [
    "gone.png", 5, [5], [None], [""], [b""], [{}], [{"url": "x"}], object(), [float("nan")], ["\0"], [["a"]],
    np.zeros((0, 0, 3), np.uint8), [np.zeros((8, 8, 7), np.uint8)], ["zip://a.png::gone.zip"], [[[1, 2], [3]]],
    [[[1, 2, 3], [1, 2, 3]]],
]  # fmt: skip


def test_odd_rows_are_named_and_left_out(make_trainer):
    """A stream of anything at all: as many rows are left out as are odd, each by its number, and none stops the run."""
    odd = [row(messages=messages) | {"messages": messages} for messages in ODD_MESSAGES]
    odd += [row(images) for images in ODD_IMAGES] + [row(image=row()["images"][0]), row(tools=["look"])]
    odd.append(row(chat_template_kwargs={"thinking": True}))
    trainer = make_trainer(stream([each for one in odd for each in (one, row())]), invalid_rows="skip")
    assert len(list(trainer.train_dataset)) == len(odd)
    report = trainer.row_reports["train_dataset"]
    names = [name for names in report.rows.values() for name in names]
    assert sorted(names) == sorted(f"row {number}" for number in range(0, 2 * len(odd), 2))
    assert report.kept == len(odd), "the trainer's look at the first row is no row of its own"


@pytest.mark.parametrize("content", [[], [row([5])] * 3])
def test_a_stream_without_a_good_row(make_trainer, content):
    with pytest.raises(ValueError, match=r"`train_dataset` is (a stream of which no row|empty)"):
        make_trainer(stream(content), invalid_rows="skip")


Message = pydantic.create_model("Message", role=str, content=str)
PlainMessage = dataclasses.make_dataclass("PlainMessage", ["role", "content"])


def test_rows_that_are_as_good(make_trainer, tmp_path):
    """The same picture and words in every other form make the same batch."""
    picture, path = np.asarray(random_image(64, 64)), str(tmp_path / "a.png")
    random_image(64, 64).save(path)
    images = [
        path, Path(path), [path], file(), {"bytes": file(), "path": None}, {"bytes": None, "path": path}, picture,
        [picture], picture[None], picture.tolist(), [picture.tolist()], torch.tensor(picture), random_image(64, 64),
        [picture.transpose(2, 0, 1)],
    ]  # fmt: skip
    messages = [
        *([kind(**message) for message in chat()] for kind in (Message, PlainMessage)),
        [dict(message, content=[{"type": "text", "text": message["content"]}]) for message in chat()],
        chat("Is there a lesion?\n<image>"),
    ]
    content = [
        {"messages": chat(), "image" if np.ndim(image) == 3 or number == 9 else "images": image}
        for number, image in enumerate(images)
    ]
    trainer = make_trainer(stream(content + [row([path], each) for each in messages]))
    wanted = trainer.data_collator([row([random_image(64, 64)])])
    rows = list(trainer.train_dataset)
    assert len(rows) == len(images) + len(messages)
    for number, each in enumerate(rows):
        batch = trainer.data_collator([each])
        for name in ("input_ids", "labels", "pixel_values"):
            assert torch.equal(batch[name], wanted[name]), (number, name)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("form", ["numpy", "torch", "array", "list of arrays"])
def test_formats_and_arrays(shipped, make_trainer, form, streaming):
    picture = np.asarray(random_image(64, 64))
    content, features = row([random_image(64, 64)]), None
    if form == "array":
        content = {"messages": chat(), "image": picture}
        features = datasets.Features({"messages": MESSAGES, "image": datasets.Array3D((64, 64, 3), "uint8")})
    elif form == "list of arrays":
        content = row([picture])
    dataset = datasets.Dataset.from_list([content] * 4, features)
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    trainer = make_trainer(dataset.with_format(form) if form in ("numpy", "torch") else dataset)
    batch = trainer.data_collator([next(iter(trainer.train_dataset))])
    wanted = shipped[1].image_processor(random_image(64, 64), return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], wanted)


def test_placeholders_of_others_are_text(shipped, make_trainer):
    """`<image>` in an answer or a system text shows no image."""
    messages = [{"role": "system", "content": "Say <image>."}, *chat(answer="It is <image> here")]
    trainer = make_trainer(datasets.Dataset.from_list([row(messages=messages)] * 2))
    batch = trainer.data_collator([trainer.train_dataset[0]])
    image_token = shipped[1].image_token_id
    assert (batch["input_ids"] == image_token).sum() == 64 and not (batch["labels"] == image_token).any()
    learned = batch["labels"][batch["labels"] >= 0]
    assert "<image>" in shipped[1].tokenizer.decode(learned).replace(" ", "")


@pytest.mark.parametrize(
    ("content", "text", "shown"),
    [
        ("Look at\n<image>\nWhat?", "Look at\n\nWhat?", 1),  # LLaVA: text.replace("<image>", "").strip()
        ("<image> or <image>?", "or ?", 2),
        ("<ima<image>ge> or?", "or?", 2),
        ([{"type": "text", "text": "A"}, {"type": "image"}, {"type": "text", "text": "B"}], "A\nB", 1),
    ],
)
def test_images_of_a_turn(content, text, shown):
    """A turn's images come first, and what is normalised stays so. More forms of a question:
    tests/test_llava_med_records.py."""
    question, answer = normalized = normalize_messages(chat(content), shown)
    assert question["content"] == [{"type": "image", "text": None}] * shown + [{"type": "text", "text": text}]
    assert answer == {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}
    assert normalize_messages(normalized, shown) == normalized


# A part of the rows to evaluate on


def test_no_picture_is_on_both_sides(shipped, tmp_path):
    """… under whatever name and in whatever file; and rows that show two pictures keep both on one side."""
    pictures = [random_image(32, 32, seed=number) for number in range(12)]
    content, shown = [{"messages": chat(), "images": pictures[:2]}], [{0, 1}]
    for number, picture in enumerate(pictures):
        names = [str(tmp_path / f"{number}.png"), str(tmp_path / f"copy of {number}.bmp")]
        for image in (*names, picture):
            content.append({"messages": chat(f"Q{len(content)}?"), "images": [image]})
            shown.append({number})
        for name in names:
            picture.save(name)
    features = datasets.Features({"messages": MESSAGES, "images": datasets.List(datasets.Image())})
    dataset = datasets.Dataset.from_list(content, features).add_column("number", list(range(37)))
    open_image, drawn = shipped[1].image_processor.fetch_images, {}
    for seed in (*range(5), 0):
        *halves, counts = split_by_image(dataset, 0.25, seed, open_image)
        sides = [list(half["number"]) for half in halves]
        assert sorted(sides[0] + sides[1]) == list(range(37)) and 8 <= len(sides[1]) <= 10
        on_sides = [set().union(*(shown[number] for number in side)) for side in sides]
        assert not on_sides[0] & on_sides[1] and counts == [len(side) for side in on_sides]
        assert drawn.setdefault(seed, tuple(sides[1])) == tuple(sides[1])
    assert len({*drawn.values()}) > 1
    texts = datasets.Dataset.from_list([{"messages": chat(f"Q{number // 2}?"), "images": []} for number in range(8)])
    train, held_out, _ = split_by_image(texts, 0.5, 0, open_image)
    assert len(train) == len(held_out) == 4 and not any(each in train["messages"] for each in held_out["messages"])
    with pytest.raises(ValueError, match=r"--eval_split is 0.5, but all rows show the same images"):
        split_by_image(dataset.select([1, 2, 3]), 0.5, 0, open_image)


def test_a_run_holds_rows_out_and_says_so(tmp_path):
    file = llava_med_file(tmp_path, 10)
    options = {"eval_split": 0.3, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "seed": 5}
    out = train(tmp_path, train_data=file, image_folder=tmp_path / "images", **options)
    source, trained, evaluated = json.loads((out / "data_report.json").read_text())
    assert (source["use"], source["rows"], trained["kept"], evaluated["kept"]) == ("train_data", 10, 7, 3)
    assert evaluated["held_out"] == {"share": 0.3, "seed": 5, "images": 3, "images_to_train_on": 7}
    card = (out / "README.md").read_text()
    assert "| local data | 10 | 0 |" in card
    assert "3 were held out and used for evaluation only: all rows about 3 of 10 pictures, drawn with seed 5" in card


PHANTOMS = "phantoms:5001:32:new,closed,open,description"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ([PHANTOMS], "steps", 3)),
        (["--train_data", "mine.json"], ([], "no", 0)),
        (["--train_data=mine.json", "--eval_data", "held.json"], (["held.json"], "steps", 3)),
        (["--train-data", "mine.json", "--eval_split", "0.1"], ([], "steps", 3)),
    ],
)
def test_a_recipe_evaluates_on_its_own_data_only_with_its_own_training_data(caplog, words, expected):
    recipe = str(sft.files("lladamedv.trainers") / "recipes" / "demo_lora.yaml")
    script, training, _ = sft.make_parser().parse_args_and_config(["--config", recipe, "--use_cpu", *words])
    found = [str(source) for source in script.eval_data], str(training.eval_strategy.value), training.log_answers
    assert found == expected and ("so nothing is evaluated" in caplog.text) == (found[1] == "no")


# What a run says about a stream, a terminal, a disk


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_of_a_stream_are_counted_once_or_not_at_all(tmp_path, workers):
    file = llava_med_file(tmp_path, 8, missing=(2,))
    options = {"streaming": True, "train_data": file, "image_folder": tmp_path / "images", "max_steps": 4}
    out = train(tmp_path, dataloader_num_workers=workers, shuffle_buffer=2, per_device_train_batch_size=2, **options)
    source, checked = json.loads((out / "data_report.json").read_text())
    counts = (source["rows"], source["missing_images"], checked["kept"])
    assert counts == ((None, None, None) if workers else (7, [["pair 2", "2.png"]], 7))
    said = "streamed, not counted | not counted" if workers else "7 read | 1"
    assert f"| local data | {said} |" in (out / "README.md").read_text()


PACKED = {"train_data": "phantoms:1:8:closed,open:2", "pack_questions": 2, "eval_data": "phantoms:2:4:closed,open:2"}


@pytest.mark.parametrize("more", [{"eval_data": "phantoms:2:2"}, PACKED], ids=["alone", "packed"])
def test_answers_are_printed_in_full(tmp_path, capsys, more):
    """Also with a progress bar, whose line shows no long texts, and of packed rows, which show their image once."""
    train(tmp_path, disable_tqdm=False, eval_strategy="steps", eval_steps=1, log_answers=2, max_steps=1, **more)
    printed = capsys.readouterr()
    assert "| step | id | question | reference | answer | confidence |" in printed.out.splitlines()
    assert "String too long" not in printed.out + printed.err and "'answers'" not in printed.out
    assert printed.out.count(" + phantoms/2/") == 2 * (more is PACKED)


def test_a_disk_without_room_for_the_weights(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"where 1.0 MB are free; the weights to save have 5.9 MB"):
        sft.build_trainer(*arguments(output_dir=tmp_path / "new" / "folder"))
    sft.build_trainer(*arguments(output_dir=tmp_path / "new" / "folder", use_peft=True))


def test_a_disk_that_fills_up_ends_a_run_in_one_line(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))  # as on a full disk, writing fails half-way
    try:
        with pytest.raises(SystemExit, match=r"^lladamedv: training stopped: .*File too large"):
            train(tmp_path, max_steps=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
