"""Muon: momentum whose matrix updates are made orthogonal by Newton-Schulz iterations."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rfengine.training.arithmetic import fast_precision

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic that drives every singular value into about 0.7 to 1.2
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """For the matrices inside the blocks; everything else wants AdamW. Matrices of one shape are updated
    together; the weight of a convolution is the matrix [C_out, C_in * kernel]."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient, in place."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group)

    def _update(self, parameters: list[nn.Parameter], group: dict) -> None:
        directions = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
            directions.append(parameter.grad.lerp(state["momentum"], group["momentum"]))
        stacked = torch.stack(directions)
        updates = orthogonalise(stacked.flatten(2)).view_as(stacked)
        scale = max(1.0, parameters[0].shape[0] / parameters[0].shape[1]) ** 0.5
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Matrices [N, rows, columns] with their singular values brought near 1, float32; the iteration is in
    bfloat16 where the device multiplies in it."""
    a, b, c = _COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if fast_precision(x.device) == "bfloat16":
        x = x.bfloat16()
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).float()
