"""The ranks of tensor parallelism at run time: how they meet, what they must agree on, and what the first one
alone has: the text encoder and the decoder.

All ranks run the same program, call by call. Frames are the first rank's; the chunks of the others have none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os.path import commonprefix
from typing import Any, Protocol, SupportsIndex

import torch
import torch.distributed as distributed
from torch import Tensor

from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.checkpoint.lora import LoadedLora
from rfengine.config import EngineConfig
from rfengine.config_json import to_dict
from rfengine.grid import LatentGrid
from rfengine.limits import Range, as_integer, shown
from rfengine.models.decoder import CausalState
from rfengine.ops import Ops, choose_ops
from rfengine.runtime.options import runtime_switches, tuned_ops
from rfengine.tensor_parallel import WHOLE, TensorParallel, naming_lost_ranks
from rfengine.torchrun import MOST_RANKS, environment_integer, own_gpu, started_ranks
from rfengine.version import VERSION

_SHOWN_BEFORE = 20  # characters that two texts have alike, before what differs


def require_divisible(count: SupportsIndex, config: EngineConfig) -> int:
    """`count` as the number of ranks. Raises ValueError where they cannot share the model of `config` or run
    under its preset."""
    number = as_integer("tensor_parallel", count, Range(1, MOST_RANKS))
    TensorParallel(0, number).own(config.model)
    if number > 1 and config.runtime.preset == "auto":
        raise ValueError(
            f"preset is 'auto' for {number} ranks, each of which could choose another; name one, or none"
        )
    return number


def rank_device(device: str | torch.device | None, count: int) -> torch.device | str | None:
    """The device of this process beside those of the others: the GPU of its own number on its machine.

    Raises ValueError unless torchrun started `count` processes, and for a GPU that is named by its number.
    """
    if count == 1:
        return device
    started = distributed.get_world_size() if distributed.is_initialized() else started_ranks()
    if started != count:
        raise ValueError(
            f"tensor_parallel is {count} and {started} {'process is' if started == 1 else 'processes are'} "
            f"started; run `torchrun --nproc-per-node {count} ...`"
        )
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if kind.type != "cuda" or not torch.cuda.is_available():
        return device
    if kind.index is not None:
        raise ValueError(
            f"device is {kind} and every rank has a GPU of its own; give 'cuda', and choose GPUs by "
            "CUDA_VISIBLE_DEVICES"
        )
    return own_gpu()


def join(count: int, device: torch.device) -> TensorParallel:
    """This process as one of the `count` ranks that torchrun started; one rank needs none of this.

    torch.distributed's default group is made where there is none yet: NCCL between GPUs; gloo between CPUs
    and for what ranks tell each other, which then waits for no GPU and does not depend on which one is
    current in a thread.
    """
    if count == 1:
        return WHOLE
    if not distributed.is_initialized():
        environment_integer("RANK", 0, count - 1)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            distributed.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
        else:
            distributed.init_process_group("gloo")
    return TensorParallel(distributed.get_rank(), count)


def leave() -> None:
    """End torch.distributed's default group, if there is one."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def on_all(parallel: TensorParallel) -> Iterator[dict[str, Any]]:
    """A block that may fail on one rank alone: what it raises is then raised on every rank, ValueError as
    that and all else as RuntimeError, so that no rank waits for one that has gone another way.

    Every rank must come to it, and nothing inside may wait for another rank. What the block puts into the
    dictionary, JSON values by what errors call them, is to be the same on all: else ValueError on every rank.
    """
    equal: dict[str, Any] = {}
    if not parallel.divides:
        yield equal
        return
    failure: Exception | None = None
    try:
        yield equal
    except Exception as error:  # noqa: BLE001  # of any kind: it is raised again
        failure = error
    try:
        told = None if failure is None else (isinstance(failure, ValueError), str(failure))
        everywhere = _from_all(parallel, (told, equal))
    finally:  # what has failed here says more than that a rank is lost
        try:
            if failure is not None:
                raise failure
        finally:
            del failure  # its traceback holds this frame: a circle
    for rank, (told, _) in enumerate(everywhere):
        if told is not None:
            raise (ValueError if told[0] else RuntimeError)(f"rank {rank} cannot go on: {told[1]}")
    _require_equal([given for _, given in everywhere])


def _from_all(parallel: TensorParallel, own: Any) -> list[Any]:
    """`own` of every rank."""
    everywhere: list[Any] = [None] * parallel.count
    with naming_lost_ranks():
        distributed.all_gather_object(everywhere, own)
    return everywhere


