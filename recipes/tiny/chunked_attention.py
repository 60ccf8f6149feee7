"""Attention for training on a CPU: plain products over the chunks that are attended to, with no mask.

On two cores this takes a third of the time of the fused form under the masks of transformer.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rfengine.ops import REFERENCE_OPS, Ops


class ChunkedAttentionOps(Ops):
    """The reference ops with another clip_attention, whose mask must be constant over each pair of chunks."""

    def __init__(self, chunk_tokens: int) -> None:
        super().__init__(REFERENCE_OPS.choice)
        self.chunk_tokens = chunk_tokens

    def clip_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """As reference.clip_attention: q [B, T, H, E]; k, v [B, S, H, E]; mask bool [T, S], True attends."""
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if mask is None:
            return _attend(q, k, v).transpose(1, 2)
        size = self.chunk_tokens
        keys, values = k.split(size, 2), v.split(size, 2)
        outputs = []
        for queries, attends in zip(q.split(size, 2), mask[::size, ::size].tolist(), strict=True):
            chosen = [index for index, seen in enumerate(attends) if seen]
            outputs.append(
                _attend(
                    queries,
                    torch.cat([keys[index] for index in chosen], 2),
                    torch.cat([values[index] for index in chosen], 2),
                )
            )
        return torch.cat(outputs, 2).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, -1) @ v
