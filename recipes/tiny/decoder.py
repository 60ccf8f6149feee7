"""Trains the tiny decoder of the toy model to give the pixels of the full one, from the same latents.

Half of the latents are those of true videos, half those of streams that the model makes itself: at use every
latent is a generated one.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from recipes.tiny.muon import Muon
from recipes.tiny.training import CPU, StageConfig, ToyModel, train
from rfengine.accuracy import psnr_db
from rfengine.models.tiny_vae import TinyVAE
from rfengine.models.vae import WanVAE
from rfengine.toy.captions import sample_scenes
from rfengine.toy.detector import accuracy
from rfengine.toy.world import Scene, as_clips, as_model_pixels, render
from rfengine.training.arithmetic import fast_autocast
from rfengine.training.config import AdamConfig
from rfengine.training.learner import Figures, Learner
from rfengine.training.parallel import Ranks
from rfengine.training.stages import ModelStage

_CLIPS = 160  # of each kind
_CHUNKS = 5  # of each clip
_GENERATED_BATCH = 32
_RENDERED_BATCH = 8
_MUON_RATE = 4e-3
_ADAM = AdamConfig(2e-3, betas=(0.9, 0.98), weight_decay=0.0, clip=1.0, warm_up=25, fall=0.5)
_BATCH = 2
_WINDOW = 9  # latents of one training clip
_CONTEXT = 3  # the first latents of a clip from inside a video, whose memory starts too late
_START_SHARE = 0.25  # of the clips that start with their video


@torch.inference_mode()
def encoded_latents(vae: WanVAE, scenes: Sequence[Scene], latent_frames: int) -> Tensor:
    """Latents [B, z, F, h, w] of the true videos of the scenes."""
    frames = 1 + vae.config.temporal_stride * (latent_frames - 1)
    pixels = as_model_pixels([render(scene, frames) for scene in scenes])
    return vae.encode(pixels.to(vae.conv2.weight.device))


class TinyDecoderStage(ModelStage):
    """The tiny decoder of config.model from random weights, on latents [N, z, F, h, w] and the full decoder's
    pixels [N, 3, T, H, W] of them. Muon for the convolutions between the first and the last."""

    def __init__(
        self,
        config: StageConfig,
        latents: Tensor,
        pixels: Tensor,
        ranks: Ranks,
        device: torch.device = CPU,
    ) -> None:
        torch.manual_seed(config.seed)
        model = TinyVAE(config.model).to(device)
        ends = {
            id(value) for name in ("1", list(model.decoder)[-1]) for value in model.decoder[name].parameters()
        }
        inner = [value for value in model.parameters() if value.ndim == 4 and id(value) not in ends]
        muon = Muon(inner, lr=_MUON_RATE)
        learner = Learner("tiny_decoder", model, _ADAM, config.steps, 1, ranks, muon)
        super().__init__(learner, average_decay=0.99)
        self.config, self.latents, self.pixels, self.device = config, latents, pixels, device

    def loss(self, step: int, index: int) -> tuple[Tensor, Figures]:
        own = random.Random(self.config.step_seed(step))
        drawn = _draw(self.latents, self.pixels, self.config.model.temporal_stride, own)
        latents, pixels = (part.to(self.device) for part in drawn)
        with fast_autocast(latents.device):
            decoded = self.model.decode(latents)
        decoded = decoded[:, :, -pixels.shape[2] :].float()
        error = decoded - pixels
        return (error.abs() + error.square()).mean(), {"psnr": psnr_db(decoded, pixels)}


def train_tiny_decoder(
    teacher: ToyModel, config: StageConfig, directory: Path, ranks: Ranks, clips: int = _CLIPS
) -> TinyVAE:
    """Train, or continue training, a tiny decoder on `clips` clips of each kind; returns its averaged
    weights, frozen."""
    device = teacher.transformer.device
    stage = TinyDecoderStage(config, *_training_clips(teacher, clips, config.seed), ranks, device)
    model = TinyVAE(config.model)
    model.load_state_dict(train(config, stage, directory, ranks))
    return model.eval().requires_grad_(False)


def _training_clips(teacher: ToyModel, clips: int, seed: int) -> tuple[Tensor, Tensor]:
    """Latents [2 * clips, z, F, h, w] and the teacher's pixels [2 * clips, 3, T, H, W], both float16."""
    parts = []
    for first in range(0, clips, _GENERATED_BATCH):
        count = min(_GENERATED_BATCH, clips - first)
        scenes = sample_scenes(count, seed * 1_000_003 + first, split="train")
        parts.append(teacher.latents(scenes, _CHUNKS, seed + first))
    scenes = sample_scenes(clips, seed * 1_000_003 + clips, split="train")
    frames = _CHUNKS * teacher.config.cache.chunk_frames
    for first in range(0, clips, _RENDERED_BATCH):
        parts.append(encoded_latents(teacher.vae, scenes[first : first + _RENDERED_BATCH], frames))
    latents = torch.cat(parts).half()
    return latents.cpu(), teacher.pixels(latents.float()).half().cpu()


