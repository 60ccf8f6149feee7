"""Products whose weights are int8, with a scale for each output and no weight in 16 bits beside them.

int8 and not e4m3: its steps are even, so that a weight is off by 0.7 % of its channel's size (root mean
square) where e4m3 is off by 2.6 %, and every GPU reads it. Only weights are rounded. A model is put into
int8 before its weights are loaded, which are then rounded one by one as they are read.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rfengine.models.dit import WanDiT
from rfengine.models.linear import Linear
from rfengine.ops import REFERENCE_OPS
from rfengine.ops.reference_int8 import dequantised

SCALE_SUFFIX = "_scale"  # of the name of a weight, for its scale


class Int8Linear(nn.Module):
    """y = x W^T without bias, in the place of an nn.Linear: weight int8 [N, K], weight_scale [N].

    widens: x in float16 is multiplied in float32, where the result may exceed float16."""

    def __init__(self, linear: nn.Linear, widens: bool) -> None:
        super().__init__()
        self.widens = widens
        put_into_int8(self, linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if self.widens and x.dtype == torch.float16 else x
        return REFERENCE_OPS.linear_int8(wide, self.weight, self.weight_scale, None)


def put_into_int8(layer: nn.Module, weight: Tensor) -> None:
    """Give `layer` an int8 weight of the shape of `weight` and a scale for each output, to be loaded."""
    layer.weight = nn.Parameter(torch.empty_like(weight, dtype=torch.int8), requires_grad=False)
    layer.weight_scale = nn.Parameter(weight.new_empty(weight.shape[:1]), requires_grad=False)


def transformer_in_int8(model: WanDiT) -> WanDiT:
    """`model`, whose weights are not loaded, with the weights of the blocks' products in int8, in place."""
    for block in model.blocks:
        for layer in block.modules():
            if isinstance(layer, Linear):
                put_into_int8(layer, layer.weight)
    return model


def text_encoder_in_int8(model: nn.Module) -> nn.Module:
    """A UMT5EncoderModel, whose weights are not loaded, with those of its layers' products in int8, in place.
    The embedding and the tables of positions stay."""
    for block in model.encoder.block:
        for owner in list(block.modules()):
            for name, layer in list(owner.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(owner, name, Int8Linear(layer, widens=name == "wo"))
    return model


def weights_in(model: WanDiT, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of `model` by name on its device in `dtype`, those in int8 multiplied back: new tensors,
    but for what is so already."""
    weights = {name: tensor.to(model.device) for name, tensor in model.state_dict().items()}
    scales = {name: weights.pop(name) for name in list(weights) if name.endswith(f"weight{SCALE_SUFFIX}")}
    for name, scale in scales.items():
        name = name.removesuffix(SCALE_SUFFIX)
        weights[name] = dequantised(weights[name], scale, dtype)
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def is_in_int8(model: WanDiT) -> bool:
    """Whether the products of the blocks are in int8."""
    return model.blocks[0].ffn[0].weight_scale is not None
