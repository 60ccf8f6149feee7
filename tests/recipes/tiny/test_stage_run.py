import json

import pytest
import torch
from torch import nn

from recipes.tiny.stage_run import StageRun
from rfengine.training.weight_average import WeightAverage


def test_a_resumed_run_keeps_its_steps_and_its_clock(tmp_path):
    run = StageRun(tmp_path, "stage", 1.0)
    assert run.resume() is None
    for _ in range(30):
        run.tick(loss=1.0)
    run.elapsed = 45.0
    run.save({"model": {"weight": torch.ones(2)}})
    again = StageRun(tmp_path, "stage", 1.0)
    assert torch.equal(again.resume()["model"]["weight"], torch.ones(2))
    assert (again.step, again.elapsed, again.progress) == (30, 45.0, 0.75)


def test_one_line_is_logged_every_twenty_five_steps_unless_quiet(tmp_path):
    run = StageRun(tmp_path, "stage", 1.0)
    for step in range(60):
        run.tick(loss=float(step))
    for _ in range(60):
        run.tick(quiet=True, loss=0.0)
    lines = [json.loads(line) for line in (tmp_path / "stage.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(25, 24.0), (50, 49.0)]


def test_learning_rate_warms_up_holds_and_falls(tmp_path):
    run = StageRun(tmp_path, "stage", 1.0)
    assert run.learning_rate(1.0) == pytest.approx(0.01)
    run.step = 100
    assert run.learning_rate(1.0) == 1.0
    run.elapsed = 45.0
    assert run.learning_rate(1.0) == pytest.approx(0.5)
    run.elapsed = 60.0
    assert run.learning_rate(1.0) == pytest.approx(0.02)


@pytest.mark.parametrize("minutes", [0, -1.0, float("nan"), float("inf"), 1e308, "5"])
def test_a_budget_that_never_begins_or_never_ends_is_refused(tmp_path, minutes):
    with pytest.raises(ValueError, match="minutes is "):
        StageRun(tmp_path, "stage", minutes)


def test_average_follows_fast_at_first_and_slowly_later():
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        average = WeightAverage(layer, decay=0.99)
        layer.weight.fill_(1.0)
    average.update(layer, step=0)
    assert float(average.values["weight"]) == pytest.approx(0.9)
    average.load({"weight": torch.zeros(1, 1)})
    average.update(layer, step=10_000)
    assert float(average.values["weight"]) == pytest.approx(0.01)


def test_a_damaged_or_foreign_state_is_named(tmp_path):
    StageRun(tmp_path, "stage", 1.0).save({"model": {"weight": torch.ones(2)}})
    path = tmp_path / "stage.pt"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="stage.pt is damaged"):
        StageRun(tmp_path, "stage", 1.0).resume()
    torch.save([1], path)
    with pytest.raises(ValueError, match="stage.pt is no state of a stage; remove it"):
        StageRun(tmp_path, "stage", 1.0).resume()
