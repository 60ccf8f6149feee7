"""The forms of Triton's attention, each first run in a process of its own: what hangs or breaks the device
there is left out by every later part, which finds that in autotune's record."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gate.part import AbsentError, Item, Setting
from gate.record import Result

from rfengine.config import PRESETS
from rfengine.grid import LatentGrid
from rfengine.tuning.attention_probe import LIMIT_S, attention_problems
from rfengine.tuning.candidates import TuningShapes
from rfengine.tuning.record import TuningCache, default_cache_path, describe_machine

MODEL = "wan-1.3b"


def item(setting: Setting) -> Item:
    return Item("attention forms", lambda: _tried(setting), least_s=0 if setting.small else LIMIT_S)


def _tried(setting: Setting) -> Iterator[Result]:
    if setting.small:
        raise AbsentError("a self-check has no GPU to try them on")
    config, device = PRESETS[MODEL], torch.device("cuda", torch.cuda.current_device())
    cache = TuningCache(default_cache_path(), describe_machine(device))
    problems = attention_problems(TuningShapes(config, LatentGrid.of(config), torch.bfloat16, device), cache)
    for form, problem in problems.items():
        yield {"form": form, "problem": problem}
    refused = [f"{form}: {problem}" for form, problem in problems.items() if problem]
    if refused:
        raise RuntimeError("; ".join(refused))
