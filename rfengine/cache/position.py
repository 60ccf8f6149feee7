"""Where a cache stands between two chunks, and how its past is written once more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rfengine.cache.sink_policy import EMPTY, CachePlan, time_indices
from rfengine.config import CacheConfig


def rewrite_plans(config: CacheConfig, held: Sequence[int], frames: int) -> list[CachePlan]:
    """The plans that write the past once more, put in order of time, in chunks of `frames` counted from the
    newest: each sees the sink, the memory and the frames up to its own."""
    first = len(config.memory_rates) + config.sink_frames
    past = sorted(frame for frame in held[first : config.resident_frames] if frame != EMPTY)
    plans, lead = [], len(past) % frames
    bounds = [0] * bool(lead) + list(range(lead, len(past) + 1, frames))
    for low, high in zip(bounds, bounds[1:], strict=False):
        seen = [*held[:first], *past[:high], *[EMPTY] * (config.window_frames - first - high)]
        start, times = time_indices(config, seen)
        slots = tuple(range(first + low, first + high))
        plans.append(CachePlan(-1, past[low], high - low, slots, False, (), start, len(times), times))
    return plans


def check_frames(config: CacheConfig, held: Sequence[int], next_frame: int) -> None:
    """Raises ValueError unless slots can hold `held` when `next_frame` is the next frame to be written: the
    sink the first frames, the past the last ones, and the memory, once a frame has left, the last that
    did."""
    memory, sink, past = len(config.memory_rates), config.sink_frames, config.past_frames
    if len(held) != config.window_frames:
        raise ValueError(f"the saved cache has {len(held)} slots; this stream has {config.window_frames}")
    left = next_frame > sink + past and config.eviction == "oldest"
    resident = held[memory : config.resident_frames]
    if left:
        wanted = [*range(sink), *range(next_frame - past, next_frame)]
        found = [*resident[:sink], *sorted(resident[sink:])]
    else:
        count = min(next_frame, sink + past)
        wanted, found = [*range(count), *[EMPTY] * (sink + past - count)], list(resident)
    averaged = [next_frame - past - 1 if left else EMPTY] * memory
    unused = [EMPTY] * config.joint_frames
    if [*held[:memory], *found, *held[config.resident_frames :]] != [*averaged, *wanted, *unused]:
        raise ValueError(
            f"the slots of the saved cache hold the frames {list(held)}, which cannot be before frame "
            f"{next_frame}"
        )


def check_device_held(config: CacheConfig, held: Sequence[int], next_frame: int) -> None:
    """Raises ValueError unless the slots of a device that chooses them can hold the frames `held`: the sink
    the first ones, and the others different ones with the last chunk among them."""
    sink = config.sink_frames
    if next_frame <= config.resident_frames:
        return  # the host still knows them
    last = range(next_frame - config.chunk_frames, next_frame)
    others = set(held[sink:])
    if (
        list(held[:sink]) != list(range(sink)) or len(others) < len(held) - sink
        or not others.issuperset(last) or min(others) < sink or max(others) >= next_frame
    ):  # fmt: skip
        raise ValueError(
            f"device_held of the saved cache is {list(held)}, which cannot be before frame {next_frame}"
        )


@dataclass(frozen=True, slots=True)
class CachePosition:
    """Where a cache stands between two chunks: the numbers of the next chunk and of its first latent frame,
    the frame in every slot, and the chunks of a rolling schedule that are in flight."""

    chunk: int
    frame: int
    held: tuple[int, ...]
    joint_chunks: int = 0

    def check(self, config: CacheConfig) -> None:
        """Raises ValueError unless a cache of `config` can stand there."""
        check_frames(config, self.held, self.frame)
        if not self.chunk <= self.frame <= self.chunk * config.longest_chunk:
            raise ValueError(f"{self.frame} latent frames cannot be in {self.chunk} chunks")
        in_flight = max(0, config.joint_frames // config.chunk_frames - 1) if self.chunk else 0
        if self.joint_chunks not in (0, in_flight):
            raise ValueError(
                f"{self.joint_chunks} chunks are in flight, of {config.joint_frames} joint frames"
            )
