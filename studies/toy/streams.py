"""Long streams of one model under one sink: motion, drift, consistency, copying of the first frames."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recipes.tiny.training import ToyModel
from rfengine.config import CacheConfig
from rfengine.evaluation.consistency import measure_consistency
from rfengine.evaluation.copying import SinkTrace, measure_copying, trace_sink
from rfengine.evaluation.dynamics import measure_dynamics
from rfengine.evaluation.toy_accuracy import toy_accuracy
from rfengine.evaluation.video_frames import ChunkGrid, spread
from rfengine.ops import choose_ops
from rfengine.ops.reference import frame_pack
from rfengine.toy.captions import caption, sample_scenes
from rfengine.toy.reward import ToyReward
from rfengine.toy.world import Scene, WorldConfig, complete, render
from rfengine.training.build import base_engine
from rfengine.training.rollout import decode_chunks, roll_out
from studies.toy.record import Unit, Values, unit, write_record
from studies.toy.setting import Setting

CAPTION_SEED = 31
_WINDOW = 48  # frames of one point of the reward's curve
_WINDOWS = 20
_FLOW_PAIRS = 32
_STRIDE = 4  # every fourth frame counts for consistency
_END_SECONDS = 20  # of which the attributes are judged
_MOST_POINTS = 40  # chunks of one curve of a drift
_MEASURED = (
    *("freeze_fraction", "consistency_near", "consistency_far"),
    *(f"{name}_drift" for name in ("exposure", "contrast", "colour", "sharpness")),
)


def sink_names(alphas: Sequence[float]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sinks of the study with the split sum, and those of EMA-Sink in bf16 alone."""
    split = tuple(f"ema_{alpha:g}" for alpha in alphas)
    return ("none", "frozen", *split), tuple(f"{name}_bf16" for name in split)


def with_sink(config: CacheConfig, sink: str) -> CacheConfig:
    """The cache of a sink's name; the window keeps its length."""
    if sink == "none":
        return dataclasses.replace(config, sink="none", sink_frames=0)
    if sink == "frozen":
        return dataclasses.replace(config, sink="frozen")
    _, alpha, *rest = sink.split("_")
    precision = rest[0] if rest else "split"
    return dataclasses.replace(config, sink="ema", alpha=float(alpha), sink_precision=precision)


def measure_streams(setting: Setting, model: str, sink: str, seconds: int, captions: int) -> None:
    """Write the record streams_<model>_<sink>_<seconds>s. model "world" with sink "true": true videos."""
    name = f"streams_{model}_{sink}_{seconds}s"
    settings = {
        "weights": "" if model == "world" else setting.fingerprint(model),
        "captions": captions,
        "dtype": "bfloat16",
    }
    scenes = sample_scenes(captions, CAPTION_SEED, WorldConfig(), "held_out")
    units = [
        unit(
            setting.directory / "units" / name,
            f"seed_{seed}",
            settings,
            lambda seed=seed: _measure(setting, model, sink, seconds, scenes, seed),
        )
        for seed in setting.size.sampling_seeds
    ]
    record = {
        "kind": "streams",
        "model": model,
        "sink": sink,
        "seconds": seconds,
        "settings": settings,
        "videos": _with_copying(units),
    }
    write_record(setting.records / f"{name}.json", record)


def _measure(setting: Setting, model: str, sink: str, seconds: int, scenes: list[Scene], seed: int) -> Unit:
    engine = base_engine("tiny" if model == "world" else str(setting.checkpoint(model)))
    if model == "world":
        videos = [true_video(scene, seconds * engine.fps, seed * 1009 + i) for i, scene in enumerate(scenes)]
    else:
        videos = _stream(setting, model, sink, seconds, scenes, seed)
    frames, stride = engine.cache.chunk_frames, engine.vae.temporal_stride
    grid = ChunkGrid(1 + stride * (frames - 1), stride * frames)
    entries, traces = [], []
    for prompt, (scene, video) in enumerate(zip(scenes, videos, strict=True)):
        values, curves = _stream_values(video, caption(scene), engine.fps, grid)
        trace = trace_sink(video, grid)
        entries.append({"prompt": prompt, "seed": seed, "values": values, "curves": curves})
        traces.append({"first": trace.first, "late": trace.late})
    return {"videos": entries, "traces": traces}


@torch.no_grad()
def _stream(
    setting: Setting, model: str, sink: str, seconds: int, scenes: list[Scene], seed: int
) -> list[Tensor]:
    """uint8 [T, H, W, 3] for each scene, the transformer and its cache in bfloat16 as on a GPU."""
    ops = choose_ops("auto", setting.device, dtype=torch.bfloat16)
    toy = ToyModel.load(setting.checkpoint(model), setting.device, ops, torch.bfloat16)
    engine = dataclasses.replace(toy.config, cache=with_sink(toy.config.cache, sink))
    states = toy.encode([caption(scene) for scene in scenes]).to(setting.device, torch.bfloat16)
    size = engine.cache.chunk_frames * engine.vae.temporal_stride
    chunks = -(-(seconds * engine.fps + engine.vae.temporal_stride - 1) // size)
    latents = roll_out(toy.transformer, engine, states, chunks, seed)
    parts: list[list[Tensor]] = [[] for _ in scenes]
    with setting.casting():
        for pixels in decode_chunks(toy.vae, (chunk.float() for chunk in latents)):
            for place, video in enumerate(pixels.float().cpu().split(1)):
                parts[place].append(frame_pack(video[0]))
    return [torch.cat(frames)[: seconds * engine.fps] for frames in parts]


def true_video(scene: Scene, frames: int, seed: int) -> Tensor:
    """A video of the scene from another start: what the caption leaves open is drawn again."""
    drawn = complete(scene, random.Random(seed))
    parts = [render(drawn, min(480, frames - first), first) for first in range(0, frames, 480)]
    return (torch.cat(parts).clamp(0, 1) * 255).round().to(torch.uint8)


def _stream_values(
    video: Tensor, text: str, fps: int, grid: ChunkGrid
) -> tuple[Values, dict[str, list[tuple[float, float]]]]:
    dynamics = measure_dynamics(video, grid, _FLOW_PAIRS)
    consistency = measure_consistency(video[::_STRIDE], grid.frames // _STRIDE)
    measured = dynamics.values | consistency.values
    starts = spread(0, len(video) - _WINDOW, _WINDOWS)
    windows = torch.stack([video[start : start + _WINDOW] for start in starts])
    rewards = ToyReward()(windows, [text] * len(windows))["motion"].tolist()
    values = {"reward": sum(rewards) / len(rewards), "flow_speed": measured["speed"]}
    values |= {name: measured[name] for name in _MEASURED}
    values |= toy_accuracy(video[-_END_SECONDS * fps :], text)
    curves = {
        "reward": [(start / fps, reward) for start, reward in zip(starts, rewards, strict=True)],
        "consistency": [(lag * _STRIDE / fps, value) for lag, value in consistency.curves["consistency"]],
    }
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
