"""LiveMemory: the bytes of all tensors that are alive, as a program makes them and lets them go."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Inside it, every tensor that an operation of torch returns is counted until its memory is free.

    live, peak: bytes. What was there before is in neither, until an operation returns a view of it. What an
    operation takes and frees inside itself is seen by nobody: libraries have workspaces of their own. Inside
    torch's FakeTensorMode no memory is taken, and the count is that of the same program with memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._paused = False

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if not self._paused:
            self._note(result)
        return result

    def as_one(self, run: Callable[..., Any], *arguments: Any) -> Any:
        """run(*arguments) as one operation: of what it takes, what it returns counts."""
        outer, self._paused = self._paused, True
        try:
            result = run(*arguments)
        finally:
            self._paused = outer
        if not outer:
            self._note(result)
        return result

    @contextmanager
    def section(self, peaks: dict[str, int], name: str) -> Iterator[None]:
        """Put into peaks[name] by how much the block takes more than is alive before it, at most."""
        before, self.peak = self.live, self.live
        yield
        peaks[name] = self.peak - before

    def _note(self, result: Any) -> None:
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed(_: object) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
