from __future__ import annotations

import pytest

from rfengine.checkpoint.lora_names import LoraNames, Unmatched, parse_lora
from rfengine.checkpoint.shapes import expected_shapes
from rfengine.config import WanConfig

KNOWN = expected_shapes(WanConfig(dim=32, ffn_dim=48, num_heads=2, num_layers=4)).keys()


def layers_of(names: list[str]) -> dict[str, LoraNames]:
    """What the names stand for, all of which match."""
    layers, unmatched = parse_lora(names, KNOWN)
    assert unmatched == Unmatched()
    return layers


@pytest.mark.parametrize(
    "template",
    [
        "base_model.model.{}.lora_{}.weight",
        "base_model.model.{}.lora_{}.default.weight",
        "base_model.model.model.{}.lora_{}.weight",
        "{}.lora_{}.weight",
        "_fsdp_wrapped_module.base_model.model._orig_mod.{}.lora_{}.weight",
    ],
)
def test_name_forms_of_peft_are_read(template: str) -> None:
    down, up = (template.format("blocks.3.ffn.2", side) for side in "AB")
    assert layers_of([down, up]) == {"blocks.3.ffn.2.weight": LoraNames(down, up, None)}


def test_empty_and_incomplete_loras_are_explained() -> None:
    with pytest.raises(ValueError, match="the LoRA has no tensor; give lora_A and lora_B of PEFT"):
        parse_lora([], KNOWN)
    with pytest.raises(ValueError, match=r"only one of lora_A and lora_B for blocks.0.ffn.0.weight"):
        parse_lora(["blocks.0.ffn.0.lora_A.weight"], KNOWN)


def test_foreign_names_are_reported_beside_those_that_match() -> None:
    pair = [f"blocks.0.ffn.0.lora_{side}.weight" for side in "AB"]
    layers, unmatched = parse_lora(["critic_lora", *pair, "blocks.0.ffn.0.lora_A.bias"], KNOWN)
    assert list(layers) == ["blocks.0.ffn.0.weight"]
    assert unmatched.names == ("critic_lora", "blocks.0.ffn.0.lora_A.bias")
    assert "give lora_A and lora_B of PEFT" in unmatched.reason


LAYERS = {"blocks.3.ffn.2": "blocks.3.ffn.net.2", "blocks.0.self_attn.o": "blocks.0.attn1.to_out.0"}


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "base_model.model.",
        "diffusion_model.",
        "model.diffusion_model.",
        "transformer.",
        "pipe.dit.",
        "model.",
        "generator.",
        "base_model.model.diffusion_model.",
        "lora_unet_",
        "lora_unet__",
        "lora_transformer_",
        "lycoris_",
    ],
)
@pytest.mark.parametrize(
    ("down", "up"),
    [
        (".lora_A.weight", ".lora_B.weight"),
        (".lora_A.style.weight", ".lora_B.style.weight"),
        (".lora_A", ".lora_B"),
        (".lora_down.weight", ".lora_up.weight"),
        (".lora.down.weight", ".lora.up.weight"),
        ("_lora.down.weight", "_lora.up.weight"),
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ],
)
def test_layouts_of_wan_and_diffusers_mean_the_same(prefix: str, down: str, up: str) -> None:
    for wan, diffusers in LAYERS.items():
        for layer in (wan, diffusers):
            written = prefix + (layer.replace(".", "_") if prefix.endswith("_") else layer)
            found = layers_of([written + down, written + up, f"{written}.alpha"])
            assert found == {f"{wan}.weight": LoraNames(written + down, written + up, f"{written}.alpha")}


def test_every_layer_is_found_by_underscores() -> None:
    for name in KNOWN:
        layer, _, leaf = name.rpartition(".")
        if leaf in ("weight", "bias"):
            kind = "diff" if leaf == "weight" else "diff_b"
            assert list(layers_of([f"lora_unet_{layer.replace('.', '_')}.{kind}"])) == [name]


def test_layers_of_two_spellings_are_refused() -> None:
    twice = [
        f"{layer}.lora_{side}.weight"
        for layer in ("diffusion_model.blocks.0.ffn.0", "transformer.blocks.0.ffn.net.0.proj")
        for side in "AB"
    ]
    with pytest.raises(ValueError, match=r"both are the down of blocks.0.ffn.0.weight; keep one of them"):
        parse_lora(twice, KNOWN)


def test_several_adapters_in_one_file_are_refused() -> None:
    names = [f"blocks.{i}.ffn.0.lora_{s}.{name}.weight" for i, name in enumerate("xy") for s in "AB"]
    with pytest.raises(ValueError, match=r"the LoRA holds the adapters x, y; keep one"):
        parse_lora(names, KNOWN)


