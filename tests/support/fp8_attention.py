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


def rounded(x: Tensor) -> Tensor:
    """x in e4m3, saturating, as float64."""
    return x.clamp(-448, 448).to(E4M3).double()


def assert_rounded_from(name: str, found: Tensor, exact: Tensor, slack: Tensor) -> None:
    """Every e4m3 value is what some number within slack of exact (float64) rounds to."""
    low, high, found = rounded(exact - slack), rounded(exact + slack), found.double()
    outside = (found < low) | (found > high) | found.isnan()
    assert not outside.any(), (
        f"{name}: {int(outside.sum())} of {found.numel()} values, first {found[outside][0]}"
    )


@dataclass(frozen=True)
class Attention:
    """e4m3 operands of the attention of one layer; what is beyond kv_len is NaN."""

    q: Tensor
    keys: Tensor
    values: Tensor
    logit_scale: Tensor
    value_unit: Tensor
    kv_len: int

    @classmethod
    def drawn(
        cls, batch: int, tokens: int, arena: int, heads: int, head_dim: int, kv_len: int, spread: float = 2.0
    ) -> Attention:
        """spread: the standard deviation of the logits."""
        generator = torch.Generator().manual_seed(tokens + kv_len)
        q = 20 * torch.randn(batch, tokens, heads, head_dim, generator=generator)
        keys = 20 * torch.randn(batch, arena, heads, head_dim, generator=generator)
        values = 8 * torch.randn(batch, heads, head_dim, aligned_tokens(arena), generator=generator)
        keys[:, kv_len:], values[..., kv_len:] = float("nan"), float("nan")
        scale = torch.tensor([spread * head_dim**-0.5 / 400])
        unit = 0.5 + torch.rand(batch, heads, generator=generator)
        operands = (each.to(DEVICE, E4M3) for each in (q, keys, values))
        return cls(*operands, scale.to(DEVICE), unit.to(DEVICE), kv_len)

    def arguments(self, dtype: torch.dtype, *options: object) -> tuple[object, ...]:
        filled = torch.tensor([self.kv_len], dtype=torch.int32, device=self.q.device)
        operands = self.q, self.keys, self.values, self.logit_scale, self.value_unit
        return *operands, self.kv_len, filled, dtype, *options

    def exact(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The result with weights rounded to e4m3 and sums in float64, and how far float32 may be from it.

        A logit in float32 is off by its terms times E + 4 roundings, a weight 2^x by that times ln 2, and by
        2^-21 for the exponential; where that crosses a border of e4m3, the weight is off by a step. Under
        2^-5, where the maximum may yet grow or be the next whole number, it is off by 2^-9. A sum of kv_len
        terms is off by 2^-24 of each term and rounding; the result is rounded to dtype.
        """
        n, eps = self.kv_len, 2.0**-24
        queries, keys = self.q.double().transpose(1, 2), self.keys[:, :n].double().transpose(1, 2)
        values = self.values[..., :n].double().mT
        scale = (self.logit_scale * torch.tensor(2.0, device=DEVICE).log().reciprocal()).double()
        logits, terms = queries @ keys.mT * scale, queries.abs() @ keys.abs().mT * scale
        weights = 2 ** (logits - logits.amax(-1, keepdim=True).ceil() + 8)
        off = 0.7 * (self.q.shape[-1] + 4) * eps * terms + 2.0**-21
        found = rounded(weights)
        slack = (rounded(weights * (1 + off)) - found).maximum(found - rounded(weights * (1 - off)))
        slack += torch.where(weights < 2**-5, 2.0**-9, 0.0) + n * eps * found
        total = weights.sum(-1, keepdim=True)
        factor = self.value_unit.double()[:, :, None, None] / total
        result = found @ values * factor
        limit = slack @ values.abs() * factor + result.abs() * (off.amax(-1, keepdim=True) + n * eps)
        limit += result.abs() * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).smallest_normal
        return result.transpose(1, 2), limit.transpose(1, 2)
