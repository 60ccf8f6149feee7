"""How long a new prompt takes to win."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from rfengine.evaluation.video_frames import Frames, NotMeasurableError, as_frames, windows

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


@dataclass(frozen=True, slots=True)
class Switch:
    """A change of the prompt at `frame`, judged on the frames before `end`."""

    frame: int
    end: int
    old_prompt: str
    new_prompt: str


def measure_switch_delay(
    frames: Tensor | ndarray | Frames,
    switch_frame: int,
    old_prompt: str,
    new_prompt: str,
    score: WindowScore,
    window_frames: int = 12,
    stride: int = 4,
) -> SwitchDelay:
    """The delay after one switch at `switch_frame`, as `measure_switch_delays` has it."""
    video = as_frames(frames)
    switch = Switch(switch_frame, video.count, old_prompt, new_prompt)
    return measure_switch_delays(video, [switch], score, window_frames, stride)[0]


def measure_switch_delays(
    frames: Tensor | ndarray | Frames,
    switches: Sequence[Switch],
    score: WindowScore,
    window_frames: int = 12,
    stride: int = 4,
) -> list[SwitchDelay]:
    """The delay after each switch of frames uint8 [T, H, W, 3], to within `stride` frames.

    Windows of `window_frames` begin at a switch and every `stride` frames after it. The switches are in order
    and none ends after the next one begins. Raises NotMeasurableError when less than one window follows one.
    """
    video = as_frames(frames)
    starts = [_window_starts(video, switch, window_frames, stride) for switch in switches]
    ranges = [(start, start + window_frames) for places in starts for start in places]
    pictures = windows(video.batches(), ranges)
    return [
        _delay(switch, zip(places, pictures, strict=False), score)
        for switch, places in zip(switches, starts, strict=True)
    ]


def _window_starts(video: Frames, switch: Switch, window_frames: int, stride: int) -> range:
    if window_frames < 1 or stride < 1 or switch.frame < 0:
        raise ValueError(
            f"window_frames is {window_frames}, stride {stride} and switch_frame {switch.frame}; "
            "use at least 1, 1 and 0"
        )
    end = min(switch.end, video.count)
    if end - switch.frame < window_frames:
        raise NotMeasurableError(
            f"{max(0, end - switch.frame)} frames follow the switch at {switch.frame}; "
            f"its delay needs {window_frames}"
        )
    return range(switch.frame, end - window_frames + 1, stride)


def _delay(switch: Switch, parts: Iterable[tuple[int, Tensor]], score: WindowScore) -> SwitchDelay:
    margins, since = [], None
    for start, window in parts:
        margin = score(window, switch.new_prompt) - score(window, switch.old_prompt)
        margins.append((start, margin))
        if margin <= 0:
            since = None
        elif since is None:
            since = start
    return SwitchDelay(None if since is None else since - switch.frame, tuple(margins))
