import dataclasses

import torch

from recipes.tiny.training import StageConfig, train
from recipes.tiny.vae import (
    VAEStage,
    _states_after,
    evaluate_autoencoder,
    sample_clips,
    with_measured_statistics,
)
from rfengine.config import PRESETS
from rfengine.models.vae import WanVAE
from rfengine.toy.world import is_held_out
from rfengine.training.parallel import Ranks

CONFIG = dataclasses.replace(PRESETS["tiny"].vae, base_dim=4, dim_mult=(1, 1, 1, 1))


def test_sampled_clips_are_reproducible_training_scenes_in_model_range():
    scenes, pixels = sample_clips(3, 5, seed=4)
    assert pixels.shape == (3, 3, 5, 64, 64) and float(pixels.min()) >= -1 and float(pixels.max()) <= 1
    assert not any(is_held_out(scene) for scene in scenes)
    assert torch.equal(pixels, sample_clips(3, 5, seed=4)[1])


def test_a_clip_behind_causal_state_is_the_end_of_the_whole_clip():
    torch.manual_seed(0)
    vae = WanVAE(CONFIG).eval()
    pixels = torch.rand(2, 3, 25, 16, 32) * 2 - 1
    with torch.no_grad():
        states, seen = _states_after(vae, pixels, past=3)
        assert seen == 9
        latents = vae.encode_moments(pixels[:, :, seen:], states[0])[0]
        whole = vae.encode_moments(pixels)[0]
        torch.testing.assert_close(latents, whole[:, :, 3:], atol=1e-5, rtol=0)
        decoded = vae.decode(latents, states[1])
        torch.testing.assert_close(decoded, vae.decode(whole)[:, :, seen:], atol=1e-5, rtol=0)


def test_without_a_past_there_is_no_state():
    assert _states_after(WanVAE(CONFIG), torch.zeros(1, 3, 5, 16, 16), past=0) == ((None, None), 0)


def test_measured_statistics_make_latents_standard():
    torch.manual_seed(0)
    vae = with_measured_statistics(WanVAE(CONFIG).eval(), seed=1, clips=8)
    with torch.no_grad():
        latents = vae.encode(sample_clips(8, 33, seed=1)[1]).transpose(0, 1).flatten(1)
    assert torch.allclose(latents.mean(1), torch.zeros(8), atol=1e-3)
    assert torch.allclose(latents.std(1), torch.ones(8), atol=1e-3)


def test_a_short_training_lowers_the_loss_and_leaves_finite_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.tiny.vae._PHASES", ((0.5, 1, 2, 0), (0.8, 5, 1, 0), (1.01, 5, 1, 3)))
    config = StageConfig("vae", CONFIG, 6, 0)
    weights = train(config, VAEStage(config, Ranks()), tmp_path, Ranks())
    vae = WanVAE(CONFIG)
    vae.load_state_dict(weights)
    assert all(torch.isfinite(value).all() for value in weights.values())
    trained = evaluate_autoencoder(vae.eval(), seed=0, clips=1, frames=9)["psnr"]
    torch.manual_seed(0)
    assert trained > evaluate_autoencoder(WanVAE(CONFIG).eval(), seed=0, clips=1, frames=9)["psnr"]
