"""A client of the protocol that vLLM-Omni publishes plays sessions on our server."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest

from support.models import small_pipeline
from support.servers import RunningServer, running_server
from support.vllm_omni_client import Played, VideoError, interaction, play, remux

FPS, FIRST, CHUNK = 16, 9, 12  # frames of the first chunk, and of each other one
PUBLISHED = {  # as the page has it, but for the model and its size
    "model": "small", "prompt": "A serene lakeside sunrise with mist over the water", "format": "m4s",
    "width": 48, "height": 32, "fps": FPS, "num_frames": 99, "guidance_scale": 1.0, "seed": 42,
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(small_pipeline(), tmp_path_factory.mktemp("data")) as running:
        yield running


def decoded_times(played: Played, path: Path) -> list[Fraction]:
    """When each frame of the remuxed file is shown; every one has the size that was asked for."""
    remux(played.media, path)
    with av.open(str(path)) as file:
        frames = list(file.decode(video=0))
    assert {(frame.width, frame.height) for frame in frames} == {(48, 32)}
    return [frame.pts * frame.time_base for frame in frames]


def test_published_session_gives_the_video_it_asks_for(server: RunningServer, tmp_path: Path) -> None:
    played = play(server.websocket_url, PUBLISHED, {1: {"type": "session.ping"}})
    config = played.started["config"]
    assert {name: config[name] for name in ("width", "height", "fps", "num_frames", "seed")} == {
        "width": 48, "height": 32, "fps": 16, "num_frames": 99, "seed": 42,
    }  # fmt: skip
    assert [chunk["num_frames"] for chunk in played.chunks] == [FIRST] + 7 * [CHUNK] + [6]
    assert [chunk["transport_chunk_index"] for chunk in played.chunks] == list(range(9))
    assert [chunk["generation_chunk_index"] for chunk in played.chunks] == list(range(9))
    assert decoded_times(played, tmp_path / "out.mp4") == [Fraction(n, FPS) for n in range(99)]
    assert played.pongs == 1
    assert played.done["chunks"] == 9 and played.done["stopped"] is False


def test_prompt_update_is_queued_and_shown_over_its_transition(server: RunningServer, tmp_path: Path) -> None:
    update = interaction("storm-1", "A storm over the lake", transition_chunks=2)
    start = PUBLISHED | {"num_frames": FIRST + 40 * CHUNK}  # long enough for the update to come in time
    played = play(server.websocket_url, start, {1: update})
    assert played.queued == ["storm-1"]
    started, active, completed = (
        [chunk["transport_chunk_index"] for chunk in played.chunks if "storm-1" in chunk[f"{name}_event_ids"]]
        for name in ("started", "active", "completed")
    )
    assert len(started) == 1 and started[0] >= 1
    assert active == started
    assert completed == [started[0] + 1]
    assert len(decoded_times(played, tmp_path / "out.mp4")) == FIRST + 40 * CHUNK
    assert "session.interaction.applied" in played.ignored


def test_stop_ends_a_session_and_what_was_received_plays(server: RunningServer, tmp_path: Path) -> None:
    played = play(server.websocket_url, PUBLISHED | {"num_frames": 100_000}, {2: {"type": "session.stop"}})
    assert played.done["stopped"] is True
    frames = sum(chunk["num_frames"] for chunk in played.chunks)
    assert FIRST + CHUNK <= frames < 100_000
    assert len(decoded_times(played, tmp_path / "out.mp4")) == frames


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("guidance_scale", 5.0, "guidance_scale is '5.0'"),
        ("fps", 24, "fps is '24'"),
        ("model", "other", "model is 'other'"),
        ("extra_params", {}, "extra_params: Extra inputs"),
    ],
)
def test_start_that_the_model_cannot_do_gets_an_error(
    server: RunningServer, field: str, value: Any, reason: str
) -> None:
    with pytest.raises(VideoError) as raised:
        play(server.websocket_url, PUBLISHED | {field: value})
    assert reason in str(raised.value)
