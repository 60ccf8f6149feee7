"""The sizes of a chunk in the steady state."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from rfengine.config import EngineConfig
from rfengine.grid import LatentGrid
from rfengine.presets import PRESETS


def require_stream(config: EngineConfig) -> None:
    """Raises ValueError for a diffusion forcing model, which has no chunks and streams nothing."""
    if config.diffusion_forcing is not None:
        raise ValueError(
            f"{config.name} is a diffusion forcing model, which makes whole videos and streams none; use "
            "`rfengine generate` or rfengine.DiffusionForcingPipeline"
        )


@dataclass(frozen=True)
class VaeLevel:
    """Sizes of a chunk in the residual blocks of one level of the VAE's decoder; 0 is that of the latents."""

    frames: int
    height: int
    width: int
    channels: int

    @property
    def pixels(self) -> int:
        return self.frames * self.height * self.width


@dataclass(frozen=True)
class Shapes:
    """Sizes of a chunk in the steady state, at the resolution of the preset.

    Raises ValueError for a diffusion forcing model, which has no chunks.
    """

    config: EngineConfig = field(default_factory=lambda: PRESETS["wan-1.3b"])

    def __post_init__(self) -> None:
        require_stream(self.config)

    @property
    def grid(self) -> LatentGrid:
        return LatentGrid.of(self.config)

    @property
    def frames(self) -> int:
        return self.config.cache.chunk_frames

    @property
    def tokens(self) -> int:
        return self.frames * self.grid.frame_tokens

    @property
    def window_tokens(self) -> int:
        return self.config.cache.window_frames * self.grid.frame_tokens

    @property
    def resident_tokens(self) -> int:
        """Of the window, without what a rolling schedule has in flight."""
        return self.config.cache.resident_frames * self.grid.frame_tokens

    @property
    def sink_tokens(self) -> int:
        return self.config.cache.sink_frames * self.grid.frame_tokens

    @property
    def dim(self) -> int:
        return self.config.model.dim

    @property
    def heads(self) -> int:
        return self.config.model.num_heads

    @property
    def head_dim(self) -> int:
        return self.config.model.head_dim

    @property
    def layers(self) -> int:
        return self.config.model.num_layers

    @property
    def eps(self) -> float:
        return self.config.model.eps

    @property
    def chunk(self) -> int:
        """Elements of the rows of a chunk."""
        return self.tokens * self.dim

    @property
    def pixels(self) -> int:
        """Pixels of a chunk in the steady state."""
        return self.frames * self.grid.temporal_stride * self.grid.height * self.grid.width

    @property
    def vae_levels(self) -> list[VaeLevel]:
        """The levels of the VAE's decoder, from that of the latents to that of the pixels."""
        vae, grid = self.config.vae, self.grid
        doublings = [1, *(2 if temporal else 1 for temporal in reversed(vae.temporal_downsample))]
        levels, frames = [], self.frames
        for level, (doubling, factor) in enumerate(zip(doublings, reversed(vae.dim_mult), strict=True)):
            frames *= doubling
            height, width = grid.latent_height << level, grid.latent_width << level
            levels.append(VaeLevel(frames, height, width, vae.base_dim * factor))
        return levels

    def with_layers(self, layers: int) -> Shapes:
        return Shapes(replace(self.config, model=replace(self.config.model, num_layers=layers)))

    def with_chunk(self, frames: int) -> Shapes:
        """Those of chunks, and a sink, of so many latent frames in the same window."""
        cache = replace(self.config.cache, chunk_frames=frames, sink_frames=frames)
        return Shapes(replace(self.config, cache=cache))
