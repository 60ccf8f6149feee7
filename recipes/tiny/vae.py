"""Trains the VAE on the toy world: single images first, then longer and longer clips, in one pass each."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from recipes.tiny.stage_run import StageRun
from rfengine.config import VAEConfig
from rfengine.models.vae import DecoderState, EncoderState, WanVAE
from rfengine.toy.detector import accuracy
from rfengine.toy.world import Scene, WorldConfig, background_image, render, sample_scenes
from rfengine.training.cpu_arithmetic import cpu_autocast
from rfengine.training.parallel import average_over_workers
from rfengine.training.weight_average import WeightAverage
from rfengine.video import as_clips, as_model_pixels

WORLD = WorldConfig(motion_weights=(0.7, 0.1, 0.1, 0.1), pair_share=0.15)

# until which progress, frames with gradients, clips a step, most latent frames of the video before them
_PHASES = ((0.18, 1, 12, 0), (0.34, 9, 3, 0), (0.42, 17, 2, 0), (0.80, 33, 2, 0), (1.01, 33, 2, 24))
_LATE_FRAMES = 960  # clips start anywhere in the first minute
_LEARNING_RATE = 2e-3
_FOREGROUND_WEIGHT = 3.0
_KL_WEIGHT = 1e-4
_LOG_VARIANCE_START = -5.0


def train_autoencoder(
    rank: int, config: VAEConfig, directory: Path, minutes: float, seed: int, workers: int
) -> None:
    """Train, or go on training, a VAE for `minutes` in all.

    Every worker of run_workers calls this with its own rank; rank 0 leaves the averaged weights in
    vae_weights.pt.
    """
    torch.manual_seed(seed)
    vae = WanVAE(config)
    with torch.no_grad():
        vae.conv1.bias[config.z_dim :] = _LOG_VARIANCE_START
    average = WeightAverage(vae, decay=0.995)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=1e-4)
    run = StageRun(directory, "vae", minutes)
    if (state := run.resume()) is not None:
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.load(state["average"])
    while run.progress < 1:
        frames, batch, past = next(phase[1:] for phase in _PHASES if run.progress < phase[0])
        past = random.Random(seed * 1_000_003 + run.step).randint(0, past)
        worker_seed = (seed * 1_000_003 + run.step) * 64 + rank
        total = frames + config.temporal_stride * past
        scenes, pixels = sample_clips(-(-batch // workers), total, worker_seed)
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate(_LEARNING_RATE)
        figures = _step(vae, optimizer, pixels, _foreground_weight(pixels, scenes), past, run)
        average.update(vae, run.step)
        run.tick(quiet=rank > 0, frames=frames, **figures)
        if rank == 0 and (run.wants_save() or run.progress >= 1):
            run.save(
                {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "average": average.values}
            )
    if rank == 0:
        torch.save(average.values, directory / "vae_weights.pt")


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


def _step(
    vae: WanVAE, optimizer: torch.optim.Optimizer, pixels: Tensor, weight: Tensor, past: int, run: StageRun
) -> dict[str, float]:
    """One step on the gradients of all workers, who agree on the clock as well.

    The first `past` latent frames only fill the causal states: streams are long, and late frames need them.
    """
    with cpu_autocast():
        states, seen = _states_after(vae, pixels, past)
        pixels, weight = pixels[:, :, seen:], weight[:, :, seen:]
        mean, log_variance = vae.encode_moments(pixels, states[0])
        mean, log_variance = mean.float(), log_variance.float().clamp(-20, 10)
        latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        decoded = vae.decode(latents, states[1])
    error = decoded.float() - pixels
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
    loss = (weight * (error.abs() + error.square())).mean() + _KL_WEIGHT * kl
    optimizer.zero_grad(set_to_none=False)
    loss.backward()
    clock = torch.tensor([run.elapsed])
    average_over_workers([clock, *(value.grad for value in vae.parameters() if value.grad is not None)])
    run.elapsed = float(clock)
    torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    optimizer.step()
    decibels = -10 * torch.log10(error.detach().square().mean() / 4)
    return {"loss": float(loss.detach()), "psnr": float(decibels), "kl": float(kl.detach())}


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
    config = dataclasses.replace(
        vae.config, latents_mean=tuple(flat.mean(1).tolist()), latents_std=tuple(flat.std(1).tolist())
    )
    measured = WanVAE(config)
    measured.load_state_dict(vae.state_dict())
    return measured.eval()


@torch.inference_mode()
def evaluate_autoencoder(vae: WanVAE, seed: int, clips: int = 48, frames: int = 33) -> dict[str, float]:
    """PSNR and detector accuracies of reconstructed held-out clips."""
    scenes = sample_scenes(clips, seed + 17, WORLD, "held_out")
    pixels = as_model_pixels([render(scene, frames, 50 * index, WORLD) for index, scene in enumerate(scenes)])
    decoded = torch.cat([vae.decode(vae.encode(part)) for part in pixels.split(8)])
    decibels = -10 * torch.log10((decoded.clamp(-1, 1) - pixels).square().mean() / 4)
    return {"psnr": float(decibels)} | accuracy(scenes, as_clips(decoded))
