"""Trains the VAE on the toy world: single images first, then longer and longer clips, in one pass each."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.tiny.muon import Muon
from recipes.tiny.training import CPU, StageConfig, cell_weight, with_plain_latents
from rfengine.accuracy import psnr_db
from rfengine.config import VAEConfig
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
_KL_WEIGHT = 1e-4
_LOG_VARIANCE_START = -5.0
_DECODED = 8  # clips at once
_MEASURED_PARTS = 3  # of so many clips, to tell what each channel does to the pixels
_LEAST_EFFECT = 1e-4  # of the largest one squared: less counts as this much, so that the map can be inverted
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
        weights.append(cell_weight(foreground))
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


def vae_of(config: VAEConfig, weights: Mapping[str, Tensor]) -> WanVAE:
    """The VAE of these weights, in evaluation mode."""
    vae = WanVAE(config)
    vae.load_state_dict(weights)
    return vae.eval()


@torch.inference_mode()
def with_ordered_latents(vae: WanVAE, seed: int, clips: int = 48) -> WanVAE:
    """The same VAE with other coordinates of its latents, in which a channel varies as much as it matters.

    A VAE is free in how it uses its channels: some move no pixel and look like noise, and brought to unit
    variance they would be most of what a transformer has to predict. The new channels are uncorrelated, have
    zero mean, and come in the order of what they do to the pixels (eigenvectors of the covariance of the
    latents, measured by what a change of each does to the decoded pixels); the standard deviation is 1 for
    the first and falls with the square root of the effect.

    vae: as it was trained, without statistics in its configuration. The log variances, which only training
    reads, are lost.
    """
    stride, z = vae.config.temporal_stride, vae.config.z_dim
    parts = [sample_clips(_DECODED, 33, seed + 2 * index, stride)[0] for index in range(clips // _DECODED)]
    latents = torch.cat([vae.encode_moments(part)[0] for part in parts]).float()
    flat = latents.transpose(0, 1).flatten(1).double()
    mean, covariance = flat.mean(1), torch.cov(flat)
    generator = torch.Generator().manual_seed(seed)
    effect = torch.zeros(z, z, dtype=torch.float64)
    for part in latents.split(_DECODED)[:_MEASURED_PARTS]:
        changes = _pixel_changes(vae, part, 0.3 * covariance.diagonal().sqrt(), generator)
        effect += changes @ changes.T / changes.shape[1]
    values, vectors = torch.linalg.eigh(effect)
    root = values.clamp_min(_LEAST_EFFECT * float(values[-1])).sqrt()
    half = vectors @ torch.diag(root) @ vectors.T
    strengths, directions = torch.linalg.eigh(half @ covariance @ half)
    strengths, directions = strengths.flip(0).sqrt(), directions.flip(1)
    deviations = (strengths / strengths[0]).sqrt() / strengths
    to_new = torch.diag(deviations) @ directions.T @ half
    return _with_coordinates(vae, mean, to_new, torch.linalg.inv(to_new))


def _pixel_changes(vae: WanVAE, latents: Tensor, sizes: Tensor, generator: torch.Generator) -> Tensor:
    """[z, pixels] float64: what each channel of latents [B, z, F, h, w] does to the pixels, per unit, when it
    is changed by `sizes` times the same noise."""
    noise = torch.randn(latents[:, 0].shape, generator=generator)
    decoded, changes = vae.decode(latents), []
    for channel, size in enumerate(sizes.tolist()):
        changed = latents.clone()
        changed[:, channel] += size * noise
        changes.append((vae.decode(changed) - decoded).double().flatten() / size)
    return torch.stack(changes)


def _with_coordinates(vae: WanVAE, mean: Tensor, to_new: Tensor, to_old: Tensor) -> WanVAE:
    """The VAE whose latents are to_new (old - mean); both convolutions at the latents take it up."""
    z = vae.config.z_dim
    weights = {name: value.clone() for name, value in vae.state_dict().items()}

    def product(matrix: Tensor, weight: Tensor) -> Tensor:
        return (matrix @ weight.flatten(1).double()).view(-1, *weight.shape[1:]).to(weight.dtype)

    weight, bias = weights["conv1.weight"], weights["conv1.bias"]
    weight[:z], bias[:z] = product(to_new, weight[:z]), to_new @ (bias[:z].double() - mean)
    weight[z:], bias[z:] = 0, _LOG_VARIANCE_START
    matrix = weights["conv2.weight"].flatten(1).double()
    weights["conv2.bias"] += (matrix @ mean).float()
    weights["conv2.weight"] = (matrix @ to_old).float().view_as(weights["conv2.weight"])
    return vae_of(with_plain_latents(vae.config, z), weights)


def with_first_channels(vae: WanVAE, kept: int) -> WanVAE:
    """The VAE that with_ordered_latents returns, less all latent channels but the first `kept`.

    The others hardly move a pixel, and a transformer would spend its width on the noise in them. The decoder
    has what it would have with each of them at the one value of which conv2 makes zeros, so that neither half
    is trained again: the kept latents are the same numbers.
    """
    weights = {name: value.clone() for name, value in vae.state_dict().items()}
    means = weights["conv1.weight"][:kept].flatten(1)
    encoded, bias = weights["encoder.head.2.weight"], weights["encoder.head.2.bias"]
    zeros = torch.zeros(kept, *encoded.shape[1:])
    weights["encoder.head.2.weight"] = torch.cat([torch.einsum("oi,ickyx->ockyx", means, encoded), zeros])
    weights["encoder.head.2.bias"] = torch.cat(
        [means @ bias + weights["conv1.bias"][:kept], torch.full((kept,), _LOG_VARIANCE_START)]
    )
    weights["conv1.weight"] = torch.eye(2 * kept).view(2 * kept, 2 * kept, 1, 1, 1)
    weights["conv1.bias"] = torch.zeros(2 * kept)
    matrix = weights["conv2.weight"].flatten(1)
    shift = torch.linalg.solve(matrix.double(), weights["conv2.bias"].double()).float()
    weights["conv2.weight"] = torch.eye(kept).view(kept, kept, 1, 1, 1)
    weights["conv2.bias"] = shift[:kept].clone()
    decoded = weights["decoder.conv1.weight"]
    weights["decoder.conv1.weight"] = torch.einsum("oikyx,ij->ojkyx", decoded, matrix[:, :kept])
    return vae_of(with_plain_latents(vae.config, kept), weights)


@torch.inference_mode()
def evaluate_autoencoder(vae: WanVAE, seed: int, clips: int = 48, frames: int = 129) -> dict[str, float]:
    """PSNR and detector accuracies of reconstructed held-out clips."""
    scenes = sample_scenes(clips, seed + 17, split="held_out")
    pixels = as_model_pixels([render(scene, frames, 50 * index) for index, scene in enumerate(scenes)])
    decoded = torch.cat([vae.decode(vae.encode(part)) for part in pixels.split(_DECODED)])
    return {"psnr": psnr_db(decoded, pixels)} | accuracy(scenes, as_clips(decoded))
