"""WindowFP8: copies of a full window in e4m3, which chunks of the steady state attend to.

The arena stays as it is: averages, rotations and snapshots know nothing of the copies, which are made anew
from it for every chunk (begin) and brought up to date by every pass that reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.ops import Ops
from rfengine.ops.reference_fp8_attention import aligned_tokens

E4M3 = torch.float8_e4m3fn


class AttentionUnits(NamedTuple):
    """What 1 in e4m3 stands for in every layer, float32 [L]: of queries, of keys less their mean; and the
    factor of their product, query * key / sqrt(E)."""

    query: Tensor
    key: Tensor
    logit: Tensor


class LayerFP8(NamedTuple):
    """One layer's copies and their units, as the ops of FP8 attention take them; units of the layer are
    [1]."""

    query_unit: Tensor
    key_unit: Tensor
    key_mean: Tensor
    value_unit: Tensor
    keys: Tensor
    values: Tensor
    logit_scale: Tensor


@dataclass(frozen=True, slots=True)
class WindowFP8:
    """keys: e4m3 [L, B, S, H, E], less key_mean, float32 [L, B, H, E]; values: e4m3 [L, B, H, E, S8] in
    value_unit, float32 [L, B, H]; units: of keys and queries."""

    units: AttentionUnits
    keys: Tensor
    values: Tensor
    key_mean: Tensor
    value_unit: Tensor

    @classmethod
    def of(cls, arena: Tensor, units: AttentionUnits) -> WindowFP8:
        """For an arena of rotated keys [L, B, S, H, E], with nothing in it yet."""
        layers, batch, tokens, heads, head_dim = arena.shape
        return cls(
            units,
            arena.new_zeros(arena.shape, dtype=E4M3),
            arena.new_zeros((layers, batch, heads, head_dim, aligned_tokens(tokens)), dtype=E4M3),
            arena.new_zeros((layers, batch, heads, head_dim), dtype=torch.float32),
            arena.new_ones((layers, batch, heads), dtype=torch.float32),
        )

    def begin(self, cache: StreamingKVCache, ops: Ops) -> None:
        """Copy the arena of `cache` before the first pass of a chunk, whose own slots each pass writes before
        it reads them: all others are filled."""
        tokens, filled = cache.full_read
        ops.window_fp8(
            cache.keys, cache.values, self.units.key, self.key_mean, self.value_unit, self.keys, self.values,
            tokens, filled,
        )  # fmt: skip

    def layer(self, index: int) -> LayerFP8:
        query, key, logit = (unit[index : index + 1] for unit in self.units)
        mean, unit = self.key_mean[index], self.value_unit[index]
        return LayerFP8(query, key, mean, unit, self.keys[index], self.values[index], logit)
