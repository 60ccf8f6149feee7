"""The recipes: functions that return the TrainConfig of one training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from rfengine.config import EngineConfig
from rfengine.presets import PRESETS
from rfengine.prompts import WAN_NEGATIVE_PROMPT
from rfengine.training.config import AdamConfig, DistillationConfig, RolloutConfig, TrainConfig

_TOY_FRAMES = 9  # latent frames of the toy teacher's clips: three chunks, 33 pixel frames from the start
_TOY_TEACHER = "runs/tiny/checkpoint"  # of recipes.tiny


def toy_teacher(engine: EngineConfig | None = None, data: str = "runs/tiny/videos.pt") -> TrainConfig:
    """The bidirectional teacher of the toy world, from the shipped causal weights."""
    return TrainConfig(
        name="toy_teacher",
        stage="teacher",
        engine=engine or PRESETS["tiny"],
        steps=3600,
        batch=16,
        optimizer=AdamConfig(1e-3, betas=(0.9, 0.98), weight_decay=0.01, clip=1.0, warm_up=100, fall=0.5),
        data=data,
        clip_frames=_TOY_FRAMES,
        student="tiny",
        average_decay=0.998,
        precision="bfloat16",
        save_every=200,
    )


def toy_ode_init(engine: EngineConfig | None = None, teacher: str = _TOY_TEACHER) -> TrainConfig:
    """The toy student's first weights: the ends of the teacher's trajectories from each of its own steps."""
    return TrainConfig(
        name="toy_ode_init",
        stage="ode-init",
        engine=engine or PRESETS["tiny"],
        steps=600,
        batch=16,
        optimizer=AdamConfig(5e-4, betas=(0.9, 0.98), clip=1.0, warm_up=50, fall=0.5),
        data="runs/toy_ode_init/trajectories.safetensors",
        clip_frames=_TOY_FRAMES,
        student="tiny",
        teacher=teacher,
        distillation=DistillationConfig(clip_frames=_TOY_FRAMES, guidance=1.0),
        precision="bfloat16",
    )


def toy_dmd(engine: EngineConfig | None = None, teacher: str = _TOY_TEACHER) -> TrainConfig:
    """The toy student by plain DMD: streams of four to twenty chunks, so that it sees what its own errors
    come to, some of them with another prompt before, and first chunks by themselves: the first latent stands
    for one frame and all others for four, and under noise nobody could tell which of them a clip begins with.
    """
    adam = AdamConfig(2e-4, clip=1.0, warm_up=5)
    return TrainConfig(
        name="toy_dmd",
        stage="dmd",
        engine=engine or PRESETS["tiny"],
        steps=600,
        batch=16,
        group=4,
        optimizer=adam,
        critic_optimizer=AdamConfig(4e-4, clip=1.0, warm_up=20),
        data="toy",
        student="tiny",
        teacher=teacher,
        critic=teacher,
        distillation=DistillationConfig(clip_frames=_TOY_FRAMES, guidance=1.0, first_latent="given"),
        rollout=RolloutConfig(4, 20, 3, first_share=0.3, switch_share=0.4),
        average_decay=0.95,
        average_start=200,
        precision="bfloat16",
        save_every=50,
    )


def toy_re_dmd(
    engine: EngineConfig | None = None, teacher: str = _TOY_TEACHER, beta: float = 0.5
) -> TrainConfig:
    """toy_dmd with the world's exact motion reward at temperature `beta`, and nothing else changed."""
    plain = toy_dmd(engine, teacher)
    return replace(
        plain, name="toy_re_dmd", stage="re-dmd", distillation=replace(plain.distillation, beta=beta)
    )


def wan_1_3b_reward_forcing() -> TrainConfig:
    """Reward Forcing of the 1.3B model as the paper means it: teacher 14B, critic 1.3B (arXiv 2512.04678).

    As published: rates, betas, decay and clips of both optimizers, guidance 3, 600 critic updates with one of
    the student to every five, a global batch of 64, weights shared inside each node, moving average 0.99 from
    update 200 on, 21 frames in 7 chunks, one exit step for all, noise levels from 0.02 to 0.98.
    Different from the released code:

    - passes are accumulated, clipped and stepped once; the released loop steps the critic nine times in eight
      passes on a growing gradient, and the student twice on one;
    - 600 updates end in a checkpoint; the released settings never save one;
    - chunks leave the window of nine frames and are averaged into the sink in training too; the released
      training cache never evicts;
    - the context pass sees the clean chunk at t = 0; the released one adds noise of 0.005;
    - one shift of 5 for every model; the released critic and teacher convert by a shift of 8;
    - the reward's weight is exp(r / beta) with beta 0.5 for every sample, divided by its prompt's mean over
      a group of two; the released one is exp(2 r) of the first sample, rounded to bfloat16, for all;
    - the reward sees values from 0 to 1 at two frames a second; the released one all frames from -1 to 1;
    - a gradient that is not finite stops the run; the released code sets it to zero;
    - keys and values of earlier chunks carry no gradient; in the released code some of it leaks;
    - the text projections learn with and without activation checkpointing; the released ones only with it.
    """
    return TrainConfig(
        name="wan_1_3b_reward_forcing",
        stage="re-dmd",
        engine=PRESETS["wan-1.3b"],
        steps=600,
        batch=4,
        group=4,
        accumulation=16,
        optimizer=AdamConfig(2e-6),
        critic_optimizer=AdamConfig(4e-7),
        data="prompts.txt",
        student="checkpoints/ode_init",
        teacher="checkpoints/wan-14b",
        critic="checkpoints/wan-1.3b",
        base="checkpoints/wan-1.3b",
        reward="checkpoints/videoreward",
        negative_prompt=WAN_NEGATIVE_PROMPT,
        teacher_model=PRESETS["wan-14b"].model,
        critic_model=PRESETS["wan-1.3b"].model,
        distillation=DistillationConfig(clip_frames=21, guidance=3.0, beta=0.5),
        rollout=RolloutConfig(7, 7, 7, checkpointing=True),
        average_decay=0.99,
        average_start=200,
        precision="bfloat16",
        parallel="hybrid",
        checkpointing=True,
        save_every=50,
        sample_every=50,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        toy_teacher, toy_ode_init, toy_dmd, toy_re_dmd, wan_1_3b_reward_forcing,
    )
}  # fmt: skip
