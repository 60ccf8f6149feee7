"""One stream in its steady state: the window is full and all graphs are recorded before the clock starts."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace

from rfengine.benchmark.conditions import held_memory
from rfengine.benchmark.measured_engine import MeasuredEngine
from rfengine.benchmark.timing import (
    Advance,
    ChunkTimes,
    frames_of,
    latents_of,
    recorded_chunks,
    time_chunks,
    time_flow,
)

SETTLED_CHUNKS = 3  # after the warm-up; recording graphs empties torch's cache of free memory


@dataclass(frozen=True)
class SteadyRun:
    """Times of chunks one after another. memory_growth: bytes held after them and not before, where known.
    first_ms: from the text states to the first frames of a new stream."""

    times: ChunkTimes
    memory_growth: int | None
    first_ms: float | None = None


def time_frames(engine: MeasuredEngine, chunks: int) -> SteadyRun:
    """Chunks as frames in host memory."""
    warm_up(engine)
    advance, first_ms = first_frame(engine)
    warm(engine, advance, waits=False)
    return replace(_timed(engine, lambda count: time_flow(advance, count), chunks), first_ms=first_ms)


def time_latents(engine: MeasuredEngine, chunks: int) -> SteadyRun:
    """Chunks as latents, the device waited for after each."""
    advance = latents_of(engine.stream(), engine.pipeline.config.cache.chunk_frames)
    warm(engine, advance, waits=True)
    return _timed(
        engine, lambda count: time_chunks(advance, count, engine.pipeline.synchronize, waits=True), chunks
    )


def first_frame(engine: MeasuredEngine) -> tuple[Advance, float]:
    """A new stream after its first chunk, and the milliseconds from its beginning to that."""
    started = time.perf_counter()
    advance = frames_of(engine.stream())
    advance()
    return advance, (time.perf_counter() - started) * 1e3


def warm_up(engine: MeasuredEngine) -> None:
    """Warm the engine by a stream of its own, and end it: what it has ahead is in no later figure."""
    with closing(engine.stream()) as stream:
        warm(engine, frames_of(stream), waits=False)


def warm(engine: MeasuredEngine, advance: Advance, waits: bool) -> None:
    """Until the window is full and all graphs are recorded."""
    pipeline = engine.pipeline
    time_chunks(advance, recorded_chunks(pipeline.config.cache), pipeline.synchronize, waits)


def _timed(engine: MeasuredEngine, time_many: Callable[[int], ChunkTimes], chunks: int) -> SteadyRun:
    time_many(SETTLED_CHUNKS)
    held = held_memory(engine.device)
    times = time_many(chunks)
    after = held_memory(engine.device)
    return SteadyRun(times, None if held is None or after is None else after - held)
