"""CapturedCall: one function on static tensors, recorded as a CUDA graph and replayed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from threading import Lock
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")
GraphPool = tuple[int, int]

WARM_UP_CALLS = 2  # the first builds kernels and handles, the second runs as the capture will

_one_capture_at_a_time = Lock()  # torch allows no two in a process, and a decoder may run in a thread


def graph_pool() -> GraphPool:
    """A memory pool for graphs that never run at the same time; those that do need one each.

    Once every graph of a pool is gone torch accepts no new one in it: ask for another pool then.
    """
    return torch.cuda.graph_pool_handle()


def made_current(device: torch.device) -> AbstractContextManager[None]:
    """`device` as the current one, which kernels are launched on; nothing changes for a device of another
    kind."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


@contextmanager
def recording(
    graph: torch.cuda.CUDAGraph,
    stream: torch.cuda.Stream,
    pool: GraphPool | None = None,
    capture_error_mode: str = "global",
) -> Iterator[None]:
    """Record the block on `stream` into `graph`.

    After a failure the stream is the caller's again. What torch leaves open after a capture that does not end
    well is closed before the error is raised: its allocator, which would give back no memory that another
    stream has used, and its default generator of the device, which the next capture that ends well puts back
    and where every draw before it would raise.
    """
    pool = pool or graph_pool()
    try:
        with (
            torch.cuda.stream(stream),  # puts the stream back where ending a failed capture raises
            torch.cuda.graph(graph, pool, stream, capture_error_mode=capture_error_mode),
        ):
            yield
    except BaseException:
        with suppress(RuntimeError):  # of a lost device: the first error says more
            _close_pool(pool, stream.device)
            _record_an_addition(stream)
        raise


def _close_pool(pool: GraphPool, device: torch.device) -> None:
    """End the recording to `pool` where the end of the capture has raised before it did."""
    with suppress(RuntimeError):  # it is closed
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)


def _record_an_addition(stream: torch.cuda.Stream) -> None:
    x = torch.zeros(1, dtype=torch.float32, device=stream.device)
    with (
        torch.cuda.stream(stream),
        torch.cuda.graph(torch.cuda.CUDAGraph(), None, stream, capture_error_mode="thread_local"),
    ):
        x.add_(1)


@contextmanager
def launching_on(own: torch.cuda.Stream | None, device: torch.device) -> Iterator[None]:
    """Launch on `own`, after and before all else that the caller launches; without it with `device`, which
    may not be the current one, as the current one."""
    if own is None:
        with made_current(device):
            yield
        return
    outer = torch.cuda.current_stream(own.device)
    own.wait_stream(outer)
    with torch.cuda.stream(own):
        yield
    outer.wait_stream(own)


class CapturedCall(Generic[Result]):
    """`function` without arguments, recorded once; `result` is what it returned, which replays overwrite.

    All that the function reads and writes must stay where it is: tensors that are filled before a replay. It
    is run WARM_UP_CALLS times before it is recorded, so a function that changes state in place needs it put
    back: `restore` is called after the warm-up. None stands for a function that has run before in these
    shapes on this device: it is recorded at once. The capture itself runs nothing on the device, and the
    function is not kept. Other threads may use the device meanwhile.
    It is recorded on the current stream, or on one of the device that stands for the default stream, which
    nothing can be recorded on: torch keeps the free memory of a pool and the workspaces of its libraries
    apart by stream, so graphs of one pool share memory only where they are recorded on one stream.
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
            current = torch.cuda.current_stream(device)
            on_default = current == torch.cuda.default_stream(device)
            side = _side_stream(current.device) if on_default else current
            if restore is not None:
                _warm_up(function, side)
                restore()
            self._graph = torch.cuda.CUDAGraph()
            with recording(self._graph, side, pool, "thread_local"):
                self.result = function()

    def replay(self) -> Result:
        """Run the recorded work on the current stream; returns `result`, valid until the next replay."""
        self._graph.replay()
        return self.result


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """What stands for the default stream of a device; torch's own capture stream is of the first one used."""
    return torch.cuda.Stream(device)


def _warm_up(function: Callable[[], object], side: torch.cuda.Stream) -> None:
    current = torch.cuda.current_stream(side.device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):
            function()
    current.wait_stream(side)
