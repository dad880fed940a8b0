"""`lladamedv demo --train`: make the tiny checkpoint that ships with the package, from nothing but a seed.

Same classes and code path as the 8B model. What makes 80 minutes of two cores enough: the tower first learns to see,
with one linear classifier per attribute (stage 1), and keeps them as an auxiliary loss while the language model learns
to read it (stages 2 and 3); times are stratified over the batch; the shipped weights are a moving average.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers import trainers as tokenizer_trainers
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from lladamedv.modeling_lladamedv import (
    LLaDAMedVConfig,
    LLaDAMedVForConditionalGeneration,
    LLaDAMedVGenerationConfig,
)
from lladamedv.processing import LLaDAMedVImageProcessor, LLaDAMedVProcessor
from lladamedv.processing.phantoms import DOMAINS, PLANES, SHAPES, SIDES, SIZES, PhantomVQA
from lladamedv.processing.processing_lladamedv import CHAT_TEMPLATE, MEDICAL_SYSTEM_PROMPT
from lladamedv.trainers.masked_diffusion_loss import IGNORE_INDEX, add_noise, masked_diffusion_loss, sample_timesteps


IMAGE_SIZE, PATCH_SIZE = 64, 8
CANVAS_LENGTH, BLOCK_LENGTH = 24, 8
BATCH_SIZE = 32
# Descriptions hold the answers to many questions at once; closed questions are the hardest to ground.
KINDS = ("closed", "closed", "open", "description")
TOKENIZER_SEED = 1_000  # of the phantom texts; the held-out sets of `lladamedv.demo` use seeds from 9000
SAVE_EVERY = 500
EMA_DECAY = 0.998
AUXILIARY_WEIGHT = 0.3


class Stage(NamedTuple):
    """One part of the training, with its own data and its own learning-rate schedule."""

    name: str
    data_seed: int
    steps: int
    kinds: tuple[str, ...] = KINDS
    topic_weights: dict[str, int] | None = None


# "Is this an MRI scan?" asks to compare a word with the picture, which comes last: the third stage insists on it.
STAGES = (
    Stage("tower", 2_000, 1_500),
    Stage("joint", 1_000, 5_500),
    Stage("compare", 3_000, 1_500, ("closed",) * 4 + ("open", "description"), {"is_domain": 12}),
)
_ATTRIBUTES = {
    "domain": DOMAINS,
    "count": (0, 1, 2, 3),
    "side": SIDES,
    "shape": SHAPES,
    "size": SIZES,
    "sign": (False, True),
    "plane": PLANES,
}
# The special tokens of the released tokenizer, in its order, and the image placeholder behind them.
_SPECIAL_TOKENS = (
    "<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|mdm_mask|>", "<role>", "</role>",
    "<|arithmetic_start|>", "<|arithmetic_end|>", "<|number_start|>", "<|number_end|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>",
)  # fmt: skip


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the phantom texts, with the released special tokens at the end."""
    phantoms = PhantomVQA(TOKENIZER_SEED, 3_000, KINDS, image_size=16)
    texts = [text for example in phantoms for text in (example.question, example.answer)]
    texts += [MEDICAL_SYSTEM_PROMPT, "system", "user", "assistant"] * 20
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = tokenizer_trainers.BpeTrainer(
        vocab_size=1_000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        cls_token="[CLS]",
        extra_special_tokens={"image_token": "<image>", "mask_token": "<|mdm_mask|>"},
        clean_up_tokenization_spaces=False,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LLaDAMedVProcessor:
    """The processor that goes with [`build_model`]."""
    image_processor = LLaDAMedVImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, patch_size=PATCH_SIZE, vision_aspect_ratio="square"
    )
    return LLaDAMedVProcessor(image_processor, tokenizer)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LLaDAMedVForConditionalGeneration:
    """The tiny model, with random weights from torch's global generator."""
    token_id = tokenizer.convert_tokens_to_ids
    config = LLaDAMedVConfig(
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_token_id=token_id("<image>"),
        mask_token_id=token_id("<|mdm_mask|>"),
        vision_aspect_ratio="square",
    )
    model = LLaDAMedVForConditionalGeneration(config)
    # Large random position embeddings drown 8-pixel patches; starting small lets the tower learn where it needs them.
    nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=0.02)
    model.generation_config = LLaDAMedVGenerationConfig(
        max_new_tokens=CANVAS_LENGTH,
        block_length=BLOCK_LENGTH,
        steps=CANVAS_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[token_id("<|eot_id|>")],
        suppress_tokens=[
            token_id(token)
            for token in (
                "<|endoftext|>",
                "<|startoftext|>",
                "<|start_header_id|>",
                "<|end_header_id|>",
                "<|mdm_mask|>",
            )
        ],
    )
    return model