@pytest.mark.parametrize(
    ("leaf", "method"),
    [
        ("lora_magnitude_vector", "DoRA"),
        ("lora_magnitude_vector.default.weight", "DoRA"),
        ("dora_scale", "DoRA"),
        ("hada_w1_a", "LoHa"),
        ("lokr_w1", "LoKr"),
        ("lora_mid.weight", "LoCon"),
        ("oft_blocks", "OFT"),
        ("a1.weight", "GLoRA"),
    ],
)
def test_other_methods_are_named(leaf: str, method: str) -> None:
    pair = [f"blocks.0.ffn.0.lora_{side}.weight" for side in "AB"]
    with pytest.raises(ValueError, match=rf"no plain LoRA: blocks.0.ffn.0.{leaf} are of {method}"):
        parse_lora([*pair, f"blocks.0.ffn.0.{leaf}"], KNOWN)


@pytest.mark.parametrize(
    "prefix", ["lora_te_", "lora_te1_", "lora_te__", "text_encoder.", "base_model.model.text_encoder."]
)
def test_text_encoder_matches_nothing(prefix: str) -> None:
    text = tuple(f"{prefix}encoder_block_0.lora_{side}.weight" for side in "AB")
    reason = "they adapt the text encoder, which the engine keeps as it is"
    assert parse_lora(text, KNOWN) == ({}, Unmatched(text, reason))
    pair = [f"blocks.0.ffn.0.lora_{side}.weight" for side in "AB"]
    layers, unmatched = parse_lora([*pair, *text], KNOWN)
    assert layers.keys() == {"blocks.0.ffn.0.weight"} and unmatched == Unmatched(text, reason)


@pytest.mark.parametrize(
    "layer",
    [
        "diffusion_model.blocks.0.cross_attn.k_img",
        "lora_unet_blocks_0_cross_attn_v_img",
        "diffusion_model.img_emb.proj.1",
        "transformer.blocks.0.attn2.add_k_proj",
        "transformer.condition_embedder.image_embedder.ff.net.0.proj",
    ],
)
def test_image_to_video_is_distinguished_from_a_foreign_model(layer: str) -> None:
    names = [f"{each}.lora_{side}.weight" for each in (layer, "blocks.0.ffn.0") for side in "AB"]
    layers, unmatched = parse_lora(names, KNOWN)
    assert list(layers) == ["blocks.0.ffn.0.weight"] and unmatched.names == tuple(names[:2])
    assert unmatched.reason.startswith("image-to-video models alone have such layers")


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        (["lora_unet_blocks_31_ffn_0"], "the transformer has 4 layers, so give a LoRA of a transf"),
        (["transformer.blocks.9.attn1.to_q", "blocks.1.ffn.0"], "the transformer has 4 layers, so"),
        (["transformer.single_transformer_blocks.0.attn.to_q"], "give a LoRA that adapts this transf"),
        (["vace_blocks.0.before_proj", "blocks.1.ffn.0"], "give a LoRA that adapts this transformer"),
        (["base_model.model."], "give a LoRA that adapts this transformer alone"),
        (["transformer_2.blocks.0.attn1.to_q"], "give a LoRA that adapts this transformer alone"),
        (["lora_unet_blocks_12.self_attn.k"], "give a LoRA that adapts this transformer alone"),
    ],
)
def test_layers_that_the_transformer_lacks_match_nothing(layers: list[str], reason: str) -> None:
    """The first of them."""
    leaves = ("lora_down.weight", "lora_up.weight", "alpha")
    names = [f"{layer}.{leaf}" for layer in layers for leaf in leaves]
    found, unmatched = parse_lora(names, KNOWN)
    assert len(found) == len(layers) - 1
    assert unmatched.names == tuple(names[:3]) and unmatched.reason.startswith(reason)


def test_prefixes_without_end_are_not_stripped() -> None:
    names = [f"{'model.' * 100}blocks.0.ffn.0.lora_{side}.weight" for side in "AB"]
    assert parse_lora(names, KNOWN)[0] == {}


def test_half_a_pair_is_refused() -> None:
    with pytest.raises(ValueError, match=r"only one of lora_A and lora_B for blocks.0.ffn.0.weight"):
        parse_lora(["blocks.0.ffn.0.lora_up.weight", "blocks.0.ffn.0.alpha"], KNOWN)
    with pytest.raises(ValueError, match=r"has an alpha and no matrices for blocks.0.ffn.0.weight"):
        parse_lora(["blocks.0.ffn.0.diff", "blocks.0.ffn.0.alpha"], KNOWN)
    with pytest.raises(ValueError, match=r"lora_B.bias and no lora_A and lora_B of its layer"):
        parse_lora(["blocks.0.ffn.0.lora_B.bias"], KNOWN)


def test_model_in_place_of_a_lora_is_refused() -> None:
    with pytest.raises(ValueError, match=r"holds whole weights .* not a LoRA; give a model as the source"):
        parse_lora(["model.blocks.0.ffn.0.weight", "model.blocks.0.ffn.0.bias"], KNOWN)
