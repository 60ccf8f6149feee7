"""Consistency: motion keeps the look of a video, drift of any kind loses it with the time between frames."""

from __future__ import annotations

import functools

import pytest
import torch

from rfengine.evaluation.consistency import look_features, measure_consistency
from rfengine.evaluation.video_frames import Measured, NotMeasurableError
from support.distortions import CLIPS, blur_ramp, distorted, textured_clip, toy_clip

clips = pytest.mark.parametrize("clip", CLIPS)


@functools.cache
def consistency(clip: str, distortion: str) -> Measured:
    return measure_consistency(distorted(clip, distortion))


@clips
def test_frozen_is_one_and_true_is_above_every_ramp(clip: str) -> None:
    names = ("frozen", "true", "blur", "gamma", "tint", "noise")
    ramps = {name: consistency(clip, name).values["consistency_far"] for name in names}
    assert ramps.pop("frozen") == pytest.approx(1, abs=1e-5)
    true = ramps.pop("true")
    assert max(ramps.values()) < true < 1, ramps


@clips
@pytest.mark.parametrize("distortion", ["gamma", "tint", "noise"])
def test_a_ramp_bends_the_curve_down_with_the_lag(clip: str, distortion: str) -> None:
    found = consistency(clip, distortion)
    lags, likeness = zip(*found.curves["consistency"], strict=True)
    assert lags == (1, 2, 4, 8, 12, 16, 32, 34)
    assert all(a > b for a, b in zip(likeness[1:], likeness[2:], strict=False))
    assert found.values["consistency_near"] > found.values["consistency_far"] + 0.02


def test_more_blur_is_less_consistent() -> None:
    ramps = [blur_ramp(distorted("toy", "true"), most) for most in (0.5, 1.0, 2.0)]
    found = [measure_consistency(ramp).values["consistency_far"] for ramp in ramps]
    assert found[0] > found[1] > found[2]


def test_different_scenes_are_less_alike_than_frames_of_one() -> None:
    first, second = look_features(toy_clip(12)), look_features(textured_clip(12))
    assert float((first[0] * second[0]).sum()) < float((first[0] * first[-1]).sum()) - 0.15
    assert torch.allclose(first.norm(dim=1), torch.ones(12), atol=1e-5)


def test_a_scene_that_changes_halfway_loses_far_consistency_alone() -> None:
    video = distorted("textured", "true")
    cut = torch.cat((video[:34], video[34:].flip(-1)))  # red and blue change places
    whole, found = consistency("textured", "true").values, measure_consistency(cut).values
    near, far = (whole[name] - found[name] for name in ("consistency_near", "consistency_far"))
    assert far > 2 * near > 0


def test_a_video_of_one_chunk_has_no_curve() -> None:
    with pytest.raises(NotMeasurableError, match="20 frames are too few; consistency needs 24"):
        measure_consistency(textured_clip(20))
