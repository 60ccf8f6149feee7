"""A driver that runs csrc/causal_conv3d.cuh on the emulated multiprocessor of emulated_hopper.hpp."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from rfengine.ops.native.tensor_map import TensorMap

ROOT = Path(__file__).resolve().parents[2]
C_TYPES = {"uint64": ctypes.c_void_p, "int64": ctypes.c_longlong, "int32": ctypes.c_int}
TILE_FIELDS = (
    "columns", "chunk", "frames", "height", "width", "slabs", "taps", "shared_bytes", "threads",
)  # fmt: skip


@dataclass(frozen=True)
class Emulation:
    """How the multiprocessor runs, and how it is broken; as in emulated_hopper.hpp."""

    late_copies: int = 1
    late_products: int = 1
    seed: int = 0
    first_xor: int = 0
    second_xor: int = 0
    lost_waits: tuple[int, int] = (0, 0)
    flipped_waits: tuple[int, int] = (0, 0)
    lost_arrivals: tuple[int, int] = (0, 0)
    lost_product_waits: int = 0
    lost_begins: int = 0
    lost_warp_waits: int = 0
    more_bytes: int = 0

    def encode(self) -> ctypes.Structure:
        encoded = _Emulation()
        for field in fields(self):
            value = getattr(self, field.name)
            setattr(encoded, field.name, (ctypes.c_int * 2)(*value) if isinstance(value, tuple) else value)
        return encoded


class _Emulation(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("late_copies", "late_products", "seed")),
        *((name, ctypes.c_ulonglong) for name in ("first_xor", "second_xor")),
        *((name, ctypes.c_int * 2) for name in ("lost_waits", "flipped_waits", "lost_arrivals")),
        *((name, ctypes.c_int) for name in ("lost_product_waits", "lost_begins", "lost_warp_waits")),
        ("more_bytes", ctypes.c_int),
    ]


class _EmulatedMap(ctypes.Structure):
    _fields_ = [
        ("address", ctypes.c_void_p), ("rank", ctypes.c_int), ("swizzle_bytes", ctypes.c_int),
        ("sizes", ctypes.c_longlong * 4), ("strides", ctypes.c_longlong * 4), ("box", ctypes.c_int * 4),
    ]  # fmt: skip


def _encoded(tensor_map: TensorMap) -> _EmulatedMap:
    rank = len(tensor_map.sizes)
    return _EmulatedMap(
        tensor_map.address, rank, tensor_map.swizzle_bytes,
        (ctypes.c_longlong * 4)(*tensor_map.sizes), (ctypes.c_longlong * 4)(2, *tensor_map.strides),
        (ctypes.c_int * 4)(*tensor_map.box),
    )  # fmt: skip


def build_library(folder: Path) -> Path:
    library = folder / "convolution.so"
    command = ["nvcc", "-x", "c++", "-std=c++17", "-O3", "-shared", "--cudart=none", "-I", str(ROOT / "csrc")]
    command += ["-Xcompiler", "-fPIC,-ffp-contract=off,-Wno-unknown-pragmas"]
    source = ROOT / "tests" / "support" / "causal_conv3d_host.cpp"
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    return library


class EmulatedDriver:
    """Runs its launches on a device with `processors` emulated multiprocessors, one after the other.

    change: what becomes of each tensor map before it is used, by its place among the arguments.
    """

    device = torch.device("cpu")

    def __init__(
        self, library: Path, emulation: Emulation | None = None, processors: int = 2,
        change: Callable[[int, TensorMap], TensorMap] = lambda _, tensor_map: tensor_map,
    ) -> None:  # fmt: skip
        self.processors, self.emulation = processors, emulation or Emulation()
        self.launches: list[tuple[str, tuple[int, int], int, tuple[Any, ...], int]] = []
        self.counts = (ctypes.c_longlong * 2)()  # bytes copied to shared memory, products
        self._library, self._change = ctypes.CDLL(str(library)), change

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int],
        block: int,
        arguments: tuple[Any, ...],
        shared_bytes: int = 0,
    ) -> None:
        """Raises RuntimeError for what must not be on the device."""
        self.launches.append((kernel, grid, block, arguments, shared_bytes))
        tile = self.tile(kernel)
        assert (block, shared_bytes) == (tile["threads"], tile["shared_bytes"])
        converted = [
            ctypes.byref(_encoded(self._change(place, each)))
            if isinstance(each, TensorMap)
            else C_TYPES[each.dtype.name](each.item())
            for place, each in enumerate(arguments)
        ]
        run = self._library[kernel]
        run.restype = ctypes.c_char_p
        error = run(ctypes.byref(self.emulation.encode()), self.counts, ctypes.c_int(grid[0]), *converted)
        if error is not None:
            raise RuntimeError(error.decode())

    def tile(self, kernel: str) -> dict[str, int]:
        """The constants of a kernel's tile."""
        sizes = (ctypes.c_int * len(TILE_FIELDS))()
        self._library[f"{kernel}_tile"](sizes)
        return dict(zip(TILE_FIELDS, sizes, strict=True))
