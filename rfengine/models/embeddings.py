"""Sinusoids of the timestep, and patches."""

from __future__ import annotations

import torch
from torch import Tensor


def timestep_sinusoid(timesteps: Tensor, dim: int) -> Tensor:
    """[..., dim]: cosines first, then sines, of timestep * 10000^(-k / (dim / 2)); float64."""
    half = dim // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timesteps.device) / half)
    angles = timesteps.double().unsqueeze(-1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def patchify(latents: Tensor, patch: int) -> Tensor:
    """[B, C, F, H, W] to patches [B, F * H/patch * W/patch, C * patch * patch], in the order of a Conv3d
    weight."""
    batch, channels, frames, height, width = latents.shape
    grid = latents.reshape(batch, channels, frames, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 3, 5, 1, 4, 6).reshape(batch, -1, channels * patch * patch)
