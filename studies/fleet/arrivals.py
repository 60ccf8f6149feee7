"""Who comes, and when: viewers with a session of their own, and jobs; and how a viewer plays what it gets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from studies.fleet.service_times import CHUNK_FRAMES, FIRST_FRAMES

DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Demand:
    """Arrivals of one kind of day; every number is an assumption.

    viewers_an_hour: the mean over the day. wave: how far the rate goes up and down around it, of 1, in a
    cosine whose peak is at peak_s. watch_mean_s: the mean length of a visit, whose lengths are lognormal with
    a standard deviation of the logarithm of watch_spread; most_watch_s: the life of a session. jobs_share:
    jobs for each viewer. job_frames: of a job's video. present: viewers who come in the first present_s
    beside the others, for the rest of a visit.
    """

    viewers_an_hour: float
    wave: float = 0.0
    peak_s: float = 0.75 * DAY_S
    watch_mean_s: float = 600.0
    watch_spread: float = 1.0
    most_watch_s: float = 4 * 3600.0
    jobs_share: float = 0.0
    job_frames: int = 81
    present: int = 0
    present_s: float = 60.0

    def __post_init__(self) -> None:
        if self.viewers_an_hour < 0 or not 0 <= self.wave <= 1 or self.watch_mean_s <= 0:
            raise ValueError(
                f"viewers_an_hour is {self.viewers_an_hour:g}, wave {self.wave:g} and watch_mean_s "
                f"{self.watch_mean_s:g}; use at least 0, a share of 1, and more than 0 s"
            )

    def rate(self, now: float) -> float:
        """Viewers a second at that time."""
        wave = self.wave * math.cos(2 * math.pi * (now - self.peak_s) / DAY_S)
        return self.viewers_an_hour / 3600 * (1 + wave)

    def watch_s(self, random: Random) -> float:
        """The length of one visit."""
        middle = math.log(self.watch_mean_s) - self.watch_spread**2 / 2
        return min(random.lognormvariate(middle, self.watch_spread), self.most_watch_s)

    @property
    def job_chunks(self) -> int:
        return 1 + math.ceil(max(0, self.job_frames - FIRST_FRAMES) / CHUNK_FRAMES)

    def viewers(self, until: float, random: Random) -> Iterator[tuple[float, float]]:
        """When each comes, and for how long, in the order of time."""
        present = sorted(random.random() * self.present_s for _ in range(self.present))
        visits = [(when, self._rest_s(random)) for when in present]
        visits += [(when, self.watch_s(random)) for when in self._arrivals(until, random)]
        yield from sorted(visits)

    def _rest_s(self, random: Random) -> float:
        """What is left of the visit of one who is met there: long visits are met more often, at any moment
        of theirs."""
        middle = math.log(self.watch_mean_s) + self.watch_spread**2 / 2
        return random.random() * min(random.lognormvariate(middle, self.watch_spread), self.most_watch_s)

    def _arrivals(self, until: float, random: Random) -> Iterator[float]:
        """A Poisson process, thinned to the wave of the day."""
        highest = self.viewers_an_hour / 3600 * (1 + self.wave)
        now = 0.0
        while highest and (now := now + random.expovariate(highest)) < until:
            if random.random() * highest < self.rate(now):
                yield now

    def jobs(self, until: float, random: Random) -> Iterator[float]:
        """When each job is sent: a Poisson process over the day."""
        rate, now = self.jobs_share * self.viewers_an_hour / 3600, 0.0
        while rate and (now := now + random.expovariate(rate)) < until:
            yield now


@dataclass(slots=True)
class Player:
    """Plays fragments at the playback rate. It begins once `buffer_s` of video is there, and where it has
    played all that came it stalls until the next fragment.

    stalls, stalled_s: how often and how long it stood still. started_at: when it began to play.
    """

    buffer_s: float
    stalls: int = 0
    stalled_s: float = 0.0
    started_at: float | None = None
    _buffered_s: float = 0.0
    _plays_until: float = 0.0

    def take(self, now: float, seconds: float) -> None:
        """A fragment comes."""
        if self.started_at is None:
            self._buffered_s += seconds
            if self._buffered_s >= self.buffer_s:
                self.started_at, self._plays_until = now, now + self._buffered_s
            return
        late = now - self._plays_until
        if late > 1e-9:
            self.stalls += 1
            self.stalled_s += late
            self._plays_until = now
        self._plays_until += seconds
