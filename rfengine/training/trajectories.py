"""Trajectories of the teacher for ode-init: made, kept in one file, and drawn from.

The teacher's probability flow is followed in Euler steps that pass through exactly the noise levels of the
student's own steps, so the student's labels are those of the states (in the published data the labels are of
a shift of 5 and the states of a shift of 8). N trajectories, K student steps, C channels, F frames.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from rfengine.checkpoint.loader import read_safetensors, save_weights
from rfengine.config import EngineConfig, ScheduleConfig
from rfengine.config_json import to_dict
from rfengine.files import strict_json
from rfengine.models.dit import WanDiT
from rfengine.schedule import FlowSchedule, shifted
from rfengine.training.re_dmd import guided
from rfengine.training.rollout import latent_shape

_REMEDY = "remove the file, and it is made again"
SUBSTEPS = 12  # Euler steps for each step of a student of four: 48, as the published trajectories


@torch.no_grad()
def follow_flow(
    teacher: WanDiT,
    schedule: ScheduleConfig,
    noise: Tensor,
    states: Tensor,
    negative: Tensor,
    guidance: float,
    substeps: int = SUBSTEPS,
) -> Tensor:
    """[N, K + 1, C, F, h, w]: the teacher's state at each of the student's steps, then its clean end.

    noise: [N, C, F, h, w]; states: text states [N, L, D]; negative: [1, L, D]; guidance: 0 is none.
    """
    x, found = noise, []
    for sigmas in _sigmas(schedule, substeps):
        found.append(x)
        for sigma, following in zip(sigmas, sigmas[1:], strict=False):
            timesteps = torch.full((len(x),), schedule.num_train_timesteps * sigma, device=x.device)
            flow = teacher.forward_clip(x, timesteps, states).float()
            if guidance:
                without = teacher.forward_clip(x, timesteps, negative.expand(len(x), -1, -1)).float()
                flow = guided(flow, without, guidance)
            x = x + (following - sigma) * flow
    return torch.stack([*found, x], dim=1)


def _sigmas(schedule: ScheduleConfig, substeps: int) -> list[list[float]]:
    """Of every student step the noise levels from its own to the next one's, evenly in time before the
    shift."""
    ends = [step / schedule.num_train_timesteps for step in (*schedule.denoising_steps, 0)]
    exact = [*FlowSchedule(schedule).denoising_sigmas, 0.0]
    parts = []
    for index in range(len(ends) - 1):
        uniform = torch.linspace(ends[index], ends[index + 1], substeps + 1, dtype=torch.float64)
        inner = shifted(uniform, schedule.shift).tolist()[1:-1]
        parts.append([exact[index], *inner, exact[index + 1]])
    return parts


def save_trajectories(path: Path, batches: Iterable[tuple[Tensor, Tensor]], schedule: ScheduleConfig) -> None:
    """Write batches of trajectories, as follow_flow returns them, with their text states [n, L, D] to one
    file, which appears whole or not at all."""
    halves = [(states.half().cpu(), texts.half().cpu()) for states, texts in batches]
    states, texts = (torch.cat(parts) for parts in zip(*halves, strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(path, {"states": states, "texts": texts}, {"schedule": json.dumps(to_dict(schedule))})


class TrajectoryFile:
    """Trajectories of a file, drawn evenly."""

    def __init__(self, path: Path, engine: EngineConfig) -> None:
        """Raises ValueError for a file that is damaged, is no file of trajectories, has other sizes than
        `engine`, or was made with another schedule, whose labels would be wrong."""
        tensors, metadata = read_safetensors(path)
        try:
            made = strict_json(metadata.get("schedule", ""))
        except ValueError as error:
            raise ValueError(f"{path} names no schedule ({error}), as trajectories do; {_REMEDY}") from error
        wanted = json.loads(json.dumps(to_dict(engine.schedule)))
        if made != wanted:
            raise ValueError(
                f"{path} was made with the schedule {made} and this training has {wanted}; {_REMEDY}"
            )
        problem = _problem(tensors, engine)
        if problem:
            raise ValueError(f"{path} has {problem}; {_REMEDY}")
        self._states, self._texts = tensors["states"], tensors["texts"]

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(self._states), (count,), generator=generator)
        return self._states[rows].float(), self._texts[rows].float()


def _problem(tensors: dict[str, Tensor], engine: EngineConfig) -> str:
    """What does not fit in the tensors of a file, or ""."""
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if shapes.keys() != {"states", "texts"} or len(shapes["states"]) != 6:
        return f"the tensors {shapes}, not states [N, K + 1, C, F, h, w] and texts [N, L, D]"
    count, frames = shapes["states"][0], shapes["states"][3]
    steps = len(engine.schedule.denoising_steps) + 1
    wanted = {
        "states": [count, steps, *latent_shape(engine, 1, frames)[1:]],
        "texts": [count, engine.model.text_len, engine.model.text_dim],
    }
    for name, shape in wanted.items():
        if shapes[name] != shape or not count or not frames:
            return f"{name} {shapes[name]} where this training has {shape}"
        if not tensors[name].is_floating_point() or not torch.isfinite(tensors[name]).all():
            return f"{name} that are not all finite numbers"
    return ""
