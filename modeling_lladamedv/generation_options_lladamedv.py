"""The one table of what `generate` and `infill` can be asked for: names, defaults, checks and meanings.

The generation configuration, its documentation, the command line, the server and the evaluation plug-in are made from
it. Nothing here needs PyTorch or Transformers, so that options can be checked before either is imported.
"""

import json
import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_origin


ADAPTIVE_RULES = ("confidence_threshold", "factor", "entropy_bound")  # each replaces the schedule of a block
_LARGEST_COUNT = 2**20  # beyond every context
_PYTHON_NAMES = {"True": True, "False": False, "None": None}


class GenerationOptionError(ValueError):
    """Options of `generate` that are not allowed, or do not go together.

    Attributes:
        options: names of the options that the message is about, first the one to change.
    """

    def __init__(self, message: str, *options: str):
        super().__init__(message)
        self.options = options


@dataclass(frozen=True)
class GenerationOption:
    """One option of `generate`.

    Args:
        name: of the argument.
        types: what a value may be besides `None`, as in its documentation; empty for an object of Python alone.
        meaning: the documentation.
        allowed: what values are allowed, in the words of the error message.
        accepts: whether a value other than `None` is allowed.
        default: `None` where something else decides.
        role: `"answer"` if it changes the answer, `"reply"` if it changes what commands say about the answer,
            `"report"` if it changes only what `generate` returns about it, `"model"` for ids and objects that belong to
            the model and its tokenizer.
    """

    name: str
    types: tuple
    meaning: str
    allowed: str
    accepts: Callable[[Any], bool]
    default: Any = None
    role: str = "answer"

    @property
    def type_names(self) -> str:
        """The types in words, for documentation: "int or list[int]"."""
        return " or ".join(each.__name__ if get_origin(each) is None else str(each) for each in self.types)

    def check(self, value: object) -> None:
        """Refuse a value that is not allowed.

        Raises:
            GenerationOptionError: says which values are.
        """
        fits = self.default is None or bool in self.types if value is None else self.accepts(value)
        if not fits:
            message = f"`{self.name}` is {value!r:.200}; allowed {self.allowed}."
            raise GenerationOptionError(message, self.name)

    def parse(self, text: str) -> Any:
        """The value that a text stands for: JSON, Python's `True`, `False` and `None`, or the text itself.

        Raises:
            GenerationOptionError: if the text is of none of the option's types. Whether the value is allowed, [`check`]
                says.
        """
        if text in _PYTHON_NAMES:
            value = _PYTHON_NAMES[text]
        else:
            try:
                value = json.loads(text)
            except (json.JSONDecodeError, RecursionError):
                value = text
        kinds = {get_origin(each) or each for each in self.types}
        if value is None or type(value) in kinds or (type(value) is int and float in kinds):
            return value
        if str in kinds:  # a text that looks like something else
            return text
        raise GenerationOptionError(f"`{self.name}` is {text}; allowed is {self.type_names}.", self.name)


