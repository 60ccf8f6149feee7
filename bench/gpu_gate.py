"""All that has to be seen on a GPU, in one command of less than nine minutes, without internet.

    python bench/gpu_gate.py --out bench/results/2026-11-20-h200.json

In turn: the ceilings of the device, the golden files through every backend, the kernel tests and those that
need a GPU, and every kernel checked, timed beside PyTorch and held against its goal. Each part is a process
of its own with a time limit, and the file is written after every result, so that a part that hangs or breaks
costs its own results alone. Needs torch and triton; pytest for the tests. Exits with 1 when a test, a golden
file or a goal fails, and with 0 where there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

import torch
from gate_summary import Result, summarise
from kernel_cases import CASES
from measurement import ABSENT

ROOT = Path(__file__).resolve().parents[1]
PART_SECONDS = {"device": 50, "parity": 80, "native": 60, "tests": 170, "kernels": 300}
TOTAL_SECONDS = 520
WORKERS = 8  # pytest processes: it is compiling that takes the time
OUTCOME = re.compile(
    r"(?P<first>\S+::.*?)?\s*\b(?P<outcome>PASSED|FAILED|ERROR|SKIPPED)\b\s*(?P<second>\S+::.*)?"
)


class Record:
    """The results so far, in a file that is whole at every moment."""

    def __init__(self, path: Path) -> None:
        import triton

        self.path = path
        self.started = time.monotonic()
        self.results: Result = {
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "commit": _told_by("git", "rev-parse", "HEAD"),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "driver_and_clocks": _told_by(
                "nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit",
                "--format=csv,noheader",
            ),
            "parts": {},
        }  # fmt: skip

    def seconds_for(self, part: str) -> float:
        return min(PART_SECONDS[part], TOTAL_SECONDS - (time.monotonic() - self.started))

    def part(self, name: str) -> list[Result]:
        return self.results["parts"].setdefault(name, [])

    def add(self, part: str, result: Result) -> None:
        self.part(part).append(result)
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.results, indent=1) + "\n")
        unfinished.replace(self.path)


def _told_by(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def stream_lines(command: list[str], limit_s: float) -> Iterator[str]:
    """Lines that a command prints, as they come; when it ends badly, a last one that starts with failed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        timed_out = threading.Event()

        def end() -> None:
            timed_out.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(max(1.0, limit_s), end)
        timer.start()
        try:
            yield from (line.rstrip("\n") for line in process.stdout)
            code = process.wait()
        finally:
            timer.cancel()
        if timed_out.is_set():
            yield f"failed: stopped after {limit_s:.0f} s"
        elif code:
            errors.seek(0)
            yield f"failed: exit {code}: " + " | ".join(errors.read().strip().splitlines()[-4:])


def run_part(record: Record, part: str, *arguments: str) -> list[Result]:
    """Run a part of gate_parts.py; returns its own results, the last of which says what it failed with."""
    before = len(record.part(part))
    command = [sys.executable, str(ROOT / "bench" / "gate_parts.py"), part, *arguments]
    for line in stream_lines(command, record.seconds_for(part)):
        if line.startswith("{"):
            record.add(part, json.loads(line))
        elif line.startswith("failed: "):
            record.add(part, {"failed": line.removeprefix("failed: ")})
    return record.part(part)[before:]


def build_native(record: Record) -> None:
    """Compile csrc/ for this GPU where nvcc and cmake are and nobody has, so that its tests run."""
    fatbin = ROOT / "rfengine" / "_native.fatbin"
    if fatbin.exists() or not (shutil.which("nvcc") and shutil.which("cmake")):
        return
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}{'a' if major >= 9 else ''}"
    with tempfile.TemporaryDirectory() as build:
        for command in (
            ["cmake", "-S", str(ROOT), "-B", build, f"-DRFENGINE_CUDA_ARCHS={arch}"],
            ["cmake", "--build", build],
        ):
            for line in stream_lines(command, record.seconds_for("native")):
                if line.startswith("failed: "):
                    record.add("native", {"failed": line.removeprefix("failed: ")})


def run_tests(record: Record) -> None:
    """The kernel tests, then all others that are marked gpu; the outcome of every test as it comes."""
    if importlib.util.find_spec("pytest") is None:
        record.add("tests", {"failed": "pytest is not installed; each kernel is checked before it is timed"})
        return
    spread = ["-n", str(WORKERS)] if importlib.util.find_spec("xdist") else []
    stop = time.monotonic() + record.seconds_for("tests")
    others = [str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    # by file: a test that needs no GPU may import what is not installed here
    for chosen in (["tests/kernels"], ["-m", "gpu", *(path for path in others if "/kernels/" not in path)]):
        left = stop - time.monotonic()
        if left < 5:
            record.add("tests", {"failed": f"no time was left for pytest {' '.join(chosen)}"})
            continue
        go_on = "--continue-on-collection-errors"
        command = [sys.executable, "-m", "pytest", "-v", "--tb=short", go_on, *spread, *chosen]
        for line in stream_lines(command, left):
            outcome = read_outcome(line)
            if outcome is not None:
                record.add("tests", outcome)
            elif line.startswith("E  "):
                record.add("tests", {"told": line[:300]})
            elif line.startswith("failed: ") and not line.startswith("failed: exit 1:"):  # 1: tests failed
                record.add("tests", {"failed": line.removeprefix("failed: ")})


def read_outcome(line: str) -> Result | None:
    """The test and its outcome on a line of pytest -v, with xdist or without; None on other lines."""
    found = OUTCOME.match(re.sub(r"^\[gw\d+\]\s*\[\s*\d+%\]\s*", "", line))
    test = found and (found["first"] or found["second"])
    return {"test": test.strip(), "outcome": found["outcome"]} if found and test else None


def time_kernels(record: Record) -> None:
    """Run the kernels part, and again for the cases behind one that broke the process."""
    found = [json.dumps(result["ceilings"]) for result in record.part("device") if "ceilings" in result]
    given = ["--ceilings", found[0]] if found else []
    major, minor = torch.cuda.get_device_capability()
    able = (case for case in CASES if case.minimum_capability <= 10 * major + minor)
    names = [case.name for case in able if case.is_forward]
    while names and record.seconds_for("kernels") > 20:
        results = run_part(record, "kernels", *given, "--cases", *names)
        begun = [result["case"] for result in results if result.get("begun")]
        if not begun or "failed" not in results[-1]:
            return
        names = names[names.index(begun[-1]) + 1 :]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(ABSENT)
        return 0
    record = Record(options.out)
    run_part(record, "device")
    run_part(record, "parity")
    build_native(record)
    run_tests(record)
    time_kernels(record)
    text, well = summarise(record.results)
    record.results |= {"seconds": time.monotonic() - record.started, "well": well}
    record.save()
    print(text)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
