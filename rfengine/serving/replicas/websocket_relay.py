"""WebSocketRelay: a realtime session of a client, run by a replica.

Messages are passed on one by one and never gathered, so that a client which does not read is felt by the
replica as if it were connected to it. When the replica dies, its client is told so by the protocol.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress

import aiohttp
from starlette.websockets import WebSocket, WebSocketDisconnect

from rfengine.serving.access import ClientIdentity
from rfengine.serving.errors import Fault, ServiceError
from rfengine.serving.gateway_access import gateway_headers
from rfengine.serving.realtime.endpoint import RealtimeLimits, close, counted_connection, refuse
from rfengine.serving.realtime.live_video import error_message
from rfengine.serving.realtime.protocol import SessionDone
from rfengine.serving.replicas.choice import LOST, NO_REPLICA
from rfengine.serving.replicas.silence import IsSilent, unless_silent
from rfengine.serving.replicas.table import Replica

logger = logging.getLogger(__name__)

_PATH = "/v1/realtime/video"
_INTERNAL = 1011  # close code of RFC 6455
_NO_CODES = (None, 0, 1005, 1006, 1015)  # of an end without a code, which no close frame may have
_PASSING = (
    "no_memory",
    "too_many_sessions",
    "draining",
)  # codes of refusals that another replica may not give
_METADATA = '"video.chunk_metadata"'
_TYPE_CHARACTERS = 64  # at the start of a message, in which its type stands
_MARGIN_S = 30.0
_SILENCE_CHECK_S = 1.0
_ANSWER_S = 60.0  # in which a replica says whether it takes a session

Choose = Callable[[], Sequence[Replica]]


class WebSocketRelay:
    """The realtime route of a gateway.

    choose: the replicas that may take a session now, best first. is_silent: of one that does not answer any
    more, though its connections are open. on_refused: called where no replica had room. idle_s: after which
    a replica ends a session whose client takes nothing. connections: open ones by key; relayed: sessions by
    replica.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        secret: str,
        limits: RealtimeLimits,
        idle_s: float,
        choose: Choose,
        is_silent: IsSilent,
        on_refused: Callable[[], None],
    ) -> None:
        self.session, self.secret, self.limits = session, secret, limits
        self.choose, self.is_silent, self.on_refused = choose, is_silent, on_refused
        self.stalled_s = idle_s + limits.flush_s + _MARGIN_S  # then the replica has given the client up
        self.connections: Counter[str] = Counter()
        self.relayed: Counter[str] = Counter()

    def release(self, replica: Replica) -> None:
        """A session of a replica is over."""
        self.relayed[replica.name] -= 1
        if self.relayed[replica.name] <= 0:
            del self.relayed[replica.name]

    async def serve(self, websocket: WebSocket) -> None:
        """Serve one connection to its end."""
        async with counted_connection(websocket, self.connections, self.limits) as client:
            if client is not None:
                await _Relayed(self, websocket, client).run()


