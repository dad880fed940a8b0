"""Denoising an answer: the semi-autoregressive masked-diffusion loop of LLaDA, for any batch size.

`LLaDAMedVGenerationMixin.generate` is the whole loop; its docstring sketches it in numbered steps and the code carries
the same numbers. Sources: LLaDA (arXiv 2502.09992, algorithms 4 and 5), LLaDA-MedV (arXiv 2508.01617).
"""

import copy
from dataclasses import dataclass

import torch
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from .commit_rules_lladamedv import (
    CandidateScores,
    CountRuleConfig,
    EntropyBoundRuleConfig,
    FactorRuleConfig,
    ThresholdRuleConfig,
    build_commit_rule,
    commit_schedule,
)
from .denoising_cache_lladamedv import CACHE_IMPLEMENTATIONS, DenoisingCache


# Options that replace the schedule, and the rules that they stand for.
_ADAPTIVE_RULES = {
    "confidence_threshold": ThresholdRuleConfig,
    "factor": FactorRuleConfig,
    "entropy_bound": EntropyBoundRuleConfig,
}
_DEFAULT_MAX_NEW_TOKENS = 256
_DEFAULT_BLOCK_LENGTH = 64
# Logits that are turned into float64 at a time: exactness where it counts, without a second copy of them all. On a CPU
# what fits into its cache, on a GPU what keeps it busy.
_FLOAT64_ELEMENTS_CPU = 2**18
_FLOAT64_ELEMENTS_GPU = 2**24


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
        temperature (`float`, *optional*, defaults to 0.0):
            Strength of the Gumbel noise on the logits; 0 is greedy.
        cfg_scale (`float`, *optional*, defaults to 0.0):
            Strength of the classifier-free guidance `u + (cfg_scale + 1) * (c - u)`; 0 is off. It doubles the work.
        remasking (`str`, *optional*, defaults to `"low_confidence"`):
            Which masked tokens stay masked at each step: those of the lowest probability (`"low_confidence"`), of the
            smallest lead over the second-best token (`"margin"`), of the highest entropy (`"entropy"`), or `"random"`
            ones. See `CountRuleConfig` in `commit_rules_lladamedv.py`, and there for the next four.
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
        suppress_tokens (`list[int]`, *optional*):
            Ids that are never proposed. If unset, the mask token alone; a list that leaves the mask token out lets
            the model propose it, and such a position stays masked, possibly to the end.
        stop_strings (`str` or `list[str]`, *optional*):
            Texts that end the answer; they need the `tokenizer=` argument of `generate`.
        eos_token_id (`int` or `list[int]`, *optional*):
            Ids that end the answer. LLaDA-MedV ends a turn with `<|eot_id|>`.
        min_new_tokens (`int`, *optional*):
            Places at the start of the canvas where no token of `eos_token_id` is proposed, as in Transformers.
        defer_eos (`bool`, *optional*, defaults to `False`):
            Whether places for which an end or padding token (`eos_token_id`, `pad_token_id`) is proposed are committed
            after all others of the step, at every temperature: the cure of LLaDA's authors (`confidence_eos_eot_inf`)
            for answers that end too early, because models trained on padded answers are surest of their end.
        generation_suffix (`str`, *optional*):
            Fixed text after the canvas, seen from the first step on and appended to the answer; it needs `tokenizer=`.
        output_history (`bool`, *optional*, defaults to `False`):
            Whether to return the canvas after every forward pass.
        return_dict_in_generate (`bool`, *optional*, defaults to `False`):
            Whether to return a [`LLaDAMedVGenerationOutput`] instead of the sequences alone.
        pad_token_id, bos_token_id (`int`, *optional*): as in Transformers.

    Raises:
        ValueError: for an argument that does not exist or a value that is not allowed.
    """

    def __init__(self, **kwargs):
        # `super().__init__` is left out on purpose: it would bring some seventy autoregressive options that would
        # then be accepted and do nothing.
        self.max_new_tokens = kwargs.pop("max_new_tokens", None)
        self.block_length = kwargs.pop("block_length", None)
        self.steps = kwargs.pop("steps", None)
        self.temperature = kwargs.pop("temperature", 0.0)
        self.cfg_scale = kwargs.pop("cfg_scale", 0.0)
        self.remasking = kwargs.pop("remasking", "low_confidence")
        self.schedule_shift = kwargs.pop("schedule_shift", None)
        self.confidence_threshold = kwargs.pop("confidence_threshold", None)
        self.factor = kwargs.pop("factor", None)
        self.entropy_bound = kwargs.pop("entropy_bound", None)
        self.use_cache = kwargs.pop("use_cache", False)
        self.cache_implementation = kwargs.pop("cache_implementation", None)
        self.cache_refresh_interval = kwargs.pop("cache_refresh_interval", None)
        self.suppress_tokens = kwargs.pop("suppress_tokens", None)
        self.stop_strings = kwargs.pop("stop_strings", None)
        self.min_new_tokens = kwargs.pop("min_new_tokens", None)
        self.defer_eos = kwargs.pop("defer_eos", False)
        self.generation_suffix = kwargs.pop("generation_suffix", None)
        self.output_history = kwargs.pop("output_history", False)
        self.return_dict_in_generate = kwargs.pop("return_dict_in_generate", False)
        self.bos_token_id = kwargs.pop("bos_token_id", None)
        self.eos_token_id = kwargs.pop("eos_token_id", None)
        self.pad_token_id = kwargs.pop("pad_token_id", None)
        self._commit_hash = kwargs.pop("_commit_hash", None)
        self._from_model_config = kwargs.pop("_from_model_config", None)
        self.transformers_version = kwargs.pop("transformers_version", None)
        if kwargs:
            raise ValueError(
                f"Unknown generation arguments {sorted(kwargs)}; allowed are "
                f"{sorted(name for name in self.__dict__ if not name.startswith('_'))}."
            )
        self.validate()

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
        adaptive = [name for name in _ADAPTIVE_RULES if getattr(self, name) is not None]
        counts = CountRuleConfig(self.remasking, self.schedule_shift)
        if not adaptive:
            return counts
        name, value = adaptive[0], getattr(self, adaptive[0])
        rule = _ADAPTIVE_RULES[name](value)
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
        for name in ("max_new_tokens", "min_new_tokens", "block_length", "steps", "cache_refresh_interval"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` is {value!r}; allowed are whole numbers of at least 1.")
        for name in ("temperature", "cfg_scale"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ValueError(f"`{name}` is {value!r}; allowed are finite numbers of at least 0.")
        self.commit_rule_config()
        if self.cache_implementation not in (None, *CACHE_IMPLEMENTATIONS):
            raise ValueError(
                f"`cache_implementation` is {self.cache_implementation!r}; allowed are {CACHE_IMPLEMENTATIONS}."
            )
        for name in ("cache_implementation", "cache_refresh_interval"):
            if getattr(self, name) is not None and not self.use_cache:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, which is allowed with use_cache=True only.")
        for name in ("use_cache", "defer_eos", "output_history", "return_dict_in_generate"):
            if not isinstance(getattr(self, name), (bool, type(None))):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; allowed are True and False.")


@dataclass
class LLaDAMedVGenerationOutput(ModelOutput):
    """What `generate(..., return_dict_in_generate=True)` returns.

    Args:
        sequences (`torch.LongTensor` of shape `(batch, prompt + longest answer)`):
            Prompt and answer; answers end before their stop sequence and are padded on the right.
        tokens_per_forward (`torch.FloatTensor` of shape `(batch,)`):
            Tokens of the answer per forward pass that the row took part in.
        num_forwards (`torch.LongTensor` of shape `(batch,)`):
            Forward passes that the row took part in.
        num_full_forwards (`torch.LongTensor` of shape `(batch,)`):
            Those of them that ran the whole row; with `use_cache` the others ran a part of it.
        commit_confidence (`torch.DoubleTensor` of shape `(batch, max_new_tokens)`):
            Probability of each canvas token when it was committed; NaN where none was.
        commit_step (`torch.LongTensor` of shape `(batch, max_new_tokens)`):
            Forward pass, from 0, at which each canvas token was committed; -1 where none was.
        history (`torch.LongTensor` of shape `(forward passes, batch, max_new_tokens)`, *optional*):
            The canvas after every forward pass, with `output_history=True`.
    """

    sequences: torch.LongTensor = None
    tokens_per_forward: torch.FloatTensor = None
    num_forwards: torch.LongTensor = None
    num_full_forwards: torch.LongTensor = None
    commit_confidence: torch.DoubleTensor = None
    commit_step: torch.LongTensor = None
    history: torch.LongTensor | None = None


class LLaDAMedVGenerationMixin:
    """`generate` for a model whose `forward` is bidirectional and whose config has a `mask_token_id`."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor | None = None,
        generation_config: LLaDAMedVGenerationConfig | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        batch_num_images: torch.LongTensor | None = None,
        streamer=None,
        tokenizer=None,
        **kwargs,
    ) -> torch.LongTensor | LLaDAMedVGenerationOutput:
        """Denoise one answer per prompt.

        ```
        0. Check the arguments, embed the prompts and lay a canvas of masks (and the fixed suffix) behind each.
        1. While a row is unfinished, one forward pass over all unfinished rows:
            a. Find the candidates: masked positions up to the end of the row's block and left of its stop.
            b. Compute logits at the candidates only, guided if asked for. With a cache, rows that need no refresh run
               only their block, or what begins with it.
            c. Propose a token for each candidate, and its confidence.
            d. Commit what the rule keeps: by default the k most confident proposals, k from the block's schedule.
            e. Look for a stop sequence, and move on to the next block, or finish the row.
        2. Cut every answer at its stop and append the suffix.
        ```
        Every row keeps its own block and step, so a row is denoised in the same order whatever it is batched with.
        Within a block with m masks and s steps, m // s tokens are committed per step, one more in the first m % s; a
        block whose masks are used up is left early.

        Args:
            input_ids (`(batch, prompt)`): prompts, padded on either side if `attention_mask` says so.
            generation_config: options to use instead of the model's own; keyword arguments override either.
            attention_mask (`(batch, prompt)`, *optional*): 1 for tokens, 0 for padding.
            pixel_values, image_sizes, batch_num_images: as the processor returns them.
            streamer: a `TextStreamer`, `TextIteratorStreamer` or `TextDiffusionStreamer` of Transformers, or anything
                with `put` and `end`. It gets the prompt, then each finished block as a 1-D tensor, and, where it has
                `put_draft`, the unfinished rest of the canvas after every forward pass. Batch size 1 only.
            tokenizer: needed for `stop_strings` and `generation_suffix`.
            kwargs: the fields of [`LLaDAMedVGenerationConfig`].

        Returns:
            `torch.LongTensor` `(batch, prompt + longest answer)`, or a [`LLaDAMedVGenerationOutput`] with
            `return_dict_in_generate=True`.

        Raises:
            ValueError: before the first forward pass, for unknown arguments, values that are not allowed, a
                `max_new_tokens` that `block_length` does not divide, `steps` that are no multiple of the number of
                blocks, a row longer than the model's context, or a prompt that is empty or holds the mask token.
        """
        # 0. Check the arguments, embed the prompts and lay a canvas of masks (and the fixed suffix) behind each.
        options = self._prepare_generation_config(generation_config, **kwargs)
        stops = self._prepare_stop_sequences(options, tokenizer)
        suffix = self._prepare_suffix(options, tokenizer)
        attention_mask = self._check_prompt(input_ids, attention_mask, options, len(suffix))
        if streamer is not None and len(input_ids) > 1:
            raise ValueError(f"`streamer` works with one prompt; `input_ids` holds {len(input_ids)}.")
        state = _DenoisingState(self, options, input_ids, attention_mask, suffix, stops)
        state.prompt_embeds, _ = self.model.get_multimodal_embeddings(
            input_ids, pixel_values, image_sizes, batch_num_images
        )
        if options.use_cache:
            num_rows = len(input_ids) * (2 if options.cfg_scale > 0 else 1)
            row_length = input_ids.shape[1] + options.max_new_tokens + len(suffix)
            num_layers = self.config.get_text_config().num_hidden_layers
            state.cache = DenoisingCache(num_layers, num_rows, row_length)
        if streamer is not None:
            streamer.put(input_ids.cpu())

        # 1. While a row is unfinished, one forward pass over all unfinished rows:
        history = []
        streamed = 0
        while state.rows.numel():
            self._denoising_step(state, options)
            if options.output_history:
                history.append(state.canvas.clone())
            if streamer is not None:
                streamed = self._stream(streamer, state, streamed, suffix)

        # 2. Cut every answer at its stop and append the suffix.
        answers = [torch.cat([canvas[:stop], suffix]) for canvas, stop in zip(state.canvas, state.stop.tolist())]
        padding = options.pad_token_id if options.pad_token_id is not None else 0
        padded = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=padding)
        sequences = torch.cat([input_ids, padded], dim=1)
        if streamer is not None:
            streamer.end()
        if not options.return_dict_in_generate:
            return sequences
        return LLaDAMedVGenerationOutput(
            sequences=sequences,
            tokens_per_forward=state.stop / state.num_forwards,
            num_forwards=state.num_forwards,
            num_full_forwards=state.num_full_forwards,
            commit_confidence=state.commit_confidence,
            commit_step=state.commit_step,
            history=torch.stack(history) if options.output_history else None,
        )

    def _denoising_step(self, state: "_DenoisingState", options: LLaDAMedVGenerationConfig) -> None:
        """One forward pass: steps 1.a to 1.e of [`generate`]."""
        rows = state.rows
        canvas = state.canvas[rows]  # (rows, canvas)

        # 1.a. Find the candidates: masked positions up to the end of the row's block and left of its stop.
        limit = torch.minimum(state.block_end[rows], state.stop[rows])
        candidates = (canvas == state.mask_token_id) & (state.positions < limit[:, None])
        passes = state.plan_passes(options)
        for part, start in passes:
            if start is not None:  # what a partial pass does not run has no logits
                candidates[part] &= state.positions >= start[:, None]

        # 1.b. Compute logits at the candidates only, guided if asked for. With a cache, rows that need no refresh run
        # only their block, or what begins with it.
        parts = [self._candidate_logits(state, part, start, candidates[part], options) for part, start in passes]
        logits = parts[0]
        if len(parts) > 1:
            owner = torch.empty(len(rows), dtype=torch.long, device=rows.device)
            for number, (part, _) in enumerate(passes):
                owner[part] = number
            owner = owner[:, None].expand_as(candidates)[candidates]
            logits = torch.empty(len(owner), logits.shape[-1], dtype=logits.dtype, device=logits.device)
            for number, values in enumerate(parts):
                logits[owner == number] = values
        logits[:, state.suppressed] = float("-inf")
        if options.min_new_tokens is not None:
            early = (state.positions < options.min_new_tokens).expand_as(candidates)[candidates]
            logits[early.nonzero(), state.eos] = float("-inf")

        # 1.c. Propose a token for each candidate, and its confidence.
        tokens, values = self._propose(logits, options.temperature, state.rule.needs)
        proposed = canvas.masked_scatter(candidates, tokens)
        empty = torch.zeros(canvas.shape, dtype=torch.float64, device=canvas.device)
        scores = CandidateScores(**{name: empty.masked_scatter(candidates, value) for name, value in values.items()})
        if "noise" in state.rule.needs:
            scores.noise = self._random_scores(canvas)

        # 1.d. Commit what the rule keeps: by default the k most confident proposals, k from the block's schedule.
        confidence = scores.confidence
        if options.defer_eos:
            scores = scores.defer(torch.isin(proposed, state.deferred))
        committed = state.rule(candidates, scores, state.tokens_to_commit())
        state.commit(committed, proposed, confidence)

        # 1.e. Look for a stop sequence, and move on to the next block, or finish the row.
        state.find_stops()
        state.advance()

    def _candidate_logits(self, state, part, start, candidates, options):
        """Logits in at least float32 at the candidates of one pass, `(number of candidates, vocabulary)`.

        Args:
            part: which of the unfinished rows the pass runs.
            start: for each, where in its canvas a partial pass begins; `None` for a full pass.
            candidates: `(rows of the pass, canvas)`.
        """
        rows = state.rows[part]
        embed = self.get_input_embeddings()
        prompt_mask, prompt_length = state.prompt_mask[rows], state.prompt_mask.shape[1]
        row_ids = torch.cat([state.canvas[rows], state.suffix.expand(len(rows), -1)], dim=1)
        row_mask = torch.cat([prompt_mask, torch.ones_like(row_ids)], dim=1)
        position_ids = (row_mask.cumsum(dim=1) - 1).clamp(min=0)  # a row's padding is not counted
        keep = torch.nn.functional.pad(candidates, (prompt_length, len(state.suffix)))  # (rows, row length)
        if start is None:
            state.num_full_forwards[rows] += 1
            places = None
            row_embeds = embed(row_ids)
            inputs_embeds = torch.cat([state.prompt_embeds[rows], row_embeds], dim=1)
        else:
            # All rows of the pass run equally many positions: one block, or in the same block all that is left.
            dual = options.cache_implementation != "prefix"
            width = options.block_length if dual else row_ids.shape[1] - int(start[0])
            places = start[:, None] + torch.arange(width, device=rows.device)  # (rows, width), within the canvas
            inputs_embeds = embed(row_ids.gather(1, places))
            places = places + prompt_length
            position_ids, keep = position_ids.gather(1, places), keep.gather(1, places)
        if options.cfg_scale > 0:
            # The unconditional row has the same length, with a mask for every prompt token.
            blank = inputs_embeds
            if start is None:
                blank = torch.cat([embed(torch.full_like(prompt_mask, state.mask_token_id)), row_embeds], dim=1)
            inputs_embeds = torch.cat([inputs_embeds, blank])
            row_mask, position_ids, keep = (each.repeat(2, 1) for each in (row_mask, position_ids, keep))
            places = None if places is None else places.repeat(2, 1)
            rows = torch.cat([rows, rows + len(state.canvas)])
        cache = state.cache.select(rows, places) if options.use_cache else None
        attention_mask = None if state.unpadded else row_mask
        logits = self(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            logits_to_keep=keep,
        ).logits
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        if options.cfg_scale > 0:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + (options.cfg_scale + 1) * (conditional - unconditional)
        return logits

    @staticmethod
    def _propose(logits, temperature, needs=()):
        """Proposed tokens `(candidates,)`, and what is known of them by its name in [`CandidateScores`].

        Float64, because float32 probabilities near 1 tie and low-precision Gumbel noise is biased (arXiv 2409.02908),
        a few rows at a time, because a float64 copy of all logits is large.
        """
        tokens, values = [], {name: [] for name in ("confidence", *needs) if name != "noise"}
        elements = _FLOAT64_ELEMENTS_CPU if logits.device.type == "cpu" else _FLOAT64_ELEMENTS_GPU
        for part in logits.split(max(1, elements // logits.shape[-1])):
            part = part.double()
            noised = part
            if temperature > 0:
                # argmax of exp(logits) / (-log u)^temperature, taken in the logarithm
                noised = part - temperature * torch.rand_like(part).log_().neg_().log_()
            token = noised.argmax(dim=-1, keepdim=True)
            tokens.append(token.squeeze(-1))
            normalizer = part.logsumexp(dim=-1, keepdim=True)
            values["confidence"].append((part.gather(-1, token) - normalizer).exp().squeeze(-1))
            if "margin" in values:
                first, second = (part.topk(2, dim=-1).values - normalizer).exp().unbind(dim=-1)
                values["margin"].append(first - second)
            if "entropy" in values:
                values["entropy"].append(torch.special.entr((part - normalizer).exp()).sum(dim=-1))
        return torch.cat(tokens), {name: torch.cat(parts) for name, parts in values.items()}

    @staticmethod
    def _random_scores(canvas):
        """Uniform scores `(rows, canvas)` for `remasking="random"`."""
        return torch.rand(canvas.shape, dtype=torch.float64, device=canvas.device)

    @staticmethod
    def _stream(streamer, state, streamed, suffix):
        """Hand finished blocks to the streamer, and the rest as a draft; returns how much of the canvas is out."""
        finished = not state.rows.numel()
        stop = int(state.stop[0])
        ready = stop if finished else min(stop, int(state.block[0]) * state.block_length)
        canvas = state.canvas[0].cpu().clone()  # a streamer may keep what it gets; the canvas goes on changing
        if hasattr(streamer, "put_draft") and not finished:
            streamer.put_draft(canvas[None, max(streamed, ready) : stop])
        if ready > streamed:
            streamer.put(canvas[streamed:ready])
        if finished and len(suffix):
            streamer.put(suffix.cpu())
        return max(streamed, ready)

    def _prepare_generation_config(self, generation_config, **kwargs) -> LLaDAMedVGenerationConfig:
        """The call's options: keyword arguments over `generation_config` over the model's own, filled in and checked.

        What the caller sets is taken literally. A block length or step count that comes from the checkpoint is fitted
        to a `max_new_tokens` from the caller: the largest fitting block, the same number of steps per token.
        """
        base = generation_config if generation_config is not None else self.generation_config
        if not hasattr(base, "block_length"):  # no isinstance: remote code has its own copy of the class
            raise ValueError(
                f"`generation_config` is a {type(base).__name__}; allowed is a LLaDAMedVGenerationConfig, because "
                "autoregressive options mean nothing here."
            )
        options = copy.deepcopy(base)
        known = sorted(name for name in options.__dict__ if not name.startswith("_"))
        unknown = sorted(set(kwargs) - set(known))
        if unknown:
            raise ValueError(f"Unknown generation arguments {unknown}; allowed are {known}.")
        options.update(**kwargs)
        for name in ("bos_token_id", "pad_token_id", "eos_token_id"):
            if getattr(options, name) is None and name not in kwargs and generation_config is not None:
                setattr(options, name, getattr(self.generation_config, name))

        length = options.max_new_tokens = options.max_new_tokens or _DEFAULT_MAX_NEW_TOKENS
        inherited = generation_config is None and "max_new_tokens" in kwargs
        if options.block_length is None or (inherited and "block_length" not in kwargs):
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
        elif inherited and "steps" not in kwargs:
            per_token = options.steps / (base.max_new_tokens or _DEFAULT_MAX_NEW_TOKENS)
            options.steps = max(1, round(per_token * options.block_length)) * blocks
        if options.steps % blocks:
            raise ValueError(
                f"`steps` is {options.steps}, which is no multiple of the number of blocks ({blocks} = "
                f"`max_new_tokens` {length} / `block_length` {options.block_length}); allowed are {blocks}, "
                f"{2 * blocks}, …"
            )
        return options

    def _prepare_stop_sequences(self, options, tokenizer) -> list[list[int]]:
        """Token sequences that end an answer: the end-of-sequence ids and the tokenised stop strings."""
        eos = options.eos_token_id
        sequences = [] if eos is None else [[token] for token in ([eos] if isinstance(eos, int) else eos)]
        strings = [options.stop_strings] if isinstance(options.stop_strings, str) else options.stop_strings or []
        if strings and tokenizer is None:
            raise ValueError(f"`stop_strings` is {strings}; it needs the `tokenizer` argument.")
        for text in strings:
            tokens = tokenizer(text, add_special_tokens=False).input_ids
            if not tokens:
                raise ValueError(f"`stop_strings` holds {text!r}, which has no tokens; allowed are non-empty texts.")
            sequences.append(tokens)
        return sequences

    def _prepare_suffix(self, options, tokenizer) -> torch.LongTensor:
        """Token ids of the fixed suffix, 1-D, possibly empty."""
        if not options.generation_suffix:
            return torch.empty(0, dtype=torch.long, device=self.device)
        if tokenizer is None:
            raise ValueError(
                f"`generation_suffix` is {options.generation_suffix!r}; it needs the `tokenizer` argument."
            )
        tokens = tokenizer(options.generation_suffix, add_special_tokens=False).input_ids
        return torch.tensor(tokens, dtype=torch.long, device=self.device)

    def _check_prompt(self, input_ids, attention_mask, options, suffix_length) -> torch.Tensor:
        """The attention mask to use, after checks that need no forward pass."""
        if input_ids is None or input_ids.dim() != 2 or 0 in input_ids.shape:
            shape = None if input_ids is None else tuple(input_ids.shape)
            raise ValueError(f"`input_ids` has shape {shape}; allowed is (batch, prompt) with at least one token.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` has shape {tuple(attention_mask.shape)}; it must be that of `input_ids`, "
                f"{tuple(input_ids.shape)}."
            )
        attention_mask = attention_mask.to(torch.long)
        lengths = attention_mask.sum(dim=1)
        if int(lengths.min()) == 0:
            raise ValueError("`attention_mask` leaves a prompt without any token; every prompt needs at least one.")
        if bool(((input_ids == self.config.mask_token_id) & attention_mask.bool()).any()):
            raise ValueError(
                f"`input_ids` holds the mask token {self.config.mask_token_id}; masks are allowed in the canvas only."
            )
        total = int(lengths.max()) + options.max_new_tokens + suffix_length
        context = self.config.get_text_config().max_position_embeddings
        if total > context:
            raise ValueError(
                f"The prompt ({int(lengths.max())} tokens), `max_new_tokens` ({options.max_new_tokens}) and the suffix "
                f"({suffix_length}) need {total} positions; the model's context allows {context}."
            )
        return attention_mask

    def adjust_generation_fn(
        self, generation_config, from_auto_class, from_pipeline, pretrained_model_name_or_path, **kwargs
    ):
        """Load `generation_config.json` as [`LLaDAMedVGenerationConfig`] (GenerationMixin knows only its own class)."""
        if generation_config is not None:
            self.generation_config = self.generation_config_class.from_dict(generation_config.to_dict())
        elif pretrained_model_name_or_path is not None:
            kwargs.pop("trust_remote_code", None)
            try:
                self.generation_config = self.generation_config_class.from_pretrained(
                    pretrained_model_name_or_path, _from_auto=from_auto_class, _from_pipeline=from_pipeline, **kwargs
                )
            except OSError:
                pass  # no such file: the defaults from the model's config stay


class _DenoisingState:
    """Where every row of a `generate` call stands. `rows` are the indices of the unfinished ones."""

    def __init__(self, model, options, input_ids, attention_mask, suffix, stops):
        batch, device = len(input_ids), input_ids.device
        length = options.max_new_tokens
        self.mask_token_id = model.config.mask_token_id
        self.block_length = options.block_length
        self.num_blocks = length // options.block_length
        self.steps_per_block = options.steps // self.num_blocks
        self.rule = build_commit_rule(options.commit_rule_config())
        # Rows are the numbers of masks that a block may start with.
        self.schedule = commit_schedule(self.block_length, self.steps_per_block, options.schedule_shift).to(device)
        self.stops = [torch.tensor(stop, device=device) for stop in stops if len(stop) <= length]
        suppressed = options.suppress_tokens if options.suppress_tokens is not None else [self.mask_token_id]
        self.suppressed = torch.tensor(suppressed, dtype=torch.long, device=device)
        eos = [] if options.eos_token_id is None else torch.tensor(options.eos_token_id).flatten().tolist()
        padding = [] if options.pad_token_id is None else [options.pad_token_id]
        self.eos = torch.tensor(eos, dtype=torch.long, device=device)
        self.deferred = torch.tensor([*eos, *padding], dtype=torch.long, device=device)
        self.prompt_mask, self.suffix = attention_mask, suffix.to(device)
        self.unpadded = bool(attention_mask.all())
        self.positions = torch.arange(length, device=device)
        self.canvas = torch.full((batch, length), self.mask_token_id, device=device)
        self.stop = torch.full((batch,), length, device=device)  # first position that is not part of the answer
        self.block = torch.zeros(batch, dtype=torch.long, device=device)
        self.step = torch.zeros(batch, dtype=torch.long, device=device)  # within the block
        self.masks_at_start = torch.full((batch,), self.block_length, device=device)  # of the block
        self.num_forwards = torch.zeros(batch, dtype=torch.long, device=device)
        self.num_full_forwards = torch.zeros(batch, dtype=torch.long, device=device)
        self.commit_step = torch.full((batch, length), -1, device=device)
        self.commit_confidence = torch.full((batch, length), float("nan"), dtype=torch.float64, device=device)
        self.rows = torch.arange(batch, device=device)

    @property
    def block_end(self):
        return (self.block + 1) * self.block_length

    def plan_passes(self, options):
        """The forward passes of this step: pairs of rows (indices into `rows`), and where in its canvas each begins,
        or `None` for whole rows.

        A row's passes depend on its own block and step alone, so that neighbours change nothing. Rows of a partial
        pass run equally many positions; with the prefix cache those are rows in the same block.
        """
        everything = torch.arange(len(self.rows), device=self.rows.device)
        if not options.use_cache:
            return [(everything, None)]
        step = self.step[self.rows]
        interval = options.cache_refresh_interval
        full = step == 0 if interval is None else step % interval == 0
        start = self.block[self.rows] * self.block_length
        passes = [(everything[full], None)] if bool(full.any()) else []
        parts = [~full]
        if options.cache_implementation == "prefix":
            parts = [~full & (start == value) for value in start[~full].unique()]
        return passes + [(everything[part], start[part]) for part in parts if bool(part.any())]

    def tokens_to_commit(self):
        """The schedule's k for each unfinished row."""
        step = self.step[self.rows].clamp(max=self.steps_per_block - 1)  # an adaptive rule may take more steps
        return self.schedule[self.masks_at_start[self.rows], step]

    def commit(self, committed, proposed, confidences):
        """Write the committed proposals into the canvas and take note of when and how sure."""
        rows = self.rows
        self.canvas[rows] = torch.where(committed, proposed, self.canvas[rows])
        self.commit_step[rows] = torch.where(committed, self.num_forwards[rows, None], self.commit_step[rows])
        self.commit_confidence[rows] = torch.where(committed, confidences, self.commit_confidence[rows])
        self.num_forwards[rows] += 1
        self.step[rows] += 1

    def find_stops(self):
        """Set `stop` to the first place where a stop sequence stands in the canvas.

        Once a row has a stop, only the first sequence can move it further left: the authors' rule.
        """
        canvas = self.canvas[self.rows]
        stop = self.stop[self.rows]
        unstopped = stop == len(self.positions)
        for index, sequence in enumerate(self.stops):
            matches = (canvas.unfold(1, len(sequence), 1) == sequence).all(dim=-1)  # (rows, places)
            places = torch.where(matches, self.positions[: matches.shape[1]], len(self.positions)).amin(dim=1)
            stop = torch.where(unstopped | (index == 0), torch.minimum(stop, places), stop)
        self.stop[self.rows] = stop

    def advance(self):
        """Leave blocks that are done and drop rows that are finished."""
        rows = self.rows
        canvas, stop, end = self.canvas[rows], self.stop[rows], self.block_end[rows]
        masked = (canvas == self.mask_token_id) & (self.positions < stop[:, None])
        left = (masked & (self.positions < end[:, None])).any(dim=1)
        # An adaptive rule commits at least one token a step, and so needs no more steps than the block has places,
        # unless the model proposes the mask itself.
        used_up = self.step[rows] >= (self.block_length if self.rule.adaptive else self.steps_per_block)
        done = ~left | used_up
        self.block[rows] += done
        self.step[rows] = torch.where(done, 0, self.step[rows])
        in_block = self.positions // self.block_length == self.block[rows, None]
        begin = (canvas == self.mask_token_id) & in_block
        self.masks_at_start[rows] = torch.where(done, begin.sum(dim=1), self.masks_at_start[rows])
        finished = (self.block[rows] >= self.num_blocks) | ((stop < len(self.positions)) & ~masked.any(dim=1))
        self.rows = rows[~finished]


__all__ = ["LLaDAMedVGenerationConfig", "LLaDAMedVGenerationMixin", "LLaDAMedVGenerationOutput"]
