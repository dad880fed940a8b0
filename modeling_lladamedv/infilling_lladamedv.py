"""Filling in a template: fixed text with blanks, all of it seen from the first step on.

    "FINDINGS: [[findings:24]] IMPRESSION: [[impression:16]]"

A masked-diffusion model needs no order: the canvas simply starts with the fixed ids in place. The suffix that LLaDA's
authors append to a canvas is the template "[[answer:N]]suffix".
"""

import re
from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .confidence_lladamedv import answer_confidence
from .denoising_state_lladamedv import DenoisingState, StepHooks


_BLANK = re.compile(r"\[\[\s*(\w+)\s*(?::\s*(\d+)\s*)?\]\]")
# Options of `generate` that say how long an answer is or where it ends, which here the template does, that are about
# the one answer of a row, or that foresee steps, which a template's choices change.
_NOT_TAKEN = (
    "max_new_tokens", "min_new_tokens", "initial_canvas_length", "grow_until_eos_confidence", "stop_strings",
    "generation_suffix", "abstention_threshold", "output_image_reliance", "return_dict_in_generate",
    "speculation_depth",
)  # fmt: skip


@dataclass
class LLaDAMedVInfillOutput(ModelOutput):
    """What `infill` returns.

    Args:
        sequences (`torch.LongTensor` of shape `(batch, prompt + longest text)`):
            Prompt and filled-in text, padded on the right.
        texts (`list[str]`): the filled-in template of each row.
        fields (`list[dict[str, str]]`): what stands in the blanks, by their names.
        field_spans (`list[dict[str, tuple[int, int]]]`):
            Where the blanks are, (start, end) in tokens of the filled-in text.
        field_confidence (`list[dict[str, float]]`):
            Geometric mean of the confidences that the blank's tokens were committed with, the one that ended it
            included; for a choice, the probability that it had among the allowed texts.
        num_forwards (`torch.LongTensor` of shape `(batch,)`): forward passes that the row took part in.
        history (`torch.LongTensor` of shape `(forward passes, batch, canvas)`, *optional*):
            The canvas after every forward pass, with `output_history=True`.
    """

    sequences: torch.LongTensor = None
    texts: list[str] | None = None
    fields: list[dict[str, str]] | None = None
    field_spans: list[dict[str, tuple[int, int]]] | None = None
    field_confidence: list[dict[str, float]] | None = None
    num_forwards: torch.LongTensor = None
    history: torch.LongTensor | None = None


@dataclass(frozen=True)
class Blank:
    """A blank, from `start` to before `end` in the canvas, and the ids of its allowed texts, if it has any."""

    name: str
    start: int
    end: int
    choices: tuple[tuple[int, ...], ...] = ()


