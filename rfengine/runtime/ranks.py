"""The ranks of tensor parallelism at run time: how they meet, what they must agree on, and what the first one
alone has: the text encoder and the decoder.

All ranks run the same program, call by call. Frames are the first rank's; the chunks of the others have none.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from rfengine.runtime.options import tuned_ops
from rfengine.tensor_parallel import WHOLE, TensorParallel
from rfengine.torchrun import MOST_RANKS, environment_integer, started_ranks
from rfengine.version import VERSION


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
    return torch.device("cuda", environment_integer("LOCAL_RANK", 0, torch.cuda.device_count() - 1))


def join(count: int, device: torch.device) -> TensorParallel:
    """This process as one of the `count` ranks that torchrun started, NCCL between GPUs and gloo else.
    torch.distributed's default group is made where there is none yet; one rank needs none."""
    if count == 1:
        return WHOLE
    if not distributed.is_initialized():
        environment_integer("RANK", 0, count - 1)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            distributed.init_process_group("nccl", device_id=device)
        else:
            distributed.init_process_group("gloo")
    return TensorParallel(distributed.get_rank(), count)


def leave() -> None:
    """End torch.distributed's default group, if there is one."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def require_equal(parallel: TensorParallel, **values: Any) -> None:
    """Raises ValueError on every rank where one of `values`, each with a short form in words, is not the same
    on all; every rank must call it."""
    if not parallel.divides:
        return
    everywhere: list[dict[str, Any]] = [{}] * parallel.count
    distributed.all_gather_object(everywhere, values)
    for name, first in everywhere[0].items():
        for rank, others in enumerate(everywhere):
            if others.get(name) != first:
                raise ValueError(
                    f"the {name.replace('_', ' ')} of rank 0 is {shown(first)} and that of rank {rank} is "
                    f"{shown(others.get(name))}; all ranks need the same"
                )


def require_equal_models(
    parallel: TensorParallel,
    checkpoint: Checkpoint,
    config: EngineConfig,
    dtype: torch.dtype,
    left_out: Sequence[str],
    loras: Sequence[LoadedLora],
) -> None:
    """require_equal of all that a result depends on; nothing is loaded yet."""
    if parallel.divides:
        require_equal(
            parallel, version=(VERSION, torch.__version__), weights=checkpoint.fingerprint(),
            configuration=to_dict(config), dtype=str(dtype), products_left_out_of_FP8=sorted(left_out),
            LoRAs=sorted((each.sha256, each.lora.scale) for each in loras),
        )  # fmt: skip


def equal_ops(
    config: EngineConfig, dtype: torch.dtype, device: torch.device, parallel: TensorParallel
) -> Ops:
    """tuned_ops, on several ranks those of the first one: the residual streams would else drift apart by
    rounding."""
    if not parallel.divides:
        return tuned_ops(config, dtype, device)
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
        RuntimeError on all where the first one's encoder fails."""
        require_equal(self._parallel, prompt=prompts)
        states, has_failed = None, [self._encoder is not None]
        try:
            if self._encoder is not None:
                states = self._encoder.encode(prompts, self._device, dtype).contiguous()
                has_failed = [False]
        finally:
            distributed.broadcast_object_list(has_failed)
        if has_failed[0]:
            raise RuntimeError("the text encoder of rank 0 failed and no rank can go on; see its error")
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
