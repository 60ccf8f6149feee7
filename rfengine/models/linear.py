"""The linear layers of the transformer: in the dtype of the model, or in FP8 beside it.

B batch, T tokens, D model dim, H heads, K inputs and N outputs of a layer, G scales of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rfengine.config import WanConfig
from rfengine.models.weight_layout import join, joined_view
from rfengine.ops import Ops
from rfengine.ops.reference import channel_fp8
from rfengine.ops.reference_fp8 import product_reach
from rfengine.tensor_parallel import WHOLE, TensorParallel


class RowsFP8(NamedTuple):
    """Rows in e4m3: values [B, T, K] and float32 scales [B, T, G], one for each of G equal parts of a
    row."""

    values: Tensor
    scale: Tensor


Rows = Tensor | RowsFP8  # what a linear layer reads: in the dtype of the model, or in FP8


class WeightFP8(NamedTuple):
    """The weights of one or more layers as one in e4m3: values [N, K], scale [N] in float32; bias [N] in
    the dtype of the model; reach [2], from product_reach."""

    values: Tensor
    scale: Tensor
    bias: Tensor
    reach: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, layers: Sequence[nn.Linear]) -> WeightFP8:
        """Those of `layers`, one after another."""
        values, scale = channel_fp8(torch.cat([layer.weight.detach() for layer in layers]))
        bias = torch.cat([layer.bias.detach() for layer in layers])
        return cls(values, scale, bias, product_reach(values, scale, bias))

    @torch.no_grad()
    def refresh(self, layers: Sequence[nn.Linear]) -> None:
        """The same once the weights of `layers` are others, in the memory that graphs read."""
        for kept, fresh in zip(self, WeightFP8.of(layers), strict=True):
            kept.copy_(fresh)

    def last(self, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
        """Values, scale and bias of the last outputs, as linear_fp8 takes them."""
        return self.values[-outputs:], self.scale[-outputs:], self.bias[-outputs:]


class Linear(nn.Linear):
    """y = x W^T + b on the model's ops. fp8: the weight in FP8, for rows in FP8; None where it has none.
    weight_scale: [N] where the weight is int8 (int8_products.py), else None. parallel: the ranks whose
    results are added up, each from its part of x."""

    def __init__(
        self, in_features: int, out_features: int, ops: Ops, parallel: TensorParallel = WHOLE
    ) -> None:
        super().__init__(in_features, out_features)
        self.ops, self.parallel = ops, parallel
        self.fp8: WeightFP8 | None = None
        self.register_parameter("weight_scale", None)

    @property
    def is_plain(self) -> bool:
        """Whether its weight is in the dtype of the model and nothing else."""
        return self.fp8 is None and self.weight_scale is None

    def forward(self, x: Rows) -> Tensor:
        if isinstance(x, RowsFP8):
            return self.parallel.added(self.ops.linear_fp8(*x, *self.fp8[:3]))
        if self.weight_scale is not None:
            product = self.ops.linear_int8(x, self.weight, self.weight_scale, self.bias)
        else:
            product = self.ops.linear(x, self.weight, self.bias)
        return self.parallel.added(product)


class LinearGELU(Linear):
    """GELU (tanh form) of x W^T + b."""

    def forward(self, x: Rows) -> Tensor:
        if isinstance(x, RowsFP8):
            return self.ops.linear_gelu_fp8(*x, *self.fp8[:3])
        if self.weight_scale is not None:
            return self.ops.linear_gelu_int8(x, self.weight, self.weight_scale, self.bias)
        return self.ops.linear_gelu(x, self.weight, self.bias)

    def rows_fp8(self, x: RowsFP8) -> RowsFP8:
        """forward, in FP8."""
        return RowsFP8(*self.ops.linear_gelu_rows_fp8(*x, *self.fp8))


class LinearOfHeads(Linear):
    """y = x W^T + b of the heads of an attention, which in FP8 are rounded as they are read, if they are
    not in FP8 already."""

    def __init__(self, config: WanConfig, ops: Ops, parallel: TensorParallel) -> None:
        own = parallel.own(config)
        super().__init__(own.dim, config.dim, ops, parallel)
        self.num_heads = own.num_heads

    def forward(self, x: Rows) -> Tensor:
        if self.fp8 is not None and isinstance(x, Tensor):
            return self.parallel.added(self.ops.linear_heads_fp8(x, *self.fp8[:3], self.num_heads))
        return super().forward(x)


class Projections(nn.Module):
    """Queries, keys and values of x: one product in FP8 and where pack_weights joined the weights, else one
    for each. fp8: the weights of q, k and v in FP8, one after another.

    The weights remain parameters of their own names in either case. What moves them apart again (`.to()`,
    copying the model, state loaded with assign=True) is seen at the next call, as is a recorded gradient:
    the layers are then called one by one.
    """

    def __init__(self, config: WanConfig, ops: Ops, parallel: TensorParallel) -> None:
        super().__init__()
        own = parallel.own(config)
        self.ops, self.parallel, self.num_heads, self.eps = ops, parallel, own.num_heads, config.eps
        self.q, self.k, self.v = (Linear(config.dim, own.dim, ops) for _ in range(3))
        self.o = LinearOfHeads(config, ops, parallel)
        self.fp8: WeightFP8 | None = None
        self.norm_q, self.norm_k = (Scale(own.dim) for _ in range(2))
        self.is_packed = False

    def pack(self, *layers: nn.Linear) -> None:
        """Place the weights of `layers` one after another in one tensor's memory, and their biases."""
        join([layer.weight for layer in layers], self.ops)
        join([layer.bias for layer in layers], self.ops)
        if layers[0].weight_scale is not None:
            join([layer.weight_scale for layer in layers], self.ops)
        self.is_packed = True

    def project(self, x: Rows, *layers: nn.Linear) -> tuple[Tensor, ...]:
        """Every layer of x [B, T, D]: [B, T, H * E] each, views of one [B, T, len(layers) * H * E] where
        packed. In FP8 the layers are the last ones of q, k and v."""
        if isinstance(x, RowsFP8):
            outputs = sum(layer.out_features for layer in layers)
            return self.ops.linear_fp8(*x, *self.fp8.last(outputs)).chunk(len(layers), dim=-1)
        if self.is_packed and not torch.is_grad_enabled():
            weight = joined_view([layer.weight for layer in layers])
            bias = joined_view([layer.bias for layer in layers])
            if weight is not None and bias is not None:
                if layers[0].weight_scale is None:
                    return self.ops.linear(x, weight, bias).chunk(len(layers), dim=-1)
                scale = joined_view([layer.weight_scale for layer in layers])
                return self.ops.linear_int8(x, weight, scale, bias).chunk(len(layers), dim=-1)
        return tuple(layer(x) for layer in layers)


class Scale(nn.Module):
    """The weight of an RMS norm, kept apart so that the op can fuse it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
