"""Tries a form of Triton's attention in a process of its own, before it may run in this one.

None of these kernels had seen a GPU when they were written. One that hangs or breaks the device does it in a
process that is ended after LIMIT_S, and costs nothing else.

    python -m rfengine.tuning.attention_probe FORM DEVICE DTYPE TOKENS WINDOW_TOKENS HEADS HEAD_DIM
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from rfengine.ops.backends import family
from rfengine.ops.table import implementation
from rfengine.tuning.candidates import ATTENTION, TuningCase, attention_case
from rfengine.tuning.record import CaseKey
from rfengine.tuning.trials import Trials

logger = logging.getLogger(__name__)
LIMIT_S = 25.0
SEED = 0
BEGUN, WRONG = "begun", "wrong: "
_ENDING_S = 5.0  # for a process that was killed to be gone
_SHOWN = 200  # characters of an error


@dataclass(frozen=True, slots=True)
class Verdict:
    """problem: why the form is refused, or "". was_run: False where it never came to running the form, which
    says nothing of it."""

    problem: str
    was_run: bool = True


def probe_candidates(case: TuningCase, trials: Trials) -> dict[str, str]:
    """Try the forms of Triton's attention among the candidates that have no verdict yet, and store theirs.
    Returns the reasons by those that could not even be run. A case of another op, or on no GPU, is left."""
    key = case.key
    if key.name != ATTENTION or case.device.type != "cuda":
        return {}
    unknown = [
        name for name in key.candidates if family(name) == "triton" and trials.verdict(key, name) is None
    ]
    untried = {}
    for backend, verdict in probe(key, unknown, case.device).items():
        logger.info("autotune: %s alone, %s: %s", backend, key, verdict.problem or "right")
        if verdict.was_run:
            trials.judge(key, backend, verdict.problem)
        else:
            untried[backend] = f"it could not be tried: {verdict.problem}"
    return untried


def probe(
    key: CaseKey, backends: Sequence[str], device: torch.device, limit_s: float = LIMIT_S
) -> dict[str, Verdict]:
    """Run each backend of the attention at the shape of `key` in a process of its own, all at once."""
    stop = time.monotonic() + limit_s
    verdicts: dict[str, Verdict] = {}
    with tempfile.TemporaryDirectory() as folder:
        outputs = {backend: Path(folder) / backend for backend in backends}
        with ExitStack() as at_the_end:
            processes: dict[str, subprocess.Popen[bytes]] = {}
            for backend, output in outputs.items():
                try:
                    processes[backend] = _start(_command(key, backend, device), output)
                except OSError as error:
                    verdicts[backend] = Verdict(f"no process can be started: {error}", was_run=False)
                else:
                    at_the_end.callback(_end, processes[backend])
            for process in processes.values():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, stop - time.monotonic()))
            codes = {backend: process.poll() for backend, process in processes.items()}
        for backend, code in codes.items():
            verdicts[backend] = _verdict(code, outputs[backend].read_text(errors="replace"), limit_s)
    return verdicts


def _command(key: CaseKey, backend: str, device: torch.device) -> list[str]:
    return [sys.executable, "-P", "-m", __name__, backend, str(device), key.dtype, *map(str, key.shape)]


def _start(command: list[str], output: Path) -> subprocess.Popen[bytes]:
    """In the process group of this one, so that what ends the group ends it as well. Raises OSError."""
    paths = (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", ""))
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with output.open("wb") as out:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=variables
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with suppress(subprocess.TimeoutExpired):  # a driver may keep it until the kernel ends
        process.wait(_ENDING_S)


def _verdict(code: int | None, output: str, limit_s: float) -> Verdict:
    lines = output.strip().splitlines()
    was_run = BEGUN in lines
    if code is None:
        return Verdict(f"it did not come back within {limit_s:g} s", was_run)
    if code:
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
        last = lines[-1] if lines else "nothing was said"
        return Verdict(f"its process ended with {how}: {last[:_SHOWN]}", was_run)
    wrong = next((line.removeprefix(WRONG) for line in lines if line.startswith(WRONG)), "")
    return Verdict(wrong, was_run)


def main(arguments: Sequence[str]) -> None:
    """Run a backend once; print BEGUN before and, where it is wrong, WRONG and why."""
    backend, device, dtype, *sizes = arguments
    case = attention_case(tuple(map(int, sizes)), getattr(torch, dtype), torch.device(device))
    attend = implementation(ATTENTION, backend)

    def run(*inputs: object) -> object:
        sys.stdout.write(f"{BEGUN}\n")
        sys.stdout.flush()
        return attend(*inputs)

    problem = case.problem(run, case.make_inputs(torch.Generator(device).manual_seed(SEED)))
    if problem:
        sys.stdout.write(f"{WRONG}{problem}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
