"""The messages of `WS /v1/realtime/video`, as pydantic models; docs/realtime_protocol.md is made from them.

Control messages are JSON text. Each video.chunk_metadata is followed at once by one binary message of
`byte_length` bytes: fragmented MP4, to be joined in the order of arrival. Names and shapes follow the
protocol that vLLM-Omni publishes for its streaming video output; session.pause, session.resume,
session.snapshot, session.seek, session.branch and their answers go beyond it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter

from rfengine.prompt_blend import MOST_TRANSITION_CHUNKS, Interpolation
from rfengine.prompts import MOST_CHARACTERS, MOST_TEXTS, MOST_WEIGHT, PromptMode
from rfengine.schedule import MAX_SEED
from rfengine.serving.events import EndReason

MOST_EVENT_ID = 128  # characters

Pace = Literal["realtime", "fast"]
SlowClient = Literal["pause", "drop", "disconnect"]
EventId = Annotated[str, Field(min_length=1, max_length=MOST_EVENT_ID)]
PromptText = Annotated[str, Field(min_length=1, max_length=MOST_CHARACTERS)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Side = Annotated[int, Field(ge=16, le=8192, multiple_of=16)]
Count = Annotated[int, Field(ge=0)]


class Message(BaseModel):
    """A message whose fields are all named here: an unknown one is an error, and no type is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class EventMessage(Message):
    """A request to a session that is running or paused."""

    event_id: EventId | None = Field(
        None, description="Comes back in every answer to this message; made by the server where absent."
    )


# From the client


class SessionStart(Message):
    """Starts the video; the first message of a connection."""

    type: Literal["session.start"]
    prompt: PromptText = Field(description="What the video shows.")
    model: str | None = Field(None, max_length=255, description="As GET /v1/models names it.")
    format: Literal["m4s"] = Field("m4s", description="Fragmented MP4.")
    width: Side | None = Field(None, description="Pixels; the model's own size where absent.")
    height: Side | None = Field(None, description="As width.")
    fps: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="Only the model's own rate is accepted."
    )
    num_frames: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Ends the session after so many frames; without it the video has no end."
    )
    seed: Seed = Field(0, description="The same seed and prompts give the same video on one machine.")
    negative_prompt: str | None = Field(
        None, max_length=MOST_CHARACTERS, description="Only an empty one is accepted."
    )
    guidance_scale: float | None = Field(None, description="Only 1 is accepted: the model is distilled.")
    num_inference_steps: int | None = Field(None, description="Only the model's own number is accepted.")
    pace: Pace = Field(
        "fast", description="realtime: stay lead_seconds ahead of the clock; fast: as fast as the model runs."
    )
    lead_seconds: Annotated[float, Field(ge=0.0, le=30.0)] = Field(
        1.0, description="With realtime pace, seconds of video that may be ahead of the clock."
    )
    slow_client: SlowClient = Field(
        "pause",
        description="What happens when the client does not read: generation waits, the oldest chunks that "
        "wait are left out, or the session ends.",
    )
    keep_every: Annotated[int, Field(ge=0, le=10_000)] | None = Field(
        None,
        description="A snapshot is kept before every so many chunks; 0: none; absent: the server chooses.",
    )
    record: bool = Field(False, description="Keep the whole video for download.")
    hls: bool = Field(False, description="Offer the video as HLS too.")


class InteractionText(Message):
    """A text of a prompt that has several."""

    text: PromptText = Field(description="What the video shows a part of.")
    weight: Annotated[float, Field(gt=0, le=MOST_WEIGHT)] = Field(
        1.0, description="Beside the other texts': 3 and 1 are three quarters and one."
    )


class InteractionEvent(Message):
    """What an interaction changes."""

    prompt: Annotated[
        Annotated[PromptText, Tag("text")]
        | Annotated[tuple[InteractionText, ...], Field(min_length=1, max_length=MOST_TEXTS), Tag("texts")],
        Discriminator(lambda value: "texts" if isinstance(value, list | tuple) else "text"),
    ] = Field(description="What the video shows from now on: a text, or the weighted mean of several.")


