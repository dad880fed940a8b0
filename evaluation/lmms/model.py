"""LLaDA-MedV as a chat model of lmms-eval; importing this needs lmms-eval."""

from __future__ import annotations

import inspect

import torch
from accelerate import Accelerator
from huggingface_hub.utils import tqdm
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from loguru import logger

from lladamedv.evaluation.answering import answer_batch
from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration
from lladamedv.processing import LLaDAMedVProcessor

from .options import cut_at, ignored_arguments, parse_generation_options


DTYPES = ("auto", "float32", "bfloat16", "float16")


class LLaDAMedV(lmms):
    """The model that lmms-eval asks.

    Every option of the diffusion is a model argument, so that the response cache tells runs with different ones apart.
    Of the generation arguments that a task or --gen_kwargs brings, `until` cuts the finished answer. The others give
    way to the model arguments and their defaults, with a warning where they differ; an option of the diffusion among
    them is an error, unless the response cache has all answers and the model is not asked. Do not use that cache with a
    `temperature` above 0 or `remasking=random`: it would repeat the answers that were sampled first.

    Under `accelerate launch` each process has a copy of the model and answers its part of the questions.

    Args:
        pretrained: folder or Hub id.
        revision: branch, tag or commit on the Hub.
        device: where the model goes; by default where `accelerate` would put it.
        dtype: one of `DTYPES`; `"auto"` is what the checkpoint has.
        batch_size: questions per batch (`--batch_size`). Answers do not depend on it.
        max_batch_size: lmms-eval passes it; not used.
        options: options of `generate`, see [`parse_generation_options`].

    Raises:
        ValueError: before the checkpoint is loaded, for an argument that does not exist or a value that is not allowed.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        revision: str = "main",
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **options,
    ):
        super().__init__()
        own = tuple(inspect.signature(type(self)).parameters)[:-1]
        self.options = parse_generation_options(options, others=own)
        if dtype not in DTYPES:
            raise ValueError(f"`dtype` is {dtype!r}; allowed are {DTYPES}.")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"`batch_size` is {batch_size!r}; allowed are whole numbers of at least 1.")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = torch.device(device or self.accelerator.device)
        self.processor = LLaDAMedVProcessor.from_pretrained(pretrained, revision=revision)
        model = LLaDAMedVForConditionalGeneration.from_pretrained(pretrained, revision=revision, dtype=dtype)
        self.model = model.eval().to(self.device)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer all requests, in their order.

        Raises:
            ValueError: for an option of the diffusion among generation arguments, before any answer is given, and for a
                question with anything but texts and images.
        """
        in_force = {**vars(self.model.generation_config), **self.options, "num_beams": 1}
        in_force["do_sample"] = in_force["temperature"] > 0
        shown = [{}]
        for request in requests:
            ignored = ignored_arguments(request.args[2], in_force)
            if ignored not in shown:
                shown.append(ignored)
                logger.warning(f"Generation arguments that give way to the model arguments {self.options}: {ignored}")
        results, seconds, forwards = [], 0.0, 0
        with tqdm(total=len(requests), unit="question", disable=self.rank != 0) as progress:
            for start in range(0, len(requests), self.batch_size):
                batch = requests[start : start + self.batch_size]
                chats = [self._chat(request) for request in batch]
                for request, answer in zip(batch, answer_batch(self.model, self.processor, chats, **self.options)):
                    text = cut_at(answer.text, request.args[2].get("until"))
                    results.append(GenerationResult(text, TokenCounts(output_tokens=answer.num_tokens)))
                    seconds += answer.seconds
                    forwards += answer.num_forwards
                progress.update(len(batch))
        if results:
            tokens = sum(result.token_counts.output_tokens for result in results)
            log_metrics(seconds, tokens, tokens / seconds, {"forwards_per_answer": forwards / len(results)})
        return results

    def _chat(self, request: Instance) -> list[dict]:
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id])).to_hf_messages()
        kinds = {part["type"] for message in messages for part in message["content"]}
        if not kinds <= {"text", "image"}:
            raise ValueError(f"`{task}` asks about {sorted(kinds)}; allowed are text and image.")
        return messages

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Raises NotImplementedError: `score` gives likelihoods, but greedy decoding token by token has no meaning."""
        raise NotImplementedError(
            "lmms-eval asks whether greedy decoding, token after token, gives an answer, which has no meaning here. "
            "The model's `score` gives the likelihood."
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Raises NotImplementedError."""
        raise NotImplementedError("Tasks of several rounds are about videos and web search; this model reads pictures.")
