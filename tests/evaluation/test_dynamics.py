"""Dynamics: what moves counts, what changes its light does not, and drift always stands beside it."""

from __future__ import annotations

import functools

import pytest
import torch

from rfengine.evaluation.dynamics import freeze_fraction, measure_dynamics
from rfengine.evaluation.video_frames import Measured, NotMeasurableError
from support.distortions import CLIPS, DISTORTIONS, distorted, noise_ramp, pulse, textured_clip

clips = pytest.mark.parametrize("clip", CLIPS)


@functools.cache
def dynamics(clip: str, distortion: str) -> Measured:
    return measure_dynamics(distorted(clip, distortion), most_pairs=16)


@clips
def test_frozen_video_has_no_motion_and_is_all_freeze(clip: str) -> None:
    still, true = dynamics(clip, "frozen").values, dynamics(clip, "true").values
    assert still["speed"] == still["mean_flow"] == 0 and still["freeze_fraction"] == 1
    assert true["speed"] > 1.5 and true["mean_flow"] > 0.1 and true["freeze_fraction"] == 0


@pytest.mark.parametrize(
    ("clip", "distortion"), [("toy", "gamma"), ("textured", "tint"), ("textured", "pulse")]
)
def test_changing_light_or_colour_does_not_raise_dynamics(clip: str, distortion: str) -> None:
    true, changed = dynamics(clip, "true").values, dynamics(clip, distortion).values
    assert 0.9 * true["speed"] < changed["speed"] < 1.03 * true["speed"]
    assert 0.9 * true["mean_flow"] < changed["mean_flow"] < 1.05 * true["mean_flow"]
    assert changed["freeze_fraction"] == 0


@pytest.mark.parametrize(
    ("clip", "distortion"), [("toy", "noise"), ("textured", "blur"), ("textured", "loop")]
)
def test_noise_blur_and_loops_do_not_raise_dynamics(clip: str, distortion: str) -> None:
    assert dynamics(clip, distortion).values["speed"] < 1.03 * dynamics(clip, "true").values["speed"]


@pytest.mark.parametrize("light", ["gamma", "tint", "pulse"])
def test_still_video_under_changing_light_stays_still(light: str) -> None:
    video = distorted("textured", "frozen")
    # a pulse of 0.1 would clip the lightest parts of this video, which is a change that no light explains
    changed = pulse(video, 0.03) if light == "pulse" else DISTORTIONS[light](video)
    found = measure_dynamics(changed, most_pairs=16).values
    assert found["speed"] < 0.05 and found["freeze_fraction"] > 0.9


def test_still_video_under_noise_is_neither_moving_nor_frozen() -> None:
    found = measure_dynamics(noise_ramp(distorted("textured", "frozen")), most_pairs=16)
    assert found.values["speed"] < 0.3 and found.values["freeze_fraction"] < 0.2
    assert found.curves["sharpness_drift"][-1][1] > 1


def test_speed_is_in_per_cent_of_the_shorter_side() -> None:
    slow, fast = (measure_dynamics(textured_clip(24, step), most_pairs=4).values for step in (0.5, 1.5))
    assert slow["mean_flow"] == pytest.approx(100 * 0.5 / 48, rel=0.15)
    assert fast["mean_flow"] == pytest.approx(100 * 1.5 / 48, rel=0.15)


def test_pairs_of_a_long_video_are_spread_over_all_of_it() -> None:
    pairs = [place for place, _ in dynamics("textured", "true").curves["speed"]]
    assert len(pairs) == 16 and pairs[0] == 0 and pairs[-1] == 67


def test_half_frozen_video_freezes_half_of_the_time() -> None:
    video = textured_clip(41)
    video = torch.cat((video[:21], video[20:21].expand(20, -1, -1, -1)))
    assert freeze_fraction(video) == 0.5
    repeated = textured_clip(20).repeat_interleave(2, dim=0)  # every frame twice
    assert freeze_fraction(repeated) == pytest.approx(20 / 39)


def test_a_video_without_a_second_chunk_has_neither_dynamics_nor_drift() -> None:
    with pytest.raises(NotMeasurableError, match="20 frames are no two chunks; drift needs 21"):
        measure_dynamics(textured_clip(20))
    with pytest.raises(ValueError, match="most_pairs is 0"):
        measure_dynamics(textured_clip(24), most_pairs=0)
