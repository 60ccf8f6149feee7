"""SessionService: the sessions of one pipeline, whichever transport they come by.

One thread runs all chunks, one session's turn after another's, so that none can hold the model; another
watches leases and stalls. Memory is reckoned before anything is allocated (Admission), and paused sessions
give their place to running ones. Nothing here belongs to the process: several services may live in one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from threading import Condition, Event, Thread

import torch

from rfengine.pipeline import Pipeline
from rfengine.serving.admission import Admission
from rfengine.serving.delivery import Delivery
from rfengine.serving.errors import Fault, ServiceError
from rfengine.serving.events import (
    ChangePrompt,
    Command,
    Consumer,
    EndReason,
    PromptQueued,
    SessionRequest,
    SessionState,
    StateChanged,
)
from rfengine.serving.options import Observer, ServiceOptions
from rfengine.serving.session import MOST_COMMANDS, Cancelled, Session

logger = logging.getLogger(__name__)

_FOREGROUND_TURNS = 8  # before a background session gets one although others wait
_WATCH_S = 0.25
_LONGEST_WAIT_S = 0.5
_DELIVERY_THREADS = 2
_WARM_UP_PROMPT = "a large circle"


class SessionService:
    """Opens sessions and runs them.

    on_lost: called once, on a thread of the service, when a turn hangs or the device is gone; every session
    has failed then, and the process should end. warm_up: first run a video until its window is full, so that
    no client pays for what is built on first use; warm: whether that is done.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        options: ServiceOptions,
        observer: Observer | None = None,
        on_lost: Callable[[str], None] | None = None,
        warm_up: bool = False,
    ) -> None:
        self.warm = not warm_up
        self.pipeline = pipeline
        self.options = options
        self.lost: str | None = None  # why the engine is gone
        self.admission = Admission(pipeline, options)
        self._observer = observer
        self._on_lost = on_lost
        self._changed = Condition()
        self._sessions: list[Session] = []  # in the order of their next turns
        self._draining = False
        self._stopped = Event()
        self._foreground_turns = 0
        self._turn_started: float | None = None
        threads = options.delivery_threads
        if threads is None:
            threads = 0 if pipeline.model.device.type == "cpu" else _DELIVERY_THREADS
        self._delivery = Delivery(threads, self.wake)
        self._threads = [
            Thread(target=self._run, name="rfengine-engine", daemon=True),
            Thread(target=self._watch, name="rfengine-watch", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # What transports call, on any thread

    def open(self, request: SessionRequest, consumer: Consumer) -> Session:
        """Admit a session. Raises ServiceError where it cannot be; nothing is allocated before."""
        needed = self.admission.needed(request)
        with self._changed:
            fault = self.admission.refusal(self._sessions, needed)
            if not self.ready:
                fault = Fault("draining", "the server is stopping; try another one", 503, True, 5)
            if self._observer is not None:
                self._observer.admission(fault is None)
            if fault is not None:
                raise ServiceError(fault)
            points = self.admission.new_points(request, needed)
            session = Session(self, request, consumer, self._delivery.lane(), points, needed)
            self._sessions.append(session)
            self._changed.notify_all()
        return session

    def submit(self, session: Session, command: Command) -> None:
        """Queue a command; its outcome is an event. Raises ServiceError where the session has ended or too
        many commands wait."""
        with self._changed:
            if session.state in (SessionState.DRAINING, SessionState.CLOSED):
                message = f"the session is {session.state}; start another one"
                raise ServiceError(Fault("session_ended", message, 409))
            if len(session.commands) >= MOST_COMMANDS:
                message = f"{len(session.commands)} commands wait, which is the limit; wait for their answers"
                raise ServiceError(Fault("too_many_commands", message, 429, True, 1))
            if isinstance(command, ChangePrompt):  # before its outcome can be known
                session.notify(PromptQueued(command.event_id))
            session.commands.append(command)
            self._changed.notify_all()

    def pause(self, session: Session, event_id: str | None = None) -> None:
        """Stop after the chunk that is being made. Raises ServiceError unless the session runs."""
        with self._changed:
            session.enter(SessionState.PAUSED)
            session.notify(StateChanged(SessionState.PAUSED, event_id))
            self._changed.notify_all()

    def resume(self, session: Session, event_id: str | None = None) -> None:
        """Go on after a pause. Raises ServiceError unless the session is paused and there is room for it."""
        with self._changed:
            since, others = session.state_since, [each for each in self._sessions if each is not session]
            if session.state is SessionState.PAUSED:
                fault = self.admission.shortage(others, session.bytes)
                if fault is not None:
                    raise ServiceError(fault)
            session.enter(SessionState.RUNNING)
            session.shift_clock(session.state_since - since)
            session.notify(StateChanged(SessionState.RUNNING, event_id))
            self._changed.notify_all()

    def renew(self, session: Session) -> None:
        """Say that the session's client is there."""
        session.seen_at = time.monotonic()

    def wake(self) -> None:
        """A consumer has room again, or took a chunk."""
        with self._changed:
            self._changed.notify_all()

    def close(self, session: Session, reason: EndReason = "stopped", fault: Fault | None = None) -> None:
        """End a session at once: inside a chunk after the step that runs, where steps run op by op.

        Closing it again changes nothing.
        """
        with self._changed:
            if session.state is SessionState.CLOSED:
                return
            session.enter(SessionState.CLOSED)
            if fault is not None or session.reason is None:
                session.reason, session.fault = reason, fault
            session.cancelled.set()
            self._changed.notify_all()

    def counts(self) -> dict[SessionState, int]:
        """Sessions by state."""
        with self._changed:
            states = [session.state for session in self._sessions]
        return {state: states.count(state) for state in SessionState}

    def memory(self) -> dict[str, int]:
        """Bytes: "device" of resident streams as reckoned, "host" of kept points, "budget" of the device."""
        with self._changed:
            device = sum(session.bytes for session in self._sessions if session.resident)
            host = sum(session.points.nbytes for session in self._sessions)
        return {"device": device, "host": host, "budget": self.admission.memory_bytes}

    def room(self) -> tuple[int, int]:
        """Device memory in bytes for one more session, and how many there are, without those of jobs."""
        with self._changed:
            foreground = sum(not session.request.background for session in self._sessions)
            return self.admission.room(self._sessions), foreground

    @property
    def ready(self) -> bool:
        """Whether sessions can be opened: neither draining nor stopped, and the engine is there."""
        return not (self._draining or self._stopped.is_set() or self.lost)

    def drain(self, timeout_s: float) -> bool:
        """Admit nobody, and let each session finish its chunk and end; returns whether all did in time."""
        with self._changed:
            self._draining = True
            for session in self._sessions:
                if session.state not in (SessionState.DRAINING, SessionState.CLOSED):
                    self._begin_draining(session, "draining")
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._sessions, timeout_s)

    def stop(self, timeout_s: float = 10.0) -> None:
        """End everything; the service is of no use afterwards."""
        with self._changed:
            self._draining = True
            for session in self._sessions:
                self.close(session, "draining")
            self._changed.wait_for(lambda: not self._sessions, timeout_s)
            self._stopped.set()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout_s)
        if not self._sessions:
            self._delivery.close()

    # What sessions call, on the delivery threads

    def delivery_failed(self, session: Session, error: Exception) -> None:
        """A consumer failed, which ends its session; with a ServiceError it says how."""
        message = "the video could not be encoded or kept; start another session"
        fault = (
            error.fault if isinstance(error, ServiceError) else Fault("delivery_failed", message, 500, True)
        )
        self.close(session, "slow_client" if fault.code == "slow_client" else "failed", fault)

    def end_delivered(self, session: Session) -> None:
        """A consumer knows that its session has ended."""
        with self._changed:
            session.state = SessionState.CLOSED
            self._sessions.remove(session)
            self._changed.notify_all()
        if self._observer is not None:
            self._observer.session_end(session.reason)

    # The engine thread

    def _run(self) -> None:
        if self.options.cpu_threads is not None:
            torch.set_num_threads(self.options.cpu_threads)
        if not self.warm:
            self._warm_up()
        while (turn := self._next_turn()) is not None:
            try:
                self._take_turn(*turn)
            finally:
                self._turn_started = None

    def _warm_up(self) -> None:
        """Where it fails the service never becomes warm, and the log says why."""
        try:
            self.admission.needed(SessionRequest(_WARM_UP_PROMPT))
            chunks = self.pipeline.config.cache.filling_chunks + 3
            for _ in self.pipeline.stream(_WARM_UP_PROMPT).take(chunks):
                if self._stopped.is_set():
                    return
        except Exception:
            logger.exception("the warm-up failed")
            return
        self.warm = True
        logger.info("the model is warm")

    def _next_turn(self) -> tuple[Session, bool] | None:
        """Wait for a session that wants a turn; also whether it may make a chunk. None at the end."""
        while not self._stopped.is_set():
            self._turn_started = time.monotonic()
            self._delivery.run_waiting()
            self._turn_started = None
            with self._changed:
                if self._delivery.is_waiting:
                    continue
                now = time.monotonic()
                waits = {session: self._wait(session, now) for session in self._sessions}
                session = self._choose([each for each, seconds in waits.items() if seconds == 0.0])
                if session is not None:
                    self._sessions.remove(session)
                    self._sessions.append(session)
                    if session.state is SessionState.CREATED:
                        session.enter(SessionState.RUNNING)
                    self._turn_started = now
                    return session, session.chunk_wait(now) == 0.0
                timed = [seconds for seconds in waits.values() if seconds is not None]
                self._changed.wait(min([_LONGEST_WAIT_S, *timed]))
        return None

    def _wait(self, session: Session, now: float) -> float | None:
        """Seconds until the session wants a turn; None is not before something happens."""
        match session.state:
            case SessionState.CLOSED | SessionState.DRAINING:
                return None if session.released else 0.0
            case _ if session.commands:
                return 0.0
            case SessionState.PAUSED:
                parked_in = self.options.park_s - (now - session.state_since)
                return max(0.0, parked_in) if session.resident else None
        return session.chunk_wait(now)

    def _choose(self, waiting: list[Session]) -> Session | None:
        """The one whose last turn is longest ago; a background session where no other waits, or at times."""
        foreground = [session for session in waiting if not session.request.background]
        background = [session for session in waiting if session.request.background]
        if background and (not foreground or self._foreground_turns >= _FOREGROUND_TURNS):
            self._foreground_turns = 0
            return background[0]
        self._foreground_turns += 1
        return foreground[0] if foreground else None

    def _take_turn(self, session: Session, may_advance: bool) -> None:
        started, chunks = time.perf_counter(), session.chunks
        try:
            if session.state in (SessionState.CLOSED, SessionState.DRAINING):
                self._release(session)
                return
            if session.state is SessionState.PAUSED and not session.commands:
                session.park()
                return
            paused = session.state is SessionState.PAUSED
            fault = self._make_room(session)
            if fault is None:
                session.turn(may_advance)
            elif paused:
                session.refuse_commands(fault)
            else:
                raise ServiceError(fault)
        except Cancelled:
            return  # it is closed, and released in its next turn
        except ServiceError as error:
            self.close(session, "failed", error.fault)
        except Exception as error:
            logger.exception("a session failed in its turn")
            self._fail(session, error)
        if session.chunks > chunks:
            self._after_chunk(session, (time.perf_counter() - started) * 1e3)

    def _after_chunk(self, session: Session, turn_ms: float) -> None:
        if self._observer is not None and session.timings is not None:
            self._observer.chunk(session.timings.denoise_ms, session.timings.decode_ms, turn_ms)
        with self._changed:
            most = session.request.num_frames
            over = session.state in (SessionState.DRAINING, SessionState.CLOSED)
            if most is not None and session.frames >= most and not over:
                self._begin_draining(session, "finished")

    def _begin_draining(self, session: Session, reason: EndReason) -> None:
        session.enter(SessionState.DRAINING)
        session.reason = reason
        session.notify(StateChanged(SessionState.DRAINING))

    def _make_room(self, session: Session) -> Fault | None:
        """Free what ended sessions hold, and park paused ones, until the session's stream fits; returns why
        it does not."""
        if session.resident:
            return None
        with self._changed:
            others = [each for each in self._sessions if each is not session and each.resident]
        ended = [each for each in others if each.state is SessionState.CLOSED]
        paused = [each for each in others if each.state is SessionState.PAUSED]
        for other in ended + sorted(paused, key=lambda each: each.state_since):
            if (
                sum(each.bytes for each in others if each.resident) + session.bytes
                <= self.admission.memory_bytes
            ):
                break
            self._give_place(other)
        taken = sum(each.bytes for each in others if each.resident)
        if taken + session.bytes <= self.admission.memory_bytes:
            return None
        fault = self.admission.shortage([each for each in others if each.resident], session.bytes)
        return fault or Fault("no_memory", "there is no memory for it; try again", 429, True, 5)

    def _give_place(self, session: Session) -> None:
        """Free the device's memory of an ended or a paused session; one that was resumed meanwhile takes it
        back in its next turn. A fault in that is its own."""
        try:
            self._release(session) if session.state is SessionState.CLOSED else session.park()
        except Exception as error:
            logger.exception("a session failed when it gave its place")
            self._fail(session, error)

    def _release(self, session: Session) -> None:
        session.release()
        with self._changed:
            first, session.released = not session.released, True
        if first:
            session.finish()

    def _fail(self, session: Session, error: Exception) -> None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            fault = Fault(
                "out_of_memory", "the device has no memory left for it; try a smaller size", 503, True, 5
            )
        elif isinstance(error, ValueError) and not session.chunks:  # of its request
            fault = Fault("invalid_value", str(error))
        else:
            fault = Fault("chunk_failed", "a chunk failed in the engine; start another session", 500, True)
        self.close(session, "failed", fault)
        if isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError):
            self._lose("the device reports an error from which it does not recover")

    # The watch thread

    def _watch(self) -> None:
        while not self._stopped.wait(_WATCH_S):
            now, started = time.monotonic(), self._turn_started
            if started is not None and now - started > self.options.stall_s:
                self._lose(f"a turn takes longer than {self.options.stall_s:g} s")
                return
            with self._changed:
                sessions = list(self._sessions)
            for session in sessions:
                self._close_overdue(session, now)

    def _close_overdue(self, session: Session, now: float) -> None:
        options = self.options
        if session.request.background or session.state in (SessionState.DRAINING, SessionState.CLOSED):
            return
        if now - session.opened_at > options.life_s:
            self.close(session, "expired")
            return
        paused = session.state is SessionState.PAUSED
        if now - session.seen_at > options.lease_s or (paused and now - session.state_since > options.idle_s):
            self.close(session, "idle")
        elif not paused and now - session.room_since > options.idle_s:
            message = (
                f"the client took nothing for {options.idle_s:.0f} s; read faster, or let chunks be dropped"
            )
            self.close(session, "slow_client", Fault("slow_client", message, 408, True))

    def _lose(self, why: str) -> None:
        """Fail every session, whose memory nobody can free any more, and report it."""
        logger.critical("the engine is lost: %s", why)
        self.lost = why
        fault = Fault(
            "engine_lost", "the engine has failed and the server restarts; try again", 503, True, 10
        )
        with self._changed:
            sessions = [session for session in self._sessions if not session.released]
            for session in sessions:
                self.close(session, "failed", fault)
                session.released = True
        for session in sessions:
            session.finish()
        self._delivery.run_waiting()  # the engine's thread may never come back to it
        if self._on_lost is not None:
            self._on_lost(why)
