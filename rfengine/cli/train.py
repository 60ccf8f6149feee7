"""`rfengine train`: one recipe in one directory, alone or on the ranks of torchrun (docs/training.md)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from tyro.conf import Positional

from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.cli.terminal import find_device
from rfengine.limits import Range, check_options
from rfengine.memory import free_memory
from rfengine.training.arithmetic import Precision, multiplies_bfloat16
from rfengine.training.config import TIMEOUT_S, Parallelism, TrainConfig
from rfengine.training.recipes import RECIPES

if TYPE_CHECKING:
    from rfengine.training.distillation import DistillationStage
    from rfengine.training.parallel import Ranks
    from rfengine.training.resources import ResourcePlan
    from rfengine.training.trainer import Trainer


_LETS_GO_S = 120  # until a first rank of an earlier start is gone, or the server of its file system knows


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train by a recipe. Under torchrun every rank runs the same command; those that it has started again go
    on from the last checkpoint (docs/training.md)."""

    recipe: Positional[str]
    """toy_teacher, toy_ode_init, toy_dmd, toy_re_dmd or wan_1_3b_reward_forcing."""
    directory: Path | None = None
    """Where log, samples, checkpoints and the result go; runs/RECIPE where nothing is given."""
    resume: Path | None = None
    """The directory of a run that stopped, to continue it."""
    device: str | None = None
    """cpu, cuda or cuda:N; cuda where there is one."""
    plan: bool = False
    """Print the plan of memory and work, and stop."""
    steps: int | None = None
    """Optimizer steps; of the critic where there is one."""
    batch: int | None = None
    """Samples of one pass."""
    accumulation: int | None = None
    """Passes of a step, which the ranks share out."""
    data: str | None = None
    """What the recipe reads: a prompt file, or clips of the teacher stage."""
    student: str | None = None
    """The checkpoint directory that the trained model starts from."""
    teacher: str | None = None
    """The teacher's checkpoint directory."""
    critic: str | None = None
    """The checkpoint directory that the critic starts from."""
    base: str | None = None
    """The checkpoint directory that has the VAE, text encoder and tokenizer."""
    reward: str | None = None
    """toy, flow (optical flow), or the directory of a reward model."""
    guard: Literal["warn", "stop"] = "warn"
    """What to do when the reward rises while a held-out score falls or the teacher gets further away."""
    beta: float | None = None
    """Temperature of the reward."""
    lora_rank: int | None = None
    """Train adapters of this rank in place of the weights."""
    precision: Precision | None = None
    """Of the arithmetic; the weights are float32."""
    parallel: Parallelism | None = None
    """replicated: every rank holds all; sharded: a share; hybrid: a share inside each node, all of which hold
    the same."""
    shard_ranks: int | None = None
    """Ranks that share one copy of the weights in hybrid; those of a node where nothing is given."""
    timeout: Annotated[int, Range(1, 86_400)] = TIMEOUT_S
    """Seconds after which a rank that waits for another ends."""
    offload_teacher: bool | None = None
    """Keep the teacher on the CPU between its uses."""
    save_every: int | None = None
    """Steps between two checkpoints."""
    sample_every: int | None = None
    """Steps between two sets of sample videos; 0 for none."""
    seed: int | None = None
    """The same seed and recipe make the same training."""


