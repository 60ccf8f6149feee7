"""Data parallelism over the processes that torchrun starts, from outside the model: replicated, or sharded by
FSDP2.

On a few CPU cores, processes of one thread each are faster than one process of several threads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from rfengine.limits import shown
from rfengine.models.dit import WanDiT

_MOST_RANKS = 65536


class Ranks:
    """The processes of one training; one without torchrun."""

    def __init__(self) -> None:
        grouped = distributed.is_initialized()
        self.rank = distributed.get_rank() if grouped else 0
        self.count = distributed.get_world_size() if grouped else 1

    def passes(self, accumulation: int) -> range:
        """The passes of a step, counted over all ranks, that this rank makes. Raises ValueError for a count
        that the ranks cannot share out evenly."""
        if accumulation % self.count:
            raise ValueError(
                f"accumulation is {accumulation} for {self.count} ranks; give a multiple of the ranks, or "
                "use fewer"
            )
        return range(self.rank, accumulation, self.count)

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace replicated gradients by their mean over the ranks; sharded ones are averaged already."""
        gradients = [value.grad for value in parameters if not isinstance(value.grad, DTensor)]
        if self.count > 1 and gradients:
            _average(gradients)

    def mean(self, value: float) -> float:
        """The mean of a number over the ranks."""
        if self.count == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=_group_device())
        _average([tensor])
        return float(tensor)

    def agreed(self, reason: str) -> str:
        """The first rank's reason that is not empty, on every rank: all stop after the same step."""
        if self.count == 1:
            return reason
        reasons: list[str] = [""] * self.count
        distributed.all_gather_object(reasons, reason)
        return next(filter(None, reasons), "")

    def meet(self) -> None:
        """Wait until every rank is here."""
        if self.count > 1:
            distributed.barrier()


@torch.no_grad()
def _average(tensors: Sequence[Tensor]) -> None:
    """Replace every tensor by its mean over the ranks, in place."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def full_tensors(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors of shards, on every rank, which all have to call it; whole ones as they are."""
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in values.items()
    }


@contextmanager
def ranks_from_environment(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """The ranks that torchrun started, and this one's device; one rank on `device` where it did not.

    NCCL joins CUDA devices, one for each rank of a machine, and gloo the CPU.
    """
    if (count := _environment_integer("WORLD_SIZE", 1, _MOST_RANKS, "1")) == 1:
        yield Ranks(), device
        return
    _environment_integer("RANK", 0, count - 1)
    if device.type == "cuda":
        local = _environment_integer("LOCAL_RANK", 0, torch.cuda.device_count() - 1)
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        distributed.init_process_group("nccl", device_id=device)
    else:
        distributed.init_process_group("gloo")
    try:
        yield Ranks(), device
    finally:
        distributed.destroy_process_group()


def _environment_integer(name: str, low: int, high: int, default: str = "") -> int:
    text = os.environ.get(name, default)
    number = int(text) if re.fullmatch("[0-9]{1,9}", text) else -1
    if not low <= number <= high:
        raise ValueError(
            f"the environment variable {name} is {shown(text)}; torchrun sets it, here from {low} to {high}: "
            "start the ranks with it"
        )
    return number


def shard(
    model: WanDiT, device_type: str, compute_dtype: torch.dtype | None = None, offload: bool = False
) -> None:
    """Give every rank a share of each parameter on its device, gathered when a block runs (FSDP2); in place.

    compute_dtype: what gathered weights are cast to; gradients are reduced in float32. offload: shares stay
    on the CPU until they are gathered. A model on the CPU goes to its device block by block.

    The products of a block are gathered in three groups, each of which always runs whole: a context pass ends
    with the keys and values of the last block, and those of the text run once for a prompt. What other
    methods of the model read, the modulation tables and the norms, goes with the root.
    """
    mesh = init_device_mesh(device_type, (distributed.get_world_size(),))
    offloading = CPUOffloadPolicy() if offload else OffloadPolicy()
    policy = MixedPrecisionPolicy()
    if compute_dtype is not None:
        policy = MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for block in model.blocks:
        attention, text = block.self_attn, block.cross_attn
        products = [attention.q, attention.o, text.q, text.o, block.ffn[0], block.ffn[2]]
        for group in (products, [attention.k, attention.v], [text.k, text.v]):
            fully_shard(group, mesh=mesh, mp_policy=policy, offload_policy=offloading)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offloading, reshard_after_forward=False)
    for method in ("forward_chunk", "context_pass", "forward_clip", "text_keys_values", "modulation"):
        register_fsdp_forward_method(model, method)


def _group_device() -> torch.device:
    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")
