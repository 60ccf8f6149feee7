"""Frames as the metrics take them: a whole video in memory, or one that is gone through piece by piece."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from rfengine.evaluation.optical_flow import shrunk
from rfengine.limits import Range, check_value, field_hints

if TYPE_CHECKING:
    from numpy import ndarray

Curve = tuple[tuple[float, float], ...]

_FRAMES_AT_ONCE = 32
_PIXELS_AT_ONCE = 2**22  # a metric holds about 60 bytes for each pixel of a batch


class NotMeasurableError(ValueError):
    """This video does not allow this metric; the message says why and what would."""


@dataclass(frozen=True, slots=True)
class ChunkGrid:
    """Where the chunks of a video lie: frames of the first one and of each later one."""

    first_frames: Annotated[int, Range(1, 65536)] = 9
    frames: Annotated[int, Range(2, 65536)] = 12

    def __post_init__(self) -> None:
        for name, hint in field_hints(type(self)).items():
            check_value(f"{name} of a chunk", getattr(self, name), hint)

    def slices(self, count: int) -> list[slice]:
        """The whole chunks of a video of `count` frames; what is left over at the end belongs to none."""
        starts = range(self.first_frames, count - self.frames + 1, self.frames)
        first = [slice(0, self.first_frames)] if count >= self.first_frames else []
        return first + [slice(start, start + self.frames) for start in starts]


DEFAULT_GRID = ChunkGrid()


class Measured(NamedTuple):
    """What a metric says of one video. values: by the names of report.METRICS. curves: points by name."""

    values: dict[str, float]
    curves: dict[str, Curve]


@dataclass(frozen=True, slots=True)
class Frames:
    """The frames of one video, all of one size, which a metric goes through in order as often as it needs.

    batches: all frames from the first on, uint8 [B, H, W, 3], at most `frames_at_once` of them together.
    times: when each is shown, in seconds; empty where the video does not say it of all.
    """

    count: int
    height: int
    width: int
    batches: Callable[[], Iterator[Tensor]]
    times: tuple[float, ...] = ()


FrameSource: TypeAlias = "Tensor | ndarray | Frames"
"""A video in memory, uint8 [T, H, W, 3], or `Frames`."""


def chosen_frames(whole: Frames, places: Sequence[int]) -> Frames:
    """Some frames of a video: those at `places`, which rise."""

    def batches() -> Iterator[Tensor]:
        first, taken = 0, 0
        for batch in whole.batches():
            end = bisect_left(places, first + len(batch))
            if end > taken:
                yield batch[[place - first for place in places[taken:end]]]
            if end == len(places):
                return
            first, taken = first + len(batch), end

    return Frames(len(places), whole.height, whole.width, batches)


def frames_at_once(height: int, width: int) -> int:
    """How many frames of this size are held together, so that large ones take no more memory."""
    return max(1, min(_FRAMES_AT_ONCE, _PIXELS_AT_ONCE // (height * width)))


def as_frames(frames: FrameSource) -> Frames:
    """A video in memory as `Frames` that share its memory; `Frames` as they are.

    Raises ValueError for anything else than uint8 [T, H, W, 3].
    """
    if isinstance(frames, Frames):
        return frames
    video = frames if isinstance(frames, Tensor) else torch.from_numpy(frames)
    if video.dtype != torch.uint8 or video.ndim != 4 or video.shape[-1] != 3 or not video.numel():
        raise ValueError(f"frames are {video.dtype} {tuple(video.shape)}; give uint8 [T, H, W, 3]")
    count, height, width = video.shape[:3]
    return Frames(count, height, width, lambda: iter(video.split(frames_at_once(height, width))))


def picture_batches(frames: FrameSource, shorter_side: int | None = None) -> Iterator[Tensor]:
    """The frames in order as float32 [B, 3, H, W] from 0 to 1, shrunk to `shorter_side` where larger."""
    for batch in as_frames(frames).batches():
        pictures = batch.permute(0, 3, 1, 2).float().div_(255)
        yield pictures if shorter_side is None else shrunk(pictures, shorter_side)
        del pictures  # before the next ones are made


def gathered(parts: Iterable[Tensor], count: int) -> Tensor:
    """The rows of all parts below each other, `count` in all.

    The parts are copied one by one: kept between the large allocations of the frames, small tensors would
    stop the C library from using freed memory again.
    """
    rows, place = None, 0
    for part in parts:
        rows = part.new_empty(count, *part.shape[1:]) if rows is None else rows
        rows[place : place + len(part)] = part
        place += len(part)
    assert rows is not None and place == count
    return rows


def windows(batches: Iterable[Tensor], ranges: Iterable[tuple[int, int]]) -> Iterator[Tensor]:
    """The frames from `start` up to `end` of every range, out of batches that are gone through once.

    The starts must not fall, and no range is empty; more than the longest range and a batch is never held.
    """
    source = iter(batches)
    held, first = next(source), 0
    for start, end in ranges:
        while first + len(held) < end:
            kept = held[max(0, start - first) :]
            first += len(held) - len(kept)
            held = torch.cat((kept, next(source)))
        yield held[start - first : end - first]


def spread(first: int, last: int, count: int) -> list[int]:
    """`count` whole numbers from `first` to `last`, evenly apart as far as they can be."""
    places = torch.linspace(first, last, count, dtype=torch.float32, device="cpu")
    return places.round().int().tolist()


def split_ranges(count: int, parts: int) -> list[tuple[int, int]]:
    """`count` frames in `parts` ranges of nearly one length, as Tensor.tensor_split divides them."""
    length, longer = divmod(count, parts)
    ends = [part * length + min(part, longer) for part in range(parts + 1)]
    return list(zip(ends, ends[1:], strict=False))


def layout_features(frames: FrameSource, side: int = 16) -> Tensor:
    """Where things are: the frames at `side` x `side`, each channel with mean 0, variance 1: [T, 3 side^2].

    Exposure and colour balance of a frame are gone from it; a plain channel is near zero.
    """
    video = as_frames(frames)

    def features(pictures: Tensor) -> Tensor:
        small = functional.interpolate(pictures, (side, side), mode="area").flatten(2)
        small = small - small.mean(-1, keepdim=True)
        return (small / (small.square().mean(-1, keepdim=True) + 1 / 255**2).sqrt()).flatten(1)

    return gathered(map(features, picture_batches(video)), video.count)


def find_videos(paths: Sequence[Path]) -> list[Path]:
    """What is named, and what ends in .mp4 directly in the directories named, sorted; nothing is opened.

    Raises ValueError when a path does not exist or cannot be listed, or when nothing is found.
    """
    found: list[Path] = []
    for path in paths:
        try:
            if path.is_dir():
                found += sorted(entry for entry in path.iterdir() if entry.suffix.lower() == ".mp4")
            elif os.path.lexists(path):
                found.append(path)
            else:
                raise ValueError(f"{path} does not exist; name a video or a directory of MP4 files")
        except OSError as error:
            raise ValueError(f"{path} cannot be listed ({error.strerror}); name another directory") from error
    if not found:
        named = ", ".join(str(path) for path in paths) or "nothing"
        raise ValueError(f"no video was found in {named}; name MP4 files or a directory that has some")
    return list(dict.fromkeys(found))
