"""Noise that tells where a video begins is noise like any other, and the places can be read from it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from recipes.tiny.noise import PLACES, places, telling_noise
from rfengine.toy.backgrounds import PERIODS
from rfengine.toy.captions import sample_scenes

SHAPE = (8, 3, 8, 8)  # channels, frames, height, width


def read(noise: torch.Tensor) -> torch.Tensor:
    """The places [B, PLACES] that noise [B, C, F, h, w] tells, in turns."""
    means = noise[:, : 2 * PLACES].double().mean((2, 3, 4)).unflatten(1, (PLACES, 2))
    return torch.atan2(means[..., 1], means[..., 0]) / (2 * math.pi) % 1


def apart(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return ((one - other + 0.5) % 1 - 0.5).abs()


def test_the_places_are_read_from_the_noise_and_nothing_else_of_it_changes() -> None:
    torch.manual_seed(0)
    noise, turns = torch.randn(50, *SHAPE), torch.rand(50, PLACES)
    found = telling_noise(noise, turns)
    assert found.shape == noise.shape and apart(read(found), turns.double()).max() < 1e-5
    assert torch.equal(found[:, 2 * PLACES :], noise[:, 2 * PLACES :])
    without = [part - part.mean((2, 3, 4), keepdim=True) for part in (found, noise)]
    torch.testing.assert_close(*without)
    lengths = [part.mean((2, 3, 4)).unflatten(1, (-1, 2)).norm(dim=2) for part in (found, noise)]
    torch.testing.assert_close(*lengths)


def test_with_even_places_the_noise_is_standard_normal() -> None:
    torch.manual_seed(1)
    found = telling_noise(torch.randn(4000, *SHAPE), torch.rand(4000, PLACES))
    means = found.mean((2, 3, 4)) * math.sqrt(3 * 8 * 8)  # each standard normal, independent of the others
    assert (torch.cov(means.T) - torch.eye(8)).abs().max() < 0.1
    assert means.mean(0).abs().max() < 0.07 and (means.pow(4).mean(0) - 3).abs().max() < 0.5


def test_places_of_training_scenes_are_even() -> None:
    turns = torch.tensor([places(scene) for scene in sample_scenes(600, 3, split="train")])
    assert turns.min() >= 0 and turns.max() < 1
    around = torch.polar(torch.ones(600, PLACES), 2 * math.pi * turns)
    assert (around.mean(0).abs() < 0.12).all() and (around.pow(2).mean(0).abs() < 0.12).all()


def test_places_are_those_of_the_scene() -> None:
    scene = replace(sample_scenes(1, 0)[0], start=(16.0, -8.0), view=1.5)
    assert places(scene) == pytest.approx((0.25, 0.875, 1.5 / PERIODS[scene.background] % 1))


def test_too_few_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="noise has 4 channels; 3 places take two each"):
        telling_noise(torch.randn(1, 4, 3, 8, 8), torch.rand(1, PLACES))
