"""Answers that come and go while others run: one object that owns the rows, as Transformers' continuous batching does.

Requests join between two denoising steps and leave when they are finished or cancelled. Rows with the same options and
the same lengths share forward passes; a row's passes depend on itself alone, so each request gets the tokens, in the
order, that it would have got alone. Only noise (`temperature`, `remasking="random"`) is drawn anew, but for requests
with a `seed`, which share no passes.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import threading
import traceback
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .denoising_state_lladamedv import DenoisingState
from .generation_lladamedv import stream
from .modeling_lladamedv import count_tiles


logger = logging.getLogger(__name__)
PATIENCE = 4  # steps that a row may wait for others before a pass over all of it
_NOT_SHARED = ("output_history", "output_cache_drift", "compile_config")  # of a whole call of `generate`


class PositionsError(ValueError):
    """A request needs more positions than a batch may hold.

    Attributes:
        positions: that it needs.
        max_positions: of the batch.
    """

    def __init__(self, positions: int, max_positions: int):
        super().__init__(f"The prompt needs {positions} positions; `max_positions` of the batch is {max_positions}.")
        self.positions, self.max_positions = positions, max_positions


@dataclass(eq=False)
class Request:
    """A prompt that waits, is being answered, or has its [`LLaDAMedVGenerationOutput`] as `future.result()`, without
    `cache_drift` and `history`.

    `future.cancel()` before it runs, and [`ContinuousBatch.cancel`] at any time, take it out.
    """

    state: DenoisingState | None  # until its rows have joined those of others
    images: dict
    image_keys: list[bytes]
    key: tuple  # requests of one key share passes
    positions: int  # what it needs of the budget
    padding: int  # on the left of its prompt
    streamer: object = None
    noise: list[torch.Tensor] | None = None  # states of the random numbers of a request with a seed
    future: Future = field(default_factory=Future)
    streamed: int = 0
    is_cancelled: bool = False


class ContinuousBatch:
    """Denoise many prompts at once, each with its own options, arriving and leaving at any step.

    Use it from any number of threads: `submit` returns at once, and one thread runs `run` (or calls `step`); `start`
    makes one.

    Args:
        model: with `generate`, on its device.
        max_positions: how many positions (prompt, canvas and suffix; twice as many with guidance) are in work at a
            time. Requests beyond that wait in order; one that needs more is refused. What `output_image_reliance` runs
            when an answer is finished does not count, and lets the others wait.
        image_cache_bytes: for features of pictures, so that more questions about one do not encode it again; the
            pictures that were not asked about for the longest time are dropped.
        describe_pictures: called with the hidden states of the vision tower, `(pictures, patches, width)` each, of
            pictures that are not kept (of their first tile, the whole picture); returns a small object for each, which
            is kept with the features. A streamer gets those of its request by a method `put_descriptions`, before the
            prompt. What is said of a picture so costs no second run of the tower.
    """

    def __init__(
        self,
        model,
        max_positions: int = 16384,
        image_cache_bytes: int = 2**28,
        describe_pictures: Callable[[tuple[torch.Tensor, ...]], Sequence] | None = None,
    ):
        self.model, self.max_positions = model, max_positions
        self._waiting: deque[Request] = deque()
        self._groups: dict[tuple, tuple[DenoisingState, list[Request]]] = {}
        self._features = _ImageFeatures(image_cache_bytes, describe_pictures)
        self._changed = threading.Condition()
        self._stopped = False
        self._counts = Counter()
        self._thread = threading.Thread(target=self._run_quietly, name="lladamedv-batch", daemon=True)

    def submit(
        self, input_ids, generation_config=None, attention_mask=None, tokenizer=None, streamer=None, pixel_values=None,
        image_sizes=None, batch_num_images=None, seed=None, **kwargs,
    ) -> Request:  # fmt: skip
        """Add a prompt. Arguments are those of [`~LLaDAMedVGenerationMixin.generate`], of one row, and:

        Args:
            seed: of the noise, which then is as after `torch.manual_seed(seed)`.

        Raises:
            PositionsError: if the prompt needs more than `max_positions`.
            ValueError: as `generate`; or for options of a whole call (`output_history`, `output_cache_drift`,
                `compile_config`).
            RuntimeError: if the batch is stopped.
        """
        if len(input_ids) != 1:
            raise ValueError(f"`input_ids` holds {len(input_ids)} prompts; submit one at a time.")
        if batch_num_images is not None and len(batch_num_images) != 1:
            raise ValueError(f"`batch_num_images` is {batch_num_images.tolist()}; of one prompt it has one entry.")
        if attention_mask is not None and int(attention_mask.sum()) == attention_mask.numel():
            attention_mask = None
        # A few tokens of padding, an eighth at most, let prompts of unequal length share passes.
        length = input_ids.shape[1]
        unit = max(8, 1 << (length.bit_length() - 4))
        padding = -length % unit
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        # What stands in the padding is not seen; it must not be an image token.
        padded = torch.nn.functional.pad(input_ids, (padding, 0), value=self.model.config.mask_token_id)
        mask = torch.nn.functional.pad(mask, (padding, 0))
        state = self.model.prepare_denoising(padded, generation_config, mask, tokenizer, **kwargs)
        options = state.options
        for name in _NOT_SHARED:
            if getattr(options, name):
                raise ValueError(f"`{name}` is {getattr(options, name)}; it is for `generate`, not for shared batches.")
        state.patience = PATIENCE
        positions = padded.shape[1] + state.canvas.shape[1] + len(state.suffix)
        positions *= state.sides
        if positions > self.max_positions:
            raise PositionsError(positions, self.max_positions)
        images = {"pixel_values": pixel_values, "image_sizes": image_sizes, "batch_num_images": batch_num_images}
        key = (padded.shape[1], str(state.stop_sequences), str(state.suffix.tolist()), options.to_json_string(False))
        noise = None
        if seed is not None and (options.temperature > 0 or options.remasking == "random"):
            noise, key = self._seeded(seed), (*key, object())  # like no other
        image_keys = [] if pixel_values is None else self._features.keys(self.model, **images)
        request = Request(state, images, image_keys, key, positions, padding, streamer, noise)
        with self._changed:
            if self._stopped:
                raise RuntimeError("The batch is stopped.")
            self._waiting.append(request)
            self._changed.notify_all()
        return request

    def cancel(self, request: Request) -> None:
        """Take a request out: its place is free at the next step. One that is finished stays so."""
        with self._changed:
            request.is_cancelled = True
            self._changed.notify_all()

    def stats(self) -> dict[str, int]:
        """What is in work and what has been done since the beginning.

        `waiting`, `running` (requests), `positions` (of those running), `requests`, `finished`, `cancelled`, `failed`,
        `tokens` (of finished answers), `passes` (forward passes), `rows` (rows in them), `image_cache_hits`,
        `image_cache_misses`, `image_cache_bytes`.
        """
        with self._changed:
            running = [request for _, requests in self._groups.values() for request in requests]
            names = ("requests", "finished", "cancelled", "failed", "tokens", "passes", "rows")
            return {
                "waiting": len(self._waiting),
                "running": len(running),
                "positions": sum(request.positions for request in running),
                **{name: self._counts[name] for name in names},
                "image_cache_hits": self._features.hits,
                "image_cache_misses": self._features.misses,
                "image_cache_bytes": self._features.num_bytes,
            }

    def start(self) -> None:
        """Let a thread of its own [`run`] the batch; on a CPU it takes one of PyTorch's threads less, but at least one.
        Of an error that ends it the log has the type alone: its message may quote a prompt."""
        self._num_threads = torch.get_num_threads()  # of the caller: what a new thread has, another batch may have set
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether the thread of [`start`] answers requests."""
        return self._thread.is_alive()

    def _run_quietly(self) -> None:
        if self.model.device.type == "cpu":
            # Threads that read requests need a core: a step waits for the slowest of its threads.
            torch.set_num_threads(max(1, self._num_threads - 1))
        try:
            self.run()
        except Exception as error:
            logger.error("the batch has ended: %s", type(error).__name__)

    def run(self) -> None:
        """Answer requests until [`stop`] is called. An error that ends it stops the batch, too."""
        error = RuntimeError("The batch is stopped.")
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped or self._waiting or self._groups)
                    if self._stopped:
                        return
                self.step()
        except BaseException as caught:
            error = RuntimeError(f"The batch is stopped ({type(caught).__name__}).")
            raise
        finally:
            self.stop()
            self._fail_all(error)

    def stop(self) -> None:
        """Let [`run`] return; requests that are not finished fail."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @torch.no_grad()
    def step(self) -> bool:
        """Let requests leave and join, then one denoising step of every row. Returns whether there is more to do."""
        self._leave()
        self._join()
        for key, (state, requests) in [*self._groups.items()]:
            try:
                with self._drawing(requests[0]):
                    passes = self.model.denoising_step(state)
            except Exception as error:  # such as too little memory: these rows are lost, others are not
                self._end(key, requests, _light(error))
                continue
            if state.drift is not None:
                del state.drift.history[:-1]  # of rows that are gone
            self._counts.update(passes=len(passes), rows=sum(len(each.numbers) for each in passes))
            for row, request in enumerate(requests):
                broken = state.progress.broken[row] >= 0
                if request.streamer is not None and not (request.is_cancelled or broken):
                    self._stream(state, row, request)
            self._finish(key)
        return bool(self._waiting or self._groups)

    # Noise of requests with a seed

    def _devices(self) -> list[torch.device]:
        return [self.model.device] if self.model.device.type == "cuda" else []

    def _noise(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices())]

    def _seeded(self, seed: int) -> list[torch.Tensor]:
        states = [torch.Generator().manual_seed(seed).get_state()]
        return states + [torch.Generator(device).manual_seed(seed).get_state() for device in self._devices()]

    @contextmanager
    def _drawing(self, request: Request):
        """Draw the noise of a request with a seed; all other noise goes on as if it had not been drawn."""
        if request.noise is None:
            yield
            return
        with torch.random.fork_rng(self._devices()):
            torch.set_rng_state(request.noise[0])
            for device, state in zip(self._devices(), request.noise[1:]):
                torch.cuda.set_rng_state(state, device)
            yield
            request.noise = self._noise()

    # A step

    def _leave(self) -> None:
        """Take out what was cancelled."""
        with self._changed:
            gone = [request for request in self._waiting if request.is_cancelled]
            self._waiting = deque(request for request in self._waiting if not request.is_cancelled)
        for request in gone:
            self._close(request, "cancelled")
        for key, (_, requests) in [*self._groups.items()]:
            left = [row for row, request in enumerate(requests) if not request.is_cancelled]
            if len(left) < len(requests):
                for request in requests:
                    if request.is_cancelled:
                        self._close(request, "cancelled")
                self._keep(key, left)

    def _join(self) -> None:
        """Let requests in, in their order, as far as the budget allows."""
        while True:
            with self._changed:
                used = sum(request.positions for _, requests in self._groups.values() for request in requests)
                if not self._waiting or used + self._waiting[0].positions > self.max_positions:
                    return
                request = self._waiting.popleft()
            if not request.future.set_running_or_notify_cancel():
                self._close(request, "cancelled")
                continue
            self._counts.update(requests=1)
            try:
                said = self._features.begin(self.model, request.state, request.images, request.image_keys)
                request.images = {}
                if request.streamer is not None:
                    if hasattr(request.streamer, "put_descriptions"):
                        request.streamer.put_descriptions(said)
                    request.streamer.put(request.state.prompt_ids[:, request.padding :].cpu())
            except Exception as error:  # pictures that do not fit the prompt, or too little memory
                self._close(request, "failed", _light(error))
                continue
            state, requests = self._groups.get(request.key, (request.state, []))
            with self._changed:
                self._groups[request.key] = state, [*requests, request]
            try:
                if requests:
                    state.join(request.state)
            except Exception as error:  # too little memory: half joined, none of these rows can go on
                self._end(request.key, [*requests, request], _light(error))
            request.state = None

    def _finish(self, key) -> None:
        """Give finished rows their answers."""
        state, requests = self._groups[key]
        progress = state.progress
        if not any(progress.finished) and max(progress.broken) < 0:
            return
        progress.read(state)
        left = []
        for row, request in enumerate(requests):
            if progress.broken[row] < 0 and not progress.finished[row]:
                left.append(row)
                continue
            try:
                alone = state.row(row)
                alone.check_finite()
                output = self.model.finish_denoising(alone)
                output.sequences = output.sequences[:, request.padding :]
                self._counts.update(tokens=int(alone.stop[0]))
                self._close(request, "finished", output=output)
            except Exception as error:
                self._close(request, "failed", _light(error))
        self._keep(key, left)

    def _keep(self, key, left: list[int]) -> None:
        with self._changed:
            state, requests = self._groups.pop(key)
            if left:
                self._groups[key] = state.take(left), [requests[row] for row in left]

    def _stream(self, state, row, request) -> None:
        try:
            request.streamed = stream(request.streamer, state, request.streamed, row)
        except Exception as error:  # of the streamer, which is not ours
            request.is_cancelled = True
            request.future.set_exception(_light(error))

    def _close(self, request, how: str, error: Exception | None = None, output=None) -> None:
        self._counts.update([how])
        request.state, request.images = None, {}
        try:
            if request.streamer is not None:
                request.streamer.end()
        except Exception as caught:  # of the streamer, which is not ours
            error = error or _light(caught)
        if request.future.done():
            return
        if how == "cancelled":
            if not request.future.cancel():
                request.future.set_exception(CancelledError())
        elif error is not None:
            request.future.set_exception(error)
        else:
            request.future.set_result(output)

    def _end(self, key, requests, error) -> None:
        with self._changed:
            self._groups.pop(key)
        for request in requests:
            self._close(request, "failed", error)

    def _fail_all(self, error) -> None:
        for request in [*self._waiting, *itertools.chain.from_iterable(each for _, each in self._groups.values())]:
            self._close(request, "failed", error)
        self._waiting.clear()
        self._groups.clear()


def _light(error: Exception) -> Exception:
    """An error whose traceback is a text: frames hold the states of all rows, and the request that holds the error, so
    that both would stay in memory until Python looks for cycles."""
    error.add_note("".join(traceback.format_tb(error.__traceback__)))
    return error.with_traceback(None)


class _ImageFeatures:
    """Features of pictures, and what was said of them, by a digest of what they depend on; the least recently used are
    dropped."""

    def __init__(self, budget: int, describe: Callable | None):
        self.budget, self.num_bytes, self.hits, self.misses, self._describe = budget, 0, 0, 0, describe
        self._kept: OrderedDict[bytes, tuple[torch.Tensor, object]] = OrderedDict()

    @staticmethod
    def keys(model, pixel_values, image_sizes, batch_num_images) -> list[bytes]:
        """Of each picture of a prompt: anyres cuts one into tiles, by its size, where it is alone."""
        sizes, keys = itertools.repeat(None) if image_sizes is None else image_sizes.tolist(), []
        is_cut = model.config.max_anyres_tiles and (batch_num_images is None or int(batch_num_images[0]) == 1)
        for tiles, size in zip(pixel_values, sizes):
            digest = hashlib.sha256(f"{tiles.dtype}{tuple(tiles.shape)}{is_cut and size}".encode())
            digest.update(tiles.contiguous().view(torch.uint8).cpu().numpy())
            keys.append(digest.digest())
        return keys

    def begin(self, model, state, images: dict, keys: list[bytes]) -> list:
        """Embed a prompt, with the features of pictures that are known. Returns what is said of its pictures."""
        if not keys:
            model.begin_denoising(state, **images)
            return []
        names = ("image_features", "neutral_features")[: 1 + state.needs_neutral]
        places = {name: [name.encode() + key for key in keys] for name in names}
        known = {name: [self._kept.get(place, (None, None)) for place in own] for name, own in places.items()}
        features = {name: [image for image, _ in own] for name, own in known.items()}
        said = [description for _, description in known["image_features"]]
        new = [number for number, image in enumerate(features["image_features"]) if image is None]
        if new and self._describe is not None:
            outputs = model.get_image_features(
                **images, image_features=features["image_features"], output_hidden_states=True, return_dict=True
            )
            features["image_features"] = outputs.pooler_output
            grids = model.model.tile_grids(**images)
            first = [0, *itertools.accumulate(count_tiles(grids[number]) for number in new[:-1])]
            for number, description in zip(new, self._describe(tuple(each[first] for each in outputs.hidden_states))):
                said[number] = description
        features = model.begin_denoising(state, **images, **features)
        for name, own in places.items():
            for place, image, description in zip(own, features[name], said):
                if place not in self._kept:
                    self._kept[place] = image.clone(), description  # it may be a part of what was made of all pictures
                    self.num_bytes += _num_bytes(image)
                self._kept.move_to_end(place)
            misses = sum(image is None for image, _ in known[name])
            self.hits, self.misses = self.hits + len(own) - misses, self.misses + misses
        while self.num_bytes > self.budget:
            self.num_bytes -= _num_bytes(self._kept.popitem(last=False)[1][0])
        return [] if self._describe is None else said


def _num_bytes(features: torch.Tensor) -> int:
    return features.numel() * features.element_size()


__all__ = ["PATIENCE", "ContinuousBatch", "PositionsError", "Request"]
