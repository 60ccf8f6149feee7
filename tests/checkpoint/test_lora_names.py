from __future__ import annotations

import pytest

from rfengine.checkpoint.lora_names import LoraNames, parse_lora
from rfengine.checkpoint.shapes import expected_shapes
from rfengine.config import WanConfig

KNOWN = expected_shapes(WanConfig(dim=32, ffn_dim=48, num_heads=2, num_layers=4)).keys()


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
    assert parse_lora([down, up], KNOWN) == {"blocks.3.ffn.2.weight": LoraNames(down, up, None)}


def test_foreign_and_incomplete_loras_are_explained() -> None:
    with pytest.raises(ValueError, match=r"the LoRA has critic_lora, step where lora_A and lora_B"):
        parse_lora(["critic_lora", "step"], KNOWN)
    with pytest.raises(ValueError, match="the LoRA has no tensor where"):
        parse_lora([], KNOWN)
    with pytest.raises(ValueError, match=r"only one of lora_A and lora_B for blocks.0.ffn.0.weight"):
        parse_lora(["blocks.0.ffn.0.lora_A.weight"], KNOWN)


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
            found = parse_lora([written + down, written + up, f"{written}.alpha"], KNOWN)
            assert found == {f"{wan}.weight": LoraNames(written + down, written + up, f"{written}.alpha")}


def test_every_layer_is_found_by_underscores() -> None:
    for name in KNOWN:
        layer, _, leaf = name.rpartition(".")
        if leaf in ("weight", "bias"):
            kind = "diff" if leaf == "weight" else "diff_b"
            assert list(parse_lora([f"lora_unet_{layer.replace('.', '_')}.{kind}"], KNOWN)) == [name]


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
    "prefix", ["lora_te_", "lora_te1_", "text_encoder.", "base_model.model.text_encoder."]
)
def test_text_encoder_is_left_out_and_reported(prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    text = [f"{prefix}encoder_block_0.lora_{side}.weight" for side in "AB"]
    with pytest.raises(ValueError, match=r"the LoRA adapts the text encoder alone"):
        parse_lora(text, KNOWN)
    pair = [f"blocks.0.ffn.0.lora_{side}.weight" for side in "AB"]
    assert parse_lora([*text, *pair], KNOWN).keys() == {"blocks.0.ffn.0.weight"}
    assert "the LoRA: 2 of 4 tensors adapt the text encoder" in caplog.text


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
    with pytest.raises(ValueError, match=rf"{layer}.weight, which image-to-video models alone have"):
        parse_lora(names, KNOWN)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["lora_unet_blocks_31_ffn_0"], "it has 4 layers, so the LoRA is for a transformer of another size"),
        (["transformer.blocks.9.attn1.to_q", "blocks.1.ffn.0"], "it has 4 layers, so"),
        (["transformer.single_transformer_blocks.0.attn.to_q"], "it is for another model"),
        (["vace_blocks.0.before_proj", "blocks.1.ffn.0"], "and the rest fits; give a LoRA that adapts"),
        (["base_model.model."], "it is for another model"),
        (["transformer_2.blocks.0.attn1.to_q"], "it is for another model"),
    ],
)
def test_layers_that_the_transformer_lacks_are_listed(layers: list[str], message: str) -> None:
    names = [f"{layer}.lora_{side}.weight" for layer in layers for side in ("down", "up")]
    with pytest.raises(
        ValueError, match=rf"adapts {layers[0]}.weight, which the transformer lacks.*{message}"
    ):
        parse_lora(names, KNOWN)


def test_prefixes_without_end_are_not_stripped() -> None:
    names = [f"{'model.' * 100}blocks.0.ffn.0.lora_{side}.weight" for side in "AB"]
    with pytest.raises(ValueError, match="which the transformer lacks; it is for another model"):
        parse_lora(names, KNOWN)


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
