"""RewardGuard: notices when a score is raised at the cost of what it stands for."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

from rfengine.limits import Range, check_fields
from rfengine.training.log import read_log

logger = logging.getLogger(__name__)

Threshold = Annotated[float, Range(0, 1e6)]


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

    The latest window is compared with the one in which the held-out score was best, and with the one in
    which the distance from the teacher (the unweighted DMD loss, a proxy of the divergence) was least: the
    score has risen since, and the held-out score has fallen, or the distance has grown. Steps without a score
    (the critic's alone) are passed over. The state is one window of figures and those two, and follows from
    the log.
    """

    def __init__(self, config: GuardConfig | None = None) -> None:
        self.config = config or GuardConfig()
        self._recent: deque[dict[str, float]] = deque(maxlen=self.config.window)
        self._best: dict[str, _Window] = {}
        self.warning: str | None = None

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
        known = self.warning
        found = self.observe(step, figures)
        if found and not known:
            logger.warning(found)
        return found if self.config.stops else None

    def observe(self, step: int, figures: Mapping[str, float]) -> str | None:
        """Take in the figures of a step; returns a sentence on what is wrong, or None, as `warning` does."""
        config = self.config
        if config.score not in figures:
            return self.warning
        names = [name for name in (config.score, config.held_out, config.distance) if name in figures]
        # the log has six digits, and a guard that is rebuilt from it has to be the same
        self._recent.append({name: round(float(figures[name]), 6) for name in names})
        if len(self._recent) == config.window:
            latest = self._latest(step)
            judged = self._judged(latest, config.held_out, -1), self._judged(latest, config.distance, 1)
            self.warning = judged[0] or judged[1]
        return self.warning

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
        """Compare a figure with its best window; worse: 1 where more of it is worse, else -1."""
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
