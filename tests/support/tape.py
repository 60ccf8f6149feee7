"""TapedCall: stands in for CapturedCall on a CPU. It tapes the ops of a function and plays the tape back.

As with a CUDA graph, taping leaves no trace on any tensor, and playing runs no Python of the function: the
ops read and write the very tensors they were taped with, whatever objects the engine has made since.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rfengine.runtime import chunk_runner


class Tape(TorchDispatchMode):
    """Every op with its arguments and results, and what the memory it wrote held before."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(args[place] if place < len(args) else kwargs.get(argument.name))
        results = func(*args, **kwargs)
        self.ops.append((func, args, kwargs, results))
        return results

    def _keep(self, written: Tensor | None) -> None:
        if written is not None and _memory(written) not in self._before:
            whole = torch.empty(0, dtype=torch.uint8).set_(written.untyped_storage())
            self._before[_memory(written)] = (whole, whole.clone())

    def undo(self) -> None:
        for whole, before in self._before.values():
            whole.copy_(before)
        self._before.clear()

    def play(self) -> None:
        for func, args, kwargs, taped in self.ops:
            for old, new in zip(tree_leaves(taped), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and _memory(old) != _memory(new):
                    old.copy_(new)

    def read_from_outside(self) -> set[int]:
        """Memory that the ops read or write and that none of them made."""
        made: set[int] = set()
        outside: set[int] = set()
        for _, args, kwargs, results in self.ops:
            given = {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            outside |= given - made
            made |= {_memory(leaf) for leaf in tree_leaves(results) if isinstance(leaf, Tensor)} - outside
        return outside


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class TapedCall:
    """CapturedCall's signature, for a function that has run before."""

    def __init__(
        self,
        function: Callable[[], Tensor],
        restore: Callable[[], None] | None,
        device: torch.device,
        pool: object = None,
    ) -> None:
        assert restore is None, "only a function that has run before is taped"
        self.tape = Tape()
        try:
            with self.tape:
                self.result = function()
        finally:
            self.tape.undo()
        self.result.fill_(float("nan"))  # recording computes nothing

    def replay(self) -> Tensor:
        self.tape.play()
        return self.result


def taped_programs(monkeypatch: pytest.MonkeyPatch) -> list[TapedCall]:
    """Tapes in place of the CUDA graphs of chunks; the list grows by every one that is made."""
    made: list[TapedCall] = []

    def record(*args: object) -> TapedCall:
        made.append(TapedCall(*args))
        return made[-1]

    monkeypatch.setattr(chunk_runner, "CapturedCall", record)
    monkeypatch.setattr(chunk_runner, "graph_pool", object)
    return made
