"""A stream on two GPUs: the decoder on its own, and two ranks over NCCL with recorded chunks."""

from __future__ import annotations

import os
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as distributed

from rfengine import Pipeline, RuntimeConfig
from support.models import frames_of

CHUNKS = 7  # of which the last ones are replayed from a graph

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two CUDA devices are needed"),
]


def test_a_decoder_on_a_gpu_of_its_own_makes_the_same_frames() -> None:
    frames = []
    for place in (None, "cuda:1"):
        runtime = RuntimeConfig(decode_device=place, autotune=False)
        pipe = Pipeline.from_pretrained("tiny", "cuda:0", runtime=runtime)
        frames.append(frames_of(pipe.stream("a red circle", seed=1), CHUNKS))
    assert numpy.array_equal(*frames)


def stream_of_rank(rank: int, directory: Path, meeting: str) -> None:
    os.environ["LOCAL_RANK"], device = str(rank), torch.device("cuda", rank)
    torch.cuda.set_device(device)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=meeting, rank=rank, world_size=3, device_id=device
    )
    pipe = Pipeline.from_pretrained("tiny", "cuda", "float32", tensor_parallel=3)
    stream, latents = pipe.stream("a red circle", seed=1), []
    for _ in range(CHUNKS):
        next(stream)
        latents.append(stream.latents.cpu())
    torch.save(torch.cat(latents, 2), directory / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 3, reason="tiny has three heads: three devices are needed")
def test_ranks_over_nccl_make_the_latents_of_one(tmp_path: Path, monkeypatch) -> None:
    expected = []
    stream = Pipeline.from_pretrained("tiny", "cuda:0", "float32").stream("a red circle", seed=1)
    for _ in range(CHUNKS):
        next(stream)
        expected.append(stream.latents.cpu())
    meeting = (tmp_path / "meeting").as_uri()
    torch.multiprocessing.spawn(stream_of_rank, (tmp_path, meeting), nprocs=3)
    for rank in range(3):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, torch.cat(expected, 2), rtol=0, atol=1e-3)
