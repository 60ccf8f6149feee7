"""The pure functions of Re-DMD against their formulas."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rfengine.training.re_dmd import (
    SIGMA_RANGE,
    critic_loss,
    distribution_loss,
    dmd_gradient,
    draw_sigmas,
    guided,
    reward_weights,
    x0_from_flow,
)

SHAPE = (4, 3, 2, 5, 5)


def latents(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_gradient_of_loss_is_weight_times_score_difference_over_numel():
    x, gradient = latents(0).requires_grad_(), latents(1)
    weights = torch.tensor([0.5, 2.0, 1.0, 0.5], dtype=torch.float64)
    distribution_loss(x, gradient, weights).backward()
    expected = weights.view(-1, 1, 1, 1, 1) * gradient / x.numel()
    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=0)


def test_step_along_gradient_lowers_distance_to_teacher():
    x, teacher = latents(0), latents(1)
    gradient = dmd_gradient(x, critic_x0=x, teacher_x0=teacher)
    assert ((x - 0.1 * gradient) - teacher).norm() < (x - teacher).norm()


def test_gradient_is_normalised_by_mean_distance_of_each_sample():
    x, critic, teacher = latents(0), latents(1), latents(2)
    gradient = dmd_gradient(x, critic, teacher)
    for sample in range(SHAPE[0]):
        scale = (x[sample] - teacher[sample]).abs().mean()
        torch.testing.assert_close(gradient[sample], (critic[sample] - teacher[sample]) / scale)
    torch.testing.assert_close(dmd_gradient(3 * x, 3 * critic, 3 * teacher), gradient)


def test_identical_critic_and_teacher_give_zero():
    x, score = latents(0), latents(1)
    assert dmd_gradient(x, score, score).eq(0).all()
    assert dmd_gradient(score, score, score).eq(0).all(), "no division by a distance of zero"


def test_gradient_that_is_not_finite_is_seen():
    teacher = latents(1)
    teacher[0, 0, 0, 0, 0] = torch.nan
    assert dmd_gradient(latents(0), latents(2), teacher)[0].isnan().any()


def test_equal_rewards_are_plain_dmd():
    x, gradient = latents(0), latents(1)
    weights = reward_weights(torch.full((4,), 0.7), torch.tensor([0, 0, 1, 1]), beta=0.2)
    assert weights.eq(1).all()
    assert distribution_loss(x, gradient, weights) == distribution_loss(x, gradient)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-50, 50), st.integers(0, 3)), min_size=1, max_size=12),
    st.floats(0.05, 5),
)
def test_weights_average_to_one_in_every_group(samples, beta):
    rewards = torch.tensor([reward for reward, _ in samples], dtype=torch.float64)
    groups = torch.tensor([group for _, group in samples])
    weights = reward_weights(rewards, groups, beta)
    assert weights.isfinite().all()
    for group in groups.unique():
        torch.testing.assert_close(weights[groups == group].mean().item(), 1.0, rtol=1e-12, atol=0)


def test_weights_follow_exponential_of_reward_over_beta():
    rewards, groups = torch.tensor([0.0, 1.0, 0.3, -4.0]), torch.tensor([0, 0, 1, 1])
    weights = reward_weights(rewards, groups, beta=0.5)
    assert math.isclose(weights[1] / weights[0], math.exp(2.0), rel_tol=1e-12)
    assert math.isclose(weights[2] / weights[3], math.exp((0.3 + 4.0) / 0.5), rel_tol=1e-6)


def test_guidance_extrapolates_from_unconditional():
    conditional, unconditional = latents(0), latents(1)
    assert guided(conditional, unconditional, 0.0).equal(conditional)
    torch.testing.assert_close(
        guided(conditional, unconditional, 3.0), unconditional + 4 * (conditional - unconditional)
    )


def test_sigmas_follow_shift_and_stay_in_range():
    sigmas = draw_sigmas(20_000, 5.0, torch.Generator().manual_seed(0))
    assert sigmas.min() >= SIGMA_RANGE[0]
    assert sigmas.max() <= SIGMA_RANGE[1]
    # of the published law: mean 745.7 and median 832.8 of 1000
    assert abs(sigmas.mean().item() - 0.7457) < 0.005
    assert abs(sigmas.median().item() - 0.8333) < 0.005


def test_critic_loss_is_zero_at_true_flow_and_has_no_gradient_by_samples():
    x, noise = latents(0).requires_grad_(), latents(1)
    flow = (noise - x).detach().requires_grad_()
    assert critic_loss(flow, noise, x) == 0
    critic_loss(flow + 1, noise, x).backward()
    assert x.grad is None
    assert flow.grad is not None


def test_x0_and_flow_are_two_names_of_one_prediction():
    x0, noise, sigma = latents(0).float(), latents(1).float(), torch.tensor([0.1, 0.5, 0.9, 0.98])
    scale = sigma.view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(
        x0_from_flow((1 - scale) * x0 + scale * noise, noise - x0, sigma), x0, rtol=0, atol=2e-6
    )
