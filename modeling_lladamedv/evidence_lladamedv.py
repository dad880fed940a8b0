"""Where in its pictures an answer comes from: how much its likelihood falls when a region is hidden.

Occlusion (Zeiler and Fergus, arXiv 1311.2901, section 4.2) hides pixels and runs the vision tower again, because the
features of a patch hold what stands around it. Gradient times input (Shrikumar et al., arXiv 1605.01713) of the pixels
is the cheap first-order answer to the same question; that of the features points elsewhere, for the same reason.
"""

import math
from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput, logging

from .denoising_state_lladamedv import NOT_FINITE
from .hidden_regions_lladamedv import WHOLE, hide_regions, inside, median_colour, picture_views
from .scoring_lladamedv import MAX_EXACT_TOKENS, bound_masks, check_whole_numbers


logger = logging.get_logger(__name__)
METHODS = ("occlusion", "gradient")


@dataclass
class LLaDAMedVEvidenceOutput(ModelOutput):
    """What `explain_image` returns.

    Args:
        maps (`list[torch.DoubleTensor]`, one per picture, of shape `(spans, rows, columns)`):
            The picture, whatever its size, in equal cells. Positive where hiding the cell makes the answer less likely,
            negative where it makes it more likely, in nats for `method="occlusion"`.
        log_likelihood (`torch.DoubleTensor` of shape `(spans,)`):
            The bound on the log-likelihood of each span with the whole pictures, in nats, as of `score`.
        whole_fall (`torch.DoubleTensor` of shape `(pictures, spans)`, *optional*):
            How much that falls when all of a picture is hidden, for `method="occlusion"`. Where this is small, too, the
            answer hardly depends on the picture; where only the map is, what speaks for it is all over the picture.
        answer (`torch.LongTensor` of shape `(tokens,)`): the answer that is explained, without its end.
        num_rows (`int`): rows that the language model ran.
    """

    maps: list[torch.DoubleTensor] = None
    log_likelihood: torch.DoubleTensor = None
    whole_fall: torch.DoubleTensor | None = None
    answer: torch.LongTensor = None
    num_rows: int = None


