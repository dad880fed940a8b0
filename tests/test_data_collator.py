"""Batches for training: labels and turns as recorded from the authors' code, packing, images once, and bad rows."""

import json

import pytest
import torch

from lladamedv.processing.processing_lladamedv import CHAT_TEMPLATES
from lladamedv.trainers.data_collator import DataCollatorForMaskedDiffusion
from tests.parity.fixtures import FIXTURES
from tests.tiny import random_image, tiny_processor


# The authors train on white space around a text, which the released template (and ours) trims, and on "<image>" as a
# word where there is no image, which we refuse.
NOT_OURS = ("single_text", "image_literal_without_image")
CASES = [
    case for case in json.loads((FIXTURES / "labels.json").read_text())["cases"] if case["id"] not in NOT_OURS
]
ROLES = {"human": "user", "gpt": "assistant"}


def chat(question, answer, **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def collapse(values, ids, image_token):
    """With a single value for each run of image tokens."""
    return [value for place, value in enumerate(values) if ids[place] != image_token or ids[place - 1] != image_token]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['id']}-{case['template']}")
def test_labels_and_turns_of_the_authors(processor, case):
    conversations = case["conversations"]
    if conversations[0]["from"] == "gpt":
        conversations = conversations[1:]  # the authors drop a leading answer, too
    messages = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in conversations]
    collator = DataCollatorForMaskedDiffusion(
        processor=processor, train_on_template_tokens=True, turn_mask=True,
        chat_template=CHAT_TEMPLATES[case["template"]],
    )  # fmt: skip
    batch = collator([{"messages": messages, "images": [random_image()] if case["has_image"] else []}])
    ids, image_token = batch["input_ids"][0].tolist(), processor.image_token_id
    recorded = [image_token if token == -200 else token for token in case["input_ids"]]
    assert collapse(ids, ids, image_token) == recorded
    assert collapse(batch["labels"][0].tolist(), ids, image_token) == case["labels"]
    if case.get("conversation_ids"):
        assert collapse(batch["turn_ids"][0].tolist(), ids, image_token) == case["conversation_ids"]


def test_answers_and_their_ends_are_learned(processor):
    tokenizer = processor.tokenizer
    row = {"messages": [], "images": [random_image()]}
    for question, answer in (("Is it small?", "Yes."), ("Where?", "On the left.")):
        row["messages"] += chat(question, answer)["messages"]
    collator = DataCollatorForMaskedDiffusion(processor=processor, eos_padding=3)
    batch = collator([row, chat("What?", "A lung.", images=[], id=7)])
    for learned, answers in zip(batch["labels"], (["Yes.", "On the left."], ["A lung."])):
        text = "".join(f"{answer}<|eot_id|>" for answer in answers) + "<|endoftext|>" * 3
        assert tokenizer.decode(learned[learned >= 0]) == text
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["input_ids"][batch["labels"] >= 0] == batch["labels"][batch["labels"] >= 0]).all()
    assert batch["row_ids"] == ["Is it small?", "7"]
    assert batch["answer_ids"][0].unique().tolist() == [0] and 1 in batch["answer_ids"][1]


@pytest.mark.parametrize("packed", [False, True])
def test_answers_are_filled_up_to_a_canvas(processor, packed):
    tokenizer, image = processor.tokenizer, random_image()
    texts = ["Yes.", "There are two small round lesions on the left of it."]
    rows = [chat("What do you see?", text, images=[image]) for text in texts]
    if packed:
        rows = [{"messages": rows[0]["messages"] + rows[1]["messages"], "images": [image]}]
    collator = DataCollatorForMaskedDiffusion(
        processor=processor, eos_padding=1, eos_padding_to_multiple_of=8, packed=packed
    )
    batch = collator(rows)
    for number, text in enumerate(texts):
        learned = batch["labels"][(batch["answer_ids"] == number) & (batch["labels"] >= 0)]
        length = len(tokenizer(f"{text}<|eot_id|>", add_special_tokens=False).input_ids)
        ends = -(length + 1) % 8 + 1  # at least one, and a whole number of canvases
        assert tokenizer.decode(learned) == f"{text}<|eot_id|>" + "<|endoftext|>" * ends
        assert collator.row_length(rows[-1]) == batch["attention_mask"][-1].sum()


