import pytest

from lladamedv import LLaDAMedVConfig


def test_defaults_are_the_released_model():
    config = LLaDAMedVConfig()
    text, vision = config.text_config, config.vision_config
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.intermediate_size) == (
        4096,
        32,
        32,
        12288,
    )
    assert (text.vocab_size, text.rms_norm_eps, text.rope_parameters["rope_theta"]) == (126464, 1e-5, 500000.0)
    assert (vision.hidden_size, vision.image_size, vision.patch_size, vision.num_hidden_layers) == (1152, 384, 14, 26)
    assert (config.mask_token_id, config.tie_word_embeddings, text.is_causal) == (126336, False, False)
    assert len(config.image_grid_pinpoints) == 36 and config.max_anyres_tiles == 4


def test_round_trip(tmp_path):
    config = LLaDAMedVConfig(text_config={"hidden_size": 64, "num_attention_heads": 4}, vision_aspect_ratio="pad")
    config.save_pretrained(tmp_path)
    again = LLaDAMedVConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.text_config.is_causal is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vision_aspect_ratio": "anyres_max_0"}, "`vision_aspect_ratio` is 'anyres_max_0'"),
        ({"vision_aspect_ratio": "tall"}, "'square', 'pad' and 'anyres_max_N'"),
        ({"tie_word_embeddings": True}, "`tie_word_embeddings` is True"),
        ({"mask_token_id": 200_000}, "`mask_token_id` is 200000"),
        ({"image_token_id": -1}, "`image_token_id` is -1"),
        ({"vision_feature_layer": -2}, "`vision_feature_layer` is -2"),
    ],
)
def test_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        LLaDAMedVConfig(**arguments)
