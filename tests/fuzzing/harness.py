"""Gives a target many hostile inputs and checks what all of them must keep: documented errors of one line, no hang, and
bounded memory.

An input is made from the target's name and its number alone, so `Target.make(number)` brings a failing one back. What
environment variables set: `LLADAMEDV_FUZZ_INPUTS`, how many inputs each target gets in the thorough run, and
`LLADAMEDV_FUZZ_FIRST`, the number of the first.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest


SECONDS = 10.0  # that one input may take
LONGEST_MESSAGE = 1000
_MEGABYTE = 2**20
_THOROUGH = int(os.environ.get("LLADAMEDV_FUZZ_INPUTS", "10000"))
_FIRST = int(os.environ.get("LLADAMEDV_FUZZ_FIRST", "1000000"))  # far from the numbers of the quick run


class Hang(BaseException):
    """An input that takes too long; not an `Exception`, so that no reader takes it for a broken file."""


@dataclass(frozen=True)
class Target:
    """Something that reads foreign input.

    Args:
        name: of the target, which inputs depend on.
        build: makes an input with the random generator it gets.
        read: is given the input; may raise `documented` errors, and `AssertionError` for a wrong result.
        quick: how many inputs the normal suite gives it.
        share: how many of 1 that the thorough run gives it.
        documented: kinds of errors that the documentation names.
        megabytes: how much the peak of the memory may rise.
    """

    name: str
    build: Callable[[random.Random], object]
    read: Callable[[object], object]
    quick: int = 40
    share: float = 1.0
    documented: tuple[type[Exception], ...] = (ValueError,)
    megabytes: int = 400

    def make(self, number: int):
        return self.build(random.Random(f"{self.name}/{number}"))

    def hunt(self, first: int, count: int) -> None:
        """Try inputs and fail with what went wrong, after all of them."""
        outcomes, failures, slowest = Counter(), {}, (0.0, first)
        before, started = _peak(), time.perf_counter()
        signal.signal(signal.SIGALRM, _stop)
        for number in range(first, first + count):
            faulthandler.dump_traceback_later(6 * SECONDS, exit=True, file=sys.__stderr__)  # for hangs outside Python
            given = self.make(number)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            begun = time.perf_counter()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self.read(given)
                outcome = "read"
            except (Exception, Hang) as error:
                outcome, problem = type(error).__name__, _problem(error, self.documented)
                if problem is not None and len(failures) < 20:
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    failures.setdefault((outcome, where.filename, where.lineno), (number, problem, error))
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                faulthandler.cancel_dump_traceback_later()
            outcomes[outcome] += 1
            slowest = max(slowest, (time.perf_counter() - begun, number))
        risen, seconds = (_peak() - before) / _MEGABYTE, time.perf_counter() - started
        record = {
            "target": self.name, "first": first, "inputs": count, "outcomes": dict(outcomes.most_common()),
            "slowest_seconds": round(slowest[0], 3), "slowest_input": slowest[1], "seconds": round(seconds, 1),
            "peak_rise_megabytes": round(risen), "peak_megabytes": round(_peak() / _MEGABYTE),
        }  # fmt: skip
        print(json.dumps(record))
        assert not failures, "\n".join(
            f"{self.name}, input {number}: {problem}\n{''.join(traceback.format_exception(error, limit=-6))[-3000:]}"
            for number, problem, error in failures.values()
        )
        assert risen <= self.megabytes, f"{self.name}: the peak of the memory rose by {risen:.0f} MB"
        assert outcomes["read"] or len(outcomes) > 1 or count < 20, f"{self.name}: all {count} inputs end in one way"


def both_profiles(targets: list[Target]):
    """Parametrize a test of (target, first, count): some inputs in the normal suite, many in the slow one."""
    quick = [pytest.param(target, 0, target.quick, id=target.name) for target in targets]
    thorough = [
        pytest.param(target, _FIRST, int(_THOROUGH * target.share), id=f"{target.name}, many", marks=pytest.mark.slow)
        for target in targets
    ]
    return pytest.mark.parametrize(("target", "first", "count"), [*quick, *thorough])


def _stop(number, frame):
    raise Hang(f"more than {SECONDS} s")


def _peak() -> int:
    """The most memory that this process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _problem(error: BaseException, documented: tuple[type[Exception], ...]) -> str | None:
    """What is wrong with an error, or `None` for a documented one."""
    if not isinstance(error, documented):
        return "an error that is not documented"
    # Subclasses of others, such as UnicodeEncodeError and JSONDecodeError, are ValueErrors by chance.
    if type(error) not in documented and not type(error).__module__.startswith("lladamedv"):
        return "an error of a library, which names no argument"
    message = str(error)
    if len(message.splitlines()) != 1 or len(message) > LONGEST_MESSAGE:
        return f"a message of {len(message.splitlines())} lines and {len(message)} characters"
    return None