class LLaDAMedVEvidenceMixin:
    """`explain_image` for a model that has `generate`, `score` and a vision tower."""

    @torch.no_grad()
    def explain_image(
        self,
        input_ids: torch.LongTensor,
        answer=None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        batch_num_images: torch.LongTensor | None = None,
        tokenizer=None,
        method: str = "occlusion",
        spans: list[tuple[int, int]] | None = None,
        append_eos: bool = True,
        cells: int | None = None,
        max_rows: int = 256,
        max_exact_tokens: int = 3,
        num_samples: int = 4,
        seed: int = 0,
        batch_size: int = 32,
        callback=None,
    ) -> LLaDAMedVEvidenceOutput:
        """Say which regions of the pictures of one prompt speak for its answer, and which against it.

        ```
        1. Lay the answer behind the prompt, its end after it, and choose the masks of the likelihood's bound.
        2. Compute the log-likelihood with the whole pictures.
        3. Hide each picture as a whole; then windows of it of about a third of its shorter side that overlap by half,
           one at a time; then windows of half the size where the map is strongest, and so on down to single cells, as
           the rows suffice.
        4. A window's value is the fall of the log-likelihood; a cell's the mean over the windows of one size that cover
           it, averaged over the sizes.
        ```
        The same masks are used with and without a region, so that the difference is less noisy than either.

        Args:
            input_ids (`(1, prompt)`): the prompt, padded on either side if `attention_mask` says so.
            answer: a text (with `tokenizer`) or ids; by default the model's own, by `generate`.
            attention_mask (`(1, prompt)`, *optional*): 1 for tokens, 0 for padding.
            pixel_values, image_sizes, batch_num_images: as the processor returns them.
            tokenizer: turns a text into ids.
            method: `"occlusion"`, or `"gradient"` for gradient times (pixel - median colour), which takes one backward
                pass for each span: how the likelihood begins to fall as a cell fades.
            spans: (start, end) of tokens of the answer; each gets a map of its own, with the rest of the answer given.
                By default the whole answer. Of a filled template, those of `infill`'s `field_spans`.
            append_eos: whether the answer's end stands behind it. It is given, not scored: how long an answer is says
                little about a picture. A filled template has none.
            cells: of a map along the picture's longer side; by default as many as a tile has patches.
            max_rows: most rows that the language model runs for occlusion, a row being the pictures with a region
                hidden and the answer under one mask. More rows make finer maps.
            max_exact_tokens, num_samples, seed: spans of up to so many tokens are evaluated on all subsets of masks,
                longer ones on so many draws, as in [`~LLaDAMedVScoringMixin.score`].
            batch_size: rows per forward pass.
            callback: called after each forward pass with the rows done and those there will be; what it raises ends the
                call.

        Returns:
            [`LLaDAMedVEvidenceOutput`].

        Raises:
            ValueError: for a value that is not allowed, several prompts, a prompt without pictures, an empty answer,
                logits that are not finite, or a `max_rows` that no map fits in.
        """
        attention_mask = self._check_prompt(input_ids, attention_mask)
        if len(input_ids) != 1:
            raise ValueError(f"`input_ids` holds {len(input_ids)} prompts; allowed is one.")
        if pixel_values is None:
            raise ValueError("`pixel_values` is None; only answers about pictures are explained.")
        if method not in METHODS:
            raise ValueError(f"`method` is {method!r}; allowed are {', '.join(METHODS)}.")
        check_whole_numbers(
            cells=(1 if cells is None else cells, 1, math.inf),
            max_rows=(max_rows, 1, math.inf),
            max_exact_tokens=(max_exact_tokens, 0, MAX_EXACT_TOKENS),
            num_samples=(num_samples, 1, math.inf),
            batch_size=(batch_size, 1, math.inf),
        )
        if self.dtype in (torch.float16, torch.bfloat16):
            logger.warning_once(
                f"The model's dtype is {self.dtype}: rounding hides small differences of likelihoods, so that maps are "
                "less exact than in float32."
            )
        images = {"pixel_values": pixel_values, "image_sizes": image_sizes, "batch_num_images": batch_num_images}
        views = picture_views(self.model, **images)
        sizes = [None] * len(views) if image_sizes is None else image_sizes.tolist()
        patches = self.config.vision_config.image_size // self.config.vision_config.patch_size
        shapes = [_map_shape(size, cells or patches) for size in sizes]

        # 1. Lay the answer behind the prompt, its end after it, and choose the masks of the likelihood's bound.
        if answer is None:
            answer = self.generate(input_ids, attention_mask=attention_mask, tokenizer=tokenizer, **images)
            answer = answer[0, input_ids.shape[1] :].tolist()
        ids = self._answer_ids("answer", answer, tokenizer)
        whole = ids + (self._ends()[0] if append_eos else [])
        self._check_context(attention_mask, f"the answer ({len(whole)} tokens)", len(whole))
        masks, weights = _span_masks(spans, len(ids), len(whole), max_exact_tokens, num_samples, seed)
        prompt = input_ids[attention_mask.bool()][None]
        rows = _Rows(self, prompt, images, whole, masks, weights, batch_size, callback)
        answer = torch.tensor(ids)
        if method == "gradient":
            likelihood, maps = rows.gradient_maps(views, shapes)
            return LLaDAMedVEvidenceOutput(maps=maps, log_likelihood=likelihood, answer=answer, num_rows=rows.done)
        plans = [_plan(shape, (max_rows // len(masks) - 1) // len(shapes) - 1) for shape in shapes]
        if not all(plans):
            raise ValueError(
                f"`max_rows` is {max_rows}; the {len(masks)} masks of this answer and {len(shapes)} pictures need at "
                f"least {len(masks) * (1 + 2 * len(shapes))}."
            )
        rows.total = len(masks) * (1 + sum(1 + sum(count for _, count in plan) for plan in plans))

        # 2. Compute the log-likelihood with the whole pictures.
        likelihood = rows.likelihood(rows.prompts(1, **images))[0]

        # 3. and 4. Hide each picture as a whole, then windows of it.
        falls, maps = [], []
        for number, (of_picture, shape, plan) in enumerate(zip(views, shapes, plans)):

            def fall(regions, number=number, of_picture=of_picture):
                return likelihood - rows.hiding(regions, number, of_picture)

            falls.append(fall(WHOLE)[0])
            maps.append(_occlusion_map(shape, plan, fall))
        return LLaDAMedVEvidenceOutput(
            maps=maps, log_likelihood=likelihood, whole_fall=torch.stack(falls), answer=answer, num_rows=rows.done
        )


class _Rows:
    """The answer under every mask, behind prompts that differ in what their pictures hide."""

    def __init__(self, model, ids, images, answer, masks, weights, batch_size, callback):
        self.model, self.ids, self.images, self.weights = model, ids, images, weights
        self.answer, self.masks = torch.tensor(answer, device=ids.device), masks.to(ids.device)
        self.batch_size, self.callback, self.total, self.done = batch_size, callback, len(masks), 0

    def prompts(self, count: int, **images) -> torch.FloatTensor:
        """Embeddings `(count, prompt, hidden)`."""
        ids = self.ids.expand(count, -1)
        return self.model.model(ids, **images, embeddings_only=True, return_dict=True).last_hidden_state

    def likelihood(self, prompts) -> torch.DoubleTensor:
        """The bound `(prompts, spans)`."""
        values, count = [], len(self.masks)
        for part in torch.arange(len(prompts) * count, device=prompts.device).split(self.batch_size):
            masks = self.masks[part % count]
            values.append(self.model._masked_log_probability(prompts[part // count], self.answer, masks))
            self.done += len(part)
            if self.callback is not None:
                self.callback(self.done, self.total)
        values = torch.cat(values).cpu()
        if not values.isfinite().all():
            raise ValueError(f"The model's logits are not finite. {NOT_FINITE}")
        return values.view(-1, count) @ self.weights.T

    def hiding(self, regions, number, views) -> torch.DoubleTensor:
        """The bound `(regions, spans)` with each of `regions` of picture `number` hidden."""
        pixels, sizes, counts = self.images.values()
        others = [each for each in range(len(pixels)) if each != number]
        values = []
        for part in regions.split(max(1, self.batch_size // len(self.masks))):
            shown = [
                len(others) + row if each == number else others.index(each)
                for row in range(len(part))
                for each in range(len(pixels))
            ]
            prompts = self.prompts(
                len(part),
                pixel_values=torch.cat([pixels[others], hide_regions(pixels[number], views, part)]),
                image_sizes=sizes if sizes is None else torch.cat([sizes[others], sizes[[number] * len(part)]]),
                batch_num_images=counts if counts is None else [len(pixels)] * len(part),
                image_index=torch.tensor(shown),
            )
            values.append(self.likelihood(prompts))
        return torch.cat(values)

    @torch.enable_grad()
    def gradient_maps(self, views, shapes) -> tuple[torch.DoubleTensor, list[torch.DoubleTensor]]:
        """The bound `(spans,)`, and the maps by gradient times (pixel - median colour)."""
        pixels = self.images["pixel_values"].detach().clone().requires_grad_()
        likelihood = self.likelihood(self.prompts(1, **self.images | {"pixel_values": pixels}))[0]
        slopes = [torch.autograd.grad(each, pixels, retain_graph=True)[0] for each in likelihood]
        slopes, pixels, maps = torch.stack(slopes), pixels.detach(), []
        for number, (of_picture, shape) in enumerate(zip(views, shapes)):
            away = pixels[number] - median_colour(pixels[number], of_picture)
            values = (slopes[:, number] * away).sum(dim=2).double().cpu()  # (spans, tiles, side, side)
            total = torch.zeros(len(slopes), *shape, dtype=torch.float64)
            for view in of_picture:
                plane = values[:, view.tiles].view(-1, view.rows, view.columns, view.side, view.side).transpose(2, 3)
                plane = plane.reshape(-1, view.rows * view.side, view.columns * view.side)
                top, left, bottom, right = view.box
                down = _shares(shape[0], top, bottom, plane.shape[1])
                total += down @ plane @ _shares(shape[1], left, right, plane.shape[2]).T
            maps.append(total)
        return likelihood.detach(), maps


def _shares(cells: int, start: float, end: float, length: int) -> torch.DoubleTensor:
    """Which share of each of `length` pixels is in each cell of a picture from `start` to `end`, `(cells, length)`."""
    edges, pixel = torch.linspace(start, end, cells + 1, dtype=torch.float64)[:, None], torch.arange(length)
    return (torch.minimum(edges[1:], pixel + 1) - torch.maximum(edges[:-1], pixel)).clamp(min=0)


def _map_shape(size, cells: int) -> tuple[int, int]:
    longest = max(size or (1, 1))
    return tuple(max(1, round(cells * edge / longest)) for edge in size or (1, 1))


def _span_masks(spans, scored: int, length: int, *draws) -> tuple[torch.BoolTensor, torch.DoubleTensor]:
    """The masks of all spans `(masks, length)` and their weights `(spans, masks)`; a span ends by `scored` tokens."""
    masks, weights = [], []
    for span in [(0, scored)] if spans is None else spans:
        start, end = span
        if not 0 <= start < end <= scored:
            raise ValueError(f"`spans` holds {span}; allowed are (start, end) with 0 <= start < end <= {scored}.")
        of_span, weight = bound_masks(end - start, *draws)
        masks.append(torch.nn.functional.pad(of_span, (start, length - end)))
        weights.append(weight[None])
    if not masks:
        raise ValueError("`spans` is empty; allowed are one or more (start, end), or None.")
    return torch.cat(masks), torch.block_diag(*weights)


def _windows(shape: tuple[int, int], size: int) -> torch.DoubleTensor:
    """Windows of `size` by `size` cells that overlap by half and cover all, (top, left, bottom, right) in cells."""
    starts = [[*range(0, length - size, max(1, size // 2)), max(0, length - size)] for length in shape]
    boxes = [(y, x, min(y + size, shape[0]), min(x + size, shape[1])) for y in starts[0] for x in starts[1]]
    return torch.tensor(boxes, dtype=torch.float64)


def _plan(shape: tuple[int, int], budget: int) -> list[tuple[int, int]]:
    """Sizes of windows, and how many of each are hidden, at most `budget` in all; of the first size all."""
    size, plan = 2 ** int(math.log2(max(1, min(shape) // 3))), []
    while size < max(shape) and len(_windows(shape, size)) > budget:
        size *= 2
    while size and budget > 0:
        count = len(_windows(shape, size))
        if plan:
            count = min(count, budget // (int(math.log2(size)) + 1))
        if count:
            plan.append((size, count))
        budget, size = budget - count, size // 2
    return plan


def _occlusion_map(shape, plan, fall) -> torch.DoubleTensor:
    """The map `(spans, rows, columns)`; `fall` gives the fall of the likelihood `(regions, spans)` for regions."""
    total = None
    for size, count in plan:
        windows = _windows(shape, size)
        within = inside(windows, *shape).double()
        if count < len(windows):
            strength = (total.abs() / total.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1e-300)).sum(dim=0)
            best = (within * strength).sum(dim=(1, 2)).topk(count).indices
            windows, within = windows[best], within[best]
        values = torch.einsum("ws,wrc->src", fall(windows / torch.tensor(shape * 2)), within)
        values /= within.sum(dim=0).clamp(min=1)
        total = values if total is None else total + values
    return total / len(plan)  # what is not hidden at a size counts as 0, so that the map stays strongest where it was


__all__ = ["LLaDAMedVEvidenceMixin", "LLaDAMedVEvidenceOutput"]
