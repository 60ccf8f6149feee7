"""The UniPC solver for flow matching (arXiv 2302.04867; order 2, B(h) = expm1(h), with its corrector), where
every latent frame is at a step of its own.

x_sigma = (1 - sigma) * x0 + sigma * noise, and the model predicts flow = noise - x0. Of a step k the solver
first corrects the sample with the new x0, then predicts the sample of step k + 1. Both are sums of four known
tensors, so a table holds their factors for every k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SigmaKind = Literal["skyreels", "diffusers"]

TRAIN_TIMESTEPS = 1000
PURE_NOISE_TIMESTEP = TRAIN_TIMESTEPS - 1  # what a frame shows that no step has touched
_FACTORS = 8  # of one step: sample, last sample, x0 - last x0 and so on, as _corrector and _predictor say


def sigma_table(steps: int, shift: float, kind: SigmaKind = "skyreels") -> tuple[float, ...]:
    """Sigmas of `steps` steps and the 0 after them, falling: shift * u / (1 + (shift - 1) * u).

    kind: u falls from 1 - 1 / 1000 towards 0 in SkyReels-V2, and from 1 towards 1 / 1000 in Diffusers'
    UniPCMultistepScheduler, which lowers its first sigma, 1, by 1e-6 and rounds all to float32; 1 - sigma of
    the first is then 1.3 % off.
    """
    first, last = {"skyreels": (1 - 1 / TRAIN_TIMESTEPS, 0.0), "diffusers": (1.0, 1 / TRAIN_TIMESTEPS)}[kind]
    uniform = [first + (last - first) * step / steps for step in range(steps)]
    sigmas = [shift * u / (1 + (shift - 1) * u) for u in uniform]
    if kind == "diffusers":
        sigmas[0] -= 1e-6
        sigmas = torch.tensor(sigmas, dtype=torch.float32, device="cpu").tolist()
    return (*sigmas, 0.0)


def timesteps_of(sigmas: Sequence[float]) -> tuple[int, ...]:
    """The integer that the model is shown at each step: 1000 * sigma, cut off."""
    return tuple(int(TRAIN_TIMESTEPS * sigma) for sigma in sigmas[:-1])


@dataclass(frozen=True, slots=True)
class UniPCTable:
    """The factors of every step. sigmas: as sigma_table has them.

    factors: [steps][_FACTORS], in float64: of the sample, the last sample, last x0, (x0 before - last x0) and
    (x0 - last x0) for the corrected sample; of that, x0 and (last x0 - x0) for the sample of the next step.
    """

    sigmas: tuple[float, ...]
    factors: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, sigmas: Sequence[float]) -> UniPCTable:
        steps = len(sigmas) - 1
        lambdas = [_half_log_snr(sigma) for sigma in sigmas]
        rows = tuple(
            (*_corrector(sigmas, lambdas, step), *_predictor(sigmas, lambdas, step)) for step in range(steps)
        )
        assert all(len(row) == _FACTORS for row in rows)
        return cls(tuple(sigmas), rows)

    @property
    def steps(self) -> int:
        return len(self.factors)


def _half_log_snr(sigma: float) -> float:
    return math.log((1 - sigma) / sigma) if sigma else math.inf


def _order(step: int, steps: int) -> int:
    """Of the prediction from `step`: 1 at the first step, which knows no x0 before, and at the last."""
    return min(2, steps - step, step + 1)


def _corrector(sigmas: Sequence[float], lambdas: Sequence[float], step: int) -> tuple[float, ...]:
    """Factors of the sample, the last sample, last x0, x0 before - last x0, x0 - last x0."""
    if step == 0:
        return (1.0, 0.0, 0.0, 0.0, 0.0)
    h = -(lambdas[step] - lambdas[step - 1])
    p = math.expm1(h)
    alpha = 1 - sigmas[step]
    before, new = 0.0, 0.5
    if _order(step - 1, len(sigmas) - 1) == 2:
        ratio = (lambdas[step - 2] - lambdas[step - 1]) / -h
        first = (p / h - 1) / p
        second = 2 * ((p / h - 1) / h - 0.5) / p
        # first = rho_1 + rho_2, second = ratio * rho_1 + rho_2
        rho = (second - first) / (ratio - 1)
        before, new = rho / ratio, first - rho
    return (0.0, sigmas[step] / sigmas[step - 1], -alpha * p, -alpha * p * before, -alpha * p * new)


def _predictor(sigmas: Sequence[float], lambdas: Sequence[float], step: int) -> tuple[float, ...]:
    """Factors of the corrected sample, x0, last x0 - x0."""
    h = -(lambdas[step + 1] - lambdas[step])  # -inf at the last step, whose result is x0
    p = math.expm1(h)
    alpha = 1 - sigmas[step + 1]
    last = 0.0
    if _order(step, len(sigmas) - 1) == 2:
        ratio = (lambdas[step - 1] - lambdas[step]) / -h
        last = -alpha * p * 0.5 / ratio
    return (sigmas[step + 1] / sigmas[step], -alpha * p, last)


class UniPCSolver:
    """The solver of every latent frame of a video, in the dtype of its latents: float32, or float64.

    steps_taken: of each frame. What a frame needs of its past is kept in three tensors of the size of the
    latents: the last two x0 and the last sample, corrected.
    """

    def __init__(self, table: UniPCTable, latents: Tensor) -> None:
        """latents: [B, C, F, h, w], for their shape, dtype and device."""
        self.table = table
        self.steps_taken = [0] * latents.shape[2]
        self._x0, self._x0_before, self._sample = (torch.zeros_like(latents) for _ in range(3))
        self._factors = torch.tensor(table.factors, dtype=latents.dtype, device=latents.device)
        self._sigmas = torch.tensor(table.sigmas, dtype=latents.dtype, device=latents.device)

    def step(self, latents: Tensor, flow: Tensor, frames: Sequence[int], steps: Sequence[int]) -> None:
        """Take the next step of some frames, in place in `latents`, [B, C, F, h, w].

        flow: [B, C, len(frames), h, w], of the model. frames: their indices. steps: which step it is of each,
        from 0. Raises ValueError where that is not the next one.
        """
        for frame, step in zip(frames, steps, strict=True):
            if step != self.steps_taken[frame] or step >= self.table.steps:
                raise ValueError(
                    f"latent frame {frame} has taken {self.steps_taken[frame]} of {self.table.steps} steps "
                    f"and is given step {step}; the steps of a frame follow one another from 0"
                )
            self.steps_taken[frame] += 1
        where = torch.tensor(list(frames), dtype=torch.int64, device=latents.device)
        row = torch.tensor(list(steps), dtype=torch.int64, device=latents.device)
        factors = self._factors[row].t().view(_FACTORS, 1, 1, -1, 1, 1)
        sample, last, x0_last, x0_before = (
            held.index_select(2, where) for held in (latents, self._sample, self._x0, self._x0_before)
        )
        x0 = sample - self._sigmas[row].view(1, 1, -1, 1, 1) * flow.to(latents.dtype)
        sample = (
            factors[0] * sample
            + factors[1] * last
            + factors[2] * x0_last
            + factors[3] * (x0_before - x0_last)
            + factors[4] * (x0 - x0_last)
        )
        following = factors[5] * sample + factors[6] * x0 + factors[7] * (x0_last - x0)
        for held, value in (
            (self._x0_before, x0_last), (self._x0, x0), (self._sample, sample), (latents, following),
        ):  # fmt: skip
            held.index_copy_(2, where, value)
