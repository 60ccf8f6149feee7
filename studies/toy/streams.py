"""Long streams of one model under one sink through one scenario: what they show, motion, drift, consistency,
copying of the first frames."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recipes.tiny.training import ToyModel
from rfengine.config import CacheConfig
from rfengine.evaluation.consistency import measure_consistency
from rfengine.evaluation.copying import SinkTrace, measure_copying, trace_sink
from rfengine.evaluation.dynamics import measure_dynamics
from rfengine.evaluation.video_frames import ChunkGrid, spread
from rfengine.ops import choose_ops
from rfengine.training.build import base_engine
from studies.toy.record import Unit, Values, unit, write_record
from studies.toy.scenarios import Curves, Plan, plan_values, scenario_plans
from studies.toy.setting import Setting

_FLOW_PAIRS = 32
_STRIDE = 4  # every fourth frame counts for consistency
_MOST_POINTS = 40  # chunks of one curve of a drift
_MEASURED = (
    *("freeze_fraction", "consistency_near", "consistency_far"),
    *(f"{name}_drift" for name in ("exposure", "contrast", "colour", "sharpness")),
)


def sink_names(alphas: Sequence[float]) -> tuple[str, ...]:
    """The sinks of the study: none, a frozen one, EMA-Sink with the split sum, and in bf16 alone."""
    split = tuple(f"ema_{alpha:g}" for alpha in alphas)
    return ("none", "frozen", *split, *(f"{name}_bf16" for name in split))


def with_sink(config: CacheConfig, sink: str) -> CacheConfig:
    """The cache of a sink's name; the window keeps its length."""
    if sink == "none":
        return dataclasses.replace(config, sink="none", sink_frames=0)
    if sink == "frozen":
        return dataclasses.replace(config, sink="frozen")
    _, alpha, *rest = sink.split("_")
    precision = rest[0] if rest else "split"
    return dataclasses.replace(config, sink="ema", alpha=float(alpha), sink_precision=precision)


def measure_streams(setting: Setting, model: str, sink: str, scenario: str) -> None:
    """Write the record streams_<model>_<sink>_<scenario>. model "world" with sink "true": true videos."""
    name, size = f"streams_{model}_{sink}_{scenario}", setting.size
    settings = {
        "weights": "" if model == "world" else setting.fingerprint(model),
        "captions": size.stream_captions,
        "seconds": size.stream_seconds,
        "dtype": "bfloat16",
    }
    units = [
        unit(
            setting.directory / "units" / name,
            f"seed_{seed}",
            settings,
            lambda seed=seed: _measure(setting, model, sink, scenario, seed),
        )
        for seed in size.stream_seeds
    ]
    record = {
        "kind": "streams",
        "model": model,
        "sink": sink,
        "scenario": scenario,
        "settings": settings,
        "videos": _with_copying(units),
    }
    write_record(setting.records / f"{name}.json", record)


def _measure(setting: Setting, model: str, sink: str, scenario: str, seed: int) -> Unit:
    engine = base_engine(str(setting.checkpoint("start" if model == "world" else model)))
    size, stride = engine.cache.chunk_frames, engine.vae.temporal_stride
    grid = ChunkGrid(1 + stride * (size - 1), stride * size)
    chunks = -(-(setting.size.stream_seconds * engine.fps) // grid.frames)
    plans = scenario_plans(scenario, setting.size.stream_captions, chunks)
    if model == "world":
        frames = grid.first_frames + grid.frames * (chunks - 1)
        videos = [plan.true_video(frames, grid, seed * 1009 + place) for place, plan in enumerate(plans)]
    else:
        videos = _stream(setting, model, sink, plans, chunks, seed)
    entries, traces = [], []
    for prompt, (plan, video) in enumerate(zip(plans, videos, strict=True)):
        values, curves = plan_values(video, plan, grid)
        drifts, more = _drifts(video, engine.fps, grid)
        curves = {name: _in_seconds(curve, grid, engine.fps) for name, curve in curves.items()} | more
        trace = trace_sink(video, grid)
        entries.append({"prompt": prompt, "seed": seed, "values": values | drifts, "curves": curves})
        traces.append({"first": trace.first, "late": trace.late})
    return {"videos": entries, "traces": traces}


def _in_seconds(curve: Sequence[tuple[float, float]], grid: ChunkGrid, fps: int) -> list[tuple[float, float]]:
    return [(chunk * grid.frames / fps, value) for chunk, value in curve]


def _stream(
    setting: Setting, model: str, sink: str, plans: Sequence[Plan], chunks: int, seed: int
) -> list[Tensor]:
    """uint8 [T, H, W, 3] for each plan, the transformer and its cache in bfloat16 as on a GPU. All plans have
    their switches at the same chunks, where the window is recomputed."""
    ops = choose_ops("auto", setting.device, dtype=torch.bfloat16)
    toy = ToyModel.load(setting.checkpoint(model), setting.device, ops, torch.bfloat16)
    engine = dataclasses.replace(toy.config, cache=with_sink(toy.config.cache, sink))
    toy = dataclasses.replace(toy, config=engine)
    texts, *later = zip(*(plan.texts for plan in plans), strict=True)
    switches = {chunk: (new, True) for chunk, new in zip(plans[0].chunks[1:], later, strict=True)}
    parts: list[list[Tensor]] = [[] for _ in plans]
    with setting.casting():
        for clips in toy.stream(texts, chunks, seed, switches):
            for place, clip in enumerate(clips):
                parts[place].append((clip.float() * 255).round().to(torch.uint8))
    return [torch.cat(frames) for frames in parts]


def _drifts(video: Tensor, fps: int, grid: ChunkGrid) -> tuple[Values, Curves]:
    dynamics = measure_dynamics(video, grid, _FLOW_PAIRS)
    consistency = measure_consistency(video[::_STRIDE], grid.frames // _STRIDE)
    measured = dynamics.values | consistency.values
    values = {"flow_speed": measured["speed"]} | {name: measured[name] for name in _MEASURED}
    lags = consistency.curves["consistency"]
    curves: Curves = {"consistency": [(lag * _STRIDE / fps, value) for lag, value in lags]}
    for name in ("sharpness_drift", "colour_drift"):
        curve = dynamics.curves[name]
        chosen = [curve[index] for index in spread(0, len(curve) - 1, min(_MOST_POINTS, len(curve)))]
        curves[name] = [(start / fps, value) for start, value in chosen]
    return values, curves


def _with_copying(units: Sequence[Unit]) -> list[dict[str, Any]]:
    """The videos with the copying of their first frames, against videos of the same caption."""
    traces = [[SinkTrace(**trace) for trace in made["traces"]] for made in units]
    videos = []
    for seed, made in enumerate(units):
        for prompt, video in enumerate(made["videos"]):
            others = [row[prompt] for place, row in enumerate(traces) if place != seed]
            video["values"] |= measure_copying(traces[seed][prompt], others)
            videos.append(video)
    return videos
