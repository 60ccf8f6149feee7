"""Rotary position tables."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(head_dim: int, time_indices: Tensor, rows: int, columns: int) -> Tensor:
    """Cosines and sines of every token of the given latent frames: [2, F * rows * columns, head_dim / 2],
    float32.

    time_indices: integers [F], of any size: no table ends. Pairs are ordered time, row, column; an axis of n
    dimensions has the frequencies 10000^(-2i / n). Computed in float64.
    """
    side = 2 * (head_dim // 6)
    axes = (head_dim - 2 * side, side, side)
    device = time_indices.device
    positions = torch.meshgrid(
        time_indices.double(),
        torch.arange(rows, dtype=torch.float64, device=device),
        torch.arange(columns, dtype=torch.float64, device=device),
        indexing="ij",
    )
    angles = torch.cat(
        [axis.reshape(-1, 1) * _frequencies(dim, device) for axis, dim in zip(positions, axes, strict=True)],
        dim=-1,
    )
    return torch.stack((angles.cos(), angles.sin())).float()


def _frequencies(dim: int, device: torch.device) -> Tensor:
    return 10000.0 ** (-2 * torch.arange(dim // 2, dtype=torch.float64, device=device) / dim)
