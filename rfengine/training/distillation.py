"""Distillation: DMD and Re-DMD, from batches of prompts to updates of a student and its critic.

The student's rollout is compared with the frozen bidirectional teacher and with the critic, a bidirectional
model that follows the student's own distribution (re_dmd.py has the formulas). B samples, C latent channels,
F latent frames, T pixel frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rfengine.models.dit import WanDiT
from rfengine.models.vae import WanVAE
from rfengine.schedule import add_noise
from rfengine.training.arithmetic import casting
from rfengine.training.config import TrainConfig
from rfengine.training.learner import Figures, Learner, WeightAverage
from rfengine.training.memory import on_device
from rfengine.training.parallel import Ranks
from rfengine.training.re_dmd import (
    critic_loss,
    distribution_loss,
    dmd_gradient,
    draw_sigmas,
    guided,
    reward_weights,
    x0_from_flow,
)
from rfengine.training.rollout import (
    PromptSwitch,
    decode_chunks,
    draw_exits,
    draw_switch,
    latent_shape,
    self_forced_rollout,
)
from rfengine.training.stages import Source, TrainingStage, seeded

# of frames [B, T, H, W, 3] from 0 to 1 and their prompts: the score [B] that is trained on, and all by name
Score = Callable[[Tensor, Sequence[str]], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """B prompts, several samples of a prompt being one group: texts, states [B, L, D], groups [B]
    integers. earlier_states: of the prompts that a rollout begins with where it switches, None where
    none does."""

    texts: tuple[str, ...]
    states: Tensor
    groups: Tensor
    earlier_states: Tensor | None = None


@dataclass(frozen=True, slots=True)
class DistillationModels:
    """student: causal, with DifferentiableOps; teacher: frozen, on the student's device or on the CPU, from
    where it comes for each use; critic: trained beside the student.

    negative_states: [1, L, D], the text that guidance leads away from. vae is frozen and only decodes for a
    reward, and re-encodes the frame before a late window.
    """

    student: WanDiT
    teacher: WanDiT
    critic: WanDiT
    vae: WanVAE
    negative_states: Tensor


class DistillationStage(TrainingStage):
    """dmd and re-dmd: the critic learns in every step, the student in every critic_updates-th.

    score: of re-dmd, None for dmd. The losses draw from two generators: `shared`, which all ranks seed alike,
    so that they run the same passes, and `own`, which each rank seeds for itself.
    """

    def __init__(
        self,
        config: TrainConfig,
        models: DistillationModels,
        prompts: Source[list[str]],
        ranks: Ranks,
        score: Score | None = None,
    ) -> None:
        self.config, self.networks, self.prompts, self.score = config, models, prompts, score
        self.engine, self.distillation = config.engine, config.distillation
        updates, passes = max(1, config.steps // config.critic_updates), config.accumulation
        self._student = Learner("student", models.student, config.optimizer, updates, passes, ranks)
        self._critic = Learner("critic", models.critic, config.critic_optimizer, config.steps, passes, ranks)
        self._average = WeightAverage(models.student, config.average_decay)
        super().__init__((self._student, self._critic), {"student": self._average})

    def update(self, step: int) -> Figures:
        def loss_of_critic(index: int) -> tuple[Tensor, Figures]:
            return self.critic_loss(*self._batch("critic", step, index)), {}

        def loss_of_student(index: int) -> tuple[Tensor, Figures]:
            return self.student_loss(*self._batch("student", step, index))

        figures = self._critic.learn(step, loss_of_critic)
        if (step + 1) % self.config.critic_updates:
            return figures
        number = step // self.config.critic_updates
        figures |= self._student.learn(number, loss_of_student)
        if step >= self.config.average_start:
            self._average.update(self._student.model, number)
        else:
            self._average.follow(self._student.model)
        return figures

    def _batch(
        self, purpose: str, step: int, index: int
    ) -> tuple[PromptBatch, torch.Generator, torch.Generator]:
        """Prompts of one pass, the generator that all passes of a step share and the pass's own."""
        config, cpu, device = self.config, torch.device("cpu"), self.networks.student.device
        drawing = seeded(cpu, config.seed, purpose, "prompts", step, index)
        texts, states = self.prompts.draw(config.batch // config.group, drawing)
        groups = torch.arange(len(texts), device=device).repeat_interleave(config.group)
        repeated = tuple(text for text in texts for _ in range(config.group))
        earlier = None
        if config.rollout.switch_share:
            _, drawn = self.prompts.draw(len(texts), drawing)
            earlier = drawn.to(device).repeat_interleave(config.group, 0)
        states = states.to(device).repeat_interleave(config.group, 0)
        batch = PromptBatch(repeated, states, groups, earlier)
        shared = seeded(cpu, config.seed, purpose, "plan", step)
        return batch, shared, seeded(device, config.seed, purpose, step, index)

    def student_loss(
        self, prompts: PromptBatch, shared: torch.Generator, own: torch.Generator
    ) -> tuple[Tensor, Figures]:
        """Roll out with gradient, and compare with teacher and critic at a random noise level.

        Returns the loss and what to log: `distance`, the unweighted DMD loss, a proxy of the divergence from
        the teacher, and with a reward `score`, `largest_weight` and the mean of each of its scores.
        """
        latents = self._roll_out(prompts, shared, own)
        clip, learns = self._judged_clip(latents)
        sigma = draw_sigmas(len(prompts.texts), self.engine.schedule.shift, own)
        with torch.no_grad():
            gradient = self._score_difference(clip, sigma, prompts.states, own)
            gradient = torch.where(learns, gradient, 0.0)
            weights, figures = self._reward(latents, prompts)
        figures["distance"] = float(distribution_loss(clip.detach(), gradient))
        return distribution_loss(clip, gradient, weights), figures

    def critic_loss(self, prompts: PromptBatch, shared: torch.Generator, own: torch.Generator) -> Tensor:
        """Flow matching of the critic on samples of the student as it is now."""
        with torch.no_grad():
            clip, _ = self._judged_clip(self._roll_out(prompts, shared, own))
        sigma = draw_sigmas(len(prompts.texts), self.engine.schedule.shift, own)
        noise = torch.randn(clip.shape, generator=own, device=clip.device)
        x_t = add_noise(clip, noise, sigma.view(-1, 1, 1, 1, 1))
        return critic_loss(self._flow(self.networks.critic, x_t, sigma, prompts.states), noise, clip)

    def _roll_out(self, prompts: PromptBatch, shared: torch.Generator, own: torch.Generator) -> Tensor:
        """Latents [B, C, F, h, w] of a rollout whose length and whose prompt switch are drawn."""
        student, engine, rollout = self.networks.student, self.engine, self.config.rollout
        exits = draw_exits(rollout, len(engine.schedule.denoising_steps), shared)
        judged = -(-self.distillation.clip_frames // engine.cache.chunk_frames)
        drawn = draw_switch(
            rollout, len(exits), judged, engine.cache.window_frames // engine.cache.chunk_frames, shared
        )
        shape = latent_shape(engine, len(prompts.texts), engine.cache.chunk_frames)

        def noise(chunk: int, step: int) -> Tensor:
            return torch.randn(shape, generator=own, device=student.device)

        with casting(student.device, self.config.precision, self.config.keeps_casts):
            text, switch = student.text_keys_values(prompts.states), None
            if drawn is not None:
                with torch.no_grad():
                    earlier = student.text_keys_values(prompts.earlier_states)
                switch = PromptSwitch(earlier, *drawn)
            return self_forced_rollout(student, engine, text, noise, exits, rollout, switch)

    def _judged_clip(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The latents [B, C, F, h, w] the teacher sees, and where in them, bool [1, 1, F, 1, 1], they are
        the student's."""
        clip = latents[:, :, -self.distillation.clip_frames :]
        learns = torch.ones(1, 1, clip.shape[2], 1, 1, dtype=torch.bool, device=clip.device)
        start = latents.shape[2] - clip.shape[2]
        if start == 0 or self.distillation.first_latent == "given":
            return clip, learns
        learns[:, :, : self.engine.cache.chunk_frames] = False  # its chunk shares the latent that is replaced
        with torch.no_grad():  # the last pixel frame before the clip, encoded as the first of a video
            pixels = self._decoded(latents[:, :, : start + 1])[:, :, -1:]
            first = self.networks.vae.encode(pixels.clamp(-1, 1))
        return torch.cat([first.to(clip.dtype), clip[:, :, 1:]], dim=2), learns

    def _decoded(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, T, H, W], not clamped, of latents from the start of a video."""
        pieces = latents.detach().split(self.engine.cache.chunk_frames, dim=2)
        return torch.cat(list(decode_chunks(self.networks.vae, iter(pieces))), dim=2)

    def _score_difference(self, clip: Tensor, sigma: Tensor, states: Tensor, own: torch.Generator) -> Tensor:
        """dmd_gradient of the clip: critic minus guided teacher, both at the same noise."""
        models, guidance, clip = self.networks, self.distillation.guidance, clip.detach()
        noise = torch.randn(clip.shape, generator=own, device=clip.device)
        x_t = add_noise(clip, noise, sigma.view(-1, 1, 1, 1, 1))

        def predicted(model: WanDiT, text: Tensor) -> Tensor:
            return x0_from_flow(x_t, self._flow(model, x_t, sigma, text), sigma)

        with on_device(models.teacher, clip.device):
            teacher = predicted(models.teacher, states)
            if guidance:
                unconditional = predicted(models.teacher, models.negative_states.expand(len(states), -1, -1))
                teacher = guided(teacher, unconditional, guidance)
        return dmd_gradient(clip, predicted(models.critic, states), teacher)

    def _flow(self, model: WanDiT, x_t: Tensor, sigma: Tensor, states: Tensor) -> Tensor:
        with casting(self.networks.student.device, self.config.precision, self.config.keeps_casts):
            return model.forward_clip(x_t, self.engine.schedule.num_train_timesteps * sigma, states)

    def _reward(self, latents: Tensor, prompts: PromptBatch) -> tuple[Tensor | None, Figures]:
        """Weights [B] by the scores of the judged latents, None for plain DMD, and what to log of them."""
        if self.score is None:
            return None, {}
        judged = self.distillation.clip_frames * self.engine.vae.temporal_stride
        pixels = self._decoded(latents)[:, :, -judged:]
        frames = ((pixels.float().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 4, 1)
        score, parts = self.score(frames, prompts.texts)
        weights = reward_weights(score, prompts.groups, self.distillation.beta)
        means = {name: float(part.mean()) for name, part in (parts | {"score": score}).items()}
        return weights, means | {"largest_weight": float(weights.max())}
