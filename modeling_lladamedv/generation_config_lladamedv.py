"""The options of `generate` and `infill`: names, defaults, and what they allow, by themselves and together.

Nothing here needs PyTorch: the command line checks options before it waits for that.
"""

import copy

from transformers import CompileConfig, GenerationConfig

from .commit_rule_configs_lladamedv import (
    CountRuleConfig,
    EntropyBoundRuleConfig,
    FactorRuleConfig,
    ThresholdRuleConfig,
)


CACHE_IMPLEMENTATIONS = ("prefix", "dual")
# Options that replace the schedule, and the rules that they stand for.
ADAPTIVE_RULES = {
    "confidence_threshold": ThresholdRuleConfig,
    "factor": FactorRuleConfig,
    "entropy_bound": EntropyBoundRuleConfig,
}


_LARGEST_COUNT = 2**20  # beyond every context
_LARGEST_SCHEDULE = 2**28  # counts of a block's schedule, of 8 bytes each
_DEFAULT_MAX_NEW_TOKENS = 256
_DEFAULT_BLOCK_LENGTH = 64
_DEFAULTS = {
    "max_new_tokens": None, "block_length": None, "steps": None, "initial_canvas_length": None, "suffix_blocks": None,
    "temperature": 0.0, "cfg_scale": 0.0, "remasking": "low_confidence", "schedule_shift": None,
    "confidence_threshold": None, "factor": None, "entropy_bound": None, "use_cache": False,
    "cache_implementation": None, "cache_refresh_interval": None, "cache_drift_bound": None,
    "output_cache_drift": False, "compile_config": None, "suppress_tokens": None, "repetition_penalty": 1.0,
    "no_repeat_ngram_size": None, "stop_strings": None, "min_new_tokens": None, "defer_eos": False,
    "generation_suffix": None, "confidence_temperature": 1.0, "abstention_threshold": None, "output_history": False,
    "return_dict_in_generate": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    "transformers_version": None,
}  # fmt: skip
# What Transformers' autoregressive `generate` takes besides …
FOREIGN_OPTIONS = {
    *vars(GenerationConfig()), "assistant_model", "custom_generate", "inputs", "logits_processor",
    "negative_prompt_attention_mask", "negative_prompt_ids", "prefix_allowed_tokens_fn", "stopping_criteria",
    "synced_gpus", "inputs_embeds", "past_key_values", "position_ids", "token_type_ids",
} - {*_DEFAULTS}  # fmt: skip
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
        ValueError: for an option that does not exist, or an autoregressive one that asks for something.
    """
    unknown = sorted(set(options) - {*_DEFAULTS} - FOREIGN_OPTIONS)
    if unknown:
        raise ValueError(f"Unknown generation arguments {unknown}; allowed are {sorted(_DEFAULTS)}.")
    # Numbers of NumPy and PyTorch are as good as Python's, for a file, too.
    options = {
        name: value.tolist() if callable(getattr(value, "tolist", None)) else value
        for name, value in options.items()
    }
    native = {name: options[name] for name in _DEFAULTS if name in options}
    native = {name: value for name, value in native.items() if value is not None or _DEFAULTS[name] is None}
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
            raise ValueError(
                f"`{name}` is {value!r:.200}, which masked diffusion does not have: allowed is {neutral!r}{equivalent}."
            )
    if options.get("do_sample") in (False, 0):
        if temperature not in (0, 1):  # 1 is Transformers' default
            raise ValueError(
                f"`temperature` is {temperature!r}, but `do_sample` is not True; allowed is temperature=0, or "
                "do_sample=True."
            )
        native["temperature"] = 0.0
    return native


class LLaDAMedVGenerationConfig(GenerationConfig):
    """Options of [`LLaDAMedVGenerationMixin.generate`], saved as `generation_config.json` and reloaded as this class.

    Args:
        max_new_tokens (`int`, *optional*):
            Length of the canvas of masks that is denoised, in tokens; 256 if unset.
        block_length (`int`, *optional*):
            Tokens per block; blocks are denoised left to right. Must divide `max_new_tokens`. If unset, the largest
            divisor of `max_new_tokens` that is at most 64.
        steps (`int`, *optional*):
            Denoising steps (forward passes) for the whole canvas; must be a multiple of the number of blocks. If
            unset, one per token.
        initial_canvas_length (`int`, *optional*):
            Begin with a canvas of this length, a multiple of `block_length`, and make it a block longer whenever it is
            full and no end has appeared, up to `max_new_tokens`. If unset, the canvas has its full length at once.
        suffix_blocks (`int`, *optional*):
            Keep only this many blocks of masks right of the current one in the row and drop the rest (DPad, arXiv
            2508.14148): an approximation, and faster for long canvases. If unset, all are kept.
        temperature (`float`, *optional*, defaults to 0.0):
            Strength of the Gumbel noise on the logits; 0 is greedy. `do_sample=False` means 0.
        cfg_scale (`float`, *optional*, defaults to 0.0):
            Strength of the classifier-free guidance `u + (cfg_scale + 1) * (c - u)`; 0 is off. It doubles the work.
        remasking (`str`, *optional*, defaults to `"low_confidence"`):
            Which masked tokens stay masked at each step: those of the lowest probability (`"low_confidence"`), of the
            smallest lead over the second-best token (`"margin"`), of the highest entropy (`"entropy"`), or `"random"`
            ones. See `CountRuleConfig` in `commit_rule_configs_lladamedv.py`, and there for the next four.
        schedule_shift (`float`, *optional*):
            LaViDa's α: below 1 commits more tokens in a block's early steps, above 1 in its late ones.
        confidence_threshold (`float`, *optional*):
            Instead of the fixed number of tokens per step, commit every token of the block at least this probable,
            and always the most probable one (Fast-dLLM, arXiv 2505.22618). In (0, 1].
        factor (`float`, *optional*):
            Instead of that, commit the r most probable tokens while the r-th has at least 1 - factor / (r + 1).
        entropy_bound (`float`, *optional*):
            Instead of that, commit the most certain tokens while the sum of their entropies (in nats, without the
            largest) is at most this.
        use_cache (`bool`, *optional*, defaults to `False`):
            Whether steps after a block's first run only a part of the row, on cached states of the rest. Much faster,
            and an approximation: the cached states do not see the tokens committed since.
        cache_implementation (`str`, *optional*):
            With `use_cache`: `"dual"` (the default there) runs the block alone, `"prefix"` the block and everything
            right of it (Fast-dLLM, arXiv 2505.22618).
        cache_refresh_interval (`int`, *optional*):
            With `use_cache`: run the whole row again after this many steps within a block too, not only when a block
            begins. With 1 nothing is approximated.
        cache_drift_bound (`float`, *optional*):
            With `use_cache`: let each row find its own refresh interval. Whenever its states are refreshed, the drift
            is measured: the KL divergence, in nats, of the cached from the exact distributions, averaged over the
            candidates. Above the bound the interval is halved, otherwise doubled. It starts at
            `cache_refresh_interval`, or else at 4.
        output_cache_drift (`bool`, *optional*, defaults to `False`):
            With `use_cache`: whether to measure the drift at every step, which costs a whole pass each, and to return
            it. The answer stays what it is without.
        compile_config (`CompileConfig`, *optional*):
            Compile the language model with these options of `torch.compile`. Shapes stay the same from block to block
            without a cache and with the dual one; not saved with the model.
        suppress_tokens (`list[int]`, *optional*):
            Ids that are never proposed. If unset, the mask token alone; a list that leaves the mask token out lets
            the model propose it, and such a position stays masked, possibly to the end.
        repetition_penalty (`float`, *optional*, defaults to 1.0):
            Divides the positive and multiplies the negative logits of ids that the prompt or the committed part of
            the canvas holds (Transformers' `RepetitionPenaltyLogitsProcessor`); 1 is off.
        no_repeat_ngram_size (`int`, *optional*):
            No run of this many tokens occurs twice in the answer. Needs steps that commit one token each, because
            tokens that are committed together do not know of each other.
        stop_strings (`str` or `list[str]`, *optional*):
            Texts that end the answer; they need the `tokenizer=` argument of `generate`. Each is looked for as the
            tokens that it becomes by itself, as in the authors' code: " x" and "x" are two texts.
        eos_token_id (`int` or `list[int]`, *optional*):
            Ids that end the answer. LLaDA-MedV ends a turn with `<|eot_id|>`.
        min_new_tokens (`int`, *optional*):
            Places at the start of the canvas where no token of `eos_token_id` is proposed, as in Transformers. With
            `max_new_tokens` the answer has exactly that length.
        defer_eos (`bool`, *optional*, defaults to `False`):
            Whether places for which an end or padding token (`eos_token_id`, `pad_token_id`) is proposed are committed
            after all others of the step, at every temperature: the cure of LLaDA's authors (`confidence_eos_eot_inf`)
            for answers that end too early, because models trained on padded answers are surest of their end.
        generation_suffix (`str`, *optional*):
            Fixed text after the canvas, seen from the first step on and appended to the answer; it needs `tokenizer=`.
        confidence_temperature (`float`, *optional*, defaults to 1.0):
            Calibrates the confidence of answers (not of tokens), see `fit_confidence_temperature`; 1 is off.
        abstention_threshold (`float`, *optional*):
            Mark answers of a lower (calibrated) confidence as `abstained`; needs `return_dict_in_generate`. In (0, 1].
        output_history (`bool`, *optional*, defaults to `False`):
            Whether to return the canvas after every forward pass.
        return_dict_in_generate (`bool`, *optional*, defaults to `False`):
            Whether to return a [`LLaDAMedVGenerationOutput`] instead of the sequences alone.
        pad_token_id, bos_token_id (`int`, *optional*): as in Transformers.

    Raises:
        ValueError: for an argument that does not exist or a value that is not allowed. Autoregressive options of
            Transformers are allowed where they ask for nothing, as `do_sample=False`, `num_beams=1` and `top_p=1.0` do.
    """

    def __init__(self, **kwargs):
        # `super().__init__` is left out on purpose: it would bring some seventy autoregressive options that would
        # then be accepted and do nothing.
        kwargs.pop("_commit_hash", None)
        self._from_model_config = kwargs.pop("_from_model_config", None)
        for name, value in {**_DEFAULTS, **native_options(kwargs)}.items():
            setattr(self, name, value)
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

    def commit_rule_config(self):
        """The config dataclass of the commit rule that the options ask for.

        Raises:
            ValueError: for a value that is not allowed, or options that exclude each other.
        """
        adaptive = [name for name in ADAPTIVE_RULES if getattr(self, name) is not None]
        counts = CountRuleConfig(self.remasking, self.schedule_shift)
        if not adaptive:
            return counts
        name, value = adaptive[0], getattr(self, adaptive[0])
        rule = ADAPTIVE_RULES[name](value)
        if len(adaptive) > 1:
            other = getattr(self, adaptive[1])
            raise ValueError(
                f"`{name}` is {value} and `{adaptive[1]}` is {other}; each is a rule of its own: only one is allowed."
            )
        if self.remasking != "low_confidence":
            raise ValueError(
                f"`{name}` cannot be combined with remasking={self.remasking!r}, which it does not rank by; use "
                "remasking='low_confidence'."
            )
        if self.schedule_shift is not None:
            raise ValueError(
                f"`schedule_shift` is {self.schedule_shift}, but with `{name}` no schedule counts the tokens; it must "
                "be None."
            )
        return rule

    def validate(self, **kwargs):
        """Check every value by itself; what must fit together is checked by `generate`, which knows the prompt."""
        counts = (
            "max_new_tokens", "min_new_tokens", "block_length", "steps", "initial_canvas_length",
            "cache_refresh_interval", "no_repeat_ngram_size",
        )  # fmt: skip
        for name, least in [*((name, 1) for name in counts), ("suffix_blocks", 0)]:
            value = getattr(self, name)
            if value is not None and not (_is_whole(value) and least <= value <= _LARGEST_COUNT):
                raise ValueError(
                    f"`{name}` is {value!r:.200}; allowed are whole numbers of at least {least}, at most "
                    f"{_LARGEST_COUNT}."
                )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens"):
            value = getattr(self, name)
            several = isinstance(value, (list, tuple)) and name in ("eos_token_id", "suppress_tokens")
            tokens = [] if value is None else value if several else [value]
            if not all(_is_whole(token) and token >= 0 for token in tokens):
                raise ValueError(f"`{name}` is {value!r:.200}; allowed are ids, whole numbers of at least 0.")
        for name in ("stop_strings", "generation_suffix"):
            value = getattr(self, name)
            several = value if isinstance(value, (list, tuple)) and name == "stop_strings" else [value or ""]
            if not all(isinstance(text, str) for text in several):
                what = "a text or a list of texts" if name == "stop_strings" else "a text"
                raise ValueError(f"`{name}` is {value!r:.200}; allowed is {what}.")
        for name in ("temperature", "cfg_scale"):
            if not _is_number(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; allowed are finite numbers of at least 0.")
        for name in ("repetition_penalty", "confidence_temperature", "cache_drift_bound", "abstention_threshold"):
            value = getattr(self, name)
            top = 1 if name == "abstention_threshold" else float("inf")
            if value is not None and not (_is_number(value) and 0 < value <= top):
                allowed = "numbers in (0, 1]" if top == 1 else "finite numbers above 0"
                raise ValueError(f"`{name}` is {value!r}; allowed are {allowed}.")
        self.commit_rule_config()
        if self.cache_implementation not in (None, *CACHE_IMPLEMENTATIONS):
            raise ValueError(
                f"`cache_implementation` is {self.cache_implementation!r}; allowed are "
                f"{' and '.join(CACHE_IMPLEMENTATIONS)}."
            )
        for name in ("cache_implementation", "cache_refresh_interval", "cache_drift_bound", "output_cache_drift"):
            if getattr(self, name) and not self.use_cache:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, which is allowed with use_cache=True only.")
        for name in ("use_cache", "output_cache_drift", "defer_eos", "output_history", "return_dict_in_generate"):
            if not isinstance(getattr(self, name), (bool, type(None))):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; allowed are True and False.")
        if not isinstance(self.compile_config, (CompileConfig, type(None))):
            raise ValueError(f"`compile_config` is {self.compile_config!r}; allowed is a transformers.CompileConfig.")


def complete_options(
    base: GenerationConfig, own: GenerationConfig, given: dict, anew: bool = False
) -> LLaDAMedVGenerationConfig:
    """The options of one call: those that are given over `base`, filled in and checked.

    Args:
        base: the model's own options, or others that were given in their place.
        own: the model's own.
        given: arguments of `generate`.
        anew: whether `base` is given: then its lengths are taken literally.

    Raises:
        ValueError: for values that are not allowed, or do not go together.
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
        raise ValueError(
            f"`block_length` is {options.block_length}, which does not divide `max_new_tokens` ({length}); allowed "
            f"are {[size for size in range(1, length + 1) if length % size == 0]}."
        )
    for name in ("min_new_tokens", "defer_eos"):
        if getattr(options, name) and options.eos_token_id is None:
            raise ValueError(f"`{name}` is {getattr(options, name)}, but there is no `eos_token_id` to hold back.")
    if (options.min_new_tokens or 0) > length:
        raise ValueError(
            f"`min_new_tokens` is {options.min_new_tokens}; it must be at most `max_new_tokens` ({length})."
        )
    blocks = length // options.block_length
    if options.steps is None:
        options.steps = length
    elif inherited and "steps" not in given:
        per_token = options.steps / (base.max_new_tokens or _DEFAULT_MAX_NEW_TOKENS)
        options.steps = max(1, round(per_token * options.block_length)) * blocks
    if options.steps % blocks:
        raise ValueError(
            f"`steps` is {options.steps}, which is no multiple of the number of blocks ({blocks} = "
            f"`max_new_tokens` {length} / `block_length` {options.block_length}); allowed are {blocks}, "
            f"{2 * blocks}, …"
        )
    # The schedule of a block is a table with a row for each number of masks and a column for each step.
    if (options.block_length + 1) * (options.steps // blocks) > _LARGEST_SCHEDULE:
        raise ValueError(
            f"`steps` is {options.steps}, {options.steps // blocks} for each block of {options.block_length} "
            f"(`block_length`); allowed are at most {_LARGEST_SCHEDULE} as the product of the two."
        )
    _check_combinations(options)
    return options


def _check_combinations(options) -> None:
    """What must fit together, once everything is filled in."""
    initial, block = options.initial_canvas_length, options.block_length
    if initial is not None and (initial % block or initial > options.max_new_tokens):
        raise ValueError(
            f"`initial_canvas_length` is {initial}; allowed are multiples of `block_length` ({block}) up to "
            f"`max_new_tokens` ({options.max_new_tokens})."
        )
    if options.abstention_threshold is not None and not options.return_dict_in_generate:
        raise ValueError(
            f"`abstention_threshold` is {options.abstention_threshold}; it needs return_dict_in_generate=True, or "
            "nobody would see which answers are below it."
        )
    if options.no_repeat_ngram_size is not None:
        several = [name for name in ADAPTIVE_RULES if getattr(options, name) is not None]
        if options.steps < options.max_new_tokens:
            several.append("steps")
        if several:
            raise ValueError(
                f"`no_repeat_ngram_size` is {options.no_repeat_ngram_size} and `{several[0]}` is "
                f"{getattr(options, several[0])}: tokens that are committed in one step do not know of each other. "
                f"Allowed are steps of one token: `steps` of at least `max_new_tokens` ({options.max_new_tokens}) "
                f"and no {', '.join(ADAPTIVE_RULES)}."
            )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


__all__ = ["LLaDAMedVGenerationConfig"]
