"""Data parallelism over the processes that torchrun starts, from outside the model: replicated, sharded by
FSDP2, or sharded inside groups of ranks that are replicas of one another (HSDP).

On a few CPU cores, processes of one thread each are faster than one process of several threads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from rfengine.models.dit import WanDiT
from rfengine.torchrun import MOST_RANKS, environment_integer, own_gpu, started_ranks
from rfengine.training.config import TIMEOUT_S, Parallelism
from rfengine.training.rank_store import check_devices, open_rank_store

_MOST_RESTARTS = 65536
_PATIENCE = timedelta(days=1)  # for files of one rank, which take minutes to hours

Value = TypeVar("Value")


class Ranks:
    """The processes of one training; one without torchrun.

    The first one that is constructed connects all ranks, so each rank has to construct it at the same place.
    A rank that waits for another ends after the timeout of the ranks, with `patient` after a day; in both
    cases at once where the other's connection breaks.
    """

    def __init__(self) -> None:
        grouped = distributed.is_initialized()
        self.rank = distributed.get_rank() if grouped else 0
        self.count = distributed.get_world_size() if grouped else 1
        self._patient = _patient_group(distributed.group.WORLD) if self.count > 1 else None

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
        tensor = torch.tensor(value, dtype=torch.float64, device="cpu")
        _average([tensor])
        return float(tensor)

    def agreed(self, reason: str, patient: bool = False) -> str:
        """The first rank's reason that is not empty, on every rank: all stop after the same step."""
        return next(filter(None, self.gathered(reason, patient)), "")

    def gathered(self, value: Value, patient: bool = False) -> list[Value]:
        """The value of every rank, by rank; it travels as a pickle."""
        values = [value] * self.count
        if self.count > 1:
            distributed.all_gather_object(values, value, self._patient if patient else None)
        return values

    def meet(self, patient: bool = False) -> None:
        """Wait until every rank is here."""
        self.gathered(None, patient)


@lru_cache(maxsize=1)
def _patient_group(_: ProcessGroup) -> ProcessGroup:
    """All ranks again. They connect when it is made, so that those who wait learn that one is gone."""
    return distributed.new_group(timeout=_PATIENCE, backend="gloo")


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


def ranks_of_a_node(count: int) -> int:
    """How many of `count` ranks torchrun has started on this node; all without it."""
    return environment_integer("LOCAL_WORLD_SIZE", 1, MOST_RANKS, str(count))


def restarts_from_environment() -> int:
    """How often torchrun has started the ranks of this node again; 0 without it."""
    return environment_integer("TORCHELASTIC_RESTART_COUNT", 0, _MOST_RESTARTS, "0")


@contextmanager
def ranks_from_environment(
    device: torch.device, timeout_s: int = TIMEOUT_S
) -> Iterator[tuple[Ranks, torch.device]]:
    """The ranks that torchrun started, and this one's device; one rank on `device` where it did not.

    NCCL joins CUDA devices, one for each rank of a machine, and gloo the CPU, what ranks tell one another
    included: it notices at once that a connection breaks. A rank that has waited for another for timeout_s
    seconds fails, and one whose connection to another breaks does at once, with RuntimeError; ValueError
    where some ranks have a GPU and others none. After an error the ranks are not parted in good order, which
    would wait for those that are gone: the process is to end.
    """
    if (count := started_ranks()) == 1:
        yield Ranks(), device
        return
    rank, timeout = environment_integer("RANK", 0, count - 1), timedelta(seconds=timeout_s)
    if device.type == "cuda":
        device = own_gpu()
        torch.cuda.set_device(device)
    try:
        _join(rank, count, timeout, device)
        yield Ranks(), device
    except RuntimeError as error:
        if _tells_of_another(error):
            raise RuntimeError(
                f"rank {rank} of {count} has lost another rank, whose output says why ({_sentence(error)}); "
                "start all again to go on from the last checkpoint"
            ) from error
        raise
    distributed.destroy_process_group()


def _tells_of_another(error: RuntimeError) -> bool:
    return isinstance(error, distributed.DistError) or "gloo/transport" in str(error)


def _sentence(error: RuntimeError) -> str:
    """The first sentence of an error of gloo or NCCL, without the place in their sources."""
    return re.sub(r"^\[\S*\] ", "", str(error)).partition(". ")[0].partition("\n")[0]


def _join(rank: int, count: int, timeout: timedelta, device: torch.device) -> None:
    store, on_cuda = open_rank_store(rank, count, timeout), device.type == "cuda"
    check_devices(store, rank, count, device.type)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        store=store, rank=rank, world_size=count, timeout=timeout, device_id=device if on_cuda else None,
    )  # fmt: skip


def group_size(parallel: Parallelism, shard_ranks: int | None, count: int) -> int:
    """How many of `count` ranks hold one copy of the weights together.

    shard_ranks: of "hybrid"; None for the ranks of a node, as torchrun counts them. Raises ValueError where
    the ranks are no whole number of such groups.
    """
    if parallel != "hybrid":
        return count if parallel == "sharded" else 1
    size = shard_ranks or ranks_of_a_node(count)
    if count % size:
        raise ValueError(
            f"{count} rank(s) cannot be divided into groups of {size} that share the weights; start a "
            f"multiple of {size} ranks, or give --shard-ranks a divisor of {count}"
        )
    return size


def sharding_mesh(device_type: str, size: int, timeout_s: int = TIMEOUT_S) -> DeviceMesh:
    """The mesh of all ranks in groups of `size` that follow one another: one group, or several that are
    replicas; every rank has to call it, once for all models, since it makes process groups."""
    count = distributed.get_world_size()
    if size == count:
        return init_device_mesh(device_type, (count,), mesh_dim_names=("shard",))
    numbers = torch.arange(count, device="cpu").view(-1, size)
    timeout = timedelta(seconds=timeout_s)  # init_device_mesh has no such option, and waits half an hour
    replicas, _ = distributed.new_subgroups_by_enumeration(numbers.T.tolist(), timeout=timeout)
    shares, _ = distributed.new_subgroups_by_enumeration(numbers.tolist(), timeout=timeout)
    return DeviceMesh.from_group(
        [replicas, shares], device_type, mesh=numbers, mesh_dim_names=("replicate", "shard")
    )


def shard(
    model: WanDiT, mesh: DeviceMesh, compute_dtype: torch.dtype | None = None, offload: bool = False
) -> None:
    """Give every rank of a group of `mesh` a share of each parameter, gathered when a block runs (FSDP2); in
    place.

    compute_dtype: what gathered weights are cast to; gradients are reduced in float32, and averaged over the
    replicas as well. offload: shares stay on the CPU until they are gathered. A model on the CPU goes to its
    device block by block; one on the meta device stays there, for sharded_weights.py.

    The products of a block are gathered in three groups, each of which always runs whole: a context pass ends
    with the keys and values of the last block, and those of the text run once for a prompt. What other
    methods of the model read, the modulation tables and the norms, goes with the root.
    """
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
