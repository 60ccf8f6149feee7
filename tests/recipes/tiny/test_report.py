import dataclasses

import pytest
import torch

from recipes.tiny.report import report_accuracy, report_stream
from recipes.tiny.training import ToyModel
from rfengine.models.dit import WanDiT


@pytest.fixture(scope="module")
def shipped() -> ToyModel:
    return ToyModel.load("tiny")


def test_shipped_weights_draw_what_held_out_captions_say(shipped):
    accuracies = report_accuracy(shipped, videos=8, seed=123)
    for name in ("colour", "size", "background", "direction"):
        assert accuracies[name] >= 0.9
    assert accuracies["shape"] >= 0.7 and accuracies["speed"] >= 0.8


@pytest.mark.slow
def test_shipped_weights_hold_their_object_and_its_speed_for_twelve_seconds(shipped):
    report = report_stream(shipped, chunks=17, seed=5, streams=2)
    assert [part["from_second"] for part in report] == [0.0, 10.0]
    for part in report:
        assert part["presence"] > 0.95 and 0.85 < part["relative_speed"] < 1.15
        assert part["colour"] >= 0.85 and part["direction"] >= 0.85
        assert 0.4 < part["pixel_mean"] < 0.6 and 0.1 < part["pixel_deviation"] < 0.25


def test_an_untrained_model_scores_low(shipped):
    torch.manual_seed(0)
    untrained = dataclasses.replace(shipped, transformer=WanDiT(shipped.config.model).eval())
    assert report_accuracy(untrained, videos=2, seed=123)["all"] == 0.0
