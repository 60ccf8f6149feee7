from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

from rfengine.checkpoint.layouts import (
    choose_model,
    detect_layout,
    diffusers_transformer_from_wan,
    engine_names,
    list_names,
    strip_prefixes,
    transformers_text_from_wan,
    wan_transformer_from_diffusers,
    wan_vae_from_diffusers,
)
from rfengine.checkpoint.shapes import expected_shapes
from rfengine.config import VAEConfig, WanConfig
from rfengine.presets import PRESETS
from support.checkpoints import diffusers_vae_names, original_text_names

CONFIG = WanConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=2)
NAMES = list(expected_shapes(CONFIG))
PUBLISHED = PRESETS["wan-1.3b"]
TRANSFORMER = expected_shapes(PUBLISHED.model)
VAE = expected_shapes(PUBLISHED.vae)
TEXT = expected_shapes(PUBLISHED.text)


def wrap_inside(name: str) -> str:
    """FSDP segments around the model and inside every layer, as a 14B student has them."""
    name = name.replace("_attn.", "_attn._fsdp_wrapped_module.").replace(
        "ffn.0.", "ffn.0._fsdp_wrapped_module."
    )
    return f"model._fsdp_wrapped_module.{name}"


PREFIXES: dict[str, Callable[[str], str]] = {
    "bare": lambda name: name,
    "model.": lambda name: f"model.{name}",
    "one FSDP segment": lambda name: f"model._fsdp_wrapped_module.{name}",
    "FSDP segments inside": wrap_inside,
    "FSDP outside of model.": lambda name: f"_fsdp_wrapped_module.model.{name}",
    "checkpoint segments": lambda name: f"model.{name.replace('.ffn', '._checkpoint_wrapped_module.ffn')}",
    "compiled": lambda name: f"model._orig_mod.{name}",
    "compiled, FSDP": lambda name: f"_orig_mod.model._fsdp_wrapped_module.{name}",
    "model.diffusion_model.": lambda name: f"model.diffusion_model.{name}",
}


@pytest.mark.parametrize("wrap", PREFIXES.values(), ids=PREFIXES)
def test_every_prefix_is_removed_from_all_825_names(wrap: Callable[[str], str]) -> None:
    assert [strip_prefixes(wrap(name)) for name in TRANSFORMER] == list(TRANSFORMER)
    part, names = engine_names({wrap(name): name for name in TRANSFORMER})
    assert part == "transformer" and names == {name: name for name in TRANSFORMER}


@pytest.mark.parametrize("wrap", PREFIXES.values(), ids=PREFIXES)
def test_diffusers_names_are_accepted_under_every_prefix(wrap: Callable[[str], str]) -> None:
    part, names = engine_names({wrap(diffusers_transformer_from_wan(name)): name for name in TRANSFORMER})
    assert part == "transformer" and names == {name: name for name in TRANSFORMER}


@pytest.mark.parametrize("size", ["1.3b", "14b", "small"])
def test_transformer_names_are_those_of_diffusers(size: str) -> None:
    from diffusers import WanTransformer3DModel

    small = WanConfig(
        dim=32, ffn_dim=48, num_heads=2, num_layers=3, text_dim=24, freq_dim=16, in_dim=4, out_dim=4
    )
    config = small if size == "small" else PRESETS[f"wan-{size}"].model
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            in_channels=config.in_dim,
            out_channels=config.out_dim,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
        )
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ours = expected_shapes(config)
    assert {diffusers_transformer_from_wan(name): shape for name, shape in ours.items()} == theirs
    assert {wan_transformer_from_diffusers(name): shape for name, shape in theirs.items()} == ours


@pytest.mark.parametrize(
    "config",
    [
        VAEConfig(),
        VAEConfig(base_dim=8, num_res_blocks=1, temporal_downsample=(False, True, False)),
        VAEConfig(num_res_blocks=3),
    ],
    ids=["published", "one residual block", "three residual blocks"],
)
def test_vae_names_are_those_of_diffusers(config: VAEConfig) -> None:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        model = AutoencoderKLWan(
            base_dim=config.base_dim,
            num_res_blocks=config.num_res_blocks,
            temperal_downsample=list(config.temporal_downsample),
        )
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ours, blocks = expected_shapes(config), config.num_res_blocks
    assert {wan_vae_from_diffusers(name, blocks): shape for name, shape in theirs.items()} == ours
    assert engine_names(theirs) == ("vae", ours)
    assert set(diffusers_vae_names(blocks)) >= set(theirs)


def test_text_names_are_those_of_transformers() -> None:
    from rfengine.models.text_encoder import build_umt5

    with torch.device("meta"):
        model = build_umt5(PUBLISHED.text)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert engine_names(theirs) == ("text_encoder", TEXT)
    names = original_text_names(PUBLISHED.text)
    original = {name: TEXT[transformers_text_from_wan(name)] for name in names}
    assert len(original) == 242
    assert engine_names(original) == ("text_encoder", TEXT)


def test_tied_embedding_alone_takes_the_name_of_the_embedding() -> None:
    names = {"encoder.embed_tokens.weight": 1, "encoder.block.0.layer.0.layer_norm.weight": 2}
    assert engine_names(names)[1]["shared.weight"] == 1


