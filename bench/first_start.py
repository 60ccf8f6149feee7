"""A first start of the engine on this device: forms of the attention are tried, backends timed and kept.

    python bench/first_start.py cuda

Each form of Triton's attention runs in a process of its own (rfengine/tuning/attention_probe.py), so that one
that hangs or breaks the device is left out by every later start. Prints JSON lines; exit status 1: a form was
refused. The log of the tuning goes to the standard error, which shows where it is.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

if __name__ == "__main__":  # a checkout that need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from rfengine.benchmark.measured_engine import Engine
from rfengine.benchmark.options import ThroughputOptions
from rfengine.cli.process import run_process
from rfengine.config import PRESETS
from rfengine.grid import LatentGrid
from rfengine.tuning.attention_probe import attention_problems
from rfengine.tuning.candidates import TuningShapes
from rfengine.tuning.record import TuningCache, default_cache_path, describe_machine

MODEL = "wan-1.3b"


def main() -> int:
    name = sys.argv[1]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    problems: dict[str, str] = {}
    if name != "cpu":
        config, device = PRESETS[MODEL], torch.device("cuda", torch.cuda.current_device())
        cache = TuningCache(default_cache_path(), describe_machine(device))
        problems = attention_problems(
            TuningShapes(config, LatentGrid.of(config), torch.bfloat16, device), cache
        )
    print(json.dumps({"attention": problems}), flush=True)
    engine = Engine.load(ThroughputOptions(device=name))
    print(json.dumps({"choice": engine.pipeline.model.ops.choice}), flush=True)
    return int(any(problems.values()))


if __name__ == "__main__":
    sys.exit(run_process(main, "first_start"))
