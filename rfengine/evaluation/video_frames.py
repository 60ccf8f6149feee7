"""Frames as the metrics take them, and the video files they come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor
from torch.nn import functional

from rfengine.limits import Range, check_value, field_hints

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy import ndarray

_FRAMES_AT_ONCE = 32


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


def as_video(frames: Tensor | ndarray) -> Tensor:
    """Frames uint8 [T, H, W, 3] as a tensor that shares their memory. Raises ValueError for anything else."""
    video = frames if isinstance(frames, Tensor) else torch.from_numpy(frames)
    if video.dtype != torch.uint8 or video.ndim != 4 or video.shape[-1] != 3 or not video.numel():
        raise ValueError(f"frames are {video.dtype} {tuple(video.shape)}; give uint8 [T, H, W, 3]")
    return video


def picture_batches(video: Tensor, shorter_side: int | None = None) -> Iterator[Tensor]:
    """The frames in order as float32 [B, 3, H, W] from 0 to 1, shrunk to `shorter_side` where larger."""
    height, width = video.shape[1:3]
    scale = 1.0 if shorter_side is None else min(1.0, shorter_side / min(height, width))
    for batch in video.split(_FRAMES_AT_ONCE):
        pictures = batch.permute(0, 3, 1, 2).float() / 255
        if scale < 1:
            size = (max(1, round(height * scale)), max(1, round(width * scale)))
            pictures = functional.interpolate(pictures, size, mode="area")
        yield pictures


def layout_features(video: Tensor, side: int = 16) -> Tensor:
    """Where things are: the frames at `side` x `side`, each channel with mean 0, variance 1: [T, 3 side^2].

    Exposure and colour balance of a frame are gone from it; a plain channel is near zero.
    """
    parts = []
    for pictures in picture_batches(video):
        small = functional.interpolate(pictures, (side, side), mode="area").flatten(2)
        small = small - small.mean(-1, keepdim=True)
        parts.append((small / (small.square().mean(-1, keepdim=True) + 1 / 255**2).sqrt()).flatten(1))
    return torch.cat(parts)


def find_videos(paths: list[Path]) -> list[Path]:
    """The files named, and the MP4 files directly in the directories named, sorted.

    Raises ValueError when a path does not exist or nothing is found.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(entry for entry in path.iterdir() if entry.suffix.lower() == ".mp4")
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"{path} does not exist; name a video or a directory of MP4 files")
    if not found:
        named = ", ".join(str(path) for path in paths) or "nothing"
        raise ValueError(f"no video was found in {named}; name MP4 files or a directory that has some")
    return list(dict.fromkeys(found))


def read_video(path: Path) -> Tensor:
    """All frames of a video file, uint8 [T, H, W, 3]. Raises ValueError when it cannot be read as one."""
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} has no picture; give a video file")
            frames = [
                torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)
            ]
    except (av.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{path} cannot be read as a video ({reason}); give an MP4 file") from error
    if not frames:
        raise ValueError(f"{path} has 0 frames; give a video with some")
    return torch.stack(frames)
