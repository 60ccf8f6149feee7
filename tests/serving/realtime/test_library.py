"""RecordingLibrary: recordings by session, within a quota and for a time."""

from __future__ import annotations

import time
from pathlib import Path

import numpy
import pytest

from rfengine.serving.errors import ServiceError
from rfengine.serving.realtime.library import RecordingLibrary
from rfengine.serving.realtime.live_video import LiveVideo
from rfengine.serving.realtime.outbox import Outbox
from rfengine.serving.video_encoder import VideoEncoder
from support.outcome import frame_count

FRAMES = numpy.random.default_rng(0).integers(0, 256, (12, 32, 48, 3), numpy.uint8)


def session(library: RecordingLibrary, name: str, owner: str | None = None, chunks: int = 1) -> LiveVideo:
    """A session that is recorded, and goes on."""
    encoder = VideoEncoder(16, 32, 48)
    path, recording = library.new_recording(name, encoder.init_segment)
    outbox = Outbox("pause", 10**7, 100.0, lambda: None, lambda: None)
    video = LiveVideo(name, encoder, outbox, recording, None, lambda milliseconds: None)
    library.add(owner, video, path, recording)
    for index in range(chunks):
        fragment = encoder.encode(FRAMES)
        recording.append(fragment)
        video.line.add(0, index, fragment.start_frame, fragment.start_frame + 12)
    return video


def code_of(call: object, *arguments: object) -> str:
    with pytest.raises(ServiceError) as caught:
        call(*arguments)
    return caught.value.fault.code


def test_a_recording_is_exported_while_it_grows_and_afterwards(tmp_path: Path) -> None:
    library = RecordingLibrary(tmp_path, 10**7, 60.0)
    session(library, "rt_1", chunks=2)
    for branch in (None, 0):
        path = library.export("rt_1", None, branch)
        assert frame_count(path) == 24
        path.unlink()
    library.end("rt_1")
    assert frame_count(library.export("rt_1", None, None)) == 24


def test_what_an_earlier_server_left_is_removed_with_the_directories_of_replicas(tmp_path: Path) -> None:
    (tmp_path / "rt_0.mp4").write_bytes(b"video")
    (tmp_path / "0123abcd").mkdir()
    (tmp_path / "0123abcd" / "rt_1.mp4").write_bytes(b"video")
    RecordingLibrary(tmp_path, 10**7, 60.0)
    assert list(tmp_path.iterdir()) == []


def test_only_its_owner_finds_a_session(tmp_path: Path) -> None:
    library = RecordingLibrary(tmp_path, 10**7, 60.0)
    video = session(library, "rt_1", owner="one")
    assert library.video("rt_1", "one") is video
    for name, owner in (("rt_1", "two"), ("rt_1", None), ("rt_2", "one")):
        assert code_of(library.video, name, owner) == "not_found"
        assert code_of(library.export, name, owner, None) == "not_found"


def test_what_cannot_be_exported_is_a_typed_error(tmp_path: Path) -> None:
    library = RecordingLibrary(tmp_path, 10**7, 60.0)
    session(library, "rt_1", chunks=0)
    assert code_of(library.export, "rt_1", None, None) == "export_failed"
    assert code_of(library.export, "rt_1", None, 3) == "unknown_branch"
    encoder = VideoEncoder(16, 32, 48)
    outbox = Outbox("pause", 10**7, 100.0, lambda: None, lambda: None)
    library.add(None, LiveVideo("rt_2", encoder, outbox, None, None, lambda ms: None), None, None)
    assert code_of(library.export, "rt_2", None, None) == "not_recorded"
    assert [each.name for each in tmp_path.iterdir()] == ["rt_1.mp4"]


def test_a_full_quota_removes_ended_recordings_and_refuses_where_none_is(tmp_path: Path) -> None:
    quota = 2**20 + 40_000  # the least that a recording begins with, and a little
    library = RecordingLibrary(tmp_path, quota, 60.0)
    session(library, "rt_1", chunks=2)
    session(library, "rt_2", chunks=2)
    assert 40_000 < sum(path.stat().st_size for path in tmp_path.iterdir()) < quota
    assert code_of(library.new_recording, "rt_3", b"") == "recording_quota"
    library.end("rt_1")
    session(library, "rt_3", chunks=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rt_2.mp4", "rt_3.mp4"]
    assert code_of(library.video, "rt_1", None) == "not_found"


def test_recordings_that_grow_together_keep_the_quota(tmp_path: Path) -> None:
    quota = 2**20 + 10_000
    library = RecordingLibrary(tmp_path, quota, 60.0)
    parts = []
    for name in ("rt_1", "rt_2"):
        encoder = VideoEncoder(16, 32, 48)
        parts.append((encoder, library.new_recording(name, encoder.init_segment)[1]))
    while any(recording.fault is None for _, recording in parts):
        for encoder, recording in parts:
            recording.append(encoder.encode(FRAMES))
    assert quota - 100_000 < sum(path.stat().st_size for path in tmp_path.iterdir()) <= quota


def test_an_export_counts_until_it_is_discarded(tmp_path: Path) -> None:
    library = RecordingLibrary(tmp_path, 2**20 + 50_000, 60.0)
    session(library, "rt_1", chunks=2)
    paths = []
    with pytest.raises(ServiceError, match="recordings have"):
        while len(paths) < 100:
            paths.append(library.export("rt_1", None, None))
    assert 10 < len(paths) < 100
    for path in paths:
        library.discard(path)
    assert [path.name for path in tmp_path.iterdir()] == ["rt_1.mp4"]
    library.discard(library.export("rt_1", None, None))


def test_a_recording_has_its_time_after_its_session(tmp_path: Path) -> None:
    library = RecordingLibrary(tmp_path, 10**7, 0.05)
    session(library, "rt_1")
    session(library, "rt_2")
    library.end("rt_1")
    time.sleep(0.1)
    library.sweep()
    assert [path.name for path in tmp_path.iterdir()] == ["rt_2.mp4"]


def test_what_an_earlier_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "rt_0.mp4").write_bytes(b"old")
    RecordingLibrary(tmp_path, 10**7, 60.0)
    assert list(tmp_path.iterdir()) == []


def test_the_last_segments_stay_for_players_that_are_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = RecordingLibrary(tmp_path, 10**7, 60.0)
    outbox = Outbox("pause", 10**7, 100.0, lambda: None, lambda: None)
    encoder = VideoEncoder(16, 32, 48)
    for number in range(20):
        library.add(None, LiveVideo(f"rt_{number}", encoder, outbox, None, None, print), None, None)
        library.end(f"rt_{number}")
    assert code_of(library.video, "rt_3", None) == "not_found"
    assert library.video("rt_4", None) and library.video("rt_19", None)
    later = time.monotonic() + 61
    monkeypatch.setattr(time, "monotonic", lambda: later)
    library.sweep()
    assert code_of(library.video, "rt_19", None) == "not_found"
