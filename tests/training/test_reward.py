"""Rewards: the sum and what it refuses, and motion without weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rfengine.toy.reward import ToyReward
from rfengine.toy.world import BACKGROUNDS, Scene, SceneObject, caption, render
from rfengine.training.reward import MotionReward, WeightedSum

FRAMES = torch.zeros(2, 3, 16, 16, 3)
PROMPTS = ["a", "b"]


def moving(speed: str = "fast", background: str = "grey wall") -> Scene:
    return Scene((SceneObject("red", "circle", "large"),), "moving", speed, "right", background)


def gives(**scores: list[float]):
    return lambda frames, prompts: {name: torch.tensor(values) for name, values in scores.items()}


def test_sum_is_weighted_and_keeps_its_parts():
    total = WeightedSum({"one": gives(a=[1.0, 2.0], b=[10.0, 20.0]), "two": gives(a=[5.0, 7.0])},
                        {"one.a": 2.0, "two.a": -1.0})  # fmt: skip
    assert total(FRAMES, PROMPTS).tolist() == [-3.0, -3.0]
    assert {name: part.tolist() for name, part in total.parts.items()} == {
        "one.a": [1.0, 2.0], "one.b": [10.0, 20.0], "two.a": [5.0, 7.0]
    }  # fmt: skip
    scored = total.scores(FRAMES, PROMPTS)
    assert scored.total.tolist() == [-3.0, -3.0] and scored.parts == total.parts


def test_sum_serves_the_toy_world():
    scenes = [moving("slowly"), moving("fast")]
    total = WeightedSum({"toy": ToyReward(), "flow": MotionReward()}, {"toy.motion": 1.0, "flow.motion": 0.5})
    scores = total(torch.stack([render(scene, 17) for scene in scenes]), [caption(scene) for scene in scenes])
    expected = [0.5 + 0.5 * 1.0 * 16 / 64, 1.0 + 0.5 * 2.0 * 16 / 64]
    torch.testing.assert_close(scores, torch.tensor(expected), atol=0.06, rtol=0)


def test_scores_have_no_gradient():
    def sharp(frames: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        return {"a": frames.mean((1, 2, 3, 4))}

    frames = FRAMES.clone().requires_grad_()
    assert not WeightedSum({"one": sharp}, {"one.a": 1.0})(frames, PROMPTS).requires_grad


@pytest.mark.parametrize(
    ("rewards", "weights", "sentence"),
    [
        ({"one": gives(a=[1.0, 2.0])}, {"two.a": 1.0}, "'two.a' names no score"),
        ({"one": gives(a=[1.0, 2.0])}, {"one": 1.0}, "'one' names no score"),
        ({"one": gives(a=[1.0, 2.0])}, {"one.a": float("nan")}, "weight of one.a is nan"),
        ({"one": gives(), "two": gives()}, {"one.a": 1.0}, "reward two has no weight"),
        ({}, {}, "no weight"),
        ({"one": gives(a=[1.0, 2.0])}, {"one.b": 1.0}, "no reward gives the score 'one.b'; there are one.a"),
        ({"one": gives(a=[1.0, 2.0, 3.0])}, {"one.a": 1.0}, r"shape \(3,\) for 2 videos"),
        ({"one": gives(a=[[1.0], [2.0]])}, {"one.a": 1.0}, r"shape \(2, 1\) for 2 videos"),
        ({"one": gives(a=[1.0, float("nan")])}, {"one.a": 1.0}, "one.a is nan for video 1"),
        ({"one": gives(a=[1.0, 2.0], b=[float("-inf"), 0.0])}, {"one.a": 1.0}, "one.b is -inf for video 0"),
    ],
)
def test_what_is_wrong_with_a_reward_is_one_sentence(rewards, weights, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        WeightedSum(rewards, weights)(FRAMES, PROMPTS)
    assert "\n" not in str(caught.value)


def test_another_number_of_prompts_is_refused():
    with pytest.raises(ValueError, match="2 videos and 1 prompts"):
        WeightedSum({"one": gives(a=[1.0, 2.0])}, {"one.a": 1.0})(FRAMES, ["a"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_motion_is_in_heights_a_second(dtype):
    clips = torch.stack([render(moving(speed), 13) for speed in ("slowly", "fast")])
    clips = (clips * 255).round().to(dtype) if dtype == torch.uint8 else clips
    scores = MotionReward(fps=32.0)(clips, PROMPTS)["motion"]
    torch.testing.assert_close(scores, torch.tensor([1.0, 2.0]) * 32 / 64, atol=0.08, rtol=0)
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_what_does_not_move_earns_nothing(background):
    still = render(moving("fast", background), 1).expand(13, -1, -1, -1)
    time = torch.arange(13.0)[:, None, None, None]
    noise = torch.randn(still.shape, generator=torch.Generator().manual_seed(1))
    clips = [still, still ** (1 + 0.05 * time), still + 0.03 * noise, still * (1 + 0.1 * (time % 12 == 0))]
    scores = MotionReward()(torch.stack(clips).clamp(0, 1), [""] * len(clips))["motion"]
    assert scores.max() < 0.01


def test_one_jump_between_chunks_is_no_motion():
    clip = torch.cat([render(moving(), 1, frame).expand(12, -1, -1, -1) for frame in (0, 6)])
    assert MotionReward()(clip[None], [""])["motion"].item() == 0
    assert MotionReward(fps=160.0, highest=1.5)(render(moving(), 7)[None], [""])["motion"].item() == 1.5


@pytest.mark.parametrize("fields", [{"fps": 0.0}, {"share": 0.0}, {"share": 2.0}, {"highest": -1.0}])
def test_motion_reward_refuses_what_has_no_meaning(fields):
    with pytest.raises(ValueError, match="use positive numbers"):
        MotionReward(**fields)
