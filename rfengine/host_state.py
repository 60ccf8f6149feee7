"""What the program around the engine may have set in torch, kept out of the engine's work.

Autocast, inference mode and gradient mode belong to a thread: `own_state` puts them aside for a block. The
default dtype belongs to the process, where changing it would reach other threads, and the default device
costs every call a look at it; so the engine names dtype and device wherever it makes a tensor, and
tests/test_imports.py holds it to that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor


@contextmanager
def own_state() -> Iterator[None]:
    """Run a block, or a function it decorates, without autocast, gradients and inference mode.

    What the caller has set is there again afterwards. Tensors made inside are ordinary ones, which may be
    used and changed in place inside and outside of inference mode.
    """
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield


def ordinary(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy of one that was made in inference mode, which nothing may change later."""
    return tensor.clone() if tensor.is_inference() else tensor
