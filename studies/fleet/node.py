"""Node: one replica of the server in simulated time, with the scheduling rules of rfengine.serving.

One engine thread makes a chunk in each turn; the session that has waited longest is next; a background
session, which is a job's, gets a turn where no other wants one, and at least every ninth. A realtime session
wants a chunk while less than its lead of video is ahead of the clock, and while fewer than two of its chunks
wait for their encoding. A session is admitted where its memory and its place are free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from studies.fleet.service_times import CHUNK_FRAMES, FIRST_FRAMES, FPS, ServiceTimes

if TYPE_CHECKING:
    from collections.abc import Generator

    import simpy

FOREGROUND_TURNS = 8  # before a background session gets one although others wait
MOST_UNDELIVERED = 2  # chunks that were made and are not encoded
LEAD_S = 1.0  # of video ahead of the clock
_MANY = 10**9
_SAME_S = 1e-9  # a wait that is shorter is over: it may be a rounding error

Take = Callable[[float, float, int], None]  # when a fragment comes, seconds of video in it, its number


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one replica. session_bytes: of device memory for each session; memory_bytes: for all."""

    max_sessions: int = _MANY
    memory_bytes: int = _MANY
    session_bytes: int = 1


class Session:
    """One video on a node: of a viewer, or in the background of a job, which ends after `chunks`.

    take: gets each fragment, possibly before its time, which it is told. on_end: called when all chunks are
    made.
    """

    __slots__ = (
        "background", "chunks", "clock_start", "closed", "lane_free", "made", "on_end", "opened_at",
        "realtime", "seconds", "started_at", "take", "undelivered",
    )  # fmt: skip

    def __init__(
        self,
        take: Take | None = None,
        realtime: bool = True,
        chunks: int | None = None,
        on_end: Callable[[], None] | None = None,
        background: bool = False,
    ) -> None:
        self.take, self.realtime, self.chunks, self.on_end = take, realtime, chunks, on_end
        self.background = background
        self.closed = False
        self.made = 0
        self.clock_start = self.seconds = self.lane_free = 0.0
        self.undelivered: deque[float] = deque()  # when each will be delivered
        self.opened_at = 0.0
        self.started_at: float | None = None  # its first turn


