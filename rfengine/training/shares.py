"""The share of a tensor that a rank holds, read alone from where the whole one is stored.

FSDP2 divides the rows of a parameter, its first axis, among the ranks of a group: ceil(rows / ranks) for each
as far as there are any, so that of a tensor of one row the first rank holds all.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from rfengine.checkpoint.tensor_file import StoredTensor


def own_rows(value: DTensor) -> tuple[int, int]:
    """The first row of this rank's share and the one after its last. Raises ValueError for a tensor that is
    not divided by its rows alone."""
    kinds = list(value.placements)
    if [kind for kind in kinds if not isinstance(kind, Replicate)] != [Shard(0)]:
        raise ValueError(f"a tensor is placed by {kinds}; divide it by its first axis alone")
    axis, rows = kinds.index(Shard(0)), value.shape[0]
    size = -(-rows // value.device_mesh.size(axis))
    start = min(value.device_mesh.get_local_rank(axis) * size, rows)
    return start, min(start + size, rows)


def is_first_replica(value: DTensor) -> bool:
    """Whether this rank is in the first of the groups that hold the same shares."""
    mesh = value.device_mesh
    return not any(
        mesh.get_local_rank(axis) for axis, kind in enumerate(value.placements) if isinstance(kind, Replicate)
    )


@torch.no_grad()
def put(value: Tensor, stored: StoredTensor) -> Tensor:
    """Fill `value` in place, cast to its dtype, and return what this rank has of it; of a sharded one only
    its own rows are read. Raises ValueError for another shape."""
    if tuple(value.shape) != stored.shape:
        raise ValueError(f"a tensor {tuple(value.shape)} is stored as {stored.shape}")
    if not isinstance(value, DTensor):
        return value.copy_(stored.read())
    (start, stop), own = own_rows(value), value.to_local()
    if start < stop:
        own.copy_(stored.part(0, start, stop).read())
    return own


@torch.no_grad()
def placed_like(value: Tensor, stored: StoredTensor) -> Tensor:
    """The stored tensor in its dtype: of the same shape as a sharded `value`, placed as that is, else whole
    on the CPU."""
    if not isinstance(value, DTensor) or tuple(value.shape) != stored.shape:
        return stored.read()
    own = torch.empty_like(value.to_local(), dtype=stored.dtype)
    placed = DTensor.from_local(
        own, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
    )
    put(placed, stored)
    return placed


def joined(parts: Sequence[StoredTensor]) -> StoredTensor:
    """The tensor whose rows are those of `parts`, one after another; its rows are read from those that have
    them."""
    if len(parts) == 1:
        return parts[0]
    *firsts, count = accumulate((part.shape[0] for part in parts), initial=0)

    def rows(start: int, stop: int) -> Tensor:
        pieces = []
        for first, part in zip(firsts, parts, strict=True):
            low, high = max(start - first, 0), min(stop - first, part.shape[0])
            if low < high:
                pieces.append(part.part(0, low, high).read())
        return torch.cat(pieces)

    return StoredTensor((count, *parts[0].shape[1:]), parts[0].dtype, lambda: rows(0, count), rows)
