"""Answers that come and go: each is what `generate` says of its prompt alone, whatever joins and leaves meanwhile."""

import threading
from concurrent.futures import CancelledError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lladamedv.modeling_lladamedv.continuous_batching_lladamedv import ContinuousBatch, PositionsError
from tests.faces import no_tensors_left
from tests.test_generation_lladamedv import SUPPRESSED
from tests.tiny import image_prompt, tiny_model


MODEL = tiny_model(seed=1)
PICTURES = torch.randn(3, 1, 1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
OPTIONS = [
    {},
    {"use_cache": True},
    {"use_cache": True, "cache_implementation": "prefix"},
    {"use_cache": True, "confidence_threshold": 0.02},
    {"cfg_scale": 1.5, "use_cache": True},
    {"image_guidance_scale": 1.5, "use_cache": True, "output_image_reliance": True},
    {"initial_canvas_length": 4, "grow_until_eos_confidence": 0.02},
    {"use_cache": True, "cache_drift_bound": 0.001},
    {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "schedule_shift": 3.0},
    {"speculation_depth": 2, "use_cache": True, "cache_refresh_interval": 3},
    {"speculation_depth": 3, "confidence_threshold": 0.02},
]


def arguments(picture: int, prompt: tuple, options: int, length: int, end: int | None = None) -> dict:
    return {
        "input_ids": image_prompt(prompt),
        "pixel_values": PICTURES[picture],
        **{"max_new_tokens": length, "block_length": 4, "steps": length, "suppress_tokens": SUPPRESSED},
        **{"eos_token_id": None if end is None else [end, 50], "return_dict_in_generate": True},
        **OPTIONS[options],
    }


class Requests:
    """What arrives when: draws of prompts, options, lengths and steps between; some are cancelled."""

    strategy = st.lists(
        st.tuples(
            st.builds(
                arguments,
                st.integers(0, 2),
                st.lists(st.integers(5, 40), min_size=1, max_size=40).map(tuple),
                st.integers(0, len(OPTIONS) - 1),
                st.sampled_from([12, 24]),
                st.integers(0, 49),
            ),
            st.integers(0, 5),  # steps before the next arrives
            st.sampled_from([None] * 5 + [0, 3]),  # steps until it is cancelled
        ),
        min_size=1,
        max_size=7,
    )


def assert_alone(request, options):
    found, alone = request.future.result(timeout=0), MODEL.generate(**options)
    for name in ("sequences", "commit_step", "num_forwards", "num_full_forwards"):
        assert torch.equal(found[name], alone[name]), name
    for name in ("commit_confidence", "answer_confidence", *found.keys() & {"image_reliance"}):
        torch.testing.assert_close(found[name], alone[name], atol=5e-5, rtol=0, equal_nan=True)


@settings(deadline=None, max_examples=25)
@given(arrivals=Requests.strategy, budget=st.sampled_from([100, 250, 10_000]), packs=st.booleans())
def test_each_answer_is_as_it_is_alone(arrivals, budget, packs):
    MODEL.packs_candidates = packs
    batch, submitted, leaving = ContinuousBatch(MODEL, max_positions=budget), [], []
    steps = 0

    def run(count):
        nonlocal steps
        for _ in range(count):
            for due, request in leaving:
                if due <= steps:
                    batch.cancel(request)
            more = batch.step()
            assert batch.stats()["positions"] <= budget
            steps += 1
            if not more:
                return

    for options, pause, patience in arrivals:
        try:
            request = batch.submit(**options)
        except ValueError as error:
            assert "max_positions" in str(error)
            continue
        submitted.append((request, options, patience is not None))
        if patience is not None:
            leaving.append((steps + patience, request))
        run(pause)
    run(10_000)
    for request, options, may_be_cancelled in submitted:
        assert request.future.done()
        if may_be_cancelled and (request.future.cancelled() or request.future.exception()):
            with pytest.raises(CancelledError):
                request.future.result()
        else:
            assert_alone(request, options)
    stats = batch.stats()
    assert stats["waiting"] == stats["running"] == 0
    assert stats["finished"] + stats["cancelled"] == len(submitted)


def test_a_short_answer_passes_a_long_one():
    batch = ContinuousBatch(MODEL)
    long = batch.submit(**arguments(0, (5, 6), 1, 24))
    batch.step()
    short = batch.submit(**arguments(1, (7,), 1, 4))
    for _ in range(8):
        batch.step()
    assert short.future.done() and not long.future.done()


@pytest.mark.parametrize("packs", [True, False])
def test_rows_in_different_phases_wait_for_each_other(packs):
    """A row that begins a block waits at most four steps, so that its whole pass is shared where it can be."""
    MODEL.packs_candidates = packs
    batch, options = ContinuousBatch(MODEL), arguments(0, (5, 6), 1, 24)
    first = batch.submit(**options)
    batch.step()
    second = batch.submit(**options)
    while batch.step():
        pass
    stats = batch.stats()
    assert_alone(first, options)
    assert_alone(second, options)
    assert stats["passes"] < 2 * 24 and stats["rows"] == 2 * 24


def test_pictures_are_encoded_once():
    tower, counts = MODEL.model.vision_tower, []
    batch = ContinuousBatch(MODEL)
    with tower.register_forward_hook(lambda *_: counts.append(1)):
        for question in range(10):
            batch.submit(**arguments(0, (5, question + 6), 1, 4))
        batch.submit(**arguments(1, (5,), 1, 4))
        while batch.step():
            pass
    stats = batch.stats()
    assert len(counts) == 2 and (stats["image_cache_hits"], stats["image_cache_misses"]) == (9, 2)
    small = ContinuousBatch(MODEL, image_cache_bytes=10)
    small.submit(**arguments(0, (5,), 1, 4))
    small.step()
    assert small.stats()["image_cache_bytes"] == 0


@pytest.mark.parametrize(
    ("aspect_ratio", "tiles"), [("square", [1, 1, 1, 0, 0]), ("anyres_max_4", [5, 2, 1, 0, 0])], ids=str
)
def test_only_new_pictures_are_encoded(aspect_ratio, tiles):
    """Anyres cuts a picture only where it is alone: what it is beside others is another thing."""
    model, seen = tiny_model(aspect_ratio, seed=1), []
    batch = ContinuousBatch(model)
    pixels = torch.randn(3, tiles[0], 3, 32, 32, generator=torch.Generator().manual_seed(3))

    def encoded(*pictures):
        count = len(pictures)
        images = {
            "pixel_values": pixels[list(pictures)] if count == 1 else pixels[list(pictures), :1],
            "image_sizes": torch.tensor([[64, 64]] * count), "batch_num_images": torch.tensor([count]),
        }  # fmt: skip
        num_tokens = sum(map(len, model.model.get_image_features(**images).pooler_output))
        options = arguments(0, (5, 6), 1, 4) | images | {"input_ids": torch.tensor([[99] * num_tokens + [5, 6]])}
        alone = model.generate(**options)
        seen.clear()
        request = batch.submit(**options)
        while batch.step():
            pass
        assert torch.equal(request.future.result().sequences, alone.sequences)
        found = request.future.result().commit_confidence
        torch.testing.assert_close(found, alone.commit_confidence, atol=5e-5, rtol=0)
        return sum(seen)

    with model.model.vision_tower.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0]))):
        assert [encoded(0), encoded(0, 1), encoded(1, 2), encoded(2, 0, 1), encoded(0)] == tiles
    with pytest.raises(ValueError, match=r"`batch_num_images` is \[1, 1\]; of one prompt it has one entry"):
        batch.submit(**arguments(0, (5,), 1, 4) | {"batch_num_images": torch.tensor([1, 1])})


