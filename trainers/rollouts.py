"""Answers to learn from: groups of them as the model samples them, and the batch that a loss is computed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence

from .masked_diffusion_loss import IGNORE_INDEX


OF_IMAGES = ("pixel_values", "image_sizes", "batch_num_images", "image_index")


class Group(NamedTuple):
    """Answers to one prompt.

    Attributes:
        prompt (`(prompt,)`), image_index (`(images,)`): its tokens, and its images' places in the batch.
        canvas (`(answers, canvas)`): what was committed, up to the end, which belongs to an answer; masks behind it.
        learned (`(answers, canvas)`, bool): the tokens of each answer.
        texts, clipped: as the evaluation reads them, and whether they have no end.
    """

    prompt: torch.LongTensor
    image_index: torch.LongTensor
    canvas: torch.LongTensor
    learned: torch.BoolTensor
    texts: list[str]
    clipped: list[bool]


def sample_groups(
    model, processor, batch: Mapping, size: int, seeds: Sequence[int], mask_token_id: int, options: dict
) -> list[Group]:
    """Answer every prompt of a batch several times. Each group is a call of its own, so that it depends on nothing else
    in the batch, and encodes its images once.

    Args:
        model: in evaluation mode.
        batch: of [`DataCollatorForMaskedDiffusionPrompts`].
        size: of each group.
        seeds: one for each prompt.
        mask_token_id: of the model's configuration.
        options: of `generate`.
    """
    counts = batch["batch_num_images"].tolist() if "pixel_values" in batch else [0] * len(seeds)
    groups, shown = [], 0
    for ids, attended, count, seed in zip(batch["input_ids"], batch["attention_mask"], counts, seeds):
        prompt, images, own = ids[attended == 1], {}, ids[:0]
        if count:
            own = batch["image_index"][shown : shown + count]
            images = {name: batch[name][own] for name in ("pixel_values", "image_sizes")}
            images |= {"batch_num_images": torch.full((size,), count), "image_index": torch.arange(count).repeat(size)}
        shown += count
        with torch.random.fork_rng([prompt.device] if prompt.device.type == "cuda" else []):
            torch.manual_seed(seed)
            output = model.generate(
                input_ids=prompt.expand(size, -1), attention_mask=torch.ones_like(prompt).expand(size, -1),
                tokenizer=processor.tokenizer, **images, **options, return_dict_in_generate=True, output_history=True,
            )  # fmt: skip
        canvas = output.history[-1]
        length = (output.tokens_per_forward * output.num_forwards).round().long()[:, None]
        behind = torch.arange(canvas.shape[1], device=canvas.device) > length
        texts = processor.batch_decode(output.sequences[:, len(prompt) :], skip_special_tokens=True)
        groups.append(Group(
            prompt, own, canvas.masked_fill(behind, mask_token_id), ~behind & (canvas != mask_token_id),
            [text.strip() for text in texts], (length[:, 0] == canvas.shape[1]).tolist(),
        ))  # fmt: skip
    return groups


def batch_of_answers(
    batch: Mapping, groups: Sequence[Group], advantages: torch.FloatTensor, keep_all: bool, pad_token_id: int
) -> dict:
    """What a loss is computed on.

    Equal answers of a group are one row, with the same masks; answers with an advantage of 0, whose gradient is 0, have
    none unless `keep_all`, and neither have answers without tokens to learn. One row is always left.

    Args:
        batch, groups: prompts, and the answers to them.
        advantages (`(prompts, answers)`).

    Returns:
        `input_ids`, `attention_mask`, `labels` (`(rows, sequence)`), images as the model takes them, and `row_ids`;
        `places`, of each row the number of its first answer in the batch; and of each answer that is learned from
        `row_of`, its row, and `advantages`.
    """
    rows, row_of, kept = {}, [], []
    for number, (group, own) in enumerate(zip(groups, advantages.tolist())):
        for place, (canvas, learned, advantage) in enumerate(zip(group.canvas.tolist(), group.learned, own)):
            if bool(learned.any()) and (keep_all or advantage):
                row = rows.setdefault((number, *canvas), (len(rows), number, place))
                row_of.append(row[0])
                kept.append(advantage)
    chosen = [each[1:] for each in rows.values()] or [(0, 0)]
    if not row_of:
        row_of, kept = [0], [0.0]
    ids, labels, shown = [], [], []
    for number, place in chosen:
        group = groups[number]
        canvas, prompt = group.canvas[place], group.prompt
        ids.append(torch.cat([prompt, canvas]))
        answer = canvas.where(group.learned[place], IGNORE_INDEX)
        labels.append(torch.cat([torch.full_like(prompt, IGNORE_INDEX), answer]))
        shown.append(group.image_index)
    found = {
        "input_ids": pad_sequence(ids, True, pad_token_id), "labels": pad_sequence(labels, True, IGNORE_INDEX),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True),
        "row_ids": [batch["row_ids"][number] for number, _ in chosen],
        "places": [number * advantages.shape[1] + place for number, place in chosen],
        "row_of": torch.tensor(row_of, device=ids[0].device),
        "advantages": torch.tensor(kept, device=ids[0].device),
    }  # fmt: skip
    if (index := torch.cat(shown)).numel():
        used, found["image_index"] = index.unique(return_inverse=True)
        found |= {name: batch[name][used] for name in ("pixel_values", "image_sizes")}
        found["batch_num_images"] = torch.tensor([len(own) for own in shown])
    return found


@contextmanager
def gathered(model, accelerator):
    """The weights of a model that is sharded stay whole within: processes generate in passes of their own number."""
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in shards:
        module.set_reshard_after_forward(accelerator.state.fsdp_plugin.reshard_after_forward, recurse=False)
        module.reshard()


__all__ = ["Group", "batch_of_answers", "gathered", "sample_groups"]
