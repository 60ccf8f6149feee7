"""Trains the student on streams of its own, by the truth that their noise tells.

Text and noise of a first chunk together say what a video shows (noise.py), so a stream that the student makes
from them has a true video to be compared with, chunk by chunk. What it learns to answer to is what it will
meet: its own errors in the window and in the sink, and its own earlier steps under new noise.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from recipes.tiny.noise import telling_noise, told_turns
from recipes.tiny.training import StageConfig, ToyModel, cell_weight, train
from recipes.tiny.transformer import flow_learner
from rfengine.models.dit import TextKeysValues, WanDiT
from rfengine.ops import REFERENCE_OPS
from rfengine.schedule import FlowSchedule
from rfengine.toy.data import LatentDataset
from rfengine.training.arithmetic import fast_autocast
from rfengine.training.config import AdamConfig, RolloutConfig
from rfengine.training.learner import Figures
from rfengine.training.ops import DifferentiableOps
from rfengine.training.parallel import Ranks
from rfengine.training.rollout import PromptSwitch, self_forced_rollout
from rfengine.training.stages import ModelStage

_BATCH = 16  # streams of a step
_LEARNT_CHUNKS = 3  # of a stream, at its end
# Long streams are all the student's own, for as long as a video. The others begin with true chunks, which
# keep them from drifting away from the truth, and end with as many of the student's own as are learnt.
_LONG_SHARE = 0.3
_FIRST_SHARE = 0.5  # of the others without a switch begin with no true chunk
_SWITCH_SHARE = 0.4  # of the streams have a prompt switch
_OPEN_SHARE = 0.5  # of the streams begin with a text that leaves attributes open
_ADAM = AdamConfig(2e-4, betas=(0.9, 0.98), weight_decay=0.0, clip=1.0, warm_up=100, fall=0.9)
_MUON_RATE = 0.002


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """What the streams of a step have in common: how many chunks they have and how many true ones they begin
    with, before which chunk the prompt switches (0 for never) and whether the window is recomputed then, and
    the step at which every chunk ends."""

    chunks: int
    given: int
    switch: int
    recached: bool
    exit_step: int


def draw_plan(choices: random.Random, videos: Sequence[int], steps: int) -> StreamPlan:
    """videos: how many there are with a switch before each chunk, at 0 those without; steps: of the
    sampler."""
    latest, later = len(videos) - _LEARNT_CHUNKS, len(videos) - 1
    shares = [1 - _SWITCH_SHARE, *[_SWITCH_SHARE / later] * later]
    weights = [share * (count > 0) for share, count in zip(shares, videos, strict=True)]
    (switch,) = choices.choices(range(len(videos)), weights)
    is_long, given = choices.random() < _LONG_SHARE, 0
    if switch and not is_long:  # before one of the student's own chunks
        given = min(max(0, switch - choices.randrange(_LEARNT_CHUNKS)), latest)
    elif not is_long and latest and choices.random() >= _FIRST_SHARE:
        given = choices.randint(1, latest)
    chunks = len(videos) if is_long else given + _LEARNT_CHUNKS
    return StreamPlan(chunks, given, switch, choices.random() < 0.5, choices.randrange(steps))


def train_on_streams(
    config: StageConfig,
    start: Path,
    videos: LatentDataset,
    directory: Path,
    ranks: Ranks,
    device: torch.device,
) -> dict[str, Tensor]:
    """Train the student of the checkpoint directory `start` by StreamStage, as `train` does."""
    ops = DifferentiableOps(REFERENCE_OPS.choice)
    model = ToyModel.load(start, device, ops).transformer.requires_grad_(True)
    return train(config, StreamStage(config, model, videos, ranks), directory, ranks)


class StreamStage(ModelStage):
    """model, whose ops are DifferentiableOps, goes on with learning on `videos`; see the module."""

    def __init__(self, config: StageConfig, model: WanDiT, videos: LatentDataset, ranks: Ranks) -> None:
        super().__init__(flow_learner(config, model, _ADAM, _MUON_RATE, 0.0, ranks), 0.99)
        self.config, self.videos = config, videos
        self._rows = _rows_by_switch(videos)

    def loss(self, step: int, index: int) -> tuple[Tensor, Figures]:
        choices = random.Random(self.config.step_seed(step))
        generator = torch.Generator().manual_seed(self.config.pass_seed(step, index))
        sigmas = FlowSchedule(self.config.model.schedule).denoising_sigmas
        plan = draw_plan(choices, [len(rows) for rows in self._rows], len(sigmas))
        rows = torch.tensor(choices.choices(self._rows[plan.switch], k=_BATCH))
        size = self.config.model.cache.chunk_frames
        first, end = (plan.chunks - _LEARNT_CHUNKS) * size, plan.chunks * size
        truth = self.videos.latents[rows, :, :end].float().to(self.model.device)
        made = self._streams(rows, truth[:, :, : plan.given * size], plan, generator)
        weight = cell_weight(self.videos.foreground[rows, first:end].to(self.model.device))
        error = (made - truth)[:, :, first:].square().mean(1)
        loss = (error * weight).mean() / sigmas[plan.exit_step]
        return loss, {
            "exit_step": float(plan.exit_step),
            "given": float(plan.given),
            "chunks": float(plan.chunks),
        }

    def _streams(self, rows: Tensor, given: Tensor, plan: StreamPlan, generator: torch.Generator) -> Tensor:
        """Latents [B, C, F, h, w] of streams that begin with `given`, the last chunks with a graph."""
        data, engine, device = self.videos, self.config.model, self.model.device
        is_open = torch.rand(len(rows), generator=generator) < _OPEN_SHARE
        turns = told_turns(data.values[rows, is_open.long()], generator)
        shape = (*given.shape[:2], engine.cache.chunk_frames, *given.shape[3:])

        def noise(chunk: int, step: int) -> Tensor:
            drawn = torch.randn(shape, generator=generator)
            if chunk == 0 and step == 0:
                drawn = telling_noise(drawn, data.places[rows], turns)
            return drawn.to(device)

        def text_of(texts: Tensor) -> TextKeysValues:
            return self.model.text_keys_values(data.texts[texts].float().to(device))

        with fast_autocast(device):
            first = text_of(data.text_rows[rows, 0, is_open.long()])
            last, switch = first, None
            if plan.switch:
                last = text_of(data.text_rows[rows, -1, 0])
                switch = PromptSwitch(first, plan.switch, plan.recached)
            exits = (plan.exit_step,) * plan.chunks
            rollout = RolloutConfig(len(exits), len(exits), _LEARNT_CHUNKS)
            return self_forced_rollout(self.model, engine, last, noise, exits, rollout, switch, given).float()


def _rows_by_switch(videos: LatentDataset) -> list[list[int]]:
    """The videos of which another scene follows before each chunk; at 0 those of one scene."""
    scenes = videos.text_rows[:, :, 0]
    changes = scenes != scenes[:, :1]
    first = torch.where(changes.any(1), changes.int().argmax(1), 0)
    return [torch.nonzero(first == chunk).flatten().tolist() for chunk in range(scenes.shape[1])]
