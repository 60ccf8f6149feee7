"""The plots of the toy study: which files there are, and that they show the data."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from studies.toy.plots import draw
from studies.toy.record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODELS = ("start", "teacher", "dmd", "re_dmd_0.5", "re_dmd_0.2", "no_eviction")
SINKS = ("none", "frozen", "ema_0.9", "ema_0.999", "ema_0.9_bf16", "ema_0.999_bf16")
CLIP_VALUES = ("reward", "fast", "colour", "shape", "direction", "speed", "all")
STREAM_VALUES = ("reward", "right", "copying_excess", "sharpness_drift")
CURVES = ("reward", "right", "consistency", "sharpness_drift", "colour_drift", "after_switch", "old_scene")
SIZE_LIMIT = 150_000


@pytest.fixture(autouse=True)
def needs_matplotlib() -> None:
    pytest.importorskip("matplotlib")


def clips_of(model: str, seed: int = 0) -> Record:
    draw_number = random.Random(f"{model}{seed}").random
    videos = [
        {
            "prompt": prompt,
            "seed": 0,
            "captions": captions,
            "values": {name: draw_number() for name in CLIP_VALUES},
        }
        for prompt in range(4)
        for captions in ("full", "open")
    ]
    fidelity = {"full": [draw_number(), draw_number()], "open": [draw_number()]}
    return {"kind": "clips", "model": model, "fidelity": fidelity, "videos": videos}


def streams_of(model: str, sink: str, scenario: str = "stays", without: str = "") -> Record:
    draw_number = random.Random(f"{model}{sink}").random
    videos = [
        {
            "prompt": prompt,
            "seed": 0,
            "values": {name: draw_number() for name in STREAM_VALUES},
            "curves": {
                name: [[2.0**step, draw_number()] for step in range(7)] for name in CURVES if name != without
            },
        }
        for prompt in range(3)
    ]
    return {"kind": "streams", "model": model, "sink": sink, "scenario": scenario, "videos": videos}


def write_log(path: Path, names: tuple[str, ...], seed: int = 0) -> Path:
    draw_number = random.Random(f"{path.name}{seed}").random
    lines = [{"step": step} | {name: draw_number() for name in names} for step in range(5, 1600, 5)]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def write_logs(folder: Path) -> dict[str, Path]:
    """As many lines as the study has with three training seeds."""
    logs = {"teacher": write_log(folder / "teacher", ("teacher_loss",))}
    shared = ("critic_loss", "distance", "toy.agreement")
    for model in ("dmd", "re_dmd_1", "re_dmd_0.5", "re_dmd_0.2", "re_dmd_0.1", "no_eviction"):
        reward = "toy.motion" if model == "dmd" else "score"
        for seed, name in enumerate((model, f"{model}_seed1", f"{model}_seed2")):
            logs[name] = write_log(folder / name, (*shared, reward), seed)
    return logs


def test_everything_drawn_is_a_small_png_and_the_same_when_drawn_again(tmp_path: Path) -> None:
    streams = [
        streams_of("sink_ema_0.999", sink, scenario) for sink in SINKS for scenario in ("stays", "pans")
    ]
    streams += [streams_of("world", "true"), streams_of("sink_frozen", "frozen")]
    records = [*map(clips_of, MODELS), *streams]
    files = draw(records, write_logs(tmp_path), tmp_path)
    assert [file.name for file in files] == [
        "models.png",
        "trainings.png",
        "sinks_pans.png",
        "sinks_stays.png",
        "students.png",
    ]
    for file in files:
        data = file.read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) < SIZE_LIMIT, file.name
    before = files[0].read_bytes()
    assert draw(records[: len(MODELS)], {}, tmp_path) == files[:1] and files[0].read_bytes() == before


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", ("teacher_loss",))
    assert draw([], {"teacher": log}, tmp_path) == []
    assert not list(tmp_path.glob("*.png"))


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[object]]:
    """What the plots show, by their file names, in place of the files: most of the time goes into pixels."""
    contents: dict[str, list[object]] = {}

    def save(figure: Figure, path: Path) -> None:
        contents[path.name] = [
            (
                [line.get_xydata().tolist() for line in axes.lines],
                [bar.get_bbox().bounds for bar in axes.patches],
                [part.tolist() for bars in axes.collections for part in bars.get_segments()],
            )
            for axes in figure.axes
            if axes.axison
        ]

    monkeypatch.setattr("studies.toy.plots._save", save)
    return contents


@pytest.mark.usefixtures("shown")
def test_students_are_compared_where_there_are_two(tmp_path: Path) -> None:
    alone = [streams_of("sink_ema_0.999", "ema_0.999"), streams_of("no_eviction", "none")]
    assert [file.name for file in draw(alone, {}, tmp_path)] == ["sinks_stays.png"]
    both = [*alone, streams_of("sink_none", "none")]
    assert [file.name for file in draw(both, {}, tmp_path)] == ["sinks_stays.png", "students.png"]


def test_a_plot_changes_with_its_data_and_only_then(tmp_path: Path, shown: dict[str, list[object]]) -> None:
    logs = {"dmd": write_log(tmp_path / "one", ("critic_loss",), 1)}
    pair = streams_of("sink_ema_0.999", "ema_0.999"), streams_of("sink_frozen", "frozen")
    draw([clips_of("dmd"), *pair], logs, tmp_path)
    before = shown.copy()
    draw([clips_of("dmd"), *pair], logs, tmp_path)
    assert shown == before
    logs = {"dmd": write_log(tmp_path / "other", ("critic_loss",), 2)}
    other = streams_of("sink_ema_0.999", "ema_0.999"), streams_of("sink_none", "none")
    draw([clips_of("dmd", 1), *other], logs, tmp_path)
    assert shown.keys() == before.keys()
    same = {name for name in before if before[name] == shown[name]}
    assert same == {"sinks_stays.png"}


def test_every_curve_of_the_streams_is_shown(tmp_path: Path, shown: dict[str, list[object]]) -> None:
    draw([streams_of("sink_ema_0.999", "none")], {}, tmp_path)
    whole = shown.copy()
    for curve in CURVES:
        draw([streams_of("sink_ema_0.999", "none", without=curve)], {}, tmp_path)
        assert shown.keys() == whole.keys() and shown != whole, curve
        assert all(lines or bars for lines, bars, _ in shown["sinks_stays.png"]), "an empty panel"


def test_missing_matplotlib_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="matplotlib is not installed; pip install matplotlib"):
        draw([clips_of("dmd")], {}, tmp_path)
