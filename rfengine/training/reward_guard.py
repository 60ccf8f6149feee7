"""RewardGuard: notices when a score is raised at the cost of what it stands for."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rfengine.training.log import read_log

logger = logging.getLogger(__name__)

WINDOW = 50  # student updates that a mean is taken over
ERRORS = 4.0  # standard errors of the difference of two means by which one changes before it counts
FALL = 0.02  # of the held-out score, in its own unit, that may be lost
GROWTH = 0.1  # the part by which the distance may grow


@dataclass(frozen=True, slots=True)
class _Window:
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

    held_out: the name of the held-out score in the log. stops: end the training rather than warn.
    """

    def __init__(self, held_out: str, stops: bool = False) -> None:
        self.held_out, self.stops = held_out, stops
        self._recent: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self._best: dict[str, _Window] = {}
        self.warning: str | None = None

    @classmethod
    def from_log(cls, path: Path, last_step: int, held_out: str, stops: bool = False) -> RewardGuard:
        """The guard as it was after `last_step` of the run that wrote this log.jsonl."""
        guard = cls(held_out, stops)
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
        return found if self.stops else None

    def observe(self, step: int, figures: Mapping[str, float]) -> str | None:
        """Take in the figures of a step; returns a sentence on what is wrong, or None, as `warning` does."""
        if "score" not in figures:
            return self.warning
        names = [name for name in ("score", self.held_out, "distance") if name in figures]
        # the log has six digits, and a guard that is rebuilt from it has to be the same
        self._recent.append({name: round(float(figures[name]), 6) for name in names})
        if len(self._recent) == WINDOW:
            shared = set.intersection(*map(set, self._recent))
            values = {name: [each[name] for each in self._recent] for name in shared}
            means = {name: fmean(numbers) for name, numbers in values.items()}
            squares = {name: sum((x - means[name]) ** 2 for x in numbers) for name, numbers in values.items()}
            variances = {name: square / (WINDOW - 1) / WINDOW for name, square in squares.items()}
            latest = _Window(step, means, variances)
            judged = self._judged(latest, self.held_out, -1), self._judged(latest, "distance", 1)
            self.warning = judged[0] or judged[1]
        return self.warning

    def _judged(self, latest: _Window, name: str, worse: int) -> str | None:
        """Compare a figure with its best window; worse: 1 where more of it is worse, else -1."""
        if name not in latest.mean:
            return None
        best = self._best.get(name)
        lost = 0.0 if best is None else worse * (latest.mean[name] - best.mean[name])
        if best is None or lost < 0:
            self._best[name] = latest
            return None

        def noise(figure: str) -> float:
            return ERRORS * math.sqrt(latest.variance[figure] + best.variance[figure])

        allowed = FALL if name == self.held_out else GROWTH * abs(best.mean[name])
        gained = latest.mean["score"] - best.mean["score"]
        if lost <= max(allowed, noise(name)) or gained <= noise("score"):
            return None
        changes = [
            f"{figure} went from {best.mean[figure]:.4g} to {latest.mean[figure]:.4g}"
            for figure in ("score", name)
        ]
        return (
            f"{' while '.join(changes)} between steps {best.step} and {latest.step}; the reward is being "
            f"exploited, so go back to step {best.step} or raise beta"
        )
