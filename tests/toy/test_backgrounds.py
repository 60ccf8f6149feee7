"""Backgrounds without end."""

import itertools

import pytest
import torch

from rfengine.toy.backgrounds import BACKGROUNDS, PERIODS, PLAIN, TINT, draw_background


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_a_view_is_the_plane_further_on(name: str):
    first, later = draw_background(name, torch.tensor([5.0, 12.0]), 64, 64, 1.0)
    torch.testing.assert_close(later[:, :-7], first[:, 7:], atol=1e-5, rtol=0)
    again = draw_background(name, torch.tensor([5.0 + 3 * PERIODS[name]]), 64, 64, 1.0)[0]
    torch.testing.assert_close(again, first, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [name for name in BACKGROUNDS if name != PLAIN])
def test_no_background_repeats_with_the_frame(name: str):
    first, later = draw_background(name, torch.tensor([0.0, 64.0]), 64, 64, 1.0)
    assert float((first - later).abs().mean()) > 0.01


def test_backgrounds_differ_from_each_other_and_are_hardly_coloured():
    drawn = [draw_background(name, torch.zeros(1), 64, 64, 1.0)[0] for name in BACKGROUNDS]
    for image in drawn:
        assert image.shape == (64, 64, 3)
        assert float(image.min()) > 0.3 and float(image.max()) < 0.75
        assert float((image.amax(-1) - image.amin(-1)).max()) < TINT + 1e-6
    for one, other in itertools.combinations(drawn, 2):
        assert float((one - other).abs().mean()) > 0.02


def test_a_larger_frame_shows_the_same_at_more_pixels():
    for name in BACKGROUNDS:
        small = draw_background(name, torch.tensor([3.0]), 64, 64, 1.0)
        large = draw_background(name, torch.tensor([3.0]), 128, 128, 2.0)
        pooled = large.unflatten(1, (64, 2)).unflatten(3, (64, 2)).mean((2, 4))
        torch.testing.assert_close(pooled, small, atol=0.02, rtol=0)