def run(options: TrainOptions) -> int:
    from rfengine.training.parallel import ranks_from_environment  # a second of imports, for training alone

    check_options(options)
    config = train_config(options)
    device = find_device(options.device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # of views that nothing changes
    with ranks_from_environment(device, options.timeout) as (ranks, own_device):
        _train(config, own_device, ranks, options)
    return 0


def train_config(options: TrainOptions) -> TrainConfig:
    """The recipe with what the options change of it. Raises ValueError for a recipe that is not there."""
    if options.recipe not in RECIPES:
        raise ValueError(f"the recipe is {options.recipe!r}; use one of {', '.join(RECIPES)}")
    config = RECIPES[options.recipe]()
    names = {field.name for field in fields(TrainConfig)} & {field.name for field in fields(TrainOptions)}
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.beta is not None:
        if config.distillation is None:
            raise ValueError(f"--beta is {options.beta}, but {options.recipe} has no reward; leave it away")
        given["distillation"] = replace(config.distillation, beta=options.beta)
    config = replace(config, **given)
    if config.engine.name != "tiny":
        return config
    return replace(config, engine=Checkpoint.open(config.base).config)  # with the statistics of its latents


def _run_directory(options: TrainOptions, restarted: bool) -> Path:
    """Where the run is; one that has begun goes on where that is asked for, or where torchrun has restarted
    it."""
    if options.resume is not None:
        if options.directory not in (None, options.resume):
            raise ValueError(
                f"--resume is {options.resume} and --directory {options.directory}; give --resume alone"
            )
        if not any(options.resume.glob("checkpoints/step_*")):
            raise ValueError(f"{options.resume} has no checkpoint to resume from; leave --resume away")
        return options.resume
    directory = _named_directory(options)
    if any(directory.glob("checkpoints/step_*")) and not restarted:
        raise ValueError(
            f"{directory} holds a run already; add --resume {directory} to go on with it, or choose another "
            "--directory"
        )
    return directory


def _named_directory(options: TrainOptions) -> Path:
    return options.resume or options.directory or Path("runs") / options.recipe


def _train(config: TrainConfig, device: torch.device, ranks: Ranks, options: TrainOptions) -> None:
    from rfengine.training.agents import is_own_run
    from rfengine.training.agreement import check_agreement, facts_of
    from rfengine.training.checkpoints import check_same_checkpoints, locked_run
    from rfengine.training.parallel import group_size, restarts_from_environment
    from rfengine.training.resources import plan_resources

    ranks.passes(config.accumulation)  # which raises where they cannot be shared out
    group = group_size(config.parallel, config.shard_ranks, ranks.count)
    plan = plan_resources(config, ranks.count, group, device.type)
    if ranks.rank == 0:
        print(plan.render(), flush=True)
        if config.precision == "bfloat16" and device.type == "cpu" and not multiplies_bfloat16():
            warnings.warn(
                "this CPU has no bfloat16 products; --precision float32 is several times as fast",
                stacklevel=2,
            )
    if options.plan:
        return
    if ranks.count > 1:
        check_agreement(facts_of(config, group), ranks)
        check_same_checkpoints(_named_directory(options), ranks)
    # of any node: torchrun counts on those alone whose own ranks have failed
    restarted = any(ranks.gathered(restarts_from_environment()))
    restarted = is_own_run(_named_directory(options), ranks) and restarted
    directory = _run_directory(options, restarted)
    _check_memory(plan, device, ranks)
    with locked_run(directory, _LETS_GO_S if restarted else 0):
        _train_to_the_end(config, directory, device, ranks, options, group)


def _check_memory(plan: ResourcePlan, device: torch.device, ranks: Ranks) -> None:
    """Raises RuntimeError on every rank where one has less memory than the plan."""
    from rfengine.training.parallel import ranks_of_a_node

    free, problem, here = free_memory(device), "", ranks_of_a_node(ranks.count)
    try:
        if free is not None and device.type == "cuda":
            plan.check(free, str(device))
        elif free is not None:
            plan.check(free / here, "this machine" if here == 1 else f"each of the {here} on this machine")
    except RuntimeError as error:
        problem = str(error)
    if problem := ranks.agreed(problem):
        raise RuntimeError(problem)


def _train_to_the_end(
    config: TrainConfig,
    directory: Path,
    device: torch.device,
    ranks: Ranks,
    options: TrainOptions,
    group: int,
) -> None:
    from rfengine.checkpoint.loader import save_weights
    from rfengine.training.agents import note_agents
    from rfengine.training.build import build_stage, export_checkpoint
    from rfengine.training.lora import lora_weights, merged_weights
    from rfengine.training.parallel import sharding_mesh
    from rfengine.training.samples import SampleWriter, averaged_state
    from rfengine.training.trainer import Trainer

    mesh = None
    if config.parallel != "replicated" and ranks.count > 1:
        mesh = sharding_mesh(device.type, group, options.timeout)
    stage = build_stage(config, device, ranks, mesh)
    trainer = Trainer(config, stage, directory, ranks, SampleWriter(config, stage, device, ranks))
    if config.stage == "re-dmd":
        _guard(trainer, stage, options.guard == "stop")
    note_agents(directory, ranks)
    trainer.finish(f"with --resume {directory}")
    state = averaged_state(stage)
    if ranks.rank == 0:
        export_checkpoint(merged_weights(state), config.engine, config.base, directory / "checkpoint")
        if config.lora_rank is not None:
            rank = str(config.lora_rank)
            save_weights(
                directory / "lora.safetensors", lora_weights(state), {"lora_alpha": rank, "rank": rank}
            )
        print(f"{directory / 'checkpoint'}: the model of step {config.steps}; rfengine generate takes it")
    ranks.meet(patient=True)  # the first rank copies the text encoder, for minutes


def _guard(trainer: Trainer, stage: DistillationStage, stops: bool) -> None:
    """Let the first rank watch the reward, by a guard as it was at the checkpoint that the run resumes from.
    Raises RuntimeError on every rank where it has stopped the run there."""
    from rfengine.training.log import LOG_FILE
    from rfengine.training.reward_guard import RewardGuard

    reason = ""
    if trainer.ranks.rank == 0:
        log, step = trainer.directory / LOG_FILE, trainer.state.step
        guard = RewardGuard.from_log(log, step, stage.score.held_out, stops)
        trainer.on_step = guard.on_step
        reason = guard.warning if stops and guard.warning else ""
    if reason := trainer.ranks.agreed(reason):
        raise RuntimeError(f"{reason}; --guard warn goes on all the same")