class _Relayed:
    """One client and, once it has asked for a session, its replica."""

    def __init__(self, relay: WebSocketRelay, websocket: WebSocket, client: ClientIdentity) -> None:
        self._relay, self._websocket, self._client = relay, websocket, client
        self._request_id: str | None = None
        self._metadata: str | None = None  # of the last chunk
        self._is_held = False  # it waits for its chunk
        self._done = False  # the replica has said how the session ended

    async def run(self) -> None:
        limits = self._relay.limits
        try:
            first = await asyncio.wait_for(self._websocket.receive(), limits.start_s)
        except TimeoutError:
            message = f"no session.start came within {limits.start_s:g} s; send it first"
            await refuse(self._websocket, Fault("start_timeout", message, 408, True))
            return
        if first["type"] == "websocket.disconnect":
            return
        with suppress(WebSocketDisconnect):
            try:
                replica, upstream, answer = await self._open(first)
            except ServiceError as error:
                await refuse(self._websocket, error.fault)
                return
            try:
                await self._pass_on(answer)
                await self._converse(replica, upstream)
            finally:
                self._relay.release(replica)
                await upstream.close()

    async def _open(self, first: dict) -> tuple[Replica, aiohttp.ClientWebSocketResponse, aiohttp.WSMessage]:
        """A replica that takes the first message, and its answer; the last refusal where none has room.

        Until there is an answer the client knows of no session, so another replica may begin it.
        """
        refused, asked = None, set()
        while replica := next((each for each in self._relay.choose() if each.name not in asked), None):
            asked.add(replica.name)
            self._relay.relayed[replica.name] += 1  # at once, so that others choose with it in mind
            opened = await self._ask_for_session(replica, first)
            if opened is None:
                self._relay.release(replica)
                continue
            if refused is not None:
                self._relay.release(refused[0])
                await refused[1].close()
            if _refusal_code(opened[1]) not in _PASSING:
                return replica, *opened
            refused = replica, *opened
        if refused is None:
            raise ServiceError(NO_REPLICA)
        self._relay.on_refused()
        return refused

    async def _ask_for_session(
        self, replica: Replica, first: dict
    ) -> tuple[aiohttp.ClientWebSocketResponse, aiohttp.WSMessage] | None:
        """The connection and what the replica answers; None where it does not."""
        upstream = None
        try:
            async with asyncio.timeout(_ANSWER_S):
                upstream = await unless_silent(self._connect(replica), replica, self._relay.is_silent)
                await unless_silent(_send(upstream, first), replica, self._relay.is_silent)
                answer = await unless_silent(upstream.receive(), replica, self._relay.is_silent)
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            logger.warning("replica %s began no session: %s", replica.name, type(error).__name__)
        else:
            if answer.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                return upstream, answer
            logger.warning("replica %s ended before a session began", replica.name)
        if upstream is not None:
            await upstream.close()
        return None

    async def _connect(self, replica: Replica) -> aiohttp.ClientWebSocketResponse:
        return await self._relay.session.ws_connect(
            f"http://{replica.address}{_PATH}",
            headers=gateway_headers(self._relay.secret, replica.name, self._client),
            max_msg_size=0,
            timeout=aiohttp.ClientWSTimeout(ws_close=2.0),
        )

    async def _converse(self, replica: Replica, upstream: aiohttp.ClientWebSocketResponse) -> None:
        asking = asyncio.create_task(self._ask(upstream))
        answering = asyncio.create_task(self._answer(upstream))
        silence = asyncio.create_task(self._await_silence(replica))
        tasks = (asking, answering, silence)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                await self._finish(answering)
            elif silence.done():
                answering.cancel()
                await asyncio.wait({answering})
                await self._tell_lost()
                await close(self._websocket, _INTERNAL)
        finally:  # and where the client has gone
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _await_silence(self, replica: Replica) -> None:
        while not self._relay.is_silent(replica):
            await asyncio.sleep(_SILENCE_CHECK_S)

    async def _ask(self, upstream: aiohttp.ClientWebSocketResponse) -> None:
        """Pass on what the client says, until it says no more."""
        while (message := await self._websocket.receive())["type"] != "websocket.disconnect":
            try:
                await _send(upstream, message)
            except (aiohttp.ClientError, ConnectionError):  # `_answer` sees the end, after what is left
                await asyncio.Event().wait()

    async def _answer(self, upstream: aiohttp.ClientWebSocketResponse) -> int | None:
        """Pass on what the replica says; returns its close code, None where it ended without one."""
        while True:
            message = await upstream.receive()
            if message.type is aiohttp.WSMsgType.CLOSE:
                return message.data
            if message.type not in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                return None
            await self._pass_on(message)

    async def _pass_on(self, message: aiohttp.WSMessage) -> None:
        """Send on; the description of a chunk goes with the chunk, so that no client waits for half."""
        async with asyncio.timeout(self._relay.stalled_s):
            if message.type is aiohttp.WSMsgType.TEXT:
                self._is_held = _METADATA in message.data[:_TYPE_CHARACTERS]
                if self._is_held:
                    self._metadata = message.data
                    return
                self._note(message.data)
                await self._websocket.send_text(message.data)
                return
            if self._is_held:
                self._is_held = False
                await self._websocket.send_text(self._metadata)
            await self._websocket.send_bytes(message.data)

    def _note(self, text: str) -> None:
        beginning = text[:_TYPE_CHARACTERS]
        if self._request_id is None and '"video.start"' in beginning:
            self._request_id = json.loads(text)["request_id"]
        self._done = self._done or '"session.done"' in beginning

    async def _finish(self, answering: asyncio.Task[int | None]) -> None:
        try:
            code = await answering
        except TimeoutError:
            logger.warning("a client took nothing for %g s and is cut off", self._relay.stalled_s)
            return
        if code is None and not self._done:
            await self._tell_lost()
            code = _INTERNAL
        await close(self._websocket, 1000 if code in _NO_CODES else code)

    async def _tell_lost(self) -> None:
        """Say what the replica could not: why the session ended."""
        logger.warning("a session has lost its replica")
        sent = self._metadata is not None and not self._is_held
        chunks = 0
        if self._metadata is not None:
            chunks = json.loads(self._metadata)["transport_chunk_index"] + sent
        messages = [error_message(LOST, self._request_id, None, fatal=True)]
        if self._request_id is not None:
            messages.append(
                SessionDone(request_id=self._request_id, chunks=chunks, stopped=True, reason="failed")
            )
        with suppress(TimeoutError):
            async with asyncio.timeout(self._relay.limits.flush_s):
                for message in messages:
                    await self._websocket.send_text(message.model_dump_json())


async def _send(upstream: aiohttp.ClientWebSocketResponse, message: dict) -> None:
    text = message.get("text")
    if text is None:
        await upstream.send_bytes(message["bytes"])
    else:
        await upstream.send_str(text)


def _refusal_code(answer: aiohttp.WSMessage) -> str | None:
    """The code of an error with which a replica begins no session; None for any other answer."""
    if answer.type is not aiohttp.WSMsgType.TEXT or '"error"' not in answer.data[:_TYPE_CHARACTERS]:
        return None
    message = json.loads(answer.data)
    return message.get("code") if message.get("fatal") else None
