"""Less memory for more time, from outside the model: blocks computed twice, and a model that lives on the
CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rfengine.models.dit import WanDiT


def recompute_blocks(model: WanDiT) -> None:
    """Keep only the input of every block in forward, and compute the block once more in backward; in
    place."""
    for block in model.blocks:
        block.forward = _recomputed(block.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments)
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False)

    return run


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Have a frozen model on `device` inside the block; where it was before, its weights stay as they are.

    A sharded model is left alone: FSDP brings what it needs.
    """
    from torch.distributed.tensor import DTensor  # it takes a second, and only training needs it

    parameters = list(model.parameters())
    homes = [parameter.data for parameter in parameters]
    if all(isinstance(home, DTensor) or home.device == device for home in homes):
        yield
        return
    for parameter, home in zip(parameters, homes, strict=True):
        parameter.data = home.to(device, non_blocking=True)
    try:
        yield
    finally:
        for parameter, home in zip(parameters, homes, strict=True):
            parameter.data = home
