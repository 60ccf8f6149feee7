"""Trains the tiny decoder of the toy model to give the pixels of the full one, from the same latents.

Half of the latents are those of true videos, half those of streams that the model makes itself: at use every
latent is a generated one.
"""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from recipes.tiny.muon import Muon
from recipes.tiny.text_encoder import text_states
from recipes.tiny.training import StageConfig, train
from recipes.tiny.vae import WORLD
from rfengine.accuracy import psnr_db
from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.checkpoint.layouts import list_names
from rfengine.checkpoint.pickle_file import open_pickle
from rfengine.config import EngineConfig
from rfengine.files import replaced
from rfengine.models.dit import WanDiT
from rfengine.models.text_encoder import build_umt5
from rfengine.models.tiny_vae import TinyVAE
from rfengine.models.vae import WanVAE
from rfengine.toy.detector import accuracy
from rfengine.toy.world import Scene, WorldConfig, caption, render, sample_scenes
from rfengine.training.arithmetic import cpu_autocast
from rfengine.training.config import AdamConfig
from rfengine.training.learner import Figures, Learner
from rfengine.training.parallel import Ranks
from rfengine.training.rollout import roll_out
from rfengine.training.stages import ModelStage
from rfengine.video import as_clips, as_model_pixels

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


@dataclass(frozen=True, slots=True)
class Teacher:
    """The frozen models of a checkpoint: whose latents are decoded, and the decoder that is imitated."""

    config: EngineConfig
    model: WanDiT
    vae: WanVAE
    text_model: nn.Module

    @classmethod
    def load(cls, directory: Path, config: EngineConfig) -> Teacher:
        checkpoint = Checkpoint.open(directory)
        model = checkpoint.load(lambda: WanDiT(config.model), "transformer", torch.float32)
        vae = checkpoint.load(lambda: WanVAE(config.vae), "vae", torch.float32)
        text_model = checkpoint.load(lambda: build_umt5(config.text), "text_encoder", torch.float32)
        return cls(config, *(part.eval().requires_grad_(False) for part in (model, vae, text_model)))

    @torch.inference_mode()
    def generated_latents(self, scenes: list[Scene], chunks: int, seed: int) -> Tensor:
        """Latents [B, z, F, h, w] of streams of the scenes' captions."""
        texts = text_states(self.text_model, [caption(scene) for scene in scenes], self.config.model.text_len)
        return torch.cat(list(roll_out(self.model, self.config, texts, chunks, seed)), dim=2)

    @torch.inference_mode()
    def encoded_latents(self, scenes: list[Scene], chunks: int) -> Tensor:
        """Latents [B, z, F, h, w] of the true videos of the scenes."""
        latent_frames = chunks * self.config.cache.chunk_frames
        frames = 1 + self.vae.config.temporal_stride * (latent_frames - 1)
        return self.vae.encode(as_model_pixels([render(scene, frames) for scene in scenes]))

    @torch.inference_mode()
    def pixels(self, latents: Tensor) -> Tensor:
        """What the full decoder gives, clamped: [B, 3, T, H, W]."""
        return torch.cat([self.vae.decode(part) for part in latents.split(_RENDERED_BATCH)]).clamp(-1, 1)


class TinyDecoderStage(ModelStage):
    """The tiny decoder of config.model from random weights, on latents [N, z, F, h, w] and the full decoder's
    pixels [N, 3, T, H, W] of them. Muon for the convolutions between the first and the last."""

    def __init__(self, config: StageConfig, latents: Tensor, pixels: Tensor, ranks: Ranks) -> None:
        torch.manual_seed(config.seed)
        model = TinyVAE(config.model)
        ends = {
            id(value) for name in ("1", list(model.decoder)[-1]) for value in model.decoder[name].parameters()
        }
        inner = [value for value in model.parameters() if value.ndim == 4 and id(value) not in ends]
        muon = Muon(inner, lr=_MUON_RATE)
        learner = Learner("tiny_decoder", model, _ADAM, config.steps, 1, ranks, muon)
        super().__init__(learner, average_decay=0.99)
        self.config, self.latents, self.pixels = config, latents, pixels

    def loss(self, step: int, index: int) -> tuple[Tensor, Figures]:
        own = random.Random(self.config.step_seed(step))
        latents, pixels = _draw(self.latents, self.pixels, self.config.model.temporal_stride, own)
        with cpu_autocast():
            decoded = self.model.decode(latents)
        decoded = decoded[:, :, -pixels.shape[2] :].float()
        error = decoded - pixels
        return (error.abs() + error.square()).mean(), {"psnr": psnr_db(decoded, pixels)}


