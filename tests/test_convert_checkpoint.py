"""The released layout; the numbers that a loaded checkpoint gives are in tests/parity."""

import json

import pytest

from lladamedv.modeling_lladamedv.convert_checkpoint import convert_config, load_released_checkpoint
from tests.parity.fixtures import FIXTURES


def released(name="pad_mha"):
    return json.loads((FIXTURES / name / "checkpoint" / "config.json").read_text())


def test_config():
    config = convert_config(released("anyres_gqa"))
    assert config.text_config.num_key_value_heads == 2 and config.vision_aspect_ratio == "anyres_max_4"
    assert config.image_grid_pinpoints[0] == [384, 384] and config.image_grid_pinpoints[-1] == [2304, 2304]
    assert config.vision_config.num_hidden_layers == 26, "without the tower's config, SigLIP2 so400m is meant"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "`model_type` is 'llama'"),
        ({"mm_vision_select_layer": -1}, "`mm_vision_select_layer` is -1"),
        ({"mm_projector_type": "linear"}, "`mm_projector_type` is 'linear'"),
    ],
)
def test_other_kinds_of_config(change, message):
    with pytest.raises(ValueError, match=message):
        convert_config(released() | change)


def test_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_released_checkpoint(tmp_path)
