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


def make_trainer(shipped, folder, dataset, **options):
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "disable_tqdm": True, **options}
    args = MaskedDiffusionSFTConfig(
        str(folder), report_to=[], bf16=False, use_cpu=True, save_strategy="no", activation_checkpointing=False,
        **options,
    )  # fmt: skip
    return MaskedDiffusionSFTTrainer(model=shipped[0], args=args, train_dataset=dataset, processing_class=shipped[1])


def file(picture=None, form="PNG", part=1.0, **options):
    """The bytes of a picture file, or the first part of them."""
    stored = io.BytesIO()
    (random_image(64, 64) if picture is None else picture).save(stored, form, **options)
    return stored.getvalue()[: int(len(stored.getvalue()) * part)]


def chat(question="Is there a lesion?", answer="Yes"):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def row(images=None, messages=None, **others):
    images = [{"bytes": file(), "path": None}] if images is None else images
    return {"messages": chat() if messages is None else messages, "images": images, **others}


def of_bytes(*contents):
    return [{"bytes": content, "path": None} for content in contents]


GOOD = row()
BROKEN_IMAGES = {
    "a JPEG cut short": of_bytes(file(form="JPEG", part=0.6)),
    "a PNG cut short": of_bytes(file(part=0.6)),
    "a TIFF cut short": of_bytes(file(form="TIFF", part=0.6)),
    "a WebP cut short": of_bytes(file(form="WEBP", part=0.6)),
    "the second of two": of_bytes(file(), file(part=0.5)),
    "no picture": of_bytes(b"no picture"),
    "nothing": [{"bytes": None, "path": None}],
    "no bytes": of_bytes(b""),
    "a file that is not there": [{"bytes": None, "path": "gone.png"}],
    "a URL": [{"bytes": None, "path": "https://example.org/a.png"}],
}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_broken_images_are_named_and_left_out(shipped, tmp_path, streaming):
    content = [each for images in BROKEN_IMAGES.values() for each in (GOOD, row(images, id=f"scan {len(images)}"))]
    dataset = datasets.Dataset.from_list([{"id": None, **each} for each in content])
    for number in range(1, len(content), 2):
        alone = dataset.select([0, number])
        with pytest.raises(ValueError, match=r"row 1 \(scan \d\) has a problem: an image (cannot|is).*invalid_rows='s"):
            if streaming:
                list(make_trainer(shipped, tmp_path, alone.to_iterable_dataset()).train_dataset)
            else:
                make_trainer(shipped, tmp_path, alone)
    if streaming:
        dataset = dataset.to_iterable_dataset()
    trainer = make_trainer(shipped, tmp_path, dataset, invalid_rows="skip", max_steps=len(content) // 4)
    trainer.train()
    report = trainer.row_reports["train_dataset"]
    assert report.kept == sum(report.left_out.values()) == len(BROKEN_IMAGES)
    assert report.left_out == {"an image cannot be read": 7, "an image is missing": 2, "an image is a URL": 1}
    assert "row 1 (scan 1), row 3 (scan 1)" in report.summary()


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


def test_odd_rows_are_named_and_left_out(shipped, tmp_path):
    """A stream of anything at all: as many rows are left out as are odd, each by its number, and none stops the run."""
    odd = [row(messages=messages) | {"messages": messages} for messages in ODD_MESSAGES]
    odd += [row(images) for images in ODD_IMAGES] + [row(image=GOOD["images"][0]), row(tools=["look"])]
    odd.append(row(chat_template_kwargs={"thinking": True}))
    content = [each for pair in zip(odd, [GOOD] * len(odd)) for each in pair]
    stream = datasets.IterableDataset.from_generator(lambda: iter(content))
    trainer = make_trainer(shipped, tmp_path, stream, invalid_rows="skip")
    assert len(list(trainer.train_dataset)) == len(odd)
    report = trainer.row_reports["train_dataset"]
    names = [name for names in report.rows.values() for name in names]
    assert sorted(names) == sorted(f"row {number}" for number in range(0, len(content), 2))
    assert report.kept == len(odd), "the trainer's look at the first row is no row of its own"


def test_a_stream_without_a_good_row(shipped, tmp_path):
    for content in ([], [row([5])] * 3):
        with pytest.raises(ValueError, match=r"`train_dataset` is (a stream of which no row|empty)"):
            make_trainer(shipped, tmp_path, datasets.IterableDataset.from_generator(lambda c=content: iter(c)),
                         invalid_rows="skip")  # fmt: skip


Message = pydantic.create_model("Message", role=str, content=str)
PlainMessage = dataclasses.make_dataclass("PlainMessage", ["role", "content"])


def test_rows_that_are_as_good(shipped, tmp_path):
    """The same picture and words in every other form make the same batch."""
    picture, channels_first = np.asarray(random_image(64, 64)), np.asarray(random_image(64, 64)).transpose(2, 0, 1)
    random_image(64, 64).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    images = [
        path, Path(path), [path], file(), {"bytes": file(), "path": None}, {"bytes": None, "path": path}, picture,
        [picture], picture[None], picture.tolist(), [picture.tolist()], torch.tensor(picture), random_image(64, 64),
        [channels_first],
    ]  # fmt: skip
    content = [
        {"messages": chat(), "image" if np.ndim(image) == 3 or number == 9 else "images": image}
        for number, image in enumerate(images)
    ]
    for kind in (Message, PlainMessage):
        content.append(row([path], [kind(**message) for message in chat()]))
    content.append(row([path], [dict(message, content=[{"type": "text", "text": message["content"]}])
                                for message in chat()]))  # fmt: skip
    content.append(row([path], chat("Is there a lesion?\n<image>")))
    stream = datasets.IterableDataset.from_generator(lambda: iter(content))
    trainer = make_trainer(shipped, tmp_path, stream)
    wanted = trainer.data_collator([row([random_image(64, 64)])])
    rows = list(trainer.train_dataset)
    assert len(rows) == len(content)
    for number, each in enumerate(rows):
        batch = trainer.data_collator([each])
        for name in ("input_ids", "labels", "pixel_values"):
            assert torch.equal(batch[name], wanted[name]), (number, name)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("form", ["numpy", "torch", "array", "list of arrays"])
def test_formats_and_arrays(shipped, tmp_path, form, streaming):
    picture = np.asarray(random_image(64, 64))
    if form == "array":
        features = datasets.Features({"messages": MESSAGES, "image": datasets.Array3D((64, 64, 3), "uint8")})
        dataset = datasets.Dataset.from_list([{"messages": chat(), "image": picture}] * 4, features)
    elif form == "list of arrays":
        dataset = datasets.Dataset.from_list([row([picture])] * 4)
    else:
        dataset = datasets.Dataset.from_list([row([random_image(64, 64)])] * 4).with_format(form)
    if streaming:
        dataset = dataset.to_iterable_dataset()
        dataset = dataset.with_format(form) if form in ("numpy", "torch") else dataset
    trainer = make_trainer(shipped, tmp_path, dataset)
    batch = trainer.data_collator([next(iter(trainer.train_dataset))])
    wanted = shipped[1].image_processor(random_image(64, 64), return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], wanted)


