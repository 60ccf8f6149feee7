"""The solver, compared with Diffusers' UniPCMultistepScheduler, and its tables."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rfengine.diffusion_forcing.unipc import SigmaKind, UniPCSolver, UniPCTable, sigma_table, timesteps_of

MIX = torch.randn(2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def flow_of(sample: Tensor) -> Tensor:
    """Any flow that depends on the sample."""
    return torch.einsum("ij,bjfhw->bifhw", MIX.to(sample.dtype), sample).tanh() + 0.3 * sample


def noise(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(1, 2, 3, 4, 5, generator=generator, dtype=torch.float64).to(dtype)


def diffusers_samples(sigmas: tuple[float, ...], sample: Tensor) -> list[Tensor]:
    """The sample after each step, with the table of sigmas forced."""
    from diffusers import UniPCMultistepScheduler

    other = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
    other.set_timesteps(len(sigmas) - 1)
    other.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    other.timesteps = torch.tensor(timesteps_of(sigmas))
    samples = []
    for timestep in other.timesteps:
        sample = other.step(flow_of(sample), timestep, sample, return_dict=False)[0]
        samples.append(sample)
    return samples


def largest_difference(steps: int, shift: float, kind: SigmaKind, dtype: torch.dtype, late: int = 0) -> float:
    """Over all steps, of the largest value. late: steps by which the table of the solver is behind."""
    sigmas = sigma_table(steps, shift, kind)
    expected, sample = diffusers_samples(sigmas, noise(dtype)), noise(dtype)
    table = UniPCTable.of(sigmas)
    if late:
        rows = (*table.factors[:late], *table.factors[: steps - late])
        table = UniPCTable(table.sigmas, rows)
    solver, worst = UniPCSolver(table, sample), 0.0
    for step in range(steps):
        solver.step(sample, flow_of(sample), range(3), [step] * 3)
        worst = max(worst, float((sample - expected[step]).abs().max() / expected[step].abs().max()))
    return worst


@pytest.mark.parametrize("kind", ["skyreels", "diffusers"])
@pytest.mark.parametrize(("steps", "shift"), [(30, 8.0), (50, 5.0), (3, 8.0), (2, 8.0), (1, 8.0)])
def test_steps_agree_with_diffusers(steps: int, shift: float, kind: SigmaKind) -> None:
    assert largest_difference(steps, shift, kind, torch.float64) <= 1e-13
    assert largest_difference(steps, shift, kind, torch.float32) <= 1e-6


def test_a_late_step_is_seen() -> None:
    assert largest_difference(30, 8.0, "skyreels", torch.float64, late=1) > 1e-3


def test_frames_at_steps_of_their_own_are_what_they_are_alone() -> None:
    table = UniPCTable.of(sigma_table(6, 8.0))
    alone = noise(torch.float32)
    solver = UniPCSolver(table, alone)
    for step in range(6):
        solver.step(alone, flow_of(alone), range(3), [step] * 3)
    apart = noise(torch.float32)
    solver = UniPCSolver(table, apart)
    for row in range(10):  # each two rows behind the one before
        moving = [frame for frame in range(3) if 0 <= row - 2 * frame < 6]
        steps = [row - 2 * frame for frame in moving]
        solver.step(apart, flow_of(apart)[:, :, moving], moving, steps)
    assert torch.equal(alone, apart) and solver.steps_taken == [6, 6, 6]


@pytest.mark.parametrize("step", [1, 3])
def test_a_step_that_is_not_the_next_one_is_refused(step: int) -> None:
    sample = noise(torch.float32)
    solver = UniPCSolver(UniPCTable.of(sigma_table(4, 8.0)), sample)
    for first in range(2):
        solver.step(sample, flow_of(sample)[:, :, :1], [0], [first])
    with pytest.raises(ValueError, match=f"latent frame 0 has taken 2 of 4 steps and is given step {step}"):
        solver.step(sample, flow_of(sample)[:, :, :1], [0], [step])


def test_the_last_step_ends_at_x0() -> None:
    sample = noise(torch.float64)
    solver = UniPCSolver(UniPCTable.of(sigma_table(1, 8.0)), sample)
    sigma, start = sigma_table(1, 8.0)[0], sample.clone()
    solver.step(sample, flow_of(start), range(3), [0] * 3)
    assert torch.allclose(sample, start - sigma * flow_of(start), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("steps", "shift", "first", "last"),
    [
        (30, 8.0, (999, 995, 991, 986), (363, 216)),
        (50, 8.0, (999, 997, 994), (249, 140)),
        (50, 5.0, (999, 995, 991), (172, 92)),
    ],
)
def test_timesteps_are_the_published_ones(
    steps: int, shift: float, first: tuple[int, ...], last: tuple[int, ...]
) -> None:
    found = timesteps_of(sigma_table(steps, shift))
    assert found[: len(first)] == first and found[-2:] == last
    assert len(set(found)) == steps and found == tuple(sorted(found, reverse=True))


def test_sigmas_are_those_of_both_implementations() -> None:
    from diffusers import UniPCMultistepScheduler

    assert [round(sigma, 5) for sigma in sigma_table(30, 8.0)[:3]] == [0.99987, 0.99558, 0.99102]
    theirs = sigma_table(30, 8.0, "diffusers")
    assert [round(sigma, 4) for sigma in theirs[:3]] == [1.0, 0.9957, 0.9912]
    other = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
    other.set_timesteps(30)
    assert other.sigmas.tolist() == list(theirs)
    assert tuple(other.timesteps.tolist()) == timesteps_of(theirs)
    # the first three timesteps are the same and the last are not: 216 and 221
    ours = timesteps_of(sigma_table(30, 8.0))
    assert ours[:4] == timesteps_of(theirs)[:4] and (ours[-1], timesteps_of(theirs)[-1]) == (216, 221)
