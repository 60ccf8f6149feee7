"""Rewards: what a video is scored by, the one score a student is trained on, and a guard against its misuse.

B videos of T frames.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple, Protocol

import torch
from torch import Tensor

from rfengine.evaluation.optical_flow import moving_speed, optical_flow
from rfengine.limits import Range, check_fields
from rfengine.training.log_file import read_log

logger = logging.getLogger(__name__)

Threshold = Annotated[float, Range(0, 1e6)]


class Reward(Protocol):
    """Named scores of every video by itself; higher is better."""

    def __call__(self, frames: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """frames: [B, T, H, W, 3], uint8 or float from 0 to 1; B prompts. Every score is float32 [B]."""
        ...


class Scored(NamedTuple):
    """total: [B], what is trained on. parts: [B] each, by "reward.score", without their weights."""

    total: Tensor
    parts: dict[str, Tensor]


class WeightedSum:
    """One score out of several: the sum of weights["reward.score"] times that score.

    `parts` holds the scores of the latest call, for a log. Scores without a weight are watched, and counted
    with 0. Raises ValueError for a weight that names no reward, for a reward that has no weight, and, when it
    is called, for a reward that gives another number of scores than there are videos, or NaN or an infinity.
    """

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        owners = {name: name.partition(".")[0] for name in weights}
        strangers = [name for name, owner in owners.items() if owner not in rewards or "." not in name]
        if strangers:
            raise ValueError(
                f"the weight {strangers[0]!r} names no score; use 'reward.score' with a reward out of "
                f"{', '.join(rewards) or 'none'}"
            )
        idle = [name for name in rewards if name not in owners.values()]
        if idle or not weights:
            raise ValueError(
                f"the reward {', '.join(idle) or 'sum'} has no weight; give it one or leave it out"
            )
        for name, weight in weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"the weight of {name} is {weight}; use a finite number")
        self.rewards, self.weights = dict(rewards), dict(weights)
        self.parts: dict[str, Tensor] = {}

    def __call__(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """The total, float32 [B] on the device of the frames."""
        return self.scores(frames, prompts).total

    def scores(self, frames: Tensor, prompts: Sequence[str]) -> Scored:
        if len(frames) != len(prompts):
            raise ValueError(
                f"there are {len(frames)} videos and {len(prompts)} prompts; give one prompt a video"
            )
        parts: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, reward in self.rewards.items():
                for score, values in reward(frames, prompts).items():
                    parts[f"{name}.{score}"] = _checked(f"{name}.{score}", values, len(frames)).to(
                        frames.device
                    )
        missing = [name for name in self.weights if name not in parts]
        if missing:
            raise ValueError(
                f"no reward gives the score {missing[0]!r}; there are {', '.join(parts) or 'none'}"
            )
        self.parts = parts
        weighted = [weight * parts[name] for name, weight in self.weights.items()]
        return Scored(torch.stack(weighted).sum(0), parts)


def _checked(name: str, values: Tensor, count: int) -> Tensor:
    if values.shape != (count,):
        raise ValueError(
            f"{name} has shape {tuple(values.shape)} for {count} videos; a reward gives one score each"
        )
    values = values.detach().float()
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{name} is {values[bad[0]].item()} for video {bad[0]} of the batch; a score is finite"
        )
    return values


@dataclass(frozen=True, slots=True)
class MotionReward:
    """motion: how fast what moves in the video is, in heights of the picture per second; needs no weights.

    The flow (evaluation/optical_flow.py) is measured on locally normalised frames and trusted where blocks
    agree and the way back fits, so that drift of light and colour, pulses, noise and flicker are no motion.
    Of the speeds between neighbouring frames the middle 80% are averaged: a jump between two chunks is none.

    fps: frames a second. share: the fastest part of the picture that counts. highest: what moves faster earns
    no more, since a score without end is an invitation to shake the picture.
    """

    fps: float = 16.0
    share: float = 0.05
    highest: float = 2.0

    def __post_init__(self) -> None:
        if not (self.fps > 0 and self.highest > 0 and 0 < self.share <= 1):
            raise ValueError(
                f"fps is {self.fps}, highest {self.highest} and share {self.share}; use positive numbers, "
                "and a share up to 1"
            )

    def __call__(self, frames: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Frames [B, T, H, W, 3], uint8 or float from 0 to 1, T at least 2; the prompts do not matter."""
        speeds = [self._speed(clip) for clip, _ in zip(frames, prompts, strict=True)]
        return {"motion": torch.stack(speeds) if speeds else frames.new_zeros(0, dtype=torch.float32)}

    def _speed(self, clip: Tensor) -> Tensor:
        speeds = moving_speed(optical_flow(clip), self.share).sort().values
        outside = len(speeds) // 10
        middle = speeds[outside : len(speeds) - outside].mean()
        return (middle * self.fps / clip.shape[1]).clamp(max=self.highest)


