"""CapturedCall: one function on static tensors, recorded as a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")
GraphPool = tuple[int, int]

WARM_UP_CALLS = 2  # the first builds kernels and handles, the second runs as the capture will

_one_capture_at_a_time = Lock()  # torch allows no two in a process, and a decoder may run in a thread


def graph_pool() -> GraphPool:
    """A memory pool for graphs that never run at the same time; those that do need one each.

    Once every graph of a pool is gone torch takes no new one into it: ask for another pool then.
    """
    return torch.cuda.graph_pool_handle()


class CapturedCall(Generic[Result]):
    """`function` without arguments, recorded once; `result` is what it returned, which replays overwrite.

    All that the function reads and writes must stay where it is: tensors that are filled before a replay. It
    is run WARM_UP_CALLS times on a side stream before it is recorded, so a function that changes state in
    place needs it put back: `restore` is called after the warm-up. None stands for a function that has run
    before in these shapes on this device: it is recorded at once. The capture itself runs nothing on the
    device, and the function is not kept. Other threads may use the device meanwhile.
    Raises RuntimeError, as torch does, when the function reads a value on the host or cannot be captured; the
    device's state is then as it was before.
    """

    def __init__(
        self,
        function: Callable[[], Result],
        restore: Callable[[], None] | None,
        device: torch.device,
        pool: GraphPool | None = None,
    ) -> None:
        with torch.cuda.device(device), _one_capture_at_a_time:
            # of this device, where torch's own capture stream is of the first one, and of the caller's
            # priority, which the recorded kernels keep
            priority = torch.cuda.current_stream(device).priority
            side = torch.cuda.Stream(device, priority=priority)
            if restore is not None:
                _warm_up(function, side)
                restore()
            self._graph = torch.cuda.CUDAGraph()
            with (
                torch.cuda.stream(side),  # puts the stream back where ending a failed capture raises
                torch.cuda.graph(self._graph, pool, side, capture_error_mode="thread_local"),
            ):
                self.result = function()

    def replay(self) -> Result:
        """Run the recorded work on the current stream; returns `result`, valid until the next replay."""
        self._graph.replay()
        return self.result


def _warm_up(function: Callable[[], object], side: torch.cuda.Stream) -> None:
    current = torch.cuda.current_stream(side.device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):
            function()
    current.wait_stream(side)
