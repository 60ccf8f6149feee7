"""Makes the student out of the teacher: few steps first, then distillation over its own streams.

The start has the teacher's weights. What a text leaves open, and where a shape begins, is decided in the
first chunk, where four steps of the teacher would blend what is possible; so there the student learns the
ends of the teacher's trajectories. All later chunks follow from what came before, and go on as the teacher
learnt them, at the student's own noise levels.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from recipes.tiny.muon import Muon
from recipes.tiny.training import StageConfig, ToyModel
from recipes.tiny.transformer import (
    LATE,
    OPENING,
    ChunkedAttentionOps,
    chunk_tokens,
    draw_batch,
    flow_loss,
)
from rfengine.models.dit import WanDiT
from rfengine.schedule import FlowSchedule
from rfengine.toy.data import LatentDataset, ToyPrompts, negative_states
from rfengine.training.arithmetic import fast_autocast, fast_precision
from rfengine.training.build import base_engine, build_stage
from rfengine.training.checkpoints import locked_run
from rfengine.training.config import AdamConfig, TrainConfig
from rfengine.training.learner import Figures, Learner
from rfengine.training.parallel import Ranks
from rfengine.training.recipes import toy_dmd
from rfengine.training.rollout import latent_shape
from rfengine.training.samples import averaged_state
from rfengine.training.stages import ModelStage, Source
from rfengine.training.trainer import Trainer
from rfengine.training.trajectories import follow_flow

_BATCH = 16
_TRAJECTORY_BATCH = 64
_SUBSTEPS = 6  # Euler steps for each step of the student
GUIDANCE = 0.0
_MUON_RATE = 0.004
_ADAM = AdamConfig(4e-4, betas=(0.9, 0.98), weight_decay=0.0, clip=1.0, warm_up=50, fall=0.7)
_TRAJECTORY_SHARE = 0.5  # of the passes


def first_chunks(teacher: ToyModel, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Trajectories [n, K + 1, C, F, h, w] of first chunks, and their text states, batch by batch."""
    engine, generator = teacher.config, torch.Generator().manual_seed(seed)
    prompts = ToyPrompts(teacher.encode)
    empty = negative_states(engine.model.text_len, engine.model.text_dim)
    for first in tqdm(range(0, count, _TRAJECTORY_BATCH), "trajectories", unit="batch", disable=None):
        number = min(_TRAJECTORY_BATCH, count - first)
        _, states = prompts.draw(number, generator)
        noise = torch.randn(latent_shape(engine, number, engine.cache.chunk_frames), generator=generator)
        device = teacher.transformer.device
        noise, said, empty = (part.to(device) for part in (noise, states, empty))
        with fast_autocast(device):
            found = follow_flow(teacher.transformer, engine.schedule, noise, said, empty, GUIDANCE, _SUBSTEPS)
        yield found, states


class StartStage(ModelStage):
    """The student before distillation, from the teacher's weights; see the module."""

    def __init__(
        self,
        config: StageConfig,
        teacher: WanDiT,
        trajectories: Source[Tensor],
        videos: LatentDataset,
        ranks: Ranks,
    ) -> None:
        torch.manual_seed(config.seed)
        model = WanDiT(config.model.model, ChunkedAttentionOps(chunk_tokens(config.model)))
        model.load_state_dict(teacher.state_dict())
        model = model.to(teacher.device)
        matrices = [value for value in model.blocks.parameters() if value.ndim == 2]
        learner = Learner("start", model, _ADAM, config.steps, 1, ranks, Muon(matrices, lr=_MUON_RATE))
        super().__init__(learner, average_decay=0.99)
        self.config, self.trajectories, self.videos = config, trajectories, videos
        self._schedule = FlowSchedule(config.model.schedule)

    def loss(self, step: int, index: int) -> tuple[Tensor, Figures]:
        choices = random.Random(self.config.pass_seed(step, index))
        generator = torch.Generator().manual_seed(self.config.pass_seed(step, index))
        if choices.random() < _TRAJECTORY_SHARE:
            loss = self._trajectory_loss(generator)
            return loss, {"first_chunk": 1.0, "trajectory_loss": float(loss.detach())}
        layout = choices.choice((OPENING, LATE))
        engine = self.config.model
        batch = draw_batch(self.videos, _BATCH, layout, engine.cache.chunk_frames, choices)
        sigmas = torch.tensor(self._schedule.denoising_sigmas)
        levels = sigmas[torch.randint(len(sigmas), (_BATCH, len(layout)), generator=generator)]
        return flow_loss(self.model, engine, batch, layout, levels, generator), {"first_chunk": 0.0}

    def _trajectory_loss(self, generator: torch.Generator) -> Tensor:
        """Squared error of the end of a trajectory, as predicted from one of the student's steps."""
        device = self.model.device
        states, texts = (part.to(device) for part in self.trajectories.draw(_BATCH, generator))
        steps = torch.randint(len(self._schedule.denoising_sigmas), (_BATCH,), generator=generator)
        x_t, end = states[torch.arange(_BATCH), steps], states[:, -1]
        sigma = torch.tensor(self._schedule.denoising_sigmas)[steps].view(-1, 1, 1, 1, 1).to(device)
        timesteps = torch.tensor(self._schedule.denoising_timesteps)[steps].to(device)
        self.model.ops.texts = None
        with fast_autocast(device):
            flow = self.model.forward_clip(x_t, timesteps, texts)
        return (x_t - sigma * flow.float() - end).square().mean()


def student_config(teacher: Path, start: Path, steps: int, seed: int, device: torch.device) -> TrainConfig:
    """The distillation: toy_dmd over streams of up to twenty chunks, with prompt switches on the way.

    teacher: a checkpoint directory, whose transformer judges and whose other parts are used as they are.
    start: that of the student's first weights.
    """
    engine = base_engine(str(teacher))
    return replace(
        toy_dmd(engine, str(teacher)),
        steps=steps,
        student=str(start),
        base=str(teacher),
        precision=fast_precision(device),
        seed=seed,
    )


def train_student(
    config: TrainConfig, directory: Path, ranks: Ranks, device: torch.device
) -> dict[str, Tensor]:
    """Train in `directory`, from the newest checkpoint there; returns the averaged weights. Raises
    KeyboardInterrupt after a signal: the same call continues."""
    with locked_run(directory):
        stage = build_stage(config, device, ranks)
        Trainer(config, stage, directory, ranks).finish("with the same command")
    return averaged_state(stage)
