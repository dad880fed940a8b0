"""The generation configuration: the table of options as a `GenerationConfig` of Transformers, and how the options of
one call come from those of the model and of the caller."""

import copy

from transformers import GenerationConfig

from .generation_options_lladamedv import (
    ADAPTIVE_RULES,
    OPTIONS,
    GenerationOptionError,
    check_options,
    describe_options,
)  # fmt: skip


_LARGEST_SCHEDULE = 2**28  # counts of a block's schedule, of 8 bytes each
_DEFAULT_MAX_NEW_TOKENS = 256
_DEFAULT_BLOCK_LENGTH = 64
# What Transformers' autoregressive `generate` takes besides …
FOREIGN_OPTIONS = {
    *vars(GenerationConfig()), "assistant_model", "custom_generate", "inputs", "logits_processor",
    "negative_prompt_attention_mask", "negative_prompt_ids", "prefix_allowed_tokens_fn",
    "stopping_criteria",
    "synced_gpus", "inputs_embeds", "past_key_values", "position_ids",
    "token_type_ids",
} - {*OPTIONS}  # fmt: skip
# … the values that ask for nothing, beside None, False and what is empty: its defaults, but for two that do something …
_NEUTRAL = GenerationConfig._get_default_generation_params() | {
    "max_length": None, "top_k": 0, "min_length": 0, "min_p": 0.0, "top_h": 1.0, "guidance_scale": 1.0,
    "penalty_alpha": 0.0, "max_matching_ngram_size": 2,
}  # fmt: skip
# … and what serves here instead.
_EQUIVALENTS = {
    **dict.fromkeys(
        ("do_sample", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"), "temperature"
    ),
    **dict.fromkeys(("bad_words_ids", "begin_suppress_tokens"), "suppress_tokens"),
    **dict.fromkeys(("output_scores", "output_logits"), "return_dict_in_generate"),
    "encoder_no_repeat_ngram_size": "no_repeat_ngram_size",
    "encoder_repetition_penalty": "repetition_penalty",
    "guidance_scale": "cfg_scale",
    "inputs": "input_ids",
    "max_length": "max_new_tokens",
    "min_length": "min_new_tokens",
    "stopping_criteria": "stop_strings",
}


def native_options(options: dict) -> dict:
    """The options that `generate` was given, in terms of [`LLaDAMedVGenerationConfig`].

    Options of Transformers' autoregressive `generate` are left out where they ask for nothing. `None` means "as it is"
    where it is no value of an option, and `do_sample=False` that the temperature is 0.

    Raises:
        GenerationOptionError: for an option that does not exist, or an autoregressive one that asks for something.
    """
    unknown = sorted(set(options) - {*OPTIONS} - FOREIGN_OPTIONS)
    if unknown:
        message = f"Unknown generation arguments {unknown}; allowed are {sorted(OPTIONS)}."
        raise GenerationOptionError(message, *unknown)
    # Numbers of NumPy and PyTorch are as good as Python's, for a file, too.
    options = {
        name: value.tolist() if callable(getattr(value, "tolist", None)) else value for name, value in options.items()
    }
    native = {name: options[name] for name in OPTIONS if name in options}
    native = {name: value for name, value in native.items() if value is not None or OPTIONS[name].default is None}
    for name in ("min_new_tokens", "no_repeat_ngram_size"):  # off, as in Transformers
        if native.get(name) == 0:
            native[name] = None
    temperature = native.get("temperature", 0.0)
    for name in sorted(set(options) & FOREIGN_OPTIONS):
        value, neutral = options[name], _NEUTRAL.get(name)
        if name == "do_sample" and value is True and temperature != 0:
            continue  # says the same twice
        empty = value is None or value is False or (isinstance(value, (dict, list, tuple)) and not value)
        if not empty and not (isinstance(value, (int, float)) and value == neutral):
            equivalent = f"; use `{_EQUIVALENTS[name]}` instead" if name in _EQUIVALENTS else ""
            message = f"`{name}` is {value!r:.200}, which masked diffusion does not have: allowed is {neutral!r}"
            raise GenerationOptionError(f"{message}{equivalent}.", name)
    if options.get("do_sample") in (False, 0):
        if temperature not in (0, 1):  # 1 is Transformers' default
            raise GenerationOptionError(
                f"`temperature` is {temperature!r}, but `do_sample` is not True; allowed is temperature=0, or "
                "do_sample=True.",
                "temperature", "do_sample",
            )  # fmt: skip
        native["temperature"] = 0.0
    return native


class LLaDAMedVGenerationConfig(GenerationConfig):
    """Options of [`LLaDAMedVGenerationMixin.generate`], saved as `generation_config.json` and reloaded as this class.

    The options are those of the table in `generation_options_lladamedv.py`.

    Raises:
        GenerationOptionError: for an argument that does not exist or a value that is not allowed. Autoregressive
            options of Transformers are allowed where they ask for nothing, as `do_sample=False`, `num_beams=1` and
            `top_p=1.0` do.
    """

    def __init__(self, **kwargs):
        # `super().__init__` is left out on purpose: it would bring some seventy autoregressive options that would
        # then be accepted and do nothing.
        kwargs.pop("_commit_hash", None)
        self._from_model_config = kwargs.pop("_from_model_config", None)
        native = native_options(kwargs)
        for name, option in OPTIONS.items():
            setattr(self, name, native.get(name, option.default))
        self.validate()

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """From what [`to_dict`] or the file of a configuration holds, also of a plain `GenerationConfig`.

        A plain one samples only with `do_sample`, whatever its `temperature`. All that is saved here has a
        `block_length`, if only `None`.
        """
        if "block_length" not in config_dict and not config_dict.get("do_sample"):
            config_dict = {**config_dict, "do_sample": False}
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_model_config(cls, model_config):
        """Defaults for a model without a `generation_config.json`: its padding and start ids, and nothing else."""
        text_config = model_config.get_text_config()
        return cls(
            bos_token_id=text_config.bos_token_id, pad_token_id=text_config.pad_token_id, _from_model_config=True
        )

    def validate(self, **kwargs):
        """Check every value by itself; what must fit together is checked by `generate`, which knows the prompt."""
        check_options(vars(self))


# The documentation of the options, which `help()` shows; the pages of the documentation have it as a table.
LLaDAMedVGenerationConfig.__doc__ = LLaDAMedVGenerationConfig.__doc__.replace(
    "    Raises:", f"    Args:\n{describe_options(' ' * 8)}\n\n    Raises:"
)


def resolve_generation_config(
    base: GenerationConfig, own: GenerationConfig, given: dict, anew: bool = False
) -> LLaDAMedVGenerationConfig:
    """The options of one call: those that are given over `base`, filled in and checked.

    Args:
        base: the model's own options, or others that were given in their place.
        own: the model's own.
        given: arguments of `generate`.
        anew: whether `base` is given: then its lengths are taken literally.

    Raises:
        GenerationOptionError: for values that are not allowed, or do not go together.
    """
    # Made anew, because anything can have been set on it; what is autoregressive is refused there.
    values = {name: value for name, value in vars(base).items() if not name.startswith("_")}
    options = LLaDAMedVGenerationConfig.from_dict(copy.deepcopy(values))
    given = native_options(given)
    options.update(**given)
    for name in ("bos_token_id", "pad_token_id", "eos_token_id"):
        if getattr(options, name) is None and name not in given and anew:
            setattr(options, name, getattr(own, name))

    length = options.max_new_tokens = options.max_new_tokens or _DEFAULT_MAX_NEW_TOKENS
    inherited = not anew and "max_new_tokens" in given
    if options.block_length is None or (inherited and "block_length" not in given):
        at_most = min(options.block_length or _DEFAULT_BLOCK_LENGTH, length)
        options.block_length = next(size for size in range(at_most, 0, -1) if length % size == 0)
    if length % options.block_length:
        raise GenerationOptionError(
            f"`block_length` is {options.block_length}, which does not divide `max_new_tokens` ({length}); allowed "
            f"are {[size for size in range(1, length + 1) if length % size == 0]}.",
            "block_length", "max_new_tokens",
        )  # fmt: skip
    for name in ("min_new_tokens", "defer_eos", "grow_until_eos_confidence"):
        if getattr(options, name) and options.eos_token_id is None:
            message = f"`{name}` is {getattr(options, name)}, but there is no `eos_token_id`."
            raise GenerationOptionError(message, name)
    if (options.min_new_tokens or 0) > length:
        message = f"`min_new_tokens` is {options.min_new_tokens}; it must be at most `max_new_tokens` ({length})."
        raise GenerationOptionError(message, "min_new_tokens", "max_new_tokens")
    blocks = length // options.block_length
    if options.steps is None:
        options.steps = length
    elif inherited and "steps" not in given:
        per_token = options.steps / (base.max_new_tokens or _DEFAULT_MAX_NEW_TOKENS)
        options.steps = max(1, round(per_token * options.block_length)) * blocks
    if options.steps % blocks:
        raise GenerationOptionError(
            f"`steps` is {options.steps}, which is no multiple of the number of blocks ({blocks} = "
            f"`max_new_tokens` {length} / `block_length` {options.block_length}); allowed are {blocks}, "
            f"{2 * blocks}, …",
            "steps", "max_new_tokens", "block_length",
        )  # fmt: skip
    # The schedule of a block is a table with a row for each number of masks and a column for each step.
    if (options.block_length + 1) * (options.steps // blocks) > _LARGEST_SCHEDULE:
        raise GenerationOptionError(
            f"`steps` is {options.steps}, {options.steps // blocks} for each block of {options.block_length} "
            f"(`block_length`); allowed are at most {_LARGEST_SCHEDULE} as the product of the two.",
            "steps", "block_length", "max_new_tokens",
        )  # fmt: skip
    _check_combinations(options)
    return options


def _check_combinations(options) -> None:
    """What must fit together, once everything is filled in."""
    initial, block = options.initial_canvas_length, options.block_length
    if initial is not None and (initial % block or initial > options.max_new_tokens):
        raise GenerationOptionError(
            f"`initial_canvas_length` is {initial}; allowed are multiples of `block_length` ({block}) up to "
            f"`max_new_tokens` ({options.max_new_tokens}).",
            "initial_canvas_length", "block_length", "max_new_tokens",
        )  # fmt: skip
    if options.grow_until_eos_confidence is not None and initial is None:
        raise GenerationOptionError(
            f"`grow_until_eos_confidence` is {options.grow_until_eos_confidence}, but `initial_canvas_length` is None: "
            "say from which length the canvas grows.",
            "grow_until_eos_confidence", "initial_canvas_length",
        )  # fmt: skip
    for name in ("abstention_threshold", "output_image_reliance"):
        if getattr(options, name) and not options.return_dict_in_generate:
            raise GenerationOptionError(
                f"`{name}` is {getattr(options, name)}; it needs return_dict_in_generate=True: only that output says "
                "what comes of it.",
                name,
            )  # fmt: skip
    if options.no_repeat_ngram_size is not None:
        several = [name for name in ADAPTIVE_RULES if getattr(options, name) is not None]
        if options.steps < options.max_new_tokens:
            several.append("steps")
        if several:
            raise GenerationOptionError(
                f"`no_repeat_ngram_size` is {options.no_repeat_ngram_size} and `{several[0]}` is "
                f"{getattr(options, several[0])}: tokens that are committed in one step do not know of each other. "
                f"Allowed are steps of one token: `steps` of at least `max_new_tokens` ({options.max_new_tokens}) "
                f"and no {', '.join(ADAPTIVE_RULES)}.",
                "no_repeat_ngram_size", several[0],
            )  # fmt: skip


__all__ = ["FOREIGN_OPTIONS", "LLaDAMedVGenerationConfig", "native_options", "resolve_generation_config"]
