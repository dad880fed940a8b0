"""How many cases each property is tried on: a few that never change in the normal suite, thousands on request.

    LLADAMEDV_HYPOTHESIS_PROFILE=thorough pytest tests/properties

A failure of the thorough profile prints its case, with all seeds, and a line that reproduces it.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings


settings.register_profile(
    "quick", max_examples=20, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
settings.register_profile(
    "thorough", settings.get_profile("quick"), max_examples=2000, derandomize=False, print_blob=True
)
settings.load_profile(os.environ.get("LLADAMEDV_HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(scope="package", autouse=True)
def softmax_in_float64():
    """Eager attention rounds its weights to float32: a batch could decide a tie otherwise than a row alone."""

    def softmax(values, dim=None, dtype=None):
        return torch.softmax(values.double(), dim)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", softmax)
        yield
