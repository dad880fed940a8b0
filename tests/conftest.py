"""What every test needs: no network, few threads, and a tiny random model."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch

import lladamedv
from tests.tiny import tiny_model, tiny_processor


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
