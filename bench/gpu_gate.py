"""All that has to be seen on a GPU, in one command within the time given, without internet.

    python bench/gpu_gate.py --minutes 8 --out bench/results/2026-11-20-h200.json

In this order: what the device and the libraries reach at the engine's shapes, the tests of the kernels and
those marked gpu, the golden files through every backend, graphs against op by op, throughput with its
comparisons, a long run of chunks, every kernel and the VAE. Each part is processes of its own with a share of
the time, what one leaves goes to the next, and the file is written after every result, so that a part that
hangs or breaks costs its own results alone. Needs torch, triton, numpy, safetensors and transformers; pytest
for the tests. Exits with 1 when something failed or a goal was missed; what there was no time for is told and
is no failure. The thousand chunks of the flatness goal take longer than their share: --parts flatness
--minutes 9.

Without a GPU, or with --self-check, every part runs in small on the CPU, so that what is broken in the gate
shows before a GPU is there; no figure of that counts.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

import torch
from gate.processes import run_part
from gate.record import Record
from gate.summary import summarise

from bench.kernels import ABSENT
from rfengine.benchmark.conditions import commit, device_name, state, versions
from rfengine.cli.process import run_process

BENCH = Path(__file__).resolve().parent
MINUTES, SELF_CHECK_MINUTES = 8.0, 5.0
MOST_MINUTES = 1440.0  # a day
LAST_SECONDS = 5.0  # kept for the summary
CORES_LEFT = 2  # for this process and the system, beside processes that compile
CALLER_ERROR = 2


@dataclass(frozen=True)
class Part:
    """share: of the time, beside the other parts'. silent_share: of its own time that it may say nothing.
    processes: how many share it at most; on a GPU it is compiling that takes the time."""

    share: float
    silent_share: float = 0.6
    processes: int = 1


# Most important first. What a cold start needs on an H100, by estimate, with 10 s for each process: the tests
# compile for 420 s of one core, parity for 51 s; graphs compile, load and tell a story three times at the
# shipped size in 50 s; throughput loads in 45 s, agrees in 30, takes 15 for the frames and 40 for the
# baseline; flatness has 100 chunks of a third of a second.
PARTS = {
    "device": Part(40),
    "tests": Part(75, processes=14),
    "parity": Part(35, processes=6),
    "graphs": Part(70, 0.9),
    "throughput": Part(165, 0.9),
    "flatness": Part(60, 0.9),
    "kernels": Part(40),
    "vae": Part(30, 0.9),
}
SELF_CHECK = "a self-check of the gate in small on the CPU: no figure of it counts"


def part_names(text: str) -> list[str]:
    """Names between commas, in the order of PARTS."""
    names = text.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return [name for name in PARTS if name in names]


def run_gate(record: Record, names: list[str], seconds: float, small: bool) -> None:
    """Run the parts; each may use its share of what the ones before it left."""
    stop = time.monotonic() + seconds - LAST_SECONDS
    for place, name in enumerate(names):
        share = PARTS[name].share / sum(PARTS[later].share for later in names[place:])
        started = time.monotonic()
        limit = max(0.0, share * (stop - started))
        print(f"{name}: at most {limit:.0f} s", file=sys.stderr, flush=True)
        _run(record, name, started + limit, small)
        record.part(name)["seconds"] = round(time.monotonic() - started, 1)
    record.note()


def _run(record: Record, name: str, stop: float, small: bool) -> None:
    """The processes of a part."""
    shards = 1 if small else min(PARTS[name].processes, max(1, (os.cpu_count() or 1) - CORES_LEFT))
    threads = [
        threading.Thread(target=_run_shard, args=(record, name, stop, small, (shard, shards)))
        for shard in range(shards)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _run_shard(record: Record, name: str, stop: float, small: bool, shard: tuple[int, int]) -> None:
    seconds = max(0.0, stop - time.monotonic())
    command = [
        sys.executable, str(BENCH / "gate_parts.py"), name, "--record", str(record.path.resolve()),
        "--seconds", f"{seconds:.1f}", "--shard", *map(str, shard), *(["--small"] if small else []),
    ]  # fmt: skip
    small_environment = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run_part(record, name, command, stop, PARTS[name].silent_share, small_environment if small else None)


def head_of(small: bool, minutes: float, given_commit: str | None) -> dict[str, object]:
    device = torch.device("cpu" if small else "cuda")
    return {
        "self_check": small,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "minutes": minutes,
        "device": device_name(device),
        "before": state(device),
        **versions(device),
        "commit": given_commit or commit(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file of the results; a self-check needs none")
    parser.add_argument(
        "--minutes", type=float, help=f"time for all; {MINUTES:g}, or {SELF_CHECK_MINUTES:g} for a self-check"
    )
    parser.add_argument(
        "--parts", type=part_names, default=list(PARTS), help=f"names between commas: {','.join(PARTS)}"
    )
    parser.add_argument("--self-check", action="store_true", help="in small on the CPU, whatever is here")
    parser.add_argument("--commit", help="what the results are of, where there is no git")
    options = parser.parse_args()
    small = options.self_check or not torch.cuda.is_available()
    minutes = options.minutes
    if minutes is None:
        minutes = SELF_CHECK_MINUTES if small else MINUTES
    if not 0 < minutes <= MOST_MINUTES:
        parser.error(f"--minutes is {minutes}; give more than 0 and at most {MOST_MINUTES}")
    if options.out is None and not small:
        print("gpu_gate: give --out FILE for the results", file=sys.stderr)
        return CALLER_ERROR
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        record = Record(options.out or Path(folder) / "gate.json", head_of(small, minutes, options.commit))
        if small:
            print(SELF_CHECK if options.self_check else f"{ABSENT}; {SELF_CHECK}")
        run_gate(record, options.parts, 60 * minutes, small)
        after = state(torch.device("cpu" if small else "cuda"))
        record.note(after=after, seconds=round(time.monotonic() - started, 1))
        text, well = summarise(record.results)
        record.note(well=well)
        print(text)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(run_process(main, "gpu_gate"))
