"""What one of several ranks refuses, and where they differ: all are told, and go on together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch

import rfengine.pipeline as pipeline_file
from rfengine import Pipeline, RuntimeConfig
from rfengine.ops import choose_ops
from rfengine.runtime import ranks as ranks_file
from rfengine.runtime.loaded_models import LoadedModels, Placement
from rfengine.runtime.ranks import equal_ops
from rfengine.snapshot import Snapshot
from rfengine.stream import VideoStream
from support.loras import write_lora
from support.models import SMALL, small_pipeline, write_pipeline
from support.ranks import run_ranks
from support.tensor_parallel import latents_of, pipeline_of


def fails(*given: object, **named: object) -> None:
    raise RuntimeError("there is no memory")


class RefusedCalls:
    """Calls in which rank 1, or rank 0 where it is said, is given something else."""

    def __init__(self, rank: int, pipe: Pipeline, directory: Path) -> None:
        self.rank, self.pipe, self.directory = rank, pipe, directory
        self.stream = pipe.stream("a circle")
        latents_of(self.stream, 2)
        self.taken = self.stream.snapshot()
        latents_of(self.stream, 1)

    def every_call(self) -> dict[str, Callable[[], object]]:
        names = (name for name in vars(RefusedCalls) if name.startswith("other_"))
        return {name.removeprefix("other_"): getattr(self, name) for name in names}

    def other_text(self) -> None:
        self.pipe.stream("" if self.rank else "a circle")

    def other_weights_of_texts(self) -> None:
        self.stream.set_prompt([("a circle", 1), ("a square", 1 + self.rank)])

    def other_mode(self) -> None:
        self.stream.set_prompt("a square", "recache" if self.rank else "soft")

    def other_memory(self) -> None:
        if self.rank:
            self.pipe.stream("a circle")
            return
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline_file, "require_stream_fits", fails)
            self.pipe.stream("a circle")

    def other_encoder(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if not self.rank:
                patch.setattr(self.pipe.text_encoder._encoder, "encode", fails)
            self.stream.set_prompt("a square")

    def other_lora(self) -> None:
        self.pipe.set_loras([self.lora(0.1)] if self.rank else [self.directory / "none.safetensors"])

    def other_part_of_a_lora(self) -> None:
        self.pipe.set_loras([self.lora(3e38)])  # in rank 1's columns alone

    def lora(self, value: float) -> Path:
        up = torch.full((SMALL.ffn_dim, 4), 0.1)
        up[-1] = value
        down = torch.full((4, SMALL.dim), 10.0)
        return write_lora(self.directory / f"{self.rank} {value}.safetensors", {"blocks.1.ffn.0": (down, up)})

    def other_snapshot(self) -> None:
        tensors = dict(self.taken.tensors)
        if self.rank:
            tensors["cache.keys"] = torch.full_like(tensors["cache.keys"], torch.nan)
        self.pipe.restore(Snapshot(tensors, self.taken.info))

    def other_moment(self) -> None:
        later = self.stream.snapshot()
        self.stream.rewind(later if self.rank else self.taken)

    def other_state_of_the_decoder(self) -> None:
        tensors = {name: each for name, each in self.taken.tensors.items() if not name.startswith("decoder.")}
        self.pipe.restore(Snapshot(tensors, self.taken.info))

    def other_clip(self) -> None:
        frames = numpy.full((9, 32, 48, 3), self.rank, numpy.uint8)
        self.pipe.stream("a circle", start_frames=frames)

    def other_beginning(self) -> None:
        frames = numpy.zeros((9, 32, 48, 3), numpy.uint8)
        self.pipe.stream("a circle", start_frames=frames if self.rank else None)

    def other_precision(self) -> None:
        runtime = RuntimeConfig(precision="fp8") if self.rank else None
        pipeline_of(self.directory, "ema", 2, runtime=runtime)

    def other_overlap(self) -> None:
        torch.set_num_threads(1 + self.rank)
        try:
            pipeline_of(self.directory, "ema", 2)
        finally:
            torch.set_num_threads(1)


def backends_of_rank(rank: int, pipe: Pipeline) -> set[str]:
    """Of ops where the first rank has timed others to be the best than the second."""
    with pytest.MonkeyPatch.context() as patch:
        tuned = choose_ops("auto" if rank == 0 else "reference", pipe.model.device)
        patch.setattr(ranks_file, "tuned_ops", lambda *given: tuned)
        ops = equal_ops(pipe.config, pipe.model.dtype, pipe.model.device, pipe.model.parallel)
    return set(ops.choice.values())


def decoding_device(directory: Path) -> str:
    """Where a rank is told to have its VAE, with a device for the decoder."""
    cpu, seen, load = torch.device("cpu"), [], pipeline_file.load_models
    asked = Placement(cpu, torch.device("cpu", 0), cpu, torch.float32)

    def noted(*given: object) -> LoadedModels:
        seen.append(str(given[3].decoding))
        return load(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Placement, "of", lambda *given: asked)
        patch.setattr(pipeline_file, "load_models", noted)
        pipeline_of(directory, "ema", 2)
    return seen[0]


def told(rank: int, directory: Path) -> None:
    pipe = pipeline_of(directory, "ema", 2)
    calls = RefusedCalls(rank, pipe, directory)
    said = {}
    for name, call in calls.every_call().items():
        try:
            call()
            said[name] = "nothing"
        except (ValueError, RuntimeError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    said["LoRAs"] = len(pipe.loras)
    said["text encoder"] = pipe.text_encoder._encoder is not None
    said["decoding"] = decoding_device(directory)
    said["backends"] = sorted(backends_of_rank(rank, pipe))
    (directory / f"told {rank}").write_text(json.dumps(said))
    torch.save(latents_of(calls.stream, 1), directory / f"after {rank}.pt")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe = small_pipeline()
    directory = write_pipeline(tmp_path_factory.mktemp("checkpoint"), pipe)
    run_ranks(told, 2, directory)
    return directory


@pytest.fixture(scope="module")
def said(directory: Path) -> list[dict[str, str]]:
    return [json.loads((directory / f"told {rank}").read_text()) for rank in range(2)]


DIFFERENCES = {
    "weights_of_texts": "the prompt of rank 0 is '1 * a circle | 1 * a square' and that of rank 1 is",
    "mode": "the mode of the prompt of rank 0 is 'soft' and that of rank 1 is 'recache'",
    "moment": "the snapshot, index of rank 0 is 2 and that of rank 1 is 3",
    "clip": "the clip of rank 0 is '9 x 32 x 48 x 3, ",
    "beginning": "the beginning of rank 0 is None and that of rank 1 is 'a clip'",
    "precision": "the configuration, runtime, precision of rank 0 is 'default' and that of rank 1 is 'fp8'",
    "overlap": "the overlap of rank 0 is False and that of rank 1 is True",
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_ranks_that_differ_are_told_in_what(said: list[dict[str, str]], name: str) -> None:
    for rank in range(2):
        assert said[rank][name].startswith(f"ValueError: {DIFFERENCES[name]}")
        assert said[rank][name].endswith("all ranks need the same")


FAILURES = {
    "text": (1, "ValueError", "the prompt '' is empty"),
    "memory": (0, "RuntimeError", "there is no memory"),
    "encoder": (0, "RuntimeError", "there is no memory"),
    "lora": (0, "ValueError", "none.safetensors does not exist"),
    "part_of_a_lora": (1, "ValueError", "blocks.1.ffn.0.weight has values that are not finite"),
    "snapshot": (1, "ValueError", "cache.keys of the snapshot has values that are not finite"),
    "state_of_the_decoder": (0, "ValueError", "the snapshot lacks "),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_one_rank_refuses_all_refuse(said: list[dict[str, str]], name: str) -> None:
    rank, kind, text = FAILURES[name]
    for each in range(2):
        assert said[each][name].startswith(f"{kind}: ") and text in said[each][name]
        assert (f"rank {rank} cannot go on: " in said[each][name]) == (each != rank)


def test_nothing_is_changed_by_what_was_refused(directory: Path, said: list[dict[str, str]]) -> None:
    assert set(said[0]) == {*DIFFERENCES, *FAILURES, "LoRAs", "text encoder", "decoding", "backends"}
    assert said[0]["LoRAs"] == said[1]["LoRAs"] == 0
    expected = fourth_chunk(pipeline_of(directory, "ema", 1).stream("a circle"))
    for rank in range(2):
        found = torch.load(directory / f"after {rank}.pt", weights_only=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_first_rank_encodes_decodes_and_chooses_the_ops(said: list[dict[str, str]]) -> None:
    assert [each["text encoder"] for each in said] == [True, False]
    assert [each["decoding"] for each in said] == ["cpu:0", "cpu"]
    assert said[0]["backends"] == said[1]["backends"] != ["reference"]


def fourth_chunk(stream: VideoStream) -> torch.Tensor:
    return latents_of(stream, 4)[3:]


def lost(rank: int, directory: Path) -> None:
    """Rank 1 ends inside of a chunk."""
    stream = pipeline_of(directory, "ema", 2).stream("a circle")
    if rank:
        return
    try:
        next(stream)
    except RuntimeError as error:
        (directory / "lost").write_text(f"{stream.closed} {error}")


def test_a_rank_that_ends_is_named_and_closes_the_stream(directory: Path) -> None:
    run_ranks(lost, 2, directory)
    assert (directory / "lost").read_text().startswith("True another rank has ended or made another call; ")
