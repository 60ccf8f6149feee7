"""The recipes: functions that return the TrainConfig of one training."""

from __future__ import annotations

from rfengine.config import PRESETS, EngineConfig
from rfengine.training.distillation import DistillationConfig
from rfengine.training.rollout import RolloutConfig
from rfengine.training.train_config import AdamConfig, TrainConfig

_TOY_FRAMES = 9  # latent frames of the toy teacher's clips: three chunks, 33 pixel frames from the start


def toy_teacher(engine: EngineConfig | None = None, data: str = "runs/toy_study/clips.pt") -> TrainConfig:
    """The bidirectional teacher of the toy world, from the shipped causal weights."""
    return TrainConfig(
        name="toy_teacher",
        stage="teacher",
        engine=engine or PRESETS["tiny"],
        steps=2400,
        batch=16,
        optimizer=AdamConfig(1e-3, betas=(0.9, 0.98), weight_decay=0.01, clip=1.0, warm_up=100, fall=0.5),
        data=data,
        clip_frames=_TOY_FRAMES,
        student="tiny",
        average_decay=0.998,
        precision="bfloat16",
        save_every=200,
    )


def toy_dmd(engine: EngineConfig | None = None, teacher: str = "runs/toy_study/teacher") -> TrainConfig:
    """The toy student by plain DMD: rollouts of three to six chunks, so that up to three leave the window."""
    adam = AdamConfig(2e-4, clip=1.0, warm_up=5)
    return TrainConfig(
        name="toy_dmd",
        stage="dmd",
        engine=engine or PRESETS["tiny"],
        steps=800,
        batch=16,
        group=4,
        optimizer=adam,
        critic_optimizer=AdamConfig(4e-4, clip=1.0, warm_up=20),
        data="toy",
        student="tiny",
        teacher=teacher,
        critic=teacher,
        distillation=DistillationConfig(clip_frames=_TOY_FRAMES, guidance=1.0, first_latent="given"),
        rollout=RolloutConfig(3, 6, 3),
        average_decay=0.95,
        average_start=200,
        precision="bfloat16",
        save_every=50,
    )
