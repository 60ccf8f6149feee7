"""The transformer of a checkpoint with its weights where a RuntimeConfig wants them and in what form."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.config import EngineConfig, RuntimeConfig
from rfengine.costs.placed_weights import BLOCK_STAYS
from rfengine.models.block_offload import BlockOffload
from rfengine.models.dit import WanDiT, pack_weights
from rfengine.models.int8_products import is_in_int8, transformer_in_int8
from rfengine.ops import Ops
from rfengine.tensor_parallel import WHOLE, TensorParallel

_WAY = "merge them for good by `rfengine convert --lora`"


def load_transformer(
    checkpoint: Checkpoint,
    config: EngineConfig,
    ops: Ops,
    dtype: torch.dtype,
    device: torch.device,
    parallel: TensorParallel = WHOLE,
) -> WanDiT:
    """The transformer of a rank on `device`, packed, its blocks' weights in host memory and in int8 where
    config.runtime says so; neither is ever on the device in another form. Raises as Checkpoint.load does."""
    runtime = config.runtime

    def build() -> WanDiT:
        model = WanDiT(config.model, ops, parallel)
        return transformer_in_int8(model) if runtime.block_weights == "int8" else model

    first = torch.device("cpu") if runtime.block_buffers else device
    model = checkpoint.load(build, "transformer", dtype, first, parallel).eval()
    pack_weights(model)
    if runtime.block_buffers:
        model.offload = BlockOffload(model.blocks, device, runtime.block_buffers, BLOCK_STAYS)
        bring_others(model, device)
    return model


def bring_others(model: nn.Module, device: torch.device) -> None:
    """Move to `device` what is not in host memory for good, in place."""
    for name, parameter in model.named_parameters():
        if not name.startswith("blocks.") or name.endswith(BLOCK_STAYS):
            parameter.data = parameter.data.to(device)


def require_weights(runtime: RuntimeConfig, model: WanDiT) -> None:
    """Raises ValueError unless the weights of a loaded `model` are where `runtime` asks and in that form, and
    for a preset that is still to be chosen."""
    if runtime.preset == "auto":
        raise ValueError("preset is 'auto', which from_pretrained chooses; load the models by it")
    for name, asked, found in (
        ("block_weights", runtime.block_weights == "int8", is_in_int8(model)),
        ("block_buffers", bool(runtime.block_buffers), model.offload is not None),
    ):
        if asked != found:
            value = getattr(runtime, name)
            raise ValueError(
                f"{name} is {value!r} and the model was loaded otherwise; load it by from_pretrained under "
                "this runtime"
            )


def refuse_loras(runtime: RuntimeConfig, loras: Collection[object]) -> None:
    """Raises ValueError where LoRAs cannot be merged into the weights as `runtime` has them."""
    if not loras:
        return
    if runtime.block_weights == "int8":
        raise ValueError(
            f"{len(loras)} LoRAs are given and the weights of the blocks are int8, which hold no small "
            f"change; {_WAY}"
        )
    if runtime.block_buffers:
        raise ValueError(
            f"{len(loras)} LoRAs are given and the weights of the blocks are in host memory; {_WAY}"
        )
