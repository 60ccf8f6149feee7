"""CapturedCall: one function on static tensors, recorded as a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")
GraphPool = tuple[int, int]

WARM_UP_CALLS = 2  # the first builds kernels and handles, the second runs as the capture will


def graph_pool() -> GraphPool:
    """A memory pool for graphs that never run at the same time; those that do need one each."""
    return torch.cuda.graph_pool_handle()


class CapturedCall(Generic[Result]):
    """`function` without arguments, recorded once; `result` is what it returned, overwritten by every replay.

    All that the function reads and writes must stay where it is: tensors that are filled before a replay. It is
    run WARM_UP_CALLS times on a side stream before it is recorded, so a function that changes state in place
    needs it put back: `restore` is called after the warm-up; the capture itself runs nothing.
    Raises RuntimeError, as torch does, when the function reads a value on the host or cannot be captured.
    """

    def __init__(
        self,
        function: Callable[[], Result],
        restore: Callable[[], None],
        device: torch.device,
        pool: GraphPool | None = None,
    ) -> None:
        with torch.cuda.device(device):
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(WARM_UP_CALLS):
                    function()
            torch.cuda.current_stream(device).wait_stream(side)
            restore()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool):
                self.result = function()

    def replay(self) -> Result:
        """Run the recorded work on the current stream; returns `result`, valid until the next replay."""
        self._graph.replay()
        return self.result
