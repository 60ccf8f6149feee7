"""The guard against a score that is raised at the cost of what it stands for."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from rfengine.training.reward_guard import GuardConfig, RewardGuard


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
    assert RewardGuard.from_log(tmp_path / "absent.jsonl", 5).warning is None


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
