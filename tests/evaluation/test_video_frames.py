"""Frames and the files they come from."""

from __future__ import annotations

import os
from pathlib import Path

import numpy
import pytest
import torch

from rfengine.evaluation.video_frames import (
    ChunkGrid,
    as_frames,
    chosen_frames,
    find_videos,
    layout_features,
    picture_batches,
    split_ranges,
    windows,
)
from support.distortions import pulse, textured_clip


def test_no_path_at_all_is_an_error() -> None:
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


def test_what_has_the_name_is_listed_whatever_it_is_and_nothing_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "link.mp4").symlink_to("nothing")
    assert [path.name for path in find_videos([tmp_path])] == ["link.mp4", "pipe.mp4"]
    assert find_videos([tmp_path / "pipe.mp4"]) == [tmp_path / "pipe.mp4"]
    with pytest.raises(ValueError, match="cannot be listed .File name too long"):
        find_videos([tmp_path / ("n" * 300)])


def test_windows_and_chosen_frames_are_those_of_the_whole_video() -> None:
    video = torch.arange(100, dtype=torch.uint8)[:, None, None, None].expand(-1, 512, 512, 3)
    ranges = [(0, 3), (2, 40), (30, 31), (30, 77), (99, 100)]
    found = windows(as_frames(video).batches(), ranges)
    assert all(torch.equal(part, video[a:b]) for part, (a, b) in zip(found, ranges, strict=True))
    places = [0, 15, 16, 17, 63, 98]
    chosen = chosen_frames(as_frames(video), places)
    assert torch.equal(torch.cat(list(chosen.batches())), video[places]) and chosen.count == 6
    for parts in (1, 3, 7):
        lengths = [len(part) for part in video.tensor_split(parts)]
        assert [end - start for start, end in split_ranges(100, parts)] == lengths


def test_chunks_are_the_first_and_the_whole_ones_after_it() -> None:
    assert ChunkGrid().slices(34) == [slice(0, 9), slice(9, 21), slice(21, 33)]
    assert ChunkGrid().slices(9) == [slice(0, 9)] and ChunkGrid().slices(8) == []
    with pytest.raises(ValueError, match="first_frames of a chunk is 0"):
        ChunkGrid(first_frames=0)


def test_arrays_and_tensors_are_taken_and_other_frames_refused() -> None:
    video = textured_clip(3)
    assert torch.equal(next(as_frames(video.numpy()).batches()), video)
    for wrong in (numpy.zeros((2, 4, 4, 3)), torch.zeros(4, 4, 3, dtype=torch.uint8), video[:0]):
        with pytest.raises(ValueError, match="give uint8"):
            as_frames(wrong)


def test_batches_cover_every_frame_and_shrink_large_ones() -> None:
    video = textured_clip(40)
    parts = list(picture_batches(video, 24))
    assert [part.shape for part in parts] == [(32, 3, 24, 32), (8, 3, 24, 32)]
    assert float(torch.cat(parts).mean()) == pytest.approx(float(video.float().mean()) / 255, abs=1e-4)


def test_layout_does_not_see_exposure() -> None:
    video = textured_clip(13)
    assert float((layout_features(pulse(video)) - layout_features(video)).abs().mean()) < 0.02
