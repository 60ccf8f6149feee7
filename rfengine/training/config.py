"""TrainConfig: the complete description of one training, frozen; recipes.py makes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from rfengine.config import EngineConfig, WanConfig
from rfengine.limits import Range, check_fields
from rfengine.schedule import MAX_SEED
from rfengine.training.arithmetic import Precision

Stage = Literal["teacher", "ode-init", "dmd", "re-dmd"]
Parallelism = Literal["replicated", "sharded", "hybrid"]
MOST_STEPS = 10**9
TIMEOUT_S = 600  # of a rank that waits for another, which may have compiled and loaded for minutes
SEEN_S = 90  # until a new file is seen on every node: NFS keeps what it knows of a directory for a minute
BELOW_ONE = 1 - 1e-9  # Adam and averages divide by what is missing to one
Steps = Annotated[int, Range(1, MOST_STEPS)]
Frames = Chunks = Annotated[int, Range(1, 4096)]


@dataclass(frozen=True, slots=True)
class AdamConfig:
    """AdamW of one model. clip: the largest norm of its gradient. warm_up: steps of a linear rise; fall: the
    part of the training, at its end, over which the rate falls linearly to a fiftieth."""

    rate: Annotated[float, Range(1e-12, 100)]
    betas: Annotated[tuple[float, float], Range(0, BELOW_ONE)] = (0.0, 0.999)
    weight_decay: Annotated[float, Range(0, 100)] = 0.01
    eps: Annotated[float, Range(1e-16, 1)] = 1e-8
    clip: Annotated[float, Range(1e-9, 1e9)] = 10.0
    warm_up: Annotated[int, Range(0, MOST_STEPS)] = 0
    fall: Annotated[float, Range(0, 1)] = 0.0

    def __post_init__(self) -> None:
        check_fields(self)

    def share_at(self, step: int, steps: int) -> float:
        """The learning rate of step `step` of `steps`, counted from 0, as a share of `rate`."""
        left = (1 - step / steps) / self.fall if self.fall else 1.0
        return min(1.0, (step + 1) / max(1, self.warm_up)) * max(0.02, min(1.0, left))


@dataclass(frozen=True, slots=True)
class RolloutConfig:
    """How long the rollouts of a training are, and where gradients flow.

    Lengths are drawn evenly from min_chunks to max_chunks, but for first_share of the rollouts, which are the
    first chunk alone: a teacher that knows whole clips from the middle of videos judges the start by itself.
    The last gradient_chunks carry gradients, each a graph of its own (in the published code some gradient
    leaks into keys and values of earlier chunks). checkpointing: activations of the exit steps are computed
    once more in backward.

    switch_share: of the rollouts that are longer than the judged clip, how many begin with another prompt and
    switch to their own before or with that clip, so that all of it is judged by one prompt. recache_share: of
    these, how many recompute the window under the new prompt; the others keep it (LongLive, arXiv 2509.22622,
    trains so).
    """

    min_chunks: Chunks = 7
    max_chunks: Chunks = 7
    gradient_chunks: Chunks = 7
    checkpointing: bool = False
    first_share: Annotated[float, Range(0, 1)] = 0.0
    switch_share: Annotated[float, Range(0, 1)] = 0.0
    recache_share: Annotated[float, Range(0, 1)] = 0.5

    def __post_init__(self) -> None:
        check_fields(self)
        if self.min_chunks > self.max_chunks:
            raise ValueError(
                f"min_chunks is {self.min_chunks} and max_chunks {self.max_chunks}; give 1 <= min <= max"
            )


@dataclass(frozen=True, slots=True)
class DistillationConfig:
    """clip_frames: latent frames the teacher was trained on; a rollout's last ones are judged. guidance: of
    the teacher, 0 is none. beta: the reward's temperature, None for plain DMD.

    first_latent: what the judged clip begins with where the rollout is longer. "given" takes it as it is,
    for a teacher that was trained on clips from the middle of videos; "encoded" puts the encoded last pixel
    frame before the clip in place of the clip's first latent, since a published teacher has only seen first
    latents that stand for one frame.
    """

    clip_frames: Frames = 21
    guidance: Annotated[float, Range(0, 1000)] = 3.0
    beta: Annotated[float | None, Range(1e-6, 1e6)] = None
    first_latent: Literal["given", "encoded"] = "encoded"

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One training.

    steps: optimizer steps of the model; of the critic in dmd and re-dmd, where the student takes one step for
    every critic_updates of them. batch: samples of one pass, `group` of each prompt. accumulation: passes of
    a step, which the ranks share out, so that a training is the same on one rank and on many. average_decay,
    average_start: the moving average of the trained weights, the result of the training, and the step from
    which it averages. student, teacher, critic: checkpoint directories or "tiny" to start from; "" for
    fresh weights. base: the checkpoint directory whose VAE, text encoder and tokenizer are used. data: what
    the stage reads: "toy" or a prompt file; for the teacher the toy world's clips or a directory of latents
    (data.py); for ode-init the file of trajectories, made where it is absent. reward: "toy", "flow"
    (motion_reward) or the directory of a VideoReward. negative_prompt: what guidance leads away from; "" are
    states of zeros. lora_rank: train adapters of that rank in place of the weights. parallel: every rank
    holds all ("replicated"), a share ("sharded", FSDP) or a share inside of a group of shard_ranks ranks, of
    which every other group is a replica ("hybrid", HSDP; None: the ranks of a node). offload_teacher: it
    stays on the CPU between its uses. checkpointing: blocks over whole clips are computed once more in
    backward (RolloutConfig has its own). keep: finished checkpoints that stay on disk.
    """

    name: str
    stage: Stage
    engine: EngineConfig
    steps: Steps
    batch: Annotated[int, Range(1, 65536)]
    optimizer: AdamConfig
    data: str
    clip_frames: Frames = 21
    student: str = ""
    teacher: str = ""
    critic: str = ""
    base: str = "tiny"
    reward: str = "toy"
    negative_prompt: str = ""
    teacher_model: WanConfig | None = None
    critic_model: WanConfig | None = None
    critic_optimizer: AdamConfig | None = None
    critic_updates: Annotated[int, Range(1, 1000)] = 5
    group: Annotated[int, Range(1, 65536)] = 1
    accumulation: Annotated[int, Range(1, 65536)] = 1
    distillation: DistillationConfig | None = None
    rollout: RolloutConfig | None = None
    average_decay: Annotated[float, Range(0, BELOW_ONE)] = 0.99
    average_start: Annotated[int, Range(0, MOST_STEPS)] = 0
    precision: Precision = "float32"
    lora_rank: Annotated[int | None, Range(1, 65536)] = None
    parallel: Parallelism = "replicated"
    shard_ranks: Annotated[int | None, Range(1, 65536)] = None
    offload_teacher: bool = False
    checkpointing: bool = False
    save_every: Steps = 100
    sample_every: Annotated[int, Range(0, MOST_STEPS)] = 0
    keep: Annotated[int, Range(1, 10_000)] = 2
    seed: Annotated[int, Range(0, MAX_SEED)] = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("data", "base", "reward"):
            if not getattr(self, name):
                raise ValueError(f"{name} is ''; give a path, or a word that `rfengine train --help` names")
        if self.batch % self.group:
            raise ValueError(
                f"batch is {self.batch} and group {self.group}; a batch holds whole groups of one prompt"
            )
        if self.shard_ranks is not None and self.parallel != "hybrid":
            raise ValueError(
                f"shard_ranks is {self.shard_ranks} and parallel {self.parallel!r}; groups of ranks are of "
                "parallel 'hybrid' alone"
            )
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
        if distils and (self.engine.schedule.rolling != "none" or self.engine.schedule.first_steps):
            raise ValueError(
                f"rolling is {self.engine.schedule.rolling!r} and first_steps "
                f"{self.engine.schedule.first_steps}; a rollout denoises one chunk after another, all in the "
                "same steps"
            )
        if distils and self.engine.cache.first_chunk != self.engine.cache.chunk_frames:
            raise ValueError(
                f"first_chunk_frames is {self.engine.cache.first_chunk}; in a rollout all chunks have "
                f"chunk_frames, {self.engine.cache.chunk_frames}"
            )
        if distils and self.rollout.switch_share and self.rollout.recache_share:
            self.engine.cache.check_recache()
        needed = -(-self.distillation.clip_frames // self.engine.cache.chunk_frames) if distils else 0
        if distils and self.rollout.gradient_chunks > needed:
            raise ValueError(
                f"gradient_chunks is {self.rollout.gradient_chunks}, but the clip that is judged has "
                f"{needed} chunks; gradients from before it would be zero"
            )
        if self.stage == "re-dmd" and self.group < 2:
            raise ValueError(
                f"group is {self.group}; the normaliser of the reward needs at least 2 samples of a prompt"
            )
        most = min(self.engine.model.dim, self.engine.model.ffn_dim)
        if self.lora_rank is not None and self.lora_rank > most:
            raise ValueError(
                f"lora_rank is {self.lora_rank}; the narrowest weights have {most} rows: use at most {most}"
            )

    @property
    def keeps_casts(self) -> bool:
        """Of arithmetic.casting."""
        return self.parallel == "replicated"
