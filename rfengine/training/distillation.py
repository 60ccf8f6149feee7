"""Distillation: what the student and the critic learn from one batch of prompts, without any optimizer.

The student's rollout is compared with the frozen bidirectional teacher and with the critic, a bidirectional
model that follows the student's own distribution (re_dmd.py has the formulas). B samples, C
latent channels, F latent frames, T pixel frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from rfengine.config import EngineConfig
from rfengine.limits import Range, check_fields
from rfengine.models.dit import WanDiT
from rfengine.models.vae import WanVAE
from rfengine.schedule import add_noise
from rfengine.training.arithmetic import Precision, casting
from rfengine.training.memory import on_device
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
    Rollout,
    RolloutConfig,
    RolloutPlan,
    decode_chunks,
    draw_plan,
    self_forced_rollout,
)

Score = Callable[[Tensor, Sequence[str]], Tensor]  # frames [B, T, H, W, 3] from 0 to 1, prompts: [B]


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """B prompts, several samples of a prompt being one group: texts, states [B, L, D], groups [B]
    integers."""

    texts: tuple[str, ...]
    states: Tensor
    groups: Tensor


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


@dataclass(frozen=True, slots=True)
class DistillationConfig:
    """clip_frames: latent frames the teacher was trained on; a rollout's last ones are judged. guidance: of
    the teacher, 0 is none. beta: the reward's temperature, None for plain DMD.

    first_latent: what the judged clip begins with where the rollout is longer. "given" takes it as it is,
    for a teacher that was trained on clips from the middle of videos; "encoded" puts the encoded last pixel
    frame before the clip in place of the clip's first latent, since a published teacher has only seen first
    latents that stand for one frame.
    """

    clip_frames: Annotated[int, Range(1, 4096)] = 21
    guidance: Annotated[float, Range(0, 1000)] = 3.0
    beta: Annotated[float | None, Range(1e-6, 1e6)] = None
    first_latent: Literal["given", "encoded"] = "encoded"

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True)
class StudentLoss:
    """loss: to call backward on. distance: the unweighted DMD loss, a proxy of the divergence from the
    teacher.

    scores, weights: [B] of the reward, None for plain DMD. frames: what the reward saw, for other scores.
    """

    loss: Tensor
    distance: Tensor
    scores: Tensor | None
    weights: Tensor | None
    frames: Tensor | None


class Distillation:
    """The losses of one student. Draws come from two generators: `shared`, which all ranks seed alike, so
    that they run the same passes, and `own`, which each rank seeds for itself."""

    def __init__(
        self,
        engine: EngineConfig,
        models: DistillationModels,
        config: DistillationConfig,
        rollout: RolloutConfig,
        score: Score | None = None,
        precision: Precision = "float32",
    ) -> None:
        if (config.beta is None) != (score is None):
            raise ValueError(
                f"beta is {config.beta} and there is {'a' if score else 'no'} reward; "
                "Re-DMD needs both, DMD neither"
            )
        needed = -(-config.clip_frames // engine.cache.chunk_frames)
        if rollout.gradient_chunks > needed:
            raise ValueError(
                f"gradient_chunks is {rollout.gradient_chunks}, but the clip that is judged has {needed} "
                "chunks; gradients from before it would be zero"
            )
        self.engine, self.models, self.config, self.rollout = engine, models, config, rollout
        self.score, self.precision = score, precision

    def student_loss(
        self, prompts: PromptBatch, shared: torch.Generator, own: torch.Generator
    ) -> StudentLoss:
        """Roll out with gradient, and compare with teacher and critic at a random noise level."""
        plan = self._plan(shared)
        result = self._roll_out(prompts, plan, own)
        clip, learns = self._judged_clip(result)
        sigma = draw_sigmas(len(prompts.texts), self.engine.schedule.shift, own)
        with torch.no_grad():
            gradient = self._score_difference(clip, sigma, prompts.states, own)
            gradient = torch.where(learns, gradient, 0.0)
            frames, scores, weights = self._reward(result, prompts)
        loss = distribution_loss(clip, gradient, weights)
        distance = distribution_loss(clip.detach(), gradient)
        return StudentLoss(loss, distance, scores, weights, frames)

    def critic_loss(self, prompts: PromptBatch, shared: torch.Generator, own: torch.Generator) -> Tensor:
        """Flow matching of the critic on samples of the student as it is now."""
        with torch.no_grad():
            clip, _ = self._judged_clip(self._roll_out(prompts, self._plan(shared), own))
        sigma = draw_sigmas(len(prompts.texts), self.engine.schedule.shift, own)
        noise = torch.randn(clip.shape, generator=own, device=clip.device)
        x_t = add_noise(clip, noise, sigma.view(-1, 1, 1, 1, 1))
        return critic_loss(self._flow(self.models.critic, x_t, sigma, prompts.states), noise, clip)

    def _plan(self, shared: torch.Generator) -> RolloutPlan:
        return draw_plan(self.rollout, len(self.engine.schedule.denoising_steps), shared)

    def _roll_out(self, prompts: PromptBatch, plan: RolloutPlan, own: torch.Generator) -> Rollout:
        student, engine = self.models.student, self.engine
        frames, stride = engine.cache.chunk_frames, engine.vae.spatial_stride
        shape = (
            len(prompts.texts),
            engine.model.in_dim,
            frames,
            engine.height // stride,
            engine.width // stride,
        )

        def noise(chunk: int, step: int) -> Tensor:
            return torch.randn(shape, generator=own, device=student.device)

        with casting(self.models.student.device, self.precision):
            text = student.text_keys_values(prompts.states)
            return self_forced_rollout(student, engine, text, noise, plan, self.rollout)

    def _judged_clip(self, result: Rollout) -> tuple[Tensor, Tensor]:
        """The latents [B, C, F, h, w] the teacher sees, and where in them, bool [1, 1, F, 1, 1], they are
        the student's."""
        latents, frames = result.latents, self.config.clip_frames
        clip = latents[:, :, -frames:]
        learns = torch.ones(1, 1, clip.shape[2], 1, 1, dtype=torch.bool, device=clip.device)
        start = latents.shape[2] - clip.shape[2]
        if start == 0 or self.config.first_latent == "given":
            return clip, learns
        learns[:, :, : self.engine.cache.chunk_frames] = False  # its chunk shares the latent that is replaced
        with torch.no_grad():
            first = self._encoded_frame(latents[:, :, : start + 1])
        return torch.cat([first.to(clip.dtype), clip[:, :, 1:]], dim=2), learns

    def _encoded_frame(self, latents: Tensor) -> Tensor:
        """The last pixel frame of what `latents` show, encoded as the first of a video: [B, C, 1, h, w]."""
        vae, size = self.models.vae, self.engine.cache.chunk_frames
        *_, pixels = decode_chunks(vae, iter(latents.detach().split(size, dim=2)))
        return vae.encode(pixels[:, :, -1:].clamp(-1, 1))

    def _score_difference(self, clip: Tensor, sigma: Tensor, states: Tensor, own: torch.Generator) -> Tensor:
        """dmd_gradient of the clip: critic minus guided teacher, both at the same noise."""
        models, clip = self.models, clip.detach()
        noise = torch.randn(clip.shape, generator=own, device=clip.device)
        x_t = add_noise(clip, noise, sigma.view(-1, 1, 1, 1, 1))

        def predicted(model: WanDiT, text: Tensor) -> Tensor:
            return x0_from_flow(x_t, self._flow(model, x_t, sigma, text), sigma)

        with on_device(models.teacher, clip.device):
            teacher = predicted(models.teacher, states)
            if self.config.guidance:
                unconditional = predicted(models.teacher, models.negative_states.expand(len(states), -1, -1))
                teacher = guided(teacher, unconditional, self.config.guidance)
        return dmd_gradient(clip, predicted(models.critic, states), teacher)

    def _flow(self, model: WanDiT, x_t: Tensor, sigma: Tensor, states: Tensor) -> Tensor:
        with casting(self.models.student.device, self.precision):
            return model.forward_clip(x_t, self.engine.schedule.num_train_timesteps * sigma, states)

    def _reward(
        self, result: Rollout, prompts: PromptBatch
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Frames of the judged latents, their scores and the weights that follow."""
        if self.score is None:
            return None, None, None
        size = self.engine.cache.chunk_frames
        pieces = decode_chunks(self.models.vae, iter(result.latents.detach().split(size, dim=2)))
        pixels = torch.cat(list(pieces), dim=2)
        judged = self.config.clip_frames * self.engine.vae.temporal_stride
        frames = ((pixels[:, :, -judged:].float().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 4, 1)
        scores = self.score(frames, prompts.texts)
        weights = reward_weights(scores, prompts.groups, self.config.beta)
        return frames, scores, weights
