"""What several launches depend on: the device, the layout of a tensor, the size of a row.

Capabilities are those of CUDA; Triton's interpreter, on a CPU, has none.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Compute capability, such as (9, 0); None in the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


FP8_CAPABILITY = (8, 9)


def require_fp8(capability: tuple[int, int] | None) -> None:
    """RuntimeError for a GPU of a compute capability without FP8; the interpreter, which has none, has it."""
    if capability is not None and capability < FP8_CAPABILITY:
        raise RuntimeError(
            f"this GPU has compute capability {capability[0]}.{capability[1]} and FP8 comes with "
            f"{FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]}; use 16 bits on it"
        )


def count_processors(device: torch.device) -> int:
    """Multiprocessors; 4 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def fill(wanted: int, programs: int, size: int, processors: int) -> float:
    """Share of the work that whole waves of programs of `size` could do which is wanted, by count alone.

    A multiprocessor is counted as doing one program at a time; wanted and size: results of all, and of one.
    """
    return wanted / (triton.cdiv(programs, processors) * processors * size)


def fits_descriptor(tensor: Tensor) -> bool:
    """Whether TMA can read a tensor: its start and every stride but the last are multiples of 16 bytes, and
    its last axis is contiguous."""
    item = tensor.element_size()
    aligned = all(stride * item % 16 == 0 for stride in tensor.stride()[:-1])
    return aligned and tensor.data_ptr() % 16 == 0 and tensor.stride(-1) == 1


def row_launch(dim: int) -> tuple[int, int]:
    """The block, `dim` rounded up to a power of two, and num_warps for rows of `dim`, a row to a program.

    16 elements of every vector to a thread: two 16-byte loads in bf16, and the sums of the backward pass with
    a gate fit the registers: nothing spills on sm_90 except that pass in float32 at 5120. Not timed on a GPU.
    """
    block = triton.next_power_of_2(dim)
    return block, min(max(block // 512, 1), 16)


def rows_per_program(width: int) -> int:
    """Rows of `width` elements in one tile: 4096 elements, so that each of 128 threads has 32 of them, four
    16-byte loads of every 16-bit tensor in flight, in about 50 registers. Not timed on a GPU."""
    return max(4096 // width, 1)


def rows_per_sum(rows: int) -> int:
    """Rows that one program of a backward pass sums over: about 512 programs, four for each SM of an H100,
    share the work, and their partial sums stay small beside the rows. Not timed on a GPU."""
    return triton.cdiv(rows, 512)


def contiguous_rows(tensor: Tensor) -> Tensor:
    """The tensor itself when its last axis is contiguous, as the kernels need it; otherwise a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
