"""Trains the VAE on the toy world: single images first, then longer and longer clips, in one pass each."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.tiny.muon import Muon
from recipes.tiny.training import CPU, StageConfig
from rfengine.accuracy import psnr_db
from rfengine.models.vae import DecoderState, EncoderState, WanVAE
from rfengine.toy.captions import sample_scenes
from rfengine.toy.detector import accuracy
from rfengine.toy.world import as_clips, as_model_pixels, continued, render, render_background
from rfengine.training.arithmetic import fast_autocast
from rfengine.training.config import AdamConfig
from rfengine.training.learner import Figures, Learner
from rfengine.training.parallel import Ranks
from rfengine.training.stages import ModelStage


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the training: until which part of its steps, how many frames with gradients, clips of a step,
    and at most how many latent frames before them. One clip alone would take torch's slow convolution on a
    CPU, which is four times slower."""

    until: float
    frames: int
    clips: int
    past: int = 0


_PHASES = (
    Phase(0.28, 1, 8),
    Phase(0.46, 9, 4),
    Phase(0.60, 17, 3),
    Phase(0.86, 33, 2),
    Phase(1.0, 33, 2, past=24),
)
_LATE_FRAMES = 960  # clips start anywhere in the first minute
_SWITCH_SHARE = 0.3  # of the clips, in which another scene follows
_MUON_RATE = 1e-2
_ADAM = AdamConfig(2e-3, betas=(0.9, 0.98), weight_decay=1e-4, clip=1.0, warm_up=60, fall=0.6)
_FOREGROUND_WEIGHT = 3.0
_KL_WEIGHT = 1e-4
_LOG_VARIANCE_START = -5.0
_ENDS = ("conv1.", "conv2.", "encoder.conv1.", "decoder.head.")  # convolutions that AdamW learns


class VAEStage(ModelStage):
    """The VAE of config.model from random weights: images, then longer and longer clips. Muon for the
    convolutions between the first and the last of either half."""

    def __init__(self, config: StageConfig, ranks: Ranks, device: torch.device = CPU) -> None:
        torch.manual_seed(config.seed)
        vae = WanVAE(config.model).to(device)
        with torch.no_grad():
            vae.conv1.bias[config.model.z_dim :] = _LOG_VARIANCE_START
        inner = [
            value for name, value in vae.named_parameters() if value.ndim > 3 and not name.startswith(_ENDS)
        ]
        learner = Learner("vae", vae, _ADAM, config.steps, 1, ranks, Muon(inner, lr=_MUON_RATE))
        super().__init__(learner, average_decay=0.995)
        self.config, self.device = config, device

    def loss(self, step: int, index: int) -> tuple[Tensor, Figures]:
        phase = next(phase for phase in _PHASES if step / self.config.steps < phase.until)
        past = random.Random(self.config.step_seed(step)).randint(0, phase.past)
        seed = self.config.pass_seed(step, index)
        frames = phase.frames + self.config.model.temporal_stride * past
        drawn = sample_clips(phase.clips, frames, seed, self.config.model.temporal_stride)
        pixels, weight = (part.to(self.device) for part in drawn)
        return _loss(self.model, pixels, weight, past, torch.Generator().manual_seed(seed))


def sample_clips(count: int, frames: int, seed: int, stride: int) -> tuple[Tensor, Tensor]:
    """Clips [B, 3, T, H, W] in [-1, 1] of training scenes from any time on, and the weight [B, 1, T, H, W] of
    each pixel. A scene that follows another begins with a latent frame, of which there is one every `stride`
    frames."""
    generator = random.Random(seed)
    clips, weights = [], []
    for scene, later in zip(
        sample_scenes(count, seed, split="train"), sample_scenes(count, seed + 1, split="train"), strict=True
    ):
        start, end = (first := generator.randrange(_LATE_FRAMES)), first + frames
        if frames > 1 and generator.random() < _SWITCH_SHARE:
            start = first + 1 + stride * generator.randrange((frames - 1) // stride)
            later = continued(later, scene, start)
            parts = [(scene, first, start), (later, start, end)]
        else:
            parts = [(scene, start, end)]
        clip = torch.cat([render(part, until - at, at) for part, at, until in parts])
        behind = torch.cat([render_background(part, until - at, at) for part, at, until in parts])
        foreground = (clip - behind).abs().amax(-1, keepdim=True) > 0.05
        clips.append(clip)
        weights.append(1 + (_FOREGROUND_WEIGHT - 1) * foreground.float())
    return as_model_pixels(clips), torch.stack(weights).permute(0, 4, 1, 2, 3)


def _loss(
    vae: WanVAE, pixels: Tensor, weight: Tensor, past: int, generator: torch.Generator
) -> tuple[Tensor, Figures]:
    """Weighted error of the reconstruction, and a weak pull of the latents to the normal distribution.

    The first `past` latent frames only fill the causal states: streams are long, and late frames need them.
    """
    with fast_autocast(pixels.device):
        states, seen = _states_after(vae, pixels, past)
        pixels, weight = pixels[:, :, seen:], weight[:, :, seen:]
        mean, log_variance = vae.encode_moments(pixels, states[0])
        mean, log_variance = mean.float(), log_variance.float().clamp(-20, 10)
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
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
    size = (len(pixels), pixels.shape[3] // stride, pixels.shape[4] // stride, torch.float32, pixels.device)
    states = vae.encoder_state(*size), vae.decoder_state(*size)
    vae.decode(vae.encode_moments(pixels[:, :, :seen], states[0])[0], states[1])
    return states, seen


@torch.inference_mode()
def with_measured_statistics(vae: WanVAE, seed: int, clips: int = 48) -> WanVAE:
    """The same VAE with the mean and the standard deviation of each latent channel in its configuration."""
    stride = vae.config.temporal_stride
    latents = torch.cat(
        [
            vae.encode_moments(sample_clips(8, 33, seed + 2 * index, stride)[0])[0]
            for index in range(clips // 8)
        ]
    )
    flat = latents.float().transpose(0, 1).flatten(1)
    mean, deviation = (tuple(values.tolist()) for values in (flat.mean(1), flat.std(1)))
    measured = WanVAE(dataclasses.replace(vae.config, latents_mean=mean, latents_std=deviation))
    measured.load_state_dict(vae.state_dict())
    return measured.eval()


@torch.inference_mode()
def evaluate_autoencoder(vae: WanVAE, seed: int, clips: int = 48, frames: int = 129) -> dict[str, float]:
    """PSNR and detector accuracies of reconstructed held-out clips."""
    scenes = sample_scenes(clips, seed + 17, split="held_out")
    pixels = as_model_pixels([render(scene, frames, 50 * index) for index, scene in enumerate(scenes)])
    decoded = torch.cat([vae.decode(vae.encode(part)) for part in pixels.split(8)])
    return {"psnr": psnr_db(decoded, pixels)} | accuracy(scenes, as_clips(decoded))
