"""The report on a set of videos: means with intervals, a table to read and JSON to keep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rfengine.evaluation.video_report import VideoReport

# in the order of the table; the drift stands right below the motion that means nothing without it
METRICS = {
    "speed": "% of the shorter side a frame, fastest 5% of the picture",
    "mean_flow": "% of the shorter side a frame, whole picture",
    "freeze_fraction": "share of frames that repeat the one before",
    "exposure_drift": "of 1, last quarter against the first chunk",
    "contrast_drift": "of 1",
    "colour_drift": "of 1",
    "sharpness_drift": "octaves",
    "clipped_drift": "share of values",
    "latent_drift": "nats",
    "consistency_near": "likeness one chunk apart",
    "consistency_far": "likeness half a video apart",
    "brightness_flicker": "of 1, at the chunk period",
    "colour_flicker": "of 1",
    "sharpness_flicker": "octaves",
    "flicker_ratio": "power at the chunk period over that beside it",
    "repetition": "0 none, 1 a loop",
    "repeated": "share of late windows",
    "repetition_lag": "frames, where something repeats",
    "copying_likeness": "of late frames to the first chunk",
    "copying_baseline": "to the first chunks of other videos",
    "copying_excess": "difference of both",
    "switch_delay": "frames until the new prompt wins for good",
    "switch_failures": "share of switches never done",
    "toy_colour": "share right",
    "toy_shape": "share right",
    "toy_size": "share right",
    "toy_background": "share right",
    "toy_motion": "share right",
    "toy_direction": "share right",
    "toy_speed": "share right",
    "toy_camera": "share right",
    "toy_permanence": "share of frames with every object",
}


_RESAMPLES = 2000
_LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """The mean of `count` values and the interval that holds it with 95%; None for a single value."""

    mean: float
    low: float | None
    high: float | None
    count: int


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> Interval:
    """The mean with its percentile interval over 2000 resamples of the values; the same each time.

    Raises ValueError without a value.
    """
    if not values:
        raise ValueError("0 values are given; a mean needs at least one")
    data = torch.tensor(values, dtype=torch.float64, device="cpu")
    mean = float(data.mean())
    if len(data) == 1:
        return Interval(mean, None, None, 1)
    generator = torch.Generator().manual_seed(seed)
    shape = _RESAMPLES, len(data)
    drawn = torch.randint(len(data), shape, generator=generator, dtype=torch.int64, device="cpu")
    means = data[drawn].mean(1)
    low, high = (float(means.quantile((1 + side * _LEVEL) / 2)) for side in (-1, 1))
    return Interval(mean, low, high, len(data))


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file that could not be used, and why: one sentence."""

    file: str
    reason: str


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """The videos, and over them the mean of each metric that some of them have, in the order of METRICS.

    settings: what the numbers depend on, as the caller records it; it must be JSON. vbench: what VBench gave
    the videos, where that is known. failed: the files that the numbers are without.
    """

    videos: tuple[VideoReport, ...]
    means: dict[str, Interval]
    settings: dict[str, Any]
    vbench: dict[str, float]
    failed: tuple[LeftOut, ...]

    def to_json(self) -> str:
        """One JSON object; a number that is not finite becomes null."""
        finite = json.loads(json.dumps(asdict(self)), parse_constant=lambda name: None)
        return json.dumps(finite, indent=2)

    def table(self) -> str:
        """A table of the means, and below it a line for each metric that is absent and each file left out."""
        head = ("metric", "mean", "95% interval", "videos", "unit")
        rows = [head] + [_row(name, interval) for name, interval in self.means.items()]
        count = str(len(self.videos))
        rows += [(f"vbench {name}", f"{score:.4g}", "-", count, "") for name, score in self.vbench.items()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
        lines = [
            "  ".join([cell.ljust(width) for cell, width in zip(row, widths, strict=False)] + [row[-1]])
            for row in rows
        ]
        absent: dict[tuple[str, str], list[str]] = {}
        for video in self.videos:
            for group, reason in video.absent.items():
                absent.setdefault((group, reason), []).append(video.name)
        for (group, reason), names in absent.items():
            lines.append(f"no {group} for {_listed(names)}: {reason}")
        lines += [f"left out: {entry.reason}" for entry in self.failed]
        return "\n".join(lines)


def summarise(
    videos: Sequence[VideoReport],
    settings: dict[str, Any] | None = None,
    vbench: dict[str, float] | None = None,
    failed: Sequence[LeftOut] = (),
) -> EvaluationReport:
    """Means over videos with bootstrap intervals. Raises ValueError without a video and a file left out."""
    if not videos and not failed:
        raise ValueError("0 videos were measured; give at least one")
    found = {name: [video.values[name] for video in videos if name in video.values] for name in METRICS}
    means = {name: bootstrap_mean(values) for name, values in found.items() if values}
    return EvaluationReport(tuple(videos), means, settings or {}, vbench or {}, tuple(failed))


def _row(name: str, interval: Interval) -> tuple[str, ...]:
    between = "-" if interval.low is None else f"{interval.low:.4g} to {interval.high:.4g}"
    return name, f"{interval.mean:.4g}", between, str(interval.count), METRICS[name]


def _listed(names: list[str], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
