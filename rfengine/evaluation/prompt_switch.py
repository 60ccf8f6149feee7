"""How long a new prompt takes to win."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from rfengine.evaluation.video_frames import FrameSource, Measured, NotMeasurableError, as_frames, windows

Captions = Sequence[tuple[int, str]]
"""The captions of a video: (the frame each begins at, its text), the first at 0."""
WindowScore = Callable[[Tensor, str], float]
"""How well frames uint8 [T, H, W, 3] show a prompt; higher is better."""

_STRIDE = 4  # frames between two windows


def measure_switches(
    frames: FrameSource, captions: Captions, score: WindowScore, window_frames: int = 12
) -> Measured:
    """The switches of the captions of frames uint8 [T, H, W, 3], each judged on the frames up to the next.

    switch_delay: the mean of the frames from a switch to the first window from which on the new prompt scores
    higher in every window, to within four frames; one that is never done counts as all its frames.
    switch_failures: the share of those. The curve switch_margin: (first frame of a window, new score minus
    old). Raises NotMeasurableError when less than a window of `window_frames` follows a switch.
    """
    video = as_frames(frames)
    starts = [start for start, _ in captions]
    ends = [min(start, video.count) for start in starts[2:]] + [video.count]
    places = [_window_starts(*part, window_frames) for part in zip(starts[1:], ends, strict=True)]
    pictures = windows(video.batches(), [(at, at + window_frames) for part in places for at in part])
    delays, margins, failures = [], [], 0
    for index, part in enumerate(places):
        (_, old), (start, new) = captions[index : index + 2]
        since = None
        for place, window in zip(part, pictures, strict=False):
            margin = score(window, new) - score(window, old)
            margins.append((place, margin))
            if margin <= 0:
                since = None
            elif since is None:
                since = place
        failures += since is None
        delays.append((ends[index] if since is None else since) - start)
    values = {"switch_delay": sum(delays) / len(delays), "switch_failures": failures / len(delays)}
    return Measured(values, {"switch_margin": tuple(margins)})


def _window_starts(start: int, end: int, window_frames: int) -> range:
    if end - start < window_frames:
        raise NotMeasurableError(
            f"{max(0, end - start)} frames follow the switch at {start}; its delay needs {window_frames}"
        )
    return range(start, end - window_frames + 1, _STRIDE)
