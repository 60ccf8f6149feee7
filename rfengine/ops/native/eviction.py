"""evict_and_rephase of csrc/. Shapes: L layers, B batch, S tokens, H heads, E head dim."""

from __future__ import annotations

import torch
from torch import Tensor

from rfengine.ops.checks import require
from rfengine.ops.native.driver import Driver, load_driver
from rfengine.ops.native.operands import VECTOR_BYTES, check_addresses, check_device, layout, parameters

THREADS = 256  # of every block, as in csrc/scalars.cuh
# blocks of a launch: four waves of 8 blocks on each of 132 multiprocessors; unmeasured
TARGET_BLOCKS = 4096
MAX_GRID_Y = 65535
_SUFFIXES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


def evict_and_rephase(
    raw: Tensor, rotated: Tensor, values: Tensor, low_keys: Tensor | None, low_values: Tensor | None,
    rotation: Tensor, sink_tokens: int, leaving: int, alpha: float, driver: Driver | None = None,
) -> None:  # fmt: skip
    """reference.evict_and_rephase in one launch, bit for bit.

    Raises ValueError for what its 16-byte accesses cannot serve: the last three axes of an arena must be
    contiguous, the arenas alike in shape, dtype and strides, their addresses multiples of 16 bytes.
    """
    driver = driver or load_driver(raw.device)
    suffix = _suffix(raw)
    layers, batch, tokens, heads, head_dim = _arena("raw", raw)
    for name, arena in (("rotated", rotated), ("values", values)):
        _check_alike("raw", raw, name, arena)
    require(
        0 < sink_tokens <= leaving <= tokens - sink_tokens,
        lambda: (
            f"the chunk that leaves starts at token {leaving}; it lies from {sink_tokens} to "
            f"{tokens - sink_tokens}"
        ),
    )
    expected = (2, tokens, head_dim // 2)
    require(
        rotation.shape == expected and rotation.dtype == torch.float32 and rotation.is_contiguous(),
        lambda: f"rotation is {layout(rotation)}; it must be contiguous float32 {expected}",
    )
    low_strides = (0, 0)
    if low_keys is not None and low_values is not None:
        _check_alike("low_keys", low_keys, "low_values", low_values)
        expected = (layers, batch, sink_tokens, heads, head_dim)
        require(
            _arena("low_keys", low_keys) == expected and low_keys.dtype == raw.dtype,
            lambda: f"low_keys is {layout(low_keys)}; it must be {raw.dtype} {expected}",
        )
        low_strides = low_keys.stride()[:2]
    else:
        require(low_keys is low_values, lambda: "low_keys and low_values must both be given, or both be None")
    tensors = (raw, rotated, values, low_keys, low_values, rotation)
    check_device(driver, tensors)
    check_addresses(tensors)
    sizes = (layers, batch, tokens, heads, head_dim, sink_tokens, leaving)
    arguments = parameters(tensors, (*raw.stride()[:2], *low_strides), sizes, (alpha, 1 - alpha))
    columns = head_dim * raw.element_size() // VECTOR_BYTES
    driver.launch(f"evict_and_rephase_{suffix}", _grid(tokens * columns, layers * batch), THREADS, arguments)


def _grid(threads: int, rows: int) -> tuple[int, int]:
    """Blocks for `threads` threads, and the rows that run side by side; a thread loops over the others."""
    blocks = -(-threads // THREADS)
    return blocks, max(1, min(rows, -(-TARGET_BLOCKS // blocks), MAX_GRID_Y))


def _check_alike(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    alike = (tensor.shape, tensor.dtype, tensor.stride()) == (other.shape, other.dtype, other.stride())
    require(alike, lambda: f"{other_name} is {layout(other)} and {name} {layout(tensor)}; they must be alike")


def _suffix(tensor: Tensor) -> str:
    require(
        tensor.dtype in _SUFFIXES,
        lambda: f"the native kernels serve bfloat16, float16 and float32, not {tensor.dtype}",
    )
    return _SUFFIXES[tensor.dtype]


def _arena(name: str, arena: Tensor) -> torch.Size:
    require(arena.ndim == 5, lambda: f"{name} is {tuple(arena.shape)}; it must be [L, B, S, H, E]")
    heads, head_dim = arena.shape[3:]
    dense = arena.stride()[2:] == (heads * head_dim, head_dim, 1)
    require(dense, lambda: f"{name} is {layout(arena)}; its last three axes must be contiguous")
    lanes = VECTOR_BYTES // arena.element_size()
    whole = head_dim % lanes == 0 and all(stride % lanes == 0 for stride in arena.stride()[:2])
    require(
        whole,
        lambda: (
            f"{name} is {layout(arena)}; head dim and strides must be multiples of {lanes}, for 16-byte "
            "accesses"
        ),
    )
    return arena.shape
