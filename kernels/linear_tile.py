"""The tile of the output that one program of linear.py computes: by the waves that a shape makes on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from rfengine.kernels.device import capability_of, count_processors


@dataclass(frozen=True, slots=True)
class Device:
    """What the choice of a tile depends on: shared_bytes are those one program may have."""

    processors: int
    shared_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile of the output and how it is computed; `stages` tiles of y and W are under way at once.

    rate: throughput beside the largest tile, from what a tile reads for each product, 1 / rows + 1 / columns
    (unmeasured).
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
    Tile(128, 128, 0, 64, 8, 3, 0.92),  # 96 KB: two programs for each multiprocessor
    Tile(64, 128, 0, 64, 4, 3, 0.8),
    Tile(64, 64, 0, 64, 4, 3, 0.65),
)
FLOAT32_TILE = Tile(64, 64, 0, 32, 4, 2, 1.0)  # without tensor cores: registers for 64 x 64 sums


def choose_tile(rows: int, columns: int, dtype: torch.dtype, device: Device) -> Tile:
    """The tile with the least time by count: tiles that the busiest multiprocessor does, times their area.

    At 4680 rows and 132 multiprocessors: 128 x 256 for 1536 and 8960 outputs (1.68 of 2 waves and 9.8 of 10),
    128 x 192 for 4608 (6.7 of 7, where 128 x 256 has 5.05 of 6).
    """
    if dtype == torch.float32:
        return FLOAT32_TILE

    def time(tile: Tile) -> float:
        width = tile.columns + tile.tail
        tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, width)
        return triton.cdiv(tiles, device.processors) * tile.rows * width / tile.rate

    widest = 256 if device.capability[0] in (9, 10) else 192  # sums of 256 columns fit registers beside WGMMA
    fitting = [
        replace(tile, stages=min(tile.stages, device.shared_bytes // tile.stage_bytes))
        for tile in TILES
        if tile.columns + tile.tail <= widest
    ]
    return min((tile for tile in fitting if tile.stages > 1), key=time)


def describe_device(device: torch.device) -> Device:
    capability = capability_of(device) or (0, 0)
    kilobytes = {8: 163 if capability in ((8, 0), (8, 7)) else 99, 9: 227, 10: 227}.get(capability[0], 99)
    return Device(count_processors(device), kilobytes * 1024, capability)
