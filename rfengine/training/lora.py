"""LoRA adapters that a student or a critic is trained by, in place of its weights.

They sit on the ten linears of every block that LongLive's LoRA covers: q, k, v and o of both attentions and
both of the feed-forward, each y = W x + b + up down x, scale 1. The matrices are parametrizations of the
weights, so every op reads the merged weight W + up @ down and none knows of them. B batch.

While it trains a model's state holds, for each of those weights, `<layer>.parametrizations.weight.original`,
`<layer>.parametrizations.weight.0.down` [rank, in] and `.0.up` [out, rank]. merged_weights returns the plain
names again; lora_weights those of a PEFT file, which `rfengine convert --lora` reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rfengine.checkpoint.lora_change import merge_lora
from rfengine.models.dit import WanDiT

_ORIGINAL = ".parametrizations.weight.original"
_DOWN, _UP = ".parametrizations.weight.0.down", ".parametrizations.weight.0.up"


class LowRank(nn.Module):
    """weight + up @ down: a parametrization of a linear's weight [out, in]."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, weight.shape[1], device=weight.device))
        self.up = nn.Parameter(torch.empty(weight.shape[0], rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return torch.addmm(weight, self.up, self.down)


def add_adapters(model: WanDiT, rank: int, seed: int) -> None:
    """Freeze `model` and put an adapter on the linears of its blocks, in place; it computes the same at
    first. Those of a model on the meta device have no values yet."""
    model.requires_grad_(False)
    for block in model.blocks:
        for layer in [module for module in block.modules() if isinstance(module, nn.Linear)]:
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank), unsafe=True)
    if model.device.type != "meta":
        state = model.state_dict()
        for name, value in first_adapters(state, seed):
            state[name].copy_(value)


def first_adapters(state: Mapping[str, Tensor], seed: int) -> Iterator[tuple[str, Tensor]]:
    """Name and value, on the CPU, of every matrix of the adapters of a state as the training begins: drawn
    in the order of the state, and zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in state.items():
        if name.endswith(_DOWN):
            drawn = torch.randn(value.shape, generator=generator, device="cpu")
            yield name, drawn * value.shape[1] ** -0.5
        elif name.endswith(_UP):
            yield name, torch.zeros(value.shape, device="cpu")


def plain_name(name: str) -> str:
    """The name that a weight has without an adapter."""
    return f"{name.removesuffix(_ORIGINAL)}.weight" if name.endswith(_ORIGINAL) else name


def merged_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state with adapters under the plain names, the adapters merged; one without them as it is."""
    merged = {name: value for name, value in state.items() if ".parametrizations." not in name}
    for name, original in state.items():
        if name.endswith(_ORIGINAL):
            layer = name.removesuffix(_ORIGINAL)
            merged[f"{layer}.weight"] = merge_lora(original, state[layer + _DOWN], state[layer + _UP])
    return merged


def lora_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters of a state alone, by their names in a PEFT file."""
    sides = {_DOWN: "lora_A", _UP: "lora_B"}
    return {
        f"base_model.model.{name.removesuffix(suffix)}.{side}.weight": value.detach().contiguous()
        for name, value in state.items()
        for suffix, side in sides.items()
        if name.endswith(suffix)
    }
