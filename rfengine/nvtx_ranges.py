"""Named ranges of a chunk for a profiler's timeline: chunk, evict, step k, context pass, decode."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

_NOTHING = nullcontext()


def nvtx_range(name: str) -> AbstractContextManager:
    """A range of the timeline around a `with` block; one shared context that does nothing where no profiler
    can see it."""
    return _range_maker()(name)


@cache
def _range_maker() -> Callable[[str], AbstractContextManager]:
    """Decided once: ranges need a CUDA device, the nvtx package, and NVTX_DISABLE unset."""
    if not torch.cuda.is_available() or importlib.util.find_spec("nvtx") is None:
        return lambda name: _NOTHING
    import nvtx

    if not nvtx.enabled():
        return lambda name: _NOTHING
    return nvtx.annotate
