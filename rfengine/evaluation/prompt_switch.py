"""How long a new prompt takes to win."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from rfengine.evaluation.video_frames import NotMeasurableError, as_video

if TYPE_CHECKING:
    from numpy import ndarray

WindowScore = Callable[[Tensor, str], float]
"""How well frames uint8 [T, H, W, 3] show a prompt; higher is better."""


@dataclass(frozen=True, slots=True)
class SwitchDelay:
    """frames: from the switch to the first window from which on the new prompt scores higher in every window;
    None where it never wins for good. margins: pairs (first frame of a window, new score minus old)."""

    frames: int | None
    margins: tuple[tuple[int, float], ...]


def measure_switch_delay(
    frames: Tensor | ndarray,
    switch_frame: int,
    old_prompt: str,
    new_prompt: str,
    score: WindowScore,
    window_frames: int = 12,
    stride: int = 4,
) -> SwitchDelay:
    """The delay after a switch at `switch_frame` of frames uint8 [T, H, W, 3], to within `stride` frames.

    Windows of `window_frames` begin at the switch and every `stride` frames after it. Raises
    NotMeasurableError when less than one window follows the switch.
    """
    video = as_video(frames)
    if window_frames < 1 or stride < 1 or switch_frame < 0:
        raise ValueError(
            f"window_frames is {window_frames}, stride {stride} and switch_frame {switch_frame}; "
            "use at least 1, 1 and 0"
        )
    left = len(video) - switch_frame
    if left < window_frames:
        raise NotMeasurableError(
            f"{max(0, left)} frames follow the switch at {switch_frame}; its delay needs {window_frames}"
        )
    margins, since = [], None
    for start in range(switch_frame, len(video) - window_frames + 1, stride):
        window = video[start : start + window_frames]
        margin = score(window, new_prompt) - score(window, old_prompt)
        margins.append((start, margin))
        if margin <= 0:
            since = None
        elif since is None:
            since = start
    return SwitchDelay(None if since is None else since - switch_frame, tuple(margins))
