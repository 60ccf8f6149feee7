"""FlowSchedule: sigmas, warped timesteps, the few-step sampler's constants, and the noise that feeds it.

Flow matching: x_t = (1 - sigma) * x0 + sigma * noise, and the model predicts flow = noise - x0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import torch
from torch import Tensor

from rfengine.config import ScheduleConfig
from rfengine.limits import as_integer, shown

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Steps:
    """The denoising steps of a chunk: the timestep and the sigma of each, falling."""

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]


class FlowSchedule:
    """The shifted sigma table and what the fixed denoising steps read from it.

    sigmas, timesteps: float32 [num_train_timesteps], falling; timesteps = num_train_timesteps * sigmas.
    denoising_timesteps, denoising_sigmas: one float for each step of the sampler; steps_of has those of one
    chunk. first_timesteps: those of all first chunks, where they have steps of their own. context_timestep:
    0.0, the timestep of the context pass.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        count = config.num_train_timesteps
        uniform = torch.linspace(1.0, 0.0, count + 1, dtype=torch.float32, device="cpu")[:-1]
        self.sigmas = shifted(uniform, config.shift)
        self.timesteps = self.sigmas * count
        steps = self._steps(config.denoising_steps)
        self.denoising_timesteps, self.denoising_sigmas = steps.timesteps, steps.sigmas
        first = self._steps(config.first_steps) if config.first_steps else steps
        self._steps_by_chunk = (*(first,) * config.first_chunks, steps)
        self.first_timesteps = first.timesteps * config.first_chunks if config.first_steps else ()
        self.context_timestep = 0.0

    def _steps(self, nominal: tuple[int, ...]) -> Steps:
        rows = [len(self.sigmas) - step for step in nominal]
        return Steps(tuple(self.timesteps[rows].tolist()), tuple(self.sigmas[rows].tolist()))

    def steps_of(self, chunk: int) -> Steps:
        """The denoising steps of chunk `chunk` of a video."""
        return self._steps_by_chunk[min(chunk, len(self._steps_by_chunk) - 1)]

    def sigma_at(self, timestep: Tensor) -> Tensor:
        """Sigma of the table entry nearest to each timestep (the first on ties); float32, shape of
        `timestep`."""
        distance = (self.timesteps.to(timestep.device) - timestep.float().unsqueeze(-1)).abs()
        return self.sigmas.to(timestep.device)[distance.argmin(dim=-1)]


def shifted(uniform: Tensor, shift: float) -> Tensor:
    """Sigmas for uniform values in [0, 1]: shift * u / (1 + (shift - 1) * u)."""
    return shift * uniform / (1 + (shift - 1) * uniform)


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """x_t = (1 - sigma) * x0 + sigma * noise, in float32, rounded to the dtype of x0; sigma broadcasts."""
    return ((1 - sigma) * x0.float() + sigma * noise.float()).to(x0.dtype)


def as_seed(seed: SupportsIndex) -> int:
    """The seed as Python's integer, which one of numpy or of a tensor becomes. Raises ValueError for what no
    stream takes."""
    number = as_integer("seed", seed)
    if not 0 <= number <= MAX_SEED:
        raise ValueError(f"seed is {shown(number)}; use an integer from 0 to {MAX_SEED}")
    return number


def chunk_noise(seed: int, chunk: int, step: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise for one step of one chunk: float32 on the CPU, the same whatever was drawn
    before.

    step 0 is the initial noise of the chunk, step k the fresh noise after denoising step k.
    The generator is Philox-4x64, keyed by the seed; chunk and step are the upper words of its counter, so no
    two draws overlap below 2**64 numbers.
    """
    import numpy

    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {shown(seed)}; use an integer from 0 to 2**64 - 1")
    philox = numpy.random.Philox(key=seed, counter=[0, 0, step, chunk])
    return torch.from_numpy(numpy.random.Generator(philox).standard_normal(tuple(shape), dtype=numpy.float32))
