from pathlib import Path

import pytest
import torch

import rfengine
from recipes.tiny.report import report_accuracy, report_stream
from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.models.dit import WanDiT
from rfengine.models.text_encoder import build_umt5
from rfengine.models.vae import WanVAE

SHIPPED = Path(rfengine.__file__).parent / "weights" / "tiny"


@pytest.fixture(scope="module")
def shipped():
    checkpoint = Checkpoint.open("tiny")
    config = checkpoint.config
    parts = {
        "transformer": lambda: WanDiT(config.model),
        "vae": lambda: WanVAE(config.vae),
        "text_encoder": lambda: build_umt5(config.text),
    }
    modules = (checkpoint.load(build, name, torch.float32) for name, build in parts.items())
    return *(module.eval().requires_grad_(False) for module in modules), config


def test_shipped_weights_draw_what_held_out_captions_say(shipped):
    accuracies = report_accuracy(*shipped, videos=8, seed=123)
    for name in ("colour", "size", "background", "direction"):
        assert accuracies[name] >= 0.9
    assert accuracies["shape"] >= 0.7 and accuracies["speed"] >= 0.8


@pytest.mark.slow
def test_shipped_weights_hold_their_object_and_its_speed_for_twelve_seconds(shipped):
    report = report_stream(*shipped, chunks=17, seed=5, streams=2)
    assert [part["from_second"] for part in report] == [0.0, 10.0]
    for part in report:
        assert part["presence"] > 0.95 and 0.85 < part["relative_speed"] < 1.15
        assert part["colour"] >= 0.85 and part["direction"] >= 0.85
        assert 0.4 < part["pixel_mean"] < 0.6 and 0.1 < part["pixel_deviation"] < 0.25


def test_an_untrained_model_scores_low(shipped):
    model, vae, text, config = shipped
    torch.manual_seed(0)
    assert report_accuracy(WanDiT(config.model).eval(), vae, text, config, videos=2, seed=123)["all"] == 0.0
