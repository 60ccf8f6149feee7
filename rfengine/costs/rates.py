"""What a device can do at most: the data sheets of GPUs, and for a CPU what it reaches, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from rfengine.costs.chunk import Part

GPUName = Literal["a100", "h100", "h200", "rtx4090"]


@dataclass(frozen=True)
class GPU:
    """Rates of a data sheet: dense products, accumulated in float32; None where there are none.

    bf16_tflop_per_s is the rate of products in the dtype that runs, where it was measured on a CPU.
    device_name: as the driver reports it. nvlink_gb_per_s, pcie_gb_per_s: between two cards, in each
    direction, half of what a data sheet adds up; None where there is no such link.
    """

    name: str
    tb_per_s: float
    bf16_tflop_per_s: float
    fp8_tflop_per_s: float | None
    device_name: str = ""
    nvlink_gb_per_s: float | None = None
    pcie_gb_per_s: float | None = None


# NVIDIA's data sheets (A100, H100 SXM, H200) and the Ada white paper; the PCIe and NVL forms have lower rates
GPUS: dict[GPUName, GPU] = {
    "a100": GPU("A100 SXM 80 GB", 2.039, 312, None, "NVIDIA A100-SXM4-80GB", 300, 32),
    "h100": GPU("H100 SXM", 3.35, 989, 1979, "NVIDIA H100 80GB HBM3", 450, 64),
    "h200": GPU("H200 SXM", 4.8, 989, 1979, "NVIDIA H200", 450, 64),
    "rtx4090": GPU("GeForce RTX 4090", 1.008, 165.2, 330.3, "NVIDIA GeForce RTX 4090", None, 32),
}
_PRODUCT_SIDE, _COPY_ELEMENTS, _TRIALS = 1024, 2**24, 5


def gpu_of(device_name: str) -> GPU | None:
    """The data sheet of a device by its driver's name; None where there is none here."""
    return next((gpu for gpu in GPUS.values() if gpu.device_name == device_name), None)


def rates_of(device: torch.device, dtype: torch.dtype) -> GPU | None:
    """The data sheet of a GPU, None where there is none here; what a CPU reaches in `dtype`, measured."""
    on_cuda = device.type == "cuda"
    return gpu_of(torch.cuda.get_device_name(device)) if on_cuda else measured_cpu(dtype)


def measured_cpu(dtype: torch.dtype) -> GPU:
    """What this CPU reaches with torch's threads: a large copy (read and written) and a large product."""
    source = torch.randn(_COPY_ELEMENTS, dtype=torch.float32, device="cpu")
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _fastest_s(lambda: target.copy_(source))
    size = (_PRODUCT_SIDE, _PRODUCT_SIDE)
    left, right = (torch.randn(size, dtype=torch.float32, device="cpu").to(dtype) for _ in range(2))
    product = 2 * _PRODUCT_SIDE**3 / _fastest_s(lambda: left @ right)
    return GPU("this CPU, measured", copied / 1e12, product / 1e12, None)


def _fastest_s(call: Callable[[], object]) -> float:
    times = []
    for _ in range(_TRIALS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def arithmetic_ms(part: Part, gpu: GPU) -> float:
    rate = gpu.fp8_tflop_per_s if part.is_fp8 else gpu.bf16_tflop_per_s
    return part.flops / rate / 1e9 if part.flops else 0.0


def memory_ms(part: Part, gpu: GPU) -> float:
    return part.bytes / gpu.tb_per_s / 1e9


def floor_ms(part: Part, gpu: GPU) -> float:
    """No run of the part is shorter at these rates."""
    return max(arithmetic_ms(part, gpu), memory_ms(part, gpu))
