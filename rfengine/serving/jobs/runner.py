"""JobRunner: makes the videos of queued jobs, each in a background session of the service."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from threading import Condition, Thread

from rfengine.serving.errors import Fault, ServiceError
from rfengine.serving.events import Ended, SessionChunk, SessionEvent, SessionRequest, SessionState
from rfengine.serving.jobs.store import JobStore
from rfengine.serving.jobs.table import STORAGE_BUSY, Job, JobRequest, storage_fault
from rfengine.serving.session import Session
from rfengine.serving.sessions import SessionService
from rfengine.video import VideoWriter

logger = logging.getLogger(__name__)

_RETRY_S = 1.0  # after a refusal that passes
_SWEEP_S = 10.0
_SHARED_TURN_S = 1.0  # where others use the store: their jobs come unannounced
_REPORT_S = 0.25  # between two commits of a job's progress
_PASSING = ("no_memory", "too_many_sessions")  # codes of refusals that leave a job in the queue
_WRITE_FAILED = Fault("write_failed", "the video could not be written; create it again", 500, True)


def session_request(request: JobRequest) -> SessionRequest:
    """The session that makes a job's video."""
    return SessionRequest(
        request.prompt, request.seed, request.height, request.width, request.num_frames,
        keep_every=0, background=True,
    )  # fmt: skip


class _JobConsumer:
    """Writes the frames of one session into the file of its job.

    A chunk is made only when the store has the job in progress (`begun`), so that a job at which the process
    dies has its attempt counted. record: makes the outcome known to the store, at once or later.
    """

    def __init__(
        self,
        store: JobStore,
        job: Job,
        record: Callable[[Callable[[], None]], None],
        forget: Callable[[], None],
    ) -> None:
        self.begun = False
        self._store, self._job = store, job
        self._record, self._forget = record, forget
        self._writer: VideoWriter | None = None
        self._reported_at = float("-inf")

    def has_room(self) -> bool:
        return self.begun

    def take(self, chunk: SessionChunk) -> None:
        job = self._job
        if self._writer is None:
            height, width = chunk.frames.shape[1:3]
            self._writer = VideoWriter(self._store.made_path(job.id), job.request.fps, height, width)
        try:
            self._writer.write(chunk.frames)
        except RuntimeError as error:
            raise ServiceError(_fault_of(error)) from error
        if time.monotonic() - self._reported_at > _REPORT_S:
            self._report(self._writer.frames_written)
            self._reported_at = time.monotonic()

    def _report(self, frames: int) -> None:
        try:
            self._store.advance(self._job.id, frames)
        except ServiceError as error:
            if error.fault.code != STORAGE_BUSY:  # then the next report says it
                raise

    def notify(self, event: SessionEvent) -> None:
        """Nothing that happens between chunks matters to a job."""

    def end(self, ended: Ended) -> None:
        try:
            outcome = self._outcome(ended)
        except Exception:  # whatever it is, no job stays in progress
            logger.exception("the file of job %s failed", self._job.id)
            outcome = self._failure(_WRITE_FAILED)
        try:
            self._record(outcome)
        finally:
            self._forget()

    def _outcome(self, ended: Ended) -> Callable[[], None]:
        """Close or drop the file; returns what is to be told to the store."""
        store, job_id, writer, fault = self._store, self._job.id, self._writer, ended.fault
        if fault is None and writer is not None and writer.frames_written == self._job.request.num_frames:
            try:
                writer.close()
            except RuntimeError as error:
                fault = _fault_of(error)
            else:
                return lambda: store.complete(job_id)
        if writer is not None:
            writer.abort()
        if fault is None:  # the server stops, or the job was deleted
            return lambda: store.put_back(job_id, attempt_counts=False)
        if fault.code == "engine_lost":  # as if the process had been killed
            return lambda: store.put_back(job_id, attempt_counts=True)
        return self._failure(fault)

    def _failure(self, fault: Fault) -> Callable[[], None]:
        logger.warning("job %s failed: %s", self._job.id, fault.message)
        return lambda: self._store.fail(self._job.id, fault)


def _fault_of(error: RuntimeError) -> Fault:
    """What a client is told of a file that could not be written; the error itself names its path."""
    cause = error.__cause__
    if isinstance(cause, OSError):
        return storage_fault(cause)
    logger.error("the file of a job failed", exc_info=error)
    return _WRITE_FAILED


