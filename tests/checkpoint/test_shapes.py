from __future__ import annotations

import math

import pytest
import torch

from rfengine.checkpoint.shapes import (
    describe_mismatch,
    expected_shapes,
    infer_config,
    stated_heads,
)
from rfengine.config import TextConfig, TinyVAEConfig, VAEConfig, WanConfig
from rfengine.models.dit import WanDiT
from rfengine.models.tiny_vae import TinyVAE
from rfengine.models.vae import WanVAE
from rfengine.presets import PRESETS


def count(shapes: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    return len(shapes), sum(map(math.prod, shapes.values()))


def test_published_tensor_and_parameter_counts() -> None:
    """Counted in the published files."""
    assert count(expected_shapes(PRESETS["wan-1.3b"].model)) == (825, 1_418_996_800)
    assert count(expected_shapes(PRESETS["wan-14b"].model)) == (1095, 14_288_491_584)
    assert len(expected_shapes(PRESETS["skyreels-df-1.3b"].model)) == 825 + 5
    assert count(expected_shapes(VAEConfig())) == (194, 126_892_531)
    assert count(expected_shapes(TextConfig())) == (242, 5_680_910_336)
    assert count(expected_shapes(TinyVAEConfig())) == (64, 9_844_611)


@pytest.mark.parametrize("name", PRESETS)
def test_modules_have_exactly_the_expected_tensors(name: str) -> None:
    with torch.device("meta"):
        modules = (
            WanDiT(PRESETS[name].model), WanVAE(PRESETS[name].vae), TinyVAE(PRESETS[name].tiny_vae)
        )  # fmt: skip
    for module in modules:
        theirs = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
        assert theirs == expected_shapes(module.config)


@pytest.mark.parametrize("name", PRESETS)
def test_configuration_is_inferred_from_its_own_shapes(name: str) -> None:
    config = PRESETS[name]
    model = infer_config(
        "transformer",
        expected_shapes(config.model),
        {"num_heads": config.model.num_heads, "text_len": config.model.text_len},
    )
    assert model == config.model
    statistics = {"latents_mean": list(config.vae.latents_mean), "latents_std": list(config.vae.latents_std)}
    assert infer_config("vae", expected_shapes(config.vae), statistics) == config.vae
    text = infer_config("text_encoder", expected_shapes(config.text))
    assert expected_shapes(text) == expected_shapes(config.text)
    assert (text.num_heads, text.attention_dim) == (config.text.num_heads, config.text.attention_dim)


def test_published_head_count_needs_no_settings() -> None:
    for name in ("wan-1.3b", "wan-14b", "skyreels-df-1.3b"):
        config = PRESETS[name]
        assert infer_config("transformer", expected_shapes(config.model)) == config.model
        assert infer_config("vae", expected_shapes(config.vae)) == config.vae
        assert infer_config("text_encoder", expected_shapes(config.text)) == config.text


def test_settings_of_both_layouts_are_read() -> None:
    config = WanConfig(dim=64, ffn_dim=48, num_heads=4, num_layers=2, eps=1e-5, text_len=7)
    shapes = expected_shapes(config)
    assert infer_config("transformer", shapes, {"num_heads": 4, "eps": 1e-5, "text_len": 7}) == config
    assert (
        infer_config(
            "transformer", shapes, {"num_attention_heads": 4, "eps": 1e-5, "text_len": 7, "in_channels": 16}
        )
        == config
    )


def test_stated_sample_information_must_be_that_of_the_tensors() -> None:
    shapes = expected_shapes(PRESETS["skyreels-df-1.3b"].model)
    assert infer_config("transformer", shapes, {"inject_sample_info": True}).fps_embedding
    with pytest.raises(ValueError, match="states fps_embedding False and the tensors have True"):
        infer_config("transformer", shapes, {"inject_sample_info": False})
    assert shapes["fps_embedding.weight"] == (2, 1536)
    assert shapes["fps_projection.0.weight"] == (1536, 1536) and shapes["fps_projection.0.bias"] == (1536,)
    assert shapes["fps_projection.2.weight"] == (9216, 1536) and shapes["fps_projection.2.bias"] == (9216,)


def test_text_settings_are_read() -> None:
    settings = {"relative_attention_max_distance": 64, "layer_norm_epsilon": 1e-5}
    text = infer_config("text_encoder", expected_shapes(TextConfig()), settings)
    assert (text.max_distance, text.eps) == (64, 1e-5)


def test_impossible_inference_says_why() -> None:
    shapes = expected_shapes(WanConfig(dim=64, ffn_dim=48, num_heads=4, num_layers=2))
    with pytest.raises(ValueError, match="dim 64, no multiple of 128"):
        infer_config("transformer", shapes)
    with pytest.raises(ValueError, match="states num_layers 30 and the tensors have 2"):
        infer_config("transformer", shapes, {"num_heads": 4, "num_layers": 30})
    with pytest.raises(ValueError, match=r"has no head.head.weight"):
        infer_config(
            "transformer", {name: shape for name, shape in shapes.items() if name != "head.head.weight"}
        )
    with pytest.raises(ValueError, match=r"patch_embedding.weight is \(64, 16\); it must have 5 axes"):
        infer_config("transformer", {**shapes, "patch_embedding.weight": (64, 16)})
    with pytest.raises(ValueError, match="8 latent channels, the published statistics are for 16"):
        infer_config("vae", expected_shapes(PRESETS["tiny"].vae))


def test_mismatch_lists_every_kind_of_problem_by_name() -> None:
    expected = expected_shapes(PRESETS["wan-1.3b"].model)
    found = {**expected, "head.head.bias": (65,), "extra.weight": (1,)}
    del found["blocks.3.norm3.bias"]
    assert describe_mismatch(expected, found) == (
        "1 missing: blocks.3.norm3.bias; 1 unexpected: extra.weight; "
        "1 mis-shaped: head.head.bias (65,) instead of (64,)"
    )
    assert describe_mismatch(expected, dict(expected)) == ""


def test_mismatch_of_another_size_says_both_sizes() -> None:
    small = expected_shapes(PRESETS["wan-1.3b"].model)
    large = expected_shapes(PRESETS["wan-14b"].model)
    problem = describe_mismatch(small, large)
    assert "the checkpoint has dim 5120 in 40 layers and the model has dim 1536 in 30 layers" in problem
    assert "270 unexpected: " in problem and "and 262 more" in problem


@pytest.mark.parametrize(
    "config",
    [
        TinyVAEConfig(),
        PRESETS["tiny"].tiny_vae,
        TinyVAEConfig(z_dim=4, widths=(6, 5), memory_blocks=1, time_factors=(3,)),
    ],
)
def test_a_tiny_decoder_is_inferred_from_its_own_shapes(config: TinyVAEConfig) -> None:
    assert infer_config("tiny_vae", expected_shapes(config)) == config
    assert infer_config("tiny_vae", expected_shapes(config)) == config


def test_a_tiny_decoder_without_some_of_its_layers_is_refused() -> None:
    shapes = expected_shapes(TinyVAEConfig())
    with pytest.raises(ValueError, match=r"have \[3, 2, 3\] memory blocks; it is incomplete"):
        infer_config("tiny_vae", _renumbered_without_block_11(shapes))
    with pytest.raises(ValueError, match="has no decoder.13.conv.weight, from which sizes are read"):
        infer_config("tiny_vae", {key: value for key, value in shapes.items() if "13.conv" not in key})
    with pytest.raises(ValueError, match=r"have \[\] memory blocks"):
        infer_config("tiny_vae", {"decoder.1.weight": (8, 4, 3, 3)})


def _renumbered_without_block_11(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    kept = {}
    for name, shape in shapes.items():
        _, number, rest = name.split(".", 2)
        if number != "11":
            kept[f"decoder.{int(number) - (int(number) > 11)}.{rest}"] = shape
    return kept


SETTINGS = {
    "transformer": {
        "dim": 64, "ffn_dim": 48, "num_layers": 2, "num_heads": 4, "in_dim": 16, "out_dim": 16,
        "text_dim": 4096, "text_len": 512, "freq_dim": 256, "patch_size": [1, 2, 2], "eps": 1e-6,
        "attention_head_dim": 16,
    },
    "vae": {
        "base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
        "temperal_downsample": [False, True, True], "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16,
    },
    "text_encoder": {
        "vocab_size": 64, "d_model": 32, "d_ff": 24, "num_heads": 2, "num_layers": 24, "d_kv": 8,
        "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
    },
}  # fmt: skip
PART_CONFIGS = {
    "transformer": WanConfig(dim=64, ffn_dim=48, num_heads=4, num_layers=2),
    "vae": VAEConfig(base_dim=8),
    "text_encoder": TextConfig(vocab_size=64, dim=32, attention_dim=16, ffn_dim=24, num_heads=2),
}


@pytest.mark.parametrize(
    ("part", "key"), [(part, key) for part, settings in SETTINGS.items() for key in settings]
)
def test_a_published_setting_that_cannot_be_is_refused_by_its_key(part: str, key: str) -> None:
    shapes = expected_shapes(PART_CONFIGS[part])
    infer_config(part, shapes, SETTINGS[part])
    absurd = [
        0, -1, 2**31, 2**63, 10**40, 1.5, math.inf, math.nan, True, None, "", "x", "1" * 5000, [], {}, [None],
        [2**31] * 16, [0] * 3, [True],
    ]  # fmt: skip
    for value in absurd:
        message = f"^the stated {key} |^config.json states|^{key}|max_distance is"
        with pytest.raises(ValueError, match=message) as caught:
            infer_config(part, shapes, SETTINGS[part] | {key: value})
        assert len(str(caught.value)) < 300


def test_heads_are_stated_by_a_settings_file_of_either_layout() -> None:
    assert stated_heads({"num_heads": 12, "dim": 1536}) == {1536: 12}
    assert stated_heads({"num_attention_heads": 12, "attention_head_dim": 128}) == {1536: 12}
    assert stated_heads({"num_heads": 12}) == stated_heads({"dim": 1536}) == {}
    with pytest.raises(ValueError, match="the stated num_attention_heads is 'x'; it must be an integer"):
        stated_heads({"num_attention_heads": "x", "attention_head_dim": 2**40})


def test_an_index_of_many_digits_counts_no_layers() -> None:
    shapes = expected_shapes(PART_CONFIGS["transformer"])
    extra = {f"blocks.{'9' * 5000}.norm3.bias": (64,), "blocks.\u0663.norm3.bias": (64,)}
    assert infer_config("transformer", {**shapes, **extra}, SETTINGS["transformer"]).num_layers == 2
    with pytest.raises(ValueError, match="num_layers is 1000000000; it must be at most 1024"):
        infer_config("transformer", {**shapes, "blocks.999999999.norm3.bias": (64,)}, {"num_heads": 4})


def test_an_empty_tensor_tells_no_size() -> None:
    shapes = expected_shapes(PART_CONFIGS["vae"])
    with pytest.raises(ValueError, match="encoder.conv1.weight is .*, which is empty; get the file again"):
        infer_config("vae", {**shapes, "encoder.conv1.weight": (0, 3, 3, 3, 3)})
