"""Tries a form of Triton's attention in a process of its own, before it may contend in this one.

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
import torch.nn.functional as F
from torch import Tensor

from rfengine.ops.backends import family
from rfengine.ops.table import implementation
from rfengine.tuning.candidates import Contest, Site, backend_contests
from rfengine.tuning.record import Subject, TuningCache
from rfengine.tuning.trials import Trials

logger = logging.getLogger(__name__)
ATTENTION = "sink_window_attention"
LIMIT_S = 25.0
CHECKED_ROWS = 128  # spread over all queries: attention knows no order of them
ERROR_FACTOR = 2.0  # times the error of torch's own attention in the same dtype
SEED = 0
BEGUN, WRONG = "begun", "wrong: "
_ENDING_S = 5.0  # for a process that was killed to be gone
_TOLD = 200  # characters of an error


@dataclass(frozen=True, slots=True)
class Verdict:
    """problem: why the form is refused, or "". was_run: False where it never came to running the form, which
    says nothing of it."""

    problem: str
    was_run: bool = True


def probe_contenders(contest: Contest, trials: Trials) -> dict[str, str]:
    """Try the forms of Triton's attention among the contenders that nothing is known of, and keep what became
    of them. Returns why by those that could not even be run; of a contest of anything else, or on no GPU,
    nothing is tried."""
    subject = contest.subject
    if subject.key != ATTENTION or contest.device.type != "cuda":
        return {}
    unknown = [
        name
        for name in subject.contenders
        if family(name) == "triton" and trials.verdict(subject, name) is None
    ]
    untried = {}
    for backend, verdict in probe(subject, unknown, contest.device).items():
        logger.info("autotune: %s alone, %s: %s", backend, subject, verdict.problem or "right")
        if verdict.was_run:
            trials.judge(subject, backend, verdict.problem)
        else:
            untried[backend] = f"it could not be tried: {verdict.problem}"
    return untried


def attention_problems(site: Site, cache: TuningCache) -> dict[str, str]:
    """Why forms of Triton's attention are refused at `site`, or "" where they are right, by backend; what is
    not known is tried."""
    contest = next(each for each in backend_contests(site) if each.subject.key == ATTENTION)
    trials = Trials(cache)
    problems = probe_contenders(contest, trials) | trials.refused(contest.subject)
    return {name: problems.get(name, "") for name in contest.contenders if family(name) == "triton"}


def probe(
    subject: Subject, backends: Sequence[str], device: torch.device, limit_s: float = LIMIT_S
) -> dict[str, Verdict]:
    """What became of each backend of the attention at the shape of `subject`, all at the same time."""
    stop = time.monotonic() + limit_s
    processes: dict[str, subprocess.Popen[bytes]] = {}
    verdicts: dict[str, Verdict] = {}
    with tempfile.TemporaryDirectory() as folder:
        with _killed_at_the_end(processes):
            for backend in backends:
                with (Path(folder) / backend).open("wb") as out:
                    try:
                        processes[backend] = _start(_command(subject, backend, device), out)
                    except OSError as error:
                        verdicts[backend] = Verdict(f"no process can be started: {error}", was_run=False)
            for process in processes.values():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, stop - time.monotonic()))
            codes = {backend: process.poll() for backend, process in processes.items()}
        for backend, code in codes.items():
            told = (Path(folder) / backend).read_text(errors="replace")
            verdicts[backend] = _verdict(code, told, limit_s)
    return verdicts


def _command(subject: Subject, backend: str, device: torch.device) -> list[str]:
    sizes = map(str, subject.shape)
    return [sys.executable, "-P", "-m", __name__, backend, str(device), subject.dtype, *sizes]


def _start(command: list[str], out: IO[bytes]) -> subprocess.Popen[bytes]:
    """In the process group of this one, so that what ends the group ends it as well. Raises OSError."""
    paths = (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", ""))
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=variables
    )


@contextmanager
def _killed_at_the_end(processes: dict[str, subprocess.Popen[bytes]]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes.values():
            process.kill()
        for process in processes.values():
            with suppress(subprocess.TimeoutExpired):  # a driver may keep it until the kernel ends
                process.wait(_ENDING_S)


def _verdict(code: int | None, told: str, limit_s: float) -> Verdict:
    lines = told.strip().splitlines()
    was_run = BEGUN in lines
    if code is None:
        return Verdict(f"it did not come back within {limit_s:g} s", was_run)
    if code:
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
        last = lines[-1] if lines else "nothing was said"
        return Verdict(f"its process ended with {how}: {last[:_TOLD]}", was_run)
    wrong = next((line.removeprefix(WRONG) for line in lines if line.startswith(WRONG)), "")
    return Verdict(wrong, was_run)


def main(arguments: Sequence[str]) -> None:
    """Run a backend once; say BEGUN before and, where it is wrong, WRONG and why."""
    backend, device, dtype, *sizes = arguments
    tokens, window, heads, head_dim = map(int, sizes)
    generator = torch.Generator(device).manual_seed(SEED)
    q, keys, values = (
        torch.randn(1, length, heads, head_dim, generator=generator, dtype=torch.float32, device=device).to(
            getattr(torch, dtype)
        )
        for length in (tokens, window, window)
    )
    filled = torch.full((1,), window, dtype=torch.int32, device=device)
    run = implementation(ATTENTION, backend)
    _say(BEGUN)
    problem = problem_of(run(q, keys, values, window, filled), q, keys, values)
    if problem:
        _say(f"{WRONG}{problem}")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def problem_of(found: Tensor, q: Tensor, keys: Tensor, values: Tensor) -> str:
    """Why `found` is no attention, or "": its rows against float64, beside torch's own in the same dtype."""
    if found.shape != q.shape:
        return f"the result is {tuple(found.shape)}, not {tuple(q.shape)}"
    every = slice(None, None, max(1, q.shape[1] // CHECKED_ROWS))
    truth = _attention(q[:, every].double(), keys.double(), values.double())
    own = (_attention(q, keys, values)[:, every].double() - truth).norm() / truth.norm()
    error = (found[:, every].double() - truth).norm() / truth.norm()
    limit = ERROR_FACTOR * float(own) + torch.finfo(q.dtype).eps / 16
    if not error <= limit:  # a NaN is refused as well
        return f"the result is {float(error):.2e} from float64, the limit is {limit:.2e}"
    return ""


def _attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    by_head = (each.transpose(1, 2) for each in (q, keys, values))
    return F.scaled_dot_product_attention(*by_head).transpose(1, 2)


if __name__ == "__main__":
    main(sys.argv[1:])
