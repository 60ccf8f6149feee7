"""Rewarded distribution matching (Re-DMD): the pure functions, from scores and rewards to losses.

DMD moves a generator along the difference of two scores of its own samples, that of the teacher and that of a
critic that has learnt the samples. Re-DMD matches p(x | c) * exp(r(x, c) / beta) / Z(c) in place of the
teacher's p(x | c): each sample's difference is weighted by exp(r / beta) / Z(c) (arXiv 2512.04678; recipes.py
lists where the published code departs from it). B samples, C channels, F latent frames; latents are
[B, C, F, h, w].
"""

from __future__ import annotations

import torch
from torch import Tensor

from rfengine.schedule import shifted

SIGMA_RANGE = (0.02, 0.98)  # the published steps 20 to 980 of 1000
_SMALLEST_SCALE = 1e-6  # of the mean distance that normalises a gradient: no division by zero


def draw_sigmas(batch: int, shift: float, generator: torch.Generator) -> Tensor:
    """Noise levels of the score difference: shift * u / (1 + (shift - 1) * u) of a uniform u, clamped to
    SIGMA_RANGE.

    The student, the critic and the teacher all read this one law (the published wrappers mix shifts of 5 and
    8). Returns float32 [B] on the generator's device.
    """
    uniform = torch.rand(batch, generator=generator, device=generator.device)
    return shifted(uniform, shift).clamp(*SIGMA_RANGE)


def x0_from_flow(x_t: Tensor, flow: Tensor, sigma: Tensor) -> Tensor:
    """x0 = x_t - sigma * flow, in float32. x_t, flow: [B, C, F, h, w]; sigma: [B]."""
    return x_t.float() - _per_sample(sigma, x_t) * flow.float()


def guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """conditional + guidance * (conditional - unconditional): 0 is no guidance, 3 the published value."""
    return conditional + guidance * (conditional - unconditional)


def dmd_gradient(x: Tensor, critic_x0: Tensor, teacher_x0: Tensor) -> Tensor:
    """g = (critic_x0 - teacher_x0) / mean |x - teacher_x0|, the mean taken in each sample.

    All are [B, C, F, h, w]; float32 at least. x - g is nearer to the teacher's distribution. What is not
    finite stays so: a trainer has to see it (the published code turns it into zeros).
    """
    x, critic_x0, teacher_x0 = (part.detach().to(_wide(part)) for part in (x, critic_x0, teacher_x0))
    scale = (x - teacher_x0).abs().flatten(1).mean(1).clamp_min(_SMALLEST_SCALE)
    return (critic_x0 - teacher_x0) / _per_sample(scale, x)


def reward_weights(rewards: Tensor, groups: Tensor, beta: float) -> Tensor:
    """w = exp(r / beta) / Z(c), where Z(c) is the mean of exp(r / beta) over the samples of prompt c.

    rewards: [B]; groups: integers [B], equal where the prompt is. beta is the paper's temperature (the
    published code multiplies by 2 instead, a beta of 0.5, and has no Z). Weights average to 1 in every group,
    exactly 1 in a group of one. Returns float64 [B].
    """
    exponents = rewards.detach().double() / beta
    same = (groups[:, None] == groups[None, :]).double()
    size = same.sum(1)
    highest = torch.where(same > 0, exponents[None, :], -torch.inf).amax(1)
    shares = torch.where(same > 0, torch.exp(exponents[None, :] - highest[:, None]), 0.0)
    return torch.exp(exponents - highest) * size / shares.sum(1)


def distribution_loss(x: Tensor, gradient: Tensor, weights: Tensor | None = None) -> Tensor:
    """mean over samples of w / 2 * mean (x - stopgrad(x - g))^2, float64, whose gradient by x is w * g /
    numel.

    x: the generated latents, with their graph; gradient: dmd_gradient of them; weights: [B], None for plain
    DMD.
    """
    target = (x.double() - gradient.double()).detach()
    per_sample = 0.5 * (x.double() - target).square().flatten(1).mean(1)
    return per_sample.mean() if weights is None else (weights.detach().double() * per_sample).mean()


def critic_loss(flow: Tensor, noise: Tensor, x: Tensor) -> Tensor:
    """Flow matching on the student's samples: mean (flow - (noise - x))^2, float32 at least.

    flow: what the critic predicts at (1 - sigma) * x + sigma * noise. x carries no gradient here.
    """
    return (flow.to(_wide(flow)) - (noise.to(_wide(flow)) - x.detach().to(_wide(flow)))).square().mean()


def _per_sample(values: Tensor, x: Tensor) -> Tensor:
    """[B] shaped to broadcast over x [B, ...]."""
    return values.to(x.device).view(-1, *(1,) * (x.ndim - 1))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
