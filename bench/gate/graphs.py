"""Part graphs: recorded against op by op, bit for bit, through a whole story of a stream.

The story: enough chunks that every recorded program is replayed after evictions, a soft change of the
prompt, one that recomputes the window, a snapshot and what is restored from it, a hard change. It is told by
an engine without graphs, one with them, and one that also decodes beside the next chunk; latents and frames
of every chunk must be equal. In a self-check, on a CPU, tapes of ops stand for graphs.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gate.part import Item, Setting
from gate.record import Result
from torch import Tensor

from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.config import PRESETS, RuntimeConfig, WanConfig
from rfengine.pipeline import Pipeline
from rfengine.runtime import chunk_runner
from rfengine.runtime.chunk_runner import ChunkRunner
from rfengine.stream import VideoStream

TESTS = Path(__file__).resolve().parents[2] / "tests"
SEED = 3
MARK = "random weights of the gate"
SHIPPED = "shipped"  # how items of the published size begin
CHANGED_CHUNKS = 3  # after each change of the prompt: more than a window has slots that are written
SNAPSHOT_CHUNKS = 2


class TextStatesByPrompt:
    """Stands where a text encoder stands: every prompt has states of its own, drawn by its checksum."""

    def __init__(self, config: WanConfig) -> None:
        self._shape = (1, config.text_len, config.text_dim)

    def encode(self, prompts: list[str], device: torch.device, dtype: torch.dtype) -> Tensor:
        states = [
            torch.randn(self._shape, generator=torch.Generator().manual_seed(zlib.crc32(prompt.encode())))
            for prompt in prompts
        ]
        return torch.cat(states).to(device, dtype)


@dataclass(frozen=True)
class Told:
    """One chunk of a story: where in it, its latents, its frames."""

    where: str
    latents: Tensor
    frames: Tensor


def items(setting: Setting) -> list[Item]:
    if setting.small:
        return [Item("small by tapes", lambda: _compared(_taped_engines))]
    makers: list[tuple[str, str, torch.dtype, float]] = [
        (f"{SHIPPED} bfloat16", "wan-1.3b", torch.bfloat16, 35),  # what the goal is for comes first
        ("small float32", "tiny", torch.float32, 5), ("small bfloat16", "tiny", torch.bfloat16, 5),
    ]  # fmt: skip
    return [Item(name, _comparison(preset, dtype), least_s) for name, preset, dtype, least_s in makers]


def _comparison(preset: str, dtype: torch.dtype) -> Callable[[], Iterator[Result]]:
    return lambda: _compared(lambda: _engines(preset, dtype))


def _engines(preset: str, dtype: torch.dtype) -> dict[str, Pipeline]:
    """Pipelines of the same random weights; the first runs op by op."""

    def runtime(graphs: bool, overlap: bool) -> RuntimeConfig:
        return RuntimeConfig(graphs, overlap, autotune=False)

    config = replace(PRESETS[preset], runtime=runtime(False, False))
    eager = Pipeline.from_pretrained(Checkpoint.random(config), "cuda", dtype, backend="auto")
    text = TextStatesByPrompt(config.model)
    return {
        name: Pipeline(
            replace(config, runtime=runtime(*switches)), eager.model, eager.vae, text, MARK
        )
        for name, switches in {
            "op by op": (False, False), "graphs": (True, False), "graphs and overlap": (True, True),
        }.items()
    }  # fmt: skip


def _taped_engines() -> dict[str, Pipeline]:
    """Those of the tests at 32 x 48, with tapes for graphs."""
    sys.path.append(str(TESTS))
    from support.models import small_pipeline
    from support.tape import TapedCall

    chunk_runner.CapturedCall = TapedCall
    chunk_runner.graph_pool = object
    eager = small_pipeline()
    text = TextStatesByPrompt(eager.config.model)
    engines = {
        name: Pipeline(eager.config, eager.model, eager.vae, text, MARK) for name in ("op by op", "graphs")
    }
    runner = engines["graphs"]._engine.runner
    taped = ChunkRunner(runner.model, runner.schedule, graphs=True)
    engines["graphs"]._engine = replace(engines["graphs"]._engine, runner=taped)
    return engines


def _compared(make: Callable[[], dict[str, Pipeline]]) -> Iterator[Result]:
    (_, eager), *others = make().items()
    expected = list(story(eager))
    for name, pipeline in others:
        apart, count = None, 0
        for one, other in zip(expected, story(pipeline), strict=True):
            count += 1
            apart = apart or difference(one, other)
        yield {"engine": name, "chunks": count, "equal": apart is None, "apart": apart}
        if apart is not None:
            raise AssertionError(f"{name}: {apart}")


def story(pipeline: Pipeline) -> Iterator[Told]:
    """Chunks of one stream, and of one restored from its snapshot. AssertionError where they go on unlike."""
    cache = pipeline.config.cache
    chunks = cache.window_chunks + 2 * (cache.window_chunks - cache.sink_chunks) + 2
    stream = pipeline.stream("the first prompt", seed=SEED)
    begun = list(_told("begun", stream, chunks))
    yield from begun
    stream.set_prompt("another", "soft")
    yield from _told("soft change", stream, CHANGED_CHUNKS)
    stream.set_prompt("a third one", "recache")
    yield from _told("window recomputed", stream, CHANGED_CHUNKS)
    snapshot = stream.snapshot()
    gone_on = list(_told("snapshot taken", stream, SNAPSHOT_CHUNKS))
    restored = pipeline.restore(snapshot)
    again = list(_told("restored", restored, SNAPSHOT_CHUNKS))
    restored.close()
    yield from gone_on
    yield from again
    stream.set_prompt("the first prompt", "hard")
    anew = list(_told("begun anew", stream, chunks))
    stream.close()
    yield from anew
    for one, other in (*zip(gone_on, again, strict=True), *zip(begun, anew, strict=True)):
        apart = difference(one, other)
        if apart is not None:
            raise AssertionError(f"{one.where} and {other.where}: {apart}")


def _told(event: str, stream: VideoStream, count: int) -> Iterator[Told]:
    for place, chunk in enumerate(stream.take(count)):
        latents: Any = stream.latents
        frames = torch.from_numpy(chunk.frames.copy())
        yield Told(f"{event}, chunk {place}", latents.cpu().clone(), frames)


def difference(one: Told, other: Told) -> str | None:
    """What is not equal, in half a sentence; None where all is."""
    for name in ("latents", "frames"):
        left, right = getattr(one, name), getattr(other, name)
        if not left.isfinite().all():
            return f"{one.where}: the {name} are not finite"
        if not torch.equal(left, right):
            largest = (left.float() - right.float()).abs().max()
            return f"{other.where}: the {name} are up to {largest:.3g} apart"
    return None
