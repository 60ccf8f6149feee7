"""CUDA graphs and overlapped decoding change no bit of a scripted stream; on a CPU, overlapped decoding.

The script: enough chunks that every recorded program is replayed after evictions, a soft change of the
prompt, one that recomputes the window, a snapshot and the stream restored from it, a hard change.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rfengine.benchmark.timing import recorded_chunks
from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.config import RuntimeConfig, WanConfig
from rfengine.pipeline import Pipeline
from rfengine.presets import PRESETS
from rfengine.stream import VideoStream
from support.models import small_pipeline

CHANGED_CHUNKS = 3  # after each change of the prompt: more than a window has slots that are written
SNAPSHOT_CHUNKS = 2
PLAIN = RuntimeConfig(graphs=False, overlap=False, autotune=False)
Chunk = tuple[str, Tensor, Tensor]  # where in the script, latents, frames


class TextStatesByPrompt:
    """Stands in for a text encoder: every prompt has states of its own, drawn by its checksum."""

    def __init__(self, config: WanConfig) -> None:
        self._shape = (1, config.text_len, config.text_dim)

    def encode(self, prompts: list[str], device: torch.device, dtype: torch.dtype) -> Tensor:
        seeds = [torch.Generator().manual_seed(zlib.crc32(prompt.encode())) for prompt in prompts]
        return torch.cat([torch.randn(self._shape, generator=seed) for seed in seeds]).to(device, dtype)


def with_runtime(pipeline: Pipeline, runtime: RuntimeConfig) -> Pipeline:
    """The same weights under another runtime, with text states for every prompt."""
    config = replace(pipeline.config, runtime=runtime)
    text = TextStatesByPrompt(config.model)
    return Pipeline(config, pipeline.model, pipeline.vae, text, "the weights of this test")


def scripted(pipeline: Pipeline, chunks: int) -> Iterator[Chunk]:
    """The chunks of the script, so many before the first change of the prompt; those of the restored and of
    the restarted stream are checked here."""
    stream = pipeline.stream("the first prompt", seed=3)
    begun = list(taken("start", stream, chunks))
    yield from begun
    stream.set_prompt("another", "soft")
    yield from taken("soft change", stream, CHANGED_CHUNKS)
    stream.set_prompt("a third one", "recache")
    yield from taken("window recomputed", stream, CHANGED_CHUNKS)
    snapshot = stream.snapshot()
    continued = list(taken("snapshot taken", stream, SNAPSHOT_CHUNKS))
    restored = pipeline.restore(snapshot)
    assert_equal(continued, list(taken("restored", restored, SNAPSHOT_CHUNKS)))
    restored.close()
    yield from continued
    stream.set_prompt("the first prompt", "hard")
    assert_equal(begun, list(taken("restart", stream, chunks)))
    stream.close()


def taken(event: str, stream: VideoStream, count: int) -> Iterator[Chunk]:
    for place, chunk in enumerate(stream.take(count)):
        yield f"{event}, chunk {place}", stream.latents.cpu().clone(), torch.from_numpy(chunk.frames.copy())


def assert_equal(expected: list[Chunk], found: list[Chunk]) -> None:
    for (_, *tensors), (where, *others) in zip(expected, found, strict=True):
        for name, one, other in zip(("latents", "frames"), tensors, others, strict=True):
            assert one.isfinite().all(), f"{where}: the {name} are not finite"
            apart = (one.float() - other.float()).abs().max()
            assert torch.equal(one, other), f"{where}: the {name} are up to {apart:.3g} apart"


@torch.no_grad()
def test_on_a_cpu_overlapped_decoding_changes_no_bit() -> None:
    plain = with_runtime(small_pipeline(), PLAIN)
    overlapped = with_runtime(plain, replace(PLAIN, overlap=True))
    chunks = plain.config.cache.filling_chunks + 1
    assert_equal(list(scripted(plain, chunks)), list(scripted(overlapped, chunks)))


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize(
    ("preset", "dtype"),
    [
        ("wan-1.3b", torch.bfloat16),
        ("tiny", torch.float32),
        ("tiny", torch.bfloat16),
    ],  # the shipped size first
    ids=["shipped-bfloat16", "small-float32", "small-bfloat16"],
)
def test_graphs_and_overlapped_decoding_change_no_bit(preset: str, dtype: torch.dtype) -> None:
    config = replace(PRESETS[preset], runtime=PLAIN)
    pipeline = Pipeline.from_pretrained(Checkpoint.random(config), "cuda", dtype, runtime=PLAIN)
    chunks = recorded_chunks(config.cache) + 2
    expected = list(scripted(with_runtime(pipeline, PLAIN), chunks))
    for overlap in (False, True):
        graphed = with_runtime(pipeline, replace(PLAIN, graphs=True, overlap=overlap))
        assert_equal(expected, list(scripted(graphed, chunks)))
