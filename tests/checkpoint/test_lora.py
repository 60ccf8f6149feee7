from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rfengine.checkpoint.lora import LoraNames, add_lora, merge_lora, parse_lora
from rfengine.checkpoint.shapes import expected_transformer_shapes
from rfengine.checkpoint.tensor_file import StoredTensor
from rfengine.config import PRESETS, WanConfig

ADAPTED = [
    *(f"{kind}_attn.{letter}" for kind in ("self", "cross") for letter in "qkvo"),
    "ffn.0",
    "ffn.2",
]


def lora_shapes(config: WanConfig, rank: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a LongLive LoRA (spec 6.2)."""
    weights = expected_transformer_shapes(config)
    shapes = {}
    for layer in (f"blocks.{i}.{name}" for i in range(config.num_layers) for name in ADAPTED):
        outputs, inputs = weights[f"{layer}.weight"]
        shapes[f"base_model.model.{layer}.lora_A.weight"] = (rank, inputs)
        shapes[f"base_model.model.{layer}.lora_B.weight"] = (outputs, rank)
    return shapes


def stored(tensors: dict[str, Tensor]) -> dict[str, StoredTensor]:
    return {name: StoredTensor.of(tensor) for name, tensor in tensors.items()}


def test_published_lora_has_300_pairs_of_the_published_size() -> None:
    shapes = lora_shapes(PRESETS["wan-1.3b"].model, rank=256)
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == (600, 349_962_240)
    layers = parse_lora(shapes)
    assert (
        len(layers) == 300 and layers.keys() <= expected_transformer_shapes(PRESETS["wan-1.3b"].model).keys()
    )


@pytest.mark.parametrize("alpha", [None, 12.0])
def test_300_pairs_are_merged_in_float32(alpha: float | None) -> None:
    rank, config = 8, WanConfig(dim=32, ffn_dim=48, num_heads=2, num_layers=30)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator).to(torch.bfloat16)
        for name, shape in expected_transformer_shapes(config).items()
    }
    pairs = {
        name: torch.randn(shape, generator=generator).to(torch.bfloat16)
        for name, shape in lora_shapes(config, rank).items()
    }
    if alpha is not None:
        pairs |= {
            name.replace("lora_A.weight", "alpha"): torch.tensor(alpha)
            for name in list(pairs)
            if "_A" in name
        }
    merged = stored(weights)
    add_lora(merged, stored(pairs), "lora.pt")
    scale, changed = 1.0 if alpha is None else alpha / rank, 0
    for name, weight in weights.items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" not in pairs:
            assert torch.equal(merged[name].read(), weight)
            continue
        changed += 1
        up, down = pairs[f"{layer}.lora_B.weight"].double(), pairs[f"{layer}.lora_A.weight"].double()
        exact = weight.double() + scale * up @ down
        # each of the rank + 2 float32 roundings is at most 2**-24 of the sum of magnitudes
        bound = (rank + 2) * 2.0**-24 * (weight.double().abs() + scale * up.abs() @ down.abs())
        assert merged[name].dtype == torch.float32 and merged[name].shape == weight.shape
        assert ((merged[name].read().double() - exact).abs() <= bound).all()
    assert changed == 300


def test_scale_is_alpha_over_rank() -> None:
    weight, down, up = torch.zeros(3, 2), torch.ones(4, 2), torch.ones(3, 4)
    assert torch.equal(merge_lora(weight, down, up), torch.full((3, 2), 4.0))
    assert torch.equal(merge_lora(weight, down, up, alpha=2.0), torch.full((3, 2), 2.0))


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
    assert parse_lora([down, up]) == {"blocks.3.ffn.2.weight": LoraNames(down, up, None)}


def test_foreign_and_incomplete_loras_are_explained() -> None:
    with pytest.raises(ValueError, match=r"the LoRA has critic_lora, step where lora_A and lora_B"):
        parse_lora(["critic_lora", "step"])
    with pytest.raises(ValueError, match="the LoRA has no tensor where"):
        parse_lora([])
    with pytest.raises(ValueError, match=r"only one of lora_A and lora_B for blocks.0.ffn.0.weight"):
        parse_lora(["blocks.0.ffn.0.lora_A.weight"])


def test_lora_of_another_model_is_refused() -> None:
    transformer = stored({"blocks.0.ffn.0.weight": torch.zeros(6, 4)})

    def pair(layer: str, outputs: int, inputs: int) -> dict[str, StoredTensor]:
        sides = {
            f"{layer}.lora_A.weight": torch.zeros(2, inputs),
            f"{layer}.lora_B.weight": torch.zeros(outputs, 2),
        }
        return stored(sides)

    with pytest.raises(
        ValueError, match=r"lora.pt adapts blocks.9.ffn.0.weight, which the transformer lacks"
    ):
        add_lora(transformer, pair("blocks.9.ffn.0", 6, 4), "lora.pt")
    with pytest.raises(
        ValueError, match=r"does not fit blocks.0.ffn.0.weight \(6, 4\) by \(6, 2\) x \(2, 5\)"
    ):
        add_lora(transformer, pair("blocks.0.ffn.0", 6, 5), "lora.pt")
    assert torch.equal(transformer["blocks.0.ffn.0.weight"].read(), torch.zeros(6, 4))
