"""Rewards: the sum and what it refuses, motion without weights, and the guard."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch import Tensor

from rfengine.toy.reward import ToyReward
from rfengine.toy.world import BACKGROUNDS, Scene, SceneObject, caption, render
from rfengine.training.reward import GuardConfig, MotionReward, RewardGuard, WeightedSum

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


def training(steps: int, score: float, held_out: float, distance: float, seed: int = 0) -> list[dict]:
    """A log of steps student updates, every fifth step one, whose figures go by these amounts in all."""
    noise = torch.randn(steps, 3, generator=torch.Generator().manual_seed(seed)) * torch.tensor(
        [0.1, 0.05, 0.02]
    )
    lines = []
    for row in range(steps):
        part = row / steps
        figures = {
            "score": 0.5 + score * part + float(noise[row, 0]),
            "agreement": 0.9 + held_out * part + float(noise[row, 1]),
            "distance": 0.3 + distance * part + float(noise[row, 2]),
        }
        lines += [{"step": 5 * row + 1 + k, "critic_loss": 1.0} for k in range(4)]
        lines.append({"step": 5 * row + 5} | figures)
    return lines


def first_told(guard: RewardGuard, lines: list[dict]) -> str | None:
    return next((told for line in lines if (told := guard.observe(line["step"], line))), None)


@pytest.mark.parametrize(
    ("score", "held_out", "distance", "word"),
    [(0.6, -0.4, 0.0, "agreement"), (0.6, 0.0, 0.3, "distance"), (0.6, -0.4, 0.3, "went from")],
)
def test_score_that_rises_at_the_cost_of_another_figure_is_told(score, held_out, distance, word):
    told = first_told(RewardGuard(), training(400, score, held_out, distance))
    assert told and word in told and "\n" not in told


@pytest.mark.parametrize(
    ("score", "held_out", "distance"),
    [
        (0.6, 0.1, -0.1),  # learns
        (0.6, 0.0, 0.0),
        (-0.6, -0.4, 0.3),  # diverges, which is another trouble
        (0.0, -0.4, 0.0),
    ],
)
def test_score_that_costs_nothing_or_falls_itself_is_not_told(score, held_out, distance):
    assert first_told(RewardGuard(), training(400, score, held_out, distance)) is None


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_is_not_told(seed):
    assert first_told(RewardGuard(GuardConfig(window=20)), training(600, 0, 0, 0, seed)) is None


def test_small_but_certain_losses_are_below_the_limits():
    config = GuardConfig(fall=0.5, growth=2.0)
    assert first_told(RewardGuard(config), training(400, 0.6, -0.4, 0.3)) is None


def test_fall_after_a_long_rise_is_told():
    lines = training(300, 0.3, 0.3, -0.1) + training(300, 0.6, -0.4, 0.0, seed=1)
    lines = [line | {"step": number} for number, line in enumerate(lines, 1)]
    for line in lines[1500:]:
        if "score" in line:
            line["score"] += 0.3
    told = first_told(RewardGuard(), lines)
    assert told and int(told.partition("between steps ")[2].split()[0]) > 1000


def test_guard_from_the_log_goes_on_as_the_one_that_wrote_it(tmp_path):
    lines = training(400, 0.6, -0.2, 0.05)
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({k: round(v, 6) for k, v in line.items()}) + "\n" for line in lines))
    whole = RewardGuard()
    told = [whole.observe(line["step"], line) for line in lines]
    assert None in told and told[-1]
    for stop in (0, 333, 1500):
        resumed = RewardGuard.from_log(path, stop)
        assert [resumed.observe(line["step"], line) for line in lines[stop:]] == told[stop:]
    assert RewardGuard.from_log(tmp_path / "absent.jsonl", 5).told is None


def test_guard_stops_only_where_it_is_told_to(caplog):
    lines = training(400, 0.6, -0.4, 0.0)
    for stops in (False, True):
        caplog.clear()
        guard = RewardGuard(GuardConfig(stops=stops))
        with caplog.at_level(logging.WARNING):
            answers = [guard.on_step(line["step"], line) for line in lines]
        assert any(answers) is stops
        assert 1 <= len(caplog.records) < 5  # not at each of the hundreds of steps from then on


def test_a_figure_that_is_not_logged_is_not_watched():
    lines = [{k: v for k, v in line.items() if k != "agreement"} for line in training(400, 0.6, -0.4, 0.0)]
    assert first_told(RewardGuard(), lines) is None
    assert first_told(RewardGuard(), [line for line in lines if "score" not in line]) is None


@pytest.mark.parametrize("fields", [{"window": 1}, {"errors": -1.0}, {"fall": -0.1}, {"growth": -1.0}])
def test_guard_refuses_what_has_no_meaning(fields):
    with pytest.raises(ValueError, match="is .*; it must be at least [02]"):
        GuardConfig(**fields)
