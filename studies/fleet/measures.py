"""Measures: what a simulated fleet gave its viewers and its jobs, and what it took."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from studies.fleet.arrivals import Player

if TYPE_CHECKING:
    from studies.fleet.fleet import Fleet, Job
    from studies.fleet.node import Node, Session

PERCENTILES = (50, 95, 99)
# Student's t of a two-sided interval of 95 %, by the number of runs
_STUDENT_T = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The least of `values` that so many per cent of them do not exceed; None of none."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    return {f"p{percent}": percentile(values, percent) for percent in PERCENTILES}


def mean_of_runs(values: Sequence[float | None]) -> dict[str, float | None]:
    """The mean of independent runs, and half the width of its confidence interval of 95 %. None of none, and
    no width of fewer than three."""
    found = [value for value in values if value is not None]
    if not found:
        return {"mean": None, "half": None}
    half = None
    if len(found) in _STUDENT_T:
        half = _STUDENT_T[len(found)] * statistics.stdev(found) / math.sqrt(len(found))
    return {"mean": statistics.mean(found), "half": half}


def all_means(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each number of the reports of independent runs as mean_of_runs has it, in their own shape."""
    names = [name for name, value in reports[0].items() if name != "loss"]
    return {
        name: all_means([report[name] for report in reports])
        if isinstance(reports[0][name], dict)
        else mean_of_runs([report[name] for report in reports])
        for name in names
    }


@dataclass(frozen=True, slots=True)
class SessionEnd:
    """The end of a session before its viewer left. at_s: since when nothing comes. is_lost: with its machine;
    or its replica was drained."""

    at_s: float
    is_lost: bool


@dataclass(slots=True, eq=False)
class Visit:
    """One viewer. watch_s: how long the visit is meant to last, in sessions; left_s: what is left of it.

    players: one for each session. sessions: when each was opened and when it ended. ends: of sessions that
    ended before the viewer left, in their order.
    """

    came_at: float
    watch_s: float
    outcome: str = "there"  # or finished, or gave up
    refusals: int = 0
    left_s: float = 0.0
    players: list[Player] = field(default_factory=list)
    sessions: list[tuple[float, float | None]] = field(default_factory=list)
    ends: list[SessionEnd] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.left_s = self.watch_s

    @property
    def start_s(self) -> float | None:
        """From coming to the first picture; None where there was none."""
        started = self.players[0].started_at if self.players else None
        return None if started is None else started - self.came_at

    @property
    def lost(self) -> int:
        """Sessions that were lost with their machine."""
        return sum(end.is_lost for end in self.ends)

    @property
    def served_again_s(self) -> list[float]:
        """From each loss of a session to the first picture of the next one, where there was one."""
        return [
            player.started_at - end.at_s
            for end, player in zip(self.ends, self.players[1:], strict=False)
            if end.is_lost and player.started_at is not None
        ]

    @property
    def stalls(self) -> int:
        return sum(player.stalls for player in self.players)

    def watched_s(self, until: float) -> float:
        """Seconds in sessions before `until`."""
        return sum((until if end is None else end) - start for start, end in self.sessions)


@dataclass(slots=True)
class Sample:
    """One moment. watching: viewers who have a picture; waiting: who were refused and try again."""

    at_s: float
    open_sessions: int
    watching: int
    waiting: int
    cards: int
    jobs_waiting: int