class Interaction(Message):
    """One change of the prompt."""

    event_id: EventId | None = Field(
        None, description="Comes back in every answer to this message; made by the server where absent."
    )
    event: InteractionEvent = Field(description="What changes.")
    mode: PromptMode = Field(
        "soft",
        description="soft: the text changes, the window still shows the old one; recache: the window is "
        "recomputed under the new text; hard: a clean cut.",
    )
    transition_chunks: Annotated[int, Field(ge=0, le=MOST_TRANSITION_CHUNKS)] | None = Field(
        None, description="With soft, chunks over which the text goes from the old prompt to the new one."
    )
    interpolation: Interpolation = Field(
        "linear", description="Of a transition: the text states go on a straight line, or turn."
    )


class SessionInteraction(Message):
    """Changes the prompt from the next chunk on."""

    type: Literal["session.interaction"]
    interaction: Interaction = Field(description="The change.")


class SessionPause(EventMessage):
    """Stops after the chunk that is being made."""

    type: Literal["session.pause"]


class SessionResume(EventMessage):
    """Goes on after a pause."""

    type: Literal["session.resume"]


class SessionSnapshot(EventMessage):
    """Keeps the present point, to come back to it."""

    type: Literal["session.snapshot"]


class SessionSeek(EventMessage):
    """Goes back to a kept point. The video goes on from there, with its prompt and seed; what was made after
    it stays in the tree of branches."""

    type: Literal["session.seek"]
    snapshot_id: Count = Field(description="Of session.snapshot.kept.")


class SessionBranch(EventMessage):
    """Begins another branch at a kept point, with another prompt or seed where they are given."""

    type: Literal["session.branch"]
    snapshot_id: Count = Field(description="Of session.snapshot.kept.")
    prompt: PromptText | None = Field(None, description="Of the new branch; the point's own where absent.")
    mode: PromptMode = Field("soft", description="How the prompt changes; as in session.interaction.")
    seed: Seed | None = Field(None, description="Of the new branch; the point's own where absent.")


class SessionPing(Message):
    """Shows that the client is there."""

    type: Literal["session.ping"]


class SessionStop(Message):
    """Ends the session within one denoising step."""

    type: Literal["session.stop"]


ClientMessage = Annotated[
    SessionStart
    | SessionInteraction
    | SessionPause
    | SessionResume
    | SessionSnapshot
    | SessionSeek
    | SessionBranch
    | SessionPing
    | SessionStop,
    Field(discriminator="type"),
]

# From the server


class SessionConfig(Message):
    """What the session runs with."""

    model: str
    prompt: str
    width: int
    height: int
    fps: int
    num_frames: int | None
    seed: int
    pace: Pace
    lead_seconds: float
    slow_client: SlowClient
    keep_every: int = Field(description="What the server chose, where the client did not.")
    chunk_frames: int = Field(description="Frames of every chunk but the first of a video, which has fewer.")


class VideoStart(Message):
    """The session was admitted."""

    type: Literal["video.start"] = "video.start"
    request_id: str
    format: Literal["m4s"] = "m4s"
    mime: str = Field(description="For MediaSource.isTypeSupported and addSourceBuffer.")
    config: SessionConfig = Field(description="What was accepted.")
    hls_url: str | None = Field(
        description="Path of the HLS playlist on this server, where it was asked for."
    )
    download_url: str | None = Field(description="Path of the whole video, where it is recorded.")


