"""The sizes of a chunk in the steady state and tensors of these sizes, for the report and the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rfengine.config import PRESETS, EngineConfig
from rfengine.grid import LatentGrid


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
    """Sizes of a chunk in the steady state, at the resolution of the preset."""

    config: EngineConfig = field(default_factory=lambda: PRESETS["wan-1.3b"])

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


@dataclass(frozen=True)
class Draw:
    """Makes inputs: random where there is a seed, else left as allocated, for compiling alone."""

    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    generator: torch.Generator | None = None

    def rows(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        """Normal values in the dtype of the model."""
        if self.generator is None:
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        values = torch.randn(shape, generator=self.generator, dtype=self.dtype, device=self.device)
        return values.mul_(scale).add_(mean)

    def table(self, *shape: int) -> Tensor:
        """Normal values in float32."""
        return replace(self, dtype=torch.float32).rows(*shape, scale=0.2)

    def e4m3(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal values rounded to e4m3; `scale` should keep them below 448."""
        if self.generator is None:
            return replace(self, dtype=torch.float8_e4m3fn).rows(*shape)
        return self.rows(*shape, scale=scale).to(torch.float8_e4m3fn)

    def angles(self, tokens: int, head_dim: int) -> Tensor:
        """Cosines and sines [2, tokens, E / 2]."""
        turn = self.table(tokens, head_dim // 2)
        return torch.stack((turn.cos(), turn.sin())) if self.generator else turn.new_empty(2, *turn.shape)
