"""How convolutions are cut into tiles: every channel once, within shared memory, few programs left over."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import triton  # noqa: E402

from rfengine.kernels.convolution_tile import ConvolutionSize, choose_channels, fit_tile, split_rows  # noqa: E402

KILO = 1024


@pytest.mark.parametrize("channels_out", [1, 3, 16, 40, 64, 96, 100, 128, 192, 384, 768])
@pytest.mark.parametrize("form", ["descriptor", "pointer"])
def test_rows_cover_the_channels_and_pad_least(form, channels_out):
    smallest = 64 if form == "descriptor" else 16
    for rows, tail in split_rows(channels_out, form):
        covered = triton.cdiv(channels_out, rows + tail) * (rows + tail)
        assert covered >= channels_out and covered % smallest == 0
        assert covered == triton.cdiv(channels_out, smallest) * smallest or covered < 1.6 * channels_out


def test_published_channels_are_cut_without_padding_where_instructions_allow():
    assert split_rows(192, "descriptor")[0] == split_rows(384, "descriptor")[0] == (128, 64)
    assert split_rows(96, "descriptor") == [(128, 0), (64, 0)]
    assert split_rows(96, "pointer")[0] == (64, 32)


@pytest.mark.parametrize(
    ("channels", "item", "expected"), [(384, 2, 64), (96, 2, 32), (24, 2, 32), (8, 2, 16), (384, 1, 128)]
)
def test_steps_divide_the_channels(channels, item, expected):
    assert choose_channels(channels, item, 128) == expected


@pytest.mark.parametrize("item", [1, 2])
@pytest.mark.parametrize("channels", [16, 96, 192, 384])
@pytest.mark.parametrize(("height", "width"), [(60, 104), (120, 208), (480, 832), (5, 7), (1080, 1920)])
def test_tiles_fit_shared_memory_and_registers(item, channels, height, width):
    size = ConvolutionSize(3, height, width, channels, channels)
    tile = fit_tile("descriptor", item, size, 132)
    pixels = tile.height * tile.width
    assert tile.stages * (tile.rows + tile.tail + pixels) * tile.channels * item <= 226 * KILO
    assert (tile.rows + tile.tail) * pixels // (32 * tile.warps) <= 192
    assert tile.height % 2 == tile.width % 2 == 0  # a block holds whole blocks of chroma


def test_large_frames_are_tiled_without_overhang():
    tile = fit_tile("descriptor", 2, ConvolutionSize(12, 480, 832, 96, 96), 132)
    assert (tile.rows, tile.tail, tile.height * tile.width) == (128, 0, 256)
    assert 480 % tile.height == 832 % tile.width == 0
