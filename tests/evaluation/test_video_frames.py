"""Frames and the files they come from."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch

from evaluation_checks.distortions import pulse, textured_clip
from rfengine.evaluation.video_frames import (
    ChunkGrid,
    as_video,
    find_videos,
    layout_features,
    picture_batches,
    read_video,
)
from rfengine.video import Video


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    frames = textured_clip(20)
    Video(frames.numpy(), 16).save(tmp_path / "a.mp4")
    found = read_video(tmp_path / "a.mp4")
    assert found.shape == frames.shape and found.dtype == torch.uint8
    assert float((found.float() - frames.float()).abs().mean()) < 4


def test_unreadable_empty_and_missing_files_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all")
    with pytest.raises(ValueError, match=r"broken\.mp4 cannot be read as a video"):
        read_video(broken)
    with pytest.raises(ValueError, match=r"no\.mp4 cannot be read"):
        read_video(tmp_path / "no.mp4")
    with pytest.raises(ValueError, match="no video was found in nothing"):
        find_videos([])


def test_directories_give_their_mp4_files_once_and_sorted(tmp_path: Path) -> None:
    for name in ("b.mp4", "a.MP4", "c.txt"):
        (tmp_path / name).touch()
    assert find_videos([tmp_path, tmp_path / "b.mp4"]) == [tmp_path / "a.MP4", tmp_path / "b.mp4"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no video was found in .*empty"):
        find_videos([tmp_path / "empty"])
    with pytest.raises(ValueError, match="none does not exist"):
        find_videos([tmp_path / "none"])


def test_chunks_are_the_first_and_the_whole_ones_after_it() -> None:
    assert ChunkGrid().slices(34) == [slice(0, 9), slice(9, 21), slice(21, 33)]
    assert ChunkGrid().slices(9) == [slice(0, 9)] and ChunkGrid().slices(8) == []
    with pytest.raises(ValueError, match="first_frames of a chunk is 0"):
        ChunkGrid(first_frames=0)


def test_arrays_and_tensors_are_taken_and_other_frames_refused() -> None:
    video = textured_clip(3)
    assert torch.equal(as_video(video.numpy()), video)
    for wrong in (numpy.zeros((2, 4, 4, 3)), torch.zeros(4, 4, 3, dtype=torch.uint8), video[:0]):
        with pytest.raises(ValueError, match="give uint8"):
            as_video(wrong)


def test_batches_cover_every_frame_and_shrink_large_ones() -> None:
    video = textured_clip(40)
    parts = list(picture_batches(video, 24))
    assert [part.shape for part in parts] == [(32, 3, 24, 32), (8, 3, 24, 32)]
    assert float(torch.cat(parts).mean()) == pytest.approx(float(video.float().mean()) / 255, abs=1e-4)


def test_layout_does_not_see_exposure() -> None:
    video = textured_clip(13)
    assert float((layout_features(pulse(video)) - layout_features(video)).abs().mean()) < 0.02
