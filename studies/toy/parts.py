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
from studies.toy.setting import Setting, StudySize
from studies.toy.streams import TRUE, measure_streams, sink_names, split_sink_names
from studies.toy.tables import SHIPPED, WITHOUT_EVICTION
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
    """Every part by its name, each after the parts that it needs."""
    size = setting.size
    found = [
        Part("start", (), setting.checkpoint("start"), train_start),
        Part("clips", (), setting.clips_path, encode_clips),
        _training(setting, "teacher", ("start", "clips")),
    ]
    found += [_training(setting, name, ("teacher",)) for name in size.students]
    average = partial(average_with_start, name=size.evicting_model)
    found.append(Part(SHIPPED, ("start", size.evicting_model), setting.checkpoint(SHIPPED), average))
    found += [
        Part(
            f"clips_{model}",
            (model,) if model == "teacher" else (model, "clips_teacher"),
            setting.records / f"clips_{model}.json",
            partial(measure_clips, model=model),
        )
        for model in ("teacher", "start", *size.students, SHIPPED)
    ]
    found += [_streams(setting, *entry) for entry in _stream_sets(size)]
    return {part.name: part for part in found}


def _stream_sets(size: StudySize) -> list[tuple[str, str, int, int]]:
    """(model, sink, seconds, captions). bf16 alone is left out without eviction, and in the longest streams
    but for the sink that averages most slowly."""
    short = size.stream_seconds, size.stream_captions
    long = size.long_seconds, size.long_captions
    every, split = sink_names(size.alphas), split_sink_names(size.alphas)
    evicting = size.evicting_model
    return [
        ("world", TRUE, *short),
        *((evicting, sink, *short) for sink in every),
        *((WITHOUT_EVICTION, sink, *short) for sink in split),
        (SHIPPED, split[-1], *short),
        ("world", TRUE, *long),
        *((evicting, sink, *long) for sink in (*split, every[-1])),
    ]


def _training(setting: Setting, name: str, needs: tuple[str, ...]) -> Part:
    return Part(name, needs, setting.checkpoint(name), partial(run_training, name=name))


def _streams(setting: Setting, model: str, sink: str, seconds: int, captions: int) -> Part:
    name = f"streams_{model}_{sink}_{seconds}s"
    run = partial(measure_streams, model=model, sink=sink, seconds=seconds, captions=captions)
    return Part(name, () if model == "world" else (model,), setting.records / f"{name}.json", run)


def run_parts(
    parts: Sequence[Part], command: Sequence[str], workers: int, logs: Path, tell: Callable[[str], None]
) -> list[str]:
    """Run the parts whose result is not there, up to `workers` at once, each by `command` and its name in a
    process of its own with its output in `logs`; returns the names of those that are not there in the end.

    After a failure, what depends on it is left out. An interrupt stops every process, which saves what it
    has, and is raised again.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting = [part for part in parts if not part.result.exists()]
    tell(f"{len(parts) - len(waiting)} of {len(parts)} parts are there")
    missing = {part.name for part in waiting}
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    try:
        while waiting or running:
            missing -= _finished(running, logs, tell)
            ready = [part for part in waiting if not missing.intersection(part.needs)]
            if not running and not ready:
                break
            for part in ready[: workers - len(running)]:
                waiting.remove(part)
                with (logs / f"{part.name}.txt").open("ab") as log:
                    process = subprocess.Popen([sys.executable, *command, part.name], stdout=log, stderr=log)
                running[part.name] = process, time.monotonic()
                tell(f"{part.name}: begins")
            time.sleep(_POLL_SECONDS)
    finally:
        _stop([process for process, _ in running.values()])
    for part in waiting:
        tell(f"{part.name}: left out, since it needs {', '.join(sorted(missing.intersection(part.needs)))}")
    return [part.name for part in parts if part.name in missing]


def _finished(
    running: dict[str, tuple[subprocess.Popen[bytes], float]], logs: Path, tell: Callable[[str], None]
) -> set[str]:
    """Take the processes that have ended out of `running`; the names of those that did well."""
    done = set()
    for name, (process, started) in list(running.items()):
        if process.poll() is None:
            continue
        del running[name]
        minutes = (time.monotonic() - started) / 60
        if process.returncode:
            tell(f"{name}: FAILED after {minutes:.1f} min, see {logs / f'{name}.txt'}")
        else:
            done.add(name)
            tell(f"{name}: done in {minutes:.1f} min")
    return done


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
