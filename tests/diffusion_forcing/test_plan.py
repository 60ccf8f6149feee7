"""Plans: pieces, rows and sizes of videos as tables of numbers, and what is refused before any loading."""

from __future__ import annotations

import logging
from typing import Any

import numpy
import pytest

from rfengine.diffusion_forcing.options import DiffusionForcingOptions
from rfengine.diffusion_forcing.plan import VideoPlan, check_given, piece_count, plan_video
from rfengine.presets import PRESETS
from support.diffusion_forcing import forcing_config

PRESET = PRESETS["skyreels-df-1.3b"]


def planned(start: int = 0, end: bool = False, **options: Any) -> VideoPlan:
    return plan_video(PRESET, DiffusionForcingOptions(**options), start, end)


def test_defaults_are_those_of_the_preset() -> None:
    plan = planned()
    assert (plan.num_frames, plan.fps, plan.grid.height, plan.grid.width) == (97, 24, 544, 960)
    assert (plan.row_count, plan.guidance_scale, plan.block_frames) == (30, 6.0, None)
    assert plan.grid.frame_tokens == 2040 and plan.pieces[0].sizes.frames == 25
    assert plan.negative_prompt == PRESET.diffusion_forcing.negative_prompt
    assert round(plan.table.sigmas[0], 5) == 0.99987


def test_a_picture_at_the_start_has_a_shift_and_a_guidance_of_its_own() -> None:
    picture, clip = planned(start=1), planned(start=5)
    assert (picture.guidance_scale, clip.guidance_scale) == (5.0, 6.0)
    assert picture.table.sigmas[1] < clip.table.sigmas[1]
    assert picture.pieces[0].sizes.ready_frames == 1 and clip.pieces[0].sizes.ready_frames == 2
    chosen = planned(start=1, shift=8.0, guidance_scale=1.0)
    assert chosen.table == clip.table and chosen.guidance_scale == 1.0


@pytest.mark.parametrize(
    ("frames", "overlap", "sizes"),
    [
        (257, 17, [25] * 3),
        (377, 17, [25] * 4 + [15]),
        (737, 17, [25] * 9),
        (1457, 17, [25] * 18),
        (257, 37, [25, 25, 25, 20]),
        (97, 17, [25]),
        (101, 17, [25, 6]),
        (41, 17, [11]),
    ],
)
def test_pieces_of_long_videos(frames: int, overlap: int, sizes: list[int]) -> None:
    plan = planned(num_frames=frames, overlap_history=overlap)
    shared = (overlap + 3) // 4
    assert [piece.sizes.frames for piece in plan.pieces] == sizes
    assert [piece.repeated for piece in plan.pieces] == [0] + [shared] * (len(sizes) - 1)
    assert sum(sizes) - shared * (len(sizes) - 1) == plan.grid.latent_frames(frames)
    assert all(piece.sizes.ready_frames == shared for piece in plan.pieces[1:])


def test_pieces_are_as_many_as_are_counted_one_by_one() -> None:
    for total in range(1, 200):
        for overlap in (1, 5, 10, 24):
            made, count = 25, 1
            while made < total:
                made, count = made + 25 - overlap, count + 1
            assert piece_count(total, 25, overlap) == count
            if total > overlap:  # the published formula; for fewer it counts none
                assert 1 + (total - 25 - 1) // (25 - overlap) + 1 == count


def test_blocks_round_a_video_up_and_a_prefix_down(caplog: pytest.LogCaptureFixture) -> None:
    plan = planned(num_frames=75, ar_step=5, causal_block_size=5)
    assert plan.pieces[0].sizes.frames == 20 and plan.num_frames == 75
    plan = planned(num_frames=78, ar_step=5, causal_block_size=5)
    assert plan.pieces[0].sizes.frames == 25
    with caplog.at_level(logging.WARNING):
        plan = planned(start=25, ar_step=5, causal_block_size=5)
    assert plan.pieces[0].sizes.ready_frames == 5
    assert "the start has 7 latent frames and blocks have 5: its last 2 are made anew" in caplog.text
    plan = planned(num_frames=300, overlap_history=17, ar_step=5, causal_block_size=5)
    assert [piece.sizes.frames for piece in plan.pieces] == [25, 25, 25, 20]


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"ar_step": 5, "causal_block_size": 5}, 50),
        ({"ar_step": 5, "causal_block_size": 5, "start": 17}, 45),
        ({}, 30),
        ({"ar_step": 5, "causal_block_size": 5, "steps": 50}, 70),
        ({"ar_step": 6, "causal_block_size": 5, "num_frames": 197}, 84),
        ({"num_frames": 257, "overlap_history": 17}, 90),
        ({"num_frames": 257, "overlap_history": 17, "ar_step": 5, "causal_block_size": 5}, 50 + 45 + 45),
    ],
)
def test_row_counts(options: dict[str, Any], rows: int) -> None:
    assert planned(**options).row_count == rows


