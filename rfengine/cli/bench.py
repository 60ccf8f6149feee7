"""`rfengine bench`: bench/throughput.py of the checkout, under the command's name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import rfengine
from rfengine.cli.terminal import find_device
from rfengine.evaluation.throughput_options import ThroughputOptions

BENCH = Path(rfengine.__file__).resolve().parents[1] / "bench"


def run(options: ThroughputOptions) -> int:
    """Raises RuntimeError where the package was installed without the checkout it comes from."""
    if not (BENCH / "throughput.py").is_file():
        raise RuntimeError(
            f"rfengine bench needs the folder bench/ of a checkout and {BENCH} is not there; clone the "
            "repository and install it with pip install --editable"
        )
    find_device(options.device)
    if str(BENCH) not in sys.path:
        sys.path.insert(0, str(BENCH))
    return importlib.import_module("throughput").run(options)