def test_placeholders_of_others_are_text(shipped, tmp_path):
    """`<image>` in an answer or a system text shows no image."""
    messages = [{"role": "system", "content": "Say <image>."}, *chat(answer="It is <image> here")]
    dataset = datasets.Dataset.from_list([row(messages=messages)] * 2)
    trainer = make_trainer(shipped, tmp_path, dataset)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    image_token = shipped[1].image_token_id
    assert (batch["input_ids"] == image_token).sum() == 64 and not (batch["labels"] == image_token).any()
    learned = batch["labels"][batch["labels"] >= 0]
    assert "<image>" in shipped[1].tokenizer.decode(learned).replace(" ", "")


@pytest.mark.parametrize(
    ("content", "texts", "shown"),
    [
        ("Look at\n<image>\nWhat?", ["Look at\n\nWhat?"], 1),  # LLaVA: text.replace("<image>", "").strip()
        ("<image> or <image>?", ["or ?"], 2),
        ([{"type": "text", "text": "A"}, {"type": "image"}, {"type": "text", "text": "B"}], ["A\nB"], 1),
    ],
)
def test_images_of_a_turn(content, texts, shown):
    """Which come first, once the processor has put them there: tests/test_one_door.py. More forms of a question:
    tests/test_llava_med_records.py."""
    question, answer = normalize_messages(chat(content), shown)
    parts = [{"type": "image", "text": None}] * shown + [{"type": "text", "text": text} for text in texts]
    assert sorted(question["content"], key=lambda part: part["type"]) == parts
    assert answer == {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}


# A part of the rows to evaluate on


