"""The toy study: DMD against Re-DMD, sinks against each other, training with eviction against without.

python -m studies.toy.run                   # everything, part by part; what is there already is left as it is
python -m studies.toy.run --list            # the parts, and which are done
python -m studies.toy.run --only 'clips_*'  # these alone
python -m studies.toy.run --size gpu        # three training seeds and the full grid, on a GPU
Ends with records, tables and plots in --results.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn

import torch
import tyro

from rfengine.cli.exit_status import CALLER_ERROR, OTHER_ERROR
from rfengine.cli.process import run_process
from studies.toy.parts import Part, run_parts, study_parts
from studies.toy.plots import draw
from studies.toy.record import read_records
from studies.toy.setting import SIZES, Setting
from studies.toy.tables import render

RESULTS = Path(__file__).resolve().parent / "results"
MOST_WORKERS = 256
LOGGED_EVERY = 5  # steps of the published log: those in which the student learns


@dataclass(frozen=True)
class Options:
    """The toy study, part by part; what is there already is left as it is."""

    size: Literal["cpu", "gpu", "smoke"] = "cpu"
    """How much is trained and sampled."""
    base: Path | None = None
    """Of a run of recipes.tiny, runs/tiny for the cpu size, where what comes before the student is made."""
    directory: Path | None = None
    """Of all else that is made; runs/toy_study for the cpu size."""
    results: Path | None = None
    """Of tables, plots and records; studies/toy/results for the cpu size."""
    device: str | None = None
    """cpu or cuda; cuda for the gpu size, else cpu."""
    workers: int | None = None
    """Parts at once; 4 on CUDA, else one a CPU core."""
    only: str = "*"
    """Parts whose name this pattern matches."""
    list: bool = False
    """List the parts, and which are done, and stop."""
    tables: bool = False
    """Write the results of what is there, and stop."""
    part: str | None = None
    """Make one part in this process."""


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The options with every default in place. Raises SystemExit for what cannot be."""
    options = tyro.cli(Options, args=arguments, config=(tyro.conf.FlagCreatePairsOff,))
    name = "toy_study" if options.size == "cpu" else f"toy_study_{options.size}"
    device = options.device or ("cuda" if options.size == "gpu" else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        _refuse(f"--device is {device}, and there is no CUDA device; give --device cpu")
    workers = options.workers
    if workers is None:
        workers = 4 if device != "cpu" else os.cpu_count() or 1
    if not 1 <= workers <= MOST_WORKERS:
        _refuse(f"--workers is {workers}; run 1 to {MOST_WORKERS} parts at once")
    return replace(
        options,
        base=options.base or Path("runs") / name.replace("toy_study", "tiny"),
        directory=options.directory or Path("runs") / name,
        results=options.results or RESULTS.with_name("results" + name.removeprefix("toy_study")),
        device=device,
        workers=workers,
    )


def _refuse(message: str) -> NoReturn:
    print(f"toy_study: error: {message}", file=sys.stderr)
    raise SystemExit(CALLER_ERROR)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    threads = max(1, (os.cpu_count() or 1) // options.workers)
    device = torch.device(options.device)
    setting = Setting(SIZES[options.size], options.base, options.directory, device, threads)
    parts = study_parts(setting)
    if options.part:
        return _run_part(setting, parts, options.part)
    if options.list:
        for part in parts.values():
            print(f"{'done' if part.result.exists() else '    '}  {part.name}")
        return 0
    if not options.tables:
        _remember_size(setting)
        chosen = [part for part in parts.values() if fnmatch.fnmatch(part.name, options.only)]
        if not chosen:
            _refuse(f"--only is {options.only!r}, which no part matches; see --list")
        signal.signal(signal.SIGTERM, _interrupt)
        command = ["-m", "studies.toy.run", "--size", options.size, "--base", str(options.base)]
        command += [
            "--directory",
            str(options.directory),
            "--device",
            options.device,
            "--workers",
            str(options.workers),
            "--part",
        ]
        failed = run_parts(
            chosen, command, options.workers, setting.directory / "output", partial(print, flush=True)
        )
        if failed:
            print(f"{len(failed)} parts are not there: {', '.join(failed)}", file=sys.stderr)
            return OTHER_ERROR
    publish(setting, options.results)
    return 0


def _interrupt(number: int, _: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _run_part(setting: Setting, parts: dict[str, Part], name: str) -> int:
    if name not in parts:
        _refuse(f"--part is {name!r}; see --list")
    torch.set_num_threads(setting.threads)
    missing = [need for need in parts[name].needs if not parts[need].result.exists()]
    if missing:
        print(f"{name} needs {', '.join(missing)}; make them first", file=sys.stderr)
        return OTHER_ERROR
    parts[name].run(setting)
    return 0


def _remember_size(setting: Setting) -> None:
    """Raises SystemExit where the directory holds a study of another size."""
    path = setting.directory / "size.txt"
    held = path.read_text().strip() if path.exists() else setting.size.name
    if held != setting.size.name:
        _refuse(
            f"{setting.directory} holds a study of size {held}, not {setting.size.name}; choose another "
            "--directory"
        )
    setting.directory.mkdir(parents=True, exist_ok=True)
    path.write_text(setting.size.name + "\n")


def publish(setting: Setting, results: Path) -> None:
    """Copy the records and logs to `results`, and write tables and plots of them there."""
    results.mkdir(parents=True, exist_ok=True)
    for path in sorted(setting.records.glob("*.json")):
        shutil.copyfile(path, results / path.name)
    logs = {}
    for model in setting.size.distilled:
        source, name = setting.directory / model / "log.jsonl", results / f"log_{model}.jsonl"
        if source.exists():
            lines = [line for line in source.read_text().splitlines() if line]
            kept = [line for line in lines if json.loads(line)["step"] % LOGGED_EVERY == 0]
            name.write_text("".join(f"{line}\n" for line in kept))
        if name.exists():
            logs[model] = name
    records = read_records(results)
    (results / "tables.md").write_text(render(records))
    for path in draw(records, logs, results):
        print(path)


if __name__ == "__main__":
    sys.exit(run_process(main, "toy_study"))
