"""TrainConfig: everything that one training is, frozen; recipes.py makes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from rfengine.config import EngineConfig, WanConfig
from rfengine.training.distillation import DistillationConfig
from rfengine.training.rollout import RolloutConfig

Stage = Literal["teacher", "ode-init", "dmd", "re-dmd"]
Precision = Literal["float32", "bfloat16"]
Parallelism = Literal["replicated", "sharded"]


@dataclass(frozen=True, slots=True)
class AdamConfig:
    """AdamW of one model. clip: the largest norm of its gradient. warm_up: steps of a linear rise; fall: the
    part of the training, at its end, over which the rate falls linearly to a fiftieth."""

    rate: float
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.01
    eps: float = 1e-8
    clip: float = 10.0
    warm_up: int = 0
    fall: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.fall <= 1:
            raise ValueError(f"fall is {self.fall}; it is a part of the training, from 0 to 1")
        if not self.rate > 0:
            raise ValueError(f"rate is {self.rate}; a learning rate is positive")
        if not self.clip > 0:
            raise ValueError(f"clip is {self.clip}; the norm a gradient is cut to is positive")

    def rate_at(self, step: int, steps: int) -> float:
        """The learning rate of step `step` of `steps`, counted from 0."""
        left = (1 - step / steps) / self.fall if self.fall else 1.0
        return self.rate * min(1.0, (step + 1) / max(1, self.warm_up)) * max(0.02, min(1.0, left))


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One stage of training.

    steps: optimizer steps of the model; of the critic in dmd and re-dmd, where the student takes one step for
    every critic_updates of them. batch: samples of one pass, `group` of each prompt. accumulation: passes of
    a step, which the ranks share out, so that a training is the same on one rank and on many. average_decay,
    average_start: the moving average of the trained weights, which is what the training gives, and the step
    from which it averages. student, teacher, critic: checkpoint directories or "tiny" to start from; "" for
    fresh weights. base: the checkpoint directory whose VAE, text encoder and tokenizer are used. data: what
    the stage reads: "toy" or a prompt file; for the teacher the toy world's clips or a directory of latents
    (training_data.py); for ode-init the file of trajectories, made where it is absent. reward: "toy", "flow"
    (MotionReward) or the directory of a VideoReward. negative_prompt: what guidance leads away from; "" are
    states of zeros. lora_rank: train adapters of that rank in place of the weights. parallel: every rank
    holds all ("replicated") or a share ("sharded", FSDP). offload_teacher: it lies on the CPU between its
    uses. checkpointing: blocks over whole clips are computed once more in backward (RolloutConfig has its
    own). keep: finished checkpoints that stay on disk.
    """

    name: str
    stage: Stage
    engine: EngineConfig
    steps: int
    batch: int
    optimizer: AdamConfig
    data: str
    clip_frames: int = 21
    student: str = ""
    teacher: str = ""
    critic: str = ""
    base: str = "tiny"
    reward: str = "toy"
    negative_prompt: str = ""
    teacher_model: WanConfig | None = None
    critic_model: WanConfig | None = None
    critic_optimizer: AdamConfig | None = None
    critic_updates: int = 5
    group: int = 1
    accumulation: int = 1
    distillation: DistillationConfig | None = None
    rollout: RolloutConfig | None = None
    average_decay: float = 0.99
    average_start: int = 0
    precision: Precision = "float32"
    lora_rank: int | None = None
    parallel: Parallelism = "replicated"
    offload_teacher: bool = False
    checkpointing: bool = False
    save_every: int = 100
    sample_every: int = 0
    keep: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.stage not in get_args(Stage):
            raise ValueError(f"stage is {self.stage!r}; use one of {', '.join(get_args(Stage))}")
        for name in ("steps", "batch", "critic_updates", "group", "accumulation", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.batch % self.group:
            raise ValueError(
                f"batch is {self.batch} and group {self.group}; a batch holds whole groups of one prompt"
            )
        if not 0 <= self.average_decay < 1:
            raise ValueError(f"average_decay is {self.average_decay}; use a value from 0 to below 1")
        distils = self.stage in ("dmd", "re-dmd")
        if distils and (self.distillation is None or self.rollout is None or self.critic_optimizer is None):
            raise ValueError(
                f"stage {self.stage!r} needs distillation, rollout and critic_optimizer; give them"
            )
        if distils and (self.distillation.beta is not None) != (self.stage == "re-dmd"):
            raise ValueError(
                f"beta is {self.distillation.beta} in stage {self.stage!r}; re-dmd has a temperature, "
                "dmd none"
            )
        if self.stage == "re-dmd" and self.group < 2:
            raise ValueError(
                f"group is {self.group}; the normaliser of the reward needs at least 2 samples of a prompt"
            )
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(
                f"lora_rank is {self.lora_rank}; use at least 1, or None to train the weights themselves"
            )