def _draw(latents: Tensor, pixels: Tensor, stride: int, generator: random.Random) -> tuple[Tensor, Tensor]:
    """A batch of windows of latents, and the pixels [B, 3, T, H, W] of their last frames.

    A window that does not start with its video has pixels for the latents behind its context only.
    """
    rows = [generator.randrange(len(latents)) for _ in range(_BATCH)]
    window = min(_WINDOW, latents.shape[2])
    last = latents.shape[2] - window
    from_start = last == 0 or generator.random() < _START_SHARE
    starts = [0 if from_start else generator.randint(1, last) for _ in rows]
    drawn = torch.stack([latents[row, :, at : at + window] for row, at in zip(rows, starts, strict=True)])
    skipped = 0 if from_start else _CONTEXT
    frames = 1 + stride * (window - 1 - skipped)
    wanted = [
        pixels[row, :, (first := stride * (at + skipped)) : first + frames]
        for row, at in zip(rows, starts, strict=True)
    ]
    return drawn.float(), torch.stack(wanted).float()


def evaluate_tiny_decoder(teacher: ToyModel, tiny: TinyVAE, videos: int, seed: int) -> dict[str, float]:
    """The tiny decoder against the full one on held-out captions, three chunks each.

    psnr_generated, psnr_encoded: decibels between the two, on latents of streams and of true videos.
    full_*, tiny_*: accuracies of the toy detectors on what each makes of the generated latents.
    full_ms, tiny_ms: median milliseconds that each takes for a chunk of one stream; speed: their ratio.
    """
    scenes = sample_scenes(videos, seed, split="held_out")
    figures: dict[str, float] = {}
    generated = torch.cat(
        [
            teacher.latents(scenes[first : first + _GENERATED_BATCH], 3, seed + first)
            for first in range(0, videos, _GENERATED_BATCH)
        ]
    )
    encoded = encoded_latents(teacher.vae, scenes, generated.shape[2])
    for kind, latents in (("generated", generated), ("encoded", encoded)):
        full, small = teacher.pixels(latents), tiny.decode(latents).clamp(-1, 1)
        figures[f"psnr_{kind}"] = psnr_db(small, full)
        if kind == "generated":
            for name, pixels in (("full", full), ("tiny", small)):
                measured = accuracy(scenes, as_clips(pixels))
                figures |= {f"{name}_{key}": value for key, value in measured.items()}
    chunk = generated[:1, :, : teacher.config.cache.chunk_frames]
    figures |= {"full_ms": _median_ms(teacher.vae, chunk), "tiny_ms": _median_ms(tiny, chunk)}
    return figures | {"speed": figures["full_ms"] / figures["tiny_ms"]}


@torch.inference_mode()
def _median_ms(decoder: WanVAE | TinyVAE, chunk: Tensor, calls: int = 15) -> float:
    state = decoder.decoder_state(1, *chunk.shape[3:], torch.float32, "cpu")
    decoder.decode(chunk, state)
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        decoder.decode(chunk, state)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)
