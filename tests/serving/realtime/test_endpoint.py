"""The realtime WebSocket from a client's side: the order of messages, receipts, points, branches, files."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path

import av
import httpx2
import numpy
import pytest

from rfengine import Pipeline
from rfengine.serving.options import ServiceOptions
from rfengine.serving.realtime.endpoint import RealtimeLimits
from support.models import small_pipeline
from support.realtime import realtime_client
from support.servers import RunningServer, running_server
from support.sessions import eventually

LIMITS = RealtimeLimits(start_s=1.0, connections_per_key=3)


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return small_pipeline()


@pytest.fixture(scope="module")
def server(pipe: Pipeline, tmp_path_factory) -> Iterator[RunningServer]:
    data = tmp_path_factory.mktemp("realtime") / "data"
    with running_server(pipe, data, realtime=LIMITS, service=ServiceOptions(keep_every=3)) as running:
        yield running


def decoded(data: bytes) -> int:
    with av.open(io.BytesIO(data)) as container:
        return sum(1 for _ in container.decode(video=0))


def pixels(data: bytes) -> numpy.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return numpy.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_a_session_plays_to_its_end(server: RunningServer, pipe: Pipeline) -> None:
    with realtime_client(server) as one:
        begun = one.start(num_frames=45, seed=5)
        assert begun["config"] | {"lead_seconds": 1.0} == {
            "model": "small", "prompt": "a circle", "width": 48, "height": 32, "fps": 16, "num_frames": 45,
            "seed": 5, "pace": "fast", "lead_seconds": 1.0, "slow_client": "pause", "keep_every": 3,
            "chunk_frames": 12,
        }  # fmt: skip
        assert begun["hls_url"] is None and begun["download_url"] is None
        done = one.until("session.done")
        assert one.closed() == 1000
    assert (done["chunks"], done["stopped"], done["reason"]) == (4, False, "finished")
    assert done["request_id"] == begun["request_id"]
    assert [chunk["num_frames"] for chunk in one.descriptions] == [9, 12, 12, 12]
    assert [chunk["start_seconds"] for chunk in one.descriptions] == [0.0, 9 / 16, 21 / 16, 33 / 16]
    assert [chunk["generation_chunk_index"] for chunk in one.descriptions] == [0, 1, 2, 3]
    assert [chunk["snapshot_id"] for chunk in one.descriptions] == [0, None, None, 1]
    own = numpy.concatenate([chunk.frames for chunk in pipe.stream("a circle", seed=5).take(4)])
    difference = numpy.abs(pixels(one.media).astype(int) - own.astype(int))
    assert len(own) == 45 and difference.mean() < 30  # random pixels through 4:2:0


def test_a_prompt_change_is_queued_then_applied_then_shown(server: RunningServer) -> None:
    with realtime_client(server) as one:
        one.start()
        one.until("video.chunk_metadata")
        one.change_prompt("a square", "change", mode="recache")
        queued = one.until("session.interaction.queued")
        applied = one.until("session.interaction.applied")
        shown = one.until("video.chunk_metadata")
    assert queued["event_id"] == applied["event_id"] == "change"
    assert shown["generation_chunk_index"] == applied["chunk_index"] and shown["prompt"] == "a square"
    assert shown["started_event_ids"] == shown["completed_event_ids"] == ["change"]


def test_a_transition_is_active_for_its_chunks(server: RunningServer) -> None:
    with realtime_client(server) as one:
        one.start()
        one.change_prompt("a square", "slow", transition_chunks=3)
        while not (one.descriptions and one.descriptions[-1]["completed_event_ids"]):
            one.receive()
    active = [
        chunk["generation_chunk_index"] for chunk in one.descriptions if "slow" in chunk["active_event_ids"]
    ]
    completed = [
        chunk["generation_chunk_index"] for chunk in one.descriptions if chunk["completed_event_ids"]
    ]
    assert len(active) == 2 and completed == [active[-1] + 1]


def test_a_prompt_of_several_texts_is_named_in_its_chunks(server: RunningServer) -> None:
    texts = [{"text": "a square", "weight": 3}, {"text": "a star"}]
    with realtime_client(server) as one:
        one.start()
        one.until("video.chunk_metadata")
        one.change_prompt(texts, "mix", transition_chunks=2, interpolation="spherical")
        applied = one.until("session.interaction.applied", event_id="mix")
        shown = one.until("video.chunk_metadata")
    assert shown["generation_chunk_index"] == applied["chunk_index"]
    assert shown["prompt"] == "3 * a square | 1 * a star"
    assert shown["active_event_ids"] == ["mix"]


def test_pause_resume_snapshot_seek_and_branch(server: RunningServer) -> None:
    with realtime_client(server) as one:
        begun = one.start(record=True, keep_every=0)
        one.until("video.chunk_metadata", transport_chunk_index=2)
        one.send("session.pause", event_id="pause")
        one.until("session.state", state="paused", event_id="pause")
        one.send("session.snapshot", event_id="keep")
        kept = one.until("session.snapshot.kept", event_id="keep")
        made = kept["chunk_index"]
        assert (kept["automatic"], kept["branch_id"], kept["snapshot_id"]) == (False, 0, 0)
        one.send("session.resume")
        one.until("session.state", state="running")
        one.until("video.chunk_metadata", generation_chunk_index=made + 1)
        one.send("session.seek", snapshot_id=0, event_id="back")
        moved = one.until("session.moved", event_id="back")
        assert (moved["branch_id"], moved["parent_branch_id"], moved["chunk_index"]) == (1, 0, made)
        again = one.until("video.chunk_metadata", branch_id=1, generation_chunk_index=made + 1)
        assert again["start_seconds"] > one.descriptions[made + 1]["start_seconds"]
        one.send("session.branch", snapshot_id=0, prompt="a square", mode="recache", seed=8, event_id="new")
        moved = one.until("session.moved", event_id="new")
        assert (moved["branch_id"], moved["prompt"], moved["seed"]) == (2, "a square", 8)
        one.until("video.chunk_metadata", branch_id=2, generation_chunk_index=made + 1)
        one.send("session.pause")
        one.until("session.state", state="paused")
        url = server.url + begun["download_url"]
        whole = httpx2.get(url)
        assert whole.status_code == 200 and whole.headers["content-type"] == "video/mp4"
        recorded = decoded(whole.content)
        branches = [decoded(httpx2.get(f"{url}?branch={branch}").content) for branch in range(3)]
        one.send("session.stop")
        done = one.until("session.done")
        assert one.closed() == 1000
    assert (done["reason"], done["stopped"]) == ("stopped", True)
    assert recorded == sum(chunk["num_frames"] for chunk in one.descriptions)
    for branch, frames in enumerate(branches):
        own = [chunk["num_frames"] for chunk in one.descriptions if chunk["branch_id"] == branch]
        before = sum(chunk["num_frames"] for chunk in one.descriptions[:made]) if branch else 0
        assert frames == before + sum(own)
    same = [chunk for chunk in one.descriptions if chunk["generation_chunk_index"] == made]
    assert [chunk["branch_id"] for chunk in same] == [0, 1, 2]
    assert decoded(one.media) == recorded
    assert decoded(httpx2.get(url).content) == recorded  # after the session too


def test_an_hls_playlist_is_played_while_the_session_runs(server: RunningServer) -> None:
    with realtime_client(server) as one:
        begun = one.start(hls=True, num_frames=9 + 12 * 5)
        one.until("session.done")
        url = server.url + begun["hls_url"]
        playlist = httpx2.get(url).text
        with av.open(url) as container:
            assert sum(1 for _ in container.decode(video=0)) == 69
    assert "#EXT-X-MAP" in playlist and "segment-0.m4s" in playlist and "#EXT-X-ENDLIST" in playlist


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ({"type": "session.seek", "snapshot_id": 999}, "unknown_snapshot"),
        ({"type": "session.branch", "snapshot_id": 999}, "unknown_snapshot"),
        ({"type": "session.resume"}, "illegal_transition"),
        ({"type": "session.start", "prompt": "again"}, "already_started"),
        ({"type": "session.interaction", "interaction": {"event": {"prompt": "  "}}}, "invalid_value"),
        (
            {"type": "session.interaction", "interaction": {"event": {"prompt": "x"}, "mode": "fade"}},
            "invalid_message",
        ),
        (
            {"type": "session.interaction", "interaction": {
                "event": {"prompt": "x"}, "mode": "hard", "transition_chunks": 4}},
            "invalid_value",
        ),
        ({"type": "session.pause", "extra": 1}, "invalid_message"),
        ({"type": "session.nothing"}, "invalid_message"),
        ({"prompt": "a circle"}, "invalid_message"),
        ([], "invalid_message"),
    ],
)  # fmt: skip
def test_a_wrong_message_is_answered_and_changes_nothing(
    server: RunningServer, message: object, code: str
) -> None:
    with realtime_client(server) as one:
        one.start()
        one.until("video.chunk_metadata")
        one.connection.send(json.dumps(message))
        error = one.until("error")
        for _ in range(3):
            assert one.until("video.chunk_metadata")["prompt"] == "a circle"
        one.send("session.stop")
        done = one.until("session.done")
    assert (error["code"], error["fatal"]) == (code, False), error
    assert done["reason"] == "stopped"


def test_an_event_id_is_used_once(server: RunningServer) -> None:
    with realtime_client(server) as one:
        one.start()
        one.change_prompt("a square", "same")
        one.change_prompt("a star", "same")
        error = one.until("error")
        for _ in range(3):
            one.until("video.chunk_metadata")
    assert (error["code"], error["event_id"]) == ("event_id_conflict", None)
    assert "a star" not in {chunk["prompt"] for chunk in one.descriptions}


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompt": ""}, "invalid_message"),
        ({"prompt": "x" * 10_001}, "invalid_message"),
        ({"prompt": "nul \0"}, "invalid_value"),
        ({"height": 33}, "invalid_message"),
        ({"height": 8192, "width": 8192}, "invalid_value"),
        ({"model": "other"}, "model_not_found"),
        ({"fps": 24}, "invalid_value"),
        ({"guidance_scale": 5.0}, "invalid_value"),
        ({"num_inference_steps": 50}, "invalid_value"),
        ({"negative_prompt": "blurry"}, "invalid_value"),
        ({"seed": -1}, "invalid_message"),
        ({"num_frames": 0}, "invalid_message"),
        ({"output_path": "/tmp/x"}, "invalid_message"),
        ({"image_url": "http://localhost/x"}, "invalid_message"),
        ({"format": "mp4"}, "invalid_message"),
        ({"lead_seconds": 1e9}, "invalid_message"),
    ],
)
def test_a_start_that_cannot_be_is_refused(server: RunningServer, fields: dict, code: str) -> None:
    with realtime_client(server) as one:
        one.send("session.start", **{"prompt": "a circle", **fields})
        error = one.receive()
        assert one.closed() == 1008
    assert (error["type"], error["code"], error["fatal"]) == ("error", code, True), error
    assert error["request_id"] is None and len(error["message"]) < 450


def test_values_that_the_model_has_are_accepted(server: RunningServer) -> None:
    with realtime_client(server) as one:
        fields = {"fps": 16, "guidance_scale": 1.0, "num_inference_steps": 2, "negative_prompt": ""}
        one.start(model="small", format="m4s", width=48, height=32, num_frames=9, **fields)
        assert one.until("session.done")["chunks"] == 1


def test_the_first_message_has_its_time_and_is_a_start(server: RunningServer) -> None:
    with realtime_client(server) as one:
        assert one.receive()["code"] == "start_timeout"
        assert one.closed() == 1013
    with realtime_client(server) as one:
        one.send("session.ping")
        assert one.receive()["code"] == "no_session"
        assert one.closed() == 1008
    with realtime_client(server) as one:
        one.connection.send(b"binary")
        assert one.receive()["code"] == "binary_message"


def test_a_ping_is_answered(server: RunningServer) -> None:
    with realtime_client(server) as one:
        one.start()
        one.send("session.ping")
        one.until("session.pong")


def test_connections_of_a_client_are_limited_and_freed(server: RunningServer) -> None:
    with realtime_client(server) as first, realtime_client(server) as second, realtime_client(server):
        for one in (first, second):
            one.start()
        with realtime_client(server) as fourth:
            assert fourth.receive()["code"] == "too_many_connections"
            assert fourth.closed() == 1013
    eventually(lambda: not server.app.state.endpoint.connections)
    with realtime_client(server) as one:
        one.start(num_frames=9)
        one.until("session.done")


def test_a_client_that_goes_away_frees_its_session(server: RunningServer) -> None:
    service = server.app.state.service
    with realtime_client(server) as one:
        one.start()
        one.until("video.chunk_metadata")
        one.connection.socket.close()
    eventually(lambda: not any(service.counts().values()))
    assert service.memory()["device"] == 0 and not server.app.state.endpoint.outboxes


def test_a_realtime_session_comes_at_the_pace_of_the_clock(server: RunningServer) -> None:
    with realtime_client(server) as one:
        started = time.monotonic()
        one.start(pace="realtime", lead_seconds=0.2, num_frames=45)
        one.until("session.done")
        elapsed = time.monotonic() - started
    assert 33 / 16 - 0.2 - 0.1 < elapsed < 6


def test_sessions_at_once_have_encoders_of_their_own_and_the_next_one_is_open_again(
    server: RunningServer, pipe: Pipeline
) -> None:
    with realtime_client(server) as first, realtime_client(server) as second:
        first.start(num_frames=21)
        second.start(num_frames=21)
        for one in (first, second):
            one.until("session.done")
            assert decoded(one.media) == 21
    assert_spare_encoder(server, pipe)


def test_a_session_that_is_refused_leaves_an_open_encoder(pipe: Pipeline, tmp_path: Path) -> None:
    service = ServiceOptions(max_sessions=1)
    with running_server(pipe, tmp_path / "data", service=service) as server, realtime_client(server) as first:
        first.start()
        first.until("video.chunk_metadata")
        assert_spare_encoder(server, pipe)
        server.app.state.endpoint.spare_encoder.refill()
        with realtime_client(server) as second:
            second.send("session.start", prompt="a circle")
            assert second.until("error")["code"] == "too_many_sessions"
        assert_spare_encoder(server, pipe)


def assert_spare_encoder(server: RunningServer, pipe: Pipeline) -> None:
    """One comes, and is taken."""
    height, width = pipe.config.height, pipe.config.width
    eventually(lambda: server.app.state.endpoint.spare_encoder.take(height, width) is not None)


def test_a_size_of_its_own_is_streamed(server: RunningServer) -> None:
    with realtime_client(server) as one:
        one.start(width=64, height=80, num_frames=9)
        one.until("session.done")
    with av.open(io.BytesIO(one.media)) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (64, 80)


def test_a_full_server_says_when_to_come_back(pipe: Pipeline, tmp_path: Path) -> None:
    options = ServiceOptions(max_sessions=1)
    with running_server(pipe, tmp_path / "data", service=options) as running:
        with realtime_client(running) as one:
            one.start()
            with realtime_client(running) as two:
                two.send("session.start", prompt="a circle")
                error = two.receive()
                assert two.closed() == 1013
        assert (error["code"], error["retryable"], error["fatal"]) == ("too_many_sessions", True, True)
