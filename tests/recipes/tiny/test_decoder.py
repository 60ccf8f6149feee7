import random

import pytest
import torch

from recipes.tiny import decoder
from recipes.tiny.decoder import (
    _CONTEXT,
    _WINDOW,
    _draw,
    encoded_latents,
    evaluate_tiny_decoder,
    train_tiny_decoder,
)
from recipes.tiny.training import StageConfig, ToyModel
from rfengine.config import TinyVAEConfig
from rfengine.models.tiny_vae import TinyVAE
from rfengine.toy.captions import sample_scenes
from rfengine.training.parallel import Ranks

CONFIG = TinyVAEConfig(z_dim=8, widths=(8, 8, 4, 4), memory_blocks=1)


@pytest.fixture(scope="module")
def teacher() -> ToyModel:
    return ToyModel.load("tiny")


def test_pixels_that_are_drawn_belong_to_the_latents_behind_the_context():
    """Frames 4f - 3 to 4f belong to latent f; what is wanted starts with the last one of its first latent."""
    numbers = torch.arange(20.0)
    latents = numbers.expand(2, 8, 20)[..., None, None].half()
    frames = torch.arange(1 + 4 * 19.0)
    pixels = ((frames + 3) // 4).expand(2, 3, -1)[..., None, None].half()
    seen = set()
    for seed in range(20):
        drawn, wanted = _draw(latents, pixels, 4, random.Random(seed))
        first = drawn[:, 0, 0, 0, 0]
        skipped = 0 if int(first.max()) == 0 else _CONTEXT
        seen.add(skipped)
        assert drawn.shape[2] == _WINDOW and wanted.shape[2] == 1 + 4 * (_WINDOW - 1 - skipped)
        assert torch.equal(wanted[:, 0, 0, 0, 0], first + skipped)
        assert torch.equal(wanted[:, 0, -1, 0, 0], drawn[:, 0, -1, 0, 0])
    assert seen == {0, _CONTEXT}


def test_latents_of_both_kinds_have_the_size_of_a_stream(teacher):
    scenes = sample_scenes(2, 3)
    generated, encoded = teacher.latents(scenes, 2, seed=4), encoded_latents(teacher.vae, scenes, 6)
    assert generated.shape == encoded.shape == (2, 8, 6, 8, 8)
    assert teacher.pixels(generated).shape == (2, 3, 21, 64, 64)
    assert float(teacher.pixels(encoded).abs().max()) <= 1


def test_a_short_training_nears_the_teacher_and_continues_where_it_stopped(tmp_path, teacher, monkeypatch):
    monkeypatch.setattr(decoder, "_CHUNKS", 4)
    torch.manual_seed(0)
    untrained = TinyVAE(CONFIG).eval().requires_grad_(False)
    with monkeypatch.context() as unmeasured:
        unmeasured.setattr(decoder, "_median_ms", lambda *_: 1.0)
        before = evaluate_tiny_decoder(teacher, untrained, 1, 29)
    config = StageConfig("tiny_decoder", CONFIG, 6, 0)
    trained = train_tiny_decoder(teacher, config, tmp_path, Ranks(), clips=1)
    after = evaluate_tiny_decoder(teacher, trained, 1, 29)
    for kind in ("generated", "encoded"):
        assert after[f"psnr_{kind}"] > before[f"psnr_{kind}"]
    assert after["full_colour"] == 1 and after["speed"] > 0
    assert not any(value.requires_grad for value in trained.parameters())
    again = train_tiny_decoder(teacher, config, tmp_path, Ranks(), clips=1)  # all steps are done
    for name, value in trained.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
