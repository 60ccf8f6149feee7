"""A headless client of the realtime WebSocket: plays one session and keeps its video."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit, urlunsplit
from urllib.request import Request, urlopen

from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.sync.client import ClientConnection, connect

from rfengine.files import partial_path
from rfengine.serving.recording import write_mp4

_PATH = "/v1/realtime/video"
_MOST_BYTES = 256 * 2**20  # of a message
_MOST_ANSWER_BYTES = 2**20
_ANSWER_S = 10.0


@dataclass(frozen=True, slots=True)
class Switch:
    """Another prompt from `seconds` of video on."""

    seconds: float
    prompt: str
    mode: str = "recache"


@dataclass(slots=True)
class Played:
    """What a session gave: seconds from session.start to the first chunk and between chunks, and receipts as
    (event_id, index of the chunk, seconds from the request)."""

    first_chunk_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    frames: int = 0
    receipts: list[tuple[str, int, float]] = field(default_factory=list)
    reason: str = ""
    dropped: int = 0


def realtime_url(url: str) -> str:
    """The address of the WebSocket of a server: http://host:port and ws://host:port/path both do."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    schemes = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}
    if parts.scheme not in schemes or not parts.hostname:
        raise ValueError(f"the server is {url!r}; give an address such as http://localhost:8000")
    path = parts.path if parts.path not in ("", "/") else _PATH
    return urlunsplit((schemes[parts.scheme], parts.netloc, path, "", ""))


def frame_rate_of(url: str, key: str | None = None) -> int:
    """Frames per second of the server's model. Raises RuntimeError where the server does not say."""
    parts = urlsplit(realtime_url(url))
    address = urlunsplit((parts.scheme.replace("ws", "http", 1), parts.netloc, "/v1/page/config", "", ""))
    request = Request(address, headers=_headers(key))
    try:
        with urlopen(request, timeout=_ANSWER_S) as answer:
            return int(json.loads(answer.read(_MOST_ANSWER_BYTES))["fps"])
    except HTTPError as error:
        reason = f"{error.code} {error.reason}"
        raise RuntimeError(f"{url} refused ({reason}); check the key and the address") from error
    except (URLError, TimeoutError, ConnectionError) as error:
        raise RuntimeError(f"{url} cannot be reached ({error}); is the server running there?") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f"{url} is no rfengine server: it has no page configuration") from error


def _headers(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def play(
    url: str,
    start: dict[str, Any],
    output: Path,
    key: str | None = None,
    switches: Sequence[Switch] = (),
    on_message: Callable[[dict[str, Any]], None] | None = None,
) -> Played:
    """Play a session to its end and write its video, an ordinary MP4, to `output`.

    start: fields of session.start. on_message: gets every JSON message. Raises RuntimeError where the server
    cannot be reached, refuses or fails; what was received before is kept then.
    """
    try:
        connection = connect(realtime_url(url), additional_headers=_headers(key), max_size=_MOST_BYTES)
    except InvalidHandshake as error:
        raise RuntimeError(
            f"{url} refused the connection ({error}); check the key and the address"
        ) from error
    except OSError as error:
        reason = error.strerror or error
        raise RuntimeError(f"{url} cannot be reached ({reason}); is the server running there?") from error
    fragments = partial_path(output)
    try:
        with connection, fragments.open("wb") as file:
            return _Play(connection, list(switches), on_message).run(start, file.write)
    finally:
        try:
            if fragments.exists() and fragments.stat().st_size:
                write_mp4(fragments, output)
        finally:
            fragments.unlink(missing_ok=True)


class _Play:
    """One session on an open connection."""

    def __init__(
        self,
        connection: ClientConnection,
        switches: list[Switch],
        on_message: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self._connection, self._switches, self._on_message = connection, switches, on_message
        self._played = Played()
        self._asked: dict[str, float] = {}
        self._fps = 1

    def run(self, start: dict[str, Any], write: Callable[[bytes], object]) -> Played:
        played = self._played
        self._send({"type": "session.start", **start})
        started = last = time.perf_counter()
        try:
            while True:
                received = self._connection.recv()
                if isinstance(received, bytes):
                    now = time.perf_counter()
                    if played.first_chunk_s:
                        played.gaps_s.append(now - last)
                    else:
                        played.first_chunk_s = now - started
                    last = now
                    write(received)
                    self._switch_where_due()
                elif self._is_done(json.loads(received)):
                    return played
        except ConnectionClosed as error:
            raise RuntimeError("the server closed the connection before the end of the session") from error

    def _send(self, message: dict[str, Any]) -> None:
        self._connection.send(json.dumps(message))

    def _switch_where_due(self) -> None:
        while self._switches and self._played.frames / self._fps >= self._switches[0].seconds:
            switch = self._switches.pop(0)
            event_id = f"switch-{len(self._asked)}"
            self._asked[event_id] = time.perf_counter()
            change = {"event_id": event_id, "event": {"prompt": switch.prompt}, "mode": switch.mode}
            self._send({"type": "session.interaction", "interaction": change})

    def _is_done(self, message: dict[str, Any]) -> bool:
        """Take one JSON message. Raises RuntimeError where the session failed."""
        if self._on_message is not None:
            self._on_message(message)
        played = self._played
        match message["type"]:
            case "video.start":
                self._fps = message["config"]["fps"]
            case "video.chunk_metadata":
                played.frames += message["num_frames"]
                played.dropped += message["dropped_chunks"]
            case "session.interaction.applied":
                event_id = message["event_id"]
                waited = time.perf_counter() - self._asked.get(event_id, time.perf_counter())
                played.receipts.append((event_id, message["chunk_index"], waited))
            case "error" if message["fatal"]:
                raise RuntimeError(f"the server refused: {message['message']} ({message['code']})")
            case "session.done":
                played.reason = message["reason"]
                return True
        return False
