"""What the device does when frames leave: averages, new rotary phases, and a choice by score."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rfengine.cache.sink_policy import EMPTY, Fold
from rfengine.config import CacheConfig
from rfengine.ops import Ops
from rfengine.tensor_parallel import WHOLE, TensorParallel


class Evictor:
    """Averages leaving frames into sink or memory and gives every key its new phase, in place.

    Arenas are [L, B, S, H, E], of the resident slots. low: what rounding took from the averages, for keys and
    for values, [L, B, tokens of sink or memory, H, E]: in bf16 alone an average stands still, since alpha =
    0.999 times any bf16 value rounds back to it. None where nothing is averaged, and for the published
    arithmetic.
    """

    def __init__(self, config: CacheConfig, frame_tokens: int, arena: Tensor, ops: Ops) -> None:
        self.config, self.frame_tokens, self.ops = config, frame_tokens, ops
        frames = config.sink_frames if config.sink == "ema" else len(config.memory_rates)
        averages = arena[:, :, : frames * frame_tokens]
        split = frames and config.sink_precision == "split"
        self.low = (torch.zeros_like(averages), torch.zeros_like(averages)) if split else None

    def evict(
        self, raw: Tensor | None, rotated: Tensor, values: Tensor, rotation: Tensor, folds: tuple[Fold, ...]
    ) -> None:
        """raw: keys before rotation, or None where positions are absolute and no phase ever changes.
        rotation: [2, S, E / 2]."""
        if raw is None:
            return
        low_keys, low_values = self.low if self.low is not None else (None, None)
        tokens, sink = self.frame_tokens, self.config.sink_frames
        if is_fused(self.config, folds):
            self.ops.evict_and_rephase(
                raw, rotated, values, low_keys, low_values, rotation, sink * tokens,
                folds[0].source * tokens, folds[0].keep,
            )  # fmt: skip
            return
        for fold in folds:
            target = slice(fold.target * tokens, (fold.target + fold.count) * tokens)
            source = slice(fold.source * tokens, (fold.source + fold.count) * tokens)
            low = (None if part is None else part[:, :, target] for part in (low_keys, low_values))
            self.ops.ema_evict(
                raw[:, :, target], values[:, :, target], *low, raw[:, :, source], values[:, :, source],
                fold.keep,
            )  # fmt: skip
        self.ops.rephase_keys(raw, rotated, rotation)

    def tensors(self) -> dict[str, Tensor]:
        """State beside the arenas, for snapshots."""
        return {} if self.low is None else {"sink_low_keys": self.low[0], "sink_low_values": self.low[1]}


def is_fused(config: CacheConfig, folds: Sequence[Fold]) -> bool:
    """Whether averages and phases are one op, which takes a whole sink from frames that follow each other."""
    return config.sink == "ema" and len(folds) == 1 and folds[0].count == config.sink_frames


def least_similar(
    raw: Tensor, held: Tensor, config: CacheConfig, count: int, parallel: TensorParallel = WHOLE
) -> Tensor:
    """The slots, rising, of the `count` frames whose keys are least like those of the last chunk.

    An example of eviction by a score, in the manner of the compression by participation of Deep Forcing: what
    the present does not resemble leaves. The score is the cosine of the mean keys of two frames, averaged
    over layers and heads. raw: keys before rotation [L, B, S, H, E]; held: int64 [S / frame_tokens], the
    number of the frame in every slot, or EMPTY; parallel: the ranks that have the other heads. The sink and
    the last chunk never leave. Returns int64 [count], on the device.
    """
    means = raw.unflatten(2, (held.shape[0], -1)).mean(3, dtype=torch.float32)
    newest = held.topk(config.chunk_frames).indices
    present = means.index_select(2, newest).mean(2, keepdim=True)
    score = parallel.added(F.cosine_similarity(means, present, dim=-1).mean((0, 1, 3)))
    score[: config.sink_frames] = torch.inf
    score.index_fill_(0, newest, torch.inf).masked_fill_(held == EMPTY, torch.inf)
    return score.topk(count, largest=False).indices.sort().values
