"""Noise that tells what a caption leaves open is noise like any other, and what it tells can be read."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from recipes.tiny.noise import PLACES, VALUES, all_open, places, telling_noise, told_coordinates, told_values
from recipes.tiny.videos import TRAINED_WORLD
from rfengine.toy.backgrounds import PERIODS
from rfengine.toy.captions import sample_scenes
from rfengine.toy.data import open_scene
from rfengine.toy.world import Scene, SceneObject

SHAPE = (8, 3, 8, 8)  # channels, frames, height, width
WHOLE = Scene((SceneObject("green", "square", "large"),), "moving", "fast", "up", "dotted wall")


def read_places(noise: torch.Tensor) -> torch.Tensor:
    """The places [B, PLACES] that noise [B, C, F, h, w] tells, in turns."""
    means = noise[:, : 2 * PLACES].double().mean((2, 3, 4)).unflatten(1, (PLACES, 2))
    return torch.atan2(means[..., 1], means[..., 0]) / (2 * math.pi) % 1


def nothing_told(count: int) -> torch.Tensor:
    return torch.full((count, len(VALUES)), torch.nan)


def test_places_are_read_from_the_noise_and_nothing_else_of_it_changes() -> None:
    torch.manual_seed(0)
    noise, turns = torch.randn(50, *SHAPE), torch.rand(50, PLACES)
    found = telling_noise(noise, turns, nothing_told(50))
    apart = ((read_places(found) - turns + 0.5) % 1 - 0.5).abs()
    assert found.shape == noise.shape and apart.max() < 1e-5
    torch.testing.assert_close(found[:, 2 * PLACES :], noise[:, 2 * PLACES :])
    without = [part - part.mean((2, 3, 4), keepdim=True) for part in (found, noise)]
    torch.testing.assert_close(*without)
    lengths = [part.mean((2, 3, 4)).unflatten(1, (-1, 2)).norm(dim=2) for part in (found, noise)]
    torch.testing.assert_close(*lengths)


def test_values_are_read_from_the_noise_where_they_are_told() -> None:
    torch.manual_seed(0)
    noise, turns, values = torch.randn(50, *SHAPE), torch.rand(50, PLACES), torch.randn(50, len(VALUES))
    values[::2, 1], values[1::2, 2] = torch.nan, torch.nan
    found = telling_noise(noise, turns, values)
    assert torch.isfinite(found).all()
    # the first value is the mean of channel 6, the second of channel 7, the third the change of channel 0
    assert torch.allclose(found[:, 6].mean((1, 2, 3)) * math.sqrt(3 * 64), values[:, 0], atol=1e-5)
    for coordinate, told in ((1, slice(1, None, 2)), (2, slice(0, None, 2))):
        kept = slice(1 - (told.start or 0), None, 2)
        of = [
            part[:, 7].mean((1, 2, 3)) * math.sqrt(3 * 64)
            if coordinate == 1
            else (part[:, 0, 0] - part[:, 0, 2]).mean((1, 2)) * math.sqrt(64 / 2)
            for part in (found, noise)
        ]
        assert torch.allclose(of[0][told], values[told, coordinate], atol=1e-5)
        assert torch.allclose(of[0][kept], of[1][kept], atol=1e-5)
    torch.testing.assert_close(telling_noise(found, turns, values), found)


def test_noise_that_tells_of_training_scenes_is_standard_normal() -> None:
    count, generator = 4000, torch.Generator().manual_seed(1)
    scenes = sample_scenes(count, 5, TRAINED_WORLD, "train")
    turns = torch.tensor([places(scene, TRAINED_WORLD) for scene in scenes])
    assert turns.min() >= 0 and turns.max() < 1
    opens = [all_open(scene) for scene in scenes]
    parts = torch.tensor([told_values(*pair, TRAINED_WORLD) for pair in zip(scenes, opens, strict=True)])
    noise = torch.randn(count, *SHAPE, generator=generator)
    found = telling_noise(noise, turns, told_coordinates(parts, generator))
    means = found.mean((2, 3, 4)) * math.sqrt(3 * 64)
    change = (found[:, :, 0] - found[:, :, 2]).mean((2, 3)) * math.sqrt(64 / 2)
    coordinates = torch.cat([means, change], dim=1)
    assert (torch.cov(coordinates.T) - torch.eye(16)).abs().max() < 0.12
    assert coordinates.mean(0).abs().max() < 0.07 and (coordinates.pow(4).mean(0) - 3).abs().max() < 0.5


@pytest.mark.parametrize("ways", [all_open, lambda scene: open_scene(scene, random.Random(str(scene)))])
def test_every_value_that_is_told_has_its_share_of_the_range(ways) -> None:
    scenes = sample_scenes(6000, 6, TRAINED_WORLD, "train")
    parts = torch.tensor([told_values(scene, ways(scene), TRAINED_WORLD) for scene in scenes]).double()
    generator = torch.Generator().manual_seed(0)
    inside = torch.special.ndtr(told_coordinates(parts, generator).double())
    for index, name in enumerate(VALUES):
        told = inside[~inside[:, index].isnan(), index].sort().values
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


def test_a_view_of_several_waves_is_told_as_a_turn_of_the_strongest_and_the_number_of_its_cycle() -> None:
    scene = replace(WHOLE, background="grassy meadow", view=130.0)  # 5.6875 of the seven cycles in 160 pixels
    assert places(scene, TRAINED_WORLD)[2] == pytest.approx(0.6875)
    told = dict(zip(VALUES, told_values(scene, scene, TRAINED_WORLD), strict=True))
    assert told.pop("cycle") == pytest.approx((5 / 7, 6 / 7))
    assert all(math.isnan(bound) for part in told.values() for bound in part)


def test_too_few_coordinates_are_refused() -> None:
    with pytest.raises(ValueError, match="noise has 4 channels and 3 frames; what it tells takes 19"):
        telling_noise(torch.randn(1, 4, 3, 8, 8), torch.rand(1, PLACES), nothing_told(1))
