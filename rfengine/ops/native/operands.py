"""What every native kernel asks of its tensors, and how they become parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from rfengine.ops.native.driver import Driver
from rfengine.ops.native.tensor_map import TensorMap

if TYPE_CHECKING:
    from numpy import generic

VECTOR_BYTES = 16


def parameters(
    tensors: tuple[Tensor | None, ...],
    strides: tuple[int, ...],
    sizes: tuple[int, ...],
    factors: tuple[float, ...] = (),
    maps: tuple[TensorMap, ...] = (),
) -> tuple[generic | TensorMap, ...]:
    """Every kernel's parameters: tensor maps, pointers, strides (int64), sizes (int32), factors (float32), in
    this order."""
    import numpy

    return (
        *maps,
        *(numpy.uint64(0 if tensor is None else tensor.data_ptr()) for tensor in tensors),
        *map(numpy.int64, strides),
        *map(numpy.int32, sizes),
        *map(numpy.float32, factors),
    )


def layout(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"


def check_device(driver: Driver, tensors: tuple[Tensor | None, ...]) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.device != driver.device:
            raise ValueError(
                f"a tensor is on {tensor.device} but the kernels on {driver.device}; move it there"
            )


def check_addresses(tensors: tuple[Tensor | None, ...]) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.data_ptr() % VECTOR_BYTES:
            raise ValueError(
                f"a tensor starts at address {tensor.data_ptr()}; it must be a multiple of {VECTOR_BYTES}"
            )
