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
from studies.toy.setting import SHIPPED, WITH_EVICTION, WITHOUT_EVICTION, Setting
from studies.toy.streams import measure_streams, sink_names
from studies.toy.tables import TRUE_SINK
from studies.toy.trainings import average_with_start, encode_clips, run_training, train_start

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

    In bf16 alone no sink is streamed without eviction, and of the longest streams only the one that averages
    most slowly.
    """
    size = setting.size
    parts: dict[str, Part] = {}

    def add(name: str, needs: tuple[str, ...], result: Path, run: Callable[[Setting], None]) -> None:
        parts[name] = Part(name, needs, result, run)

    def stream(model: str, sink: str, seconds: int, captions: int) -> None:
        name = f"streams_{model}_{sink}_{seconds}s"
        needs = () if model == "world" else (model,)
        run = partial(measure_streams, model=model, sink=sink, seconds=seconds, captions=captions)
        add(name, needs, setting.records / f"{name}.json", run)

    add("start", (), setting.checkpoint("start"), train_start)
    add("clips", (), setting.clips_path, encode_clips)
    add("teacher", ("start", "clips"), setting.checkpoint("teacher"), partial(run_training, name="teacher"))
    for name in size.students:
        add(name, ("teacher",), setting.checkpoint(name), partial(run_training, name=name))
    add(SHIPPED, ("start", WITH_EVICTION), setting.checkpoint(SHIPPED), average_with_start)
    for model in ("teacher", "start", *size.students, SHIPPED):
        needs = (model,) if model == "teacher" else (model, "clips_teacher")
        add(
            f"clips_{model}",
            needs,
            setting.records / f"clips_{model}.json",
            partial(measure_clips, model=model),
        )
    short, long = (size.stream_seconds, size.stream_captions), (size.long_seconds, size.long_captions)
    split, rounded = sink_names(size.alphas)
    stream("world", TRUE_SINK, *short)
    for sink in (*split, *rounded):
        stream(WITH_EVICTION, sink, *short)
    for sink in split:
        stream(WITHOUT_EVICTION, sink, *short)
    stream(SHIPPED, split[-1], *short)
    stream("world", TRUE_SINK, *long)
    for sink in (*split, rounded[-1]):
        stream(WITH_EVICTION, sink, *long)
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