@dataclass(slots=True)
class Measures:
    """Counted while a fleet runs; `report` sums it up. since_s: viewers who came earlier are left out of
    what is said of viewers, jobs that were sent earlier out of the waits of jobs."""

    sample_every_s: float = 1.0
    since_s: float = 0.0
    visits: list[Visit] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    busy_s: float = 0.0
    card_s: float = 0.0  # the start of a card included
    run_s: float = 0.0
    jobs_sent: int = 0
    jobs_made: int = 0
    jobs_left: int = 0  # that wait, are made, or were lost and wait for the end of a lease
    jobs_requeued: int = 0
    jobs_failed: int = 0
    job_waits_s: list[float] = field(default_factory=list)  # from sent to begun for the last time
    job_times_s: list[float] = field(default_factory=list)  # from sent to made

    def node_ended(self, node: Node, now: float) -> None:
        self.busy_s += node.busy_s
        self.card_s += now - node.up_at

    def job_made(self, job: Job, session: Session, now: float) -> None:
        self.jobs_made += 1
        if job.sent_at >= self.since_s:
            self.job_waits_s.append(session.opened_at - job.sent_at)
            self.job_times_s.append(now - job.sent_at)

    def sample(self, fleet: Fleet) -> None:
        now = fleet.env.now
        watching = sum(
            player.started_at is not None and player.started_at <= now
            for replica in fleet.replicas
            for _, player in replica.viewers.values()
        )
        self.samples.append(
            Sample(now, fleet.open_sessions, watching, fleet.waiting, len(fleet.replicas), len(fleet.jobs))
        )

    def finish(self, fleet: Fleet) -> None:
        """Count the cards that are there at the end of the run."""
        self.run_s = fleet.env.now
        for replica in fleet.replicas:
            self.node_ended(replica.node, self.run_s)
        making = sum(replica.job is not None for replica in fleet.replicas)
        self.jobs_left = len(fleet.jobs) + making + fleet.leased

    def report(self) -> dict[str, Any]:
        """Everything as JSON values."""
        visits = [visit for visit in self.visits if visit.came_at >= self.since_s]
        outcomes = [visit.outcome for visit in visits]
        watched_s = sum(visit.watched_s(self.run_s) for visit in visits)
        all_watched_s = sum(visit.watched_s(self.run_s) for visit in self.visits)
        stalled_s = sum(player.stalled_s for visit in visits for player in visit.players)
        starts = [visit.start_s for visit in visits if visit.start_s is not None]
        return {
            "viewers": len(visits),
            **{f"viewers_{name.replace(' ', '_')}": outcomes.count(name)
               for name in ("finished", "gave up", "there")},
            "refused_share": _share(visit.refusals > 0 for visit in visits),
            "gave_up_share": _share(outcome == "gave up" for outcome in outcomes),
            "start_s": percentiles(starts),
            "stalled_share": _share(visit.stalls > 0 for visit in visits),
            "drained_share": _share(len(visit.ends) > visit.lost for visit in visits),
            "stall_s_an_hour": stalled_s / watched_s * 3600 if watched_s else None,
            "utilisation": self.busy_s / self.card_s if self.card_s else None,
            "card_hours": self.card_s / 3600,
            "viewer_hours": all_watched_s / 3600,
            "viewers_a_card": all_watched_s / self.card_s if self.card_s else None,
            "most_cards": max((sample.cards for sample in self.samples), default=0),
            "jobs": {
                "sent": self.jobs_sent, "made": self.jobs_made, "left": self.jobs_left,
                "requeued": self.jobs_requeued, "failed": self.jobs_failed,
                "wait_s": percentiles(self.job_waits_s), "time_s": percentiles(self.job_times_s),
            },
            "loss": self._loss(),
        }  # fmt: skip

    def _loss(self) -> dict[str, Any] | None:
        """How those fared whose sessions were lost. all_served_s: until each of them that did not give up
        had a picture again; None while one is still without."""
        struck = [visit for visit in self.visits if visit.lost]
        if not struck:
            return None
        again = [seconds for visit in struck for seconds in visit.served_again_s]
        gave_up = sum(visit.outcome == "gave up" for visit in struck)
        there = [visit for visit in struck if visit.outcome == "there"]  # others left before a picture
        without = sum(visit.lost - len(visit.served_again_s) for visit in there)
        return {
            "sessions": len(struck), "gave_up": gave_up, "without_picture": without,
            "served_again_s": percentiles(again),
            "all_served_s": None if without else max(again, default=None),
        }  # fmt: skip


def _share(values: Iterable[bool]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None