def test_stage_1_learns_the_caption(processor):
    collator = DataCollatorForMaskedDiffusion(processor=processor, chat_template=CHAT_TEMPLATES["llada_plain"])
    batch = collator([chat("Describe it.", "A chest X-ray.", images=[random_image()])])
    assert processor.tokenizer.decode(batch["labels"][batch["labels"] >= 0]) == "A chest X-ray.\n"
    assert (batch["input_ids"] == processor.image_token_id).sum() == 16
    assert "Describe" not in processor.tokenizer.decode(batch["input_ids"][0])


@pytest.mark.parametrize("aspect_ratio", ["square", "anyres_max_4"])
def test_images_are_processed_once(aspect_ratio):
    processor = tiny_processor(aspect_ratio)
    first, second = random_image(40, 30), random_image(64, 20, seed=1)
    rows = [chat("a", "b", images=[image]) for image in (first, second, first.copy())]
    rows.append(chat("<image> and <image>", "b", images=[second, second]))
    rows.append(chat("none", "b", images=[]))
    batch = DataCollatorForMaskedDiffusion(processor=processor)(rows)
    beside = 1 if aspect_ratio == "square" else 2  # under anyres an image beside others is cut in another way
    assert batch["image_index"].tolist() == [0, 1, 0, beside, beside]
    assert batch["batch_num_images"].tolist() == [1, 1, 1, 2, 0]
    assert len(batch["pixel_values"]) == beside + 1
    expected = processor(text=["<image>"], images=[second], return_tensors="pt")
    tiles = expected["pixel_values"].shape[1]
    torch.testing.assert_close(batch["pixel_values"][1, :tiles], expected["pixel_values"][0])
    counts = (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist()
    assert counts[1] == (expected["input_ids"] == processor.image_token_id).sum()
    assert counts[0] == counts[2] and counts[4] == 0


def test_packed_rows(processor):
    """What the questions share once, each question at the positions it would have alone, and the segments."""
    image, questions = random_image(), [("Is it small?", "Yes."), ("Where is it?", "On the left."), ("What?", "Lung.")]
    alone = [
        DataCollatorForMaskedDiffusion(processor=processor)([chat(*pair, images=[image])]) for pair in questions
    ]
    messages = [message for pair in questions for message in chat(*pair)["messages"]]
    collator = DataCollatorForMaskedDiffusion(processor=processor, packed=True)
    batch = collator([{"messages": messages, "images": [image]}, chat("Alone?", "Yes.", images=[image])])
    segments, answers = batch["segment_ids"][0], batch["answer_ids"][0]
    shared = int((segments == 0)[batch["attention_mask"][0] == 1].sum())
    assert batch["input_ids"][0, shared - 1] == processor.image_token_id
    assert batch["answer_ids"][1].max() == 3
    for number, own in enumerate(alone):
        mine = segments == number + 1
        for name in ("input_ids", "labels"):
            assert batch[name][0][mine].tolist() == own[name][0, shared:].tolist()
            prefix = batch[name][0, :shared].tolist()
            assert prefix == own[name][0, :shared].tolist()
        assert batch["position_ids"][0][mine].tolist() == list(range(shared, own["input_ids"].shape[1]))
        assert set(answers[mine].tolist()) == {number}
    assert len(batch["pixel_values"]) == 1 and batch["image_index"].tolist() == [0, 0]


@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 mean nothing
def test_length_is_that_of_the_batch(orientation, tmp_path):
    image = random_image(30, 50)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", exif=exif)
    collator = DataCollatorForMaskedDiffusion(processor=tiny_processor("anyres_max_4"), eos_padding=2)
    row = chat("What is <image> this?", "A lung.", images=[str(tmp_path / "a.jpg")])
    batch = collator([row])
    assert batch["image_sizes"].tolist() == [[30, 50] if 5 <= orientation <= 8 else [50, 30]]
    for stored in (row["images"][0], {"path": row["images"][0]}, {"bytes": (tmp_path / "a.jpg").read_bytes()}):
        assert collator.row_length(row | {"images": [stored]}) == batch["input_ids"].shape[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 50}, "Row 'x1' has \\d+ tokens; `max_length` allows"),
        ({"eos_padding_token": "<nothing>"}, "`eos_padding_token` is '<nothing>'"),
        ({"chat_template": "{{ messages }}"}, "marks no answers"),
    ],
)
def test_what_is_refused(processor, options, message):
    """Bad rows: tests/test_masked_diffusion_sft_trainer.py."""
    with pytest.raises(ValueError, match=message):
        DataCollatorForMaskedDiffusion(processor=processor, **options)([chat("a", "b " * 60, images=[], id="x1")])
