"""TensorParallel: one of several ranks that hold one transformer together, as in Megatron-LM (arXiv
1909.08053).

Every rank has an equal run of the heads, and of the columns of the feed-forward part: the rows of the weights
that make them (q, k, v, ffn.0), the columns of those that read them (o, ffn.2), and the keys and values of
its heads. All else, and the residual stream, is on every rank. A block adds up three results of [B, T, D]
over the ranks, after o of the attention, o of the cross-attention and ffn.2. The RMS norms of Wan2.1 go over
all heads, so the mean squares of q and k, two numbers a token, and of the cross-attention's q, one, are added
up as well.

torch.distributed.tensor.parallel would do the same with parameters that are DTensors, which Triton's kernels,
weights that lie next to each other and weights in FP8 are not; so the sums are plain collectives, which CUDA
graphs record.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rfengine.config import WanConfig


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """Rank `rank` of the `count` of torch.distributed's default group; of one, nothing is divided."""

    rank: int = 0
    count: int = 1

    @property
    def divides(self) -> bool:
        return self.count > 1

    def own(self, config: WanConfig) -> WanConfig:
        """`config` with the heads and columns of one rank, and the width of its heads. Raises ValueError
        where the ranks cannot share them out evenly."""
        if not self.divides:
            return config
        for what, number in (("heads", config.num_heads), ("feed-forward columns", config.ffn_dim)):
            if number % self.count:
                even = [str(count) for count in range(1, config.num_heads + 1) if _divides(config, count)]
                raise ValueError(
                    f"{self.count} ranks cannot share {number} {what} evenly; start {' or '.join(even)}"
                )
        heads, columns = config.num_heads // self.count, config.ffn_dim // self.count
        return replace(config, dim=heads * config.head_dim, num_heads=heads, ffn_dim=columns)

    def span(self, whole: int) -> tuple[int, int]:
        """First and end of this rank's run of `whole` entries."""
        size = whole // self.count
        return self.rank * size, (self.rank + 1) * size

    def added(self, x: Tensor) -> Tensor:
        """x with what the other ranks have there added to it, in place; it has the same bits on all. Raises
        RuntimeError where another rank has ended."""
        if self.divides:
            with naming_lost_ranks():
                torch.distributed.all_reduce(x)
        return x

    def mean_squares(self, *rows: Tensor) -> Tensor | None:
        """mean(x^2) over the whole rows [B, T, D] of which each of `rows` is this rank's part: float32 [len,
        B, T], or [B, T] for one; None where rows are whole."""
        if not self.divides:
            return None
        norms = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) for x in rows]
        squares = (torch.stack(norms) if len(norms) > 1 else norms[0]).square_()
        return self.added(squares).div_(rows[0].shape[-1] * self.count)


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Says first what an error of torch.distributed means."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"another rank has ended or made another call; see what it says, and start all again ({error})"
        ) from error


def _divides(config: WanConfig, count: int) -> bool:
    return not (config.num_heads % count or config.ffn_dim % count)


WHOLE = TensorParallel()
