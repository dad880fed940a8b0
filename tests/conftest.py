"""What every test needs: no network, one thread, and models."""

import logging
import os
import signal
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Threads of tensors this small would mostly wait for each other. Processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import datasets
import matplotlib
import pytest
import torch

import lladamedv
from lladamedv.demo import load_model
from lladamedv.processing.phantoms import PhantomVQA
from tests.tiny import tiny_model, tiny_processor


torch.set_num_threads(1)
# A shell has what it runs in the background ignore Ctrl-C, which some tests press.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def levels():
    """A command that a test runs in this process keeps the libraries quiet, with --quiet the bars of processes that it
    starts, too, and would do so for the tests after it."""
    bars = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
    bars = [name for name in bars if name not in os.environ]
    names = (None, "lladamedv", "lladamedv.processing.medical_images", "torch", "torchao", "bitsandbytes")
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before):
        logger.setLevel(level)
    for name in bars:
        os.environ.pop(name, None)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """What `datasets` keeps of a test's files goes with them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub of this test's own, that this process and its children take for the real one."""
    from tests.hub_stub import running_hub, take_for_the_hub

    with running_hub() as hub:
        take_for_the_hub(hub, monkeypatch, tmp_path / "home")
        yield hub


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


@pytest.fixture(scope="module")
def shipped() -> tuple[lladamedv.LLaDAMedVForConditionalGeneration, lladamedv.LLaDAMedVProcessor]:
    """The demo model and its processor."""
    return load_model(device="cpu")


@pytest.fixture(scope="module")
def example():
    """A phantom that the demo model describes."""
    return PhantomVQA(5, 1, ("description",))[0]


@pytest.fixture(scope="session")
def photograph():
    """The file of a photograph, a portrait that comes with matplotlib: nothing that the demo model has ever seen."""
    return Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


@pytest.fixture(scope="module")
def picture(example, tmp_path_factory):
    """The file of that phantom's picture."""
    path = tmp_path_factory.mktemp("pictures") / "phantom.png"
    example.image.save(path)
    return path
