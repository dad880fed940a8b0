"""Transformers' own tests are collected by `make test-peers` alone, which fetches them.

`docs/peers.md` names those that fail or are left out, and why. Any other failure or skip fails, and so does a test that
passes although it is named as failing.
"""

import os
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest


PAGE = Path(__file__).parents[2] / "docs" / "peers.md"
PEERS = "LLADAMEDV_PEERS" in os.environ
collect_ignore = [] if PEERS else ["test_transformers_mixins.py"]


def _listed(heading: str) -> dict[str, str]:
    """The reasons of the table under a heading, by the patterns of tests' names that its rows begin with."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return {pattern: reason for tests, reason in rows for pattern in re.findall(r"`(test_[\w*]+)`", tests)}


def pytest_collection_modifyitems(items):
    failing = _listed("Fail") if PEERS else {}
    for item in items:
        if item.name in failing and item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.xfail(reason=failing[item.name], strict=True))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if PEERS and report.skipped and not hasattr(report, "wasxfail"):
        if not any(fnmatch(item.name, pattern) for pattern in _listed("Left out")):
            report.outcome = "failed"
            report.longrepr = f"left out, but not listed in {PAGE.name}: {report.longrepr[-1]}"
    return report