class JobRunner:
    """Runs the jobs of a store on a service, at most `at_once` together, oldest first.

    A job waits while the service has no room for its session. When the service drains, or `stop` is called,
    the jobs in progress are queued again, and no other is begun; a draining service ends the runner. Where
    the store has a claimant, its lease is renewed here, and a job that is no longer its own is stopped.
    """

    def __init__(self, service: SessionService, store: JobStore, at_once: int = 1) -> None:
        self._service, self._store, self._at_once = service, store, at_once
        self._changed = Condition()
        self._running: dict[str, Session] = {}
        self._unrecorded: list[Callable[[], None]] = []  # outcomes for which the disk had no room
        self._woken = False
        self._stopping = False
        self._next_sweep = 0.0
        self._thread = Thread(target=self._run, name="rfengine-jobs", daemon=True)
        self._thread.start()

    def check(self, request: JobRequest) -> None:
        """Raises ServiceError for a job that can never be made here."""
        self._service.admission.needed(session_request(request))

    def wake(self) -> None:
        """A job was queued."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def cancel(self, job_id: str) -> None:
        """Stop making the video of a job, which was deleted."""
        with self._changed:
            session = self._running.get(job_id)
            if session is not None:
                self._service.close(session)

    def stop(self, timeout_s: float = 10.0) -> bool:
        """Put the jobs in progress back and end the thread; returns whether all that was done in time."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._stopping = True
            for session in self._running.values():
                self._service.close(session, "draining")
            self._changed.notify_all()
            ended = self._changed.wait_for(lambda: not self._running, timeout_s)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return ended and not self._thread.is_alive()

    # The thread

    def _run(self) -> None:
        with self._changed:
            while not self._stopping:
                self._woken = False
                try:
                    wait_s = self._turn()
                except ServiceError as error:
                    logger.warning("jobs wait: %s", error.fault.message)
                    wait_s = _RETRY_S
                except Exception:
                    logger.exception("the queue of jobs failed; it goes on")
                    wait_s = _RETRY_S
                self._changed.wait_for(lambda: self._woken or self._stopping, wait_s)
        self._record_late()

    def _turn(self) -> float:
        """Record late outcomes, remove expired jobs, begin queued ones; returns seconds to the next turn."""
        self._record_late()
        shared = self._store.claimant is not None
        if shared:
            self._keep_claims()
        if time.monotonic() >= self._next_sweep:
            self._store.sweep()
            self._next_sweep = time.monotonic() + (_SHARED_TURN_S if shared else _SWEEP_S)
        while len(self._running) < self._at_once and (job := self._store.next_queued()) is not None:
            if not self._begin(job):
                return _RETRY_S
        if self._unrecorded:
            return _RETRY_S
        return _SHARED_TURN_S if shared else _SWEEP_S

    def _keep_claims(self) -> None:
        held = self._store.renew()
        for job_id, session in self._running.items():
            if job_id not in held and session.consumer.begun and session.state is not SessionState.CLOSED:
                logger.warning("job %s is stopped here: it was deleted, or another replica has it", job_id)
                self._service.close(session)

    def _begin(self, job: Job) -> bool:
        """Open the session of a job; False where it has to wait."""
        consumer = _JobConsumer(self._store, job, self._record, lambda: self._forget(job.id))
        try:
            session = self._service.open(session_request(job.request), consumer)
        except ServiceError as error:
            if error.fault.code in _PASSING:
                return False
            if error.fault.code == "draining":
                self._stopping = True
                return False
            self._store.refuse(job.id, error.fault)
            return True
        self._running[job.id] = session
        try:
            consumer.begun = self._store.begin(job.id)
        finally:
            if consumer.begun:
                self._service.wake()
            else:
                self._service.close(session)
        return True

    # On the delivery threads

    def _record(self, outcome: Callable[[], None]) -> None:
        """Tell the store; later where it cannot take it now."""
        try:
            outcome()
        except ServiceError as error:
            logger.warning("the end of a job is not recorded yet: %s", error.fault.message)
            with self._changed:
                self._unrecorded.append(outcome)

    def _record_late(self) -> None:
        with self._changed:
            waiting, self._unrecorded = self._unrecorded, []
        for outcome in waiting:
            self._record(outcome)

    def _forget(self, job_id: str) -> None:
        with self._changed:
            self._running.pop(job_id, None)
            self._woken = True
            self._changed.notify_all()
