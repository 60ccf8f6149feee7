"""One part of gpu_gate.py in its own process: prints what begins and ends and each result as JSON lines."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

import torch
from gate import attention, device, graphs, kernels, native_build, parity, speed, vae
from gate.part import Item, Setting, Teller, run_items
from gate.suite import run_tests

from rfengine.cli.process import run_process

STAND_INS = str(Path(__file__).resolve().parent / "stand_ins")
ITEMS: dict[str, Callable[[Setting], list[Item]]] = {
    "device": lambda setting: [attention.item(setting), *device.items(setting), native_build.item(setting)],
    "parity": parity.items,
    "graphs": graphs.items,
    "throughput": speed.throughput_items,
    "flatness": speed.flatness_items,
    "kernels": kernels.items,
    "vae": vae.items,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=(*ITEMS, "tests"))
    parser.add_argument("--record", type=Path, required=True, help="JSON file of the results so far")
    parser.add_argument("--seconds", type=float, required=True, help="time it has")
    parser.add_argument("--shard", type=int, nargs=2, default=(0, 1), help="which of how many, for tests")
    parser.add_argument("--small", action="store_true", help="the self-check, on a CPU")
    options = parser.parse_args()
    tell = Teller()
    sys.path.append(STAND_INS)  # last, so that what is installed comes first
    stop = time.monotonic() + options.seconds
    setting = Setting(options.part, options.small, stop, options.record, tuple(options.shard))
    if options.part == "tests":
        run_tests(setting, tell)
    else:
        torch.set_grad_enabled(False)
        run_items(ITEMS[options.part](setting), setting, tell)


if __name__ == "__main__":
    sys.exit(run_process(main, "gate_parts"))
