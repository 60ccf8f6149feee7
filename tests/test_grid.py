from __future__ import annotations

import dataclasses

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfengine.grid import LatentGrid
from rfengine.presets import PRESETS

WAN = PRESETS["wan-1.3b"]


def test_published_size_gives_the_published_counts() -> None:
    grid = LatentGrid.of(WAN)
    assert (grid.height, grid.width) == (480, 832)
    assert (grid.latent_height, grid.latent_width) == (60, 104)
    assert (grid.token_rows, grid.token_columns) == (30, 52)
    assert grid.frame_tokens == 1560


def test_height_and_width_given_replace_those_of_the_configuration() -> None:
    grid = LatentGrid.of(WAN, height=832, width=480)
    assert (grid.token_rows, grid.token_columns) == (52, 30)
    assert LatentGrid.of(WAN, height=320).width == 832


def test_strides_come_from_the_configuration() -> None:
    vae = dataclasses.replace(WAN.vae, dim_mult=(1, 2), temporal_downsample=(True,))
    grid = LatentGrid.of_parts(dataclasses.replace(WAN.model, patch_size=(1, 1, 1)), vae, 6, 10)
    assert (grid.spatial_stride, grid.temporal_stride, grid.patch) == (2, 2, 1)
    assert (grid.latent_height, grid.latent_width, grid.frame_tokens) == (3, 5, 15)
    assert grid.pixel_frames(3) == 5


@pytest.mark.parametrize("height, near", [(1, 16), (479, 480), (473, 480), (471, 464), (-16, 16)])
def test_size_off_the_grid_is_refused_with_the_nearest_one(height: int, near: int) -> None:
    with pytest.raises(ValueError, match=rf"height is {height} pixels.* multiple of 16, such as {near}$"):
        LatentGrid(height, 832)


def test_width_off_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="width is 830 pixels"):
        LatentGrid(480, 830)


def test_size_above_the_limit_is_refused_with_the_limit() -> None:
    for size in (8208, 65536, 2**64, -(2**64), 10**5000):
        with pytest.raises(ValueError, match="height is .* pixels; use at most 8192$"):
            LatentGrid.of(WAN, height=size)


def test_size_that_is_no_integer_is_refused_and_one_of_numpy_is_taken() -> None:
    assert LatentGrid.of(WAN, numpy.int64(480), numpy.int16(832)) == LatentGrid.of(WAN)
    for wrong in (480.0, True, "480", float("nan")):
        with pytest.raises(ValueError, match="width is .*; it must be an integer"):
            LatentGrid.of(WAN, width=wrong)
        with pytest.raises(ValueError, match="width is .*; it must be an integer"):
            LatentGrid(480, wrong)


def test_patches_that_are_not_square_are_refused() -> None:
    with pytest.raises(ValueError, match="must be square"):
        LatentGrid.of_parts(dataclasses.replace(WAN.model, patch_size=(1, 2, 4)), WAN.vae, 480, 832)


@pytest.mark.parametrize("latents, pixels", [(0, 0), (1, 1), (2, 5), (3, 9), (6, 21), (21, 81), (120, 477)])
def test_first_latent_gives_one_pixel_frame_and_each_later_one_four(latents: int, pixels: int) -> None:
    grid = LatentGrid.of(WAN)
    assert grid.pixel_frames(latents) == pixels
    assert grid.latent_frames(pixels) == latents


@given(st.integers(min_value=1, max_value=10**6))
def test_latent_frames_are_the_fewest_that_cover_the_pixel_frames(pixels: int) -> None:
    grid = LatentGrid.of(WAN)
    latents = grid.latent_frames(pixels)
    assert grid.pixel_frames(latents - 1) < pixels <= grid.pixel_frames(latents)
