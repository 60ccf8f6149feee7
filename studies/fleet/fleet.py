"""Fleet: replicas on machines of several cards, a gateway in front of them, autoscaling, and the loss of a
machine, in simulated time.

As rfengine/serving/replicas has it, a viewer is sent to the replica with the most free memory, and refused
where none has a place; replicas share one queue of jobs, in which each holds what it makes by a lease; the
sessions of a replica that falls silent are given up after a while. One gateway in front of cards on several
machines has not been tried with rfengine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import simpy

from rfengine.serving.replicas.scaling import REFUSED_S
from studies.fleet.arrivals import Demand, Player
from studies.fleet.autoscaling import Rule, State
from studies.fleet.measures import Measures, SessionEnd, Visit
from studies.fleet.node import Limits, Node, Session
from studies.fleet.service_times import ServiceTimes

JOB_ATTEMPTS = 3  # after which it has failed with "interrupted"
JOB_RETRY_S = 1.0  # of a replica that has no place for a job


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """How a fleet is set up; the numbers of seconds and the sizes are assumptions, but for retry_s, silence_s
    and job_lease_s, which are the server's.

    cards: at the start. least, most: what autoscaling keeps to; None is no autoscaling. start_s: from asking
    for a card to a warm replica. machine_cards: cards that are lost together. retry_s: Retry-After of a
    refusal. patience_s: how long a viewer tries. backoff_s, most_backoff_s: waits after an error, doubled
    each time, drawn between half and the whole. silence_s: after which the sessions of a lost machine are
    told so. job_lease_s: after which its jobs are queued again. buffer_s: of a player.
    """

    cards: int
    limits: Limits
    least: int | None = None
    most: int | None = None
    start_s: float = 180.0
    scale_every_s: float = 10.0
    machine_cards: int = 8
    retry_s: float = 5.0
    patience_s: float = 120.0
    backoff_s: float = 1.0
    most_backoff_s: float = 30.0
    silence_s: float = 10.0
    job_lease_s: float = 15.0
    buffer_s: float = 1.0


@dataclass(slots=True)
class Job:
    """A video to be made. chunks: of it."""

    sent_at: float
    chunks: int
    attempts: int = 0


@dataclass(slots=True, eq=False)
class Replica:
    """A node in the fleet: on which machine it is, the job that it makes, and of each of its viewers the end
    of the session and the player. The end's value is None where the viewer leaves, else a SessionEnd."""

    node: Node
    machine: int
    job: Job | None = None
    viewers: dict[Session, tuple[simpy.Event, Player]] = field(default_factory=dict)


