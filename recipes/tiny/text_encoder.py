"""Trains the text encoder alone, to tell every attribute of a caption from each of its tokens.

The transformer then meets features that are easy to read from the first step on, and the encoder stays
frozen.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.tiny.stage_run import StageRun
from rfengine.config import EngineConfig
from rfengine.models.text_encoder import ByteTokenizer, TextEncoder, build_umt5
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

WORLD = WorldConfig(motion_weights=(0.7, 0.1, 0.1, 0.1), pair_share=0.2)

_BATCH = 48
_LEARNING_RATE = 2e-3
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


def train_caption_encoder(config: EngineConfig, directory: Path, minutes: float, seed: int) -> nn.Module:
    """Train, or go on training, a UMT5 encoder for `minutes` in all; returns it frozen."""
    torch.manual_seed(seed)
    model = build_umt5(config.text).train()
    heads = nn.ModuleDict({name: nn.Linear(config.text.dim, len(values)) for name, values in LABELS.items()})
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=1e-3)
    run = StageRun(directory, "text", minutes)
    if (state := run.resume()) is not None:
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
    while run.progress < 1:
        scenes = sample_scenes(_BATCH, seed * 1_000_003 + run.step, WORLD, "train")
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate(_LEARNING_RATE)
        loss, share = _classify(model, heads, scenes, config.model.text_len)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        run.tick(loss=float(loss.detach()), accuracy=share)
        if run.wants_save() or run.progress >= 1:
            run.save(
                {
                    "model": model.state_dict(),
                    "heads": heads.state_dict(),
                    "optimizer": optimizer.state_dict(),
                }
            )
    with torch.no_grad():
        held_out = sample_scenes(400, seed + 17, WORLD, "held_out")
        run.log(held_out_accuracy=_classify(model, heads, held_out, config.model.text_len)[1])
    return model.eval().requires_grad_(False)


def _classify(
    model: nn.Module, heads: nn.ModuleDict, scenes: list[Scene], text_len: int
) -> tuple[Tensor, float]:
    """Mean cross entropy over all tokens and attributes, and the share of tokens that are right in all of
    them."""
    ids, mask = ByteTokenizer().encode([caption(scene) for scene in scenes], text_len)
    longest = int(mask.sum(1).max())
    ids, mask = ids[:, :longest], mask[:, :longest]
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
    owner = torch.arange(len(scenes))[:, None].expand_as(mask)[mask.bool()]
    labels = [scene_labels(scene) for scene in scenes]
    loss = torch.zeros(())
    right = torch.ones(len(states), dtype=torch.bool)
    for name, head in heads.items():
        wanted = torch.tensor([entry[name] for entry in labels])[owner]
        scores = head(states)
        loss = loss + F.cross_entropy(scores, wanted)
        right &= scores.argmax(-1) == wanted
    return loss / len(heads), float(right.float().mean())


def text_states(model: nn.Module, texts: list[str], text_len: int) -> Tensor:
    """States [N, text_len, dim] of the captions, as the engine's own encoder gives them."""
    return TextEncoder(model, ByteTokenizer(), text_len).encode(texts)