def test_a_prompt_that_cannot_be_answered_fails_alone():
    batch = ContinuousBatch(MODEL)
    good = batch.submit(**arguments(0, (5,), 1, 4))
    bad = batch.submit(**{**arguments(0, (5,), 1, 4), "pixel_values": PICTURES[0, :, :, :, :16]})
    while batch.step():
        pass
    assert good.future.result().sequences.shape[0] == 1
    assert bad.future.exception() is not None
    with pytest.raises(ValueError, match="`output_history` is True"):
        batch.submit(**{**arguments(0, (5,), 1, 4), "output_history": True})


@pytest.mark.parametrize("options", [1, OPTIONS.index({"use_cache": True, "cache_drift_bound": 0.001})])
def test_what_an_answer_took_is_free_at_its_end(options):
    """However it ends."""

    class Streamer:
        def put(self, tokens):
            raise OSError

        def end(self):
            raise KeyError

    batch = ContinuousBatch(MODEL)

    def use():
        asked = arguments(0, (5,), options, 4)
        finished, cancelled = batch.submit(**asked), batch.submit(**asked)
        batch.step()
        batch.cancel(cancelled)
        wrong = batch.submit(**asked | {"input_ids": image_prompt(num_images=2)})
        failed = batch.submit(**asked, streamer=Streamer())
        while batch.step():
            pass
        finished.future.result()
        assert {type(each.future.exception()) for each in (cancelled, wrong, failed)} == {
            CancelledError, ValueError, OSError
        }  # fmt: skip
        MODEL.generate(**asked)

    use()
    with no_tensors_left():
        use()