class Blanks(StepHooks):
    """The blanks of a template while it is being filled in; `length` `(batch, blanks)` says how long each is by now.

    A blank of allowed texts is decided as a whole: each text's score is the mean log-probability of its tokens at the
    blank's first places, a softmax over these scores is its probability, and as soon as the commit rule keeps one place
    of the blank, all its places are committed. What a shorter text leaves over is removed. A free blank ends before the
    first end token in it, and is as long as it was asked to be if there is none.
    """

    predictable = False

    def __init__(self, blanks: list[Blank], batch: int, device: torch.device):
        self.blanks = blanks
        widths = torch.tensor([blank.end - blank.start for blank in blanks], device=device)
        self.length = widths.repeat(batch, 1)
        self.proposed_length = self.length.clone()

    def choose(self, state, each, found, proposed, scores):
        """Propose the blanks of allowed texts as a whole, in place of the single tokens."""
        temperature, size, progress = state.options.temperature, proposed.shape[1], state.progress
        if not len(found.slots):
            return
        for number, blank in enumerate(self.blanks):
            if not blank.choices:
                continue
            first = {row: progress.block[row] * size if size == state.block_length else 0 for row in each.numbers}
            numbers = [row for row in each.numbers if 0 <= blank.start - first[row] < size]
            if not numbers:
                continue
            rows, offset = state.index(numbers), blank.start - first[numbers[0]]
            places, width = slice(offset, offset + blank.end - blank.start), blank.end - blank.start
            slots = rows[:, None] * size + torch.arange(offset, offset + width, device=rows.device)  # (rows, width)
            entries = torch.searchsorted(found.slots, slots).clamp(max=len(found.slots) - 1)
            undecided = ((found.slots[entries] == slots) & found.valid[entries]).all(dim=1)
            if state.packs and not bool(undecided.any()):
                continue
            log_probability = found.logits[entries].double().log_softmax(dim=-1)  # (rows, width, vocabulary)
            lengths = torch.tensor([len(choice) for choice in blank.choices], device=rows.device)
            ids = [[*choice, *[state.padding] * (width - len(choice))] for choice in blank.choices]
            ids = torch.tensor(ids, device=rows.device)  # (choices, width)
            of_ids = log_probability.gather(2, ids.T.expand(len(rows), -1, -1))  # (rows, width, choices)
            counts = torch.arange(width, device=rows.device)[:, None] < lengths  # (width, choices)
            values = torch.where(counts, of_ids, 0.0).sum(dim=1) / lengths  # (rows, choices)
            probability = values.softmax(dim=1)
            if temperature > 0:
                values = values - temperature * torch.rand_like(values).log_().neg_().log_()
            best = values.argmax(dim=1)
            ordered = torch.nn.functional.pad(probability, (0, 1)).sort(dim=1, descending=True).values
            known = {
                "confidence": probability.gather(1, best[:, None])[:, 0],
                "margin": ordered[:, 0] - ordered[:, 1],
                "entropy": torch.special.entr(probability).sum(dim=1),
                "noise": None if scores.noise is None else scores.noise[rows, offset],
            }
            changes = [(getattr(scores, name), value) for name, value in known.items()]
            changes = [
                (proposed, ids[best]),
                *[(target, value[:, None]) for target, value in changes if target is not None],
            ]
            for target, value in changes:
                target[rows, places] = torch.where(undecided[:, None], value, target[rows, places])
            self.proposed_length[rows, number] = lengths[best]

    def complete(self, state, window, committed):
        """`committed` with the whole of each blank of allowed texts of which a place is committed."""
        everywhere = torch.zeros_like(state.canvas, dtype=torch.bool).scatter_(1, window, committed)
        for number, blank in enumerate(self.blanks):
            if blank.choices:
                decided = everywhere[:, blank.start : blank.end].any(dim=1)
                everywhere[:, blank.start : blank.end] |= decided[:, None]
                length = torch.where(decided, self.proposed_length[:, number], self.length[:, number])
                self.length[:, number] = length
        return everywhere.gather(1, window)

    def close(self, state):
        """Take out of the canvas what stands behind the end of a blank."""
        canvas = state.canvas
        removed = torch.zeros_like(canvas, dtype=torch.bool)
        for number, blank in enumerate(self.blanks):
            places = slice(blank.start, blank.end)
            if not blank.choices:
                ends = torch.isin(canvas[:, places], state.eos)
                found = torch.where(ends.any(dim=1), ends.byte().argmax(dim=1), blank.end - blank.start)
                self.length[:, number] = torch.minimum(self.length[:, number], found)
            within = torch.arange(blank.end - blank.start, device=canvas.device)
            removed[:, places] = within >= self.length[:, number, None]
        state.remove(removed)


