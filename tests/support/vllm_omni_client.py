"""A client written from the page that vLLM-Omni publishes of its streaming video output, and nothing else.

https://docs.vllm.ai/projects/vllm-omni/en/latest/serving/streaming_video_output_api/ of 2026-11-30: control
events are JSON text; a video.chunk_metadata is followed at once by one binary frame of fragmented MP4; binary
frames are joined in the order of arrival and remuxed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
from websockets.sync.client import ClientConnection, connect

WAIT_S = 60.0


@dataclass
class Played:
    """What one session gave; ignored: types of messages that the page does not have."""

    started: dict[str, Any] = field(default_factory=dict)
    chunks: list[dict[str, Any]] = field(default_factory=list)
    queued: list[str] = field(default_factory=list)
    pongs: int = 0
    done: dict[str, Any] = field(default_factory=dict)
    media: bytes = b""
    ignored: set[str] = field(default_factory=set)


class VideoError(Exception):
    """The server sent an error."""


def play(url: str, start: dict[str, Any], messages: Mapping[int, dict[str, Any]] | None = None) -> Played:
    """Play one session. messages: what is sent once so many chunks are here. Raises VideoError."""
    played, waiting = Played(), dict(messages or {})
    with connect(url, max_size=None) as connection:
        connection.send(json.dumps({"type": "session.start", **start}))
        while not played.done:
            frame = connection.recv(timeout=WAIT_S)
            assert isinstance(frame, str), "a binary frame came without its metadata"
            _take(json.loads(frame), connection, played)
            if (message := waiting.pop(len(played.chunks), None)) is not None:
                connection.send(json.dumps(message))
    return played


def _take(event: dict[str, Any], connection: ClientConnection, played: Played) -> None:
    match event["type"]:
        case "video.start":
            assert event["format"] == "m4s" and event["request_id"] and event["config"]
            played.started = event
        case "video.chunk_metadata":
            assert event["kind"] == "media" and event["request_id"] == played.started["request_id"]
            media = connection.recv(timeout=WAIT_S)
            assert isinstance(media, bytes) and len(media) == event["byte_length"]
            played.media += media
            played.chunks.append(event)
        case "session.interaction.queued":
            played.queued.append(event["event_id"])
        case "session.pong":
            played.pongs += 1
        case "session.done":
            assert event["request_id"] == played.started["request_id"]
            played.done = event
        case "error":
            raise VideoError(event["message"])
        case other:
            played.ignored.add(other)


def interaction(event_id: str, prompt: str, transition_chunks: int) -> dict[str, Any]:
    """The message that updates the prompt."""
    return {
        "type": "session.interaction",
        "interaction": {
            "event_id": event_id,
            "event": {"prompt": prompt},
            "transition_chunks": transition_chunks,
        },
    }


def remux(media: bytes, path: Path) -> None:
    """Write the joined fragments as an ordinary MP4."""
    with av.open(io.BytesIO(media)) as fragments, av.open(str(path), "w") as output:
        source = fragments.streams.video[0]
        stream = output.add_stream_from_template(source)
        for packet in fragments.demux(source):
            if packet.dts is not None:  # the last one is empty
                packet.stream = stream
                output.mux(packet)
