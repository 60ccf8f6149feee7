"""A student, a teacher and a critic with random weights, small enough to train in a test."""

from __future__ import annotations

import torch

from rfengine.config import CacheConfig, EngineConfig, ScheduleConfig, TextConfig, VAEConfig
from rfengine.models.vae import WanVAE
from rfengine.training.distillation import DistillationConfig, DistillationModels
from rfengine.training.ops import DifferentiableOps
from support.models import SMALL, small_model, text_states

ENGINE = EngineConfig(
    name="small",
    model=SMALL,
    vae=VAEConfig(
        base_dim=4,
        z_dim=4,
        dim_mult=(1, 1, 2, 2),
        num_res_blocks=1,
        latents_mean=(0.0,) * 4,
        latents_std=(1.0,) * 4,
    ),
    text=TextConfig(dim=16, attention_dim=16, num_heads=2),
    cache=CacheConfig(alpha=0.8),
    schedule=ScheduleConfig(denoising_steps=(1000, 500)),
    height=32,
    width=48,
)
PLAIN = DistillationConfig(clip_frames=9, guidance=0.0, first_latent="given")


def distillation_models() -> DistillationModels:
    student = small_model(seed=0)
    ops = DifferentiableOps(student.ops.choice)
    for module in student.modules():
        if hasattr(module, "ops"):
            module.ops = ops
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = WanVAE(ENGINE.vae).eval().requires_grad_(False)
    teacher = small_model(seed=1).requires_grad_(False)
    return DistillationModels(student, teacher, small_model(seed=2), vae, text_states(3))
