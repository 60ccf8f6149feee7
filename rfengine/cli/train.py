"""`rfengine train`: one recipe in one directory, alone or on the ranks of torchrun."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from tyro.conf import Positional

from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.cli.terminal import find_device
from rfengine.memory import free_memory
from rfengine.training.arithmetic import Precision, multiplies_bfloat16
from rfengine.training.config import Parallelism, TrainConfig
from rfengine.training.recipes import RECIPES

if TYPE_CHECKING:
    from rfengine.training.parallel import Ranks


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train by a recipe. Under torchrun every rank runs the same command."""

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
    """replicated: every rank holds all; sharded: a share."""
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

    config = train_config(options)
    directory = _run_directory(options)
    device = find_device(options.device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # of views that nothing changes
    with ranks_from_environment(device) as (ranks, own_device):
        _train(config, directory, own_device, ranks, options)
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


def _run_directory(options: TrainOptions) -> Path:
    if options.resume is not None:
        if options.directory not in (None, options.resume):
            raise ValueError(
                f"--resume is {options.resume} and --directory {options.directory}; give --resume alone"
            )
        if not any(options.resume.glob("checkpoints/step_*")):
            raise ValueError(f"{options.resume} has no checkpoint to resume from; leave --resume away")
        return options.resume
    directory = options.directory or Path("runs") / options.recipe
    if any(directory.glob("checkpoints/step_*")):
        raise ValueError(
            f"{directory} holds a run already; add --resume {directory} to go on with it, or choose another "
            "--directory"
        )
    return directory


def _train(
    config: TrainConfig, directory: Path, device: torch.device, ranks: Ranks, options: TrainOptions
) -> None:
    from rfengine.training.checkpoints import locked_run
    from rfengine.training.resources import plan_resources

    plan = plan_resources(config, ranks.count, device.type)
    if ranks.rank == 0:
        print(plan.render(), flush=True)
        if config.precision == "bfloat16" and device.type == "cpu" and not multiplies_bfloat16():
            warnings.warn(
                "this CPU has no bfloat16 products; --precision float32 is several times as fast",
                stacklevel=2,
            )
    if options.plan:
        return
    free = free_memory(device)
    if free is not None:
        plan.check(free, str(device) if device.type == "cuda" else "this machine")
    with locked_run(directory):
        _train_to_the_end(config, directory, device, ranks, stops=options.guard == "stop")


def _train_to_the_end(
    config: TrainConfig, directory: Path, device: torch.device, ranks: Ranks, stops: bool
) -> None:
    from rfengine.checkpoint.loader import save_weights
    from rfengine.training.build import build_stage, export_checkpoint
    from rfengine.training.log import LOG_FILE
    from rfengine.training.lora import lora_weights, merged_weights
    from rfengine.training.reward_guard import RewardGuard
    from rfengine.training.samples import SampleWriter, averaged_state
    from rfengine.training.trainer import Trainer

    stage = build_stage(config, device, ranks)
    trainer = Trainer(config, stage, directory, ranks, SampleWriter(config, stage, device, ranks))
    if config.stage == "re-dmd":  # a guard as it was at the checkpoint that the run resumes from
        log, step = directory / LOG_FILE, trainer.state.step
        trainer.on_step = RewardGuard.from_log(log, step, stage.score.held_out, stops).on_step
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
    ranks.meet()
