"""Denoising an answer: the semi-autoregressive masked-diffusion loop of LLaDA, for any batch size.

`LLaDAMedVGenerationMixin.generate` is the whole loop; its docstring sketches it in numbered steps and the code carries
the same numbers. Sources: LLaDA (arXiv 2502.09992, algorithms 4 and 5), LLaDA-MedV (arXiv 2508.01617).
"""

import functools
import json
import math
from dataclasses import dataclass, replace

import torch
from transformers import GenerationConfig, RepetitionPenaltyLogitsProcessor
from transformers.utils import ModelOutput

from .commit_rules_lladamedv import CandidateScores
from .confidence_lladamedv import answer_confidence, calibrate_confidence
from .denoising_cache_lladamedv import DenoisingCache
from .denoising_state_lladamedv import CandidateLogits, DenoisingState, ForwardPass, Proposals
from .generation_config_lladamedv import LLaDAMedVGenerationConfig, resolve_generation_config
from .generation_options_lladamedv import GenerationOptionError
from .hidden_regions_lladamedv import neutral_pixel_values
from .repetition_lladamedv import ban_repeated_ngrams
from .speculation_lladamedv import draft_states, mask_of_versions, reaches, with_drafts


# Logits that are turned into probabilities at a time, without a second copy of them all: on a CPU what fits into its
# cache, on a GPU what keeps it busy.
_ELEMENTS_CPU = 2**18
_ELEMENTS_GPU = 2**24
END_WINDOW = 32  # places at the end of a canvas that say whether it is long enough


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
            Denoising step, from 0, at which each canvas token was committed; -1 where none was. Each step has a
            forward pass of its own, but with `speculation_depth`.
        answer_confidence (`torch.DoubleTensor` of shape `(batch,)`):
            Geometric mean of the confidences of the answer's tokens and of the first one that ends it, calibrated by
            `confidence_temperature`.
        abstained (`torch.BoolTensor` of shape `(batch,)`, *optional*):
            Whether that is below `abstention_threshold`, if there is one.
        image_reliance (`torch.DoubleTensor` of shape `(batch,)`, *optional*):
            With `output_image_reliance`: the log-likelihood of the answer and the end in it, in nats, less that behind
            the same prompt with each picture in its median colour, both bounds of [`~LLaDAMedVScoringMixin.score`] on
            the same masks. Above 0, the picture speaks for the answer; near 0, the answer does not come from it. It is
            that of the whole answer, a Bayes factor's logarithm, and so adds up over tokens. NaN for a prompt without
            a picture, and an answer without tokens or with masks left in it.
        image_reliance_error (`torch.DoubleTensor` of shape `(batch,)`, *optional*):
            Its standard error, from 128 drawn masks; 0 for answers of up to 8 tokens, where it is exact.
        cache_drift (`torch.DoubleTensor` of shape `(forward passes, batch)`, *optional*):
            KL divergence, in nats, of the cached from the exact distributions, averaged over the row's candidates, with
            `output_cache_drift` or `cache_drift_bound`; NaN where it was not measured.
        history (`torch.LongTensor` of shape `(forward passes, batch, max_new_tokens)`, *optional*):
            The canvas after every forward pass, with `output_history=True`.
    """

    sequences: torch.LongTensor = None
    tokens_per_forward: torch.FloatTensor = None
    num_forwards: torch.LongTensor = None
    num_full_forwards: torch.LongTensor = None
    commit_confidence: torch.DoubleTensor = None
    commit_step: torch.LongTensor = None
    answer_confidence: torch.DoubleTensor = None
    abstained: torch.BoolTensor | None = None
    image_reliance: torch.DoubleTensor | None = None
    image_reliance_error: torch.DoubleTensor | None = None
    cache_drift: torch.DoubleTensor | None = None
    history: torch.LongTensor | None = None


class LLaDAMedVGenerationMixin:
    """`generate` for a model whose `forward` is bidirectional and whose config has a `mask_token_id`."""

    # Whether only candidates get logits, which needs a look at them, or every place of a block, which keeps shapes.
    # `None`: as is faster, that is on CPUs, uncompiled.
    packs_candidates: bool | None = None
    _step_compiled_with = _step_as_compiled = None

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor | None = None,
        generation_config: LLaDAMedVGenerationConfig | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        batch_num_images: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
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
            image_index: which image stands at each placeholder, where several prompts show the same one. If all rows
                are the same prompt about the same images, one of them runs the first pass for all.
            streamer: a `TextStreamer`, `TextIteratorStreamer` or `TextDiffusionStreamer` of Transformers, or anything
                with `put` and `end`. It gets the prompt, then each finished block as a 1-D tensor (but for what may be
                the beginning of a stop string). Where it has `put_draft`, it also gets the unfinished rest of the
                canvas after every forward pass, `(1, rest)`; and where it has `put_canvas`, after every forward pass
                all of the canvas up to its stop and the confidence of each of its tokens when it was committed, NaN
                for the others, both `(1, canvas)`. Batch size 1 only.
            tokenizer: needed for `stop_strings` and `generation_suffix`.
            kwargs: the fields of [`LLaDAMedVGenerationConfig`].

        Returns:
            `torch.LongTensor` `(batch, prompt + longest answer)`, or a [`LLaDAMedVGenerationOutput`] with
            `return_dict_in_generate=True`.

        Raises:
            ValueError: before the first forward pass, for unknown arguments, values that are not allowed, a
                `max_new_tokens` that `block_length` does not divide, `steps` that are no multiple of the number of
                blocks, a row longer than the model's context, a prompt that is empty or holds the mask token, or one
                without a picture with `image_guidance_scale`; in the loop, for logits that are not finite.
        """
        # 0. Check the arguments, embed the prompts and lay a canvas of masks (and the fixed suffix) behind each.
        state = self.prepare_denoising(input_ids, generation_config, attention_mask, tokenizer, **kwargs)
        if streamer is not None and len(input_ids) > 1:
            raise ValueError(f"`streamer` works with one prompt; `input_ids` holds {len(input_ids)}.")
        images = {"pixel_values": pixel_values, "image_sizes": image_sizes, "batch_num_images": batch_num_images}
        if image_index is not None:
            images["image_index"] = image_index
        if state.options.compile_config is None:  # whose passes have one shape
            state.rows_are_equal = _are_equal(input_ids, state.prompt_mask, pixel_values, batch_num_images, image_index)
        history = self._denoise(state, streamer, **images)

        # 2. Cut every answer at its stop and append the suffix.
        if streamer is not None:
            streamer.end()
        output = self.finish_denoising(state, history)
        return output if state.options.return_dict_in_generate else output.sequences

    def prepare_denoising(
        self, input_ids, generation_config=None, attention_mask=None, tokenizer=None, **kwargs
    ) -> DenoisingState:
        """The rows of a call before the first forward pass. Arguments and errors are those of [`generate`]."""
        options = self.resolve_generation_config(generation_config, **kwargs)
        stops = self._prepare_stop_sequences(options, tokenizer)
        suffix = self._prepare_suffix(options, tokenizer)
        attention_mask = self._check_prompt(input_ids, attention_mask)
        needed = f"the canvas (`max_new_tokens`, {options.max_new_tokens}) with the suffix ({len(suffix)})"
        self._check_context(attention_mask, needed, options.max_new_tokens + len(suffix))
        implementation = self.model.language_model.config._attn_implementation
        if options.speculation_depth and options.use_cache and implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"`speculation_depth` is {options.speculation_depth}; with `use_cache` it needs "
                f"attn_implementation='sdpa' or 'eager', not {implementation!r}."
            )
        canvas = torch.full((len(input_ids), options.max_new_tokens), self.config.mask_token_id).to(input_ids)
        return DenoisingState(self, options, input_ids, canvas, attention_mask, suffix, stops)

    def begin_denoising(self, state: DenoisingState, neutral_features=None, **images) -> dict:
        """Embed the prompts and make room for the cache.

        Args:
            images: arguments of [`~LLaDAMedVModel.get_image_features`].
            neutral_features: the `image_features` of the neutral pictures, where the state `needs_neutral`.

        Returns:
            `image_features`, and `neutral_features` if needed: arguments for other prompts about the same pictures.

        Raises:
            ValueError: as [`generate`].
        """
        options, ids = state.options, state.prompt_ids
        features = {}
        state.prompt_embeds, features["image_features"] = self._embed(ids, images)
        if state.guides_by_image and not bool((ids == self.config.image_token_id).any(dim=1).all()):
            raise GenerationOptionError(
                f"`image_guidance_scale` is {options.image_guidance_scale}, but a prompt has no picture; it must be 0 "
                "there.",
                "image_guidance_scale",
            )  # fmt: skip
        if state.needs_neutral:
            if images["pixel_values"] is not None:
                shapes = {name: images[name] for name in ("pixel_values", "image_sizes", "batch_num_images")}
                neutral = neutral_pixel_values(self.model, **shapes)
                images = {**images, "pixel_values": neutral, "image_features": neutral_features}
            state.neutral_embeds, features["neutral_features"] = self._embed(ids, images)
        if options.use_cache:
            num_rows = len(ids) * state.sides
            row_length = ids.shape[1] + state.canvas.shape[1] + len(state.suffix)
            text_config = self.config.get_text_config()
            state.cache = DenoisingCache(text_config.num_hidden_layers, num_rows, row_length)
            if options.compile_config is not None:  # inside the graph it would make a first pass unlike all others
                state.cache.early_initialization(
                    num_rows, text_config.num_key_value_heads, text_config.head_dim, state.prompt_embeds.dtype,
                    state.prompt_embeds.device,
                )  # fmt: skip
        if options.grow_until_eos_confidence is not None:
            self._grow_canvas(state)
        if options.compile_config is not None:  # a captured graph finds what it changes where it was
            layers = state.cache.layers if options.use_cache else ()
            for tensor in [*vars(state).values(), *(each for layer in layers for each in (layer.keys, layer.values))]:
                if isinstance(tensor, torch.Tensor):
                    torch._dynamo.mark_static_address(tensor, guard=False)
        return features

    def _embed(self, ids, images: dict):
        """Embeddings of the prompts, and the features of each picture in them."""
        embedded = self.model(ids, **images, embeddings_only=True, return_dict=True)
        images = embedded.image_outputs
        return embedded.last_hidden_state, None if images is None else images.pooler_output

    def _grow_canvas(self, state: DenoisingState) -> None:
        """Lengthen each row's canvas of masks until the model puts an end into it (DAEDAL, arXiv 2508.00819, stage 1).

        One pass over the row a length. The confidence is the sum of the probabilities of an end at the last places
        whose most probable token is one, [`END_WINDOW`] at most, divided by that number.
        """
        options, full = state.options, len(state.positions)
        ends, window = state.deferred, state.positions.expand(len(state.canvas), -1)
        growing = [row for row, length in enumerate(state.progress.initial) if length < full]
        while growing:
            each = state.whole_pass(growing)
            if state.drift is not None:
                state.drift.begin_step(state)
            candidates = torch.zeros_like(window, dtype=torch.bool)
            candidates[each.rows] = state.positions < state.initial[each.rows, None]
            found = self._candidate_logits(state, window, candidates, each, whole=True)
            state.note_broken(state.broken_rows(found))
            state.num_forwards[each.rows] += 1
            state.num_full_forwards[each.rows] += 1
            probability = torch.zeros_like(window, dtype=torch.float64)
            logits = self._plausible_logits(options, found)
            for part, slots in zip(*(values.split(_rows_at_a_time(logits)) for values in (logits, found.slots))):
                of_ends = part.double().softmax(dim=-1)[:, ends].sum(dim=-1)
                is_end = torch.isin(part.argmax(dim=-1), ends)
                probability.view(-1).index_copy_(0, slots, torch.where(is_end, of_ends, 0.0))
            probability = torch.where(candidates, probability, 0.0).flip(1)
            counted = (probability > 0).cumsum(dim=1) <= END_WINDOW
            of = state.initial.clamp(max=END_WINDOW)
            unsure = (probability * counted).sum(dim=1) / of < options.grow_until_eos_confidence
            unsure = unsure.tolist()
            growing = [row for row in growing if unsure[row]]
            if growing:
                state.grow(growing)
            growing = [row for row in growing if state.progress.initial[row] < full]

    def finish_denoising(self, state: DenoisingState, history=None) -> LLaDAMedVGenerationOutput:
        """Step 2 of [`generate`], for rows that are finished."""
        options = state.options
        answers = [torch.cat([canvas[:stop], state.suffix]) for canvas, stop in zip(state.canvas, state.stop.tolist())]
        padded = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=state.padding)
        # The token that ends an answer was decided on, too.
        confidence = answer_confidence(state.commit_confidence, state.stop + 1)
        confidence = calibrate_confidence(confidence, options.confidence_temperature)
        threshold = options.abstention_threshold
        reliance = self._image_reliance(state) if options.output_image_reliance else (None, None)
        return LLaDAMedVGenerationOutput(
            sequences=torch.cat([state.prompt_ids, padded], dim=1),
            tokens_per_forward=state.stop / state.num_forwards,
            num_forwards=state.num_forwards,
            num_full_forwards=state.num_full_forwards,
            commit_confidence=state.commit_confidence,
            commit_step=state.commit_step,
            answer_confidence=confidence,
            abstained=None if threshold is None else confidence < threshold,
            image_reliance=reliance[0],
            image_reliance_error=reliance[1],
            cache_drift=None if state.drift is None else torch.stack(state.drift.history),
            history=history,
        )

    def _denoise(self, state, streamer=None, **images):
        """The loop: step 1 of [`generate`], until all rows are finished. Returns the history if it is asked for."""
        self.begin_denoising(state, **images)
        if streamer is not None:
            streamer.put(state.prompt_ids.cpu())

        # 1. While a row is unfinished, one forward pass over all unfinished rows:
        history = [state.canvas.clone()] * int(state.num_forwards.max()) if state.options.output_history else []
        streamed = 0
        while not state.is_finished:
            self.denoising_step(state)
            state.check_finite()
            if state.options.output_history:
                history.append(state.canvas.clone())
            if streamer is not None:
                streamed = stream(streamer, state, streamed)
        state.progress.read(state)  # the last step may not have been looked at
        state.check_finite()
        return torch.stack(history) if state.options.output_history else None

    def denoising_step(self, state: DenoisingState) -> list[ForwardPass]:
        """One forward pass of each row: planned by the host, run on the device, followed by the host. Returns what was
        run."""
        passes = state.plan_passes()
        compiled = state.options.compile_config is not None and [each.numbers for each in passes] == [state.kept]
        (self._compiled_step(state.options.compile_config) if compiled else self._run_step)(state, passes)
        state.follow(passes)
        return passes

    def _run_step(self, state: DenoisingState, passes: list[ForwardPass]) -> None:
        """Steps 1.a to 1.e of [`generate`], without a look at what is on the device.

        With `speculation_depth` the passes also run drafts of the states that follow. Once a step leads where a draft
        is, that draft's logits are those of the next step, which then needs no pass.
        """
        drafts = draft_states(state, passes, self._commit)
        found, *ahead = self._proposals(*with_drafts(state, drafts, passes)).split(len(state.canvas))
        active = self._commit(state, found)
        reached = active
        for draft, found in zip(drafts, ahead):
            reached = reached & reaches(state, draft) & found.candidates.any(dim=1)  # with logits of its own
            found.candidates &= reached[:, None]
            state.num_saved += reached
            self._commit(state, found)
        state.note_passes(passes, active)

    def _proposals(self, state, passes: list[ForwardPass]) -> Proposals:
        """Steps 1.a to 1.c: the candidates, their logits and what these propose."""
        options = state.options

        # 1.a. Find the candidates: masked positions up to the end of the row's block and left of its stop.
        window = state.window  # (batch, window): where they may be
        candidates = state.candidates(window, passes)
        proposed = state.canvas.gather(1, window)
        scores = CandidateScores(torch.zeros_like(proposed, dtype=torch.float64))
        for name in state.rule.needs:
            setattr(scores, name, torch.zeros_like(scores.confidence))
        if "noise" in state.rule.needs:
            scores.noise = self._random_scores(state.canvas).gather(1, window)

        # 1.b. Compute logits at the candidates only, guided if asked for. With a cache, rows that need no refresh run
        # only their block, or what begins with it.
        broken = torch.zeros_like(state.finished)
        run = functools.partial(self._candidate_logits, state, window, candidates)
        if state.rows_are_equal:
            run = functools.partial(self._logits_of_equal_rows, state, window, candidates)
            state.rows_are_equal = False  # until tokens are drawn
        if state.drift is not None:
            state.drift.begin_step(state)
            run = functools.partial(state.drift.run, state, run)
        for each in passes:
            found = run(each)
            broken |= state.broken_rows(found)
            self._process_logits(state, window, found)

            # 1.c. Propose a token for each candidate, and its confidence.
            logits = self._plausible_logits(options, found)
            tokens, values = self._propose(logits, options.temperature, state.rule.needs)
            proposed.view(-1).index_copy_(0, found.slots, tokens)
            for name, value in values.items():
                getattr(scores, name).view(-1).index_copy_(0, found.slots, value)
            state.hooks.choose(state, each, found, proposed, scores)
        return Proposals(window, candidates, proposed, scores, broken)

    @staticmethod
    def _commit(state, found: Proposals) -> torch.BoolTensor:
        """Steps 1.d and 1.e. Returns the rows `(batch,)` that took part."""
        active = found.candidates.any(dim=1)
        state.note_broken(found.broken & active)

        # 1.d. Commit what the rule keeps: by default the k most confident proposals, k from the block's schedule.
        scores = found.scores
        if state.options.defer_eos:
            scores = scores.defer(torch.isin(found.tokens, state.deferred))
        committed = state.rule(found.candidates, scores, state.tokens_to_commit())
        committed = state.hooks.complete(state, found.window, committed)
        state.commit(found.window, committed, found.tokens, found.scores.confidence)
        state.keep_for_drafts(found, active)

        # 1.e. Look for a stop sequence, and move on to the next block, or finish the row.
        state.hooks.close(state)
        state.find_stops()
        state.advance(active)
        return active

    def _candidate_logits(self, state, window, candidates, each: ForwardPass, whole: bool = False) -> CandidateLogits:
        """Logits in at least float32 at the candidates of one pass.

        Args:
            window, candidates: `(batch, window)`: where candidates may be, and which are.
            whole: run the whole row for what a partial pass runs, and leave the cache alone.
        """
        options, rows = state.options, each.rows
        partial = each.partial and not whole
        embed = self.get_input_embeddings()
        prompt_mask = state.prompt_mask[rows]
        prompt_length = prompt_mask.shape[1]

        # Which places of the tail (canvas and suffix) are run, the same number in each row.
        if partial and each.start is None:
            first = state.block[rows, None].clamp(max=state.num_blocks - 1) * options.block_length
            columns = first + torch.arange(options.block_length, device=rows.device)
        else:
            first = each.start if partial else 0
            columns = state.tail_columns(first, each.end).expand(len(rows), -1)
        position_ids = state.tail_position_ids(rows).gather(1, columns)
        inputs_embeds = embed(state.tail_ids(rows).gather(1, columns))  # (rows, columns, hidden)
        places = columns + prompt_length  # within the row
        wanted = window[rows] - first  # within what is run
        tail_mask = state.tail_mask(rows)
        contrast_embeds = inputs_embeds
        if not partial:
            prompt_places = torch.arange(prompt_length, device=rows.device).expand_as(prompt_mask)
            places = torch.cat([prompt_places, places], dim=1)
            position_ids = torch.cat([state.prompt_positions[rows], position_ids], dim=1)
            wanted = wanted + prompt_length
            tail_mask = tail_mask.gather(1, columns)
            inputs_embeds = torch.cat([state.prompt_embeds[rows], inputs_embeds], dim=1)
        wanted = wanted.clamp(0, places.shape[1] - 1)  # what is beyond is no candidate
        visible = torch.cat([prompt_mask, tail_mask], dim=1)
        cached_rows = rows[:: each.versions]
        slots = state.slots(candidates, each)
        own, size = candidates[rows], window.shape[1]
        if state.packs:
            wanted = torch.zeros_like(places).scatter_add_(1, wanted, own.long()) > 0
        if state.sides == 2:
            # The row to contrast with has the same length: neutral pictures, or a mask for every prompt token.
            if not partial:
                blank = state.neutral_embeds[rows] if state.guides_by_image else None
                blank = embed(prompt_places * 0 + state.mask_token_id) if blank is None else blank
                contrast_embeds = torch.cat([blank, contrast_embeds], dim=1)
            inputs_embeds = torch.cat([inputs_embeds, contrast_embeds])
            visible, position_ids, wanted, places = (
                value.repeat(2, 1) for value in (visible, position_ids, wanted, places)
            )
            cached_rows = torch.cat([cached_rows, cached_rows + len(state.canvas) // state.versions])
        mask = None if each.attends_everywhere else visible[:, None, None]
        if partial and each.versions > 1:
            # The versions of a row share its states: they stand in one row and do not see each other.
            mask = mask_of_versions(visible, places, each.versions)
            if not state.packs:
                behind = torch.arange(len(wanted), device=rows.device) % each.versions * places.shape[1]
                wanted = wanted + behind[:, None]
            inputs_embeds, position_ids, wanted = (
                values.reshape(len(mask), -1, *values.shape[2:]) for values in (inputs_embeds, position_ids, wanted)
            )
        cache = None
        if options.use_cache and not whole:
            everywhere = places.shape[1] == state.cache.current.row_length
            cache = state.cache.select(cached_rows, None if everywhere else places, partial, each.versions)
        logits = self(
            inputs_embeds=inputs_embeds,
            attention_mask=mask if mask is None else self._attention_mask(mask, inputs_embeds),
            position_ids=position_ids,
            cache=cache,
            logits_to_keep=wanted,
            return_dict=True,
        ).logits.flatten(0, -2)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        conditional = None
        if state.sides == 2:
            conditional, contrast = logits.chunk(2)
            scale = options.image_guidance_scale if state.guides_by_image else options.cfg_scale
            logits = contrast + (scale + 1) * (conditional - contrast)
        row = rows[slots // size]
        unguided = conditional if state.guides_by_image else None
        return CandidateLogits(row, row * size + slots % size, own.flatten()[slots], logits, unguided)

    def _logits_of_equal_rows(self, state, window, candidates, each: ForwardPass) -> CandidateLogits:
        """What [`_candidate_logits`] returns for a pass over all rows, which do not differ yet: one of them is run."""
        batch, size = window.shape
        found = self._candidate_logits(state, window, candidates, replace(each, numbers=[0], rows=each.rows[:1]))
        if state.cache is not None:
            state.cache.spread(batch)
        number = len(found.slots)
        found = found.take(torch.arange(number, device=window.device).repeat(batch))
        found.rows = torch.arange(batch, device=window.device).repeat_interleave(number)
        found.slots = found.slots + found.rows * size
        return found

    def _attention_mask(self, visible, inputs_embeds):
        """The mask of a pass for `visible` `(rows, 1, queries or 1, keys)`, in a form that the attention takes without
        looking at it."""
        implementation = self.model.language_model.config._attn_implementation
        if implementation == "sdpa":
            return visible
        if implementation == "eager":
            lowest = torch.finfo(inputs_embeds.dtype).min
            return torch.zeros_like(visible, dtype=inputs_embeds.dtype).masked_fill(~visible, lowest)
        return visible[:, 0, 0].long()

    def _process_logits(self, state, window, found: CandidateLogits) -> None:
        """Change the logits of what must not, or had better not, be proposed."""
        options, row, place = state.options, found.rows, window.flatten()[found.slots]
        if options.repetition_penalty != 1 or options.no_repeat_ngram_size is not None:
            committed = state.canvas != state.mask_token_id
            if state.absent is not None:
                committed &= ~state.absent
        if options.repetition_penalty != 1:
            # What is no token of the row is replaced by one that is, which changes nothing.
            ids = torch.cat([state.prompt_ids, state.canvas], dim=1)
            real = torch.cat([state.prompt_mask, committed], dim=1)
            ids = torch.where(real, ids, ids.gather(1, real.byte().argmax(dim=1, keepdim=True)))
            found.logits = RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty))(ids[row], found.logits)
        found.logits[:, state.suppressed] = float("-inf")
        if options.min_new_tokens is not None:
            early = (place < options.min_new_tokens)[:, None]
            found.logits[:, state.eos] = found.logits[:, state.eos].masked_fill(early, float("-inf"))
        if options.no_repeat_ngram_size is not None:
            canvas = torch.where(committed, state.canvas, -1)
            ban_repeated_ngrams(found.logits, row, place, canvas, options.no_repeat_ngram_size)

    @staticmethod
    def _plausible_logits(options, found: CandidateLogits) -> torch.Tensor:
        """The logits, after image guidance without what the picture itself makes implausible.

        Source: visual contrastive decoding (arXiv 2311.16922), the adaptive plausibility constraint; what must not be
        proposed does not count as the most probable token here.
        """
        if found.unguided is None or options.image_guidance_cutoff == 0:
            return found.logits
        unguided = found.unguided.masked_fill(found.logits == float("-inf"), float("-inf"))
        least = unguided.amax(dim=-1, keepdim=True) + math.log(options.image_guidance_cutoff)
        return found.logits.masked_fill(unguided < least, float("-inf"))

    @staticmethod
    def _propose(logits, temperature, needs=()):
        """Proposed tokens `(candidates,)`, and what is known of them by its name in [`CandidateScores`].

        A few rows at a time, so that the copies stay small. Probabilities near 1 would tie in float32, so that they are
        made of the sum of all others, in float64; noise is float64 throughout, because in low precision it is biased
        (arXiv 2409.02908).
        """
        tokens, values = [], {name: [] for name in ("confidence", *needs) if name != "noise"}
        dtype = torch.float64 if temperature > 0 or "entropy" in values else logits.dtype
        for part in logits.split(_rows_at_a_time(logits)):
            best, token = part.max(dim=-1, keepdim=True)
            log_odds = part.to(dtype) - best  # against the most probable token
            first = token
            if temperature > 0:
                # argmax of exp(logits) / (-log u)^temperature, taken in the logarithm
                noise = torch.rand_like(log_odds).log_().neg_().log_()
                token = (log_odds - temperature * noise).argmax(dim=-1, keepdim=True)
            tokens.append(token.squeeze(-1))
            weights = log_odds.exp_()
            if "margin" in values:
                second = weights.topk(2, dim=-1).values[:, 1].double()
            chosen = weights.gather(-1, token).squeeze(-1).double()
            others = weights.scatter_(-1, first, 0.0).sum(dim=-1).double()
            total = 1 + others
            values["confidence"].append(chosen / total)
            if "margin" in values:
                values["margin"].append((1 - second) / total)
            if "entropy" in values:
                rest = torch.special.entr(weights / total[:, None]).sum(dim=-1)
                values["entropy"].append(rest + total.log() / total)
        return torch.cat(tokens), {name: torch.cat(parts) for name, parts in values.items()}

    @staticmethod
    def _random_scores(canvas):
        """Uniform scores `(rows, canvas)` for `remasking="random"`."""
        return torch.rand(canvas.shape, dtype=torch.float64, device=canvas.device)

    def resolve_generation_config(self, generation_config=None, **kwargs) -> LLaDAMedVGenerationConfig:
        """The call's options: keyword arguments over `generation_config` over the model's own, filled in and checked.

        What the caller sets is taken literally. A block length or step count that comes from the checkpoint is fitted
        to a `max_new_tokens` from the caller: the largest fitting block, the same number of steps per token.
        """
        base = generation_config if generation_config is not None else self.generation_config
        if not isinstance(base, GenerationConfig):
            raise ValueError(
                f"`generation_config` is a {type(base).__name__}; allowed are a LLaDAMedVGenerationConfig and a "
                "GenerationConfig."
            )
        options = resolve_generation_config(base, self.generation_config, kwargs, anew=generation_config is not None)
        for name in ("eos_token_id", "suppress_tokens"):
            self._check_ids(name, getattr(options, name))
        return options

    def _check_ids(self, name: str, ids) -> list[int]:
        """The ids as a list. One that the model does not have would be an error without a name, or do nothing."""
        ids = ids.flatten().tolist() if isinstance(ids, torch.Tensor) else [ids] if isinstance(ids, int) else ids or []
        size = self.config.get_text_config().vocab_size
        strange = [token for token in ids if not 0 <= token < size]
        if strange:
            raise ValueError(f"`{name}` holds {strange[0]}; the model has ids from 0 to {size - 1}.")
        return [*ids]

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
            return torch.empty(0, dtype=torch.long)
        if tokenizer is None:
            raise ValueError(
                f"`generation_suffix` is {options.generation_suffix!r}; it needs the `tokenizer` argument."
            )
        tokens = tokenizer(options.generation_suffix, add_special_tokens=False).input_ids
        return torch.tensor(tokens, dtype=torch.long)

    def _compiled_step(self, compile_config):
        """`_run_step` compiled into one graph for each shape; compiled again only if the options differ."""
        settings = compile_config.to_dict() | {"fullgraph": True}
        if self._step_compiled_with != settings:
            self._step_compiled_with = settings
            # The default allows eight shapes in a process, all models together.
            settings = {"recompile_limit": 64, "isolate_recompiles": True, **settings}
            self._step_as_compiled = torch.compile(self._run_step, **settings)
        return self._step_as_compiled

    def _check_prompt(self, input_ids, attention_mask) -> torch.Tensor:
        """The attention mask to use, after checks that need no forward pass."""
        if not isinstance(input_ids, torch.Tensor) or input_ids.dtype != torch.long:
            kind = getattr(input_ids, "dtype", type(input_ids).__name__)
            raise ValueError(f"`input_ids` is of type {kind}; allowed are tensors of torch.int64.")
        if input_ids.dim() != 2 or 0 in input_ids.shape:
            raise ValueError(
                f"`input_ids` has shape {tuple(input_ids.shape)}; allowed is (batch, prompt) with at least one token."
            )
        self._check_ids("input_ids", input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` has shape {tuple(attention_mask.shape)}; it must be that of `input_ids`, "
                f"{tuple(input_ids.shape)}."
            )
        strange = attention_mask[(attention_mask != 0) & (attention_mask != 1)]
        if len(strange):
            raise ValueError(f"`attention_mask` holds {strange[0].item()}; allowed are 1 for tokens and 0 for padding.")
        attention_mask = attention_mask.to(torch.long)
        if int(attention_mask.sum(dim=1).min()) == 0:
            raise ValueError("`attention_mask` leaves a prompt without any token; every prompt needs at least one.")
        if bool(((input_ids == self.config.mask_token_id) & attention_mask.bool()).any()):
            raise ValueError(
                f"`input_ids` holds the mask token {self.config.mask_token_id}; masks are allowed in the canvas only."
            )
        return attention_mask

    def _check_context(self, attention_mask, what: str, length: int) -> None:
        """That a prompt and `length` more tokens fit into the context; `what` says what these are."""
        prompt, context = int(attention_mask.sum(dim=1).max()), self.config.get_text_config().max_position_embeddings
        if prompt + length > context:
            raise ValueError(
                f"The prompt ({prompt} tokens) and {what} need {prompt + length} positions; the model's context allows "
                f"{context}."
            )

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
            except OSError as error:
                if isinstance(error.__context__, (UnicodeDecodeError, json.JSONDecodeError)):
                    raise ValueError(str(error)) from error
                # No such file: the defaults from the model's config stay.


def stream(streamer, state: DenoisingState, streamed: int, row: int = 0) -> int:
    """Hand a row's finished blocks to the streamer, and the rest as a draft; returns how much of the canvas is out."""
    finished = state.progress.finished[row]
    stop = int(state.stop[row])
    # A stop sequence may begin in a block that is done and end in the next one.
    held = max((len(sequence) for sequence in state.stops), default=1) - 1
    ready = stop if finished else min(stop, int(state.block[row]) * state.block_length - held)
    canvas = state.canvas[row].cpu().clone()  # a streamer may keep what it gets; the canvas goes on changing
    if hasattr(streamer, "put_canvas"):
        streamer.put_canvas(canvas[None, :stop], state.commit_confidence[row : row + 1, :stop].cpu().clone())
    if hasattr(streamer, "put_draft") and not finished:
        streamer.put_draft(canvas[None, max(streamed, ready) : stop])
    if ready > streamed:
        streamer.put(canvas[streamed:ready])
    if finished and len(state.suffix):
        streamer.put(state.suffix.cpu())
    return max(streamed, ready)


def _are_equal(input_ids, prompt_mask, pixel_values, batch_num_images, image_index) -> bool:
    """Whether rows are the same prompt about the same pictures, as far as indices say so."""
    rows = len(input_ids)
    if rows == 1 or (pixel_values is not None and (image_index is None or batch_num_images is None)):
        return False
    of_rows = [input_ids, prompt_mask]
    if pixel_values is not None:
        of_rows += [batch_num_images, image_index]
    return all(each.equal(each[: len(each) // rows].repeat(rows, *[1] * (each.dim() - 1))) for each in of_rows)


def _rows_at_a_time(logits: torch.Tensor) -> int:
    elements = _ELEMENTS_CPU if logits.device.type == "cpu" else _ELEMENTS_GPU
    return max(1, elements // logits.shape[-1])


__all__ = ["LLaDAMedVGenerationConfig", "LLaDAMedVGenerationMixin", "LLaDAMedVGenerationOutput", "stream"]
