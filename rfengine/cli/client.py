"""`rfengine client`: a session on a server, from its first message to its file; also a test of the server."""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from rfengine.files import read_text
from rfengine.prompts import check_prompt
from rfengine.video import check_video_path, frame_count

_MOST_KEY_BYTES = 2**16  # of a file of keys


@dataclass(frozen=True, kw_only=True)
class ClientOptions:
    """Play a realtime session of a server without a browser, and keep its video."""

    url: Positional[str]
    """The server, as http://localhost:8000."""
    prompt: Positional[str]
    """What the video shows."""
    output: Annotated[Path, arg(aliases=("-o",))]
    """The MP4 to write."""
    seconds: float = 5.0
    """Length of the video."""
    seed: int = 0
    height: int | None = None
    """Pixels, a multiple of 16; the model's own size where nothing is given."""
    width: int | None = None
    """Pixels, a multiple of 16."""
    switch: UseAppendAction[tuple[str, ...]] = ()
    """SECONDS:PROMPT, another prompt from there on; may be given several times."""
    mode: Literal["soft", "recache", "hard"] = "recache"
    """How prompts change."""
    pace: Literal["realtime", "fast"] = "fast"
    """As fast as the server can, or no faster than the video plays."""
    hls: bool = False
    """Print the address of an HLS playlist, which other players open while this runs."""
    api_key_file: Path | None = None
    """The access key, in a file."""


def run(options: ClientOptions) -> int:
    try:
        from rfengine.serving.realtime.client import Switch, frame_rate_of, play
    except ImportError as error:
        raise RuntimeError(
            f"the client needs {error.name}, which is not installed; pip install 'rfengine[serve]'"
        ) from error
    check_prompt(options.prompt)
    check_video_path(options.output)
    switches = [Switch(*_seconds_and_prompt(text), options.mode) for text in options.switch]
    key = None if options.api_key_file is None else _first_key(options.api_key_file)

    def show(message: dict[str, Any]) -> None:
        if message["type"] == "video.start" and message["hls_url"]:
            print(f"HLS: {options.url.rstrip('/')}{message['hls_url']}", file=sys.stderr, flush=True)
        if message["type"] == "session.interaction.applied":
            print(f"{message['event_id']} shows from chunk {message['chunk_index']} on", file=sys.stderr)

    count = frame_count(frame_rate_of(options.url, key), options.seconds)
    start = {
        "prompt": options.prompt, "seed": options.seed, "pace": options.pace, "hls": options.hls,
        "num_frames": count, "height": options.height, "width": options.width,
    }  # fmt: skip
    played = play(options.url, start, options.output, key, switches, show)
    gap = statistics.median(played.gaps_s) if played.gaps_s else 0.0
    total = played.first_chunk_s + sum(played.gaps_s)
    print(
        f"{options.output}: {played.frames} frames; the first chunk after {played.first_chunk_s * 1e3:.0f} "
        f"ms, then one every {gap * 1e3:.0f} ms (median); {played.frames / total:.1f} frames/s; "
        f"{played.reason}"
    )
    return 0 if played.reason == "finished" else 1


def _first_key(path: Path) -> str:
    """The first key of a file as the server reads it. Raises ValueError where there is none."""
    from rfengine.serving.access import key_lines

    keys = key_lines(read_text(path, _MOST_KEY_BYTES))
    if not keys:
        raise ValueError(f"{path} has no access key; write one on a line of its own")
    return keys[0]


def _seconds_and_prompt(text: str) -> tuple[float, str]:
    seconds, colon, prompt = text.partition(":")
    try:
        number = float(seconds)
    except ValueError:
        number = -1.0
    if not colon or number < 0:
        raise ValueError(f"--switch is {text[:60]!r}; use SECONDS:PROMPT, such as '3:a green square'")
    check_prompt(prompt)
    return number, prompt
