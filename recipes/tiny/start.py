"""Makes a student out of the teacher: the same flow at the noise levels of the sampler's own steps alone.

Where a video begins it reads from the noise of the first step (noise.py), and all later chunks follow from
what came before, so that no step has to choose among what is possible.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.tiny.training import StageConfig
from recipes.tiny.transformer import (
    LATE,
    LATER_TEXTS,
    OPENING,
    START,
    ChunkedAttentionOps,
    FlowPlan,
    FlowStage,
    Segment,
    TextShares,
    chunk_tokens,
)
from rfengine.models.dit import WanDiT
from rfengine.schedule import FlowSchedule
from rfengine.toy.data import LatentDataset
from rfengine.training.config import AdamConfig
from rfengine.training.parallel import Ranks

# Of the chunks are pure noise, from which the first step makes most of a video; of the first chunks alone
# more, since there it reads what the text leaves open.
_FIRST_STEP_SHARE, _FIRST_STEP_STARTS = 0.5, 0.8
_PLAN = FlowPlan(
    (START, OPENING, LATE),
    (0.55, 0.18, 0.27),
    (TextShares(0.6, 0.15), LATER_TEXTS, LATER_TEXTS),
    AdamConfig(8e-4, betas=(0.9, 0.98), weight_decay=0.0, clip=1.0, warm_up=100, fall=0.9),
    muon_rate=0.008,
    muon_decay=0.0,
)


class StartStage(FlowStage):
    """The student's first training, from the teacher's weights; see the module and FlowStage."""

    def __init__(
        self,
        config: StageConfig,
        teacher: WanDiT,
        videos: LatentDataset,
        starts: LatentDataset,
        ranks: Ranks,
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(config.seed)
        model = WanDiT(config.model.model, ChunkedAttentionOps(chunk_tokens(config.model)))
        model.load_state_dict(teacher.state_dict())
        super().__init__(config, _PLAN, model.to(teacher.device), videos, starts, ranks, compiled)
        self._sigmas = torch.tensor(FlowSchedule(config.model.schedule).denoising_sigmas)

    def levels(self, count: int, layout: tuple[Segment, ...], generator: torch.Generator) -> Tensor:
        first, later = _FIRST_STEP_STARTS if layout is START else _FIRST_STEP_SHARE, len(self._sigmas) - 1
        shares = torch.tensor([first] + [(1 - first) / later] * later)
        chosen = torch.multinomial(shares, count * len(layout), True, generator=generator)
        return self._sigmas[chosen].unflatten(0, (count, len(layout)))
