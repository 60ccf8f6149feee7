"""Tensor maps, which tell the tensor memory accelerator (TMA) of a GPU how a tensor lies in memory.

The driver library encodes one on the host, in 128 bytes that a launch passes by value; so a recorded graph
keeps a copy of its own.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from rfengine.ops.checks import require

MAP_BYTES = 128  # sizeof(CUtensorMap)
_MAP_ALIGNMENT = 64
_ALIGNMENT = 16  # bytes, of the address and the strides
_LARGEST_STRIDE = 2**40  # bytes; strides are smaller
_FORMATS = {torch.float16: 6, torch.bfloat16: 9}  # CU_TENSOR_MAP_DATA_TYPE_FLOAT16, _BFLOAT16
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}  # CU_TENSOR_MAP_SWIZZLE_NONE, _32B, _64B, _128B
_NO_INTERLEAVE = 0
_PROMOTE_TO_128_BYTES = 2  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B
_FILL_WITH_ZEROS = 0  # CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE


@dataclass(frozen=True, slots=True)
class TensorMap:
    """Boxes of a tensor in device memory. sizes, strides (in bytes) and box are by axis, the contiguous one
    first; it is swizzled in shared memory over rows of swizzle_bytes, those of the box."""

    address: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle_bytes: int

    @classmethod
    def of(cls, name: str, tensor: Tensor, box: tuple[int, ...]) -> TensorMap:
        """Boxes of the size of `box`, its axes in the order of the tensor's.

        Raises ValueError, by `name`, for a layout that TMA cannot read.
        """
        item = tensor.element_size()
        lanes = _ALIGNMENT // item
        strides: list[int] = []
        below = tensor.shape[-1]
        for size, stride in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1]), strict=True):
            # an axis of one element has any stride in torch; here that of a dense tensor
            strides.append(stride if size > 1 else -(-below // lanes) * lanes)
            below = size * strides[-1]
        require(
            tensor.stride(-1) == 1
            and all(stride % lanes == 0 and 0 < stride * item < _LARGEST_STRIDE for stride in strides),
            lambda: (
                f"{name} is {tuple(tensor.shape)} with strides {tensor.stride()}; all but the last must be "
                f"multiples of {lanes} and that one 1: call contiguous()"
            ),
        )
        require(
            tensor.data_ptr() % _ALIGNMENT == 0,
            lambda: (
                f"{name} starts at address {tensor.data_ptr()}; it must be a multiple of {_ALIGNMENT}: call "
                "clone()"
            ),
        )
        sizes, box = tuple(reversed(tensor.shape)), tuple(reversed(box))
        strides_bytes = tuple(stride * item for stride in strides)
        return cls(tensor.data_ptr(), tensor.dtype, sizes, strides_bytes, box, box[0] * item)

    def encode(self) -> bytes:
        """The CUtensorMap. Raises RuntimeError where the driver refuses it."""
        rank = len(self.sizes)
        memory = ctypes.create_string_buffer(MAP_BYTES + _MAP_ALIGNMENT)
        place = -(-ctypes.addressof(memory) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
        failure = driver_library().cuTensorMapEncodeTiled(
            ctypes.c_void_p(place), _FORMATS[self.dtype], ctypes.c_uint32(rank),
            ctypes.c_void_p(self.address),
            (ctypes.c_uint64 * rank)(*self.sizes), (ctypes.c_uint64 * (rank - 1))(*self.strides),
            (ctypes.c_uint32 * rank)(*self.box), (ctypes.c_uint32 * rank)(*[1] * rank),
            _NO_INTERLEAVE, _SWIZZLES[self.swizzle_bytes], _PROMOTE_TO_128_BYTES, _FILL_WITH_ZEROS,
        )  # fmt: skip
        if failure:
            raise RuntimeError(f"the driver refuses {self} with CUDA error {failure}; use another backend")
        return ctypes.string_at(place, MAP_BYTES)


@cache
def driver_library() -> ctypes.CDLL:
    """libcuda, which every process with a CUDA context has loaded."""
    return ctypes.CDLL("libcuda.so.1")
