"""Noise that tells what a caption leaves open is noise like any other, and what it tells can be read."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from recipes.tiny.noise import PLACES, VALUES, all_open, places, telling_noise, told_turns, told_values
from recipes.tiny.videos import TRAINED_WORLD
from rfengine.toy.backgrounds import PERIODS
from rfengine.toy.captions import sample_scenes
from rfengine.toy.data import open_scene
from rfengine.toy.world import Scene, SceneObject

SHAPE = (8, 3, 8, 8)  # channels, frames, height, width
WHOLE = Scene((SceneObject("green", "square", "large"),), "moving", "fast", "up", "dotted wall")


def coordinates_of(noise: torch.Tensor) -> torch.Tensor:
    """[B, 4 * C]: of noise [B, C, F, h, w] the sums with four patterns of signs in two by two cells."""
    cells = noise.double().sum(2).unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).sum((2, 4))  # [B, C, 2, 2]
    (one, two), (three, four) = (part.unbind(2) for part in cells.unbind(2))
    sums = [
        one + two + three + four,
        one - two + three - four,
        one + two - three - four,
        one - two - three + four,
    ]
    return torch.cat(sums, 1) / math.sqrt(noise[0, 0].numel())


def told_by(noise: torch.Tensor) -> torch.Tensor:
    """The places and values [B, PLACES + VALUES] that noise tells, in turns."""
    pairs = coordinates_of(noise).unflatten(1, (-1, 2))[:, : PLACES + len(VALUES)]
    return torch.atan2(pairs[..., 1], pairs[..., 0]) / (2 * math.pi) % 1


def apart(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return ((one - other + 0.5) % 1 - 0.5).abs()


def test_places_and_values_are_read_from_the_noise_and_nothing_else_of_it_changes() -> None:
    torch.manual_seed(0)
    noise, turns = torch.randn(50, *SHAPE), torch.rand(50, PLACES)
    values = 3 * torch.rand(50, len(VALUES)) - 1
    values[::2, 1], values[1::2, 2] = torch.nan, torch.nan
    found = telling_noise(noise, turns, values)
    told = torch.cat([turns, values], 1)
    is_told = ~told.isnan()
    assert apart(told_by(found), told)[is_told].max() < 1e-5
    assert apart(told_by(found), told_by(noise))[~is_told].max() < 1e-5
    lengths = [coordinates_of(part).unflatten(1, (-1, 2)).norm(dim=2) for part in (found, noise)]
    torch.testing.assert_close(*lengths, rtol=0, atol=1e-5)
    change = (found - noise).unflatten(4, (4, 2)).unflatten(3, (4, 2))
    torch.testing.assert_close(change, change[:, :, :1, :1, :, :1].expand_as(change), rtol=0, atol=1e-5)
    torch.testing.assert_close(telling_noise(found, turns, values), found, rtol=0, atol=1e-5)


def test_noise_that_tells_of_training_scenes_is_standard_normal() -> None:
    count, generator = 4000, torch.Generator().manual_seed(1)
    scenes = sample_scenes(count, 5, TRAINED_WORLD, "train")
    turns = torch.tensor([places(scene, TRAINED_WORLD) for scene in scenes])
    assert turns.min() >= 0 and turns.max() <= 1
    opens = [all_open(scene) for scene in scenes]
    parts = torch.tensor([told_values(*pair, TRAINED_WORLD) for pair in zip(scenes, opens, strict=True)])
    noise = torch.randn(count, *SHAPE, generator=generator)
    coordinates = coordinates_of(telling_noise(noise, turns, told_turns(parts, generator)))
    assert (torch.cov(coordinates.T) - torch.eye(32)).abs().max() < 0.12
    assert coordinates.mean(0).abs().max() < 0.07 and (coordinates.pow(4).mean(0) - 3).abs().max() < 0.5


@pytest.mark.parametrize("ways", [all_open, lambda scene: open_scene(scene, random.Random(str(scene)))])
def test_every_value_that_is_told_has_its_share_of_the_range(ways) -> None:
    scenes = sample_scenes(6000, 6, TRAINED_WORLD, "train")
    parts = torch.tensor([told_values(scene, ways(scene), TRAINED_WORLD) for scene in scenes]).double()
    generator = torch.Generator().manual_seed(0)
    turns = told_turns(parts, generator) % 1
    for index, name in enumerate(VALUES):
        told = turns[~turns[:, index].isnan(), index].sort().values
        even = (torch.arange(len(told)) + 0.5) / max(1, len(told))
        if name == "second size":
            assert not len(told)  # both of a pair are small
        else:
            assert len(told) > 60 and (told - even).abs().max() < 1.8 / math.sqrt(len(told)), name


def test_what_is_said_is_not_told() -> None:
    assert all(math.isnan(bound) for part in told_values(WHOLE, WHOLE, TRAINED_WORLD) for bound in part)
    said = replace(WHOLE, objects=(replace(WHOLE.objects[0], colour=None),), speed=None)
    told = dict(zip(VALUES, told_values(WHOLE, said, TRAINED_WORLD), strict=True))
    assert told["colour"] == pytest.approx((0.2, 0.4)) and told["speed"] == pytest.approx((0.5, 1))
    assert [name for name in VALUES if not math.isnan(told[name][0])] == ["colour", "speed"]


def test_a_colour_that_is_taken_has_no_part() -> None:
    pair = replace(
        WHOLE, objects=(SceneObject("red", "square", "small"), SceneObject("green", "circle", "small"))
    )
    one = replace(pair, objects=(pair.objects[0], replace(pair.objects[1], colour=None)))
    told = dict(zip(VALUES, told_values(pair, one, TRAINED_WORLD), strict=True))
    assert told["second colour"] == pytest.approx((0, 0.25)) and math.isnan(told["colour"][0])


def test_places_are_those_of_the_scene() -> None:
    scene = replace(WHOLE, start=(16.0, -8.0), view=1.5)
    expected = (0.25, 0.875, 1.5 / PERIODS["dotted wall"] % 1)
    assert places(scene, TRAINED_WORLD) == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(7, 3, 8, 8), (8, 3, 7, 8), (8, 3, 8, 7)])
def test_too_few_coordinates_are_refused(shape: tuple[int, ...]) -> None:
    message = f"noise has {shape[0]} channels of {shape[2]}x{shape[3]} cells; what it tells takes 30"
    with pytest.raises(ValueError, match=message):
        telling_noise(torch.randn(1, *shape), torch.rand(1, PLACES), torch.full((1, len(VALUES)), torch.nan))
