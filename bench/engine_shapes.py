"""The sizes of a chunk in the steady state and tensors of these sizes, for the report and the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rfengine.config import PRESETS, EngineConfig
from rfengine.grid import LatentGrid


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

    def angles(self, tokens: int, head_dim: int) -> Tensor:
        """Cosines and sines [2, tokens, E / 2]."""
        turn = self.table(tokens, head_dim // 2)
        return torch.stack((turn.cos(), turn.sin())) if self.generator else turn.new_empty(2, *turn.shape)
