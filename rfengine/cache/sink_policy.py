"""Which chunk leaves the window, and what becomes of it: dropped, or folded into the sink."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rfengine.config import CacheConfig
from rfengine.ops import Ops


class SinkPolicy:
    """The oldest chunk outside the sink leaves and is dropped; the sink, where there is one, stays as it was.

    A frozen sink is that of Self-Forcing and LongLive. Without a sink the window slides and forgets. Arenas
    are [L, B, S, H, E], all slots filled, the sink first.
    """

    def __init__(self, ops: Ops, sink_chunks: int) -> None:
        self.ops = ops
        self.sink_chunks = sink_chunks

    def leaving(self, slot_chunks: Sequence[int]) -> int:
        """The slot that the next chunk is written to, once every slot holds one of `slot_chunks`."""
        window = range(self.sink_chunks, len(slot_chunks))
        return min(window, key=lambda slot: slot_chunks[slot])

    def evict(
        self, raw: Tensor | None, rotated: Tensor, values: Tensor, rotation: Tensor, leaving: int
    ) -> None:
        """The chunk at token `leaving` leaves the window and every key gets its new phase; arenas change in
        place.

        raw: keys before rotation, or None where positions are absolute and no phase ever changes.
        rotation: [2, S, E / 2].
        """
        if raw is not None:
            self.ops.rephase_keys(raw, rotated, rotation)

    def tensors(self) -> dict[str, Tensor]:
        """State beside the arenas, for snapshots."""
        return {}


class EMASink(SinkPolicy):
    """EMA-Sink of Reward Forcing (arXiv 2512.04678): the leaving chunk is averaged into the sink,
    sink = alpha * sink + (1 - alpha) * chunk.

    With split precision a second tensor of the cache's dtype holds what rounding took away: in bf16 alone the
    sink stands still, since alpha = 0.999 times any bf16 value rounds back to it.
    low: that tensor for keys and for values, [L, B, sink tokens, H, E] each, or None for the published
    arithmetic.
    """

    def __init__(
        self,
        ops: Ops,
        sink_chunks: int,
        alpha: float,
        sink_tokens: int,
        low: tuple[Tensor, Tensor] | None,
    ) -> None:
        super().__init__(ops, sink_chunks)
        self.alpha = alpha
        self.sink_tokens = sink_tokens
        self.low = low

    def evict(
        self, raw: Tensor | None, rotated: Tensor, values: Tensor, rotation: Tensor, leaving: int
    ) -> None:
        low_keys, low_values = self.low if self.low is not None else (None, None)
        self.ops.evict_and_rephase(
            raw, rotated, values, low_keys, low_values, rotation, self.sink_tokens, leaving, self.alpha
        )

    def tensors(self) -> dict[str, Tensor]:
        if self.low is None:
            return {}
        return {"sink_low_keys": self.low[0], "sink_low_values": self.low[1]}


def build_sink_policy(config: CacheConfig, sink_arena: Tensor, ops: Ops) -> SinkPolicy:
    """The policy that `config` names; `sink_arena` [L, B, S, H, E] has the shape, dtype and device of its
    state."""
    if config.sink != "ema":
        return SinkPolicy(ops, config.sink_chunks)
    split = config.sink_precision == "split"
    low = (torch.zeros_like(sink_arena), torch.zeros_like(sink_arena)) if split else None
    return EMASink(ops, config.sink_chunks, config.alpha, sink_arena.shape[2], low)
