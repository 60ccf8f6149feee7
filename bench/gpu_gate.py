"""Everything to see on a GPU, in one command within a given time, without internet.

    python bench/gpu_gate.py --minutes 8 --out bench/results/2026-11-20-h200.json

A list of commands in parts: facts of the device and a first start, the tests of the kernels and those marked
gpu, the golden files through every backend, CUDA graphs beside eager launches, throughput with its baseline,
the forms of the attention, every other kernel and the VAE, and the protocols where they are asked for. Each
command is a process group of its own that is killed at the limit of its part, so a hang or a crash costs one
command; time that a part leaves goes to the next. The record is written after every command, and what each
printed stays in the folder of the same name beside it. Exit status 1: something failed or a goal was missed.
Running out of time is no failure.

Needs torch, triton, numpy, safetensors, transformers, tqdm and pytest. Bring as wheels, all pure Python:
tyro, typeguard, docstring-parser, typing-extensions 4.14 or newer; without hypothesis the tests that draw
their inputs are skipped. 8 minutes are enough with a warm Triton cache (bench/compile_report.py --cache),
named in TRITON_CACHE_DIR.
The thousand chunks of the goals are --parts bench --chunks 1000 --minutes 9. The named protocols of `rfengine
bench` (docs/benchmarks.md) take minutes of their own, --parts protocols --minutes 10, and so does FP8,
--parts fp8 --minutes 8.

Without a GPU, or with --self-check, every part runs in miniature on the CPU, to show what is broken before a
GPU is there; none of its figures counts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a checkout that need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.goals import CUT_SHORT, DONE, FAILED, NOT_RUN, VAE_COMMANDS, counts_of, summarise
from bench.kernel_cases import CASES
from rfengine.benchmark.conditions import commit, device_name, state, versions
from rfengine.cli.process import run_process
from rfengine.files import write_text
from rfengine.ops.backends import backend_reasons, fp8_absence

ROOT = Path(__file__).resolve().parents[1]
MINUTES, SMALL_MINUTES = 8.0, 5.0
MOST_MINUTES = 1440.0  # a day
LAST_SECONDS = 5.0  # kept for the summary
LEAST_SECONDS = 5.0  # a command with less left is not started: it would not get past its imports
LOOK_S = 0.1  # between two looks at the running processes
CORES_LEFT = 2  # for this process and the system, beside processes that compile
REASON_CHARACTERS = 400
NO_TIME = "no time was left"
NO_TESTS = 5  # exit status of pytest for a file whose tests are all left out
GRAPH_TESTS = "runtime/test_gpu_stream"  # the part "graphs"
ATTENTION_CASES = [case.name for case in CASES if case.op.startswith("sink_window_attention")]
FP8_COMMANDS = {
    "fp8": ("--precision", "fp8"),
    "fp8-attention": ("--precision", "fp8-attention"),
    "fp8 with its decoder": ("--precision", "fp8", "--vae-precision", "fp8"),
}
FP8_CHUNKS = 30  # that an engine in FP8 measures before it is compared
SMALLEST = ("--model", "tiny", "--height", "32", "--width", "32", "--threads", "1")
SHORT, LONG = ("--chunks", "30"), ("--chunks", "100")  # 100 are the least with a p99
# which run together, with options of their own; the most wanted first
PROTOCOL_COMMANDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "transformer": (("dit-4-passes", "dit-context", "dit-window-9"), SHORT),
    "decoders": (("full-decoder", "tiny-decoder"), SHORT),
    "latency": (("latency", "first-frame"), LONG),
    "repetition": (("repeat",), ()),
    "clips": (("clip-warm", "clip-cold"), ("--graphs",)),
    "file": (("file",), ("--graphs",)),
}
BACKENDS = ("reference", "triton", "native", "cudnn", "flash")
SIXTEEN_BIT = ("cudnn", "flash")  # attention of the libraries is for 16 bits only
SMALL_ENVIRONMENT = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
SELF_CHECK = "a self-check of the gate in miniature on the CPU: none of its figures counts"
ABSENT = "no CUDA device here: nothing is measured"
OUTCOME = re.compile(r"^(\S+\.py::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)


@dataclass(frozen=True)
class Setting:
    """How commands are made. small: the self-check. folder: where each leaves its files."""

    small: bool
    folder: Path
    chunks: int = 100

    @property
    def device(self) -> str:
        return "cpu" if self.small else "cuda"

    def output_of(self, command: Command, kind: str = "out") -> Path:
        name = re.sub(r"\W+", "-", command.name)
        return self.folder / f"{name}.{kind}"


@dataclass(frozen=True)
class Command:
    """One process.

    absence: why it cannot run here, or "". json: the file its results are in; its output where it is None.
    shows: print its output at the end. passes: exit statuses of success.
    """

    name: str
    arguments: tuple[str, ...]
    absence: str = ""
    json: Path | None = None
    shows: bool = False
    passes: tuple[int, ...] = (0,)
    read: Callable[[str], Any] = lambda text: read_json(text)


@dataclass(frozen=True)
class Part:
    """seconds: what it takes of 8 minutes on an H100 with a warm Triton cache, estimated; its weight in any
    other time. processes: how many of its commands run at once."""

    seconds: float
    commands: Callable[[Setting], list[Command]]
    processes: int = 1


def python(*arguments: str | Path) -> tuple[str, ...]:
    return (sys.executable, *map(str, arguments))


def rfengine(*arguments: str | Path) -> tuple[str, ...]:
    return python("-m", "rfengine.cli", *arguments)


def measuring(name: str, setting: Setting, *call: str) -> Command:
    """A command that leaves its figures in a file."""
    path = setting.folder / f"{name}.json"
    return Command(name, (*call, "--json", str(path)), json=path, shows=True)


def testing(name: str, *arguments: str | Path) -> Command:
    """A pytest. -v names each test before it runs, so that the output tells where a killed process was."""
    call = python("-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *arguments)
    absence = "" if importlib.util.find_spec("pytest") else "pytest is not installed"
    return Command(name, call, absence, passes=(0, NO_TESTS), read=read_tests)


def device_commands(setting: Setting) -> list[Command]:
    """Facts, a first start, and csrc/ compiled for this GPU where it can be and is not yet, for its tests."""
    missing = [tool for tool in ("nvcc", "cmake") if shutil.which(tool) is None]
    absence = "a self-check builds nothing" if setting.small else f"{missing[0]} is absent" if missing else ""
    if (ROOT / "rfengine" / "_native.fatbin").exists():
        absence = "it is built already"
    major, minor = (9, 0) if setting.small else torch.cuda.get_device_capability()
    arch = f"{major}{minor}{'a' if major >= 9 else ''}"
    folder = shlex.quote(str(setting.folder / "native"))
    build = f"cmake -S . -B {folder} -DRFENGINE_CUDA_ARCHS={arch} && cmake --build {folder}"
    return [
        Command("doctor", rfengine("doctor", "--json")),
        Command("first start", python("bench/first_start.py", setting.device)),
        Command("native build", ("sh", "-c", build), absence),
    ]


def test_commands(setting: Setting) -> list[Command]:
    """One pytest for each file of tests/kernels and for each with a test marked gpu; the largest first."""
    if setting.small:
        return [testing("test_flow_step", "tests/kernels/test_flow_step.py", "-k", "size0-dtype0")]
    commands = []
    for path in sorted((ROOT / "tests").rglob("test_*.py"), key=lambda path: -path.stat().st_size):
        name = path.relative_to(ROOT / "tests").with_suffix("").as_posix()
        if path.parent.name == "kernels":
            commands.append(testing(name, path))
        elif "mark.gpu" in path.read_text() and name != GRAPH_TESTS:
            commands.append(testing(name, path, "-m", "gpu"))
    return commands


def graph_commands(setting: Setting) -> list[Command]:
    chosen = ("-k", "cpu") if setting.small else ("-m", "gpu")
    return [testing("stream", f"tests/{GRAPH_TESTS}.py", *chosen)]


def parity_commands(setting: Setting) -> list[Command]:
    golden = sorted((ROOT / "tests" / "golden").glob("*.safetensors"))
    reasons = {"reference": ""} if setting.small else backend_reasons(setting.device)
    if setting.small:
        golden = golden[:1]
    commands = []
    for backend in ("reference",) if setting.small else BACKENDS:
        for dtype in ("bfloat16",) if backend in SIXTEEN_BIT else ("float32", "bfloat16"):
            options = ("--backend", backend, "--device", setting.device, "--dtype", dtype)
            call = rfengine("parity", *golden, *options)
            commands.append(Command(f"{backend} {dtype}", call, reasons[backend]))
    return commands[:1] if setting.small else commands


def bench_commands(setting: Setting) -> list[Command]:
    size = (*SMALLEST, "--chunks", "2") if setting.small else ("--chunks", str(setting.chunks))
    call = rfengine("bench", "--device", setting.device, "--compare", "baseline", *size)
    return [measuring("bench", setting, *call)]


def fp8_commands(setting: Setting) -> list[Command]:
    """The engine with each choice of FP8 and without, alternating in one process."""
    size = (*SMALLEST, "--chunks", "1") if setting.small else ("--chunks", str(FP8_CHUNKS))
    call = rfengine("bench", "--device", setting.device, "--compare", "default", *size)
    absence = fp8_absence(torch.device(setting.device))
    made = (measuring(name, setting, *call, *options) for name, options in FP8_COMMANDS.items())
    return [replace(each, absence=absence) for each in made][: 1 if setting.small else None]


def protocol_commands(setting: Setting) -> list[Command]:
    """Named protocols of `rfengine bench`; the figures of those that ended before a limit are in the file."""
    commands = []
    for name, (protocols, options) in PROTOCOL_COMMANDS.items():
        if setting.small and name not in ("decoders", "latency"):
            continue
        absence = "" if "file" not in protocols or importlib.util.find_spec("av") else "PyAV is not installed"
        how = (*SMALLEST, "--chunks", "1") if setting.small else options
        call = rfengine("bench", "--device", setting.device, "--protocol", ",".join(protocols), *how)
        commands.append(replace(measuring(name, setting, *call), absence=absence))
    return commands


def attention_commands(setting: Setting) -> list[Command]:
    """Apart from the other kernels, which one of its forms that hangs would otherwise take along."""
    return [_kernels("attention", setting, ATTENTION_CASES[:1] if setting.small else ATTENTION_CASES)]


def kernel_commands(setting: Setting) -> list[Command]:
    others = [case.name for case in CASES if case.name not in ATTENTION_CASES]
    return [_kernels("kernels", setting, ["rms_norm"] if setting.small else others)]


def _kernels(name: str, setting: Setting, cases: Sequence[str]) -> Command:
    how = "--check" if setting.small else "--no-compile"
    return measuring(name, setting, *python("bench/kernels.py", how, "--case", *cases))


def vae_commands(setting: Setting) -> list[Command]:
    size = (*SMALLEST, "--chunks", "1") if setting.small else ("--chunks", "10")
    call = python("bench/vae.py", "--device", setting.device, "--no-diffusers", *size, "--backend")
    backends = ("reference",) if setting.small else VAE_COMMANDS
    return [measuring(backend, setting, *call, backend) for backend in backends]


# Most important first. With a cold cache the tests compile for 420 s of one core, parity for 51 s.
WORKERS = max(1, min(14, (os.cpu_count() or 1) - CORES_LEFT))
PARTS = {
    "device": Part(60, device_commands, 3),
    "tests": Part(65, test_commands, WORKERS),
    "parity": Part(35, parity_commands, WORKERS),
    "graphs": Part(50, graph_commands),
    "bench": Part(170, bench_commands),
    "attention": Part(20, attention_commands),
    "kernels": Part(30, kernel_commands),
    "vae": Part(45, vae_commands),
    # in a self-check; on a GPU they have minutes of their own
    "fp8": Part(60, fp8_commands),
    "protocols": Part(60, protocol_commands),
}
OWN_MINUTES = ("fp8", "protocols")
GATE_PARTS = [name for name in PARTS if name not in OWN_MINUTES]


def read_json(text: str) -> Any:
    """The JSON value that a text is, or the list of those on its lines; NaN and infinities become None."""
    values = []
    for piece in (text, *text.splitlines()):
        with suppress(ValueError):  # a line of another kind, or one that was cut off
            values.append(json.loads(piece, parse_constant=lambda _: None))
            if piece == text:
                return values[0]
    return values


def read_tests(text: str) -> dict[str, Any]:
    """Counts of outcomes, a line for each failure, and the test that was running at the end."""
    outcomes = OUTCOME.findall(text)
    counts = Counter(word.lower() for _, word in outcomes)
    failures = re.findall(r"^(?:FAILED|ERROR) .*", text, re.MULTILINE)
    listed = " ".join(failures)
    failures += [f"{word} {test}" for test, word in outcomes if word[0] in "FE" and test not in listed]
    last = text.rstrip().splitlines()[-1:]
    running = last[0].strip() if last and "::" in last[0] and not OUTCOME.match(last[0]) else None
    return {**counts, "failures": [line[:REASON_CHARACTERS] for line in failures], "running": running}


def save(path: Path, record: dict[str, Any]) -> None:
    """Write the results so far; the file is whole at every moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


