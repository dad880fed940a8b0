"""The masked-diffusion loss of LLaDA: noise the answer, predict what was masked, weigh by how much was masked.

Source: LLaDA (arXiv 2502.09992), algorithm 2 and equation 5; constants as in LLaDA-V's (arXiv 2505.16933) training.
The trainer gives every answer its own draws ([`AnswerNoise`]), so that they depend neither on padding nor on how a
batch is split over processes and accumulation steps.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F


IGNORE_INDEX = -100
EPSILON = 1e-3  # the masking probability never falls below this, so that its inverse stays bounded
LOSS_WEIGHTINGS = ("inverse_probability", "clipped", "uniform")
LOSS_NORMALIZATIONS = ("answer_length", "tokens", "batch")
TIME_SAMPLINGS = ("uniform", "stratified", "antithetic")


@dataclass
class NoisedBatch:
    """A batch in which part of the answer tokens is masked.

    Attributes:
        input_ids (`(batch, sequence)`): the noised tokens.
        masked (`(batch, sequence)`, bool): where the mask token was put.
        probability (`(batch,)` or `(batch, sequence)`): the masking probability p of each row, or of each token.
    """

    input_ids: torch.LongTensor
    masked: torch.BoolTensor
    probability: torch.FloatTensor


def sample_timesteps(
    batch_size: int, generator: torch.Generator | None = None, stratified: bool = False, device=None
) -> torch.FloatTensor:
    """Draw t in [0, 1) for every row.

    Args:
        batch_size: number of rows.
        generator: source of randomness.
        stratified: give every row its own 1/batch_size-wide part of the interval, in random order; each t is still
            uniform, but a batch's average varies less.
        device: where to draw.

    Returns:
        `(batch_size,)` float32.
    """
    t = torch.rand(batch_size, generator=generator, device=device)
    if stratified:
        t = (torch.randperm(batch_size, generator=generator, device=device) + t) / batch_size
    return t


def add_noise(
    input_ids: torch.LongTensor,
    labels: torch.LongTensor,
    t: torch.FloatTensor,
    mask_token_id: int,
    generator: torch.Generator | None = None,
    uniform: torch.FloatTensor | None = None,
) -> NoisedBatch:
    """Mask each labelled token with probability p = (1 - 1e-3) t + 1e-3.

    Args:
        input_ids, labels (`(batch, sequence)`): tokens, and the same tokens with -100 where nothing is to be learned.
        t (`(batch,)` or `(batch, sequence)`): time of each row, or of each token.
        mask_token_id: id to put in.
        generator: source of randomness for `uniform`.
        uniform (`(batch, sequence)`): the draws to use, instead of new ones.
    """
    if uniform is None:
        uniform = torch.rand(input_ids.shape, generator=generator, device=input_ids.device)
    probability = (1 - EPSILON) * t + EPSILON
    threshold = probability if probability.dim() == 2 else probability[:, None]
    masked = (uniform < threshold) & (labels != IGNORE_INDEX)
    return NoisedBatch(input_ids.masked_fill(masked, mask_token_id), masked, probability)


def complement(noised: NoisedBatch, input_ids: torch.LongTensor, labels: torch.LongTensor, mask_token_id: int):
    """The same batch with exactly the other answer tokens masked (LaViDa, arXiv 2505.16839, section 3.2).

    A token is masked here with probability 1 - p, which has no lower bound; its inverse is bounded as p's is.
    """
    masked = ~noised.masked & (labels != IGNORE_INDEX)
    probability = (1 - noised.probability).clamp(min=EPSILON)
    return NoisedBatch(input_ids.masked_fill(masked, mask_token_id), masked, probability)


def loss_weights(
    labels: torch.LongTensor,
    noised: NoisedBatch,
    answer_ids: torch.LongTensor | None = None,
    weighting: str = "inverse_probability",
    max_weight: float = 10.0,
    normalization: str = "answer_length",
    num_answers: int | None = None,
    num_tokens: int | None = None,
) -> torch.FloatTensor:
    """What the cross-entropy of each masked token counts in the loss, `(batch, sequence)`; 0 where nothing is masked.

    Args:
        labels (`(batch, sequence)`): see [`add_noise`].
        noised: what [`add_noise`] returned.
        answer_ids (`(batch, sequence)`, *optional*): number of the answer, within the batch, that each token belongs
            to, where a row holds several; by default a row is an answer.
        weighting: `"inverse_probability"` (1 / p, which makes the loss a bound on the likelihood: LLaDA), `"clipped"`
            (1 / p, but at most `max_weight`), or `"uniform"` (1: every masked token counts the same).
        max_weight: of `"clipped"`.
        normalization: divide by the number of the answer's labelled tokens and average over answers
            (`"answer_length"`: LLaDA-V's training), divide by the batch's number of labelled tokens (`"tokens"`), or
            sum over tokens and average over answers (`"batch"`: LLaDA, equation 5).
        num_answers, num_tokens: what to divide by, where this is a part of a larger batch; by default its own numbers.

    Returns:
        Weights. An answer without labels counts as 0.
    """
    labelled = labels != IGNORE_INDEX
    if answer_ids is None:
        answer_ids = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
    probability = noised.probability if noised.probability.dim() == 2 else noised.probability[:, None]
    weights = torch.ones_like(probability) if weighting == "uniform" else 1 / probability
    if weighting == "clipped":
        weights = weights.clamp(max=max_weight)
    weights = weights * noised.masked
    if normalization == "tokens":
        return weights / max(1, int(labelled.sum()) if num_tokens is None else num_tokens)
    own_answers = int(answer_ids.max()) + 1
    if normalization == "answer_length":
        counts = torch.zeros(own_answers, device=labels.device).index_add_(
            0, answer_ids.flatten(), labelled.flatten().float()
        )
        weights = weights / counts.clamp(min=1)[answer_ids]
    return weights / (own_answers if num_answers is None else num_answers)


def masked_diffusion_loss(
    masked_logits: torch.FloatTensor, labels: torch.LongTensor, noised: NoisedBatch
) -> torch.FloatTensor:
    """Mean over rows of the sum over masked tokens of cross-entropy / p / number of labelled tokens.

    Args:
        masked_logits (`(number of masked tokens, vocabulary)`): logits at `noised.masked`, as
            `model(..., logits_to_keep=noised.masked)` gives them.
        labels (`(batch, sequence)`): see [`add_noise`].
        noised: what [`add_noise`] returned.

    Returns:
        A scalar. A row without labels counts as 0.
    """
    cross_entropy = F.cross_entropy(masked_logits.float(), labels[noised.masked], reduction="none")
    return (cross_entropy * loss_weights(labels, noised)[noised.masked]).sum()


def run_masked_loss(
    model,
    inputs: dict,
    labels: torch.LongTensor,
    noised: NoisedBatch,
    weights: torch.FloatTensor,
    fused: bool | None = None,
) -> tuple[torch.FloatTensor, torch.BoolTensor]:
    """The loss of a model, whose last layer and output layer run at the masked tokens alone.

    Args:
        model: may be wrapped.
        inputs: what the model takes besides the tokens.
        labels, noised: see [`add_noise`].
        weights: of [`loss_weights`].
        fused: whether the output layer is TRL's fused one (`trl.trainer.utils.add_fused_lm_head`), which the model must
            then have: in tiles, each computed a second time for the gradients, so that all logits are never there. By
            default on accelerators; on a CPU it takes about twice as long.

    Returns:
        The loss, a scalar, and for each masked token, row after row, whether the model finds it.
    """
    masked = noised.masked
    targets, inputs = labels[masked], inputs | {"input_ids": noised.input_ids}
    if masked.device.type != "cpu" if fused is None else fused:
        outputs = model(**inputs, query_mask=masked, shift_labels=targets, fused_lm_head=True)
        log_probs, found = outputs.log_probs.float(), outputs.is_top1
    else:
        logits = model(**inputs, logits_to_keep=masked).logits.float()
        log_probs, found = -F.cross_entropy(logits, targets, reduction="none"), logits.argmax(dim=-1) == targets
    return -(log_probs * weights[masked]).sum(), found


class AnswerNoise:
    """Times and uniform draws for the answers of a batch, each from a generator of its own.

    An answer's generator is seeded with the run's seed, the optimizer step and the answer's place in the whole batch
    of that step, over all processes and accumulation steps. Two processes therefore draw different noise, and together
    what one process with twice the batch draws; a resumed run goes on with what it would have drawn.

    Args:
        seed: of the run.
        sampling: `"uniform"`; `"stratified"`, every row of the whole batch in its own part of [0, 1), in random order;
            or `"antithetic"`, t and 1 - t for rows next to each other.
    """

    def __init__(self, seed: int, sampling: str = "uniform"):
        self.seed, self.sampling = seed, sampling

    def __call__(
        self, labels: torch.LongTensor, answer_ids: torch.LongTensor, step: object, first_row: int, num_rows: int
    ) -> tuple[torch.FloatTensor, torch.FloatTensor]:
        """Draw for a part of the whole batch.

        Args:
            labels, answer_ids (`(rows, sequence)`): see [`loss_weights`].
            step: of the optimizer, or whatever else tells draws apart.
            first_row: place of the first of these rows in the whole batch.
            num_rows: of the whole batch.

        Returns:
            `t` and `uniform`, `(rows, sequence)` each, on the CPU and then moved to where `labels` are.
        """
        t, uniform = torch.zeros(labels.shape), torch.ones(labels.shape)
        order = torch.randperm(num_rows, generator=self._generator(step, "order"))
        for row, (answers, labelled) in enumerate(zip(answer_ids.cpu(), (labels != IGNORE_INDEX).cpu())):
            numbers = answers[labelled].unique(sorted=True).tolist()
            for place, number in enumerate(numbers):
                mine = labelled & (answers == number)
                generator = self._generator(step, first_row + row, place)
                draw = float(torch.rand((), generator=generator))
                t[row, mine] = self._time(draw, step, first_row + row, place, len(numbers), order)
                uniform[row, mine] = torch.rand(int(mine.sum()), generator=generator)
        return t.to(labels.device), uniform.to(labels.device)

    def fixed(
        self, labels: torch.LongTensor, answer_ids: torch.LongTensor, number: int, of: int
    ) -> tuple[torch.FloatTensor, torch.FloatTensor]:
        """The `number`-th of `of` times spread evenly over [0, 1], and draws that depend on the answer alone: for an
        evaluation that says the same of the same model. Arguments and return value are those of a call."""
        t, uniform = torch.full(labels.shape, (number + 0.5) / of), torch.ones(labels.shape)
        for row, (answers, learned) in enumerate(zip(answer_ids.cpu(), labels.cpu())):
            for answer in answers[learned != IGNORE_INDEX].unique().tolist():
                mine = (learned != IGNORE_INDEX) & (answers == answer)
                generator = self._generator("fixed", learned[mine].tolist(), number)
                uniform[row, mine] = torch.rand(int(mine.sum()), generator=generator)
        return t.to(labels.device), uniform.to(labels.device)

    def _time(self, draw, step, row, place, num_answers, order):
        if self.sampling == "stratified":
            # A row's answers share its part of the interval, each with a part of that.
            return (float(order[row]) + (place + draw) / num_answers) / len(order)
        if self.sampling == "antithetic" and row % 2:
            return 1 - float(torch.rand((), generator=self._generator(step, row - 1, place)))
        return draw

    def _generator(self, *names: object) -> torch.Generator:
        digest = hashlib.sha256(repr((self.seed, *names)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
