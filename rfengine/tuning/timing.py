"""Times calls on a CUDA device as the engine makes them: in a graph, on data that no cache holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rfengine.cuda_graph import recording

Arguments = tuple[Any, ...]
Sampler = Callable[[], float]
Timer = Callable[[Callable[..., object], Sequence[Arguments]], Sampler]


def count_cold_sets(device: torch.device | str, set_bytes: int) -> int:
    """Sets of arguments of `set_bytes` that make the L2 cache forget the first; at most 64."""
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return min(64, 2 + 2 * cache_bytes // set_bytes)


def capture_calls(run: Callable[..., object], sets: Sequence[Arguments]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `run` on each set of arguments, after two runs that build what it needs.

    A graph, since a launch from Python takes longer than most kernels run, and since the engine runs them in
    one.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for arguments in (*sets[:2], sets[0]):
            run(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with recording(graph, stream):  # torch's own stream is of the device that was first
        for arguments in sets:
            run(*arguments)
    return graph


def graph_sampler(run: Callable[..., object], sets: Sequence[Arguments]) -> Sampler:
    """A function that runs `run` over all sets once and returns the milliseconds of one call."""
    graph = capture_calls(run, sets)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / len(sets)

    return sample
