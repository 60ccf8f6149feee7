"""Pulsing in step with the chunks: brightness, colour and sharpness that come and go at every seam.

Read from the spectrum of each signal of the frames, at the chunk period and at its half, against the
frequencies beside them: motion and drift have no reason to prefer these two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rfengine.evaluation.frame_signals import frame_signals
from rfengine.evaluation.video_frames import FrameSource, Measured, NotMeasurableError, as_frames

_LEAST_PERIODS = 4
_NEIGHBOURS = (-3.0, -2.5, 2.5, 3.0)  # bins of the spectrum; the window is narrower than two
_FLOOR = 1e-4  # amplitude below which there is no flicker: a fortieth of a step of 8 bits


def measure_flicker(frames: FrameSource, period: int = 12) -> Measured:
    """Flicker of frames uint8 [T, H, W, 3]: the amplitude at `period` frames beyond that of the frequencies
    beside it, 0 where they are as strong.

    brightness and colour: of the range 0 to 1; sharpness: octaves. flicker_ratio: power of the brightness at
    the period over that beside it, 1 without flicker. Raises NotMeasurableError for a video of less than four
    periods.
    """
    video = as_frames(frames)
    least = _LEAST_PERIODS * period
    if video.count < least:
        raise NotMeasurableError(
            f"{video.count} frames are too few; flicker at a period of {period} needs {least}"
        )
    signals = frame_signals(video)
    brightness, beside = period_power(signals.luma[:, None], period)
    floor = _FLOOR**2
    values = {
        "brightness_flicker": _excess(brightness, beside),
        "colour_flicker": _excess(*period_power(signals.colour[:, :2], period)),
        "sharpness_flicker": _excess(*period_power(signals.sharpness[:, None], period)),
        "flicker_ratio": (brightness + floor) / (beside + floor),
    }
    return Measured(values, {})


def period_power(signal: Tensor, period: int) -> tuple[float, float]:
    """Squared amplitude of signals [T, S] at `period` frames and its half, and what stands beside both.

    Summed over signals and the two frequencies. A straight line is taken out first, the ends are faded.
    """
    count = len(signal)
    time = torch.arange(count, dtype=torch.float64, device="cpu")
    line = torch.stack((torch.ones_like(time), time / count), dim=1)
    values = signal.double()
    values = values - line @ torch.linalg.lstsq(line, values).solution
    fade = torch.hann_window(count, periodic=False, dtype=torch.float64, device="cpu")

    def power(frequency: float) -> float:
        wave = torch.exp(-2j * torch.pi * frequency * time) * fade
        amplitude = 2 * (wave[:, None] * values).sum(0) / fade.sum()
        return float(amplitude.abs().square().sum())

    at, beside = 0.0, 0.0
    for frequency in (1 / period, 2 / period):
        at += power(frequency)
        beside += sum(power(frequency + offset / count) for offset in _NEIGHBOURS) / len(_NEIGHBOURS)
    return at, beside


def _excess(at: float, beside: float) -> float:
    return max(0.0, at - beside) ** 0.5
