"""How long chunks take, one after another, and how evenly they come."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rfengine.config import CacheConfig
from rfengine.stream import VideoStream

Advance = Callable[[], int]  # makes one chunk and returns its frames
LEAD_IN = 2  # chunks until a stream that computes one ahead is in its stride
LEAST_GROWTH_CHUNKS = 20  # a tenth of fewer says nothing


@dataclass(frozen=True)
class ChunkTimes:
    """Seconds of each chunk, and the frames that all gave together."""

    seconds: tuple[float, ...]
    frames: int

    @property
    def frames_per_s(self) -> float:
        return self.frames / sum(self.seconds)

    def percentile_ms(self, share: float) -> float:
        """The smallest time that at least `share` of all do not exceed."""
        return sorted(self.seconds)[math.ceil(share * len(self.seconds)) - 1] * 1e3

    def tail_ms(self, share: float) -> float | None:
        """percentile_ms, or None where so few chunks were measured that it would be the longest."""
        return self.percentile_ms(share) if math.ceil(share * len(self.seconds)) < len(self.seconds) else None

    @property
    def jitter_ms(self) -> float:
        """Mean difference, either way, between a chunk and the one before it; 0 for a single chunk."""
        pairs = zip(self.seconds, self.seconds[1:], strict=False)
        return statistics.fmean([abs(later - earlier) for earlier, later in pairs] or [0.0]) * 1e3

    @property
    def growth(self) -> float | None:
        """Median of the last tenth over that of the first, less 1; None for too few chunks."""
        tenth = len(self.seconds) // 10
        if len(self.seconds) < LEAST_GROWTH_CHUNKS:
            return None
        return statistics.median(self.seconds[-tenth:]) / statistics.median(self.seconds[:tenth]) - 1


def recorded_chunks(cache: CacheConfig) -> int:
    """Chunks from the start of a video until the graph of the steady state was replayed, where graphs are on.

    The window is full first; the next chunk runs op by op, and the one after it is recorded and replayed.
    """
    return cache.filling_chunks + 2


def time_chunks(advance: Advance, count: int, idle: Callable[[], None], waits: bool) -> ChunkTimes:
    """Times of `count` chunks, from idle to idle, which `idle` waits for (Pipeline.synchronize).

    waits: for that after each chunk too, where `advance` does not itself: frames in host memory have waited,
    latents have not.
    """
    seconds, frames = [], 0
    idle()
    for place in range(count):
        started = time.perf_counter()
        frames += advance()
        if waits or place + 1 == count:
            idle()
        seconds.append(time.perf_counter() - started)
    return ChunkTimes(tuple(seconds), frames)


def time_flow(advance: Advance, count: int, lead_in: int = LEAD_IN) -> ChunkTimes:
    """Times from one chunk to the next, `count` of them, of an `advance` that gives frames in host memory.

    The device is never waited for otherwise. A stream that computes one chunk ahead has as much under way
    after the last chunk as before the first, which follows lead_in chunks that do not count; time_chunks
    would count the first as free and the last one twice.
    """
    for _ in range(lead_in):
        advance()
    seconds, frames = [], 0
    for _ in range(count):
        started = time.perf_counter()
        frames += advance()
        seconds.append(time.perf_counter() - started)
    return ChunkTimes(tuple(seconds), frames)


def frames_of(stream: VideoStream) -> Advance:
    """Chunks of `stream` as frames in host memory."""
    return lambda: len(stream.advance().frames)


def latents_of(stream: VideoStream, chunk_frames: int) -> Advance:
    """Chunks of `stream` as latents; counted as the pixel frames they would give."""

    def advance() -> int:
        stream.advance(decode=False)
        return chunk_frames * stream.grid.temporal_stride

    return advance


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(ratios: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
