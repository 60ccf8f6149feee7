"""Inputs of attention in FP8: a window of two layers with NaN behind it, its copies, and a chunk of one."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from rfengine.ops import Ops, reference_fp8_attention
from rfengine.ops.reference_fp8_attention import aligned_tokens
from support.bits import DEVICE, angles

E4M3 = torch.float8_e4m3fn
EPS = 1e-6


@dataclass(frozen=True)
class Size:
    layers: int
    batch: int
    tokens: int  # of the arena
    heads: int
    head_dim: int

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


SIZE = Size(2, 2, 18, 3, 8)
KV_LEN = 15


def window(dtype: torch.dtype, size: Size = SIZE, kv_len: int = KV_LEN) -> tuple[Tensor, Tensor]:
    """Rotated keys, all around a mean that is not 0, and values [L, B, S, H, E], NaN from kv_len on."""
    generator = torch.Generator().manual_seed(2)
    shape = (size.layers, size.batch, size.tokens, size.heads, size.head_dim)
    rotated, values = (torch.randn(shape, generator=generator) for _ in range(2))
    rotated += torch.randn(size.heads, size.head_dim, generator=generator)
    rotated[:, :, kv_len:], values[:, :, kv_len:] = float("nan"), float("nan")
    return rotated.to(DEVICE, dtype), values.to(DEVICE, dtype)


def unit_of(rotated: Tensor) -> float:
    """In which no key can saturate, mean or not."""
    return 2 * rotated.nan_to_num().abs().max().item() / 448


def copies(rotated: Tensor, unit: float) -> tuple[Tensor, ...]:
    """key_unit, then key_mean, value_unit, keys_fp8 and values_fp8, all of them NaN."""
    layers, batch, tokens, heads, head_dim = rotated.shape
    shapes = ((layers, batch, heads, head_dim), (layers, batch, heads))
    floats = [torch.full(shape, float("nan"), device=DEVICE) for shape in shapes]
    shapes = (rotated.shape, (layers, batch, heads, head_dim, aligned_tokens(tokens)))
    eights = [torch.full(shape, float("nan"), device=DEVICE).to(E4M3) for shape in shapes]
    return torch.linspace(unit, 2 * unit, layers, device=DEVICE), *floats, *eights


def written(
    layer: tuple[Tensor, ...], key_unit: Tensor, v: Tensor, slots: Tensor, *arena: Tensor | None,
    ops: Ops | ModuleType = reference_fp8_attention,
) -> Tensor:  # fmt: skip
    """What qk_norm_rope_write_fp8 returns for a chunk with these values [B, T, D] and drawn q and k.

    layer: key_mean, value_unit, keys_fp8 and values_fp8, one layer of each, changed in place.
    """
    generator = torch.Generator().manual_seed(4)
    q, k = (torch.randn(v.shape, generator=generator).to(v) for _ in range(2))
    weights = [(1 + 0.3 * torch.randn(v.shape[-1], generator=generator)).to(v) for _ in range(2)]
    rotation = angles(v.shape[1], layer[2].shape[-1])
    query_unit = torch.tensor([2e-3], device=v.device)
    return ops.qk_norm_rope_write_fp8(
        q, k, v, *weights, rotation, EPS, query_unit, key_unit, *layer, slots, *arena
    )
