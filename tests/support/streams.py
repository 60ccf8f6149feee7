"""A cache driven by a runner, without a VAE: what the tests of the runner share."""

from __future__ import annotations

import torch

from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.config import CacheConfig
from rfengine.runtime.chunk_runner import ChunkRunner, StepCallback
from support.models import GRID, SMALL, noise_of, text_states


class Stream:
    """A cache and what has come out of it. One runner may run several."""

    def __init__(self, runner: ChunkRunner, config: CacheConfig, seed: int = 0) -> None:
        self.runner, self.seed = runner, seed
        self.cache = StreamingKVCache(SMALL, config, GRID, dtype=runner.model.dtype)
        self.latents: dict[int, torch.Tensor] = {}
        self.set_text(0)

    def set_text(self, seed: int) -> None:
        self.text = self.runner.model.text_keys_values(text_states(seed))

    def advance(self, count: int = 1, on_step: StepCallback | None = None) -> None:
        for _ in range(count):
            plan = self.cache.plan_chunk()
            noise = noise_of(100 * self.seed + plan.chunk, self.cache.config.chunk_frames)
            noise = noise.to(self.runner.model.dtype)
            self.latents[plan.chunk] = self.runner.advance(self.cache, plan, noise, self.text, on_step)

    def recache(self) -> None:
        clean = torch.cat([self.latents[chunk] for chunk in sorted(self.latents)], dim=2).split(1, dim=2)
        self.runner.recache(self.cache, dict(enumerate(clean)), self.text)

    def state(self) -> dict[str, torch.Tensor]:
        latents = {f"latents.{chunk}": value for chunk, value in self.latents.items()}
        return latents | {name: value.clone() for name, value in self.cache.tensors().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.isfinite().all(), name
        assert torch.equal(value, other[name]), name