def _require_equal(everywhere: Sequence[dict[str, Any]]) -> None:
    first = everywhere[0]
    for rank, others in enumerate(everywhere):
        for name in first | others:
            if first.get(name) != others.get(name):
                whose, one, other = _difference(name, first.get(name), others.get(name))
                raise ValueError(
                    f"the {whose} of rank 0 is {shown(one)} and that of rank {rank} is {shown(other)}; all "
                    "ranks need the same"
                )


def _difference(name: str, one: Any, other: Any) -> tuple[str, Any, Any]:
    """The innermost entry that differs: its name, and both values, of two texts from shortly before that."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [key for key in one | other if one.get(key) != other.get(key)]
        return _difference(f"{name}, {keys[0]}", one.get(keys[0]), other.get(keys[0]))
    if isinstance(one, str) and isinstance(other, str):
        start = max(0, len(commonprefix([one, other])) - _SHOWN_BEFORE)
        return name, one[start:], other[start:]
    return name, one, other


def must_be_equal(
    checkpoint: Checkpoint,
    config: EngineConfig,
    dtype: torch.dtype,
    device: torch.device,
    left_out: Sequence[str],
    loras: Sequence[LoadedLora],
) -> dict[str, Any]:
    """All that a result and the order of the sums depend on, for on_all; nothing is loaded yet."""
    switches = runtime_switches(config.runtime, device)
    return {
        "version of rfengine and of torch": (VERSION, torch.__version__),
        "weights": checkpoint.fingerprint(),
        "configuration": to_dict(config),
        "dtype": str(dtype),
        "overlap": switches["overlap"].on,
        "products left out of FP8": sorted(left_out),
        "LoRAs": equal_loras(loras),
    }


def equal_loras(loras: Sequence[LoadedLora]) -> list[str]:
    """LoRAs as on_all compares them; their order changes nothing."""
    return sorted(f"{each.sha256[:16]} at {each.lora.scale!r}" for each in loras)


def equal_ops(
    config: EngineConfig, dtype: torch.dtype, device: torch.device, parallel: TensorParallel
) -> Ops:
    """tuned_ops, on several ranks those of the first one: the residual streams would else drift apart by
    rounding."""
    if not parallel.divides:
        return tuned_ops(config, dtype, device)
    with on_all(parallel):
        choice = [None if parallel.rank else tuned_ops(config, dtype, device, parallel).choice]
    distributed.broadcast_object_list(choice)
    return choose_ops(config.backend, device, choice[0])


class _Encoder(Protocol):
    def encode(
        self, prompts: list[str], device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Tensor: ...


class FirstRankText:
    """Takes the place of a text encoder: the first rank's encodes, and every rank gets the states.

    encoder: the first rank's; None on the others. shape: of one prompt, (text_len, text_dim).
    """

    def __init__(
        self, encoder: _Encoder | None, parallel: TensorParallel, shape: tuple[int, int], device: torch.device
    ) -> None:
        self._encoder, self._parallel, self._shape, self._device = encoder, parallel, shape, device

    def encode(
        self, prompts: list[str], device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """States [len(prompts), text_len, text_dim]. Raises ValueError where the ranks have other prompts,
        and on all of them what the first one's encoder raises."""
        states = None
        with on_all(self._parallel) as equal:
            equal["prompt"] = prompts
            if self._encoder is not None:
                states = self._encoder.encode(prompts, self._device, dtype).contiguous()
        if states is None:
            states = torch.empty((len(prompts), *self._shape), dtype=dtype, device=self._device)
        distributed.broadcast(states, 0)
        return states.to(device)


class NoFrames:
    """A decoder that makes no frames, of the ranks beside the first."""

    def __init__(self, grid: LatentGrid) -> None:
        self._size = grid.height, grid.width

    def decoder_state(
        self, batch: int, height: int, width: int, dtype: torch.dtype, device: torch.device | str
    ) -> CausalState:
        """A state without tensors, which counts latent frames."""
        return CausalState({})

    def decode(self, latents: Tensor, state: CausalState) -> Tensor:
        """No pixels: [B, 3, 0, H, W]."""
        state.frames += latents.shape[2]
        return latents.new_empty(latents.shape[0], 3, 0, *self._size)

    def decode_frames(self, latents: Tensor, state: CausalState) -> Tensor:
        """No frames: uint8 [0, H, W, 3]."""
        state.frames += latents.shape[2]
        return torch.empty((0, *self._size, 3), dtype=torch.uint8, device=latents.device)