def test_an_hour_is_planned_in_a_moment() -> None:
    plan = planned(num_frames=86_400, ar_step=2, steps=30)
    assert plan.pieces[0].sizes.frames == 21_601 and plan.row_count == 30 + 2 * 21_600


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_frames": 257},
            "num_frames is 257 and the model sees 97 at once; give an overlap_history, such as 17",
        ),
        ({"num_frames": 257, "ar_step": 1}, "an ar_step of at least 2"),
        ({"num_frames": 257, "ar_step": 5, "causal_block_size": 5}, "an ar_step of at least 6"),
        ({"num_frames": 257, "ar_step": 6, "causal_block_size": 5, "end": True}, "give an overlap_history"),
        (
            {"num_frames": 257, "overlap_history": 97},
            "overlap_history is 97 and a piece has 97 frames; use at most 93",
        ),
        ({"num_frames": 10, "overlap_history": 401}, "overlap_history is 401 and a piece has 97 frames"),
        (
            {"start": 101, "num_frames": 257, "overlap_history": 17},
            "the start has 101 frames and the first piece of this video has 97; give a shorter start",
        ),
        (
            {"num_frames": 257, "overlap_history": 18},
            "overlap_history has 18 frames; whole latent frames are 1",
        ),
        (
            {"num_frames": 257, "overlap_history": 13, "ar_step": 5, "causal_block_size": 5},
            "overlap_history has 4 latent frames and causal_block_size is 5",
        ),
        ({"start": 4}, "the start has 4 frames; whole latent frames are 1 .* use 1 or 5"),
        ({"start": 1, "ar_step": 5, "causal_block_size": 5}, "the start has 1 latent frames"),
        ({"start": 97}, "the start has 97 frames and num_frames is 97"),
        (
            {"ar_step": 5, "causal_block_size": 4},
            "the model sees 25 latent frames at once; use one of 1, 5, 25",
        ),
        ({"causal_attention": True, "end": True}, "causal_attention is on and an end frame is given"),
        ({"height": 100}, "height is 100 pixels; it must be a multiple of 16"),
    ],
)
def test_a_video_that_cannot_be_made_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(**options)


def test_a_start_may_be_longer_than_a_window_that_moves_along() -> None:
    (piece,) = planned(start=121, num_frames=257, ar_step=2).pieces
    assert (piece.sizes.ready_frames, piece.sizes.frames, piece.window) == (31, 65, 25)
    assert (piece.rows[0].start, piece.rows[0].end) == (7, 32)


def test_a_model_that_streams_is_refused() -> None:
    with pytest.raises(ValueError, match="wan-1.3b is no diffusion forcing model; use rfengine.Pipeline"):
        plan_video(PRESETS["wan-1.3b"], DiffusionForcingOptions())


def test_given_frames_must_be_of_the_size_of_the_video() -> None:
    plan = plan_video(forcing_config(), DiffusionForcingOptions(), 1, True)
    right = numpy.zeros((32, 48, 3), numpy.uint8)
    check_given(plan, right[None], right)
    for wrong in (right[:16], right.astype(numpy.float32), right[None], right[0]):
        with pytest.raises(ValueError, match=r"give uint8 \[T, 32, 48, 3\]"):
            check_given(plan, right[None], wrong)
    with pytest.raises(ValueError, match=r"frames are uint8 \(1, 16, 48, 3\); give uint8 \[T, 32, 48, 3\]"):
        check_given(plan, right[None, :16], None)
