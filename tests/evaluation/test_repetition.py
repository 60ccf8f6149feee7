"""Repetition: loops are found with their lag; stillness, pulses, drift and passing by again are none."""

from __future__ import annotations

import pytest
import torch

from rfengine.evaluation.repetition import measure_repetition
from rfengine.evaluation.video_frames import NotMeasurableError
from rfengine.toy.world import Scene, SceneObject, render
from support.distortions import CLIPS, as_frames, distorted, loop, noise_ramp, pulse, textured_clip

clips = pytest.mark.parametrize("clip", CLIPS)


@clips
def test_only_the_loop_repeats(clip: str) -> None:
    others = ("true", "frozen", "blur", "gamma", "tint", "noise", "pulse")
    found = {name: measure_repetition(distorted(clip, name)).values for name in (*others, "loop")}
    looped = found.pop("loop")
    assert looped["repetition"] > 0.7 and looped["repeated"] == 1 and looped["repetition_lag"] == 31
    assert all(each["repetition"] < 0.05 and "repetition_lag" not in each for each in found.values()), found


@clips
def test_a_loop_is_found_under_a_pulse_and_fades_with_noise(clip: str) -> None:
    looped = loop(distorted(clip, "true"))
    assert measure_repetition(pulse(looped)).values["repeated"] > 0.9
    noisy = [noise_ramp(looped, amount) for amount in (0.0, 0.1, 0.4)]
    found = [measure_repetition(video).values["repetition"] for video in noisy]
    assert found[0] > found[1] > found[2]


def test_a_pulse_on_a_still_video_is_no_repetition() -> None:
    assert measure_repetition(pulse(distorted("textured", "frozen"))).values["repetition"] < 0.05


def test_the_way_back_is_no_repetition_of_the_way_there() -> None:
    there = textured_clip(50, 0.37)
    assert measure_repetition(torch.cat((there, there.flip(0)))).values["repeated"] < 0.2


def test_passing_the_same_places_at_its_own_pace_repeats_less_than_a_loop() -> None:
    once = textured_clip(70)
    again = torch.cat((once[:35], textured_clip(70, 1.0)[:35]))
    between = torch.cat((once[:35], textured_clip(141, 0.5)[1:71:2]))  # half a frame further on
    exact, near = measure_repetition(again).values, measure_repetition(between).values
    assert (
        exact["repeated"] > 0.5 and near["repeated"] == 0 and near["repetition"] < 0.3 * exact["repetition"]
    )


def test_an_exactly_periodic_world_repeats() -> None:
    scene = Scene((SceneObject("red", "square", "small"),), "bouncing", "fast", "right", "grey wall")
    found = measure_repetition(as_frames(render(scene, 69)))
    assert found.values["repeated"] == 1 and found.values["repetition_lag"] % 16 == 0


def test_a_video_of_three_windows_is_too_short() -> None:
    with pytest.raises(NotMeasurableError, match="48 frames are too few; repetition needs 49"):
        measure_repetition(textured_clip(48))
