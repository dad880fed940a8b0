"""What every test needs: no network, few threads, and a tiny random model."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch

import lladamedv
from tests.tiny import tiny_model, tiny_processor


if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each process; those that tests start inherit it
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
else:
    torch.set_num_threads(2)


@pytest.fixture
def uncompiled_flex():
    """Compiled flex attention is broken on CPUs for some lengths; what it means can be tested uncompiled."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="session")
def model() -> lladamedv.LLaDAMedVForConditionalGeneration:
    """A random model of one-tile images; do not change it."""
    return tiny_model()


@pytest.fixture(scope="session")
def processor() -> lladamedv.LLaDAMedVProcessor:
    return tiny_processor()
