"""Memory of one video of a diffusion forcing model: weights, its latents, and the activations of a pass over
its window, in bytes, and whether they fit."""

from __future__ import annotations

import torch

from rfengine.config import EngineConfig
from rfengine.costs.memory import decoder_bytes, described_vae, text_bytes, weight_bytes
from rfengine.grid import LatentGrid
from rfengine.memory import require_memory

_LATENTS = 4  # tensors of the size of the latents: these, and three of the solver
_ATTENTION_ROWS = 6  # of the width of the model: q, k and v, q and k rotated, what comes of them
_WIDE = 4  # bytes of float32


def window_needs(
    config: EngineConfig,
    grid: LatentGrid,
    dtype: torch.dtype,
    decoder_dtype: torch.dtype | None = None,
    latent_frames: int | None = None,
) -> dict[str, int]:
    """Bytes that one video of `config` at `grid` needs, with weights in `dtype`, but for the VAE: its encoder
    in float32, its decoder in decoder_dtype or else `dtype`; allocates nothing.

    transformer_fp8: the weights in e4m3 beside the model's own. latent_frames: of the window; those the
    model was trained at where nothing is given. cross_attention: of the prompt and the negative one. latents:
    with those of the solver. activations: of one pass at its peak. total: their sum.
    """
    assert config.diffusion_forcing is not None
    frames = latent_frames or grid.latent_frames(config.diffusion_forcing.base_frames)
    vae = described_vae(config, decoder_dtype or dtype)
    needs = {
        **weight_bytes(config, dtype, vae),
        "cross_attention": 2 * text_bytes(config.model, dtype),
        "latents": _latent_bytes(config, grid, frames),
        "activations": _activation_bytes(config, grid, frames, dtype.itemsize),
        **decoder_bytes(config, grid, dtype, vae),
    }
    return needs | {"total": sum(needs.values())}


def require_window_fits(
    config: EngineConfig,
    grid: LatentGrid,
    latent_frames: int,
    window: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raises RuntimeError where the latents of a piece of `latent_frames` and the activations of a pass over
    `window` of them cannot fit on the device."""
    size = _latent_bytes(config, grid, latent_frames)
    size += _activation_bytes(config, grid, window, dtype.itemsize)
    what = f"a piece of {latent_frames} latent frames of {grid.height} x {grid.width} pixels"
    require_memory(size, device, what, "choose a smaller height and width, or fewer frames")


def _latent_bytes(config: EngineConfig, grid: LatentGrid, frames: int) -> int:
    return _LATENTS * config.model.in_dim * frames * grid.latent_height * grid.latent_width * _WIDE


def _activation_bytes(config: EngineConfig, grid: LatentGrid, frames: int, size: int) -> int:
    """The residual stream and its norm, the larger one of attention and feed-forward part, and the
    modulation, which has a row for each latent frame and none for each token."""
    model = config.model
    widest = max(_ATTENTION_ROWS * model.dim, model.ffn_dim + model.dim)
    tokens = frames * grid.frame_tokens
    return tokens * (2 * model.dim + widest) * size + model.num_layers * frames * 6 * model.dim * _WIDE
