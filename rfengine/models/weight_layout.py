"""Where weights of linear layers lie in memory for inference: several as one, and as products read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rfengine.ops import Ops


@torch.no_grad()
def join(parts: Sequence[nn.Parameter], ops: Ops) -> None:
    """Place `parts` one after another in the memory of one tensor; each stays a parameter of its own."""
    joined = _laid_out(torch.cat([part.data for part in parts]), ops)
    for part, piece in zip(parts, joined.split([len(part) for part in parts]), strict=True):
        part.data = piece


def lay_out(weight: nn.Parameter, ops: Ops) -> None:
    """Place the weight [N, K] of a product as `ops` read it fastest, in place.

    For the products of ops/cpu.py in float32 the N weights of an input lie next to each other, which oneDNN
    would else bring about at every call. Nothing else changes, but that safetensors saves such a weight only
    once it is made contiguous().
    """
    weight.data = _laid_out(weight.data, ops)


def _laid_out(values: Tensor, ops: Ops) -> Tensor:
    is_moved = values.ndim == 2 and values.dtype == torch.float32 and ops.choice["linear"] == "cpu"
    return values.t().contiguous().t() if is_moved else values


def joined_view(parts: Sequence[Tensor]) -> Tensor | None:
    """One view, without gradient, of tensors that join has placed, or some that follow each other there; None
    for any others."""
    first = parts[0].detach()
    place, storage, stride = first.storage_offset(), first.untyped_storage()._cdata, first.stride()
    if stride[0] != 1 and not first.is_contiguous():
        return None
    for part in parts:
        if part.storage_offset() != place or part.stride() != stride or part.dtype != first.dtype:
            return None
        if part.untyped_storage()._cdata != storage:
            return None
        place += part.shape[0] * stride[0]
    return first.as_strided((sum(part.shape[0] for part in parts), *first.shape[1:]), stride)