class Run:
    """A command on its way: its process, and what it prints in files named after it."""

    def __init__(self, command: Command, setting: Setting) -> None:
        self.command, self.started = command, time.monotonic()
        self.output, self.errors = (setting.output_of(command, kind) for kind in ("out", "err"))
        if command.json is not None:  # figures of an earlier run are none of this one
            command.json.unlink(missing_ok=True)
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        added = {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "COLUMNS": "300"}
        added |= SMALL_ENVIRONMENT if setting.small else {}
        with self.output.open("wb") as output, self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                command.arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, cwd=ROOT,
                env=os.environ | added, start_new_session=True,
            )  # fmt: skip

    def kill(self) -> None:
        """End the process and all that it started."""
        with suppress(ProcessLookupError):  # the group outlives its leader while one that it started runs
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def outcome(self) -> dict[str, Any]:
        """State, seconds and results; the process has ended, or is killed now."""
        code = self.process.poll()
        self.kill()
        output = self.output.read_text(errors="replace")
        where = self.command.json
        text = output if where is None else where.read_text() if where.exists() else ""
        found = {"seconds": round(time.monotonic() - self.started, 1), "results": self.command.read(text)}
        if code in self.command.passes:
            return {"state": DONE} | found
        last = " | ".join((self.errors.read_text(errors="replace").strip() or output).splitlines()[-4:])
        if code is None:
            how = f"killed after {found['seconds']:.0f} s"
        else:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
        reason = f"{how}: {last[-REASON_CHARACTERS:]}"
        return {"state": CUT_SHORT if code is None else FAILED, "reason": reason} | found


