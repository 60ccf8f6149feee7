"""A checkpoint whose decoder exports in seconds: two levels, and the step between them doubles the frames."""

from __future__ import annotations

import torch

from rfengine.config import EngineConfig, VAEConfig, WanConfig
from rfengine.grid import LatentGrid
from rfengine.models.vae import WanVAE

LATENTS = 3
VAE = VAEConfig(
    base_dim=4,
    z_dim=4,
    dim_mult=(1, 2),
    num_res_blocks=1,
    temporal_downsample=(True,),
    latents_mean=(0.5, -0.25, 0.0, 1.0),
    latents_std=(2.0, 0.5, 1.0, 3.0),
)
MODEL = WanConfig(dim=12, ffn_dim=16, num_heads=1, num_layers=1, in_dim=4, out_dim=4)
CONFIG = EngineConfig("small", MODEL, VAE, height=8, width=12)
GRID = LatentGrid.of(CONFIG)


def random_vae(config: VAEConfig = VAE, seed: int = 0) -> WanVAE:
    """Weights that keep values around one, and gains around one that differ."""
    generator = torch.Generator().manual_seed(seed)
    vae = WanVAE(config).eval()
    for parameter in vae.parameters():
        plain = parameter.ndim == 1 or parameter[0].numel() == 1
        noise = torch.randn(parameter.shape, generator=generator)
        is_gain = plain and parameter.ndim > 1
        parameter.data = noise * (0.3 if plain else parameter[0].numel() ** -0.5) + float(is_gain)
    return vae


def noise(
    seed: int, latents: int = LATENTS, config: VAEConfig = VAE, grid: LatentGrid = GRID
) -> torch.Tensor:
    shape = (1, config.z_dim, latents, grid.latent_height, grid.latent_width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