def test_unknown_names_come_back_as_they_are() -> None:
    for rename in (
        wan_transformer_from_diffusers, diffusers_transformer_from_wan,
        wan_vae_from_diffusers, transformers_text_from_wan,
    ):  # fmt: skip
        assert rename("blocks.3.surprise.weight") == "blocks.3.surprise.weight"
        assert rename("surprise") == "surprise"


def test_layout_is_found_although_names_are_missing() -> None:
    kept = [name for name in TRANSFORMER if name.startswith("blocks.7.")]
    assert detect_layout(kept) == "wan_transformer"
    assert detect_layout(map(diffusers_transformer_from_wan, kept)) == "diffusers_transformer"
    assert detect_layout(name for name in VAE if "decoder" in name) == "wan_vae"


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"another tensor both become head.modulation"):
        engine_names({**TRANSFORMER, "model.head.modulation": (1, 2, 3)})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["base_model.model.blocks.0.ffn.0.lora_A.weight"], "holds a LoRA"),
        (["lora_unet_blocks_0_ffn_0.lora_down.weight"], "holds a LoRA"),
        (["transformer.blocks.0.attn1.to_q.lora.up.weight"], "holds a LoRA"),
        ([*TRANSFORMER, "img_emb.proj.0.weight"], "image-to-video"),
        ([*TRANSFORMER, "blocks.0.cross_attn.k_img.weight"], "image-to-video"),
        (
            ["layer1.weight", "layer2.weight"],
            "names such as layer1.weight, layer2.weight belong to no known layout",
        ),
        ([], "none at all belong to no known layout"),
    ],
)
def test_foreign_names_are_explained(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detect_layout(names)


def test_long_lists_of_names_are_cut_and_counted() -> None:
    assert list_names([f"n{number}" for number in range(9)]) == "n0, n1, n2, n3, n4, n5, n6, n7 and 1 more"
    assert list_names(["a\nb", "\u00fc"]) == "'a\\nb', \u00fc"


TRAINERS_PREFIXES = [
    "model.diffusion_model.", "diffusion_model.", "module.", "module.model.", "model.model.", "generator.",
    "model.module.", "generator_ema.model.", "ema.module.", "pipe.dit.", "net.", "_orig_mod.",
    "module._orig_mod.", "_orig_mod.module.", "model._fsdp_wrapped_module._orig_mod.", "transformer.",
    "generator.module.model.", "_forward_module.", "student.",
]  # fmt: skip


@pytest.mark.parametrize("prefix", TRAINERS_PREFIXES)
def test_every_prefix_of_trainers_and_programs_is_removed(prefix: str) -> None:
    assert [strip_prefixes(prefix + name) for name in NAMES] == NAMES
    part, tensors = engine_names({prefix + name: name for name in NAMES})
    assert part == "transformer" and tensors == {name: name for name in NAMES}


def test_segments_of_wrappers_are_removed_at_every_place_and_only_whole() -> None:
    wrapped = "blocks._checkpoint_wrapped_module.3._orig_mod.ffn._fsdp_wrapped_module.0.weight"
    assert strip_prefixes(wrapped) == "blocks.3.ffn.0.weight"
    assert strip_prefixes("my_orig_mod.weight") == "my_orig_mod.weight"


def model(prefix: str, value: str) -> dict[str, str]:
    return {prefix + name: value for name in NAMES}


@pytest.mark.parametrize(
    ("tensors", "use_ema", "taken"),
    [
        (model("generator.model.", "g") | model("critic.model.", "c"), True, "g"),
        (model("critic.", "c") | model("generator.", "g") | model("generator_ema.", "e"), True, "e"),
        (model("critic.", "c") | model("generator.", "g") | model("generator_ema.", "e"), False, "g"),
        (model("model.", "m") | model("ema.", "e"), True, "e"),
        (model("model.", "m") | model("model_ema.", "e"), False, "m"),
        (model("", "m") | model("fake_score.", "f") | model("real_score.", "r"), True, "m"),
        (model("model.diffusion_model.", "m") | {"vae.conv1.weight": "v"}, True, "m"),
        (model("generator.", "g") | {"step": "s"}, True, "g"),
    ],
)
def test_of_several_models_the_right_one_is_read_and_named(
    tensors: dict[str, str], use_ema: bool, taken: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        chosen = choose_model(tensors, use_ema)
    assert len(chosen) == len(NAMES) and set(chosen.values()) == {taken}
    assert "the file holds several models: " in caplog.text and " is read, and not " in caplog.text


@pytest.mark.parametrize(
    ("tensors", "use_ema", "message"),
    [
        (model("critic.", "c"), True, "holds critic., and which of them is the model is not clear"),
        (model("generator.", "g") | model("student.", "s"), True, "holds generator., student., and which"),
        (
            model("generator.", "g") | model("", "m"),
            True,
            "holds generator., names without a word in front, and",
        ),
        (model("ema.", "a") | model("generator_ema.", "b"), True, "holds ema., generator_ema., and which"),
        (model("ema.", "a"), False, "holds ema. alone, which are averaged weights; read them with use_ema"),
        (model("vae.", "v") | model("text_encoder.", "t"), True, "holds vae., text_encoder., and which"),
    ],
)
def test_an_unclear_choice_is_refused_with_its_names(
    tensors: dict[str, str], use_ema: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose_model(tensors, use_ema)


def test_two_names_that_become_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"module.head.modulation and another tensor both become head.mod"):
        engine_names(model("", "a") | {"module.head.modulation": "b"})