def run_commands(
    part: str, commands: Sequence[Command], stop: float, setting: Setting
) -> Iterator[tuple[Command, dict[str, Any]]]:
    """Run the commands of a part, so many at once as it says, until time.monotonic() is `stop`; yields each
    with its outcome as it ends."""
    waiting, running = deque(commands), list[Run]()
    try:
        while waiting or running:
            while waiting and len(running) < PARTS[part].processes:
                command = waiting.popleft()
                reason = command.absence or (NO_TIME if stop - time.monotonic() < LEAST_SECONDS else "")
                if reason:
                    yield command, {"state": NOT_RUN, "reason": reason}
                else:
                    running.append(Run(command, setting))
            for run in list(running):
                if run.process.poll() is not None or time.monotonic() >= stop:
                    yield run.command, run.outcome()
                    running.remove(run)
            time.sleep(LOOK_S)
    finally:
        for run in running:
            run.kill()


def run_gate(
    path: Path, record: dict[str, Any], names: Sequence[str], seconds: float, setting: Setting
) -> None:
    """Run the parts; each may use its share of what the ones before it left."""
    stop = time.monotonic() + seconds - LAST_SECONDS
    for place, name in enumerate(names):
        share = PARTS[name].seconds / sum(PARTS[later].seconds for later in names[place:])
        started = time.monotonic()
        limit = max(0.0, share * (stop - started))
        print(f"{name}: at most {limit:.0f} s", file=sys.stderr, flush=True)
        part = record["parts"].setdefault(name, {"commands": {}})
        for command, outcome in run_commands(name, PARTS[name].commands(setting), started + limit, setting):
            part["commands"][command.name] = outcome
            part["seconds"] = round(time.monotonic() - started, 1)
            save(path, record)
            if command.shows and outcome["state"] != NOT_RUN:
                print(setting.output_of(command).read_text(errors="replace"), flush=True)
        print(f"{name:<10}{counts_of(part)}", file=sys.stderr, flush=True)