class LLaDAMedVInfillingMixin:
    """`infill` for a model that has the denoising loop of [`LLaDAMedVGenerationMixin`]."""

    @torch.no_grad()
    def infill(
        self,
        input_ids: torch.LongTensor,
        template: str,
        tokenizer,
        choices: dict[str, list[str]] | None = None,
        generation_config=None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        batch_num_images: torch.LongTensor | None = None,
        **kwargs,
    ) -> LLaDAMedVInfillOutput:
        """Fill in the blanks of a template behind each prompt.

        Args:
            input_ids (`(batch, prompt)`): prompts, padded on either side if `attention_mask` says so.
            template: text with blanks `[[name:length]]`, the length in tokens, or `[[name]]` for a blank of which
                `choices` says what may stand in it. The text between the blanks is tokenised piece by piece and never
                changes; a blank that should begin with a space wants none before it.
            tokenizer: of the model.
            choices: for the names of some blanks, the texts of which one is to stand there.
            generation_config: options to use instead of the model's own; keyword arguments override either.
            attention_mask (`(batch, prompt)`, *optional*): 1 for tokens, 0 for padding.
            pixel_values, image_sizes, batch_num_images: as the processor returns them.
            kwargs: the fields of [`LLaDAMedVGenerationConfig`], except for those that the template decides:
                `max_new_tokens` and whatever ends an answer. An `eos_token_id` ends the blank that it stands in. By
                default the whole template is one block, with one step per token.

        Returns:
            [`LLaDAMedVInfillOutput`].

        Raises:
            ValueError: before the first forward pass, for a template without blanks, with unpaired brackets, a blank
                without length or choices or two of one name, choices for a blank that does not exist, choices that are
                empty, equal or hold a suppressed id, a block that cuts such a blank in two, or for the reasons of
                `generate`.
        """
        refused = sorted(set(kwargs) & set(_NOT_TAKEN))
        if refused:
            raise ValueError(f"`{refused[0]}` is {kwargs[refused[0]]!r}, which `infill` does not take.")
        ids, blanks = self._parse_template(template, tokenizer, choices or {})
        block_length = kwargs.pop("block_length", None) or len(ids)
        length = -(-len(ids) // block_length) * block_length
        kwargs["steps"] = kwargs.get("steps") or length
        kwargs = {
            **dict.fromkeys(_NOT_TAKEN),
            **kwargs,
            "max_new_tokens": length,
            "block_length": block_length,
        }
        options = self.resolve_generation_config(generation_config, **kwargs)
        self._check_choices(options, blanks, tokenizer)
        attention_mask = self._check_prompt(input_ids, attention_mask)
        self._check_context(attention_mask, f"the template ({length} tokens)", length)

        batch, device = len(input_ids), input_ids.device
        # What fills the last block up is not there.
        canvas = torch.zeros(batch, length, dtype=torch.long, device=device)
        canvas[:, : len(ids)] = torch.tensor(ids, device=device)
        absent = (torch.arange(length, device=device) >= len(ids)).repeat(batch, 1)
        suffix = torch.empty(0, dtype=torch.long, device=device)
        hooks = Blanks(blanks, batch, device)
        state = DenoisingState(self, options, input_ids, canvas, attention_mask, suffix, absent=absent, hooks=hooks)
        images = {"pixel_values": pixel_values, "image_sizes": image_sizes, "batch_num_images": batch_num_images}
        history = self._denoise(state, **images)

        answers = [row[~gone] for row, gone in zip(state.canvas, state.absent)]
        padded = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=state.padding)
        lengths = hooks.length
        fields, spans, confidences = ([{} for _ in range(batch)] for _ in range(3))
        for number, blank in enumerate(blanks):
            values = answer_confidence(state.commit_confidence[:, blank.start : blank.end], lengths[:, number] + 1)
            for row in range(batch):
                width = int(lengths[row, number])
                own = state.canvas[row, blank.start : blank.start + width]
                start = int((~state.absent[row, : blank.start]).sum())
                spans[row][blank.name] = (start, start + width)
                fields[row][blank.name] = tokenizer.decode(own, skip_special_tokens=True).strip()
                confidences[row][blank.name] = float(values[row])
        return LLaDAMedVInfillOutput(
            sequences=torch.cat([input_ids, padded], dim=1),
            texts=[tokenizer.decode(answer, skip_special_tokens=True) for answer in answers],
            fields=fields,
            field_spans=spans,
            field_confidence=confidences,
            num_forwards=state.num_forwards,
            history=history,
        )

    def _parse_template(self, template, tokenizer, choices) -> tuple[list[int], list[Blank]]:
        """The ids of the template, masks at its blanks, and where the blanks are."""
        if not isinstance(template, str) or not _BLANK.search(template):
            raise ValueError(f"`template` is {template!r}; allowed are texts with blanks like [[name:24]].")
        pieces = _BLANK.split(template)  # text, name, length, text, name, length, …, text
        mask, ids, blanks = self.config.mask_token_id, [], []
        for text, name, width in zip(pieces[::3], [*pieces[1::3], None], [*pieces[2::3], None]):
            unpaired = "[[" in text or "]]" in text
            fixed = tokenizer(text, add_special_tokens=False).input_ids if text and not unpaired else []
            if unpaired or mask in fixed or self.config.image_token_id in fixed:
                raise ValueError(
                    f"`template` has {text!r} outside of its blanks; not allowed are unpaired double brackets, the "
                    "mask token and the image token."
                )
            ids += fixed
            if name is None:
                continue
            allowed = self._parse_choices(name, choices[name], tokenizer) if name in choices else ()
            longest = max((len(choice) for choice in allowed), default=0)
            width = longest if width is None else int(width)
            if any(blank.name == name for blank in blanks):
                raise ValueError(f"`template` has two blanks of the name {name!r}; each name is allowed once.")
            if width < max(longest, 1):
                needed = f"choices of up to {longest} tokens" if longest else "no `choices`"
                raise ValueError(
                    f"`template` has the blank {name!r} of {width} tokens and {needed}; it needs a length of at least "
                    "1 that all choices fit into."
                )
            blanks.append(Blank(name, len(ids), len(ids) + width, allowed))
            ids += [mask] * width
        unknown = sorted(set(choices) - {blank.name for blank in blanks})
        if unknown:
            raise ValueError(f"`choices` names {unknown}; the blanks are {[blank.name for blank in blanks]}.")
        return ids, blanks

    @staticmethod
    def _parse_choices(name, texts, tokenizer) -> tuple[tuple[int, ...], ...]:
        """The ids of the texts that may stand in a blank."""
        valid = isinstance(texts, (list, tuple)) and all(isinstance(text, str) and text for text in texts)
        if not valid or not texts or len(set(texts)) < len(texts):
            raise ValueError(
                f"`choices` holds {texts!r} for {name!r}; allowed are non-empty lists of different, non-empty texts."
            )
        return tuple(tuple(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)

    def _check_choices(self, options, blanks, tokenizer) -> None:
        """What must fit the options."""
        suppressed = options.suppress_tokens if options.suppress_tokens is not None else [self.config.mask_token_id]
        for blank in blanks:
            if not blank.choices:
                continue
            for choice in blank.choices:
                if set(choice) & set(suppressed):
                    raise ValueError(
                        f"`choices` holds {tokenizer.decode(choice)!r} for {blank.name!r}, with ids that "
                        f"`suppress_tokens` does not allow: {sorted(set(choice) & set(suppressed))}."
                    )
            if blank.start // options.block_length != (blank.end - 1) // options.block_length:
                raise ValueError(
                    f"`block_length` is {options.block_length}, which cuts the blank {blank.name!r} (tokens "
                    f"{blank.start} to {blank.end - 1}) in two; a blank with choices is decided as a whole."
                )
            if options.no_repeat_ngram_size is not None:
                raise ValueError(
                    f"`no_repeat_ngram_size` is {options.no_repeat_ngram_size}, which is not allowed with `choices`: "
                    "their tokens are committed together."
                )


__all__ = ["LLaDAMedVInfillOutput", "LLaDAMedVInfillingMixin"]
