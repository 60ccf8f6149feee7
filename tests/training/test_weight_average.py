import pytest
import torch
from torch import nn

from rfengine.training.weight_average import WeightAverage


def constant(value: float) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


def test_average_follows_fast_at_first_and_slowly_later():
    average, layer = WeightAverage(constant(0.0), decay=0.99), constant(1.0)
    average.update(layer, step=0)
    assert float(average.values["weight"]) == pytest.approx(0.9)
    average.load({"weight": torch.zeros(1, 1)})
    average.update(layer, step=10_000)
    assert float(average.values["weight"]) == pytest.approx(0.01)


def test_average_without_decay_is_the_weights():
    average, layer = WeightAverage(constant(0.0), decay=0.0), constant(0.1)
    average.update(layer, step=0)
    assert torch.equal(average.values["weight"], layer.weight)