class _TrainingExamples(Dataset):
    """Phantom examples as tensors: pixels, attribute classes, tokens and labels."""

    def __init__(self, phantoms: PhantomVQA, tokenizer: PreTrainedTokenizerFast, num_image_tokens: int):
        self.phantoms, self.tokenizer, self.num_image_tokens = phantoms, tokenizer, num_image_tokens
        self.end_of_turn = tokenizer.convert_tokens_to_ids("<|eot_id|>")

    def __len__(self):
        return len(self.phantoms)

    def __getitem__(self, index):
        example = self.phantoms[index]
        pixels = torch.frombuffer(bytearray(example.image.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(IMAGE_SIZE, IMAGE_SIZE, 3).permute(2, 0, 1) / 127.5 - 1
        prompt = self.tokenizer.apply_chat_template(example.messages(), tokenize=False, add_generation_prompt=True)
        prompt = prompt.replace("<image>", "<image>" * self.num_image_tokens)
        prompt = self.tokenizer(prompt, add_special_tokens=False).input_ids
        answer = self.tokenizer(example.answer, add_special_tokens=False).input_ids
        # The rest of the canvas is filled with the end of the turn: the model learns where to stop from the start.
        # Two of three short answers get a canvas of one block, in which they weigh more against all those ends.
        short = len(answer) < BLOCK_LENGTH and index % 3
        answer = answer + [self.end_of_turn] * ((BLOCK_LENGTH if short else CANVAS_LENGTH) - len(answer))
        attributes = example.attributes
        seen = {"side": attributes.count > 0, "shape": attributes.count > 0, "size": attributes.count > 0}
        seen["plane"] = attributes.has_plane
        classes = [
            values.index(getattr(attributes, name)) if seen.get(name, True) else IGNORE_INDEX
            for name, values in _ATTRIBUTES.items()
        ]
        return pixels, torch.tensor(classes), prompt, answer

    def collate(self, rows):
        pixels, classes, prompts, answers = zip(*rows)
        width = max(map(len, prompts))
        shape = (len(rows), width + CANVAS_LENGTH)
        input_ids = torch.full(shape, self.tokenizer.pad_token_id)
        mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORE_INDEX)
        for row, (prompt, answer) in enumerate(zip(prompts, answers)):
            input_ids[row, width - len(prompt) : width + len(answer)] = torch.tensor(prompt + answer)
            mask[row, width - len(prompt) : width + len(answer)] = 1
            labels[row, width : width + len(answer)] = torch.tensor(answer)
        return torch.stack(pixels)[:, None], torch.stack(classes), input_ids, mask, labels


class _DemoTrainer(nn.Module):
    """The model and the attribute classifiers of the auxiliary loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        width = model.config.text_config.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in _ATTRIBUTES.items()})

    def attribute_loss(self, features, classes):
        pooled = features.mean(dim=1)
        losses = [
            F.cross_entropy(head(pooled), classes[:, column], ignore_index=IGNORE_INDEX)
            for column, head in enumerate(self.heads.values())
        ]
        return torch.stack(losses).sum()

    def forward(self, batch, generator=None):
        """The loss of stage 1 (without `generator`) or of the later ones."""
        pixels, classes, input_ids, mask, labels = batch
        if generator is None:
            return self.attribute_loss(torch.stack(self.model.get_image_features(pixels).pooler_output), classes)
        t = sample_timesteps(len(labels), generator, stratified=True)
        noised = add_noise(input_ids, labels, t, self.model.config.mask_token_id, generator)
        outputs = self.model(
            input_ids=noised.input_ids, pixel_values=pixels, attention_mask=mask, logits_to_keep=noised.masked
        )
        features = torch.stack(outputs.image_outputs.pooler_output)
        diffusion = masked_diffusion_loss(outputs.logits, labels, noised)
        return diffusion + AUXILIARY_WEIGHT * self.attribute_loss(features, classes)


def train_demo(output: Path, seed: int = 0, resume: bool = True, report=print) -> LLaDAMedVForConditionalGeneration:
    """Train the demo model and save it, its tokenizer and a log of the run.

    Args:
        output: folder for the checkpoint; `output/progress` holds what is needed to go on after an interruption.
        seed: of everything that is random. The same seed and number of threads give the same weights.
        resume: go on from `output/progress` where it exists.
        report: called with each line of progress.

    Returns:
        The trained model (averaged weights).
    """
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    trainer = _DemoTrainer(build_model(tokenizer))
    average = AveragedModel(trainer, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    log = []
    progress = [output / "progress" / f"{stage.name}.pt" for stage in STAGES]
    started_stages = [number for number, file in enumerate(progress) if resume and file.exists()]
    for number, stage in enumerate(STAGES):
        if started_stages and number < started_stages[-1]:
            continue  # its outcome is part of what the later stage saved
        name, steps = stage.name, stage.steps
        optimizer = torch.optim.AdamW(trainer.parameters(), lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
        scheduler = get_cosine_schedule_with_warmup(optimizer, 200, steps)
        first = 0
        if number in started_stages:
            saved = torch.load(progress[number], weights_only=True)
            trainer.load_state_dict(saved["trainer"])
            average.load_state_dict(saved["average"])
            optimizer.load_state_dict(saved["optimizer"])
            scheduler.load_state_dict(saved["scheduler"])
            first, log = saved["step"], json.loads(saved["log"])
            report(f"{name}: resumed at step {first}")
        phantoms = PhantomVQA(stage.data_seed + seed, steps * BATCH_SIZE, stage.kinds, IMAGE_SIZE, stage.topic_weights)
        examples = _TrainingExamples(phantoms, tokenizer, (IMAGE_SIZE // PATCH_SIZE) ** 2)
        loader = DataLoader(
            examples,
            batch_sampler=[range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE) for step in range(first, steps)],
            collate_fn=examples.collate,
        )
        started, running = time.perf_counter(), []
        trainer.train()
        for step, batch in enumerate(loader, start=first):
            # One generator per step: an interrupted run goes on with the very same noise.
            noise = torch.Generator().manual_seed((seed * len(STAGES) + number) * 1_000_003 + step)
            loss = trainer(batch, noise if number else None)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trainer.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            average.update_parameters(trainer)
            running.append(loss.item())
            if (step + 1) % 100 == 0:
                mean, running = sum(running) / len(running), []
                seconds = (time.perf_counter() - started) / (step + 1 - first)
                log.append({"stage": name, "step": step + 1, "loss": round(mean, 4)})
                left = seconds * (steps - step - 1) / 60
                report(f"{name} {step + 1}/{steps}  loss {mean:.3f}  {seconds:.2f} s/step  {left:.0f} min left")
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                progress[number].parent.mkdir(exist_ok=True)
                state = {"trainer": trainer.state_dict(), "average": average.state_dict(), "step": step + 1}
                state |= {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
                unfinished = progress[number].with_suffix(".new")
                torch.save(state | {"log": json.dumps(log)}, unfinished)
                unfinished.replace(progress[number])
    model = average.module.model.half().eval()
    model.save_pretrained(output)
    build_processor(tokenizer).save_pretrained(output)
    for code in output.glob("*.py"):  # the package itself provides the classes
        code.unlink()
    (output / "training_log.json").write_text(json.dumps(log, indent=0) + "\n")
    return model
