"""Exponential moving average of weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of a module's parameters, in float32."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Blend the parameters in; early on the average follows faster, so that it forgets the start."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        values = module.state_dict()
        torch._foreach_lerp_(
            list(self.values.values()), [values[name].detach() for name in self.values], weight
        )

    def load(self, values: dict[str, Tensor]) -> None:
        self.values = {name: value.clone() for name, value in values.items()}

    @torch.no_grad()
    def follow(self, module: nn.Module) -> None:
        """Take the parameters as they are, before averaging begins."""
        for name, value in module.state_dict().items():
            self.values[name].copy_(value)
