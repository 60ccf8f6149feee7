"""Clients of the realtime WebSocket for tests: one that reads, and one on a bare socket that need not."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from websockets.client import ClientProtocol
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.sync.client import ClientConnection, connect
from websockets.uri import parse_uri

from rfengine.serving.realtime.protocol import SERVER_MESSAGES
from support.servers import RunningServer

WAIT = 60.0  # seconds that a test waits for a message at most
START = {"prompt": "a circle"}
_SMALL_BUFFER = 4096  # bytes that the kernel holds for a client that does not read


class RealtimeClient:
    """Sends messages and keeps what comes: JSON in `log`, chunks with their bytes in `chunks`. Every JSON
    message is one of the protocol."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.log: list[dict[str, Any]] = []
        self.chunks: list[tuple[dict[str, Any], bytes]] = []
        self.arrivals: list[float] = []  # of the chunks, by time.monotonic

    def send(self, kind: str, **fields: object) -> None:
        self.connection.send(json.dumps({"type": kind, **fields}))

    def start(self, **fields: object) -> dict[str, Any]:
        self.send("session.start", **{**START, **fields})
        return self.until("video.start")

    def change_prompt(self, prompt: object, event_id: str, **fields: object) -> None:
        interaction = {"event_id": event_id, "event": {"prompt": prompt}, **fields}
        self.send("session.interaction", interaction=interaction)

    def receive(self, seconds: float = WAIT) -> dict[str, Any]:
        """The next JSON message; where it describes a chunk, its bytes are taken too."""
        message = json.loads(self.connection.recv(seconds))
        SERVER_MESSAGES.validate_python(message)
        self.log.append(message)
        if message["type"] == "video.chunk_metadata":
            data = self.connection.recv(seconds)
            assert isinstance(data, bytes) and len(data) == message["byte_length"]
            self.chunks.append((message, data))
            self.arrivals.append(time.monotonic())
        return message

    def until(self, kind: str, **fields: object) -> dict[str, Any]:
        """Receive up to the first message of that kind with those values."""
        while True:
            message = self.receive()
            if message["type"] == kind and fields.items() <= message.items():
                return message

    def closed(self) -> int:
        """The close code, after all that is still sent."""
        try:
            while True:
                self.receive()
        except ConnectionClosed:
            return self.connection.close_code

    def take(self, count: int) -> None:
        """Receive until there are so many chunks."""
        while len(self.chunks) < count:
            self.receive()

    def finish(self) -> dict[str, Any]:
        """Receive everything up to the end of the session."""
        return self.until("session.done")

    @property
    def descriptions(self) -> list[dict[str, Any]]:
        """Those of the chunks."""
        return [description for description, _ in self.chunks]

    @property
    def media(self) -> bytes:
        return b"".join(data for _, data in self.chunks)


@contextmanager
def realtime_client(server: RunningServer) -> Iterator[RealtimeClient]:
    with connect(server.websocket_url, max_size=None) as connection:
        yield RealtimeClient(connection)


class BareClient:
    """A client without threads or buffers of its own: it reads when it is told to, as much as it is told."""

    def __init__(self, server: RunningServer, receive_buffer: int = _SMALL_BUFFER) -> None:
        address = urlsplit(server.websocket_url)
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(WAIT)
        self.socket.connect((address.hostname, address.port))
        self._protocol = ClientProtocol(parse_uri(server.websocket_url), max_size=None)
        self._protocol.send_request(self._protocol.connect())
        self._flush()
        while not isinstance(event := next(iter(self._read(_SMALL_BUFFER)), None), Response):
            pass
        assert event.status_code == 101, event

    def __enter__(self) -> BareClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, message: dict[str, Any]) -> None:
        self.send_frame(Opcode.TEXT, json.dumps(message).encode())

    def send_frame(self, opcode: Opcode, data: bytes, fin: bool = True) -> None:
        with suppress(ConnectionError):  # what was received before can still be read
            self.socket.sendall(Frame(opcode, data, fin).serialize(mask=True))

    def start(self, **fields: object) -> None:
        self.send({"type": "session.start", **START, **fields})

    def vanish(self) -> None:
        """Break the connection off without a word."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def read(self, most: int = 65536) -> list[dict[str, Any] | bytes]:
        """What is whole after at most so many bytes more: JSON messages, and chunks as bytes."""
        return [
            json.loads(event.data) if event.opcode is Opcode.TEXT else bytes(event.data)
            for event in self._read(most)
            if isinstance(event, Frame) and event.opcode in (Opcode.TEXT, Opcode.BINARY)
        ]

    def read_to_the_end(self) -> list[dict[str, Any] | bytes]:
        """All that comes until the server closes the connection."""
        entries = []
        while not self.has_ended:
            entries += self.read()
        return entries

    @property
    def has_ended(self) -> bool:
        """Whether the server has closed the connection, or sent its last frame."""
        return self._protocol.close_rcvd is not None or self._protocol.eof_sent or self._ended

    @property
    def close_code(self) -> int | None:
        return None if self._protocol.close_rcvd is None else self._protocol.close_rcvd.code

    _ended = False

    def _read(self, most: int) -> list[Response | Frame]:
        try:
            data = self.socket.recv(most)
        except ConnectionError:
            data = b""
        if not data:
            self._ended = True
            return []
        self._protocol.receive_data(data)
        events = self._protocol.events_received()
        self._flush()
        return events

    def _flush(self) -> None:
        data = b"".join(self._protocol.data_to_send())
        if data:
            try:
                self.socket.sendall(data)
            except ConnectionError:
                self._ended = True
