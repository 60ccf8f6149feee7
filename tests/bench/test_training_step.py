"""The report on a training step: its parts add up, and nothing stays wrapped."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import training_step
from bench.training_step import Options, measure, product_rate, watched
from rfengine.models.dit import WanDiT
from rfengine.training.config import RolloutConfig


@pytest.mark.slow
def test_parts_add_up_to_the_step(monkeypatch):
    plain = WanDiT.forward_chunk
    monkeypatch.setattr(training_step, "product_rate", lambda device, dtype: 1e9)
    short = {"batch": 1, "group": 1, "critic_updates": 2, "rollout": RolloutConfig(1, 2, 1)}
    of_options = training_step._config
    monkeypatch.setattr(training_step, "_config", lambda options: replace(of_options(options), **short))
    report = measure(Options(recipe="toy_dmd", cycles=1, precision="float32"))
    assert WanDiT.forward_chunk is plain
    assert report["steps"] == 2 and set(report["parts"]) == {"model", "rest"}
    assert sum(report["parts"].values()) == pytest.approx(report["seconds_per_step"], abs=1e-3)
    assert report["floor_seconds"] == pytest.approx(report["gflop_per_step"], abs=0.01)
    times = report["seconds_per_step"] / report["floor_seconds"]
    assert report["times_the_floor"] == pytest.approx(times, abs=0.01)
    assert min(report["parts"].values()) > 0


@pytest.mark.parametrize("slow", [torch.bfloat16, torch.float32])
def test_the_floor_is_at_the_rate_of_the_fastest_type(monkeypatch, slow):
    ticks, product = [0.0], torch.nn.functional.linear

    def linear(a, b):
        ticks[0] += 4.0 if a.dtype == slow else 2.0
        return product(a, b)

    monkeypatch.setattr(training_step, "_SIDE", 8)
    monkeypatch.setattr(training_step, "now", lambda device: ticks[0])
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    assert product_rate(torch.device("cpu"), torch.bfloat16) == 2 * 8**3 / 2.0


def test_time_inside_a_timed_call_is_counted_once(monkeypatch):
    class Outer:
        def inner(self):
            return 1

        def outer(self):
            return self.inner()

    ticks = iter(range(100))
    monkeypatch.setattr(training_step, "_TIMED", [(Outer, "outer", "outer"), (Outer, "inner", "inner")])
    monkeypatch.setattr(training_step, "now", lambda device: float(next(ticks)))
    with watched(torch.device("cpu")) as seconds:
        assert Outer().outer() == 1
    assert seconds == {"outer": 1.0}


def test_methods_are_given_back_after_an_error():
    backward = torch.Tensor.backward
    with pytest.raises(KeyError), watched(torch.device("cpu")):
        raise KeyError
    assert torch.Tensor.backward is backward
