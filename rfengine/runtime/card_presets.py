"""Presets for cards of 8 to 24 GB: options of a RuntimeConfig in an order of growing loss, and which fit.

The order: the text encoder leaves the device (nothing is lost), weights in int8 (nearly nothing), the tiny
decoder where the checkpoint has one (seen in the frames), blocks from host memory (time), a smaller size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.config import DTypeName, EngineConfig, RuntimeConfig
from rfengine.costs.shapes import require_stream
from rfengine.grid import LatentGrid
from rfengine.runtime.memory_plan import MemoryPlan, plan_memory
from rfengine.runtime_config import PresetName

GIB = 2**30
SHARES = (3 / 4, 5 / 8, 1 / 2, 3 / 8)  # of the sides of a frame, where no preset fits at full size
_KNOBS = ("text_encoder", "text_weights", "block_weights", "block_buffers")


@dataclass(frozen=True, slots=True)
class CardPreset:
    """options: those that it takes where the caller gave none. quality, speed: what it costs, in words."""

    name: PresetName
    options: RuntimeConfig
    quality: str
    speed: str


# from the largest card on; each has all that the one before has
CARD_PRESETS = (
    CardPreset(
        "24gb", RuntimeConfig(text_encoder="layers"), "lossless",
        "a prompt takes as long as its encoder's weights take to reach the device",
    ),
    CardPreset(
        "16gb", RuntimeConfig(text_encoder="layers", text_weights="int8", block_weights="int8"),
        "near-lossless", "chunks as without it, by count",
    ),
    CardPreset(
        "12gb", RuntimeConfig(text_encoder="layers", text_weights="int8", block_weights="int8", vae="tiny"),
        "reduced with the tiny decoder, else near-lossless", "the tiny decoder is faster",
    ),
    CardPreset(
        "8gb", RuntimeConfig(
            text_encoder="layers", text_weights="int8", block_weights="int8", vae="tiny", block_buffers=2,
        ),
        "reduced with the tiny decoder, else near-lossless",
        "every pass brings the weights of all blocks to the device",
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Candidate:
    """One configuration that may be loaded: with the options of `preset`, at the size of `config`."""

    preset: CardPreset
    config: EngineConfig
    plan: MemoryPlan

    def __str__(self) -> str:
        return f"{self.preset.name} at {self.config.height} x {self.config.width}"


def with_preset(
    config: EngineConfig, name: PresetName, checkpoint: Checkpoint, text_apart: bool, has_loras: bool
) -> EngineConfig:
    """`config` with the options of the preset `name`, where they are not given.

    Given is an option that is not at its default, and what excludes one of the preset's: FP8 and LoRAs keep
    the weights of the blocks as they are, CUDA graphs that are asked for keep them on the device, a
    vae_precision keeps the full decoder. text_apart: the text encoder has a device of its own, and stays
    there.
    """
    own = config.runtime
    preset = next(each for each in CARD_PRESETS if each.name == name).options
    knobs = {knob: getattr(preset, knob) for knob in _KNOBS if getattr(own, knob) is None}
    if text_apart:
        knobs.pop("text_encoder", None)
    if own.multiplies_fp8 or has_loras:
        knobs.pop("block_weights", None)
        knobs.pop("block_buffers", None)
    if own.graphs:
        knobs.pop("block_buffers", None)
    if preset.vae == "tiny" and own.vae == "full" and own.vae_precision == "default":
        knobs["vae"] = "tiny" if checkpoint.has("tiny_vae") else "full"
    return replace(config, runtime=replace(own, preset=name, **knobs))


def left_out(config: EngineConfig, changed: EngineConfig, text_apart: bool) -> list[str]:
    """The options of the preset of `changed`, which with_preset made of `config`, that it has not though
    `config` says nothing about them: it needs more memory then than its name says."""
    preset = next(each for each in CARD_PRESETS if each.name == changed.runtime.preset).options
    missing = [
        knob
        for knob in _KNOBS
        if getattr(preset, knob) is not None and getattr(changed.runtime, knob) is None
        if not (knob == "text_encoder" and text_apart)
    ]
    has_no_tiny = preset.vae == "tiny" and (config.runtime.vae, changed.runtime.vae) == ("full", "full")
    return [*missing, "vae"] if has_no_tiny else missing


def configurations(
    checkpoint: Checkpoint,
    config: EngineConfig,
    text_apart: bool = False,
    has_loras: bool = False,
    may_shrink: bool = True,
) -> list[tuple[CardPreset, EngineConfig]]:
    """What can be loaded, in the order in which it is to be tried: all presets at the size of `config`, then,
    with may_shrink, at smaller ones. A preset that differs in nothing from the one before is left out. Raises
    ValueError for a model that streams nothing."""
    require_stream(config)
    found: list[tuple[CardPreset, EngineConfig]] = []
    for height, width in [(config.height, config.width), *(smaller_sizes(config) if may_shrink else ())]:
        last = None
        for preset in CARD_PRESETS:
            changed = with_preset(config, preset.name, checkpoint, text_apart, has_loras)
            plain = replace(changed.runtime, preset=None)
            if plain != last:
                found.append((preset, replace(changed, height=height, width=width)))
            last = plain
    return found


def smaller_sizes(config: EngineConfig) -> list[tuple[int, int]]:
    """Heights and widths for a card that the size of `config` is too large for, the largest first."""
    step = config.vae.spatial_stride * config.model.patch_size[1]
    sizes = [
        tuple(max(step, math.floor(side * share / step) * step) for side in (config.height, config.width))
        for share in SHARES
    ]
    return [size for size in dict.fromkeys(sizes) if size != (config.height, config.width)]


def planned(
    preset: CardPreset,
    config: EngineConfig,
    device_type: str,
    dtype: DTypeName | torch.dtype | None = None,
    text_apart: bool = False,
) -> Candidate:
    """One of configurations with its plan, which takes seconds. Raises ValueError as plan_memory does."""
    plan = plan_memory(config, LatentGrid.of(config), device_type, dtype, not text_apart)
    return Candidate(preset, config, plan)


def too_small(place: str, tried: Sequence[Candidate], needed: Callable[[MemoryPlan], int]) -> str:
    """That `place` is too small for every one of `tried`, with the numbers. needed: what counts of a plan."""
    least = min(tried, key=lambda each: needed(each.plan))
    numbers = ", ".join(f"{each} {needed(each.plan) / GIB:.1f}" for each in tried)
    of_all = f" (of all, in GiB: {numbers})" if len(tried) > 1 else ""
    return (
        f"{place} too small for every preset of {least.config.name}: {least}, the smallest, needs "
        f"{needed(least.plan) / GIB:.1f} GiB{of_all}; take a smaller model or size"
    )
