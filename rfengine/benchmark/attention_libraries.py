"""The attention libraries that are here, and the fastest of them at a given shape."""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

FLASH_MODULES = {"FlashAttention-3": "flash_attn_interface", "FlashAttention-2": "flash_attn"}
SDPA_BACKENDS = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}
TRIALS = 10


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q [B, T, H, E] over k, v [B, S, H, E] by what torch itself prefers."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def fastest_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[str, Attend]:
    """Name and function of the fastest library at this shape: timed on CUDA, torch's own choice on a CPU.

    A library that does not serve the shape, the dtype or the GPU is left out; torch's own choice always does.
    """
    if not q.is_cuda:
        return "SDPA", sdpa
    times: dict[str, float] = {}
    candidates = libraries()
    for name, attend in candidates.items():
        try:
            times[name] = _median_ms(attend, q, k, v)
        except (RuntimeError, TypeError, ValueError):  # it says so in its own way, one for each library
            continue
    best = min(times, key=times.__getitem__)
    return best, candidates[best]


def libraries() -> dict[str, Attend]:
    """Every library that can be imported, by name."""
    found: dict[str, Attend] = {"SDPA": sdpa}
    found |= {name: _with_backend(backend) for name, backend in SDPA_BACKENDS.items()}
    for name, module in FLASH_MODULES.items():
        if importlib.util.find_spec(module) is not None:
            found[name] = _flash(importlib.import_module(module).flash_attn_func)
    return found


def _with_backend(backend: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(q, k, v)

    return attend


def _flash(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> Attend:
    """Some versions return the statistics of the softmax beside the result."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q, k, v)
        return out[0] if isinstance(out, tuple) else out

    return attend


def _median_ms(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> float:
    times = []
    for _ in range(TRIALS + 2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        attend(q, k, v)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[2:])