class ChunkMetadata(Message):
    """Describes the binary message that follows."""

    type: Literal["video.chunk_metadata"] = "video.chunk_metadata"
    request_id: str
    kind: Literal["media"] = "media"
    transport_chunk_index: int = Field(
        description="Counts the chunks that were made, those left out included."
    )
    generation_chunk_index: int = Field(description="Index of the chunk in its video; goes back with a seek.")
    branch_id: int = Field(description="The branch it belongs to; the first is 0.")
    num_frames: int
    byte_length: int = Field(description="Of the binary message.")
    start_seconds: float = Field(description="Presentation time of the first frame.")
    prompt: str = Field(description="The prompt it was made with, or is changing to.")
    started_event_ids: list[str] = Field(
        description="Prompt changes that show in this chunk for the first time."
    )
    active_event_ids: list[str] = Field(description="Prompt changes that are still in transition.")
    completed_event_ids: list[str] = Field(description="Prompt changes that are complete with this chunk.")
    snapshot_id: int | None = Field(description="The point kept automatically just before it, if any.")
    dropped_chunks: int = Field(
        description="Chunks left out just before this one, since the client did not read."
    )
    denoise_ms: float = Field(description="Time of the transformer.")
    decode_ms: float = Field(description="Time of the VAE.")
    encode_ms: float = Field(description="Time of H.264.")


class InteractionQueued(Message):
    """The prompt change was accepted."""

    type: Literal["session.interaction.queued"] = "session.interaction.queued"
    request_id: str
    event_id: str


class InteractionApplied(Message):
    """The receipt: the first chunk that is made with the new prompt."""

    type: Literal["session.interaction.applied"] = "session.interaction.applied"
    request_id: str
    event_id: str
    chunk_index: int = Field(description="generation_chunk_index of that chunk.")
    branch_id: int


class SessionStateChanged(Message):
    """The session is in another state."""

    type: Literal["session.state"] = "session.state"
    request_id: str
    state: Literal["running", "paused", "draining"]
    event_id: str | None = None


class SnapshotKept(Message):
    """A point to which session.seek and session.branch can go."""

    type: Literal["session.snapshot.kept"] = "session.snapshot.kept"
    request_id: str
    snapshot_id: int
    chunk_index: int = Field(description="Index of the chunk that follows it.")
    branch_id: int
    prompt: str
    automatic: bool = Field(description="Kept by the server itself, which may drop it again.")
    event_id: str | None = None


class SnapshotDropped(Message):
    """An automatic point gave its memory to a newer one."""

    type: Literal["session.snapshot.dropped"] = "session.snapshot.dropped"
    request_id: str
    snapshot_id: int


class SessionMoved(Message):
    """A seek or a branch was done: the next chunk is made from that point."""

    type: Literal["session.moved"] = "session.moved"
    request_id: str
    event_id: str
    snapshot_id: int
    chunk_index: int = Field(description="Index of the next chunk.")
    branch_id: int = Field(description="The branch of the next chunk.")
    parent_branch_id: int | None = Field(description="The branch that it leaves; null for the first.")
    prompt: str
    seed: int


class SessionPong(Message):
    """Answers a ping."""

    type: Literal["session.pong"] = "session.pong"


class SessionDone(Message):
    """The last message: nothing follows."""

    type: Literal["session.done"] = "session.done"
    request_id: str
    chunks: int = Field(description="Chunks that were made.")
    stopped: bool = Field(description="Whether it ended before num_frames.")
    reason: EndReason


class ErrorMessage(Message):
    """Something failed. The session goes on unless `fatal`."""

    type: Literal["error"] = "error"
    request_id: str | None = None
    event_id: str | None = None
    code: str
    message: str
    retryable: bool
    fatal: bool


ServerMessage = Annotated[
    VideoStart
    | ChunkMetadata
    | InteractionQueued
    | InteractionApplied
    | SessionStateChanged
    | SnapshotKept
    | SnapshotDropped
    | SessionMoved
    | SessionPong
    | SessionDone
    | ErrorMessage,
    Field(discriminator="type"),
]

CLIENT_MESSAGES: TypeAdapter[ClientMessage] = TypeAdapter(ClientMessage)
SERVER_MESSAGES: TypeAdapter[ServerMessage] = TypeAdapter(ServerMessage)
