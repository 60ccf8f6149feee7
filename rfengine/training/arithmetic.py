"""The precision of the arithmetic in training; weights are float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]


def casting(
    device: torch.device, precision: Precision, keeps_casts: bool = True
) -> AbstractContextManager[None]:
    """bfloat16 arithmetic on float32 weights where the precision asks for it.

    keeps_casts: a weight is cast once for all of its uses inside. Not for weights that FSDP gathers: such a
    cast gets its gradient after the last use, when FSDP has reduced that of the weight already, and the rest
    would come with a later update.
    """
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=keeps_casts)


def fast_autocast(device: torch.device) -> AbstractContextManager[None]:
    """bfloat16 arithmetic on a GPU, and on a CPU whose library multiplies in it; float32 elsewhere, where it
    is many times as fast."""
    return casting(device, fast_precision(device))


def fast_precision(device: torch.device) -> Precision:
    """The precision in which a device multiplies fast."""
    return "bfloat16" if device.type == "cuda" or multiplies_bfloat16() else "float32"


def multiplies_bfloat16() -> bool:
    """Whether oneDNN has products and convolutions in bfloat16 for this CPU (on x86 it needs AVX-512).

    Without them, or in a build of torch without oneDNN, plain loops are left: a convolution of the toy VAE
    takes seconds.
    """
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
