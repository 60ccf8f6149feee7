"""Toy-world accuracy: true videos are right in everything, and each wrong thing costs its own attribute."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rfengine.evaluation.toy_accuracy import toy_accuracy
from rfengine.evaluation.video_frames import NotMeasurableError
from rfengine.toy.captions import caption, open_caption, sample_scenes
from rfengine.toy.detector import ATTRIBUTES
from rfengine.toy.world import Scene, SceneObject, WorldConfig, render, render_background
from support.distortions import as_frames, textured_clip, toy_clip

SCENE = Scene((SceneObject("red", "square", "large"),), "moving", "fast", "right", "dotted wall")


def test_true_videos_are_right_in_everything() -> None:
    for scene in sample_scenes(3, 0):
        found = toy_accuracy(as_frames(render(scene, 48)), caption(scene))
        assert found == dict.fromkeys((*ATTRIBUTES, "permanence"), 1.0), caption(scene)


@pytest.mark.parametrize(
    ("attribute", "said"),
    [
        ("colour", dataclasses.replace(SCENE, objects=(SceneObject("blue", "square", "large"),))),
        ("shape", dataclasses.replace(SCENE, objects=(SceneObject("red", "circle", "large"),))),
        ("size", dataclasses.replace(SCENE, objects=(SceneObject("red", "square", "small"),))),
        ("speed", dataclasses.replace(SCENE, speed="slowly")),
        ("direction", dataclasses.replace(SCENE, direction="left")),
        ("background", dataclasses.replace(SCENE, background="grey wall")),
        ("camera", dataclasses.replace(SCENE, camera="left", pan="slowly")),
    ],
)
def test_what_is_wrong_costs_its_own_attribute(attribute: str, said: Scene) -> None:
    found = toy_accuracy(toy_clip(49, SCENE, WorldConfig()), caption(said))
    wrong = {name for name, value in found.items() if value < 1}
    # an object of another colour is not the one the caption names, so it is not there either
    assert wrong == ({"colour", "permanence"} if attribute == "colour" else {attribute})


def test_an_object_that_vanishes_costs_permanence() -> None:
    video = toy_clip(96, SCENE, WorldConfig())
    video[72:] = as_frames(render_background(SCENE, 1))
    found = toy_accuracy(video, caption(SCENE))
    assert found["permanence"] == 0.75
    assert found["colour"] == 0.5  # of the two parts, the second has its object in only half of the frames


def test_an_open_caption_leaves_the_speed_out() -> None:
    found = toy_accuracy(toy_clip(49, SCENE, WorldConfig()), open_caption(SCENE))
    assert set(found) == {*ATTRIBUTES, "permanence"} - {"speed"} and min(found.values()) == 1


def test_other_texts_sizes_and_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="has no word of the toy world"):
        toy_accuracy(textured_clip(24), "a cat")
    with pytest.raises(NotMeasurableError, match="the video is 40 x 64"):
        toy_accuracy(torch.zeros(24, 40, 64, 3, dtype=torch.uint8), caption(SCENE))
    with pytest.raises(NotMeasurableError, match="11 frames"):
        toy_accuracy(toy_clip(11, SCENE), caption(SCENE))


def test_a_video_larger_than_the_detector_can_hold_is_not_measured() -> None:
    large = torch.zeros(1, 512, 528, 3, dtype=torch.uint8).expand(12, -1, -1, -1)
    with pytest.raises(NotMeasurableError, match="512 x 528; the toy world has .* up to 262144 pixels"):
        toy_accuracy(large, caption(SCENE))
