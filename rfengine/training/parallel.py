"""Data parallelism over processes of one machine: one thread each is faster on a few cores than threads in
one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def run_workers(function: Callable[..., None], workers: int, *arguments: Any) -> None:
    """Call `function(rank, *arguments)` in `workers` processes and wait; with one worker, in this process."""
    if workers < 1:
        raise ValueError(f"workers is {workers}; use at least one")
    if workers == 1:
        function(0, *arguments)
        return
    with tempfile.TemporaryDirectory() as directory:
        meeting = (Path(directory) / "meeting").as_uri()
        torch.multiprocessing.spawn(_start, (function, workers, meeting, arguments), nprocs=workers)


def _start(
    rank: int, function: Callable[..., None], workers: int, meeting: str, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=workers)
    function(rank, *arguments)
    distributed.destroy_process_group()


@torch.no_grad()
def average_over_workers(tensors: Iterable[Tensor]) -> None:
    """Replace every tensor by its mean over all workers, in place; alone there is nothing to do."""
    if not distributed.is_initialized():
        return
    tensors = list(tensors)
    if not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


class Ranks:
    """The processes of one training, as torchrun or run_workers started them; one where nobody did."""

    def __init__(self) -> None:
        grouped = distributed.is_initialized()
        self.rank = distributed.get_rank() if grouped else 0
        self.count = distributed.get_world_size() if grouped else 1

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace replicated gradients by their mean over the ranks; sharded ones are averaged already."""
        average_over_workers(value.grad for value in parameters if not isinstance(value.grad, DTensor))

    def mean(self, value: float) -> float:
        """The mean of a number over the ranks."""
        tensor = torch.tensor(value, dtype=torch.float64)
        average_over_workers([tensor])
        return float(tensor)

    def full(self, value: Tensor) -> float:
        """A norm as a number, of all shards together."""
        return float(value.full_tensor() if isinstance(value, DTensor) else value)

    def agreed(self, reason: str) -> str:
        """The first rank's reason that is not empty, on every rank: all stop after the same step."""
        if self.count == 1:
            return reason
        reasons: list[str] = [""] * self.count
        distributed.all_gather_object(reasons, reason)
        return next(filter(None, reasons), "")
