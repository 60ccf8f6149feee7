"""`WS /v1/realtime/video`: one realtime session for each connection.

A connection has three tasks: one reads messages, one sends what waits in the outbox, one keeps the lease. The
engine's thread never waits for a socket, and a client that does not read is held by its own outbox alone.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from rfengine.serving.access import ClientIdentity
from rfengine.serving.errors import Fault, ServiceError
from rfengine.serving.events import SessionRequest
from rfengine.serving.metrics import ServerMetrics
from rfengine.serving.realtime.hls import HlsPlaylist
from rfengine.serving.realtime.library import RecordingLibrary
from rfengine.serving.realtime.live_video import LiveVideo, error_message
from rfengine.serving.realtime.messages import (
    MessageBucket,
    check_compatible,
    command_of,
    validation_fault,
)
from rfengine.serving.realtime.outbox import Media, Outbox
from rfengine.serving.realtime.protocol import (
    CLIENT_MESSAGES,
    ClientMessage,
    Message,
    SessionConfig,
    SessionInteraction,
    SessionPause,
    SessionPing,
    SessionPong,
    SessionResume,
    SessionStart,
    SessionStop,
    VideoStart,
)
from rfengine.serving.session import Session
from rfengine.serving.sessions import SessionService
from rfengine.serving.video_encoder import SpareEncoder, VideoEncoder

logger = logging.getLogger(__name__)

_POLICY_VIOLATION, _TRY_AGAIN_LATER, _INTERNAL = 1008, 1013, 1011  # close codes of RFC 6455
_CLOSE_S = 2.0
_REFILL_S = 0.2  # after a first chunk, whose way to the client it would share the processor with
_MOST_EVENT_IDS = 10_000  # that are remembered of a connection
_MOST_ASKED = 1000  # prompt changes whose latency is measured


@dataclass(frozen=True, slots=True)
class RealtimeLimits:
    """Limits of each connection.

    start_s: for the first message. messages_per_s: read on average, after messages_at_once; beyond them the
    server reads no faster. queue_bytes, queue_seconds: of the outbox. flush_s: when the session has ended, a
    client that takes nothing for so long gets nothing more.
    """

    start_s: float = 10.0
    message_bytes: int = 128 * 2**10
    messages_per_s: float = 50.0
    messages_at_once: int = 200
    connections_per_key: int = 16
    queue_bytes: int = 8 * 2**20
    queue_seconds: float = 6.0
    flush_s: float = 10.0


@asynccontextmanager
async def counted_connection(
    websocket: WebSocket, connections: Counter[str], limits: RealtimeLimits
) -> AsyncIterator[ClientIdentity | None]:
    """Accept a connection, and count it in `connections` by the client's key, or its address, during the
    block. Yields the client; None where it has as many as `limits` allow, and is refused."""
    client: ClientIdentity = websocket.scope["state"]["client"]
    name = client.key_name or client.address
    await websocket.accept(subprotocol=websocket.scope["state"].get("subprotocol"))
    if connections[name] >= limits.connections_per_key:
        message = f"{connections[name]} connections are open, which is the limit; close one"
        await refuse(websocket, Fault("too_many_connections", message, 429, True, 5))
        yield None
        return
    connections[name] += 1
    try:
        yield client
    finally:
        connections[name] -= 1
        if not connections[name]:
            del connections[name]


class RealtimeEndpoint:
    """The WebSocket route; `connections` counts the open ones by key. session_prefix: hexadecimal digits with
    which the random part of every session id begins."""

    def __init__(
        self,
        service: SessionService,
        library: RecordingLibrary,
        metrics: ServerMetrics,
        limits: RealtimeLimits,
        session_prefix: str = "",
    ) -> None:
        self.session_prefix = session_prefix
        self.service = service
        self.library = library
        self.metrics = metrics
        self.limits = limits
        config = service.pipeline.config
        self.spare_encoder = SpareEncoder(config.fps, config.height, config.width)
        self.connections: Counter[str] = Counter()
        self.outboxes: set[Outbox] = set()
        self.opening: asyncio.Task[None] | None = None  # the last one of a spare encoder

    async def serve(self, websocket: WebSocket) -> None:
        """Serve one connection to its end."""
        async with counted_connection(websocket, self.connections, self.limits) as client:
            if client is None:
                return
            try:
                await _Connection(self, websocket, client.key_name).run()
            finally:
                self.open_spare_encoder()  # where it was taken and no chunk was sent

    def open_spare_encoder(self) -> None:
        """Open the encoder of the next session in a moment, one at a time."""
        if self.opening is None or self.opening.done():
            self.opening = asyncio.create_task(self._open_spare_encoder())

    async def _open_spare_encoder(self) -> None:
        await asyncio.sleep(_REFILL_S)
        await run_in_threadpool(self.spare_encoder.refill)


class _Connection:
    """One client."""

    def __init__(self, endpoint: RealtimeEndpoint, websocket: WebSocket, owner: str | None) -> None:
        self._endpoint, self._websocket, self._owner = endpoint, websocket, owner
        self._service, self._limits = endpoint.service, endpoint.limits
        digits = (endpoint.session_prefix + secrets.token_hex(16))[:32]
        self._request_id = f"rt_{digits}"
        self._loop = asyncio.get_running_loop()
        self._ready, self._ended = asyncio.Event(), asyncio.Event()
        self._outbox: Outbox | None = None
        self._session: Session | None = None
        self._init_segment: bytes | None = None  # until it is sent, with the first chunk
        self._started_at = time.monotonic()
        self._asked_at: dict[str, float] = {}  # prompt changes that no chunk was sent of
        self._event_ids: set[str] = set()
        self._sent = 0  # entries of the outbox
        self._bucket = MessageBucket(self._limits.messages_per_s, self._limits.messages_at_once)

    async def run(self) -> None:
        try:
            start = await asyncio.wait_for(self._receive_start(), self._limits.start_s)
            self._started_at = time.monotonic()
            video_start = await self._open(start)
        except TimeoutError:
            message = f"no session.start came within {self._limits.start_s:g} s; send it first"
            await refuse(self._websocket, Fault("start_timeout", message, 408, True))
            return
        except ServiceError as error:
            await refuse(self._websocket, error.fault)
            return
        except WebSocketDisconnect:
            return
        try:
            await self._send_text(video_start)
            await self._serve()
        except WebSocketDisconnect:
            pass
        finally:
            self._service.close(self._session, "stopped")
            self._outbox.close()
            self._endpoint.outboxes.discard(self._outbox)
            self._endpoint.library.end(self._request_id)

    # The start

    async def _receive_start(self) -> SessionStart:
        message = self._parse(await self._receive())
        if not isinstance(message, SessionStart):
            raise ServiceError(
                Fault("no_session", f"the first message is {message.type}; send session.start first")
            )
        return message

    async def _receive(self) -> str:
        """The next text message. Raises WebSocketDisconnect at the end, ServiceError for a binary one."""
        received = await self._websocket.receive()
        if received["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(received.get("code", 1005))
        text = received.get("text")
        if text is None:
            raise ServiceError(Fault("binary_message", "messages are JSON text; send no binary ones"))
        if len(text) > self._limits.message_bytes:
            message = f"the message has {len(text)} characters; send at most {self._limits.message_bytes}"
            raise ServiceError(Fault("message_too_large", message, 413))
        return text

    def _parse(self, text: str) -> ClientMessage:
        try:
            return CLIENT_MESSAGES.validate_json(text)
        except ValidationError as error:
            raise ServiceError(validation_fault(error)) from error

    async def _open(self, start: SessionStart) -> VideoStart:
        """Admit the session; returns what the client is told."""
        service, config = self._service, self._service.pipeline.config
        check_compatible(start, service.pipeline)
        request = SessionRequest(
            start.prompt, start.seed, start.height, start.width, start.num_frames, start.pace == "realtime",
            start.lead_seconds, start.keep_every,
        )  # fmt: skip
        if not service.admission.knows(request):  # it takes long to reckon
            await run_in_threadpool(service.admission.needed, request)
        service.admission.needed(request)  # before an encoder of that size is made
        height, width = start.height or config.height, start.width or config.width
        encoder = self._endpoint.spare_encoder.take(height, width)
        if encoder is None:
            encoder = await run_in_threadpool(VideoEncoder, config.fps, height, width)
        try:
            video = self._live_video(start, encoder)
            session = service.open(request, video)
        except BaseException:
            encoder.close()
            self._endpoint.library.forget(self._request_id)
            raise
        self._session, self._init_segment = session, encoder.init_segment
        self._endpoint.outboxes.add(self._outbox)
        chunk_frames = config.cache.chunk_frames * config.vae.temporal_stride
        accepted = SessionConfig(
            model=config.name, prompt=start.prompt, width=width, height=height, fps=config.fps,
            num_frames=start.num_frames, seed=start.seed, pace=start.pace, lead_seconds=start.lead_seconds,
            slow_client=start.slow_client, keep_every=session.points.keep_every, chunk_frames=chunk_frames,
        )  # fmt: skip
        path = f"/v1/realtime/sessions/{self._request_id}"
        return VideoStart(
            request_id=self._request_id,
            mime=encoder.mime,
            config=accepted,
            hls_url=f"{path}/hls/playlist.m3u8" if start.hls else None,
            download_url=f"{path}/video.mp4" if start.record else None,
        )

    def _live_video(self, start: SessionStart, encoder: VideoEncoder) -> LiveVideo:
        limits, library = self._limits, self._endpoint.library
        self._outbox = Outbox(
            start.slow_client, limits.queue_bytes, limits.queue_seconds, self._wake, self._service.wake
        )
        path, recording = None, None
        if start.record:
            path, recording = library.new_recording(self._request_id, encoder.init_segment)
        config = self._service.pipeline.config
        longest = config.cache.longest_chunk * config.vae.temporal_stride
        hls = HlsPlaylist(encoder.fps, longest_frames=longest) if start.hls else None
        observe = self._endpoint.metrics.chunk_seconds["encode"].observe
        video = LiveVideo(
            self._request_id, encoder, self._outbox, recording, hls, lambda ms: observe(ms / 1e3)
        )
        if path is not None or hls is not None:
            library.add(self._owner, video, path, recording)
        return video

    def _wake(self) -> None:
        """Something waits to be sent; on any thread."""
        with suppress(RuntimeError):  # the loop has ended with the server
            self._loop.call_soon_threadsafe(self._note)

    def _note(self) -> None:
        self._ready.set()
        if self._outbox.finished:
            self._ended.set()

    # Its life

    async def _serve(self) -> None:
        reader = asyncio.create_task(self._read_messages())
        sender = asyncio.create_task(self._send_outbox())
        lease = asyncio.create_task(self._keep_lease())
        ended = asyncio.create_task(self._ended.wait())
        tasks = (reader, sender, lease, ended)
        try:
            await asyncio.wait({reader, sender, ended}, return_when=asyncio.FIRST_COMPLETED)
            error = reader.exception() if reader.done() else None
            slow = isinstance(error, ServiceError)  # it sends, and reads no answer
            if reader.done():
                self._service.close(self._session, *(("slow_client", error.fault) if slow else ("stopped",)))
            if error is None or slow:
                await self._flush(sender)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for error in results:
            if isinstance(error, Exception) and not isinstance(error, WebSocketDisconnect | ServiceError):
                logger.error("a realtime connection failed", exc_info=error)
        await close(self._websocket, 1000 if self._session.fault is None else _INTERNAL)

    async def _flush(self, sender: asyncio.Task[None]) -> None:
        """The client still gets what waits, as long as it reads."""
        sent = -1
        while not sender.done() and sent != self._sent:
            sent = self._sent
            await asyncio.wait({sender}, timeout=self._limits.flush_s)

    async def _keep_lease(self) -> None:
        """The session lives as long as the connection, and ends with its own reasons."""
        while True:
            self._service.renew(self._session)
            await asyncio.sleep(self._service.options.lease_s / 4)

    async def _read_messages(self) -> None:
        """Obey messages until the client stops; a wrong one is answered and changes nothing."""
        while True:
            event_id, length = None, 0
            try:
                text = await self._receive()
                length = len(text)
                message = self._parse(text)
                if isinstance(message, SessionStop):
                    return
                event_id = self._event_id(message)
                self._obey(message, event_id)
            except ServiceError as error:
                if error.fault.retryable:  # with the same id
                    self._event_ids.discard(event_id)
                self._outbox.put(error_message(error.fault, self._request_id, event_id, fatal=False))
            await asyncio.sleep(self._bucket.delay(length))

    def _event_id(self, message: ClientMessage) -> str | None:
        """The message's event id, or one of ours. Raises ServiceError for one that was there before."""
        if isinstance(message, SessionPing | SessionStart):
            return None
        given = message.interaction.event_id if isinstance(message, SessionInteraction) else message.event_id
        if given is None:
            return f"ev_{secrets.token_hex(8)}"
        if given in self._event_ids:
            raise ServiceError(
                Fault("event_id_conflict", f"the event_id {given!r} was used before; take another", 409)
            )
        if len(self._event_ids) < _MOST_EVENT_IDS:
            self._event_ids.add(given)
        return given

    def _obey(self, message: ClientMessage, event_id: str | None) -> None:
        service, session = self._service, self._session
        match message:
            case SessionStart():
                raise ServiceError(
                    Fault("already_started", "the session runs; connect again for another", 409)
                )
            case SessionPing():
                self._outbox.put(SessionPong())
            case SessionPause():
                service.pause(session, event_id)
            case SessionResume():
                service.resume(session, event_id)
            case _:
                service.submit(session, command_of(message, event_id))
                if isinstance(message, SessionInteraction):
                    self._asked_at[event_id] = time.monotonic()
                    if len(self._asked_at) > _MOST_ASKED:  # those that no chunk was ever made of
                        del self._asked_at[next(iter(self._asked_at))]

    async def _send_outbox(self) -> None:
        """Send what waits, until the session has ended and nothing does."""
        while True:
            entry = self._outbox.take()
            if entry is None:
                if self._outbox.finished:
                    return
                self._ready.clear()
                if not self._outbox.has_entries():
                    await self._ready.wait()
                continue
            if isinstance(entry, Media):
                await self._send_media(entry)
            else:
                await self._send_text(entry)
            self._sent += 1

    async def _send_text(self, message: Message) -> None:
        await self._websocket.send_text(message.model_dump_json())

    async def _send_media(self, media: Media) -> None:
        metadata, data = media.metadata, media.data
        first, self._init_segment = self._init_segment, None
        if first is not None:
            data = first + data
            metadata = metadata.model_copy(update={"byte_length": len(data)})
        await self._send_text(metadata)
        await self._websocket.send_bytes(data)
        now = time.monotonic()
        self._endpoint.metrics.dropped_chunks.inc(metadata.dropped_chunks)
        if first is not None:
            self._endpoint.metrics.first_frame_seconds.observe(now - self._started_at)
            self._endpoint.open_spare_encoder()
        for event_id in metadata.started_event_ids:
            if (asked := self._asked_at.pop(event_id, None)) is not None:
                self._endpoint.metrics.prompt_latency_seconds.observe(now - asked)


async def refuse(websocket: WebSocket, fault: Fault) -> None:
    """Say why nothing starts, and close."""
    message = error_message(fault, None, None, fatal=True)
    with suppress(WebSocketDisconnect, RuntimeError, TimeoutError):
        await asyncio.wait_for(websocket.send_text(message.model_dump_json()), _CLOSE_S)
    await close(websocket, _TRY_AGAIN_LATER if fault.retryable else _POLICY_VIOLATION)


async def close(websocket: WebSocket, code: int) -> None:
    """Close a connection that is open, in a moment or never."""
    if websocket.application_state is WebSocketState.CONNECTED:
        with suppress(WebSocketDisconnect, RuntimeError, TimeoutError):
            await asyncio.wait_for(websocket.close(code), _CLOSE_S)