class Node:
    """One replica. Its methods are called at the simulated time at which they happen.

    busy_s: of the engine's thread so far. up_at: when it began.
    """

    def __init__(self, env: simpy.Environment, times: ServiceTimes, limits: Limits, random: Random) -> None:
        self.env, self.times, self.limits = env, times, limits
        self.sessions: list[Session] = []  # in the order of their next turns
        self.draining = self.lost = False
        self.busy_s = 0.0
        self.up_at = env.now
        self._place = random.randrange(_MANY)  # in the samples of the times; one further with each turn
        self._foreground_turns = 0
        self._to_encode: deque[Session] = deque()  # chunks for the engine's own thread
        self._threads = [env.now] * times.delivery_threads  # when each is free
        self._sleeping = False
        self._engine = env.process(self._run())

    # What the fleet calls

    def refusal(self) -> str | None:
        """The code with which a session more would be refused."""
        if self.draining or self.lost:
            return "draining"
        if len(self.sessions) >= self.limits.max_sessions:
            return "too_many_sessions"
        if self.free_bytes < self.limits.session_bytes:
            return "no_memory"
        return None

    @property
    def free_bytes(self) -> int:
        return self.limits.memory_bytes - len(self.sessions) * self.limits.session_bytes

    def open(self, session: Session) -> str | None:
        """Admit a session; returns the code of the refusal where it cannot be."""
        refusal = self.refusal()
        if refusal is None:
            session.opened_at = self.env.now
            self.sessions.append(session)
            self._wake()
        return refusal

    def close(self, session: Session) -> None:
        """End a session; closing it again changes nothing."""
        if not session.closed:
            session.closed = True
            self.sessions.remove(session)
            self._wake()

    def lose(self) -> list[Session]:
        """The machine is gone, with all sessions, which are returned."""
        self.lost = True
        lost, self.sessions = self.sessions, []
        for session in lost:
            session.closed = True
        self._wake()
        return lost

    def end(self) -> None:
        """Stop a node without sessions."""
        self.lost = True
        self._wake()

    # The engine thread

    def _wake(self) -> None:
        if self._sleeping:
            self._sleeping = False
            self._engine.interrupt()

    def _run(self) -> Generator[simpy.Event, None, None]:
        import simpy

        while not self.lost:
            while self._to_encode:
                yield from self._encode(self._to_encode.popleft())
            session, wait = self.next_turn()
            if session is not None:
                yield from self._take_turn(session)
                continue
            self._sleeping = True
            try:
                yield self.env.event() if wait is None else self.env.timeout(wait)
                self._sleeping = False
            except simpy.Interrupt:
                pass

    def next_turn(self) -> tuple[Session | None, float | None]:
        """The session whose turn it is, moved to the end of the order; or None and the seconds until one will
        want a turn, None where nothing but an event changes that."""
        now, waiting, soonest = self.env.now, [], None
        for session in self.sessions:
            wait = chunk_wait(session, now)
            if wait <= 0.0:
                waiting.append(session)
            elif soonest is None or wait < soonest:
                soonest = wait
        session = self.choose(waiting)
        if session is not None:
            self.sessions.remove(session)
            self.sessions.append(session)
        return session, soonest

    def choose(self, waiting: list[Session]) -> Session | None:
        """The one whose last turn is longest ago; a background session where no other waits, or at times."""
        foreground = next((each for each in waiting if not each.background), None)
        background = next((each for each in waiting if each.background), None)
        if background is not None and (foreground is None or self._foreground_turns >= FOREGROUND_TURNS):
            self._foreground_turns = 0
            return background
        self._foreground_turns += 1
        return foreground

    def _take_turn(self, session: Session) -> Generator[simpy.Event, None, None]:
        if session.started_at is None:
            session.started_at = self.env.now
        self._place += 1
        is_last = session.made + 1 == session.chunks
        seconds = (self.times.last_turn if is_last else self.times.turn)(session.made, self._place)
        self.busy_s += seconds
        yield self.env.timeout(seconds)
        if not session.closed:
            self._hand_on(session)

    def _hand_on(self, session: Session) -> None:
        now = self.env.now
        if not session.made or session.seconds < now - session.clock_start:
            session.clock_start, session.seconds = now, 0.0
        session.seconds += chunk_frames(session.made) / FPS
        session.made += 1
        if not self._threads:
            self._to_encode.append(session)
            return
        # a chunk behind another of its session takes its place among the others when it is made
        thread = min(range(len(self._threads)), key=self._threads.__getitem__)
        done = max(now, session.lane_free, self._threads[thread]) + self.times.encode(self._place)
        self._threads[thread] = session.lane_free = done
        session.undelivered.append(done)
        self._deliver(session, done)

    def _encode(self, session: Session) -> Generator[simpy.Event, None, None]:
        seconds = self.times.encode(self._place)
        self.busy_s += seconds
        yield self.env.timeout(seconds)
        if not session.closed:
            self._deliver(session, self.env.now)

    def _deliver(self, session: Session, when: float) -> None:
        number = session.made - 1
        if session.take is not None:
            session.take(when, chunk_frames(number) / FPS, number)
        if session.made == session.chunks and not session.closed:
            self.close(session)
            if session.on_end is not None:
                session.on_end()


def chunk_frames(number: int) -> int:
    """Frames of a session's chunk of that number, from 0."""
    return CHUNK_FRAMES if number else FIRST_FRAMES


def chunk_wait(session: Session, now: float) -> float:
    """Seconds until the session wants a chunk."""
    undelivered, wait = session.undelivered, 0.0
    while undelivered and undelivered[0] <= now + _SAME_S:
        undelivered.popleft()
    if len(undelivered) >= MOST_UNDELIVERED:
        wait = undelivered[0] - now
    if session.realtime and session.made:
        wait = max(wait, session.seconds - (now - session.clock_start) - LEAD_S)
    return wait if wait > _SAME_S else 0.0
