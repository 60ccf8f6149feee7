"""Plays a realtime session, changes its prompt half-way, and writes its video to an MP4 file.

    pip install websockets
    rfengine serve                                    # in another terminal
    python examples/realtime_client.py out.mp4        # RFENGINE_KEY=... where the server has access keys

docs/realtime_protocol.md has every message.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

FIRST = "a large red circle moving slowly to the right over a cloudy sky"
SECOND = "a large green square moving slowly to the right over a cloudy sky"


def play(url: str, key: str | None, num_frames: int, output: Path) -> None:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    frames = 0
    with connect(url, additional_headers=headers, max_size=None) as server, output.open("wb") as file:

        def send(message: dict[str, Any]) -> None:
            server.send(json.dumps(message))

        send({"type": "session.start", "prompt": FIRST, "num_frames": num_frames, "pace": "realtime"})
        for received in server:
            if isinstance(received, bytes):  # one chunk of the video: joined, they are an MP4 file
                file.write(received)
                continue
            message = json.loads(received)
            match message["type"]:
                case "video.start":
                    print("{model}: {width} x {height}, {fps} frames/s".format(**message["config"]))
                case "video.chunk_metadata":
                    before, frames = frames, frames + message["num_frames"]
                    if before < num_frames / 2 <= frames:
                        change = {"event_id": "square", "event": {"prompt": SECOND}, "mode": "recache"}
                        send({"type": "session.interaction", "interaction": change})
                case "session.interaction.applied":
                    print(f"{message['event_id']} shows from chunk {message['chunk_index']} on")
                case "error":
                    print(f"{message['code']}: {message['message']}")
                case "session.done":
                    print(f"{output}: {frames} frames in {message['chunks']} chunks, {message['reason']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Play a realtime session and keep its video.")
    parser.add_argument("output", type=Path, help="the MP4 to write")
    parser.add_argument("--url", default="ws://localhost:8000/v1/realtime/video")
    parser.add_argument("--num-frames", type=int, default=129)
    options = parser.parse_args()
    play(options.url, os.environ.get("RFENGINE_KEY"), options.num_frames, options.output)
