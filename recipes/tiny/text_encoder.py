"""Trains the text encoder alone, to tell every attribute of a caption from each of its tokens.

The transformer then meets features that are easy to read from the first step on, and the encoder stays
frozen.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.tiny.training import CPU, StageConfig
from rfengine.models.text_encoder import ByteTokenizer, build_umt5
from rfengine.toy.backgrounds import BACKGROUNDS
from rfengine.toy.captions import HELD_OUT_PATTERNS, caption, opened, paraphrase, sample_scenes
from rfengine.toy.data import scene_text
from rfengine.toy.world import (
    CAMERAS,
    DIRECTIONS,
    MOTIONS,
    PALETTE,
    PANNING,
    PANS,
    RADII,
    SHAPES,
    SPEEDS,
    Scene,
    WorldConfig,
)
from rfengine.training.config import AdamConfig
from rfengine.training.learner import Figures, Learner
from rfengine.training.parallel import Ranks
from rfengine.training.stages import ModelStage

WORLD = WorldConfig(pair_share=0.25)

_BATCH = 48
_OPEN_SHARE = 0.5  # of the texts that leave something open
_ADAM = AdamConfig(2e-3, betas=(0.9, 0.98), weight_decay=1e-3, clip=1.0, warm_up=100, fall=0.5)
_HELD_OUT_TEXTS = 400
_OPEN, _NONE = "open", "none"  # nothing is said, and there is nothing to say
_OBJECT_LABELS = {"colour": PALETTE, "shape": SHAPES, "size": RADII}
LABELS: dict[str, tuple[str, ...]] = {
    "background": (*BACKGROUNDS, _OPEN),
    "motion": (*MOTIONS, _OPEN),
    "speed": (*SPEEDS, _OPEN),
    "direction": (*DIRECTIONS, _OPEN),
    "camera": (*CAMERAS, PANNING),
    "pan": (*PANS, _OPEN),
    **{f"{name}_0": (*values, _OPEN) for name, values in _OBJECT_LABELS.items()},
    **{f"{name}_1": (*values, _OPEN, _NONE) for name, values in _OBJECT_LABELS.items()},
}


def scene_labels(scene: Scene) -> dict[str, int]:
    """Index into LABELS of every attribute, as a text about the scene says it or leaves it open."""
    names = {name: getattr(scene, name) or _OPEN for name in LABELS if name[-1] not in "01"}
    for index in (0, 1):
        for name in _OBJECT_LABELS:
            there = index < len(scene.objects)
            value = getattr(scene.objects[index], name) or _OPEN if there else _NONE
            names[f"{name}_{index}"] = value
    return {name: LABELS[name].index(value) for name, value in names.items()}


class TextStage(ModelStage):
    """A UMT5 encoder and one linear classifier for each attribute, from random weights."""

    def __init__(self, config: StageConfig, ranks: Ranks, device: torch.device = CPU) -> None:
        torch.manual_seed(config.seed)
        text = config.model.text
        encoder = build_umt5(text).train()
        heads = {name: nn.Linear(text.dim, len(values)) for name, values in LABELS.items()}
        model = nn.ModuleDict({"encoder": encoder, "heads": nn.ModuleDict(heads)}).to(device)
        super().__init__(Learner("text", model, _ADAM, config.steps, 1, ranks), average_decay=0.0)
        self.config, self.device = config, device

    def loss(self, step: int, index: int) -> tuple[Tensor, Figures]:
        seed = self.config.step_seed(step)
        generator = random.Random(seed)
        texts, meant = [], []
        for scene in sample_scenes(_BATCH, seed, WORLD, "train"):
            if generator.random() < _OPEN_SHARE:
                scene = opened(scene, generator, generator.uniform(0, 0.7))
            meant.append(scene)
            texts.append(scene_text(scene, generator))
        return self._classified(texts, meant)

    def encoder(self) -> nn.Module:
        """The encoder, frozen."""
        return self.model["encoder"].eval().requires_grad_(False)

    @torch.no_grad()
    def held_out_accuracy(self) -> dict[str, float]:
        """The share of the tokens of held-out scenes' texts that are right in all attributes: of captions, of
        paraphrases and open texts in the patterns of the training, and of paraphrases in those held out."""
        generator = random.Random(self.config.seed + 17)
        scenes = sample_scenes(_HELD_OUT_TEXTS, self.config.seed + 17, WORLD, "held_out")
        parts = [opened(scene, generator, 0.35) for scene in scenes]
        kinds = {
            "captions": ([caption(scene) for scene in scenes], scenes),
            "paraphrases": ([paraphrase(scene, generator) for scene in scenes], scenes),
            "open": ([paraphrase(part, generator) for part in parts], parts),
            "held_out_patterns": (
                [paraphrase(scene, generator, HELD_OUT_PATTERNS) for scene in scenes],
                scenes,
            ),
        }
        return {name: self._classified(*pair)[1]["accuracy"] for name, pair in kinds.items()}

    def _classified(self, texts: list[str], scenes: Sequence[Scene]) -> tuple[Tensor, Figures]:
        """Mean cross entropy over all tokens and attributes, and the share of tokens that are right in all of
        them."""
        ids, mask = ByteTokenizer().encode(texts, self.config.model.model.text_len)
        longest = int(mask.sum(1).max())
        ids, mask = (part[:, :longest].to(self.device) for part in (ids, mask))
        states = self.model["encoder"](input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
        owner = torch.arange(len(scenes), device=self.device)[:, None].expand_as(mask)[mask.bool()]
        labels = [scene_labels(scene) for scene in scenes]
        losses = []
        right = torch.ones(len(states), dtype=torch.bool, device=self.device)
        for name, head in self.model["heads"].items():
            wanted = torch.tensor([entry[name] for entry in labels], device=self.device)[owner]
            scores = head(states)
            losses.append(F.cross_entropy(scores, wanted))
            right &= scores.argmax(-1) == wanted
        return torch.stack(losses).mean(), {"accuracy": float(right.float().mean())}
