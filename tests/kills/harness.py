"""Kill a task at random moments, until it was killed often enough, and see that it ends as if it never had been.

Tasks run in processes that are forked from one that has imported everything (multiprocessing's fork server), so that a
kill costs a second and falls into the work, not into the imports.
"""

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


KILLS = int(os.environ.get("LLADAMEDV_KILLS", "50"))
_SECONDS = 120  # a task that takes longer hangs

_context = multiprocessing.get_context("forkserver")
os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])  # the server does not get sys.path
_context.set_forkserver_preload(["tests.kills.tasks"])


def _work(task, arguments, started, log):
    torch.set_num_threads(1)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    started.set()
    task(*arguments)


def run(task: Callable, arguments: tuple, log: Path, seconds: float = _SECONDS) -> bool:
    """Whether the task came to its end within so many seconds; it is killed otherwise."""
    started = _context.Event()
    process = _context.Process(target=_work, args=(task, arguments, started, log))
    process.start()
    assert started.wait(_SECONDS)
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), log.read_text()[-3000:]
    assert process.exitcode == 0 or seconds < _SECONDS, f"hangs: {log.read_text()[-3000:]}"
    return process.exitcode == 0


def kill_at_random(
    task: Callable, arguments: tuple, log: Path, *, clear: Callable, result: Callable, check: Callable, seed: int = 0
) -> str:
    """Kill `task` [`KILLS`] times.

    Args:
        task: a function of a module; called again, it goes on with what the killed call has left.
        arguments: of the task.
        log: file for what the task prints.
        clear: makes everything as it was before the first call.
        result: what has come out in the end; the same, to the last bit, as from a call that was not killed.
        check: called after each kill with the result that an uninterrupted call had; raises if what is left is bad.
        seed: of the moments.

    Returns:
        A line that says how often it was killed, and how often it came to its end in between.
    """
    assert run(print, (), log)  # the server has imported everything
    clear()
    began = time.perf_counter()
    assert run(task, arguments, log)
    whole = time.perf_counter() - began
    expected = result()
    assert expected
    clear()
    moments = random.Random(seed)
    kills = ends = 0
    while kills < KILLS:
        if run(task, arguments, log, moments.uniform(0, whole)):
            ends += 1
            assert result() == expected
            clear()
        else:
            kills += 1
            check(expected)
    assert run(task, arguments, log)
    assert result() == expected
    line = f"{task.__name__}: {kills} kills in runs of {whole:.1f} s, {ends + 1} came to their end, all the same"
    print(line, file=sys.stderr)
    return line