class Fleet:
    """Runs a plan under a demand. measures: what came of it. rule: of autoscaling, where the plan has it."""

    def __init__(
        self,
        times: ServiceTimes,
        plan: FleetPlan,
        demand: Demand,
        seed: int,
        measures: Measures,
        rule: Rule | None = None,
    ) -> None:
        if (plan.most is None) != (rule is None):
            raise ValueError(
                f"most is {plan.most} and the rule of autoscaling {rule}; give both, or neither for a fleet "
                "that stays as it is"
            )
        self.env = simpy.Environment()
        self.times, self.plan, self.demand, self.seed = times, plan, demand, seed
        self.measures, self.rule = measures, rule
        self.replicas: dict[Replica, None] = {}  # in the order in which they began
        self.jobs: deque[Job] = deque()  # that wait, oldest first
        self.waiting = 0  # viewers who were refused and try again
        self.starting = 0  # cards
        self.leased = 0  # jobs of lost replicas, whose leases have not ended
        self._made = 0  # replicas in all
        self._refusals: deque[float] = deque()  # when, of the last REFUSED_S
        self._ending = Random(f"{seed} ending")
        self._jobs_sent = self.env.event()
        for _ in range(plan.cards):
            self._add()

    def run(self, seconds: float, lost: tuple[float, int] | None = None) -> dict[str, Any]:
        """Play so many seconds and return the report. lost: when a machine is lost, and which one."""
        env = self.env
        env.process(self._admit_viewers(seconds))
        env.process(self._send_jobs(seconds))
        if self.rule is not None:
            env.process(self._scale())
        if lost is not None:
            env.process(self._lose(*lost))
        env.process(self._sample())
        env.run(until=seconds)
        self.measures.finish(self)
        return self.measures.report()

    @property
    def open_sessions(self) -> int:
        """Viewers' sessions."""
        return sum(len(each.viewers) for each in self.replicas)

    # Viewers

    def _admit_viewers(self, until: float) -> Generator[simpy.Event, None, None]:
        random = Random(f"{self.seed} viewers")
        for number, (when, watch_s) in enumerate(self.demand.viewers(until, random)):
            yield self.env.timeout(when - self.env.now)
            self.env.process(self._visit(Visit(when, watch_s), Random(f"{self.seed} viewer {number}")))

    def _visit(self, visit: Visit, random: Random) -> Generator[simpy.Event, None, None]:
        """One viewer: come, be admitted, watch, and come back after an error, until the visit is over."""
        self.measures.visits.append(visit)
        while visit.left_s > 0:
            replica = yield from self._ask(visit, random)
            if replica is None:
                visit.outcome = "gave up"
                return
            if not (yield from self._watch(visit, replica)):
                break
            longest = self.plan.backoff_s * 2 ** (len(visit.ends) - 1)
            yield self.env.timeout(min(longest, self.plan.most_backoff_s) * (0.5 + random.random() / 2))
        visit.outcome = "finished"

    def _ask(self, visit: Visit, random: Random) -> Generator[simpy.Event, None, Replica | None]:
        """Ask until a replica has a place; None where the viewer's patience ends."""
        asked, refused = self.env.now, False
        while (replica := self._place()) is None:
            visit.refusals += 1
            if self.rule is not None:
                self._refusals.append(self.env.now)
            if not refused:
                refused, self.waiting = True, self.waiting + 1
            pause = self.plan.retry_s * (0.8 + 0.4 * random.random())
            if self.env.now + pause - asked > self.plan.patience_s:
                break
            yield self.env.timeout(pause)
        self.waiting -= refused
        return replica

    def _watch(self, visit: Visit, replica: Replica) -> Generator[simpy.Event, None, bool]:
        """Watch to the end of the visit, or to that of the session; whether it was the session's."""
        opened, ended, player = self.env.now, self.env.event(), Player(self.plan.buffer_s)
        session = Session(lambda when, seconds, _: player.take(when, seconds))
        replica.node.open(session)
        replica.viewers[session] = ended, player
        visit.players.append(player)
        visit.sessions.append((opened, None))
        self.env.process(self._leave(visit.left_s, ended))
        end = yield ended
        visit.left_s -= self.env.now - opened
        if end is not None:
            visit.sessions[-1] = opened, end.at_s
            visit.ends.append(end)
            return True
        visit.sessions[-1] = opened, self.env.now
        visit.left_s = 0.0
        del replica.viewers[session]
        replica.node.close(session)
        self._end_if_empty(replica)
        return False

    def _leave(self, seconds: float, ended: simpy.Event) -> Generator[simpy.Event, None, None]:
        yield self.env.timeout(seconds)
        if not ended.triggered:  # the session was not lost before
            ended.succeed(None)

    def _place(self) -> Replica | None:
        """The replica with a place that has the most free memory, the first of several."""
        open_replicas = [each for each in self.replicas if each.node.refusal() is None]
        return max(open_replicas, key=lambda each: each.node.free_bytes, default=None)

    # Jobs

    def _send_jobs(self, until: float) -> Generator[simpy.Event, None, None]:
        for when in self.demand.jobs(until, Random(f"{self.seed} jobs")):
            yield self.env.timeout(when - self.env.now)
            self.measures.jobs_sent += 1
            self._queue(Job(self.env.now, self.demand.job_chunks))

    def _queue(self, job: Job) -> None:
        place = sum(each.sent_at <= job.sent_at for each in self.jobs)
        self.jobs.insert(place, job)
        self._jobs_sent.succeed()
        self._jobs_sent = self.env.event()

    def _run_jobs(self, replica: Replica) -> Generator[simpy.Event, None, None]:
        """One job after another, oldest first, each in a background session."""
        node = replica.node
        while not (node.lost or node.draining):
            if not self.jobs:
                yield self._jobs_sent
                continue
            if node.refusal() is not None:
                yield self.env.timeout(JOB_RETRY_S)
                continue
            job, done = self.jobs.popleft(), self.env.event()
            job.attempts += 1
            session = Session(None, False, job.chunks, done.succeed, background=True)
            node.open(session)
            replica.job = job
            yield done  # never, where the node is lost or drained
            replica.job = None
            self.measures.job_made(job, session, self.env.now)
        self._end_if_empty(replica)

    def _requeue(self, job: Job) -> Generator[simpy.Event, None, None]:
        self.leased += 1
        yield self.env.timeout(self.plan.job_lease_s)
        self.leased -= 1
        if job.attempts >= JOB_ATTEMPTS:
            self.measures.jobs_failed += 1
        else:
            self.measures.jobs_requeued += 1
            self._queue(job)

    # Cards

    def _add(self) -> None:
        node = Node(self.env, self.times, self.plan.limits, Random(f"{self.seed} node {self._made}"))
        replica = Replica(node, self._made // self.plan.machine_cards)
        self._made += 1
        self.replicas[replica] = None
        if self.demand.jobs_share:
            self.env.process(self._run_jobs(replica))

    def _start(self) -> Generator[simpy.Event, None, None]:
        self.starting += 1
        yield self.env.timeout(self.plan.start_s)
        self.measures.card_s += self.plan.start_s
        self.starting -= 1
        self._add()

    def _scale(self) -> Generator[simpy.Event, None, None]:
        """Start and end cards as the rule wants."""
        plan, env = self.plan, self.env
        while True:
            yield env.timeout(plan.scale_every_s)
            admitting = [each for each in self.replicas if not each.node.draining]
            present = len(admitting) + self.starting
            wanted = self.rule.wanted(env.now, self._state(present))
            wanted = min(max(wanted, plan.least or 0), plan.most)
            for _ in range(wanted - present):
                env.process(self._start())
            self._end_some(admitting, min(present - wanted, len(admitting) - (plan.least or 0)))

    def _state(self, present: int) -> State:
        while self._refusals and self._refusals[0] <= self.env.now - REFUSED_S:
            self._refusals.popleft()
        working = sum(len(each.node.sessions) for each in self.replicas)
        return State(present, self.open_sessions, working, self.waiting, len(self._refusals), len(self.jobs))

    def _end_some(self, admitting: list[Replica], count: int) -> None:
        """Let so many replicas admit nobody and end: the emptiest once they are empty or, where the rule
        drains, any of them at once."""
        if count <= 0:
            return
        if self.rule.drains:
            for replica in self._ending.sample(admitting, count):
                self._drain(replica)
            return
        for replica in sorted(admitting, key=lambda each: len(each.node.sessions))[:count]:
            replica.node.draining = True
            self._end_if_empty(replica)

    def _drain(self, replica: Replica) -> None:
        """End the sessions, whose viewers are told so, and queue the job again as if it had not begun."""
        replica.node.lose()
        self._remove(replica)
        self._tell(replica, SessionEnd(self.env.now, is_lost=False))
        if replica.job is not None:
            replica.job.attempts -= 1
            self._queue(replica.job)

    def _tell(self, replica: Replica, end: SessionEnd) -> None:
        """The viewers who are still there hear that their sessions have ended."""
        for ended, _ in replica.viewers.values():
            if not ended.triggered:
                ended.succeed(end)

    def _end_if_empty(self, replica: Replica) -> None:
        node = replica.node
        if node.draining and not node.sessions and replica in self.replicas:
            self._remove(replica)
            node.end()

    def _remove(self, replica: Replica) -> None:
        del self.replicas[replica]
        self.measures.node_ended(replica.node, self.env.now)

    def _lose(self, when: float, machine: int) -> Generator[simpy.Event, None, None]:
        """Lose a machine: its sessions fail with a retryable error once it was silent for long enough, its
        jobs wait for the end of a lease."""
        yield self.env.timeout(when)
        lost = [each for each in self.replicas if each.machine == machine]
        for replica in lost:
            replica.node.lose()
            self._remove(replica)
            if replica.job is not None:
                self.env.process(self._requeue(replica.job))
        yield self.env.timeout(self.plan.silence_s)
        for replica in lost:
            self._tell(replica, SessionEnd(when, is_lost=True))

    def _sample(self) -> Generator[simpy.Event, None, None]:
        while True:
            self.measures.sample(self)
            yield self.env.timeout(self.measures.sample_every_s)
