"""Tiny random models and processors of the real classes."""

import json
from functools import cache

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from lladamedv import (
    LLaDAMedVConfig,
    LLaDAMedVForConditionalGeneration,
    LLaDAMedVImageProcessor,
    LLaDAMedVProcessor,
)
from tests.parity.fixtures import FIXTURES


TILE, PATCH = 32, 8


@cache
def _filled_vocabulary() -> str:
    """The fixtures' byte-level BPE has the true ids and holes between them; stand-ins fill the holes."""
    data = json.loads((FIXTURES / "tokenizer" / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    taken = {*vocabulary.values(), *(token["id"] for token in data["added_tokens"])}
    vocabulary |= {f"<|filler_{number}|>": number for number in range(max(taken)) if number not in taken}
    return json.dumps(data)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with the released ids."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_filled_vocabulary()),
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def tiny_config(aspect_ratio: str = "square", **text) -> LLaDAMedVConfig:
    return LLaDAMedVConfig(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": TILE,
            "patch_size": PATCH,
        },
        text_config={
            "vocab_size": 126464,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            **text,
        },
        vision_aspect_ratio=aspect_ratio,
    )


def small_vocabulary_config(aspect_ratio: str = "square", **text) -> LLaDAMedVConfig:
    """For tests that need no tokenizer: 100 ids, `<image>` 99, mask 98."""
    ids = {"bos_token_id": 90, "eos_token_id": 91, "pad_token_id": 91}
    config = tiny_config(aspect_ratio, **ids, **text).to_dict()
    config["text_config"]["vocab_size"] = 100
    return LLaDAMedVConfig(**config | {"image_token_id": 99, "mask_token_id": 98})


def randomize(model: LLaDAMedVForConditionalGeneration, seed: int = 0) -> LLaDAMedVForConditionalGeneration:
    """Weights large enough that answers depend on the prompt, the picture and the positions."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                width = parameter.shape[-1]
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.5 / width**0.5))
        model.lm_head.weight.mul_(3)
        model.get_input_embeddings().weight.mul_(4)
    return model.eval()


def tiny_model(aspect_ratio: str = "square", seed: int = 0, **text) -> LLaDAMedVForConditionalGeneration:
    return randomize(LLaDAMedVForConditionalGeneration(small_vocabulary_config(aspect_ratio, **text)), seed)


def tiny_processor(aspect_ratio: str = "square") -> LLaDAMedVProcessor:
    image_processor = LLaDAMedVImageProcessor(
        size={"height": TILE, "width": TILE}, patch_size=PATCH, vision_aspect_ratio=aspect_ratio
    )
    return LLaDAMedVProcessor(image_processor, tiny_tokenizer())


def random_image(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


class Words:
    """A tokenizer of which texts are ids written out."""

    def __call__(self, text, add_special_tokens=False):
        self.input_ids = [int(word) for word in text.split()]
        return self

    def decode(self, ids, **kwargs):
        return " ".join(str(int(token)) for token in torch.as_tensor(ids).flatten())


def image_prompt(question=(5, 6, 7), num_images: int = 1) -> torch.LongTensor:
    """A prompt `(1, …)` for `small_vocabulary_config` with image tokens of one-tile images in front."""
    tokens = num_images * (TILE // PATCH) ** 2
    return torch.tensor([[99] * tokens + list(question)])
