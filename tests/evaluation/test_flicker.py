"""Flicker: a pulse at the chunk period stands out; ramps, motion, loops and other periods do not."""

from __future__ import annotations

import pytest
from torch import Tensor

from rfengine.evaluation.flicker import measure_flicker
from rfengine.evaluation.video_frames import NotMeasurableError
from support.distortions import CLIPS, distorted, pulse, textured_clip

clips = pytest.mark.parametrize("clip", CLIPS)


def brightness(video: Tensor, period: int = 12) -> float:
    return measure_flicker(video, period).values["brightness_flicker"]


@clips
def test_only_the_pulse_flickers(clip: str) -> None:
    quiet = ("true", "frozen", "blur", "gamma", "tint", "noise", "loop")
    found = {name: measure_flicker(distorted(clip, name)).values for name in (*quiet, "pulse")}
    pulsing = found["pulse"]["brightness_flicker"]
    # one frame in twelve, 0.1 brighter: 0.1 / 6 at the period and as much at its half
    assert pulsing == pytest.approx(0.1 / 6 * 2**0.5, rel=0.05)
    assert max(found[name]["brightness_flicker"] for name in quiet) < 0.02 * pulsing
    assert found["pulse"]["flicker_ratio"] > 100 and all(found[name]["flicker_ratio"] < 2 for name in quiet)
    assert found["frozen"]["flicker_ratio"] == pytest.approx(1)


@clips
def test_a_stronger_pulse_flickers_more(clip: str) -> None:
    video = distorted(clip, "true")
    found = [brightness(pulse(video, height)) for height in (0.0, 0.02, 0.05, 0.1)]
    assert found[0] < found[1] < found[2] < found[3]


def test_a_pulse_of_another_period_is_no_flicker_at_the_seams() -> None:
    video = distorted("textured", "true")
    for period in (9, 16):
        assert brightness(pulse(video, period=period)) < 0.006
        assert brightness(pulse(video, period=period), period) > 0.01


def test_colour_and_sharpness_have_their_own_flicker() -> None:
    video = textured_clip(72)
    tinted, blurred = video.clone(), video.clone()
    tinted[::12, ..., 2] = (tinted[::12, ..., 2].float() * 0.7).to(tinted.dtype)
    blurred[::12, :, ::2] = blurred[::12, :, 1::2]  # every second column repeats its neighbour
    found = [measure_flicker(frames).values for frames in (video, tinted, blurred)]
    none, colour, sharpness = (values["colour_flicker"] for values in found)
    assert colour > 10 * max(none, sharpness, 1e-4)
    none, colour, sharpness = (values["sharpness_flicker"] for values in found)
    assert sharpness > 3 * max(none, colour, 1e-3)


def test_less_than_four_periods_are_too_few() -> None:
    with pytest.raises(NotMeasurableError, match="47 frames are too few; .* needs 48"):
        measure_flicker(textured_clip(47))
