"""Throughput of one stream on this machine, end to end: noise in, uint8 frames in host memory out.

    python bench/throughput.py --model tiny --chunks 20 --threads 2 --json

The model is loaded and two chunks are made before the clock starts; writing a file is not part of it. The
time to the first frames is that of a new stream in a warm process: text encoder, noise, first chunk.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import tyro

from rfengine import Pipeline, VideoStream, __version__
from rfengine.config import DTypeName
from rfengine.doctor import cpu_name

PROMPT = "a red circle moves right"
WARM_UP_CHUNKS = 2


@dataclass(frozen=True)
class Options:
    """Measure frames per second with and without the VAE, and how long a chunk and the first frames take."""

    model: str = "tiny"
    """A checkpoint directory, or tiny."""
    chunks: int = 20
    """Chunks to measure, after two to warm up."""
    threads: int | None = None
    """CPU threads of torch; its own choice where nothing is given."""
    height: int | None = None
    """Pixels; the model's own size where nothing is given."""
    width: int | None = None
    """Pixels."""
    device: str | None = None
    """cpu or cuda; cuda where there is one."""
    dtype: DTypeName | None = None
    """bfloat16 on CUDA, float32 on the CPU where nothing is given."""
    json: bool = False
    """Print JSON instead of text."""


def measure(options: Options) -> dict[str, Any]:
    """Figures and the circumstances they were measured under."""
    if options.chunks < 1:
        raise ValueError(f"--chunks is {options.chunks}; measure at least 1")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    pipeline = Pipeline.from_pretrained(options.model, options.device, options.dtype)
    stream = _stream(pipeline, options)
    whole, frames = _time_chunks(stream, options.chunks, decode=True)
    latents_only, _ = _time_chunks(_stream(pipeline, options), options.chunks, decode=False)
    started = time.perf_counter()
    next(_stream(pipeline, options))
    first_frames_ms = (time.perf_counter() - started) * 1e3

    fps = pipeline.config.fps
    rate = frames / sum(whole)
    return {
        "model": pipeline.config.name,
        "height": stream.grid.height,
        "width": stream.grid.width,
        "denoising_steps": stream.num_steps,
        "window_frames": pipeline.config.cache.window_frames,
        "dtype": str(pipeline.model.dtype).removeprefix("torch."),
        "device": _device_name(pipeline.model.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rfengine": __version__,
        "chunks": options.chunks,
        "frames_per_s": rate,
        "real_time_factor": rate / fps,
        "frames_per_s_without_vae": frames / sum(latents_only),
        "chunk_ms_p50": statistics.median(whole) * 1e3,
        "chunk_ms_p95": _percentile(whole, 0.95) * 1e3,
        "first_frames_ms": first_frames_ms,
    }


def _stream(pipeline: Pipeline, options: Options) -> VideoStream:
    return pipeline.stream(PROMPT, seed=7, height=options.height, width=options.width)


def _time_chunks(stream: VideoStream, count: int, decode: bool) -> tuple[list[float], int]:
    """Seconds of each of `count` chunks after the warm-up, and the frames they gave."""
    for _ in range(WARM_UP_CHUNKS):
        stream.advance(decode=decode)
    seconds, frames = [], 0
    for _ in range(count):
        started = time.perf_counter()
        frames += len(stream.advance(decode=decode).frames)
        if stream.latents.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds, frames


def _percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def render(figures: dict[str, Any]) -> str:
    size = f"{figures['height']} x {figures['width']}"
    return (
        f"{figures['model']} at {size}, {figures['denoising_steps']} steps, {figures['dtype']}, "
        f"{figures['device']}, {figures['threads']} threads, torch {figures['torch']}\n"
        f"{figures['frames_per_s']:.1f} frames/s end to end, {figures['real_time_factor']:.1f} times as fast "
        f"as it plays; {figures['frames_per_s_without_vae']:.1f} frames/s without the VAE\n"
        f"chunk {figures['chunk_ms_p50']:.1f} ms (p95 {figures['chunk_ms_p95']:.1f} ms), first frames "
        f"{figures['first_frames_ms']:.1f} ms after the prompt, {figures['chunks']} chunks measured"
    )


def main() -> None:
    options = tyro.cli(Options)
    figures = measure(options)
    print(json.dumps(figures, indent=2) if options.json else render(figures))


if __name__ == "__main__":
    main()
