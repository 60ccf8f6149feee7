"""Blends of text states: the formulas, their ends, and a transition that follows from its fraction alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rfengine.prompt_blend import TextTransition, checked_chunks, interpolated, weighted_mean

ROWS, DIM = 6, 16
FRACTIONS = (1 / 7, 0.25, 0.5, 2 / 3, 0.9)
# float32: a row of 16 values takes some tens of roundings of 6e-8, and a direction those of its angle
EXACT = {"rtol": 1e-5, "atol": 1e-6}


def states(seed: int, rows: int = ROWS, dtype: torch.dtype = torch.float32) -> Tensor:
    """Text states [1, ROWS, DIM] of a text of so many rows; those after it are 0."""
    drawn = torch.randn(1, ROWS, DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)
    drawn[:, rows:] = 0
    return drawn


def length(rows: Tensor) -> Tensor:
    return rows.double().norm(dim=-1)


def angle(one: Tensor, other: Tensor) -> Tensor:
    """Radians between the rows."""
    cosine = (one.double() * other.double()).sum(-1) / (length(one) * length(other))
    return cosine.clamp(-1, 1).acos()


# The weighted mean


def test_mean_counts_weights_beside_each_other() -> None:
    one, other = states(0), states(1)
    expected = 0.75 * one.double() + 0.25 * other.double()
    for weights in ((3, 1), (0.75, 0.25), (3e5, 1e5)):
        mean = weighted_mean(torch.cat([one, other]), weights)
        assert mean.shape == one.shape
        torch.testing.assert_close(mean.double(), expected, **EXACT)


def test_mean_of_texts_of_different_lengths_goes_row_by_row() -> None:
    short, long = states(0, rows=2), states(1, rows=5)
    mean = weighted_mean(torch.cat([short, long]), (1, 3))
    torch.testing.assert_close(mean[:, :2], 0.25 * short[:, :2] + 0.75 * long[:, :2], **EXACT)
    torch.testing.assert_close(mean[:, 2:5], 0.75 * long[:, 2:5], **EXACT)
    assert not mean[:, 5:].any()


def test_mean_of_one_text_is_its_states() -> None:
    one = states(0, dtype=torch.bfloat16)
    assert torch.equal(weighted_mean(one, (0.3,)), one)


def test_mean_in_bfloat16_is_rounded_once() -> None:
    several = torch.cat([states(seed, dtype=torch.bfloat16) for seed in range(5)])
    weights = (1, 2, 3, 4, 5)
    shares = torch.tensor(weights).double() / 15
    expected = (several.double() * shares[:, None, None]).sum(0, keepdim=True).bfloat16()
    mean = weighted_mean(several, weights)
    assert mean.dtype == torch.bfloat16
    assert (mean == expected).float().mean() > 0.99  # but where float32 and float64 round to either side


# Interpolation


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_linear_interpolation_is_the_point_at_the_fraction(fraction: float) -> None:
    start, target = states(0), states(1)
    expected = start.double() + fraction * (target.double() - start.double())
    torch.testing.assert_close(interpolated(start, target, fraction, "linear").double(), expected, **EXACT)


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_spherical_interpolation_turns_evenly_and_changes_length_evenly(fraction: float) -> None:
    start, target = states(0), 3 * states(1)
    mixed, whole = interpolated(start, target, fraction, "spherical"), angle(start, target)
    torch.testing.assert_close(angle(start, mixed), fraction * whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(angle(mixed, target), (1 - fraction) * whole, rtol=1e-5, atol=1e-5)
    between = (1 - fraction) * length(start) + fraction * length(target)
    torch.testing.assert_close(length(mixed), between, **EXACT)


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_spherical_interpolation_follows_its_formula(fraction: float) -> None:
    start, target = states(0).double(), 2 * states(1).double()
    turn = angle(start, target)[..., None]
    lengths = [each.norm(dim=-1, keepdim=True) for each in (start, target)]
    parts = [((1 - fraction) * turn).sin() / turn.sin(), (fraction * turn).sin() / turn.sin()]
    direction = parts[0] * start / lengths[0] + parts[1] * target / lengths[1]
    expected = direction * ((1 - fraction) * lengths[0] + fraction * lengths[1])
    mixed = interpolated(start.float(), target.float(), fraction, "spherical")
    torch.testing.assert_close(mixed.double(), expected, **EXACT)


def test_spherical_interpolation_is_linear_where_rows_have_no_angle() -> None:
    start, target = states(0), states(1)
    start[:, 1] = 0  # padding of a shorter text
    target[:, 2] = 0
    start[:, 3] = target[:, 3] = 0
    target[:, 4] = 2.5 * start[:, 4]  # the same way
    target[:, 5] = -0.5 * start[:, 5]  # opposite ways
    mixed, plain = (interpolated(start, target, 0.3, kind) for kind in ("spherical", "linear"))
    assert torch.equal(mixed[:, 1:], plain[:, 1:])
    assert not torch.allclose(mixed[:, 0], plain[:, 0], rtol=0.01)


def test_spherical_interpolation_of_nearly_parallel_rows_stays_between_them() -> None:
    start = states(0)
    for nearness in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8):
        target = 2 * start + nearness * states(1)
        mixed, plain = (interpolated(start, target, 0.5, kind) for kind in ("spherical", "linear"))
        assert mixed.isfinite().all()
        assert (length(mixed - plain) <= (nearness + 1e-6) * length(start)).all()


@pytest.mark.parametrize("kind", ["linear", "spherical"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ends_are_the_states_themselves(kind: str, dtype: torch.dtype) -> None:
    start, target = states(0, dtype=dtype), states(1, rows=3, dtype=dtype)
    assert torch.equal(interpolated(start, target, 0.0, kind), start)
    assert torch.equal(interpolated(start, target, 1.0, kind), target)
    assert interpolated(start, target, 0.4, kind).dtype == dtype


# A transition


@pytest.mark.parametrize("kind", ["linear", "spherical"])
def test_transition_is_at_its_fraction_after_every_step(kind: str) -> None:
    start, target = states(0, dtype=torch.bfloat16), states(1, dtype=torch.bfloat16)
    way = TextTransition(start, target, 7, kind)
    for step in range(1, 8):
        assert not way.ended
        way = way.advanced()
        assert torch.equal(way.states(), interpolated(start, target, step / 7, kind))
    assert way.ended and torch.equal(way.states(), target)


def test_transition_of_many_steps_adds_no_rounding_up() -> None:
    start, target = states(0, dtype=torch.bfloat16), states(1, dtype=torch.bfloat16)
    way = TextTransition(start, target, 1000, step=499).advanced()
    exact = (start.double() + target.double()) / 2
    # half a unit in the last place of bfloat16, and what float32 adds; equal steps would be far off
    assert ((way.states().double() - exact).abs() <= exact.abs() * 2**-8 * 1.001).all()


def test_length_of_a_change_is_checked() -> None:
    assert checked_chunks("soft", 3, "spherical") == 3 and checked_chunks("hard", 1, "linear") == 1
    for mode, chunks, kind, message in (
        ("soft", 2, "cubic", "interpolation is 'cubic'; use 'linear' or 'spherical'"),
        ("soft", math.nan, "linear", "transition_chunks is nan; it must be an integer"),
        ("fade", 1, "linear", "mode is 'fade'; use 'soft', 'recache' or 'hard'"),
        ([], 1, "linear", r"mode is \[\]; use"),
        ("soft", 1, ["linear"], r"interpolation is \['linear'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            checked_chunks(mode, chunks, kind)