def _is_whole(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _count(name: str, meaning: str, least: int = 1) -> GenerationOption:
    allowed = f"are whole numbers of at least {least}, at most {_LARGEST_COUNT}"
    return GenerationOption(name, (int,), meaning, allowed, lambda v: _is_whole(v, least) and v <= _LARGEST_COUNT)


def _number(
    name: str, meaning: str, default: float | None = None, zero: bool = False, most: float = math.inf,
    role: str = "answer",
) -> GenerationOption:  # fmt: skip
    """A finite number above 0, or 0 itself with `zero`, of at most `most`."""
    allowed = f"are finite numbers {'of at least' if zero else 'above'} 0"
    if most < math.inf:
        allowed = f"are numbers in {'[' if zero else '('}0, {most}]"

    def accepts(value: Any) -> bool:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and value < math.inf and value <= most and (value > 0 or (zero and value == 0))

    return GenerationOption(name, (float,), meaning, allowed, accepts, default, role)


def _switch(name: str, meaning: str, role: str = "answer") -> GenerationOption:
    return GenerationOption(name, (bool,), meaning, "are True and False", lambda v: isinstance(v, bool), False, role)


def _choice(name: str, choices: tuple[str, ...], meaning: str, default: str | None = None) -> GenerationOption:
    allowed = f"are {', '.join(choices)}"
    return GenerationOption(name, (str,), meaning, allowed, lambda v: isinstance(v, str) and v in choices, default)


def _items(accepts_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: all(map(accepts_one, v)) if isinstance(v, (list, tuple)) else accepts_one(v)


def _ids(name: str, types: tuple, meaning: str) -> GenerationOption:
    accepts = _items(_is_whole) if list[int] in types else _is_whole
    return GenerationOption(name, types, meaning, "are ids, whole numbers of at least 0", accepts, role="model")


_TABLE = (
    _count("max_new_tokens", "Length of the canvas of masks that is denoised, in tokens; 256 if unset."),
    _count(
        "block_length",
        "Tokens per block; blocks are denoised left to right. Must divide `max_new_tokens`. If unset, the largest "
        "divisor of `max_new_tokens` that is at most 64.",
    ),
    _count(
        "steps",
        "Denoising steps (forward passes) for the whole canvas; must be a multiple of the number of blocks. If unset, "
        "one per token.",
    ),
    _count(
        "initial_canvas_length",
        "Begin with a canvas of this length, a multiple of `block_length`, and make it a block longer whenever it is "
        "full and no end has appeared, up to `max_new_tokens`. If unset, the canvas has its full length at once.",
    ),
    _number(
        "grow_until_eos_confidence",
        "With `initial_canvas_length`: before the first step, make the canvas a block longer until the model is this "
        "sure that the answer ends in it (DAEDAL, arXiv 2508.00819, stage 1), which takes a forward pass a length. Its "
        "confidence is the sum of the probabilities of `eos_token_id` and `pad_token_id` at the last 32 places whose "
        "most probable token is one of them, divided by 32. In (0, 1]; the paper uses 0.5.",
        most=1,
    ),
    _count(
        "suffix_blocks",
        "Keep only this many blocks of masks right of the current one in the row and drop the rest (DPad, arXiv "
        "2508.14148): an approximation, and faster for long canvases. If unset, all are kept.",
        least=0,
    ),
    _number(
        "temperature", "Strength of the Gumbel noise on the logits; 0 is greedy. `do_sample=False` means 0.", 0.0,
        zero=True,
    ),
    _number(
        "cfg_scale",
        "Strength of the classifier-free guidance `u + (cfg_scale + 1) * (c - u)`; 0 is off. It doubles the work.", 0.0,
        zero=True,
    ),
    _number(
        "image_guidance_scale",
        "Strength g of the guidance by the picture `c + g * (c - n)`, n with each picture in its median colour and the "
        "question as it is (visual contrastive decoding, arXiv 2311.16922, with that picture for its noisy one); 0 is "
        "off. It doubles the work, needs a picture in each prompt, and excludes `cfg_scale`.",
        0.0, zero=True,
    ),
    _number(
        "image_guidance_cutoff",
        "With `image_guidance_scale`: propose only tokens whose probability without guidance is at least this share of "
        "the largest one that is allowed (the paper's β); 0 is off. Probabilities are then those among these tokens. "
        "The choices of `infill` are not cut.",
        0.1, zero=True, most=1,
    ),
    _choice(
        "remasking", ("low_confidence", "random", "margin", "entropy"),
        'Which masked tokens stay masked at each step: those of the lowest probability (`"low_confidence"`), of the '
        'smallest lead over the second-best token (`"margin"`, Dream\'s `topk_margin`), of the highest entropy '
        '(`"entropy"`), or `"random"` ones.',
        default="low_confidence",
    ),
    _number(
        "schedule_shift",
        "α of LaViDa's shifted schedule (arXiv 2505.16839): below 1 commits more tokens in a block's early steps, "
        "above 1 in its late ones. After a fraction 1 − t of the steps, αt / (1 + (α − 1)t) of the masks are left.",
    ),
    _number(
        "confidence_threshold",
        "Instead of the fixed number of tokens per step, commit every token of the block at least this probable, and "
        "always the most probable one (Fast-dLLM, arXiv 2505.22618). In (0, 1].",
        most=1,
    ),
    _number(
        "factor",
        "Instead of that, commit the r most probable tokens while the r-th has at least 1 - factor / (r + 1).",
    ),
    _number(
        "entropy_bound",
        "Instead of that, commit the most certain tokens while the sum of their entropies (in nats, without the "
        "largest) is at most this, which then also bounds the error of taking them for independent (arXiv 2505.24857).",
    ),
    _switch(
        "use_cache",
        "Whether steps after a block's first run only a part of the row, on cached states of the rest. Much faster, "
        "and an approximation: the cached states do not see the tokens committed since.",
    ),
    _choice(
        "cache_implementation", ("prefix", "dual"),
        'With `use_cache`: `"dual"` (the default there) runs the block alone, `"prefix"` the block and everything '
        "right of it (Fast-dLLM, arXiv 2505.22618).",
    ),
    _count(
        "cache_refresh_interval",
        "With `use_cache`: run the whole row again after this many steps within a block too, not only when a block "
        "begins. With 1 nothing is approximated.",
    ),
    _number(
        "cache_drift_bound",
        "With `use_cache`: let each row find its own refresh interval. Whenever its states are refreshed, the drift is "
        "measured: the KL divergence, in nats, of the cached from the exact distributions, averaged over the "
        "candidates. Above the bound the interval is halved, otherwise doubled. It starts at `cache_refresh_interval`, "
        "or else at 4.",
    ),
    _switch(
        "output_cache_drift",
        "With `use_cache`: whether to measure the drift at every step, which costs a whole pass each, and to return "
        "it. The answer stays what it is without.",
        role="report",
    ),
    _count(
        "speculation_depth",
        "Verify up to this many further steps in a step's forward pass: the row is run beside the states that the "
        "proposals of the pass before lead to. Answer, order and confidences stay what they are, in fewer passes, each "
        "over more places: worth it where these are nearly free, on GPUs and with `use_cache`. For greedy decoding; "
        "0 is off.",
        least=0,
    ),
    GenerationOption(
        "compile_config", (),
        "A `CompileConfig`: compile the denoising step with these options of `torch.compile`, one graph a shape. "
        "Shapes stay the same from block to block and when rows finish, without a cache and with the dual one; not "
        "saved with the model.",
        # Its class is known by its name, because Transformers is not imported here.
        "is a transformers.CompileConfig", lambda v: any(each.__name__ == "CompileConfig" for each in type(v).__mro__),
        role="model",
    ),
    _ids(
        "suppress_tokens", (list[int],),
        "Ids that are never proposed. If unset, the mask token alone; a list that leaves the mask token out lets the "
        "model propose it, and such a position stays masked, possibly to the end.",
    ),
    _number(
        "repetition_penalty",
        "Divides the positive and multiplies the negative logits of ids that the prompt or the committed part of the "
        "canvas holds (Transformers' `RepetitionPenaltyLogitsProcessor`); 1 is off.",
        default=1.0,
    ),
    _count(
        "no_repeat_ngram_size",
        "No run of this many tokens occurs twice in the answer. Needs steps that commit one token each, because tokens "
        "that are committed together do not know of each other.",
    ),
    GenerationOption(
        "stop_strings", (str, list[str]),
        "Texts that end the answer; they need the `tokenizer=` argument of `generate`. Each is looked for as the "
        'tokens that it becomes by itself, as in the authors\' code: " x" and "x" are two texts.',
        "is a text or a list of texts", _items(lambda v: isinstance(v, str)),
    ),
    _count(
        "min_new_tokens",
        "Places at the start of the canvas where no token of `eos_token_id` is proposed, as in Transformers. With "
        "`max_new_tokens` the answer has exactly that length.",
    ),
    _switch(
        "defer_eos",
        "Whether places for which an end or padding token (`eos_token_id`, `pad_token_id`) is proposed are committed "
        "after all others of the step, at every temperature: the cure of LLaDA's authors (`confidence_eos_eot_inf`) "
        "for answers that end too early, because models trained on padded answers are surest of their end.",
    ),
    GenerationOption(
        "generation_suffix", (str,),
        "Fixed text after the canvas, seen from the first step on and appended to the answer; it needs `tokenizer=`.",
        "is a text", lambda v: isinstance(v, str),
    ),
    _number(
        "confidence_temperature",
        "Calibrates the confidence of answers (not of tokens), see `fit_confidence_temperature`; 1 is off.",
        default=1.0, role="reply",
    ),
    _number(
        "abstention_threshold",
        "Mark answers of a lower (calibrated) confidence as `abstained`; needs `return_dict_in_generate`. In (0, 1].",
        most=1, role="reply",
    ),
    _switch(
        "output_image_reliance",
        "Whether to return how much likelier the picture makes the answer: `image_reliance`; needs "
        "`return_dict_in_generate`. Takes up to 510 rows of forward passes for each answer.",
        role="reply",
    ),
    _switch("output_history", "Whether to return the canvas after every forward pass.", role="report"),
    _switch(
        "return_dict_in_generate",
        "Whether to return a [`LLaDAMedVGenerationOutput`] instead of the sequences alone.",
        role="report",
    ),
    _ids("bos_token_id", (int,), "Id that begins a text, as in Transformers."),
    _ids(
        "eos_token_id", (int, list[int]), "Ids that end the answer. LLaDA-MedV ends a turn with `<|eot_id|>`."
    ),
    _ids("pad_token_id", (int,), "Id that fills up shorter rows, as in Transformers."),
    GenerationOption(
        "transformers_version", (str,), "The version that saved the options.", "is a text",
        lambda v: isinstance(v, str), role="model",
    ),
)  # fmt: skip
OPTIONS: dict[str, GenerationOption] = {option.name: option for option in _TABLE}


def check_options(values: Mapping[str, Any]) -> None:
    """Check every option by itself, and that no two exclude each other, whatever the prompt and the lengths are.

    Args:
        values: of the options; those that are left out have their default.

    Raises:
        GenerationOptionError: for a value that is not allowed, or options that exclude each other.
    """
    values = {name: values.get(name, option.default) for name, option in OPTIONS.items()}
    for name, value in values.items():
        OPTIONS[name].check(value)
    adaptive = [name for name in ADAPTIVE_RULES if values[name] is not None]
    if len(adaptive) > 1:
        first, second = adaptive[:2]
        raise GenerationOptionError(
            f"`{first}` is {values[first]} and `{second}` is {values[second]}; each is a rule of its own: only one is "
            "allowed.",
            first, second,
        )  # fmt: skip
    if adaptive and values["remasking"] != OPTIONS["remasking"].default:
        raise GenerationOptionError(
            f"`{adaptive[0]}` cannot be combined with remasking={values['remasking']!r}, which it does not rank by; "
            f"use remasking={OPTIONS['remasking'].default!r}.",
            adaptive[0], "remasking",
        )  # fmt: skip
    if adaptive and values["schedule_shift"] is not None:
        raise GenerationOptionError(
            f"`schedule_shift` is {values['schedule_shift']}, but with `{adaptive[0]}` no schedule counts the tokens; "
            "it must be None.", "schedule_shift",
            adaptive[0],
        )  # fmt: skip
    if values["cfg_scale"] and values["image_guidance_scale"]:
        raise GenerationOptionError(
            f"`image_guidance_scale` is {values['image_guidance_scale']} and `cfg_scale` is {values['cfg_scale']}; "
            "each contrasts the prompt with another one: only one may be above 0.",
            "image_guidance_scale", "cfg_scale",
        )  # fmt: skip
    cutoff = values["image_guidance_cutoff"]
    if cutoff != OPTIONS["image_guidance_cutoff"].default and not values["image_guidance_scale"]:
        message = f"`image_guidance_cutoff` is {cutoff}, which is allowed with an `image_guidance_scale` above 0 only."
        raise GenerationOptionError(message, "image_guidance_cutoff", "image_guidance_scale")
    for name in ("cache_implementation", "cache_refresh_interval", "cache_drift_bound", "output_cache_drift"):
        if values[name] and not values["use_cache"]:
            message = f"`{name}` is {values[name]!r}, which is allowed with use_cache=True only."
            raise GenerationOptionError(message, name, "use_cache")

    for name in ("temperature", "cache_drift_bound", "output_cache_drift", "output_history"):
        if values["speculation_depth"] and values[name]:
            message = f"`speculation_depth` is {values['speculation_depth']}, which is not allowed with `{name}`."
            raise GenerationOptionError(message, "speculation_depth", name)
    if values["speculation_depth"] and values["remasking"] == "random":
        raise GenerationOptionError(
            "`speculation_depth` is not allowed with remasking='random', whose order cannot be foreseen.",
            "speculation_depth", "remasking",
        )  # fmt: skip


def describe_options(indent: str = "") -> str:
    """The table as the `Args` of a docstring."""
    lines = []
    for option in OPTIONS.values():
        default = "" if option.default is None else f", defaults to `{json.dumps(option.default).capitalize()}`"
        if isinstance(option.default, str):
            default = f', defaults to `"{option.default}"`'
        types = option.type_names.replace(" or ", "` or `") or "CompileConfig"
        lines.append(f"{indent}{option.name} (`{types}`, *optional*{default}):")
        lines += textwrap.wrap(option.meaning, 116, initial_indent=f"{indent}    ", subsequent_indent=f"{indent}    ")
    return "\n".join(lines)


__all__ = [
    "ADAPTIVE_RULES", "OPTIONS", "GenerationOption", "GenerationOptionError", "check_options", "describe_options",
]  # fmt: skip
