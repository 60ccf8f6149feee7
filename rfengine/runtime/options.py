"""Resolve a RuntimeConfig for a device: each option, on or off, with the reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rfengine.config import RuntimeConfig


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
    return {
        "graphs": _switch(runtime.graphs, on_cuda, device),
        "overlap": _switch(runtime.overlap, on_cuda, device),
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
