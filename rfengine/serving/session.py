"""Session: one video of a client, and the work of its turns on a VideoStream.

A turn runs on the service's engine thread: it makes the stream resident, applies the commands that wait, and
makes a chunk. A command that fails changes nothing; a chunk that fails closes the session, and no other
notices. What comes out is handed on only when its chunk is complete.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import replace
from threading import Event
from typing import TYPE_CHECKING, Protocol

import torch

from rfengine.frame_chunk import ChunkTimings, FrameChunk
from rfengine.pipeline import Pipeline
from rfengine.prompts import check_prompt
from rfengine.serving.delivery import Lane
from rfengine.serving.errors import Fault, ServiceError
from rfengine.serving.events import (
    Branch,
    ChangePrompt,
    Command,
    CommandFailed,
    Consumer,
    Ended,
    EndReason,
    KeepPoint,
    Moved,
    PointDropped,
    PromptApplied,
    Seek,
    SessionChunk,
    SessionEvent,
    SessionRequest,
    SessionState,
)
from rfengine.serving.points import AppliedChange, KeptPoints
from rfengine.snapshot import Snapshot
from rfengine.stream import VideoStream

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

MOST_COMMANDS = 64  # that wait in a session
MOST_UNDELIVERED = 2  # chunks that were made and are not encoded
_NEXT_STATES = {
    SessionState.CREATED: {
        SessionState.RUNNING, SessionState.PAUSED, SessionState.DRAINING, SessionState.CLOSED,
    },
    SessionState.RUNNING: {SessionState.PAUSED, SessionState.DRAINING, SessionState.CLOSED},
    SessionState.PAUSED: {SessionState.RUNNING, SessionState.DRAINING, SessionState.CLOSED},
    SessionState.DRAINING: {SessionState.CLOSED},
    SessionState.CLOSED: set(),
}  # fmt: skip
_SUPERSEDED = Fault(
    "superseded", "the session went to another point before a chunk was made with this prompt", status=409
)


class Cancelled(Exception):
    """The session was stopped inside a chunk."""


class SessionOwner(Protocol):
    """The service, as its sessions see it; its methods are called on the delivery threads."""

    pipeline: Pipeline

    def wake(self) -> None:
        """The consumer took a chunk."""
        ...

    def delivery_failed(self, session: Session, error: Exception) -> None:
        """The consumer failed with a chunk or an event."""
        ...

    def end_delivered(self, session: Session) -> None:
        """The consumer knows that the session has ended."""
        ...


class Session:
    """One video. `state` and `reason` belong to the service, under its lock; what is below them to the turns.

    bytes: of device memory while the stream is resident. Everything that the consumer gets goes through its
    lane, in order.
    """

    def __init__(
        self,
        owner: SessionOwner,
        request: SessionRequest,
        consumer: Consumer,
        lane: Lane,
        points: KeptPoints,
        stream_bytes: int,
    ) -> None:
        self.request = request
        self.consumer = consumer
        self.bytes = stream_bytes
        self.points = points
        self.state = SessionState.CREATED
        self.reason: EndReason | None = None
        self.fault: Fault | None = None
        self.opened_at = self.seen_at = self.state_since = self.room_since = time.monotonic()
        self.released = False
        self.cancelled = Event()
        self.commands: deque[Command] = deque()
        self.chunks = 0
        self._delivered = 0  # of them
        self.frames = 0
        self.timings: ChunkTimings | None = None  # of the last chunk
        self._owner = owner
        self._pipeline = owner.pipeline
        self._lane = lane
        self._stream: VideoStream | None = None
        self._parked: Snapshot | None = None
        self._changes: list[AppliedChange] = []
        self._clock_start = 0.0  # of the realtime pace
        self._seconds = 0.0  # of video since then

    def enter(self, state: SessionState) -> None:
        """Change the state, under the service's lock. Raises ServiceError where that is no transition."""
        if state not in _NEXT_STATES[self.state]:
            allowed = ", ".join(sorted(_NEXT_STATES[self.state])) or "nothing: it has ended"
            raise ServiceError(
                Fault(
                    "illegal_transition",
                    f"the session is {self.state} and cannot become {state}; it can become {allowed}",
                    status=409,
                )
            )
        self.state = state
        self.state_since = self.room_since = time.monotonic()

    @property
    def resident(self) -> bool:
        """Whether the stream holds device memory."""
        return self._stream is not None

    def notify(self, event: SessionEvent) -> None:
        """Let the consumer know, after all that it was given before."""
        self._lane.put(lambda: self._deliver_event(event))

    def _deliver_event(self, event: SessionEvent) -> None:
        try:
            self.consumer.notify(event)
        except ServiceError as error:  # the client's fault
            self._owner.delivery_failed(self, error)
        except Exception as error:
            logger.exception("a consumer failed in an event of its session")
            self._owner.delivery_failed(self, error)

    def chunk_wait(self, now: float) -> float | None:
        """Seconds until a chunk is wanted: 0 is at once, None not before something happens."""
        if self.state not in (SessionState.CREATED, SessionState.RUNNING):
            return None
        if self.chunks - self._delivered >= MOST_UNDELIVERED or not self.consumer.has_room():
            return None
        self.room_since = now
        ahead = self._seconds - (now - self._clock_start) - self.request.lead_seconds
        return max(0.0, ahead) if self.request.realtime and self.chunks else 0.0

    def shift_clock(self, seconds: float) -> None:
        """Leave a pause of so many seconds out of the realtime pace."""
        self._clock_start += seconds

    # Turns

    def turn(self, may_advance: bool) -> None:
        """Apply the commands that wait, and make a chunk where that is wanted.

        Raises what closes the session: Cancelled, or the error of a chunk.
        """
        self._make_resident()
        while self.commands and not self.cancelled.is_set():
            self._apply(self.commands.popleft())
        if may_advance and not self.cancelled.is_set():
            self._advance()

    def refuse_commands(self, fault: Fault) -> None:
        """Say of the commands that wait that they changed nothing."""
        while self.commands:
            self.notify(CommandFailed(self.commands.popleft().event_id, fault))

    def _make_resident(self) -> None:
        if self._stream is not None:
            return
        if self._parked is not None:
            # the LoRAs may have been swapped meanwhile, as under a stream that is not parked
            self._stream, self._parked = self._pipeline.restore(self._parked, any_loras=True), None
            return
        request = self.request
        self._stream = self._pipeline.stream(
            request.prompt, seed=request.seed, height=request.height, width=request.width
        )

    def park(self) -> None:
        """Take the stream's state to host memory and free the device's."""
        if self._stream is not None:
            try:
                self._parked = self._stream.snapshot()
            finally:
                self._close_stream()

    def release(self) -> None:
        """Free everything; the points too."""
        self._close_stream()
        self._parked = None
        self.points.clear()
        self.commands.clear()

    def _close_stream(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def _apply(self, command: Command) -> None:
        """Apply a command, or say why it changed nothing. Raises where the stream or the device is lost."""
        try:
            match command:
                case ChangePrompt():
                    self._change_prompt(command)
                case KeepPoint():
                    self._keep(automatic=False, event_id=command.event_id)
                case Seek() | Branch():
                    self._move(command)
        except Exception as error:
            if self._stream is None or self._stream.closed or isinstance(error, torch.AcceleratorError):
                raise
            self.notify(CommandFailed(command.event_id, _fault_of(error, command)))

    def _change_prompt(self, change: ChangePrompt) -> None:
        stream, chunks = self._stream, change.transition_chunks
        first, before = stream.index + (stream.is_ahead and change.mode != "hard"), stream.prompt
        stream.set_prompt(change.prompt, change.mode, chunks, change.interpolation)
        self._changes = [each for each in self._changes if not each.shown]
        for each in self._changes:  # a cut leaves out the chunk that was ahead of them
            each.first_chunk, each.chunks_left = min(each.first_chunk, first), 1
        self._changes.append(AppliedChange(change.event_id, before, first, chunks))

    def _keep(self, automatic: bool, event_id: str | None = None) -> int | None:
        """Keep the present point; returns its id."""
        stream, changes = self._stream, tuple(map(replace, self._changes))
        kept, dropped = self.points.keep(stream.snapshot(), stream.index, changes, automatic, event_id)
        for number in dropped:
            self.notify(PointDropped(number))
        if kept is None:
            return None
        self.notify(kept)
        return kept.snapshot_id

    def _move(self, command: Seek | Branch) -> None:
        branch = isinstance(command, Branch)
        point = self.points.destination(command.snapshot_id, branch)
        snapshot = point.snapshot
        if branch and command.seed is not None:
            snapshot = replace(snapshot, info=snapshot.info | {"seed": command.seed})
        if branch and command.prompt is not None:  # before anything moves: it may be no prompt
            check_prompt(command.prompt)
        self._stream.rewind(snapshot, any_loras=True)
        self._clock_start, self._seconds = time.monotonic(), 0.0  # what was ahead is not watched any more
        kept, parent = self.points.move_to(command.snapshot_id, branch)
        still = {change.event_id for change in point.changes}
        for change in self._changes:
            if not (change.shown or change.event_id in still):
                self.notify(CommandFailed(change.event_id, _SUPERSEDED))
        self._changes = list(map(replace, point.changes))
        if branch and command.prompt is not None:
            try:
                self._change_prompt(ChangePrompt(command.event_id, command.prompt, command.mode))
            except BaseException:
                self._close_stream()  # it has moved, so the session cannot stay as it was
                raise
        self.notify(
            Moved(
                command.event_id, kept.snapshot_id, self._stream.index, self.points.branch_id, parent,
                self._stream.prompt, self._stream.seed,
            )
        )  # fmt: skip

    def _advance(self) -> None:
        stream = self._stream
        kept = self._keep(automatic=True) if self.points.wants(stream.index) else None
        left = None if self.request.num_frames is None else self.request.num_frames - self.frames
        most = self._pipeline.config.cache.longest_chunk * stream.grid.temporal_stride
        last = left is not None and left <= most
        on_step = self._stop_where_cancelled if stream.runs_op_by_op else None
        chunk = stream.advance(on_step, ahead=not last)
        self._hand_on(chunk, kept, left)

    def _stop_where_cancelled(self, step: int, timestep: float, latents: Tensor) -> None:
        if self.cancelled.is_set():
            raise Cancelled

    def _hand_on(self, chunk: FrameChunk, snapshot_id: int | None, left: int | None) -> None:
        """Give a complete chunk to the consumer, after the receipts of what shows in it first."""
        frames = chunk.frames[:left]
        branch_id = self.points.branch_id
        started, active, completed = self._count_changes(chunk.index)
        for event_id in started:
            self.notify(PromptApplied(event_id, chunk.index, branch_id))
        self.points.made(chunk.index)
        ahead = next((change for change in self._changes if not change.shown), None)
        prompt = self._stream.prompt if ahead is None else ahead.prompt_before
        made = SessionChunk(
            frames, self.chunks, chunk.index, branch_id, prompt, started, active, completed,
            snapshot_id, chunk.timings.denoise_ms, chunk.timings.decode_ms,
        )  # fmt: skip
        self.timings = chunk.timings
        now = time.monotonic()
        if not self.chunks or self._seconds < now - self._clock_start:
            self._clock_start, self._seconds = now, 0.0
        self._seconds += len(frames) / self._pipeline.config.fps
        self.chunks += 1
        self.frames += len(frames)
        self._lane.put(lambda: self._deliver_chunk(made))

    def _deliver_chunk(self, chunk: SessionChunk) -> None:
        if not self.cancelled.is_set():
            try:
                self.consumer.take(chunk)
            except ServiceError as error:  # the client's fault
                self._owner.delivery_failed(self, error)
            except Exception as error:
                logger.exception("a chunk could not be encoded or kept")
                self._owner.delivery_failed(self, error)
        self._delivered += 1
        self._owner.wake()

    def finish(self) -> None:
        """Deliver the end, after all that was put before."""
        self._lane.put(self._deliver_end)

    def _deliver_end(self) -> None:
        try:
            self.consumer.end(Ended(self.reason, self.chunks, self.fault))
        except Exception:
            logger.exception("a consumer failed at the end of its session")
        self._owner.end_delivered(self)

    def _count_changes(self, index: int) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """The ids of the changes that show in chunk `index` first, are in transition, complete with it."""
        due = [change for change in self._changes if change.first_chunk <= index]
        started = tuple(change.event_id for change in due if not change.shown)
        for change in due:
            change.shown = True
            change.chunks_left -= 1
        completed = tuple(change.event_id for change in due if change.chunks_left <= 0)
        self._changes = [change for change in self._changes if change.event_id not in completed]
        active = tuple(change.event_id for change in self._changes if change.shown)
        return started, active, completed


def _fault_of(error: Exception, command: Command) -> Fault:
    """What the client is told of a command that changed nothing."""
    if isinstance(error, ServiceError):
        return error.fault
    if isinstance(error, ValueError):
        return Fault("invalid_value", str(error))
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        message = "the device has no memory left for it; nothing was changed, try again"
        return Fault("out_of_memory", message, 503, True, 5)
    logger.error("a command %s failed", type(command).__name__, exc_info=error)
    return Fault(
        "command_failed", "the server failed at this command; nothing was changed, try again", 500, True
    )
