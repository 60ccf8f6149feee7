"""Rewards of the toy world on true clips of every kind of scene."""

from __future__ import annotations

import pytest
import torch

from rfengine.toy.captions import caption, open_caption, sample_scenes
from rfengine.toy.reward import ToyReward
from rfengine.toy.world import Scene, SceneObject, WorldConfig, render

EVERY_KIND = WorldConfig(motion_weights=(1, 1, 1, 1), pair_share=0.4)


def moving(speed: str, colour: str = "red") -> Scene:
    return Scene((SceneObject(colour, "circle", "large"),), "moving", speed, "right", "grey wall")


def test_motion_is_the_speed_of_what_was_named():
    clips = torch.stack([render(moving(speed), 33) for speed in ("slowly", "fast")])
    scores = ToyReward()(clips, [open_caption(moving("fast"))] * 2)
    torch.testing.assert_close(scores["motion"], torch.tensor([0.5, 1.0]), atol=0.03, rtol=0)
    assert scores["agreement"].tolist() == [1.0, 1.0]


def test_motion_of_something_else_or_of_nothing_earns_nothing():
    still = render(moving("fast"), 1).expand(33, -1, -1, -1)
    clips = torch.stack([render(moving("fast", "blue"), 33), still])
    scores = ToyReward()(clips, [caption(moving("fast"))] * 2)
    assert scores["motion"][0] == 0
    assert scores["motion"][1] < 0.05
    assert scores["agreement"].max() < 1


def test_true_clips_agree_with_their_captions_as_bytes_too():
    scenes = sample_scenes(24, 2, EVERY_KIND)
    clips = (torch.stack([render(scene, 33) for scene in scenes]) * 255).round().to(torch.uint8)
    scores = ToyReward()(clips, [caption(scene) for scene in scenes])
    assert scores["agreement"].mean() > 0.97
    assert scores["motion"].min() > 0


def test_prompts_that_leave_attributes_open_reward_what_is_there():
    clip = render(moving("fast"), 33)[None]
    for text in ("something moving", "a red thing", "a large ball going to the right, a grey wall"):
        scores = ToyReward()(clip, [text])
        assert float(scores["motion"]) == pytest.approx(1.0, abs=0.03) and float(scores["agreement"]) == 1
    assert float(ToyReward()(clip, ["a blue thing"])["motion"]) == 0


def test_another_number_of_prompts_is_an_error():
    with pytest.raises(ValueError, match="shorter|longer"):
        ToyReward()(torch.zeros(2, 9, 64, 64, 3), ["a large red circle moving upwards over a grey wall"])
