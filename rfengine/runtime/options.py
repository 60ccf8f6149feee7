"""What a pipeline runs on: device, dtype, ops, and the options of a RuntimeConfig, each on or off with the
reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rfengine.config import DTypeName, EngineConfig, RuntimeConfig
from rfengine.grid import LatentGrid
from rfengine.ops import Ops, choose_ops
from rfengine.tensor_parallel import WHOLE, TensorParallel


@dataclass(frozen=True, slots=True)
class Switch:
    """Whether an option is on, and the reason in half a sentence."""

    on: bool
    reason: str


def runtime_switches(runtime: RuntimeConfig, device: torch.device) -> dict[str, Switch]:
    """graphs, overlap, autotune and decode_device (a device other than the model's), by name.

    Raises RuntimeError for an option that `device` does not support.
    """
    on_cuda = device.type == "cuda"
    if runtime.graphs and not on_cuda:
        raise RuntimeError(
            f"graphs are asked for on {device}; CUDA graphs need a CUDA device, leave them off"
        )
    decoding = decode_device(runtime, device)
    by_blocks = f"{runtime.block_buffers} blocks at a time come from host memory"
    graphs = Switch(False, by_blocks) if runtime.block_buffers else _switch(runtime.graphs, on_cuda, device)
    return {
        "graphs": graphs,
        "overlap": _overlap(runtime.overlap, device),
        "autotune": Switch(
            runtime.autotune and on_cuda,
            "switched off"
            if not runtime.autotune
            else f"the default on {device.type}"
            if on_cuda
            else f"backends are timed on CUDA only and this is {device.type}",
        ),
        "decode_device": Switch(
            decoding != device,
            f"asked for: {decoding}" if decoding != device else "the model's device decodes",
        ),
    }


def _overlap(asked: bool | None, device: torch.device) -> Switch:
    """On a CPU the decoder and the denoising each get a part of torch's threads."""
    threads = torch.get_num_threads()
    if asked is not None or device.type == "cuda":
        return _switch(asked, True, device)
    return Switch(threads > 1, f"the default on a CPU with {threads} thread{'s' * (threads > 1)}")


def _switch(asked: bool | None, default: bool, device: torch.device) -> Switch:
    if asked is None:
        return Switch(default, f"the default on {device.type}")
    return Switch(asked, "asked for" if asked else "switched off")


def decode_device(runtime: RuntimeConfig, device: torch.device) -> torch.device:
    """Where the decoder runs. Raises RuntimeError for another kind of device than the model's."""
    if runtime.decode_device is None:
        return device
    asked = torch.device(runtime.decode_device)
    if asked.type != device.type:
        raise RuntimeError(f"decode_device is {asked} and the model runs on {device}; use two of a kind")
    return asked


def present_device(name: str | torch.device | None) -> torch.device:
    """The device, with its index on CUDA; None is CUDA where there is one, else the CPU.

    Raises RuntimeError where there is no such device.
    """
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise RuntimeError(f"device is {device} but torch {torch.__version__} sees no CUDA device; use 'cpu'")
    count = torch.cuda.device_count()
    number = torch.cuda.current_device() if device.index is None else device.index
    if number >= count:
        raise RuntimeError(f"device is {device} but torch finds {count} CUDA devices; use one of them")
    return torch.device("cuda", number)


def tuned_ops(
    config: EngineConfig, dtype: torch.dtype, device: torch.device, parallel: TensorParallel = WHOLE
) -> Ops:
    """The model's ops of config.backend; for "auto", those that won where autotune is on, at the shapes of a
    rank."""
    requested = config.backend
    if not runtime_switches(config.runtime, device)["autotune"].on:
        return choose_ops(requested, device, dtype=dtype)
    from rfengine.tuning.autotune import tune
    from rfengine.tuning.candidates import TuningShapes, transformer_cases

    shapes = TuningShapes(config, LatentGrid.of(config), dtype, device, parallel)
    choice = tune(transformer_cases(shapes), device, requested=requested)
    return choose_ops(requested, device, choice.overrides, choice.folds_gate, dtype)


def model_dtype(
    runtime: RuntimeConfig, name: DTypeName | torch.dtype | None, device: torch.device
) -> torch.dtype:
    """dtype_of with the precision of `runtime`. Raises ValueError where the two contradict each other."""
    if runtime.precision != "bf16":
        return dtype_of(name, device)
    dtype = dtype_of(name or "bfloat16", device)
    if dtype != torch.bfloat16:
        raise ValueError(
            f"precision is 'bf16' and dtype is {str(dtype).removeprefix('torch.')}; give one of them"
        )
    return dtype


def dtype_of(name: DTypeName | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype of that name; where it is None, bfloat16 on CUDA and else float32. Raises ValueError for a
    name that is none of the engine's."""
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if isinstance(name, torch.dtype):
        return name
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ValueError(f"dtype is {name!r}; use {', '.join(known)}")
    return known[name]
