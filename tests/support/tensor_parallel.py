"""Streams on several ranks, as every rank makes them, and what they leave for a test to compare."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from rfengine import Pipeline
from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.config import RuntimeConfig
from rfengine.snapshot import Snapshot
from rfengine.stream import VideoStream
from support.systems import SYSTEMS

CHUNKS = 6
SEED = 5


def pipeline_of(directory: Path, system: str, ranks: int, **changes: object) -> Pipeline:
    """The checkpoint in `directory` under a system, on the CPU."""
    cache, schedule = SYSTEMS[system]
    opened = Checkpoint.open(directory)
    config = dataclasses.replace(opened.config, cache=cache, schedule=schedule)
    checkpoint = dataclasses.replace(opened, config=config)
    return Pipeline.from_pretrained(checkpoint, "cpu", tensor_parallel=ranks, **changes)


def latents_of(stream: VideoStream, chunks: int) -> Tensor:
    """[chunks, ...] of the next chunks, which have the same number of frames."""
    found = []
    for _ in range(chunks):
        stream.advance(ahead=False)
        found.append(stream.latents)
    return torch.stack(found)


def cut_stream(pipe: Pipeline, path: Path) -> dict[str, Tensor]:
    """Latents of a stream that is saved at `path` before its last two chunks, and its frames."""
    stream = pipe.stream("a circle", seed=SEED)
    frames, latents = [], []
    for chunk in range(CHUNKS):
        if chunk == CHUNKS - 2:
            stream.snapshot().save(path)
        if chunk == 2:
            stream.set_prompt("a square", transition_chunks=2)
        frames.append(torch.from_numpy(stream.advance(ahead=False).frames))
        latents.append(stream.latents)
    return {"latents": torch.cat(latents, 2), "frames": torch.cat(frames)}


def run_streams(rank: int, directory: Path, ranks: int, systems: list[str]) -> None:
    """Every system: a stream cut by a snapshot, and the continuation of what one rank alone has saved."""
    for system in systems:
        pipe = pipeline_of(directory, system, ranks)
        made = cut_stream(pipe, directory / f"{ranks} {system}.safetensors")
        restored = pipe.restore(Snapshot.load(directory / f"1 {system}.safetensors"))
        made["continued"] = latents_of(restored, 2)
        stream = pipe.stream("a circle")
        weights = sum(each.nbytes for each in pipe.model.parameters())
        cache = sum(each.nbytes for each in stream._cache.tensors().values())
        made["bytes"] = torch.tensor([weights, cache])
        torch.save(made, directory / f"{ranks} {system} {rank}.pt")


def run_variants(rank: int, directory: Path, ranks: int, loras: list[Path]) -> None:
    """LoRAs, FP8, a hard switch and one that recomputes the window, on two ranks."""
    made = variants(directory, ranks, loras)
    torch.save(made, directory / f"variants {rank}.pt")


def variants(directory: Path, ranks: int, loras: list[Path]) -> dict[str, Tensor]:
    pipe = pipeline_of(directory, "ema", ranks)
    stream = pipe.stream("a circle", seed=SEED)
    made = {"plain": latents_of(stream, 4)}
    stream.set_prompt("a square", "recache")
    made["recached"] = latents_of(stream, 1)
    pipe.set_loras(loras)
    made["with LoRAs"] = latents_of(stream, 1)
    pipe.set_loras([])
    stream.set_prompt("a circle", "hard")
    made["again"] = latents_of(stream, 4)
    for precision in ("fp8", "fp8-attention"):
        runtime = RuntimeConfig(precision=precision, sixteen_bit_passes=())
        own = pipeline_of(directory, "ema", ranks, runtime=runtime)
        made[precision] = latents_of(own.stream("a circle", seed=SEED), 5)
    return made


INT8 = {
    "int8": RuntimeConfig(block_weights="int8"),
    "int8 from host memory": RuntimeConfig(block_weights="int8", block_buffers=2),
    "16gb": RuntimeConfig(preset="16gb"),
}


def run_int8(rank: int, directory: Path, ranks: int) -> None:
    torch.save(int8_streams(directory, ranks), directory / f"int8 {rank}.pt")


def int8_streams(directory: Path, ranks: int) -> dict[str, Tensor]:
    """Streams with weights in int8, on the device and in host memory, and under a named preset."""
    made = {}
    for name, runtime in INT8.items():
        pipe = pipeline_of(directory, "ema", ranks, runtime=runtime)
        stream = pipe.stream("a circle", seed=SEED)
        made[name] = latents_of(stream, 4)
        stream.set_prompt("a square", "recache")
        made[f"{name}, recached"] = latents_of(stream, 1)
    return made
