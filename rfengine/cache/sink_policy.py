"""What becomes of a chunk that leaves the window: dropped, or folded into the sink."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from rfengine.config import CacheConfig
from rfengine.ops import Ops


class SinkPolicy(Protocol):
    """Decides what the sink keeps. Tensors are [L, B, S, H, E], S the tokens of the sink, keys before
    rotation."""

    def evict(self, sink_keys: Tensor, sink_values: Tensor, keys: Tensor, values: Tensor) -> bool:
        """A chunk (keys, values) leaves the window; returns whether the sink was changed, in place."""

    def tensors(self) -> dict[str, Tensor]:
        """State beside the arenas, for snapshots."""


class NoSink:
    """The window slides and forgets."""

    def evict(self, sink_keys: Tensor, sink_values: Tensor, keys: Tensor, values: Tensor) -> bool:
        return False

    def tensors(self) -> dict[str, Tensor]:
        return {}


class FrozenSink(NoSink):
    """The first chunks stay as they were; a chunk that leaves the window is dropped (spec 2.6, 2.7)."""


class EMASink:
    """EMA-Sink of Reward Forcing: the leaving chunk is averaged into the sink, sink = alpha * sink + (1 -
    alpha) * chunk.

    With split precision a second tensor of the cache's dtype holds what rounding took away: in bf16 alone the
    sink stands still, since alpha = 0.999 times any bf16 value rounds back to it (spec 2.4).
    """

    def __init__(self, ops: Ops, alpha: float, low: tuple[Tensor, Tensor] | None) -> None:
        self.ops = ops
        self.alpha = alpha
        self.low = low

    def evict(self, sink_keys: Tensor, sink_values: Tensor, keys: Tensor, values: Tensor) -> bool:
        low_keys, low_values = self.low if self.low is not None else (None, None)
        self.ops.ema_evict(sink_keys, sink_values, low_keys, low_values, keys, values, self.alpha)
        return True

    def tensors(self) -> dict[str, Tensor]:
        if self.low is None:
            return {}
        return {"sink_low_keys": self.low[0], "sink_low_values": self.low[1]}


def build_sink_policy(config: CacheConfig, sink_arena: Tensor, ops: Ops) -> SinkPolicy:
    """The policy that `config` names; `sink_arena` [L, B, S, H, E] gives the shape, dtype and device of its
    state."""
    if config.sink == "none":
        return NoSink()
    if config.sink == "frozen":
        return FrozenSink()
    split = config.sink_precision == "split"
    return EMASink(
        ops, config.alpha, (torch.zeros_like(sink_arena), torch.zeros_like(sink_arena)) if split else None
    )
