"""Trajectories of the teacher for ode-init: made, kept in one file, and drawn from.

The teacher's probability flow is followed in Euler steps that pass through exactly the noise levels of the
student's own steps, so the student's labels are those of the states (in the published data the labels are of
a shift of 5 and the states of a shift of 8; spec 7.8). N trajectories, K student steps, C channels, F frames.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rfengine.checkpoint.loader import read_safetensors, save_weights
from rfengine.config import EngineConfig, ScheduleConfig, to_dict
from rfengine.models.dit import WanDiT
from rfengine.schedule import FlowSchedule, shifted
from rfengine.training.re_dmd import guided

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


def make_trajectories(
    path: Path,
    count: int,
    draw: Callable[[int], tuple[Tensor, Tensor]],
    follow: Callable[[Tensor, Tensor], Tensor],
    schedule: ScheduleConfig,
    batch: int,
) -> None:
    """Write `count` trajectories to one file, which appears whole or not at all.

    draw(n): noise [n, C, F, h, w] and text states [n, L, D]; follow(noise, states): see follow_flow.
    """
    from tqdm import tqdm

    states, texts = [], []
    for first in tqdm(range(0, count, batch), desc=path.name, unit="batch", disable=None):
        noise, text = draw(min(batch, count - first))
        states.append(follow(noise, text).half().cpu())
        texts.append(text.half().cpu())
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"states": torch.cat(states), "texts": torch.cat(texts)}
    save_weights(path, tensors, {"schedule": json.dumps(to_dict(schedule))})


class TrajectoryFile:
    """Trajectories of a file, drawn evenly."""

    def __init__(self, path: Path, engine: EngineConfig) -> None:
        """Raises ValueError for a file that another schedule made, whose labels would be wrong."""
        tensors, metadata = read_safetensors(path)
        made, wanted = json.loads(metadata.get("schedule", "null")), to_dict(engine.schedule)
        if made != json.loads(json.dumps(wanted)):
            raise ValueError(
                f"{path} was made with the schedule {made} and this training has {wanted}; remove the file, "
                "and it is made again"
            )
        self._states, self._texts = tensors["states"], tensors["texts"]

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(self._states), (count,), generator=generator)
        return self._states[rows].float(), self._texts[rows].float()
