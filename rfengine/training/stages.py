"""The stages of training: what one step of each draws and learns.

Every draw is keyed by (seed, step, pass), the passes of a step being counted over all ranks. So a run that
stops and resumes equals one that never stopped, and any number of ranks that share the passes evenly makes
the same steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from rfengine.models.dit import WanDiT
from rfengine.schedule import FlowSchedule, add_noise, shifted
from rfengine.training.arithmetic import casting
from rfengine.training.config import TrainConfig
from rfengine.training.distillation import Distillation, PromptBatch, StudentLoss
from rfengine.training.learner import Figures, Learner, WeightAverage
from rfengine.training.parallel import Ranks


class Prompts(Protocol):
    """A source of prompts."""

    def draw(self, count: int, generator: torch.Generator) -> tuple[list[str], Tensor]:
        """`count` texts and their states [count, L, D]."""


class Clips(Protocol):
    """A source of training videos as latents."""

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Clean latents [count, C, F, h, w] and text states [count, L, D]; a text may be the empty one."""


class Trajectories(Protocol):
    """A source of the teacher's trajectories."""

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """States [count, steps + 1, C, F, h, w], the last one clean, and text states [count, L, D]."""


class TrainingStage(Protocol):
    """One stage: what it trains, and one step of it."""

    models: Mapping[str, nn.Module]
    optimizers: Mapping[str, Sequence[torch.optim.Optimizer]]
    averages: Mapping[str, WeightAverage]

    def update(self, step: int) -> Figures:
        """Run step `step`, counted from 0; returns what to log of it."""


def seeded(device: torch.device, *key: int | str) -> torch.Generator:
    """A generator whose numbers follow from the key alone."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class ModelStage:
    """A stage that trains one model, by the loss that a subclass defines; its moving average follows every
    step. average_decay: 0 leaves the average equal to the weights."""

    def __init__(self, learner: Learner, average_decay: float) -> None:
        name, model = learner.name, learner.model
        self.model, self._learner, self._average = model, learner, WeightAverage(model, average_decay)
        self.models, self.optimizers = {name: model}, {name: learner.optimizers}
        self.averages = {name: self._average}

    def update(self, step: int) -> Figures:
        figures = self._learner.learn(step, lambda index: self.loss(step, index))
        self._average.update(self.model, step)
        return figures

    def loss(self, step: int, index: int) -> tuple[Tensor, Figures]:
        """The loss of pass `index` of a step, and what to log beside it. All draws depend on both alone."""
        raise NotImplementedError


class DistillationStage:
    """dmd and re-dmd: the critic learns in every step, the student in every critic_updates-th."""

    def __init__(
        self,
        config: TrainConfig,
        distillation: Distillation,
        prompts: Prompts,
        ranks: Ranks,
        watch: Callable[[StudentLoss, PromptBatch], Figures] | None = None,
    ) -> None:
        self.config, self.distillation, self.prompts, self.ranks = config, distillation, prompts, ranks
        self._watch = watch
        models = distillation.models
        updates, passes = max(1, config.steps // config.critic_updates), config.accumulation
        self._student = Learner("student", models.student, config.optimizer, updates, passes, ranks)
        self._critic = Learner("critic", models.critic, config.critic_optimizer, config.steps, passes, ranks)
        self.models = {"student": models.student, "critic": models.critic}
        self.optimizers = {"student": self._student.optimizers, "critic": self._critic.optimizers}
        self.averages = {"student": WeightAverage(models.student, config.average_decay)}

    def update(self, step: int) -> Figures:
        figures = self._critic.learn(step, lambda index: self._critic_loss(step, index))
        if (step + 1) % self.config.critic_updates:
            return figures
        number = step // self.config.critic_updates
        figures |= self._student.learn(number, lambda index: self._student_loss(step, index))
        average = self.averages["student"]
        if step >= self.config.average_start:
            average.update(self._student.model, number)
        else:
            average.follow(self._student.model)
        return figures

    def _batch(
        self, purpose: str, step: int, index: int
    ) -> tuple[PromptBatch, torch.Generator, torch.Generator]:
        """Prompts of one pass, the generator that all passes of a step share and the pass's own."""
        config, device = self.config, self.distillation.models.student.device
        own = seeded(device, config.seed, purpose, step, index)
        texts, states = self.prompts.draw(
            config.batch // config.group,
            seeded(torch.device("cpu"), config.seed, purpose, "prompts", step, index),
        )
        groups = torch.arange(len(texts), device=device).repeat_interleave(config.group)
        repeated = tuple(text for text in texts for _ in range(config.group))
        batch = PromptBatch(repeated, states.to(device).repeat_interleave(config.group, 0), groups)
        return batch, seeded(torch.device("cpu"), config.seed, purpose, "plan", step), own

    def _critic_loss(self, step: int, index: int) -> tuple[Tensor, Figures]:
        return self.distillation.critic_loss(*self._batch("critic", step, index)), {}

    def _student_loss(self, step: int, index: int) -> tuple[Tensor, Figures]:
        batch, shared, own = self._batch("student", step, index)
        result = self.distillation.student_loss(batch, shared, own)
        figures = {"distance": float(result.distance)}
        if result.scores is not None:
            figures |= {"score": float(result.scores.mean()), "largest_weight": float(result.weights.max())}
        return result.loss, figures | (self._watch(result, batch) if self._watch is not None else {})


class TeacherStage(ModelStage):
    """teacher: flow matching of a bidirectional model on whole clips, one noise level a clip."""

    def __init__(self, config: TrainConfig, model: WanDiT, clips: Clips, ranks: Ranks) -> None:
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
        with casting(device, config.precision):
            timesteps = config.engine.schedule.num_train_timesteps * sigma
            flow = self.model.forward_clip(x_t, timesteps, states)
        return (flow.float() - (noise - clean)).square().mean(), {}


class TrajectoryStage(ModelStage):
    """ode-init: the causal student learns where the teacher's trajectory ends from each of its own steps.

    Each chunk of a clip is at a step of its own; chunks see the noisy chunks before them under the causal
    mask, as in the published ODE initialisation. The labels are the student's own timesteps, and the
    trajectories must have been made by the same schedule.
    """

    def __init__(self, config: TrainConfig, model: WanDiT, trajectories: Trajectories, ranks: Ranks) -> None:
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
        with casting(device, config.precision):
            flow = self.model.forward_clip(x_t, timesteps, texts, mask=causal_mask(chunks, x_t, config))
        x0 = x_t - sigma[:, None, :, None, None] * flow.float()
        return (x0 - states[:, -1]).square().mean(), {}


def causal_mask(chunks: int, latents: Tensor, config: TrainConfig) -> Tensor:
    """bool [T, T]: every chunk sees itself, the sink and the chunks of its window before it."""
    cache = config.engine.cache
    patch = config.engine.model.patch_size[1]
    tokens = cache.chunk_frames * (latents.shape[3] // patch) * (latents.shape[4] // patch)
    own, seen = torch.arange(chunks)[:, None], torch.arange(chunks)[None, :]
    recent = own - seen < cache.window_chunks - cache.sink_chunks
    visible = (seen <= own) & (recent | (seen < cache.sink_chunks))
    return visible.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1).to(latents.device)
