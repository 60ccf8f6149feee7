"""Stages whose models several ranks share, and what each rank read and holds of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from rfengine.config import WanConfig
from rfengine.training.build import base_engine, build_stage
from rfengine.training.config import TrainConfig
from rfengine.training.distillation import DistillationStage
from rfengine.training.parallel import Ranks, full_tensors, sharding_mesh
from support.models import SMALL, small_pipeline, write_pipeline
from support.small_training import changed

CPU = torch.device("cpu")
WIDE: WanConfig = dataclasses.replace(SMALL, dim=320, ffn_dim=1280, num_heads=2, num_layers=1)


def wide_checkpoint(directory: Path) -> Path:
    """A checkpoint directory whose transformer is far larger than all else in it."""
    pipeline = small_pipeline()
    config = dataclasses.replace(pipeline.config, model=WIDE)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline.config, pipeline.model = config, type(pipeline.model)(WIDE)
    directory.mkdir()
    return write_pipeline(directory, pipeline)


def wide_training(source: str, base: Path, **changes: object) -> TrainConfig:
    """A distillation of models of one source; "" for fresh ones."""
    engine = base_engine(str(base))
    models = {"student": source, "teacher": source, "critic": source}
    return changed(**models, engine=engine, base=str(base), data="toy", accumulation=4, **changes)


def states_of(stage: DistillationStage) -> dict[str, torch.Tensor]:
    """The whole weights of the three models; every rank that shares them has to call it."""
    models = {name: getattr(stage.networks, name) for name in ("student", "teacher", "critic")}
    return {
        f"{name}.{key}": value
        for name, model in models.items()
        for key, value in full_tensors(model.state_dict()).items()
    }


def build_shared(rank: int, jobs: list[tuple[TrainConfig, int, Path]]) -> None:
    """Build the stage of every job in groups of so many ranks. To its path the first rank saves the whole
    weights, and every rank, to the path with its number, bytes read, numbers held and the error there was."""
    build_stage(jobs[0][0], CPU, Ranks(), sharding_mesh("cpu", jobs[0][1]))  # imports are read from files too
    for config, group, path in jobs:
        report: dict[str, object] = {"error": ""}
        before, mesh = bytes_read(), sharding_mesh("cpu", group)
        try:
            stage = build_stage(config, CPU, Ranks(), mesh)
        except (ValueError, RuntimeError) as error:
            report["error"] = f"{type(error).__name__}: {error}"
        else:
            report["bytes"] = bytes_read() - before
            networks = stage.networks
            report["held"] = [
                sum(value.to_local().numel() for value in model.parameters())
                for model in (networks.student, networks.teacher, networks.critic)
            ]
            states = states_of(stage)
            if rank == 0:
                torch.save(states, path)
        torch.save(report, path.with_suffix(f".{rank}"))


def bytes_read() -> int:
    """What this process has read so far, from files and else."""
    return int(Path("/proc/self/io").read_text().split()[1])
