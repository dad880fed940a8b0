"""Presets: the prompt, special tokens and generation options that each released model is run with.

Nothing here imports PyTorch: the command line names the presets before it waits for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


# The special tokens that prompts and decoding need, with their ids in the released tokenizer.
SPECIAL_TOKENS = {
    "<|startoftext|>": 126080,
    "<|endoftext|>": 126081,
    "<|mdm_mask|>": 126336,
    "<|start_header_id|>": 126346,
    "<|end_header_id|>": 126347,
    "<|eot_id|>": 126348,
}


_LLADA, _TOWER_ID = "GSAI-ML/LLaDA-8B-Instruct", "google/siglip2-so400m-patch14-384"


@dataclass(frozen=True)
class Preset:
    """What a released model expects and is run with: prompt and options of the authors' evaluation or demo."""

    description: str
    chat_template: str  # name of the prompt's template (`processing_lladamedv.CHAT_TEMPLATES`)
    max_new_tokens: int
    block_length: int
    steps: int
    names: tuple[str, ...] = ()  # under which such checkpoints were released
    # Special tokens that end an answer; and those that are never proposed, besides the mask.
    stop: tuple[str, ...] = ("<|eot_id|>",)
    suppress: tuple[str, ...] = ("<|endoftext|>", "<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>")
    base_models: tuple[str, ...] = (_LLADA, _TOWER_ID)  # Hub ids of what the model was made from

    def generation_options(self) -> dict:
        """Arguments of `LLaDAMedVGenerationConfig`."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "block_length": self.block_length,
            "steps": self.steps,
            "bos_token_id": SPECIAL_TOKENS["<|startoftext|>"],
            "pad_token_id": SPECIAL_TOKENS["<|endoftext|>"],
            "eos_token_id": [SPECIAL_TOKENS[token] for token in self.stop],
            "suppress_tokens": [SPECIAL_TOKENS[token] for token in ("<|mdm_mask|>", *self.suppress)],
        }


PRESETS = {
    "llada-medv": Preset(
        "LLaDA-MedV, open-ended answers (arXiv 2508.01617)", "llava_llada_med", 256, 64, 256,
        names=("LLaDAMedV-2A4E", "LLaDA-MedV"),
    ),
    "llada-medv-vqa": Preset(
        "LLaDA-MedV fine-tuned on VQA-RAD, SLAKE or PathVQA (arXiv 2508.01617)", "llava_llada_med", 64, 64, 64,
        names=("VQA_RAD_2E", "SLAKE_10E", "PathVQA_7E"),
    ),
    "llada-v": Preset(
        "LLaDA-V (arXiv 2505.16933), as the released demo runs it", "llava_llada", 128, 128, 128, names=("LLaDA-V",),
    ),
    "llada": Preset(
        "LLaDA-8B-Instruct, text only (arXiv 2502.09992)", "llada", 128, 32, 128,
        stop=("<|eot_id|>", "<|endoftext|>"), suppress=(), base_models=(_LLADA,),
    ),
}  # fmt: skip


def choose_preset(source: str | Path, text_only: bool) -> str:
    """Name of the preset for a released checkpoint: by the name it was released under, or by whether it sees."""
    named = (name for name, preset in PRESETS.items() if Path(source).name in preset.names)
    return "llada" if text_only else next(named, "llada-medv")


__all__ = ["PRESETS", "SPECIAL_TOKENS", "Preset", "choose_preset"]
