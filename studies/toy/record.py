"""The records of the toy study, one JSON file for each set of videos that was measured, and the units that a
record is gathered from."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from rfengine.files import replaced, write_text

Curve = tuple[tuple[float, float], ...]
Record = TypeVar("Record")
Values = dict[str, float]
Unit = dict[str, Any]  # what torch.save keeps: videos, and what the record needs of all units at once


@dataclass(frozen=True, slots=True)
class Video:
    """One sample. captions: full or open, "" for a stream. curves: pairs (second or lag in s, value)."""

    prompt: int
    seed: int
    captions: str
    values: dict[str, float]
    curves: dict[str, Curve]


@dataclass(frozen=True, slots=True)
class Clips:
    """Short clips of a model under one training seed. fidelity: by captions, a value for a sampling seed."""

    model: str
    training_seed: int
    settings: dict[str, Any]
    fidelity: dict[str, tuple[float, ...]]
    videos: tuple[Video, ...]


@dataclass(frozen=True, slots=True)
class Streams:
    """Long videos of a model under one training seed and one sink."""

    model: str
    training_seed: int
    sink: str
    seconds: int
    settings: dict[str, Any]
    videos: tuple[Video, ...]


@dataclass(frozen=True, slots=True)
class Records:
    """All that was measured."""

    clips: tuple[Clips, ...] = ()
    streams: tuple[Streams, ...] = ()


def unit(directory: Path, name: str, settings: dict[str, Any], make: Callable[[], Unit]) -> Unit:
    """The result of `make`, kept in `directory` so that an interrupted measurement continues after it.

    One of other settings is made again.
    """
    path = directory / f"{name}.pt"
    if path.exists():
        kept = torch.load(path, weights_only=True)
        if kept["settings"] == settings:
            return kept["unit"]
    directory.mkdir(parents=True, exist_ok=True)
    made = make()
    with replaced(path) as partial:
        torch.save({"settings": settings, "unit": made}, partial)
    return made


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write `record` whole or not at all, numbers to six digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(_rounded(record)) + "\n")


def read_records(folder: Path) -> Records:
    """The records clips_*.json and streams_*.json of a folder.

    Raises ValueError for a file of such a name that is no record of the study.
    """
    clips = [_read(path, _clips) for path in sorted(folder.glob("clips_*.json"))]
    streams = [_read(path, _streams) for path in sorted(folder.glob("streams_*.json"))]
    return Records(tuple(clips), tuple(streams))


def _read(path: Path, parse: Callable[[dict[str, Any]], Record]) -> Record:
    try:
        entry = json.loads(path.read_text())
        kind = path.name.split("_")[0]
        if not isinstance(entry, dict) or entry.get("kind") != kind:
            raise ValueError(f'it does not say "kind": "{kind}"')
        if f"{_name(entry)}.json" != path.name:
            raise ValueError(f"it holds what belongs into {_name(entry)}.json")
        return parse(entry)
    except KeyError as error:
        why, cause = f"{error} is missing", error
    except (TypeError, ValueError, AttributeError) as error:
        why, cause = str(error), error
    raise ValueError(f"{path.name} is no record of the toy study: {why}; make it again or move it") from cause


def _name(entry: dict[str, Any]) -> str:
    if entry["kind"] == "clips":
        return f"clips_{entry['model']}"
    return f"streams_{entry['model']}_{entry['sink']}_{entry['seconds']}s"


def _clips(entry: dict[str, Any]) -> Clips:
    fidelity = {kind: tuple(map(_number, values)) for kind, values in entry["fidelity"].items()}
    videos = _videos(entry["videos"], ("full", "open"))
    return Clips(*split_model(entry["model"]), dict(entry["settings"]), fidelity, videos)


def _streams(entry: dict[str, Any]) -> Streams:
    videos = _videos(entry["videos"], ("",))
    place = entry["sink"], int(entry["seconds"])
    return Streams(*split_model(entry["model"]), *place, dict(entry["settings"]), videos)


def _videos(entries: list[dict[str, Any]], captions: tuple[str, ...]) -> tuple[Video, ...]:
    videos = []
    for entry in entries:
        values = {name: _number(value) for name, value in entry["values"].items() if value is not None}
        curves = {
            name: tuple((_number(x), _number(y)) for x, y in points)
            for name, points in entry.get("curves", {}).items()
        }
        kind = entry.get("captions", "")
        if kind not in captions:
            raise ValueError(f"captions are {kind!r}, not one of {', '.join(map(repr, captions))}")
        videos.append(Video(int(entry["prompt"]), int(entry["seed"]), kind, values, curves))
    if not videos:
        raise ValueError("it has no video")
    repeated, count = Counter((v.captions, v.prompt, v.seed) for v in videos).most_common(1)[0]
    if count > 1:
        raise ValueError(f"prompt {repeated[1]} with seed {repeated[2]} is there {count} times")
    return tuple(videos)


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return float(value)


def split_model(name: str) -> tuple[str, int]:
    """The model and its training seed: "dmd_seed1" is ("dmd", 1), "dmd" is ("dmd", 0)."""
    model, seed = re.fullmatch(r"(.+?)(?:_seed(\d+))?", name).groups()
    return model, int(seed or 0)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
