"""Transformers' own tests of models, configurations, processors and image processors, with our classes.

`make test-peers` fetches its source distribution, which holds the tests' mixins, but not all that these
import: the rest is made up here. `docs/peers.md` says which tests fail or are left out, and why.
"""

import importlib
import os
import sys
import tempfile
import unittest
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image

from lladamedv import (
    LLaDAMedVConfig,
    LLaDAMedVForConditionalGeneration,
    LLaDAMedVImageProcessor,
    LLaDAMedVModel,
    LLaDAMedVProcessor,
)
from tests.tiny import PATCH, TILE, random_image, small_vocabulary_config, tiny_processor


PICTURE = Path(tempfile.mkdtemp()) / "picture.png"
random_image().save(PICTURE)
IMAGE = 4


def _load(name: str) -> ModuleType:
    return importlib.import_module(f"transformers_tests.{name}")


def _stand_in(name: str, **contents) -> None:
    sys.modules[name] = ModuleType(name)
    vars(sys.modules[name]).update(contents)


package = ModuleType("transformers_tests")
package.__path__ = [str(Path(os.environ["LLADAMEDV_PEERS"]) / "tests")]
sys.modules["transformers_tests"] = package
(Path(os.environ["LLADAMEDV_PEERS"]) / "tests" / "__init__.py").touch()  # one of them looks for it
_stand_in("fetch_hub_objects_for_ci", url_to_local_path=lambda url: str(PICTURE))
_stand_in("transformers_tests.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
_stand_in("transformers_tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
_stand_in(
    "transformers_tests.utils.test_configuration_utils",
    config_common_kwargs={
        "return_dict": False, "output_hidden_states": True, "output_attentions": True, "dtype": "float16",
        "chunk_size_feed_forward": 5, "architectures": ["BertModel"], "is_encoder_decoder": True,
        "id2label": {0: "label"}, "label2id": {"label": "0"}, "problem_type": "regression",
    },
)  # fmt: skip


class ModelTester:
    """Prompts, each with an image of one tile, for tiny models."""

    # Tests of attention take batches of seven; those that resize embeddings take the last 15 ids away.
    batch_size, num_hidden_layers, num_attention_heads, hidden_size = 7, 2, 4, 16
    vision_config = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "image_size": TILE}
    seq_length = (TILE // PATCH) ** 2 + 8
    is_training = False  # the loss needs to know the noise, and is the trainer's

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        config = small_vocabulary_config(num_hidden_layers=self.num_hidden_layers)
        return LLaDAMedVConfig(**config.to_dict() | {"image_token_id": IMAGE, "mask_token_id": 5})

    def prepare_config_and_inputs_for_common(self):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(6, 80, (self.batch_size, self.seq_length), generator=generator)
        ids[:, : (TILE // PATCH) ** 2] = IMAGE
        pixels = torch.randn(self.batch_size, 1, 3, TILE, TILE, generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        return self.get_config(), inputs


class TestModels(_load("test_modeling_common").ModelTesterMixin, unittest.TestCase):
    all_model_classes = (LLaDAMedVModel, LLaDAMedVForConditionalGeneration)
    additional_model_inputs = ("pixel_values",)
    _is_composite = True

    def setUp(self):
        self.model_tester = ModelTester(self)

    def test_config(self):
        tester = _load("test_configuration_common").ConfigTester(
            self, config_class=LLaDAMedVConfig, has_text_modality=False, common_properties=["image_token_id"]
        )
        tester.run_common_tests()


class TestProcessor(_load("test_processing_common").ProcessorTesterMixin, unittest.TestCase):
    processor_class = LLaDAMedVProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_processor().tokenizer

    @classmethod
    def _setup_image_processor(cls):
        return tiny_processor().image_processor

    @classmethod
    def _setup_test_attributes(cls, processor):
        cls.image_token = processor.image_token


class ImageProcessingTester:
    batch_size, num_channels, min_resolution, max_resolution = 3, 3, 30, 60
    image_processing_classes = {"pil": LLaDAMedVImageProcessor}

    def __init__(self, parent):
        self.parent = parent

    def prepare_image_processor_dict(self):
        return {
            "size": {"height": TILE, "width": TILE}, "patch_size": PATCH, "vision_aspect_ratio": "square",
            "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_convert_rgb": True,
        }  # fmt: skip

    def expected_output_image_shape(self, images):
        return 1, self.num_channels, TILE, TILE

    def prepare_image_inputs(self, equal_resolution=False, numpify=False, torchify=False):
        sizes = [(60, 60) if equal_resolution else (30 + 10 * number, 60) for number in range(self.batch_size)]
        images = [np.asarray(random_image(*size, seed=number)) for number, size in enumerate(sizes)]
        if torchify:
            return [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in images]
        return [image.transpose(2, 0, 1) for image in images] if numpify else [Image.fromarray(i) for i in images]


class TestImageProcessor(_load("test_image_processing_common").ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ImageProcessingTester
