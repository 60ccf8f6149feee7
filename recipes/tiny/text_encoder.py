"""Trains the text encoder alone, to tell every attribute of a caption from each of its tokens.

The transformer then meets features that are easy to read from the first step on, and the encoder stays
frozen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.tiny.training import StageConfig
from rfengine.models.text_encoder import ByteTokenizer, build_umt5
from rfengine.toy.world import (
    BACKGROUNDS,
    DIRECTIONS,
    MOTIONS,
    PALETTE,
    RADII,
    SHAPES,
    SPEEDS,
    Scene,
    WorldConfig,
    caption,
    sample_scenes,
)
from rfengine.training.config import AdamConfig
from rfengine.training.learner import Figures, Learner
from rfengine.training.parallel import Ranks
from rfengine.training.stages import ModelStage

WORLD = WorldConfig(motion_weights=(0.7, 0.1, 0.1, 0.1), pair_share=0.2)

_BATCH = 48
_ADAM = AdamConfig(2e-3, betas=(0.9, 0.98), weight_decay=1e-3, clip=1.0, warm_up=100, fall=0.5)
_NONE = "none"
_OBJECT_LABELS = {"colour": (*PALETTE, _NONE), "shape": (*SHAPES, _NONE), "size": (*RADII, _NONE)}
LABELS: dict[str, tuple[str, ...]] = {
    "background": BACKGROUNDS,
    "motion": MOTIONS,
    "speed": tuple(SPEEDS),
    "direction": (*DIRECTIONS, _NONE),
    **{f"{name}_{index}": values for index in (0, 1) for name, values in _OBJECT_LABELS.items()},
}


def scene_labels(scene: Scene) -> dict[str, int]:
    """Index into LABELS of every attribute the caption of the scene states."""
    names = {"background": scene.background, "motion": scene.motion, "speed": scene.speed}
    names["direction"] = scene.direction or _NONE
    for index in (0, 1):
        for name in _OBJECT_LABELS:
            present = index < len(scene.objects)
            names[f"{name}_{index}"] = getattr(scene.objects[index], name) if present else _NONE
    return {name: LABELS[name].index(value) for name, value in names.items()}


class TextStage(ModelStage):
    """A UMT5 encoder and one linear classifier for each attribute, from random weights."""

    def __init__(self, config: StageConfig, ranks: Ranks) -> None:
        torch.manual_seed(config.seed)
        text = config.model.text
        encoder = build_umt5(text).train()
        heads = {name: nn.Linear(text.dim, len(values)) for name, values in LABELS.items()}
        model = nn.ModuleDict({"encoder": encoder, "heads": nn.ModuleDict(heads)})
        super().__init__(Learner("text", model, _ADAM, config.steps, 1, ranks), average_decay=0.0)
        self.config = config

    def loss(self, step: int, index: int) -> tuple[Tensor, Figures]:
        scenes = sample_scenes(_BATCH, self.config.step_seed(step), WORLD, "train")
        return self._classified(scenes)

    def encoder(self) -> nn.Module:
        """The encoder, frozen."""
        return self.model["encoder"].eval().requires_grad_(False)

    @torch.no_grad()
    def held_out_accuracy(self) -> float:
        """The share of tokens of 400 held-out captions that are right in all attributes."""
        scenes = sample_scenes(400, self.config.seed + 17, WORLD, "held_out")
        return self._classified(scenes)[1]["accuracy"]

    def _classified(self, scenes: list[Scene]) -> tuple[Tensor, Figures]:
        """Mean cross entropy over all tokens and attributes, and the share of tokens that are right in all of
        them."""
        texts = [caption(scene) for scene in scenes]
        ids, mask = ByteTokenizer().encode(texts, self.config.model.model.text_len)
        longest = int(mask.sum(1).max())
        ids, mask = ids[:, :longest], mask[:, :longest]
        states = self.model["encoder"](input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
        owner = torch.arange(len(scenes))[:, None].expand_as(mask)[mask.bool()]
        labels = [scene_labels(scene) for scene in scenes]
        losses = []
        right = torch.ones(len(states), dtype=torch.bool)
        for name, head in self.model["heads"].items():
            wanted = torch.tensor([entry[name] for entry in labels])[owner]
            scores = head(states)
            losses.append(F.cross_entropy(scores, wanted))
            right &= scores.argmax(-1) == wanted
        return torch.stack(losses).mean(), {"accuracy": float(right.float().mean())}
