import dataclasses

import pytest
import torch

from recipes.tiny import vae as vae_module
from recipes.tiny.training import StageConfig, train
from recipes.tiny.vae import (
    Phase,
    VAEStage,
    _pixel_changes,
    _states_after,
    evaluate_autoencoder,
    sample_clips,
    with_first_channels,
    with_ordered_latents,
)
from rfengine.models.vae import WanVAE
from rfengine.presets import PRESETS
from rfengine.training.parallel import Ranks

CONFIG = dataclasses.replace(PRESETS["tiny"].vae, base_dim=4, dim_mult=(1, 1, 1, 1))


def test_sampled_clips_are_reproducible_and_weigh_their_shapes():
    pixels, weight = sample_clips(3, 5, seed=4, stride=4)
    assert pixels.shape == (3, 3, 5, 64, 64) and float(pixels.min()) >= -1 and float(pixels.max()) <= 1
    assert weight.shape == (3, 1, 5, 64, 64) and weight.unique().tolist() == [1, 3]
    coloured = (pixels.amax(1) - pixels.amin(1) > 1.0)[:, None]
    assert weight[coloured].min() == 3 and 0.03 < float((weight == 3).float().mean()) < 0.4
    assert torch.equal(pixels, sample_clips(3, 5, seed=4, stride=4)[0])


def test_a_scene_that_follows_begins_with_a_latent_frame():
    pixels, _ = sample_clips(40, 9, seed=2, stride=4)
    jumps = (pixels[:, :, 1:] - pixels[:, :, :-1]).abs().mean((1, 3, 4)) > 0.15
    places = jumps.nonzero()[:, 1].tolist()
    assert len(places) > 3 and set(places) <= {0, 4}


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


def test_ordered_latents_are_the_same_video_in_other_coordinates():
    torch.manual_seed(0)
    vae = WanVAE(CONFIG).eval()
    with torch.no_grad():
        vae.conv2.weight[:, 3] = 0  # a channel that no pixel sees
        vae.conv1.weight[3] *= 2
    ordered = with_ordered_latents(vae, seed=1, clips=8)
    pixels = sample_clips(8, 33, 1, 4)[0]
    with torch.no_grad():
        latents, before = ordered.encode(pixels), vae.encode(pixels)
        difference = ordered.decode(latents) - vae.decode(before)  # norms of random weights amplify rounding
    assert float(difference.square().mean().sqrt()) < 5e-5
    flat = latents.transpose(0, 1).flatten(1)
    deviations = flat.std(1)
    assert float(flat.mean(1).abs().max()) < 1e-3 and float(deviations[0]) == pytest.approx(1, abs=1e-3)
    assert deviations.tolist() == sorted(deviations.tolist(), reverse=True)
    between = torch.corrcoef(flat).fill_diagonal_(0).abs().max()
    assert float(between) < 1e-2
    with torch.no_grad():
        sizes, generator = torch.full((8,), 0.1), torch.Generator().manual_seed(0)
        effects = _pixel_changes(ordered, latents, sizes, generator).square().mean(1).sqrt()
    assert float(effects[-1]) < 0.2 * float(effects[0]) and float(deviations[-1]) < 0.2


def test_the_first_channels_are_the_same_numbers_and_decode_like_all_with_the_others_held():
    torch.manual_seed(0)
    vae = WanVAE(CONFIG).eval()
    kept = CONFIG.z_dim - 2
    smaller = with_first_channels(vae, kept)
    assert smaller.config.z_dim == kept
    pixels = sample_clips(2, 9, 1, 4)[0]
    with torch.no_grad():
        latents, before = smaller.encode(pixels), vae.encode(pixels)
        torch.testing.assert_close(latents, before[:, :kept], atol=1e-5, rtol=0)
        matrix = vae.conv2.weight.flatten(1)
        before[:, kept:] = -torch.linalg.solve(matrix, vae.conv2.bias)[kept:].view(1, -1, 1, 1, 1)
        difference = smaller.decode(latents) - vae.decode(before)  # norms of random weights amplify rounding
    assert float(difference.square().mean().sqrt()) < 5e-5


def test_a_short_training_lowers_the_loss_and_leaves_finite_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(vae_module, "_PHASES", (Phase(0.5, 1, 2), Phase(0.8, 5, 2), Phase(1.0, 5, 2, past=3)))
    config = StageConfig("vae", CONFIG, 6, 0)
    weights = train(config, VAEStage(config, Ranks()), tmp_path, Ranks())
    vae = WanVAE(CONFIG)
    vae.load_state_dict(weights)
    assert all(torch.isfinite(value).all() for value in weights.values())
    trained = evaluate_autoencoder(vae.eval(), seed=0, clips=1, frames=9)["psnr"]
    torch.manual_seed(0)
    assert trained > evaluate_autoencoder(WanVAE(CONFIG).eval(), seed=0, clips=1, frames=9)["psnr"]