@dataclass(frozen=True, slots=True)
class GuardConfig:
    """What a RewardGuard calls reward hacking.

    window: student updates that a mean is taken over. errors: standard errors of the difference of two such
    means by which one has to change before it counts; fall, growth: how much of the held-out score has to be
    lost, in its own unit, and by which part the distance has to grow. score, held_out and distance are names
    of figures of the log. stops: end the training rather than warn.
    """

    window: Annotated[int, Range(2, 100_000)] = 50  # a spread needs two
    errors: Threshold = 4.0
    fall: Threshold = 0.02
    growth: Threshold = 0.1
    score: str = "score"
    held_out: str = "agreement"
    distance: str = "distance"
    stops: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


class _Window(NamedTuple):
    """Mean and variance of the mean over the window that ends with `step`, for every figure."""

    step: int
    mean: dict[str, float]
    variance: dict[str, float]


class RewardGuard:
    """Watches for a score that is raised at the cost of what it stands for.

    The latest window is held against the one in which the held-out score was best, and against the one in
    which the distance from the teacher (the unweighted DMD loss, a proxy of the divergence) was least: the
    score has risen since, and the held-out score has fallen, or the distance has grown. Steps without a score
    (the critic's alone) are passed over. The state is one window of figures and those two, and follows from
    the log.
    """

    def __init__(self, config: GuardConfig | None = None) -> None:
        self.config = config or GuardConfig()
        self._recent: deque[dict[str, float]] = deque(maxlen=self.config.window)
        self._best: dict[str, _Window] = {}
        self.told: str | None = None

    @classmethod
    def from_log(cls, path: Path, last_step: int, config: GuardConfig | None = None) -> RewardGuard:
        """The guard as it was after `last_step` of the run that wrote this log.jsonl."""
        guard = cls(config)
        for figures in read_log(path, last_step):
            guard.observe(int(figures["step"]), figures)
        return guard

    def on_step(self, step: int, figures: Mapping[str, float]) -> str | None:
        """For Trainer: the sentence that ends the training where the guard stops it; else a warning in the
        log, once for every time that it begins."""
        known = self.told
        told = self.observe(step, figures)
        if told and not known:
            logger.warning(told)
        return told if self.config.stops else None

    def observe(self, step: int, figures: Mapping[str, float]) -> str | None:
        """Take in the figures of a step; what is wrong, in a sentence, or None. `told` keeps it."""
        config = self.config
        if config.score not in figures:
            return self.told
        names = [name for name in (config.score, config.held_out, config.distance) if name in figures]
        # the log has six digits, and a guard that is rebuilt from it has to be the same
        self._recent.append({name: round(float(figures[name]), 6) for name in names})
        if len(self._recent) == config.window:
            latest = self._latest(step)
            judged = self._judged(latest, config.held_out, -1), self._judged(latest, config.distance, 1)
            self.told = judged[0] or judged[1]
        return self.told

    def _latest(self, step: int) -> _Window:
        """Of the figures that every step of the window has."""
        shared = set.intersection(*(set(figures) for figures in self._recent))
        mean, variance = {}, {}
        for name in shared:
            values = [figures[name] for figures in self._recent]
            mean[name] = sum(values) / len(values)
            spread = sum((value - mean[name]) ** 2 for value in values) / (len(values) - 1)
            variance[name] = spread / len(values)
        return _Window(step, mean, variance)

    def _judged(self, latest: _Window, name: str, worse: int) -> str | None:
        """Hold a figure against its best window; worse: 1 where more of it is worse, else -1."""
        if name not in latest.mean:
            return None
        best = self._best.get(name)
        if best is None or worse * (latest.mean[name] - best.mean[name]) < 0:
            self._best[name] = latest
            return None
        config = self.config
        allowed = config.fall if name == config.held_out else config.growth * abs(best.mean[name])
        lost = worse * (latest.mean[name] - best.mean[name])
        gained = latest.mean[config.score] - best.mean[config.score]
        if lost <= max(allowed, self._noise(latest, best, name)):
            return None
        if gained <= self._noise(latest, best, config.score):
            return None
        changes = [
            f"{figure} went from {best.mean[figure]:.4g} to {latest.mean[figure]:.4g}"
            for figure in (config.score, name)
        ]
        return (
            f"{' while '.join(changes)} between steps {best.step} and {latest.step}; the reward is being "
            f"exploited, so go back to step {best.step} or raise beta"
        )

    def _noise(self, latest: _Window, best: _Window, name: str) -> float:
        return self.config.errors * math.sqrt(latest.variance[name] + best.variance[name])
