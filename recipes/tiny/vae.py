"""Trains the VAE on the toy world: single images first, then longer and longer clips, in one pass each."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from recipes.tiny.training import StageConfig
from rfengine.accuracy import psnr_db
from rfengine.models.vae import DecoderState, EncoderState, WanVAE
from rfengine.toy.detector import accuracy
from rfengine.toy.world import (
    Scene,
    WorldConfig,
    as_clips,
    as_model_pixels,
    background_image,
    render,
    sample_scenes,
)
from rfengine.training.arithmetic import cpu_autocast
from rfengine.training.config import AdamConfig
from rfengine.training.learner import Figures, Learner
from rfengine.training.parallel import Ranks
from rfengine.training.stages import ModelStage

WORLD = WorldConfig(motion_weights=(0.7, 0.1, 0.1, 0.1), pair_share=0.15)

# until which part of the steps, frames with gradients, clips a pass, most latent frames before them
_PHASES = ((0.18, 1, 6, 0), (0.34, 9, 2, 0), (0.42, 17, 1, 0), (0.80, 33, 1, 0), (1.01, 33, 1, 24))
_PASSES = 2  # of a step, which ranks share
_LATE_FRAMES = 960  # clips start anywhere in the first minute
_ADAM = AdamConfig(2e-3, betas=(0.9, 0.98), weight_decay=1e-4, clip=1.0, warm_up=100, fall=0.5)
_FOREGROUND_WEIGHT = 3.0
_KL_WEIGHT = 1e-4
_LOG_VARIANCE_START = -5.0


class VAEStage(ModelStage):
    """The VAE of config.model from random weights: images, then longer and longer clips."""

    def __init__(self, config: StageConfig, ranks: Ranks) -> None:
        torch.manual_seed(config.seed)
        vae = WanVAE(config.model)
        with torch.no_grad():
            vae.conv1.bias[config.model.z_dim :] = _LOG_VARIANCE_START
        learner = Learner("vae", vae, _ADAM, config.steps, _PASSES, ranks)
        super().__init__(learner, average_decay=0.995)
        self.config = config

    def loss(self, step: int, index: int) -> tuple[Tensor, Figures]:
        frames, clips, past = next(phase[1:] for phase in _PHASES if step / self.config.steps < phase[0])
        past = random.Random(self.config.step_seed(step)).randint(0, past)
        seed = self.config.pass_seed(step, index)
        scenes, pixels = sample_clips(clips, frames + self.config.model.temporal_stride * past, seed)
        generator = torch.Generator().manual_seed(seed)
        return _loss(self.model, pixels, _foreground_weight(pixels, scenes), past, generator)


def sample_clips(count: int, frames: int, seed: int) -> tuple[list[Scene], Tensor]:
    """Training scenes and their clips [B, 3, T, H, W] in [-1, 1], at any place and time of their videos."""
    generator = random.Random(seed)
    scenes = [
        dataclasses.replace(scene, start=(generator.uniform(-32, 32), generator.uniform(-32, 32)))
        for scene in sample_scenes(count, seed, WORLD, "train")
    ]
    clips = [render(scene, frames, generator.randrange(_LATE_FRAMES), WORLD) for scene in scenes]
    return scenes, as_model_pixels(clips)


def _foreground_weight(pixels: Tensor, scenes: Sequence[Scene]) -> Tensor:
    backgrounds = as_model_pixels([background_image(scene.background, WORLD)[None] for scene in scenes])
    foreground = (pixels - backgrounds).abs().amax(1, keepdim=True) > 0.05
    return 1 + (_FOREGROUND_WEIGHT - 1) * foreground.float()


def _loss(
    vae: WanVAE, pixels: Tensor, weight: Tensor, past: int, generator: torch.Generator
) -> tuple[Tensor, Figures]:
    """Weighted error of the reconstruction, and a weak pull of the latents to the normal distribution.

    The first `past` latent frames only fill the causal states: streams are long, and late frames need them.
    """
    with cpu_autocast():
        states, seen = _states_after(vae, pixels, past)
        pixels, weight = pixels[:, :, seen:], weight[:, :, seen:]
        mean, log_variance = vae.encode_moments(pixels, states[0])
        mean, log_variance = mean.float(), log_variance.float().clamp(-20, 10)
        noise = torch.randn(mean.shape, generator=generator)
        decoded = vae.decode(mean + torch.exp(0.5 * log_variance) * noise, states[1])
    error = decoded.float() - pixels
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
    loss = (weight * (error.abs() + error.square())).mean() + _KL_WEIGHT * kl
    figures = {"frames": float(pixels.shape[2]), "psnr": psnr_db(decoded, pixels), "kl": float(kl.detach())}
    return loss, figures


@torch.no_grad()
def _states_after(
    vae: WanVAE, pixels: Tensor, past: int
) -> tuple[tuple[EncoderState, DecoderState] | tuple[None, None], int]:
    """The causal states after `past` latent frames of the clips, and how many pixel frames these are."""
    if not past:
        return (None, None), 0
    seen = 1 + vae.config.temporal_stride * (past - 1)
    stride = vae.config.spatial_stride
    size = (len(pixels), pixels.shape[3] // stride, pixels.shape[4] // stride, torch.float32, "cpu")
    states = vae.encoder_state(*size), vae.decoder_state(*size)
    vae.decode(vae.encode_moments(pixels[:, :, :seen], states[0])[0], states[1])
    return states, seen


@torch.inference_mode()
def with_measured_statistics(vae: WanVAE, seed: int, clips: int = 48) -> WanVAE:
    """The same VAE with the mean and the standard deviation of each latent channel in its configuration."""
    latents = torch.cat(
        [vae.encode_moments(sample_clips(8, 33, seed + index)[1])[0] for index in range(clips // 8)]
    )
    flat = latents.float().transpose(0, 1).flatten(1)
    mean, deviation = (tuple(values.tolist()) for values in (flat.mean(1), flat.std(1)))
    measured = WanVAE(dataclasses.replace(vae.config, latents_mean=mean, latents_std=deviation))
    measured.load_state_dict(vae.state_dict())
    return measured.eval()


@torch.inference_mode()
def evaluate_autoencoder(vae: WanVAE, seed: int, clips: int = 48, frames: int = 33) -> dict[str, float]:
    """PSNR and detector accuracies of reconstructed held-out clips."""
    scenes = sample_scenes(clips, seed + 17, WORLD, "held_out")
    pixels = as_model_pixels([render(scene, frames, 50 * index, WORLD) for index, scene in enumerate(scenes)])
    decoded = torch.cat([vae.decode(vae.encode(part)) for part in pixels.split(8)])
    return {"psnr": psnr_db(decoded, pixels)} | accuracy(scenes, as_clips(decoded))
