"""Which latent frames leave the window, what they are folded into and with which weight, and which time index
every frame has: host integers, decided before the device works.

The slots of the arena hold one latent frame each, in the order memory, sink, past, joint:

    [ memory | sink | past ............ | joint ]

past is a ring: a new frame goes to the slot of the oldest. memory is filled by the first frames that leave
and read from then on. joint holds what a rolling schedule denoises, and is written anew in every pass.

| policy | sink | a frame that leaves | source |
|---|---|---|---|
| none | none | is dropped | Self-Forcing, arXiv 2506.08009 |
| frozen | the first frames as they were | is dropped | LongLive, 2509.22622; deep: half of the window |
| ema | averages | is averaged into one of the sink, frame i into frame i mod sink_frames | 2512.04678 |
| memory | the first frames as they were | is averaged into each memory frame, at its rate | 2603.12513 |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rfengine.config import CacheConfig

EMPTY = -1


@dataclass(frozen=True, slots=True)
class Fold:
    """`count` frames from slot `source` on are averaged into those from slot `target` on:
    target = keep * target + (1 - keep) * source."""

    target: int
    source: int
    count: int
    keep: float


@dataclass(frozen=True, slots=True)
class CachePlan:
    """Where the frames of a chunk are written, what leaves for them, and which time index every slot has
    then.

    chunk: number of the chunk in the stream. first_frame: number in the stream of its first latent frame.
    frames: how many it has. slots: the slot of each of them, in order; with eviction by similarity the device
    chooses those that are lacking, and all times. evicts: whether frames leave. folds: what becomes of them,
    in this order. start, filled: the slots that are read once the chunk is written are `filled` from `start`
    on. times: their time indices.
    """

    chunk: int
    first_frame: int
    frames: int
    slots: tuple[int, ...]
    evicts: bool
    folds: tuple[Fold, ...]
    start: int
    filled: int
    times: tuple[int, ...]


def plan_frames(config: CacheConfig, held: Sequence[int], chunk: int, first: int, frames: int) -> CachePlan:
    """The plan of a chunk of `frames` frames from number `first` on. held: number of the frame in every slot,
    or EMPTY; of a memory slot, the last one that was folded into it."""
    memory = len(config.memory_rates)
    past = range(memory + config.sink_frames, config.resident_frames)
    free = [slot for slot in range(memory, past.stop) if held[slot] == EMPTY][:frames]
    count = frames - len(free)
    if count and config.eviction == "similarity":
        return CachePlan(chunk, first, frames, tuple(free), True, (), 0, config.resident_frames, ())
    leaving = sorted((slot for slot in past if held[slot] != EMPTY), key=held.__getitem__)[:count]
    slots = (*free, *leaving)
    after = frames_after(config, held, slots, first)
    start, times = time_indices(config, after)
    folds = _folds(config, held, leaving) if leaving else ()
    return CachePlan(chunk, first, frames, slots, bool(leaving), folds, start, len(times), times)


def frames_after(config: CacheConfig, held: Sequence[int], slots: Sequence[int], first: int) -> list[int]:
    """What the slots hold once the frames from number `first` on are written to `slots`."""
    after = list(held)
    left = [held[slot] for slot in slots if held[slot] != EMPTY]
    if left:
        after[: len(config.memory_rates)] = [max(left)] * len(config.memory_rates)
    for frame, slot in enumerate(slots, first):
        after[slot] = frame
    return after


def time_indices(config: CacheConfig, held: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """The first slot that is read, and the time index of it and of every filled slot behind it.

    Relative: the place among them, in the order sink, memory, past by age; absolute: the number of the frame.
    """
    memory, sink = len(config.memory_rates), config.sink_frames
    start = memory if memory and held[0] == EMPTY else 0
    filled = [slot for slot in range(start, config.resident_frames) if held[slot] != EMPTY]
    if config.positions == "absolute":
        return start, tuple(held[slot] for slot in filled)

    def age(slot: int) -> tuple[int, int]:
        if slot < memory:
            return 1, slot
        return (0, slot) if slot < memory + sink else (2, held[slot])

    order = {slot: place for place, slot in enumerate(sorted(filled, key=age))}
    return start, tuple(order[slot] for slot in filled)


def _folds(config: CacheConfig, held: Sequence[int], leaving: Sequence[int]) -> tuple[Fold, ...]:
    """What becomes of the frames in the slots `leaving`, from the oldest on."""
    if config.sink == "ema":
        sink = config.sink_frames
        single = [Fold((held[slot] - sink) % sink, slot, 1, config.alpha) for slot in leaving]
        return tuple(_joined(single))
    folds, is_empty = [], bool(config.memory_rates) and held[0] == EMPTY
    for slot in leaving:
        for memory, rate in enumerate(config.memory_rates):
            folds.append(Fold(memory, slot, 1, 0.0 if is_empty else 1 - rate))
        is_empty = False
    return tuple(folds)


def _joined(folds: Sequence[Fold]) -> list[Fold]:
    """Folds whose frames follow each other on both sides, as one; none is joined over the end of the sink."""
    joined: list[Fold] = []
    for fold in folds:
        last = joined[-1] if joined else None
        if last and (last.target + last.count, last.source + last.count) == (fold.target, fold.source):
            joined[-1] = Fold(last.target, last.source, last.count + fold.count, last.keep)
        else:
            joined.append(fold)
    return joined


def rewrite_plans(config: CacheConfig, held: Sequence[int], frames: int) -> tuple[list[int], list[CachePlan]]:
    """What the slots hold with the past put in order of time, and the plans that write it once more, in
    chunks of `frames` counted from the newest: each sees the sink, the memory and the frames up to its
    own."""
    first = len(config.memory_rates) + config.sink_frames
    past = sorted(frame for frame in held[first : config.resident_frames] if frame != EMPTY)
    ordered = [*held[:first], *past, *[EMPTY] * (config.window_frames - first - len(past))]
    plans, lead = [], len(past) % frames
    bounds = [0] * bool(lead) + list(range(lead, len(past) + 1, frames))
    for low, high in zip(bounds, bounds[1:], strict=False):
        seen = ordered[: first + high] + [EMPTY] * (config.window_frames - first - high)
        start, times = time_indices(config, seen)
        slots = tuple(range(first + low, first + high))
        plans.append(CachePlan(-1, past[low], high - low, slots, False, (), start, len(times), times))
    return ordered, plans


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
        if not self.chunk <= self.frame <= self.chunk * max(config.chunk_frames, config.first_chunk):
            raise ValueError(f"{self.frame} latent frames cannot be in {self.chunk} chunks")
        if self.joint_chunks not in (0, max(0, config.joint_frames // config.chunk_frames - 1)):
            raise ValueError(
                f"{self.joint_chunks} chunks are in flight, of {config.joint_frames} joint frames"
            )
