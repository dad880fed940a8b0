"""Options of the diffusion as lmms-eval's model arguments, and the treatment of a task's own generation arguments.

They are model arguments because lmms-eval's response cache keys answers by all model arguments, but only by the usual
autoregressive ones of a task's generation arguments: with the number of steps among these, a run with other steps would
get the answers of the first.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import GenerationConfig

from lladamedv.evaluation.published import VQA_DECODING
from lladamedv.modeling_lladamedv import LLaDAMedVGenerationConfig
from lladamedv.modeling_lladamedv.generation_options_lladamedv import OPTIONS


# All that change the answer and can be written as text.
GENERATION_OPTIONS = tuple(
    name
    for name, each in OPTIONS.items()
    if each.role not in ("report", "reply") and each.types and name != "transformers_version"
)


def parse_generation_options(arguments: Mapping[str, object], others: tuple[str, ...] = ()) -> dict:
    """Options of `generate` from model arguments, whose values may be texts.

    Args:
        arguments: texts are read as JSON (`64`, `0.9`, `true`, `[1, 2]`) or Python's `True`, `False` and `None`, and
            are texts if they are neither.
        others: names of further arguments, for the error message.

    Returns:
        The options, among them `max_new_tokens` (64 by default), `block_length` and `steps` (both `max_new_tokens` by
        default: one block, one token per step). Any other option that is not given is the checkpoint's.

    Raises:
        ValueError: for a name that is not in `GENERATION_OPTIONS`, or a value that is not allowed.
    """
    options = {"max_new_tokens": VQA_DECODING["max_new_tokens"]}
    for name, value in arguments.items():
        if name not in GENERATION_OPTIONS:
            raise ValueError(
                f"`{name}` is {value!r}, but there is no such model argument; allowed are "
                f"{sorted({*others, *GENERATION_OPTIONS})}."
            )
        if isinstance(value, str):
            value = OPTIONS[name].parse(value)
        # lmms-eval has made a float of every number that is not digits alone, such as 1e2.
        options[name] = int(value) if isinstance(value, float) and value.is_integer() else value
    options = {"block_length": options["max_new_tokens"], "steps": options["max_new_tokens"]} | options
    LLaDAMedVGenerationConfig(**options)
    return options


def ignored_arguments(arguments: Mapping[str, object], in_force: Mapping[str, object]) -> dict:
    """The generation arguments of a task that the options in force contradict. They are ignored, except for `until`.

    Raises:
        ValueError: for an option that only masked-diffusion models have, which belongs among the model arguments.
    """
    for name in arguments:
        if name in OPTIONS and name not in vars(GenerationConfig()):
            raise ValueError(
                f"`{name}` is {arguments[name]!r} among the generation arguments of a task; set it in --model_args, "
                "because the response cache ignores generation arguments of this name."
            )
    return {
        name: value
        for name, value in arguments.items()
        if name != "until" and value is not None and value != in_force.get(name)
    }


def cut_at(text: str, until: str | list[str] | None) -> str:
    """The text before the first of the given ones; a canvas is denoised as a whole, so this happens afterwards."""
    for end in [until] if isinstance(until, str) else until or []:
        text = text.split(end, 1)[0] if end else text
    return text


__all__ = ["GENERATION_OPTIONS", "cut_at", "ignored_arguments", "parse_generation_options"]
