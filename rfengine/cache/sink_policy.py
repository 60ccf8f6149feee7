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
