"""causal_conv3d of csrc/, on Hopper alone. T frames, H rows and W columns of pixels, channels last."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rfengine.ops.checks import require
from rfengine.ops.native.driver import Driver, load_driver
from rfengine.ops.native.operands import check_device, layout, parameters
from rfengine.ops.native.tensor_map import TensorMap

THREADS = 384  # of every block, as in csrc/causal_conv3d.cuh
KERNEL = (3, 3, 3)
_SUFFIXES = {torch.bfloat16: "bf16", torch.float16: "f16"}
_HOPPER = (9, 0)


@dataclass(frozen=True, slots=True)
class Tile:
    """A form of the kernel, as in csrc/causal_conv3d.cuh: what a block computes at one time, `columns`
    channels out of `frames` of height x width pixels, from `chunk` channels in at one time."""

    columns: int
    chunk: int
    frames: int
    height: int
    width: int
    shared_bytes: int

    def count(self, frames: int, height: int, width: int, channels_out: int) -> int:
        """Tiles of a result; those that overhang it count whole."""
        sizes = ((frames, self.frames), (height, self.height), (width, self.width))
        tiles = channels_out // self.columns
        for size, step in sizes:
            tiles *= -(-size // step)
        return tiles


# the first whose multiples the channels are
TILES = (
    Tile(columns=192, chunk=64, frames=2, height=8, width=16, shared_bytes=230_560),
    Tile(columns=96, chunk=32, frames=2, height=16, width=16, shared_bytes=222_560),
)


def tile_of(channels_out: int, channels: int) -> Tile | None:
    """The form that serves so many channels, if there is one."""
    for tile in TILES:
        if channels_out % tile.columns == 0 and channels % tile.chunk == 0:
            return tile
    return None


def unserved(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    """Why the kernel cannot convolve by a weight of `shape` in `dtype` on `device`, or ""."""
    if dtype not in _SUFFIXES:
        return f"the native convolution serves bfloat16 and float16, not {dtype}"
    channels_out, channels, *kernel = shape
    if tuple(kernel) != KERNEL or tile_of(channels_out, channels) is None:
        forms = " or ".join(f"a multiple of {t.chunk} to a multiple of {t.columns}" for t in reversed(TILES))
        return (
            f"the native convolution has a kernel of 3x3x3 and channels from {forms}, not a weight of "
            f"{tuple(shape)}"
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) != _HOPPER:
        return f"the native convolution is made for GPUs of capability 9.0, which {device} is not"
    return ""


def causal_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None, driver: Driver | None = None
) -> Tensor:
    """reference.causal_conv3d in one launch, with float32 sums that are rounded once.

    x, weight and bias are alike in dtype; weight lies in memory as [Cout, kt, kh, kw, Cin], and out may have
    any strides but the last. Raises ValueError for what `unserved` says and for other layouts.
    """
    driver = driver or load_driver(x.device)
    reason = unserved(weight.shape, x.dtype, x.device)
    require(not reason, lambda: f"{reason}; use another backend")
    _check_layout(x, weight, bias)
    out = _output_of(x, weight, out)
    check_device(driver, (x, weight, bias, out))
    channels_out, channels = weight.shape[:2]
    tile = tile_of(channels_out, channels)
    assert tile is not None, "unserved() has tried it"
    sizes = (*out.shape[:3], channels, channels_out)
    tiles = tile.count(*out.shape)
    if tiles == 0:
        return out
    matrix = weight.movedim(1, -1).reshape(channels_out, -1)
    maps = (
        TensorMap.of("x", x, (1, tile.height + 2, tile.width, tile.chunk)),
        TensorMap.of("weight", matrix, (tile.columns, tile.chunk)),
    )
    arguments = parameters((bias, out), out.stride()[:3], (*sizes, tiles), maps=maps)
    kernel = f"causal_conv3d_{tile.columns}_{_SUFFIXES[x.dtype]}"
    driver.launch(kernel, (min(tiles, driver.processors), 1), THREADS, arguments, tile.shared_bytes)
    return out


def _check_layout(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    require(
        weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype),
        lambda: (
            f"x is {x.dtype}, weight {weight.dtype} and bias {bias if bias is None else bias.dtype}; they "
            "must be alike"
        ),
    )
    require(
        weight.movedim(1, -1).is_contiguous(),
        lambda: (
            f"weight is {layout(weight)}; it must lie in memory as [Cout, kt, kh, kw, Cin]: call "
            "contiguous(memory_format=torch.channels_last_3d)"
        ),
    )
    require(bias is None or bias.is_contiguous(), lambda: f"bias is {layout(bias)}; it must be contiguous")


def _output_of(x: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
    """`out`, or a new tensor [T, H, W, Cout]."""
    shape = (x.shape[0] - KERNEL[0] + 1, *x.shape[1:3], weight.shape[0])
    if out is None:
        return x.new_empty(shape)
    require(
        tuple(out.shape) == shape and out.dtype == x.dtype and out.stride(3) == 1,
        lambda: f"out is {layout(out)}; it must be {x.dtype} {shape} with contiguous channels",
    )
    return out
