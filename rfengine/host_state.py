"""What the program around the engine may have set in torch, kept out of the engine's work.

Autocast, inference mode and gradient mode belong to a thread: `own_state` puts them aside for a block. The
number of threads that torch computes with does too, and `SharedThreads` keeps it there. The default dtype
belongs to the process, where changing it would reach other threads, and the default device costs every call a
look at it; so the engine names dtype and device wherever it makes a tensor, and tests/test_imports.py holds
it to that.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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


class SharedThreads:
    """The threads of torch that one thread of Python has, shared with another that works beside it at times.

    OpenMP counts the threads of all, and where they outnumber the cores they wait by sleeping; so the other
    has half of them (take_share) and this one, inside of `divided`, the rest. Threads of Python that are new
    begin with the number that was set last, by whichever thread; a thread of its own sets it as it was.
    """

    def __init__(self) -> None:
        self._whole: int | None = None
        self._default = ThreadPoolExecutor(1, "rfengine-threads")

    @property
    def whole(self) -> int:
        """Those of the calling thread, also inside of `divided`."""
        return self._whole or torch.get_num_threads()

    @contextmanager
    def divided(self) -> Iterator[None]:
        """The calling thread leaves the other its share for as long as a block runs."""
        whole = torch.get_num_threads()
        if whole == 1:
            yield
            return
        default: Future[None] | None = None
        try:
            self._whole = whole
            default = self._set_own(whole - whole // 2, whole)
            yield
        finally:
            self._whole = None
            torch.set_num_threads(whole)
            if default is not None:
                default.cancel()  # not waited for, and not to come after what the caller sets next

    def take_share(self, whole: int) -> None:
        """Let the calling thread, the one beside, have its half of `whole` threads of torch."""
        share = max(1, whole // 2)
        if torch.get_num_threads() != share:
            self._set_own(share, whole)

    def _set_own(self, count: int, default: int) -> Future[None]:
        torch.set_num_threads(count)
        return self._default.submit(torch.set_num_threads, default)
