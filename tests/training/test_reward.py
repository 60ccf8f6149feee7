"""Rewards: the trained score and what it refuses, and motion without weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rfengine.toy.backgrounds import BACKGROUNDS
from rfengine.toy.captions import caption
from rfengine.toy.reward import ToyReward
from rfengine.toy.world import Scene, SceneObject, render
from rfengine.training.reward import TrainedScore, motion_reward

FRAMES = torch.zeros(2, 3, 16, 16, 3)
PROMPTS = ["a", "b"]


def moving(speed: str = "fast", background: str = "grey wall") -> Scene:
    return Scene((SceneObject("red", "circle", "large"),), "moving", speed, "right", background)


def gives(**scores: list[float]):
    return lambda frames, prompts: {name: torch.tensor(values) for name, values in scores.items()}


def test_one_score_is_trained_on_and_all_are_kept():
    trained = TrainedScore(gives(a=[1.0, 2.0], b=[10.0, 20.0]), "one.b")
    score, found = trained(FRAMES, PROMPTS)
    assert score.tolist() == [10.0, 20.0]
    parts = {name: part.tolist() for name, part in found.items()}
    assert parts == {"one.a": [1.0, 2.0], "one.b": [10.0, 20.0]}


def test_rewards_serve_the_toy_world():
    scenes = [moving("slowly"), moving("fast")]
    videos = torch.stack([render(scene, 5) for scene in scenes])
    for reward, expected in ((ToyReward(), [0.5, 1.0]), (motion_reward, [16 / 64, 2 * 16 / 64])):
        scores, _ = TrainedScore(reward, "it.motion")(videos, [caption(scene) for scene in scenes])
        torch.testing.assert_close(scores, torch.tensor(expected), atol=0.06, rtol=0)


def test_scores_have_no_gradient():
    def sharp(frames: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        return {"a": frames.mean((1, 2, 3, 4))}

    frames = FRAMES.clone().requires_grad_()
    assert not TrainedScore(sharp, "one.a")(frames, PROMPTS)[0].requires_grad


@pytest.mark.parametrize(
    ("scores", "name", "sentence"),
    [
        ({"a": [1.0, float("nan")]}, "one.a", "one.a is nan for video 1"),
        ({"a": [1.0, 2.0], "b": [float("-inf"), 0.0]}, "one.a", "one.b is -inf for video 0"),
    ],
)
def test_what_is_wrong_with_a_reward_is_one_sentence(scores, name, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        TrainedScore(gives(**scores), name)(FRAMES, PROMPTS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_motion_is_in_heights_a_second(dtype):
    clips = torch.stack([render(moving(speed), 4) for speed in ("slowly", "fast")])
    clips = (clips * 255).round().to(dtype) if dtype == torch.uint8 else clips
    scores = motion_reward(clips, PROMPTS, fps=32.0)["motion"]
    torch.testing.assert_close(scores, torch.tensor([1.0, 2.0]) * 32 / 64, atol=0.08, rtol=0)
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_what_does_not_move_earns_nothing(background):
    still = render(moving("fast", background), 1).expand(4, -1, -1, -1)
    time = torch.arange(4.0)[:, None, None, None]
    noise = torch.randn(still.shape, generator=torch.Generator().manual_seed(1))
    clips = [still, still ** (1 + 0.05 * time), still + 0.03 * noise, still * (1 + 0.1 * (time % 3 == 0))]
    scores = motion_reward(torch.stack(clips).clamp(0, 1), [""] * len(clips))["motion"]
    assert scores.max() < 0.01


def test_one_jump_between_chunks_is_no_motion():
    clip = torch.cat([render(moving(), 1, frame).expand(6, -1, -1, -1) for frame in (0, 6)])
    assert motion_reward(clip[None], [""])["motion"].item() == 0
    assert motion_reward(render(moving(), 2)[None], [""], fps=160.0)["motion"].item() == 2
