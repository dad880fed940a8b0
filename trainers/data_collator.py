"""Rows of messages and images into a batch for the masked-diffusion loss: tokens, labels, turns and segments."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from lladamedv.processing.datasets import InvalidRecordError
from lladamedv.processing.datasets.messages import (
    candidate_rows,
    check_row,
    images_of,
    preference_rows,
    prompt_row,
    show_images,
)
from lladamedv.processing.processing_lladamedv import get_training_chat_template

from .masked_diffusion_loss import IGNORE_INDEX


# What the chosen answer is compared with: a small part of its own images, as in mDPO (arXiv 2406.11839), their median
# colour, as `image_guidance_scale` contrasts with, or the images of another row of the batch.
CONDITIONAL_IMAGES = ("crop", "blank", "shuffled")


@dataclass
class DataCollatorForMaskedDiffusion(DataCollatorForVisionLanguageModeling):
    """Data collator of the [`MaskedDiffusionSFTTrainer`].

    An image that several rows of the batch show is processed once; `image_index` says where it stands.

    Args:
        eos_padding, eos_padding_to_multiple_of, eos_padding_token, train_on_template_tokens, turn_mask: see
            [`MaskedDiffusionSFTConfig`].
        packed (`bool`): whether each (user, assistant) pair of a row is a question of its own about the row's image.
        max_length (`int`): longest row.
        chat_template (`str`, *optional*): by default the processor's own.
        The other arguments are those of TRL's collator.

    Returns (when called): a dict with
        - `input_ids`, `attention_mask`, `labels` (`(batch, sequence)`), padded on the right; labels are -100 where
          nothing is to be learned,
        - `answer_ids` (`(batch, sequence)`): number of the answer that a token belongs to, within the batch,
        - with images `pixel_values`, `image_sizes`, `batch_num_images`, `image_index`, as the model takes them,
        - `turn_ids` with `turn_mask`; `segment_ids` and `position_ids` if packed,
        - `row_ids` (`list[str]`): `id` of each row, or how it begins; `row_numbers`, if a trainer has added them.

    Raises (when called):
        ValueError: for a row longer than `max_length`, or whose images and placeholders differ in number.
    """

    eos_padding: int = 0
    eos_padding_to_multiple_of: int | None = None
    eos_padding_token: str | None = None
    train_on_template_tokens: bool = False
    turn_mask: bool = False
    packed: bool = False
    _only_the_last_answer = False  # is learned; earlier turns are the prompt

    def __post_init__(self):
        tokenizer = self.processor.tokenizer
        template = self.chat_template or self.processor.chat_template
        if isinstance(template, dict):
            template = template["default"]
        self.chat_template = get_training_chat_template(template)
        token_id = tokenizer.convert_tokens_to_ids
        end = self.eos_padding_token or tokenizer.pad_token
        if end not in tokenizer.get_vocab():
            raise ValueError(f"`eos_padding_token` is {end!r}; allowed are tokens of the tokenizer's vocabulary.")
        self._end = token_id(end)
        special = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        self._template_ids = {tokenizer.bos_token_id, *(token_id(token) for token in special)}
        self._header = {
            role: tokenizer(f"<|start_header_id|>{role}<|end_header_id|>\n\n", add_special_tokens=False).input_ids
            for role in ("user", "assistant")
        }

    def torch_call(self, examples: list[dict]) -> dict:
        fetch = self.processor.image_processor.fetch_images
        read = [self.conversations(row, fetch(images_of(row))) for row in examples]
        # The first conversation of every row, and then, where rows are read as several, the second of every row.
        read = [each for conversations in zip_longest(*read) for each in conversations if each is not None]
        rows, images = [self._encode_row(row, own) for row, own in read], [own for _, own in read]
        for row in rows:
            length = len(row["input_ids"])
            if self.max_length is not None and length > self.max_length:
                raise ValueError(
                    f"Row {row['id']!r} has {length} tokens; `max_length` allows {self.max_length}. Rows are never "
                    "cut; leave long ones out with long_rows='drop'."
                )
        names = ("input_ids", "attention_mask", "labels", "answer_ids")
        names += ("turn_ids",) * self.turn_mask + ("segment_ids", "position_ids") * self.packed
        first_answer = 0
        for row in rows:
            row["answer_ids"] = [first_answer + number for number in row["answer_ids"]]
            first_answer = max(row["answer_ids"]) + 1
        fill = {"input_ids": self.processor.tokenizer.pad_token_id, "labels": IGNORE_INDEX}
        batch = {
            name: pad_sequence([torch.tensor(row[name]) for row in rows], True, fill.get(name, 0)) for name in names
        }
        if self.pad_to_multiple_of:
            width = batch["input_ids"].shape[1]
            missing = -width % self.pad_to_multiple_of
            for name in names:
                batch[name] = torch.nn.functional.pad(batch[name], (0, missing), value=fill.get(name, 0))
        if any(images):
            batch |= self._process_images(images)
        batch["row_ids"] = [row["id"] for row in rows[: len(examples)]]
        if "row_number" in examples[0]:
            batch["row_numbers"] = [row["row_number"] for row in examples]
        return batch

    def _opened(self, rows: list[dict]) -> list[dict]:
        """Rows with their images opened."""
        fetch = self.processor.image_processor.fetch_images
        return [{**row, "image": None, "images": fetch(images_of(row))} for row in rows]

    def conversations(self, row: dict, images: list) -> list[tuple[dict, list]]:
        """What a row is read as: conversations, each with its images. Here it is one, the row itself."""
        return [(row, images)]

    def _encode_row(self, row: dict, images: list[Image.Image]) -> dict:
        """Token ids of a row and what goes with them, as lists."""
        row = {**row, "image": None, "images": images}
        encoded = self._encode_packed(row) if self.packed else self._encode_single(row)
        encoded["attention_mask"] = [1] * len(encoded["input_ids"])
        return encoded

    def row_length(self, row: dict) -> int:
        """Number of tokens of a row.

        Raises:
            ValueError, TypeError, ImportError: for images that cannot be read, or whose number is not that of their
                places in the messages.
        """
        images = self.processor.image_processor.fetch_images(images_of(row))
        return max(len(self._encode_row(*each)["input_ids"]) for each in self.conversations(row, images))

    def _encode_single(self, row: dict) -> dict:
        encoded = self._encode_conversation(row)
        padding = self._end_tokens(encoded["labels"])
        encoded["input_ids"] += padding
        encoded["labels"] += padding
        encoded["turn_ids"] += encoded["turn_ids"][-1:] * len(padding)
        encoded["answer_ids"] = [0] * len(encoded["input_ids"])
        return encoded

    def _encode_conversation(self, row: dict) -> dict:
        """A conversation as lists of equal length, ids, labels, turns, and the `id` of its row, or how it begins."""
        row = check_row(row)
        output = self.processor.apply_chat_template(
            show_images(row["messages"], row["images"]), chat_template=self.chat_template, tokenize=True,
            return_dict=True, return_assistant_tokens_mask=True, processor_kwargs={"return_pixel_values": False},
        )  # fmt: skip
        ids, answers = output["input_ids"][0], [bool(value) for value in output["assistant_masks"][0]]
        turns = self._turns(ids)
        if self.train_on_template_tokens:
            answers = self._with_template_tokens(ids, answers)
        labels = [token if answer else IGNORE_INDEX for token, answer in zip(ids, answers)]
        if self._only_the_last_answer:
            begin = len(labels) - _last_answer(labels)
            labels[:begin] = [IGNORE_INDEX] * begin
        begins = next((part["text"] for part in row["messages"][0]["content"] if part["type"] == "text"), "")
        name = str(begins if row["id"] is None else row["id"])
        return {"input_ids": ids, "labels": labels, "turn_ids": turns, "id": name}

    def _encode_packed(self, row: dict) -> dict:
        """Questions about one image: what all share once, and then each question with its answer."""
        conversations, start = [], 0
        for number, message in enumerate(row["messages"]):
            if message["role"] == "assistant":
                conversations.append(row["messages"][start : number + 1])
                start = number + 1
        encoded = [self._encode_conversation({**row, "messages": each}) for each in conversations]
        ids = encoded[0]["input_ids"]
        shared = len(ids) - ids[::-1].index(self.processor.image_token_id)  # up to the end of the image
        packed = {"input_ids": ids[:shared], "labels": [IGNORE_INDEX] * shared, "position_ids": list(range(shared))}
        packed |= {"segment_ids": [0] * shared, "answer_ids": [0] * shared, "id": encoded[0]["id"]}
        for number, each in enumerate(encoded):
            if each["input_ids"][:shared] != packed["input_ids"][:shared]:
                raise ValueError("Packed questions must begin with the same text and the same image.")
            padding = self._end_tokens(each["labels"])
            own = each["input_ids"][shared:] + padding
            packed["input_ids"] += own
            packed["labels"] += each["labels"][shared:] + padding
            packed["position_ids"] += range(shared, shared + len(own))
            packed["segment_ids"] += [number + 1] * len(own)
            packed["answer_ids"] += [number] * len(own)
        return packed

    def _end_tokens(self, labels: list[int]) -> list[int]:
        """The end tokens that follow the last answer and are learned with it."""
        count = self.eos_padding
        if self.eos_padding_to_multiple_of is not None:
            count += -(_last_answer(labels) + count) % self.eos_padding_to_multiple_of
        return [self._end] * count

    def _turns(self, ids: list[int]) -> list[int]:
        """Turn of each token; the system text and the first question with its answer are turn 0."""
        header, turn, turns = self._header["user"], -1, []
        for place in range(len(ids)):
            turn += ids[place : place + len(header)] == header
            turns.append(max(turn, 0))
        return turns

    def _with_template_tokens(self, ids: list[int], answers: list[bool]) -> list[bool]:
        """`answers`, the template's special tokens everywhere, and the headers of the answers, which the code that
        LLaDA-MedV was trained with learns, too."""
        header, learned = self._header["assistant"], list(answers)
        for place, token in enumerate(ids):
            learned[place] |= token in self._template_ids
            if ids[place : place + len(header)] == header:
                learned[place : place + len(header)] = [True] * len(header)
        return learned

    def _process_images(self, images: list[list]) -> dict:
        """Each image once, and where it stands."""
        processor, unique, index = self.processor.image_processor, {}, []
        for row in images:
            # Under anyres an image beside others is one tile, so its pixels differ.
            alone = len(row) == 1 or not processor.vision_aspect_ratio.startswith("anyres")
            for image in row:
                key = (hashlib.sha256(image.tobytes()).digest(), image.size, alone)
                if key not in unique:
                    output = processor([[image] if alone else [image, image]], return_tensors="pt")
                    unique[key] = (len(unique), output["pixel_values"][0], output["image_sizes"][0])
                index.append(unique[key][0])
        _, pixels, sizes = zip(*unique.values())
        return {
            "pixel_values": pad_sequence(pixels, batch_first=True),
            "image_sizes": torch.stack(sizes),
            "batch_num_images": torch.tensor([len(row) for row in images]),
            "image_index": torch.tensor(index),
        }


@dataclass
class DataCollatorForMaskedDiffusionPreference(DataCollatorForMaskedDiffusion):
    """Data collator of the [`MaskedDiffusionDPOTrainer`]: of each row the prompt with its chosen and with its rejected
    answer, about the same images, which are processed once.

    Args:
        conditional_image (`str`, *optional*): the images about which the chosen answer comes again, one of
            `CONDITIONAL_IMAGES`.
        shuffled (`bool`): whether the batch comes again with its images exchanged, as `shuffled`.
        The other arguments are those of [`DataCollatorForMaskedDiffusion`].

    Returns (when called): its dict, of the chosen answers, then the rejected ones, then the chosen ones again;
        - `ref_logps` `(draws, rows)`, if the trainer has added them to the rows;
        - `shuffled`: the dict of both answers about the images of another row, and `exchanged` `(rows,)`, which rows
          have such; the others have their own.
    """

    conditional_image: str | None = None
    shuffled: bool = False
    _only_the_last_answer = True

    def torch_call(self, examples: list[dict]) -> dict:
        examples = _with_others(self._opened(examples))
        batch = super().torch_call(examples)
        if self.shuffled:
            others = [{**row, "images": row["other_images"] or row["images"]} for row in examples]
            batch["shuffled"] = replace(self, conditional_image=None, shuffled=False).torch_call(others)
            batch["shuffled"]["exchanged"] = torch.tensor([row["other_images"] is not None for row in examples])
        if "ref_logps" in examples[0]:  # of each row (conversations, draws)
            batch["ref_logps"] = torch.tensor([row["ref_logps"] for row in examples]).permute(2, 1, 0).flatten(1)
        return batch

    def conversations(self, row: dict, images: list) -> list[tuple[dict, list]]:
        chosen, rejected = preference_rows({**row, "image": None, "images": images})
        read = [(chosen, images), (rejected, images)]
        if self.conditional_image is None:
            return read
        if not images:
            raise InvalidRecordError("it has no image", "the loss 'image_conditional' changes the images of every row")
        others = row.get("other_images") if self.conditional_image == "shuffled" else None
        change = _crop if self.conditional_image == "crop" else _of_one_colour
        return [*read, (chosen, others or [*map(change, images)])]


@dataclass
class DataCollatorForMaskedDiffusionPrompts(DataCollatorForMaskedDiffusion):
    """Data collator of the [`MaskedDiffusionGRPOTrainer`]: prompts to be answered.

    Args:
        max_completion_length (`int`): room that a row needs besides its prompt.
        The other arguments are those of [`DataCollatorForMaskedDiffusion`].

    Returns (when called): its dict, without anything to be learned; and `columns`, all columns of the rows by name,
        with their images opened.
    """

    max_completion_length: int = 0

    def torch_call(self, examples: list[dict]) -> dict:
        examples = self._opened(examples)
        return super().torch_call(examples) | {"columns": _columns_of(examples)}

    def conversations(self, row: dict, images: list) -> list[tuple[dict, list]]:
        return [(prompt_row({**row, "image": None, "images": images}), images)]

    def row_length(self, row: dict) -> int:
        return super().row_length(row) + self.max_completion_length

    def _encode_conversation(self, row: dict) -> dict:
        prompt = row["messages"]
        if prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
        ids = self.processor.apply_chat_template(
            show_images(prompt, row["images"]), add_generation_prompt=True, tokenize=True, return_dict=True,
            processor_kwargs={"return_pixel_values": False},
        )["input_ids"][0]  # fmt: skip
        begins = next((part["text"] for part in prompt[0]["content"] if part["type"] == "text"), "")
        nothing = {"labels": [IGNORE_INDEX] * len(ids), "turn_ids": [0] * len(ids)}
        return {"input_ids": ids, **nothing, "id": str(begins if row["id"] is None else row["id"])}


@dataclass
class DataCollatorForMaskedDiffusionCandidates(DataCollatorForMaskedDiffusion):
    """Data collator of the [`MaskedDiffusionExpectedRewardTrainer`]: of each row the prompt with each of its
    `candidates`, about the same images, which are processed once.

    Returns (when called): the dict of [`DataCollatorForMaskedDiffusion`], of the first candidate of every row, then the
        second, and so on;
        - `candidates` (`(conversations, 2)`): of each its row and its place among the row's candidates;
        - `columns`, all columns of the rows by name, with their images opened;
        - `ref_logps` (`(conversations,)`), if the trainer has added them to the rows.
    """

    _only_the_last_answer = True

    def torch_call(self, examples: list[dict]) -> dict:
        examples = self._opened(examples)
        batch = super().torch_call(examples)
        places = [(row, place) for place in range(max(len(each["candidates"]) for each in examples))
                  for row, each in enumerate(examples) if place < len(each["candidates"])]  # fmt: skip
        batch |= {"candidates": torch.tensor(places), "columns": _columns_of(examples)}
        if "ref_logps" in examples[0]:
            batch["ref_logps"] = torch.tensor([examples[row]["ref_logps"][place] for row, place in places])
        return batch

    def conversations(self, row: dict, images: list) -> list[tuple[dict, list]]:
        return [(each, images) for each in candidate_rows({**row, "image": None, "images": images})]


def _columns_of(rows: list[dict]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in rows[0] if name != "image"}


def _last_answer(labels: list[int]) -> int:
    """Number of tokens of the last answer, with which a row ends."""
    return next((place for place, label in enumerate(reversed(labels)) if label == IGNORE_INDEX), len(labels))


def _with_others(rows: list[dict]) -> list[dict]:
    """Rows with `other_images`, those of the next row in the batch that shows as many images and none of the same, or
    `None`."""
    shown = [{(image.tobytes(), image.size) for image in row["images"]} for row in rows]

    def others(place: int) -> list | None:
        for step in range(1, len(rows)):
            other = (place + step) % len(rows)
            if shown[place] and len(rows[other]["images"]) == len(rows[place]["images"]):
                if shown[place].isdisjoint(shown[other]):
                    return rows[other]["images"]
        return None

    return [{**row, "other_images": others(place)} for place, row in enumerate(rows)]


def _crop(image: Image.Image) -> Image.Image:
    """A part of 1 to 20 % of an image in its size: `RandomResizedCrop(scale=(0.01, 0.2))`, which mDPO's code takes. It
    depends on the image alone."""
    random = np.random.default_rng([*hashlib.sha256(image.tobytes()).digest()])
    area, ratio = random.uniform(0.01, 0.2), np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
    size = area * image.width * image.height
    width, height = min(image.width, (size * ratio) ** 0.5), min(image.height, (size / ratio) ** 0.5)
    left, top = random.uniform(0, image.width - width), random.uniform(0, image.height - height)
    return image.resize(image.size, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))


def _of_one_colour(image: Image.Image) -> Image.Image:
    colour = np.median(np.asarray(image).reshape(-1, 3), axis=0)
    return Image.new("RGB", image.size, tuple(int(value) for value in colour))


__all__ = [
    "DataCollatorForMaskedDiffusion", "DataCollatorForMaskedDiffusionCandidates",
    "DataCollatorForMaskedDiffusionPreference", "DataCollatorForMaskedDiffusionPrompts",
]  # fmt: skip
