"""The stages of training: what one step of each draws and learns.

Every draw is keyed by (seed, step, pass), the passes of a step being counted over all ranks. So a run that
stops and resumes equals one that never stopped, and any number of ranks that share the passes evenly makes
the same steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from rfengine.models.dit import WanDiT
from rfengine.schedule import FlowSchedule, add_noise, shifted
from rfengine.training.arithmetic import casting
from rfengine.training.config import TrainConfig
from rfengine.training.learner import Figures, Learner, WeightAverage
from rfengine.training.parallel import Ranks

Drawn = TypeVar("Drawn", covariant=True)


class Source(Protocol[Drawn]):
    """Where a stage draws what it learns from."""

    def draw(self, count: int, generator: torch.Generator) -> tuple[Drawn, Tensor]:
        """`count` samples and their text states [count, L, D].

        Samples are texts, clean latents [count, C, F, h, w] with a text or the empty one, or trajectories of
        a teacher [count, steps + 1, C, F, h, w], whose last state is clean.
        """


def seeded(device: torch.device, *key: int | str) -> torch.Generator:
    """A generator whose numbers follow from the key alone."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class TrainingStage:
    """What a training trains, by the names of its learners, and one step of it."""

    def __init__(self, learners: Sequence[Learner], averages: Mapping[str, WeightAverage]) -> None:
        self.models = {learner.name: learner.model for learner in learners}
        self.optimizers = {learner.name: learner.optimizers for learner in learners}
        self.averages = averages

    def update(self, step: int) -> Figures:
        """Run step `step`, counted from 0; returns what to log of it."""
        raise NotImplementedError


class ModelStage(TrainingStage):
    """A stage that trains one model, by the loss that a subclass defines; its moving average follows every
    step. average_decay: 0 leaves the average equal to the weights."""

    def __init__(self, learner: Learner, average_decay: float) -> None:
        self.model, self._learner = learner.model, learner
        self._average = WeightAverage(learner.model, average_decay)
        super().__init__((learner,), {learner.name: self._average})

    def update(self, step: int) -> Figures:
        figures = self._learner.learn(step, lambda index: self.loss(step, index))
        self._average.update(self.model, step)
        return figures

    def loss(self, step: int, index: int) -> tuple[Tensor, Figures]:
        """The loss of pass `index` of a step, and what to log beside it. All draws depend on both alone."""
        raise NotImplementedError


class TeacherStage(ModelStage):
    """teacher: flow matching of a bidirectional model on whole clips, one noise level a clip."""

    def __init__(self, config: TrainConfig, model: WanDiT, clips: Source[Tensor], ranks: Ranks) -> None:
        self.config, self.clips = config, clips
        learner = Learner("teacher", model, config.optimizer, config.steps, config.accumulation, ranks)
        super().__init__(learner, config.average_decay)

    def loss(self, step: int, index: int) -> tuple[Tensor, Figures]:
        config, device = self.config, self.model.device
        own = seeded(torch.device("cpu"), config.seed, "teacher", step, index)
        clean, states = (part.to(device) for part in self.clips.draw(config.batch, own))
        uniform = torch.rand(config.batch, generator=own)
        sigma = shifted(uniform, config.engine.schedule.shift).to(device)
        noise = torch.randn(clean.shape, generator=own).to(device)
        x_t = add_noise(clean, noise, sigma.view(-1, 1, 1, 1, 1))
        with casting(device, config.precision, config.keeps_casts):
            timesteps = config.engine.schedule.num_train_timesteps * sigma
            flow = self.model.forward_clip(x_t, timesteps, states)
        return (flow.float() - (noise - clean)).square().mean(), {}


class TrajectoryStage(ModelStage):
    """ode-init: the causal student learns where the teacher's trajectory ends from each of its own steps.

    Each chunk of a clip is at a step of its own; chunks see the noisy chunks before them under the causal
    mask, as in the published ODE initialisation. The labels are the student's own timesteps, and the
    trajectories must have been made by the same schedule.
    """

    def __init__(
        self, config: TrainConfig, model: WanDiT, trajectories: Source[Tensor], ranks: Ranks
    ) -> None:
        self.config, self.trajectories = config, trajectories
        self._schedule = FlowSchedule(config.engine.schedule)
        learner = Learner("student", model, config.optimizer, config.steps, config.accumulation, ranks)
        super().__init__(learner, config.average_decay)

    def loss(self, step: int, index: int) -> tuple[Tensor, Figures]:
        config, device = self.config, self.model.device
        own = seeded(torch.device("cpu"), config.seed, "ode-init", step, index)
        states, texts = (part.to(device) for part in self.trajectories.draw(config.batch, own))
        size, steps = config.engine.cache.chunk_frames, len(self._schedule.denoising_timesteps)
        chunks = states.shape[3] // size
        drawn = torch.randint(steps, (config.batch, chunks), generator=own).to(device)
        rows = drawn.repeat_interleave(size, 1)
        x_t = states.gather(1, rows[:, None, None, :, None, None].expand(-1, 1, *states.shape[2:])).squeeze(1)
        sigma = torch.tensor(self._schedule.denoising_sigmas, device=device)[rows]
        timesteps = torch.tensor(self._schedule.denoising_timesteps, device=device)[rows]
        with casting(device, config.precision, config.keeps_casts):
            flow = self.model.forward_clip(x_t, timesteps, texts, mask=causal_mask(chunks, x_t, config))
        x0 = x_t - sigma[:, None, :, None, None] * flow.float()
        return (x0 - states[:, -1]).square().mean(), {}


def causal_mask(chunks: int, latents: Tensor, config: TrainConfig) -> Tensor:
    """bool [T, T]: every chunk sees itself, the sink and the chunks of its window before it."""
    cache, size = config.engine.cache, config.engine.cache.chunk_frames
    patch = config.engine.model.patch_size[1]
    tokens = (latents.shape[3] // patch) * (latents.shape[4] // patch)
    frames = torch.arange(chunks * size)
    end, seen = (frames // size + 1)[:, None] * size, frames[None, :]
    visible = (seen < end) & ((seen >= end - cache.past_frames) | (seen < cache.sink_frames))
    return visible.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1).to(latents.device)