def train_tiny_decoder(
    teacher: Teacher, config: StageConfig, directory: Path, ranks: Ranks, clips: int = _CLIPS
) -> TinyVAE:
    """Train, or continue training, a tiny decoder; returns its averaged weights, frozen.

    The training clips, `clips` of each kind, are made at the first call and kept in tiny_decoder_clips.pt.
    """
    path = directory / "tiny_decoder_clips.pt"
    stage = TinyDecoderStage(config, *_training_clips(teacher, path, clips, config.seed), ranks)
    model = TinyVAE(config.model)
    model.load_state_dict(train(config, stage, directory, ranks))
    return model.eval().requires_grad_(False)


def _training_clips(teacher: Teacher, path: Path, clips: int, seed: int) -> tuple[Tensor, Tensor]:
    """Latents [2 * clips, z, F, h, w] and the teacher's pixels [2 * clips, 3, T, H, W], both float16."""
    if path.exists():
        stored = open_pickle(path, ())
        if stored.keys() != {"latents", "pixels"}:
            raise ValueError(f"{path} holds {list_names(sorted(stored))}, not latents and pixels; remove it")
        return stored["latents"].read(), stored["pixels"].read()
    parts = []
    for first in range(0, clips, _GENERATED_BATCH):
        count = min(_GENERATED_BATCH, clips - first)
        scenes = sample_scenes(count, seed * 1_000_003 + first, WORLD, "train")
        parts.append(teacher.generated_latents(scenes, _CHUNKS, seed + first))
    scenes = sample_scenes(clips, seed * 1_000_003 + clips, WORLD, "train")
    for first in range(0, clips, _RENDERED_BATCH):
        parts.append(teacher.encoded_latents(scenes[first : first + _RENDERED_BATCH], _CHUNKS))
    latents = torch.cat(parts).half()
    pixels = teacher.pixels(latents.float()).half()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as partial:
        torch.save({"latents": latents, "pixels": pixels}, partial)
    return latents, pixels


def _draw(latents: Tensor, pixels: Tensor, stride: int, generator: random.Random) -> tuple[Tensor, Tensor]:
    """A batch of windows of latents, and the pixels [B, 3, T, H, W] of their last frames.

    A window that does not start with its video gives pixels for the latents behind its context only.
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


def evaluate_tiny_decoder(teacher: Teacher, tiny: TinyVAE, videos: int, seed: int) -> dict[str, float]:
    """The tiny decoder against the full one on held-out captions, three chunks each.

    psnr_generated, psnr_encoded: decibels between the two, on latents of streams and of true videos.
    full_*, tiny_*: accuracies of the toy detectors on what each makes of the generated latents.
    full_ms, tiny_ms: median milliseconds that each takes for a chunk of one stream; speed: their ratio.
    """
    scenes = sample_scenes(videos, seed, WorldConfig(), "held_out")
    figures: dict[str, float] = {}
    generated = torch.cat(
        [
            teacher.generated_latents(scenes[first : first + _GENERATED_BATCH], 3, seed + first)
            for first in range(0, videos, _GENERATED_BATCH)
        ]
    )
    for kind, latents in (("generated", generated), ("encoded", teacher.encoded_latents(scenes, 3))):
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
    for _ in itertools.repeat(None, calls):
        start = time.perf_counter()
        decoder.decode(chunk, state)
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[calls // 2]
