"""What the four trainings of the recipe share: the description of a run, and a run to its end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rfengine.config import EngineConfig, TinyVAEConfig, VAEConfig
from rfengine.limits import check_fields
from rfengine.training.checkpoints import locked_run
from rfengine.training.config import Steps
from rfengine.training.parallel import Ranks
from rfengine.training.stages import ModelStage
from rfengine.training.trainer import Trainer


@dataclass(frozen=True, slots=True)
class StageConfig:
    """One training: what is trained, for how many steps. keep: finished checkpoints that stay on disk."""

    name: str
    model: EngineConfig | VAEConfig | TinyVAEConfig
    steps: Steps
    seed: int
    save_every: Steps = 100
    keep: int = 1

    def __post_init__(self) -> None:
        check_fields(self)

    def step_seed(self, step: int) -> int:
        """The seed of what all passes of a step share."""
        return self.seed * 1_000_003 + step

    def pass_seed(self, step: int, index: int) -> int:
        """The seed of what pass `index` of a step draws."""
        return self.step_seed(step) * 64 + index


def train(config: StageConfig, stage: ModelStage, directory: Path, ranks: Ranks) -> dict[str, Tensor]:
    """Train in `directory`/NAME, from the newest checkpoint there; returns the averaged weights.

    Raises KeyboardInterrupt after a signal: the same call continues.
    """
    place = directory / config.name
    with locked_run(place):
        Trainer(config, stage, place, ranks).finish("with the same command")
    return stage.averages[config.name].values