def test_no_picture_is_on_both_sides(shipped, tmp_path):
    """… under whatever name and in whatever file; and rows that show two pictures keep both on one side."""
    pictures = [random_image(32, 32, seed=number) for number in range(12)]
    content, shown = [], []
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
        picture.save(tmp_path / f"copy of {number}.bmp")
        for images in ([str(tmp_path / f"{number}.png")], [str(tmp_path / f"copy of {number}.bmp")], [picture]):
            content.append({"messages": chat(f"Q{len(content)}?"), "images": images})
            shown.append({number})
    content.append({"messages": chat(), "images": [pictures[0], pictures[1]]})
    shown.append({0, 1})
    dataset = datasets.Dataset.from_list(content, datasets.Features({"messages": MESSAGES,
                                         "images": datasets.List(datasets.Image())}))  # fmt: skip
    open_image = shipped[1].image_processor.fetch_images
    numbered = dataset.add_column("number", list(range(len(dataset))))
    sides = set()
    for seed in range(5):
        *halves, counts = split_by_image(numbered, 0.25, seed, open_image)
        numbers = [list(half["number"]) for half in halves]
        assert sorted(numbers[0] + numbers[1]) == list(range(37))
        train_pictures, eval_pictures = (set().union(*(shown[number] for number in side)) for side in numbers)
        assert not train_pictures & eval_pictures
        assert counts == [len(train_pictures), len(eval_pictures)] and 8 <= len(numbers[1]) <= 10
        assert split_by_image(numbered, 0.25, seed, open_image)[1]["number"] == numbers[1]
        sides.add(tuple(numbers[1]))
    assert len(sides) > 1
    texts = datasets.Dataset.from_list([{"messages": chat(f"Q{number // 2}?"), "images": []} for number in range(8)])
    halves = [list(half["messages"]) for half in split_by_image(texts, 0.5, 0, open_image)[:2]]
    assert [len(half) for half in halves] == [4, 4] and not any(each in halves[0] for each in halves[1])
    with pytest.raises(ValueError, match=r"`eval_split` is 0.5, but all rows show the same images"):
        split_by_image(dataset.select([0, 1, 2]), 0.5, 0, open_image)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_split": 0.1}, "`eval_split` is given, but `eval_strategy` is 'no'"),
        ({"eval_data": "phantoms:2:3"}, "`eval_data` is given, but `eval_strategy` is 'no'"),
        ({"eval_split": 1.5}, "`eval_split` is 1.5; allowed are numbers between 0 and 1"),
        ({"eval_split": 0.1, "streaming": True}, "`eval_split` is 0.1 and `streaming` is True"),
        ({"eval_split": 0.1, "eval_data": "phantoms:2:3", "eval_strategy": "epoch"}, "`eval_data` is given, too"),
    ],
)
def test_evaluations_that_contradict(tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        train(tmp_path, **options)


def parsed(tmp_path, *words):
    config = ["--config", str(sft.files("lladamedv.trainers") / "recipes" / "demo_lora.yaml")]
    script, training, _ = sft.make_parser().parse_args_and_config([*config, "--use_cpu", *words])
    return [str(source) for source in script.eval_data], str(training.eval_strategy.value), training.log_answers


def test_a_recipe_evaluates_on_its_own_data_only_with_its_own_training_data(tmp_path, caplog):
    phantoms = "phantoms:5001:32:new,closed,open,description"
    assert parsed(tmp_path) == ([phantoms], "steps", 3) and not caplog.records
    assert parsed(tmp_path, "--train_data", "mine.json") == ([], "no", 0)
    assert "belongs to its own `train_data`, so nothing is evaluated" in caplog.text
    assert parsed(tmp_path, "--train_data=mine.json", "--eval_data", "held.json") == (["held.json"], "steps", 3)
    assert parsed(tmp_path, "--train-data", "mine.json", "--eval_split", "0.1") == ([], "steps", 3)
    with pytest.raises(ValueError, match="`eval_data` is empty, but `eval_strategy` is 'epoch'"):
        parsed(tmp_path, "--train_data", "mine.json", "--eval_strategy", "epoch")


# What a run says about a stream, a terminal, a disk


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_of_a_stream_are_counted_once_or_not_at_all(tmp_path, workers):
    file = llava_med_file(tmp_path, 8, missing=(2,))
    options = {"streaming": True, "train_data": file, "image_folder": tmp_path / "images", "max_steps": 4}
    out = train(tmp_path, dataloader_num_workers=workers, shuffle_buffer=2, per_device_train_batch_size=2, **options)
    source, checked = json.loads((out / "data_report.json").read_text())
    card = (out / "README.md").read_text()
    if workers:
        assert source["rows"] is source["missing_images"] is checked["kept"] is None
        assert "| local data | streamed, not counted | not counted |" in card
    else:
        assert (source["rows"], source["missing_images"], checked["kept"]) == (7, [["pair 2", "2.png"]], 7)
        assert "| local data | 7 read | 1 |" in card


PACKED = {"train_data": "phantoms:1:8:closed,open:2", "pack_questions": 2, "eval_data": "phantoms:2:4:closed,open:2"}


@pytest.mark.parametrize("more", [{"eval_data": "phantoms:2:2"}, PACKED], ids=["alone", "packed"])
def test_answers_are_printed_in_full(tmp_path, capsys, more):
    """Also with a progress bar, whose line shows no long texts, and of packed rows, which show their image once."""
    train(tmp_path, disable_tqdm=False, eval_strategy="steps", eval_steps=1, log_answers=2, max_steps=1, **more)
    printed = capsys.readouterr()
    assert "| step | id | question | reference | answer | confidence |" in printed.out.splitlines()
    assert "String too long" not in printed.out + printed.err and "'answers'" not in printed.out
    assert printed.out.count(" + phantoms/2/") == 2 * (more is PACKED)


def test_a_logger_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "get_available_reporting_integrations", list)
    with pytest.raises(SystemExit, match=r"lladamedv: `report_to` holds 'tensorboard', .*pip install tensorboard"):
        train(tmp_path, report_to="tensorboard", model_name_or_path="none/at-all")


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
