"""Ops on a CPU in float32: the arithmetic of the reference in fewer and faster calls of torch.

Each has the arguments and the meaning of its namesake in reference.py, which runs in every other dtype and
where a gradient is recorded. Bits are those of the reference where AVX-512 is and a product sums at most
SAME_BITS_TERMS terms: torch's own library adds longer sums in parts.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from rfengine.ops import reference

SAME_BITS_TERMS = 192
SHORT_ROW = 16  # of channels; a vector of them is not full, so that a whole row of pixels is taken at once
WORTH_OTHER_BITS = 2**20  # weights of a product whose time matters more than its last bits


def absence(device: torch.device | str) -> str:
    """Why this backend cannot run on `device`, or "" where it can."""
    kind = torch.device(device).type
    return "" if kind == "cpu" else f"it is for a CPU and this device is {kind}"


@cache
def _has_fast_products() -> bool:
    """Whether oneDNN is there and beats torch's own library, which knows no AVX-512 on an AMD CPU."""
    has_product = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_product and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _is_plain(x: Tensor) -> bool:
    return x.dtype == torch.float32 and not torch.is_grad_enabled()


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    outputs, terms = weight.shape
    pays = terms <= SAME_BITS_TERMS or weight.numel() >= WORTH_OTHER_BITS
    # of other strides oneDNN makes a loop without vectors
    is_dense = weight.stride() in ((terms, 1), (1, outputs))
    if pays and is_dense and _has_fast_products() and _is_plain(x) and weight.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return reference.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(linear(x, weight, bias), approximate="tanh")


def adaptive_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    if not _is_plain(x) or scale.shape[1] != 1 or shift.shape[1] != 1:
        return reference.adaptive_layer_norm(x, shift, scale, eps)
    dim = x.shape[-1]
    return torch.layer_norm(x, (dim,), *identity_of_norm(dim), eps).mul_(1 + scale).add_(shift)


@cache
def identity_of_norm(dim: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a norm without either, for which torch has a slow loop alone."""
    return torch.ones(dim, dtype=torch.float32, device="cpu"), torch.zeros(
        dim, dtype=torch.float32, device="cpu"
    )


def gated_residual_adaptive_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = reference.gated_residual(x, y, gate)
    return total, adaptive_layer_norm(total, shift, scale, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float, mean_squares: Tensor | None = None) -> Tensor:
    if mean_squares is None and _is_plain(x):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return reference.rms_norm(x, weight, eps, mean_squares)


def qk_norm_rope(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, rotation: Tensor, num_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    if not _is_plain(q):
        return reference.qk_norm_rope(q, k, weight_q, weight_k, rotation, num_heads, eps)
    _, turned = _normed_and_turned(q, k, weight_q, weight_k, rotation, num_heads, eps)
    return turned[:, :, 0], turned[:, :, 1]


def qk_norm_rope_write(
    q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor, rotation: Tensor, eps: float,
    keys: Tensor, values: Tensor, raw_keys: Tensor | None, slots: Tensor, mean_squares: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if mean_squares is not None or not _is_plain(q):
        return reference.qk_norm_rope_write(
            q, k, v, weight_q, weight_k, rotation, eps, keys, values, raw_keys, slots, mean_squares
        )
    num_heads = keys.shape[-2]
    normed, turned = _normed_and_turned(q, k, weight_q, weight_k, rotation, num_heads, eps)
    reference.write_frames(keys, turned[:, :, 1], slots)
    reference.write_frames(values, v.unflatten(-1, (num_heads, -1)), slots)
    if raw_keys is not None:
        reference.write_frames(raw_keys, normed[:, :, 1], slots)
    return turned[:, :, 0]


def _normed_and_turned(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, rotation: Tensor, num_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """q and k after the norm, and those rotated as well: [B, T, 2, H, E] each."""
    batch, tokens, dim = q.shape
    normed = F.rms_norm(torch.stack((q, k), 2), (dim,), None, eps).mul_(torch.stack((weight_q, weight_k)))
    pairs = torch.view_as_complex(normed.view(batch, tokens, 2 * num_heads, -1, 2))
    turned = torch.view_as_real(pairs * _turn(rotation))
    return normed.view(batch, tokens, 2, num_heads, -1), turned.view(batch, tokens, 2, num_heads, -1)


def rephase_keys(raw: Tensor, rotated: Tensor, rotation: Tensor) -> None:
    if not (_is_plain(raw) and _has_whole_pairs(raw) and _has_whole_pairs(rotated)):
        return reference.rephase_keys(raw, rotated, rotation)
    torch.mul(_complex(raw), _turn(rotation), out=_complex(rotated))


def evict_and_rephase(
    raw: Tensor, rotated: Tensor, values: Tensor, low_keys: Tensor | None, low_values: Tensor | None,
    rotation: Tensor, sink_tokens: int, leaving: int, alpha: float,
) -> None:  # fmt: skip
    reference.evict_chunk(raw, values, low_keys, low_values, sink_tokens, leaving, alpha)
    rephase_keys(raw, rotated, rotation)


def channel_norm_silu(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, gamma: Tensor, out: Tensor,
    out_scale: float = 1.0,
) -> Tensor:  # fmt: skip
    is_wide = out.dtype == torch.float32 and out.is_contiguous() and out_scale == 1
    if not (is_wide and _is_plain(x)):
        return reference.channel_norm_silu(x, bias, residual, gamma, out, out_scale)
    for term in (bias, residual):
        if term is not None:
            x.add_(term)
    width, channels = x.shape[2:]
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(1e-12)
    torch.mul(x, channels**0.5 / norm, out=out)
    if channels < SHORT_ROW:
        out.view(*out.shape[:2], -1).mul_(gamma.repeat(width))
    else:
        out.mul_(gamma)
    F.silu(out, inplace=True)
    return x


def _turn(rotation: Tensor) -> Tensor:
    """cos + i sin, complex [T, 1, E / 2], of rotation [2, T, E / 2]: to rotate a pair (a, b) is to multiply
    a + ib by it."""
    return torch.complex(*rotation.unbind()).unsqueeze(-2)


def _complex(x: Tensor) -> Tensor:
    """[..., E] as complex [..., E / 2], a view."""
    return torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))


def _has_whole_pairs(x: Tensor) -> bool:
    """Whether every pair of the last axis lies in memory as a complex number does."""
    *strides, last = x.stride()
    return last == 1 and not any(place % 2 for place in (*strides, x.storage_offset()))
