"""The report on a training step: its parts add up, and nothing stays wrapped."""

from __future__ import annotations

import pytest
import torch
from training_step import Clock, Options, measure, watched

from rfengine.models.dit import WanDiT


def test_parts_add_up_to_the_step():
    plain = WanDiT.forward_chunk
    report = measure(Options(recipe="toy_dmd", batch=4, cycles=1))
    assert WanDiT.forward_chunk is plain
    assert report["steps"] == 5 and set(report["parts"]) == {"model", "rest"}
    assert sum(report["parts"].values()) == pytest.approx(report["seconds_per_step"], abs=1e-3)
    assert report["times_the_floor"] > 1 and report["parts"]["model"] > report["parts"]["rest"] > 0


def test_time_inside_a_timed_call_is_counted_once(monkeypatch):
    clock, ticks = Clock(torch.device("cpu")), iter(range(100))
    monkeypatch.setattr(clock, "now", lambda: float(next(ticks)))
    with clock.timing("outer"), clock.timing("inner"):
        pass
    assert clock.seconds == {"outer": 1.0}


def test_methods_are_given_back_after_an_error():
    backward = torch.Tensor.backward
    with pytest.raises(KeyError), watched(Clock(torch.device("cpu"))):
        raise KeyError
    assert torch.Tensor.backward is backward
