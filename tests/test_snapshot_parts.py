"""Parts of a snapshot: what is joined, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from rfengine.snapshot import Snapshot
from rfengine.snapshot_parts import part_path, part_paths
from rfengine.tensor_parallel import TensorParallel
from support.models import small_pipeline


@pytest.fixture(scope="module")
def pipe():
    return small_pipeline()


@pytest.fixture(scope="module")
def whole(pipe) -> Snapshot:
    stream = pipe.stream("a circle", seed=3)
    for _ in range(3):
        next(stream)
    return stream.snapshot()


def parts_of(snapshot: Snapshot) -> list[Snapshot]:
    return [snapshot.of_rank(TensorParallel(rank, 2)) for rank in range(2)]


def test_parts_in_any_order_are_the_snapshot_again(whole: Snapshot) -> None:
    first, second = parts_of(whole)
    assert first.tensors["cache.keys"].shape[3] == 1
    assert not any(name.startswith("decoder.") for name in second.tensors)
    again = Snapshot.joined([second, first])
    assert again.info == whole.info and again.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(again.tensors[name], each) for name, each in whole.tensors.items())


def test_frames_that_are_ahead_are_in_the_first_part_alone(whole: Snapshot) -> None:
    frames = torch.randint(0, 255, (12, 32, 48, 3), dtype=torch.uint8)
    ahead = dataclasses.replace(whole, tensors=whole.tensors | {"ahead.frames": frames})
    first, second = parts_of(ahead)
    assert torch.equal(first.tensors["ahead.frames"], frames)
    assert second.tensors["ahead.frames"].shape == (0, 32, 48, 3)
    assert torch.equal(Snapshot.joined([second, first]).tensors["ahead.frames"], frames)


def test_each_rank_saves_a_file_and_the_name_without_a_number_loads_all(
    whole: Snapshot, tmp_path: Path
) -> None:
    path = tmp_path / "stream.safetensors"
    for part in parts_of(whole):
        part.save(path)
    files = [tmp_path / f"stream-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert part_paths(path) == files == [part_path(path, rank, 2) for rank in range(2)]
    loaded = Snapshot.load(path)
    assert loaded.info == whole.info
    assert torch.equal(loaded.tensors["cache.keys"], whole.tensors["cache.keys"])
    assert Snapshot.load(files[1]).stream_info().part == (1, 2)
    files[0].unlink()
    with pytest.raises(
        ValueError,
        match="stream.safetensors is in the parts stream-00002-of-00002.safetensors, which are not one "
        "snapshot: the parts of the snapshot are 2 of 2; give each of the 2 once",
    ):
        Snapshot.load(path)
    whole.save(path)
    with pytest.raises(ValueError, match=r"is there whole and in parts \(stream-00002-of-00002"):
        Snapshot.load(path)
    assert Snapshot.load(files[1]).stream_info().part == (1, 2)


def test_parts_of_other_moments_and_twice_the_same_are_refused(pipe, whole: Snapshot) -> None:
    first, second = parts_of(whole)
    with pytest.raises(ValueError, match="the parts of the snapshot are 1 of 2, 1 of 2; give each"):
        Snapshot.joined([first, first])
    with pytest.raises(ValueError, match="there are 0 parts of the snapshot"):
        Snapshot.joined([])
    stream = pipe.restore(whole)
    next(stream)
    later = stream.snapshot().of_rank(TensorParallel(1, 2))
    with pytest.raises(ValueError, match="parts 1 and 2 of the snapshot are not of one moment"):
        Snapshot.joined([first, later])
    other = dict(second.tensors, window_latents=second.tensors["window_latents"] + 1)
    with pytest.raises(ValueError, match="not of one moment"):
        Snapshot.joined([first, dataclasses.replace(second, tensors=other)])


def test_a_part_is_restored_by_its_rank_alone(pipe, whole: Snapshot) -> None:
    with pytest.raises(
        ValueError, match="the snapshot is part 2 of 2 and this is rank 0 of 1; give the whole"
    ):
        pipe.restore(parts_of(whole)[1])
    with pytest.raises(ValueError, match=r"whose heads 3 ranks cannot share out"):
        whole.of_rank(TensorParallel(0, 3))
    wrong = dataclasses.replace(whole, info=whole.info | {"part": [2, 2]})
    with pytest.raises(ValueError, match=r"part is \(2, 2\), a rank and the number of ranks"):
        wrong.stream_info()
    whole_part = dataclasses.replace(whole, info=whole.info | {"part": [0, 2]})
    with pytest.raises(ValueError, match="this is rank 0 of 1"):
        pipe.restore(whole_part)