@pytest.mark.parametrize("noise", [{"temperature": 2.0}, {"remasking": "random"}])
def test_noise_of_a_seed_is_that_of_generate(noise):
    """Whatever else draws meanwhile, and without a trace in the noise of others."""
    options = arguments(0, (5, 6), 1, 12) | noise
    state, batch = torch.get_rng_state(), ContinuousBatch(MODEL)
    requests = [batch.submit(**options, seed=seed) for seed in (3, 3, 4)]
    while batch.step():
        pass
    assert torch.equal(torch.get_rng_state(), state)
    truths = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        truths.append(MODEL.generate(**options).sequences.tolist())
    assert [request.future.result().sequences.tolist() for request in requests] == truths
    assert truths[0] != truths[2]


def test_a_prompt_that_never_fits_is_refused():
    with pytest.raises(PositionsError) as caught:
        ContinuousBatch(MODEL, max_positions=20).submit(**arguments(0, (5,), 1, 24))
    assert caught.value.max_positions == 20 < caught.value.positions


def test_an_error_that_ends_the_loop_fails_all_requests(monkeypatch):
    """A batch whose thread is dead leaves no request waiting, and takes no new one."""
    batch = ContinuousBatch(MODEL)
    request = batch.submit(**arguments(0, (5,), 1, 4))

    def fail(batch):
        raise MemoryError

    monkeypatch.setattr(ContinuousBatch, "step", fail)
    with pytest.raises(MemoryError):
        batch.run()
    with pytest.raises(RuntimeError, match=r"stopped \(MemoryError\)"):
        request.future.result(timeout=0)
    with pytest.raises(RuntimeError, match="stopped"):
        batch.submit(**arguments(0, (5,), 1, 4))


def test_a_future_that_is_cancelled_before_it_runs_is_not_run():
    batch = ContinuousBatch(MODEL)
    request = batch.submit(**arguments(0, (5,), 1, 4))
    assert request.future.cancel()
    assert not batch.step()
    assert (batch.stats()["cancelled"], batch.stats()["passes"]) == (1, 0)


def test_streams_and_threads():
    """Requests from several threads, answered by one that runs; a stream gets what `generate` would give it."""

    class Streamer:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    batch = ContinuousBatch(MODEL)
    worker = threading.Thread(target=batch.run)
    worker.start()
    try:
        streamers = [Streamer() for _ in range(6)]
        options = [arguments(number % 3, (5, number), number % 4, 12) for number in range(6)]
        requests = [None] * 6

        def ask(number):
            requests[number] = batch.submit(**options[number], streamer=streamers[number])
            requests[number].future.result(timeout=60)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number, request in enumerate(requests):
            assert_alone(request, options[number])
            assert streamers[number].ended
            assert streamers[number].tokens == request.future.result().sequences[0].tolist()
        waiting = batch.submit(**arguments(0, (5,), 0, 24))
    finally:
        batch.stop()
        worker.join(timeout=60)
    assert not worker.is_alive()
    with pytest.raises((RuntimeError, CancelledError)):
        waiting.future.result(timeout=5)
        raise RuntimeError("it was answered before the end")


def test_each_started_batch_leaves_one_thread_to_others():
    """The second as many as the first, and the caller keeps its own."""
    own, seen = torch.get_num_threads(), []
    torch.set_num_threads(4)
    hook = MODEL.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    try:
        for _ in range(2):
            batch = ContinuousBatch(MODEL)
            batch.start()
            batch.submit(**arguments(0, (5,), 1, 8)).future.result(timeout=60)
            batch.stop()
        assert set(seen) == {3} and torch.get_num_threads() == 4
    finally:
        hook.remove()
        torch.set_num_threads(own)
