"""A small distillation: a student, a teacher and a critic with random weights, alone or on several ranks."""

from __future__ import annotations

import dataclasses
import os
import time
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import torch

from rfengine.config import CacheConfig, EngineConfig, ScheduleConfig, TextConfig
from rfengine.files import locked
from rfengine.models.dit import WanDiT
from rfengine.models.vae import WanVAE
from rfengine.training import checkpoints
from rfengine.training.agreement import check_agreement, facts_of
from rfengine.training.checkpoints import locked_run
from rfengine.training.config import AdamConfig, DistillationConfig, RolloutConfig, TrainConfig
from rfengine.training.distillation import DistillationModels, DistillationStage
from rfengine.training.lora import add_adapters
from rfengine.training.memory import recompute_blocks
from rfengine.training.ops import DifferentiableOps
from rfengine.training.parallel import Ranks, full_tensors, group_size, shard, sharding_mesh
from rfengine.training.trainer import Trainer
from support.models import GRID, SMALL, SMALL_VAE, small_model, text_states

ENGINE = EngineConfig(
    name="small",
    model=SMALL,
    vae=SMALL_VAE,
    text=TextConfig(dim=16, attention_dim=16, num_heads=2),
    cache=CacheConfig(alpha=0.8),
    schedule=ScheduleConfig(denoising_steps=(1000, 500)),
    height=GRID.height,
    width=GRID.width,
)
PLAIN = DistillationConfig(clip_frames=9, guidance=0.0, first_latent="given")
# a large eps: with a first beta of 0 a step is g / (|g| + eps), which would turn rounding into signs
ADAM = AdamConfig(1e-2, eps=1e-1)
DMD = TrainConfig(
    name="small",
    stage="dmd",
    engine=ENGINE,
    steps=2,
    batch=1,
    optimizer=ADAM,
    data="toy",
    critic_optimizer=ADAM,
    critic_updates=2,
    accumulation=2,
    distillation=PLAIN,
    rollout=RolloutConfig(2, 2, 2),
    average_decay=0.5,
    save_every=1,
)


class DrawnPrompts:
    def draw(self, count, generator):
        numbers = torch.randint(5, (count,), generator=generator).tolist()
        return [f"prompt {number}" for number in numbers], torch.cat([text_states(n) for n in numbers])


def differentiable(model: WanDiT) -> WanDiT:
    """The model, with ops that let gradients through its cache."""
    ops = DifferentiableOps(model.ops.choice)
    for module in model.modules():
        if hasattr(module, "ops"):
            module.ops = ops
    return model


def distillation_models() -> DistillationModels:
    teacher = small_model(seed=1).requires_grad_(False)
    return DistillationModels(
        differentiable(small_model(seed=0)), teacher, small_model(seed=2), small_vae(), text_states(3)
    )


@cache
def small_vae() -> WanVAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return WanVAE(ENGINE.vae).eval().requires_grad_(False)


def small_trainer(directory: Path, config: TrainConfig = DMD, **options: object) -> Trainer:
    models, ranks = distillation_models(), Ranks()
    if config.checkpointing:
        recompute_blocks(models.critic)
    for model in (models.student, models.critic):
        if config.lora_rank is not None:
            add_adapters(model, config.lora_rank, config.seed)
    if config.parallel != "replicated":
        mesh = sharding_mesh("cpu", group_size(config.parallel, config.shard_ranks, ranks.count))
        for model in (models.student, models.teacher, models.critic):
            shard(model, mesh)
    stage = DistillationStage(config, models, DrawnPrompts(), ranks)
    return Trainer(config, stage, directory, ranks, **options)


def run_small(rank: int, directory: Path, config: TrainConfig, result: Path) -> None:
    """Train to the configured step, from a checkpoint where there is one; the first rank saves the end."""
    trainer = small_trainer(directory, config)
    trainer.run()
    found = {}
    for name, model in trainer.stage.models.items():
        found |= {f"{name}.{key}": value for key, value in full_tensors(model.state_dict()).items()}
    for name, average in trainer.stage.averages.items():
        found |= {f"{name}_average.{key}": value for key, value in full_tensors(average.values).items()}
    if rank == 0:
        torch.save(found | {"step": torch.tensor(trainer.state.step)}, result)


def run_all(rank: int, jobs: list[tuple[Path, TrainConfig, Path]], means: Path) -> None:
    """run_small one after another, since processes are slow to start. The last rank also saves the means over
    the ranks of [2, 3] gradients, of [1] and of a number."""
    for directory, config, result in jobs:
        run_small(rank, directory, config, result)
    ranks = Ranks()
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.full((2, 3), float(rank)), torch.tensor([10.0 * rank])
    ranks.average_gradients(parameters)
    found = (*(value.grad for value in parameters), ranks.mean(float(rank)))
    if rank == ranks.count - 1:
        torch.save(found, means)


def run_apart(rank: int, jobs: list[tuple[Path, TrainConfig, Path]], means: Path, refusals: Path) -> None:
    """run_all, and then what each rank says, in `refusals` with its number, when one has another seed, when
    some have another directory and when the directory of the run is in use; and the checkpoints that are
    there when one was saved again whose name the last two do not see."""
    run_all(rank, jobs, means)
    checkpoints.SEEN_S = 0.2
    ranks, found = Ranks(), {}
    config = changed(seed=7 if rank == 2 else 0)
    try:
        check_agreement(facts_of(config, 2), ranks)
    except ValueError as error:
        found["seed"] = str(error)
    place = refusals.with_name(f"of {rank % 2}")
    try:
        with locked_run(place):
            found["place"] = ""
    except RuntimeError as error:
        found["place"] = str(error)
    with ExitStack() as stack:
        if rank == 0:
            place.mkdir()
            stack.enter_context(locked(place / ".training.lock", f"training in {place}"))
        ranks.meet()
        try:
            with locked_run(place):
                found["lock"] = ""
        except RuntimeError as error:
            found["lock"] = str(error)
    found["again"] = saved_again(refusals.with_name("again"), sees=rank < 2)
    torch.save(found, refusals.with_suffix(f".{rank}"))


def saved_again(directory: Path, sees: bool) -> list[str]:
    """Names of the checkpoints after one of ranks that share the weights was saved twice and then another;
    without `sees` this rank is on a node that shows no name that is new."""
    trainer = small_trainer(directory, HYBRID)
    exists, trainer.state.step = Path.exists, 1
    Path.exists = lambda path: sees and exists(path)
    try:
        for step in (1, 1, 2):
            trainer.state.step = step
            trainer.checkpoints.save(trainer.state, wait=True)
    finally:
        Path.exists = exists
    return [path.name for path in trainer.checkpoints.complete()]


def wait_for_the_first(rank: int, seconds: float, result: Path) -> None:
    """The first rank is busy for so long and then gone; the last one writes how long it then waited and what
    it was told."""
    ranks = Ranks()
    if rank == 0:
        time.sleep(seconds)
    ranks.meet(patient=True)
    if rank == 0:
        os._exit(0)
    began = time.monotonic()
    try:
        ranks.meet(patient=True)
    except RuntimeError as error:
        result.write_text(f"{time.monotonic() - began} {error}")
    os._exit(0)


FOUR = {"accumulation": 4}


def changed(**changes: object) -> TrainConfig:
    return dataclasses.replace(DMD, **changes)


HYBRID = changed(**FOUR, parallel="hybrid", shard_ranks=2)
