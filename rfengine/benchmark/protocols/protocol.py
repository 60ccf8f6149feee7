"""A protocol: what is inside of a measured time and what is not, what it fixes, and whose figures it stands
beside."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rfengine.benchmark.measured_engine import MeasuredEngine
from rfengine.benchmark.options import ThroughputOptions
from rfengine.checkpoint.systems import SystemName
from rfengine.runtime_config import DecoderKind

Figures = dict[str, Any]  # by name, with the unit at its end
UNSTATED = "what is inside of its time"  # for a rival that does not say it
RATE = "frames_per_s"  # the one figure of which more is better; all others that rivals have are times


@dataclass(frozen=True, slots=True)
class Rival:
    """A published figure on one GPU, of the transformer of Wan2.1-1.3B in 16 bits.

    figure: the name of ours that it stands beside, whose unit `value` has. note: what is inside of its time.
    window_frames: that each latent frame sees, None for a system whose chunks have no window in common with
    ours. tier: of its frames, as Pipeline.vae_tier; None where it makes none. is_stated: whether what is
    inside of its time is published.
    """

    name: str
    figure: str
    value: float
    gpu: str  # a word of the name that its driver reports
    note: str
    source: str
    window_frames: int | None
    tier: str | None
    steps: int = 4
    height: int = 480
    width: int = 832
    is_stated: bool = True

    def differences(self, setting: dict[str, Any]) -> list[str]:
        """What of a setting (session.py) is other than the rival's, or unknown of it; a ratio means
        something where nothing is."""
        differs = {
            "model": setting["preset"] != "wan-1.3b",
            "size": (setting["height"], setting["width"]) != (self.height, self.width),
            "number of steps": setting["denoising_steps"] != self.steps,
            "window": self.window_frames not in (None, setting["window_frames"]),
            "decoder": setting["vae_tier"] != self.tier,
            "precision": setting["dtype"] not in ("bfloat16", "float16")
            or setting["runtime"]["precision"] not in ("default", "bf16"),
            "machine": self.gpu not in setting["device"].split(),
        }
        found = [name for name, is_so in differs.items() if is_so]
        return found + ([] if self.is_stated else [UNSTATED])

    def ratio(self, figures: Figures) -> float:
        """How many times as fast as the rival our figures are."""
        ours = figures[self.figure]
        return ours / self.value if self.figure == RATE else self.value / ours


@dataclass(frozen=True, slots=True)
class Setting:
    """An engine as a protocol measures it: the user's options, with what the protocol fixes in them.

    context_pass, encodes_text: as MeasuredEngine.load takes them.
    """

    options: ThroughputOptions
    context_pass: bool = True
    encodes_text: bool = False

    def load(self) -> MeasuredEngine:
        return MeasuredEngine.load(self.options, self.context_pass, self.encodes_text)


@dataclass
class Trial:
    """What a protocol measures: an engine that agrees with the reference, and how it was made.

    frames: the length of the video, where the protocol fixes one.
    """

    setting: Setting
    frames: int | None
    engine: MeasuredEngine | None

    def release(self) -> None:
        """Free the engine, before a process of its own loads another."""
        self.engine = None
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


Measure = Callable[[Trial], Figures]


@dataclass(frozen=True, slots=True)
class Protocol:
    """One row of the table (table.py). inside, outside: of the measured time.

    What it fixes; anything else is the user's. system: the cache and the denoising steps. vae: the decoder.
    context_pass: whether chunks have one. decodes: whether frames are made. encodes_text: whether the prompt
    is encoded, where the model has a text encoder. frames: the length of the video. writes: whether a video
    file is written.
    """

    name: str
    summary: str
    inside: tuple[str, ...]
    outside: tuple[str, ...]
    measure: Measure
    rivals: tuple[Rival, ...] = ()
    system: SystemName | None = None
    vae: DecoderKind | None = None
    context_pass: bool = True
    decodes: bool = True
    encodes_text: bool = False
    frames: int | None = None
    writes: bool = False
