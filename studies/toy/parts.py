"""The parts of the toy study: what each needs, what it leaves, and the processes that make them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from studies.toy.clips import measure_clips
from studies.toy.scenarios import SCENARIOS
from studies.toy.setting import WITH_EVICTION, WITHOUT_EVICTION, Setting, split_model, trained_sink
from studies.toy.streams import measure_streams, sink_names
from studies.toy.tables import TRUE_MODEL, TRUE_SINK
from studies.toy.trainings import run_training, train_start

_POLL_SECONDS = 0.5
_STOP_SECONDS = 120.0  # a training that is to stop saves first


@dataclass(frozen=True)
class Part:
    """One training or one set of samples. result: the file or directory it leaves, whole or not at all."""

    name: str
    needs: tuple[str, ...]
    result: Path
    run: Callable[[Setting], None]


def study_parts(setting: Setting) -> dict[str, Part]:
    """Every part by its name, each after the parts that it needs.

    One student streams under every sink; the others stream under the one that they were trained with. Of
    those that are trained on streams only the two that differ in eviction have clips as well: short
    clips hardly depend on the sink.
    """
    size = setting.size
    parts: dict[str, Part] = {}

    def add(name: str, needs: tuple[str, ...], result: Path, run: Callable[[Setting], None]) -> None:
        parts[name] = Part(name, needs, result, run)

    def stream(model: str, sink: str) -> None:
        for scenario in SCENARIOS:
            name = f"streams_{model}_{sink}_{scenario}"
            needs = ("start",) if model == TRUE_MODEL else (model,)
            run = partial(measure_streams, model=model, sink=sink, scenario=scenario)
            add(name, needs, setting.records / f"{name}.json", run)

    add("start", (), setting.checkpoint("start"), train_start)
    for name in (*size.distilled, *size.streamed):
        add(name, ("start",), setting.checkpoint(name), partial(run_training, name=name))
    judged = (name for name in size.streamed if split_model(name)[0] in (WITH_EVICTION, WITHOUT_EVICTION))
    for model in ("teacher", "start", *size.distilled, *judged):
        needs = ("start",) if model == "teacher" else (model, "clips_teacher")
        add(
            f"clips_{model}",
            needs,
            setting.records / f"clips_{model}.json",
            partial(measure_clips, model=model),
        )
    stream(TRUE_MODEL, TRUE_SINK)
    for sink in sink_names(size.alphas):
        stream(WITH_EVICTION, sink)
    for model in ("dmd", *size.streamed):
        if split_model(model)[1] == 0 and model != WITH_EVICTION:
            stream(model, trained_sink(model))
    return parts


def run_parts(
    parts: Sequence[Part], command: Sequence[str], workers: int, logs: Path, report: Callable[[str], None]
) -> list[str]:
    """Run the parts whose result is not there, up to `workers` at once, each by `command` and its name in a
    process of its own with its output in `logs`; returns the names of those that are not there in the end.

    After a failure, what depends on it is left out. An interrupt stops every process, which saves what it
    has, and is raised again.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting = [part for part in parts if not part.result.exists()]
    missing = {part.name for part in waiting}
    report(f"{len(parts) - len(waiting)} of {len(parts)} parts are there")
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    try:
        while running or any(missing.isdisjoint(part.needs) for part in waiting):
            for part in [part for part in waiting if missing.isdisjoint(part.needs)]:
                if len(running) < workers:
                    waiting.remove(part)
                    with (logs / f"{part.name}.txt").open("ab") as log:
                        process = subprocess.Popen(
                            [sys.executable, *command, part.name], stdout=log, stderr=log
                        )
                    running[part.name] = process, time.monotonic()
                    report(f"{part.name}: begins")
            time.sleep(_POLL_SECONDS)
            for name, (process, started) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                minutes = (time.monotonic() - started) / 60
                if process.returncode:
                    report(f"{name}: FAILED after {minutes:.1f} min, see {logs / f'{name}.txt'}")
                else:
                    missing.remove(name)
                    report(f"{name}: done in {minutes:.1f} min")
    finally:
        _stop([process for process, _ in running.values()])
    for part in waiting:
        report(f"{part.name}: left out, since it needs {', '.join(sorted(missing.intersection(part.needs)))}")
    return [part.name for part in parts if part.name in missing]


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
