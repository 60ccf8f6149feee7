"""A first start of the engine on this device: forms of the attention are tried, backends timed and kept.

    python bench/first_start.py cuda

Each form of Triton's attention runs in a process of its own (rfengine/tuning/attention_probe.py), so that one
that hangs or breaks the device is left out by every later start. Prints JSON; exit status 1: a form was
refused. The log of the tuning goes to the standard error, which shows where it is.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

if __name__ == "__main__":  # a checkout that need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rfengine.benchmark.measured_engine import MeasuredEngine
from rfengine.benchmark.options import ThroughputOptions
from rfengine.cli.process import run_process
from rfengine.tuning.autotune import cached_decisions
from rfengine.tuning.candidates import ATTENTION


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    engine = MeasuredEngine.load(ThroughputOptions(device=sys.argv[1]))
    found = [each for each in cached_decisions(engine.device) if each.key.name == ATTENTION]
    refused = {name: problem for decision in found for name, problem in decision.refused.items()}
    print(json.dumps({"refused": refused, "choice": engine.pipeline.model.ops.choice}))
    return int(bool(refused))


if __name__ == "__main__":
    sys.exit(run_process(main, "first_start"))