def head_of(small: bool, minutes: float, given_commit: str | None) -> dict[str, Any]:
    device = torch.device("cpu" if small else "cuda")
    return {
        "self_check": small, "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "minutes": minutes,
        "device": device_name(device), "before": state(device), **versions(device),
        "commit": given_commit or commit(),
    }  # fmt: skip


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--out", type=Path, help="JSON file of the results; a self-check needs none")
    add("--minutes", type=float, help=f"time for all; {MINUTES:g}, {SMALL_MINUTES:g} for a self-check")
    add("--parts", nargs="+", choices=PARTS, help="these alone; else all, on a GPU but fp8 and protocols")
    add("--chunks", type=int, default=100, help="chunks that part bench measures")
    add("--self-check", action="store_true", help="in miniature on the CPU, whatever is here")
    add("--commit", help="the commit that is measured, where there is no git")
    options = made.parse_args(arguments)
    options.small = options.self_check or not torch.cuda.is_available()
    options.parts = options.parts or (list(PARTS) if options.small else GATE_PARTS)
    if options.minutes is None:
        options.minutes = SMALL_MINUTES if options.small else MINUTES
    if not 0 < options.minutes <= MOST_MINUTES:
        made.error(f"--minutes is {options.minutes}; give more than 0 and at most {MOST_MINUTES}")
    if options.out is None and not options.small:
        made.error("give --out FILE for the results")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments)
    small, started = options.small, time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        path = (options.out or Path(temporary) / "gate.json").resolve()
        record = head_of(small, options.minutes, options.commit) | {"parts": {}}
        save(path, record)  # an earlier record of this name ends here
        folder = path.with_suffix("")
        folder.mkdir(exist_ok=True)
        if small:
            print(SELF_CHECK if options.self_check else f"{ABSENT}; {SELF_CHECK}")
        setting = Setting(small, folder, options.chunks)
        names = [name for name in PARTS if name in options.parts]
        run_gate(path, record, names, 60 * options.minutes, setting)
        text, well = summarise(record)
        after = state(torch.device(setting.device))
        record |= {"after": after, "seconds": round(time.monotonic() - started, 1), "well": well}
        save(path, record)
        print(text)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(run_process(main, "gpu_gate"))
