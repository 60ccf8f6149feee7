"""The guard against a score that is raised at the cost of what it stands for."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from rfengine.training import reward_guard
from rfengine.training.reward_guard import RewardGuard


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


def first_warning(lines: list[dict]) -> str | None:
    guard = RewardGuard("agreement")
    return next((found for line in lines if (found := guard.observe(line["step"], line))), None)


@pytest.mark.parametrize(
    ("score", "held_out", "distance", "word"),
    [(0.6, -0.4, 0.0, "agreement"), (0.6, 0.0, 0.3, "distance"), (0.6, -0.4, 0.3, "went from")],
)
def test_score_that_rises_at_the_cost_of_another_figure_is_a_warning(score, held_out, distance, word):
    found = first_warning(training(400, score, held_out, distance))
    assert found and word in found and "\n" not in found


@pytest.mark.parametrize(
    ("score", "held_out", "distance"),
    [
        (0.6, 0.1, -0.1),  # learns
        (0.6, 0.0, 0.0),
        (-0.6, -0.4, 0.3),  # diverges, which is another trouble
        (0.0, -0.4, 0.0),
    ],
)
def test_score_that_costs_nothing_or_falls_itself_is_no_warning(score, held_out, distance):
    assert first_warning(training(400, score, held_out, distance)) is None


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_is_no_warning(seed, monkeypatch):
    monkeypatch.setattr(reward_guard, "WINDOW", 20)
    assert first_warning(training(600, 0, 0, 0, seed)) is None


def test_small_but_certain_losses_are_below_the_limits(monkeypatch):
    monkeypatch.setattr(reward_guard, "FALL", 0.5)
    monkeypatch.setattr(reward_guard, "GROWTH", 2.0)
    assert first_warning(training(400, 0.6, -0.4, 0.3)) is None


def test_fall_after_a_long_rise_is_a_warning():
    lines = training(300, 0.3, 0.3, -0.1) + training(300, 0.6, -0.4, 0.0, seed=1)
    lines = [line | {"step": number} for number, line in enumerate(lines, 1)]
    for line in lines[1500:]:
        if "score" in line:
            line["score"] += 0.3
    found = first_warning(lines)
    assert found and int(found.partition("between steps ")[2].split()[0]) > 1000


def test_guard_from_the_log_goes_on_as_the_one_that_wrote_it(tmp_path):
    lines = training(400, 0.6, -0.2, 0.05)
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({k: round(v, 6) for k, v in line.items()}) + "\n" for line in lines))
    whole = RewardGuard("agreement")
    found = [whole.observe(line["step"], line) for line in lines]
    assert None in found and found[-1]
    for stop in (0, 333, 1500):
        resumed = RewardGuard.from_log(path, stop, "agreement")
        assert [resumed.observe(line["step"], line) for line in lines[stop:]] == found[stop:]
    assert RewardGuard.from_log(tmp_path / "absent.jsonl", 5, "agreement").warning is None


def test_guard_stops_only_where_it_is_to(caplog):
    lines = training(400, 0.6, -0.4, 0.0)
    for stops in (False, True):
        caplog.clear()
        guard = RewardGuard("agreement", stops)
        with caplog.at_level(logging.WARNING):
            answers = [guard.on_step(line["step"], line) for line in lines]
        assert any(answers) is stops
        assert 1 <= len(caplog.records) < 5  # not at each of the hundreds of steps from then on


def test_a_figure_that_is_not_logged_is_not_watched():
    lines = [{k: v for k, v in line.items() if k != "agreement"} for line in training(400, 0.6, -0.4, 0.0)]
    assert first_warning(lines) is None
    assert first_warning([line for line in lines if "score" not in line]) is None
