"""Copying of the first frames: late frames that look like the frames the sink began with.

Frames are compared where things are (small pictures, each channel normalised). Videos of one kind are alike
without any copying, so that what counts is the likeness to the video's own first chunk beyond that to the
first chunks of other, independent videos; best of the same prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from rfengine.evaluation.video_frames import (
    DEFAULT_GRID,
    ChunkGrid,
    FrameSource,
    NotMeasurableError,
    as_frames,
    chosen_frames,
    layout_features,
    spread,
)

_MOST_LATE_FRAMES = 64


@dataclass(frozen=True, slots=True)
class SinkTrace:
    """What is kept of a video to tell copying: features of length 1, of its first chunk [S, D] and of frames
    spread over its second half [L, D]."""

    first: Tensor
    late: Tensor


def trace_sink(frames: FrameSource, grid: ChunkGrid = DEFAULT_GRID) -> SinkTrace:
    """The trace of frames uint8 [T, H, W, 3].

    Raises NotMeasurableError unless there is at least a chunk between the first chunk and the second half.
    """
    video = as_frames(frames)
    count, half, least = video.count, video.count // 2, 2 * (grid.first_frames + grid.frames)
    if count < least:
        raise NotMeasurableError(f"{count} frames are too few; copying needs {least}")
    late = spread(half, count - 1, min(_MOST_LATE_FRAMES, count - half))
    kept = chosen_frames(video, [*range(grid.first_frames), *late])
    features = functional.normalize(layout_features(kept), dim=1)
    return SinkTrace(features[: grid.first_frames], features[grid.first_frames :])


def measure_copying(trace: SinkTrace, others: Sequence[SinkTrace]) -> dict[str, float]:
    """Copying in one video, measured against the first chunks of `others`, at least one.

    copying_likeness: of late frames to the nearest frame of the first chunk, from -1 to 1; copying_baseline:
    to the first chunks of other videos; copying_excess: the first minus the second, 0 without copying. Raises
    NotMeasurableError when there is no other.
    """
    if not others:
        raise NotMeasurableError("there is no other video to compare with; copying needs two videos or more")
    likeness = _likeness(trace.late, trace.first)
    baseline = sum(_likeness(trace.late, other.first) for other in others) / len(others)
    return {
        "copying_likeness": likeness,
        "copying_baseline": baseline,
        "copying_excess": likeness - baseline,
    }


def _likeness(late: Tensor, first: Tensor) -> float:
    return float((late @ first.T).amax(1).mean())
