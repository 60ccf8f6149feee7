"""What a CPU trains the toy world's parts in."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def cpu_autocast() -> AbstractContextManager[None]:
    """bfloat16 where the CPU's library multiplies in it; elsewhere float32, many times as fast there."""
    return torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bfloat16())


def multiplies_bfloat16() -> bool:
    """Whether oneDNN has products and convolutions in bfloat16 for this CPU (on x86 it needs AVX-512).

    Without them, or in a build of torch without oneDNN, plain loops are left: a convolution of the toy VAE
    takes seconds.
    """
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
