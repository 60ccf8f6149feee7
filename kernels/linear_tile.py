"""The tile of the output that one program of linear.py computes: by the waves that a shape makes on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from rfengine.kernels.device import capability_of, count_processors, fill


@dataclass(frozen=True, slots=True)
class Device:
    """What the choice of a tile depends on: shared_bytes are those one program may have."""

    processors: int
    shared_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile of the output and how it is computed; `stages` tiles of y and W are under way at once.

    rate: throughput beside the largest tile, from what a tile reads for each product, 1 / rows + 1 / columns,
    and less for a tail of 32 columns, which reads its rows of y for a quarter of the products (unmeasured).
    """

    rows: int
    columns: int
    tail: int
    depth: int
    warps: int
    stages: int  # at most
    rate: float

    @property
    def stage_bytes(self) -> int:
        return (self.rows + self.columns + self.tail) * self.depth * 2


TILES = (
    Tile(128, 256, 0, 64, 8, 4, 1.0),
    Tile(128, 128, 64, 64, 8, 4, 0.97),
    Tile(128, 128, 32, 64, 8, 4, 0.85),
    Tile(128, 128, 0, 64, 8, 3, 0.92),  # 96 KB: two programs for each multiprocessor
    Tile(64, 128, 0, 64, 4, 3, 0.8),
    Tile(64, 64, 0, 64, 4, 3, 0.65),
)
# Of a multiprocessor of an H100 in a cycle: products in 16 bits by the data sheet, and bytes of L2
MULTIPLY_ADDS, L2_BYTES = 2048, 32
LAUNCH_CYCLES = 4000  # 2 us
FLOAT32_TILE = Tile(64, 64, 0, 32, 4, 2, 1.0)  # without tensor cores: registers for 64 x 64 sums


def choose_tile(rows: int, columns: int, dtype: torch.dtype, device: Device) -> Tile:
    """The tile that keeps the multiprocessors busiest by count (tile_fill), its rate included; unmeasured.
    docs/kernels.md has what it chooses for the published sizes."""
    if dtype == torch.float32:
        return FLOAT32_TILE
    widest = 256 if device.capability[0] in (9, 10) else 192  # sums of 256 columns fit registers beside WGMMA
    fitting = [
        replace(tile, stages=min(tile.stages, device.shared_bytes // tile.stage_bytes))
        for tile in TILES
        if tile.columns + tile.tail <= widest
    ]
    able = (tile for tile in fitting if tile.stages > 1)
    return max(able, key=lambda tile: tile.rate * tile_fill(tile, rows, columns, device.processors))


def tile_fill(tile: Tile, rows: int, columns: int, processors: int) -> float:
    """Share of the products in whole waves of `tile` that an output [rows, columns] needs."""
    width = tile.columns + tile.tail
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, width)
    return fill(rows * columns, programs, tile.rows * width, processors)


def count_whole_tiles(tile: Tile, tiles: int, inputs: int, device: Device) -> int:
    """How many tiles of a product in 16 bits have a program each: all, or all but those of the last,
    incomplete wave, which are cut along the inputs where that saves twice what it costs; on Hopper, and no
    tile with a tail.

    In cycles of a multiprocessor, computed and unmeasured. Saved: the part of the last wave that has no tiles
    for all. Cost: parts, one for each cut tile and one more for each share, written and read, and a launch.
    """
    cut = tiles % device.processors
    if device.capability[0] != 9 or tile.tail or not cut:
        return tiles
    filled = cut / device.processors
    products = tile.rows * tile.columns * tile.depth * triton.cdiv(inputs, tile.depth)
    saved = (1 - filled) * products / MULTIPLY_ADDS
    cost = 2 * (1 + filled) * tile.rows * tile.columns * 4 / L2_BYTES + LAUNCH_CYCLES
    return tiles - cut if saved > 2 * cost else tiles


def describe_device(device: torch.device) -> Device:
    capability = capability_of(device) or (0, 0)
    kilobytes = {8: 163 if capability in ((8, 0), (8, 7)) else 99, 9: 227, 10: 227}.get(capability[0], 99)
    return Device(count_processors(device), kilobytes * 1024, capability)
