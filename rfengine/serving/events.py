"""What goes into a session, what comes out of it, and who takes it; no transport is known here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, Protocol

from rfengine.prompt_blend import Interpolation
from rfengine.prompts import Prompt, PromptMode
from rfengine.serving.errors import Fault

if TYPE_CHECKING:
    from numpy import ndarray

EndReason = Literal["finished", "stopped", "draining", "idle", "expired", "slow_client", "failed"]


class SessionState(StrEnum):
    """Where a session is in its life."""

    CREATED = "created"  # admitted; nothing is allocated yet
    RUNNING = "running"
    PAUSED = "paused"
    DRAINING = "draining"  # no further chunk; what was made is still delivered
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class SessionRequest:
    """What a session is opened with.

    height, width: pixels, the model's own where None. num_frames: the session ends after so many, None is
    never. realtime: stay `lead_seconds` of video ahead of the clock, instead of as fast as possible.
    keep_every: chunks between two points that are kept on their own; 0 is none, None the service's choice.
    background: take turns only while no other session wants one.
    """

    prompt: str
    seed: int = 0
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    realtime: bool = False
    lead_seconds: float = 1.0
    keep_every: int | None = None
    background: bool = False


# Commands


@dataclass(frozen=True, slots=True)
class ChangePrompt:
    """Another prompt from the next chunk on; the fields are those of VideoStream.set_prompt."""

    event_id: str
    prompt: Prompt
    mode: PromptMode = "soft"
    transition_chunks: int = 1
    interpolation: Interpolation = "linear"


@dataclass(frozen=True, slots=True)
class KeepPoint:
    """Keep the present point."""

    event_id: str


@dataclass(frozen=True, slots=True)
class Seek:
    """Go on from a kept point."""

    event_id: str
    snapshot_id: int


@dataclass(frozen=True, slots=True)
class Branch:
    """Go on from a kept point on a branch of its own, with another prompt or seed where they are given."""

    event_id: str
    snapshot_id: int
    prompt: str | None = None
    mode: PromptMode = "soft"
    seed: int | None = None


Command = ChangePrompt | KeepPoint | Seek | Branch

# Events


@dataclass(frozen=True, slots=True)
class StateChanged:
    """The session is in another state."""

    state: SessionState
    event_id: str | None = None


@dataclass(frozen=True, slots=True)
class PromptQueued:
    """A change of the prompt was accepted; its outcome follows."""

    event_id: str


@dataclass(frozen=True, slots=True)
class PromptApplied:
    """The next chunk is the first one with the prompt of that command."""

    event_id: str
    chunk_index: int
    branch_id: int


@dataclass(frozen=True, slots=True)
class PointKept:
    """A point that can be gone back to; chunk_index is that of the chunk that follows it."""

    snapshot_id: int
    chunk_index: int
    branch_id: int
    prompt: str
    automatic: bool
    event_id: str | None = None


@dataclass(frozen=True, slots=True)
class PointDropped:
    """An automatic point gave its memory to a newer one."""

    snapshot_id: int


@dataclass(frozen=True, slots=True)
class Moved:
    """A seek or a branch was done; parent_branch_id is None for the first branch."""

    event_id: str
    snapshot_id: int
    chunk_index: int
    branch_id: int
    parent_branch_id: int | None
    prompt: str
    seed: int


@dataclass(frozen=True, slots=True)
class CommandFailed:
    """A command changed nothing."""

    event_id: str
    fault: Fault


SessionEvent = StateChanged | PromptQueued | PromptApplied | PointKept | PointDropped | Moved | CommandFailed


@dataclass(frozen=True, slots=True, eq=False)
class SessionChunk:
    """Frames of one chunk, uint8 [T, H, W, 3], and what they were made with.

    number counts the chunks of the session, index those of its video: a seek takes index back. The event ids
    are those of prompt changes that show here first, that are in transition, and that are complete with it.
    """

    frames: ndarray
    number: int
    index: int
    branch_id: int
    prompt: str
    started: tuple[str, ...]
    active: tuple[str, ...]
    completed: tuple[str, ...]
    snapshot_id: int | None
    denoise_ms: float
    decode_ms: float


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a session; fault is set where the reason is "failed" or "slow_client"."""

    reason: EndReason
    chunks: int
    fault: Fault | None = None


class Consumer(Protocol):
    """Takes what a session makes. take, notify and end are called one after the other, in the order in which
    things happened, on a thread that may be kept waiting; an exception in take ends the session."""

    def has_room(self) -> bool:
        """Whether another chunk may be made; answers at once, on any thread.

        When the answer changes, SessionService.wake is called.
        """
        ...

    def take(self, chunk: SessionChunk) -> None:
        """One chunk."""
        ...

    def notify(self, event: SessionEvent) -> None:
        """What happened between two chunks."""
        ...

    def end(self, ended: Ended) -> None:
        """Called once, and nothing after it."""
        ...
