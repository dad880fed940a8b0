"""How likely an answer is: the bound on the log-likelihood that a masked-diffusion model is trained on, of given texts.

Source: LLaDA (arXiv 2502.09992, equation 6 and algorithm 3). With l of the L answer tokens masked, l uniform in 1…L and
the places uniform, the bound is the mean of (L / l) · Σ log p(token | prompt, unmasked tokens) over the masked places.
It is also the mean, over all orders of revealing the tokens one by one, of the sum of their log-probabilities.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from transformers.utils import ModelOutput

from .denoising_state_lladamedv import NOT_FINITE


_POSITIONS = 2**14  # in a forward pass for image reliance


MAX_EXACT_TOKENS = 12  # of which all subsets, 4095, are evaluated


@dataclass
class LLaDAMedVScoreOutput(ModelOutput):
    """What `score` returns; `candidates` counts those of the row that has most, and rows with fewer are filled up.

    Args:
        log_likelihood (`torch.DoubleTensor` of shape `(batch, candidates)`):
            The bound, in nats; -inf where a row has no such candidate.
        standard_error (`torch.DoubleTensor` of shape `(batch, candidates)`):
            Of the estimate, at most; 0 where it is exact, NaN where a row has no such candidate.
        num_tokens (`torch.LongTensor` of shape `(batch, candidates)`):
            Tokens that were scored, the appended end token included.
    """

    log_likelihood: torch.DoubleTensor = None
    standard_error: torch.DoubleTensor = None
    num_tokens: torch.LongTensor = None


class LLaDAMedVScoringMixin:
    """`score` for a model whose `forward` is bidirectional and whose config has a `mask_token_id`."""

    def score(
        self,
        input_ids: torch.LongTensor,
        candidates: list,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        batch_num_images: torch.LongTensor | None = None,
        tokenizer=None,
        append_eos: bool = True,
        max_exact_tokens: int = 8,
        num_samples: int = 128,
        seed: int = 0,
        batch_size: int = 32,
        requires_grad: bool = False,
    ) -> LLaDAMedVScoreOutput:
        """Score candidate answers, for example "Yes" and "No", or the options of a multiple-choice question.

        Args:
            input_ids (`(batch, prompt)`): prompts, padded on either side if `attention_mask` says so.
            candidates: the answers: texts (with `tokenizer`) or lists of ids, the same for every prompt; or one such
                list per prompt.
            attention_mask (`(batch, prompt)`, *optional*): 1 for tokens, 0 for padding.
            pixel_values, image_sizes, batch_num_images: as the processor returns them.
            tokenizer: turns texts into ids.
            append_eos: whether the end of the answer is scored too, so that "No" is not preferred to "No effusion" for
                ending early. The end is the `eos_token_id` of the generation config, of several the one that is not
                the `pad_token_id`, which only fills up what stands behind the end. If that leaves several, their
                likelihoods are added up: any of them may end the answer.
            max_exact_tokens: candidates of up to this many tokens are evaluated on all subsets of masks, which takes
                2^L - 1 rows; at most 12.
            num_samples: masks drawn for longer ones.
            seed: of the draws; candidates of the same length share them, which makes their difference less noisy.
            batch_size: rows per forward pass.
            requires_grad: whether `log_likelihood` can be differentiated. The activations of all passes are then kept;
                those of the images, which are encoded once for all candidates, once.

        Returns:
            [`LLaDAMedVScoreOutput`].

        Raises:
            ValueError: before any forward pass, for a value that is not allowed, an empty candidate, one that holds
                the mask token, or a row longer than the model's context; later for logits that are not finite.
        """
        check_whole_numbers(
            max_exact_tokens=(max_exact_tokens, 0, MAX_EXACT_TOKENS),
            num_samples=(num_samples, 2, math.inf),
            batch_size=(batch_size, 1, math.inf),
        )
        attention_mask = self._check_prompt(input_ids, attention_mask)
        answers = self._prepare_candidates(candidates, len(input_ids), tokenizer)
        ends = self._ends() if append_eos else [[]]
        longest = max(len(answer) for row in answers for answer in row) + len(ends[0])
        self._check_context(attention_mask, f"the longest candidate ({longest} tokens)", longest)
        with torch.set_grad_enabled(requires_grad):
            prompts = self.model(
                input_ids, pixel_values, image_sizes, batch_num_images, embeddings_only=True, return_dict=True
            ).last_hidden_state
            # Without its padding, so that neighbours change nothing.
            prompts = [prompt[mask] for prompt, mask in zip(prompts, attention_mask.bool())]
            draws = (batch_size, max_exact_tokens, num_samples, seed)
            return self._score(prompts, answers, ends, draws)

    def _score(self, prompts, answers, ends, draws) -> LLaDAMedVScoreOutput:
        """Score the ids of each row's answers behind its embeddings `(prompt, hidden)`, with each of the ends."""
        shape = (len(answers), max(len(row) for row in answers))
        scores = torch.full(shape, -math.inf, dtype=torch.float64)
        errors = torch.full(shape, math.nan, dtype=torch.float64)
        counts = torch.zeros(shape, dtype=torch.long)
        for row, candidates_of_row in enumerate(answers):
            for place, answer in enumerate(candidates_of_row):
                found = [
                    self._bound([prompts[row]], torch.tensor(answer + end, device=prompts[row].device), *draws)
                    for end in ends
                ]
                values, spread = map(torch.stack, zip(*found))  # (ends,)
                if not values.isfinite().all():
                    raise ValueError(
                        f"The model's logits are not finite for candidate {place} of row {row}. {NOT_FINITE}"
                    )
                scores[row, place] = values.logsumexp(dim=0)
                errors[row, place] = (values.detach().softmax(dim=0) * spread).sum()
                counts[row, place] = len(answer) + len(ends[0])
        return LLaDAMedVScoreOutput(log_likelihood=scores, standard_error=errors, num_tokens=counts)

    def _image_reliance(self, state) -> tuple[torch.DoubleTensor, torch.DoubleTensor]:
        """How much likelier the pictures make the answers of rows that are finished, in nats, and its standard error,
        both `(batch,)`; see [`LLaDAMedVGenerationOutput`]."""
        batch = len(state.canvas)
        found = torch.full((2, batch), math.nan, dtype=torch.float64, device=state.canvas.device)
        for row, stop in enumerate(state.stop.tolist()):
            ended = bool(torch.isin(state.canvas[row, stop : stop + 1], state.eos).any())
            answer = state.canvas[row, : stop + ended]
            shows = bool((state.prompt_ids[row] == self.config.image_token_id).any())
            if shows and len(answer) and not bool((answer == state.mask_token_id).any()):
                prompts = [each[row, state.prompt_mask[row]] for each in (state.prompt_embeds, state.neutral_embeds)]
                rows = max(1, _POSITIONS // (len(prompts[0]) + len(answer)))
                found[:, row] = torch.stack(self._bound(prompts, answer, rows))
        return found[0], found[1]

    def _bound(self, prompts, answer, batch_size, max_exact_tokens=8, num_samples=128, seed=0):
        """The bound of an answer's ids behind a prompt's embeddings, and its standard error, two scalars in float64 on
        the CPU; for two prompts, of their difference on the same masks."""
        masks, weights = bound_masks(len(answer), max_exact_tokens, num_samples, seed)
        parts = masks.to(answer.device).split(batch_size)
        first, *others = (
            torch.cat([self._masked_log_probability(prompt[None], answer, part) for part in parts]).cpu()
            for prompt in prompts
        )
        values = (first - sum(others)) * weights
        exact = len(answer) <= max_exact_tokens
        return values.sum(), values.new_zeros(()) if exact else values.detach().std() * num_samples**0.5

    def _ends(self) -> list[list[int]]:
        """The ids that may end an answer, each as a list, in ascending order; one empty list if there are none."""
        config = self.generation_config
        ids = {*self._check_ids("eos_token_id", config.eos_token_id)}
        return [[end] for end in sorted(ids - {config.pad_token_id} or ids)] or [[]]

    def _prepare_candidates(self, candidates, batch, tokenizer) -> list[list[list[int]]]:
        """Ids of the candidates of each row."""
        if not isinstance(candidates, (list, tuple)) or not candidates:
            raise ValueError(
                f"`candidates` is {candidates!r}; allowed are non-empty lists of texts or of lists of ids."
            )
        nested = all(isinstance(row, (list, tuple)) and row and not isinstance(row[0], int) for row in candidates)
        rows = list(candidates) if nested else [candidates] * batch
        if len(rows) != batch:
            raise ValueError(f"`candidates` holds lists for {len(rows)} prompts; `input_ids` holds {batch}.")
        return [[self._answer_ids("candidates", candidate, tokenizer) for candidate in row] for row in rows]

    def _answer_ids(self, name: str, answer, tokenizer) -> list[int]:
        """The ids of an answer, which the argument `name` holds."""
        ids = answer
        if isinstance(answer, str):
            if tokenizer is None:
                raise ValueError(f"`{name}` holds the text {answer!r}; texts need `tokenizer`.")
            ids = tokenizer(answer, add_special_tokens=False).input_ids
        ids = ids.tolist() if isinstance(ids, (np.ndarray, torch.Tensor)) else ids
        size = self.config.get_text_config().vocab_size
        known = isinstance(ids, (list, tuple)) and ids and all(token in range(size) for token in ids)
        if not known or self.config.mask_token_id in ids:
            raise ValueError(
                f"`{name}` holds {answer!r}; allowed are non-empty answers of ids below {size} without the mask token "
                f"{self.config.mask_token_id}."
            )
        return [int(token) for token in ids]

    def _masked_log_probability(self, prompts, answer, masks) -> torch.DoubleTensor:
        """Sum of the log-probabilities of the masked tokens of `answer`, for each row `(rows,)` of `masks`
        `(rows, answer)` behind the same row of `prompts` `(rows or 1, prompt, hidden)`."""
        embeds = self.get_input_embeddings()(torch.where(masks, self.config.mask_token_id, answer))
        embeds = torch.cat([prompts.expand(len(masks), -1, -1), embeds], dim=1)
        keep = torch.nn.functional.pad(masks, (prompts.shape[1], 0))
        # (masked tokens, vocabulary)
        logits = self(inputs_embeds=embeds, logits_to_keep=keep, return_dict=True).logits
        targets = answer.expand(len(masks), -1)[masks]
        chosen = []
        for values, target in zip(logits.split(8), targets.split(8)):  # a float64 copy of all would be large
            values = values.double()
            chosen.append(values.gather(-1, target[:, None])[:, 0] - values.logsumexp(dim=-1))
        row = torch.arange(len(masks), device=masks.device)[:, None].expand_as(masks)[masks]
        sums = torch.zeros(len(masks), dtype=torch.float64, device=masks.device)
        return sums.index_add(0, row, torch.cat(chosen))


def check_whole_numbers(**arguments: tuple[object, int, float]) -> None:
    """Refuse arguments, each given as (value, least, most), that are no whole number within these bounds."""
    for name, (value, least, most) in arguments.items():
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            bound = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
            raise ValueError(f"`{name}` is {value!r}; allowed are whole numbers {bound}.")


def bound_masks(length: int, max_exact: int, num_samples: int, seed: int) -> tuple[torch.BoolTensor, torch.Tensor]:
    """The masks `(masks, length)` of the bound, and what the sum over each one's masked places weighs in it, in float64
    `(masks,)`: every subset of up to `max_exact` places, `num_samples` draws of more."""
    if length <= max_exact:
        # Every number of masks weighs the same, and within it every subset.
        masks = _all_masks(length)
        return masks, torch.tensor(
            [1 / (size * math.comb(length, size)) for size in masks.sum(dim=1).tolist()], dtype=torch.float64
        )
    masks = _random_masks(length, num_samples, seed)
    return masks, length / masks.sum(dim=1).double() / num_samples


def _all_masks(length: int) -> torch.BoolTensor:
    """Every non-empty subset of the places, `(2^length - 1, length)`."""
    return torch.tensor(list(itertools.product([False, True], repeat=length)))[1:]


def _random_masks(length: int, count: int, seed: int) -> torch.BoolTensor:
    """`count` subsets: their size uniform in 1…length, their places uniform."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, length + 1, (count, 1), generator=generator)
    rank = torch.rand(count, length, generator=generator).argsort(dim=1).argsort(dim=1)
    return rank < sizes


__all__ = ["LLaDAMedVScoreOutput", "LLaDAMedVScoringMixin"]
