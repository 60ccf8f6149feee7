"""Snapshots that are damaged, in a file or in memory: each is refused by one sentence and nothing is done."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import random
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from rfengine import Pipeline
from rfengine.checkpoint.loader import read_safetensors, save_weights
from rfengine.checkpoint.tensor_file import read_header
from rfengine.snapshot import Snapshot
from support.models import small_pipeline


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return small_pipeline()


@pytest.fixture(scope="module")
def snapshot(pipe: Pipeline) -> Snapshot:
    """After four chunks: the window is full and chunk 1 has left it."""
    stream = pipe.stream("a circle", seed=5)
    for _ in stream.take(4):
        pass
    return stream.snapshot()


def with_info(snapshot: Snapshot, **values: object) -> Snapshot:
    return dataclasses.replace(snapshot, info=snapshot.info | values)


def with_tensors(snapshot: Snapshot, **values: object) -> Snapshot:
    return dataclasses.replace(snapshot, tensors=snapshot.tensors | values)


# written by rfengine before it counted frames: small_pipeline(), "a circle", seed 5, after four chunks
FORMAT_3 = Path(__file__).parent / "snapshots" / "stream_format_3.safetensors"


def save_old(path: Path, **values: object) -> None:
    """As format 2 was written, without a checksum."""
    tensors, metadata = read_safetensors(FORMAT_3)
    info = json.loads(metadata["snapshot"]) | {"format": 2} | values
    save_weights(path, tensors, {"snapshot": json.dumps(info)})


def test_a_file_names_its_format_and_its_checksum(snapshot: Snapshot, tmp_path: Path) -> None:
    path = tmp_path / "stream.safetensors"
    snapshot.save(path)
    metadata = read_header(path)[1]
    assert json.loads(metadata["snapshot"])["format"] == 4 and len(metadata["sha256"]) == 64
    loaded = Snapshot.load(path)
    assert loaded.info == snapshot.info and loaded.tensors.keys() == snapshot.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], each) for name, each in snapshot.tensors.items())


def test_any_flipped_bit_of_a_file_is_noticed(snapshot: Snapshot, tmp_path: Path) -> None:
    path, dice = tmp_path / "stream.safetensors", random.Random(0)
    snapshot.save(path)
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    places = [*range(8), *dice.sample(range(8, header), 120), *dice.sample(range(header, len(content)), 40)]
    for place in places:
        content[place] ^= (bit := 1 << dice.randrange(8))
        path.write_bytes(content)
        with pytest.raises(ValueError, match="stream.safetensors") as caught:
            Snapshot.load(path)
        assert "\n" not in str(caught.value), caught.value
        content[place] ^= bit
    path.write_bytes(content)
    Snapshot.load(path)


def test_a_file_that_was_cut_is_refused(snapshot: Snapshot, tmp_path: Path) -> None:
    path = tmp_path / "stream.safetensors"
    snapshot.save(path)
    content = path.read_bytes()
    for size in (0, 5, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="stream.safetensors"):
            Snapshot.load(path)


def test_a_file_whose_checksum_is_lost_or_whose_format_is_made_old_is_refused(
    snapshot: Snapshot, tmp_path: Path
) -> None:
    path = tmp_path / "stream.safetensors"
    text = json.dumps(snapshot.info)
    for metadata in (
        {"snapshot": text},
        {"snapshot": text, "sha256": "0" * 64},
    ):
        save_weights(path, snapshot.tensors, metadata)
        with pytest.raises(ValueError, match="is damaged: its content does not give its checksum"):
            Snapshot.load(path)
    tensors, metadata = read_safetensors(FORMAT_3)
    text = json.dumps(json.loads(metadata["snapshot"]) | {"format": 2})
    for metadata in ({"snapshot": text, "sha256": "0" * 64}, {"snapshot": text, "sha255": "0" * 64}):
        save_weights(path, tensors, metadata)
        with pytest.raises(ValueError, match="is damaged: its content does not give its checksum"):
            Snapshot.load(path)


def test_a_file_of_format_3_continues_as_the_stream_it_was_taken_of(
    pipe: Pipeline, snapshot: Snapshot
) -> None:
    old = Snapshot.load(FORMAT_3)
    assert old.info == snapshot.info and old.tensors.keys() == snapshot.tensors.keys()
    for mode in ("soft", "recache"):
        streams = [pipe.restore(each) for each in (old, snapshot)]
        for stream in streams:
            stream.set_prompt("a green square", mode)
        found, expected = (next(stream).frames.astype(int) for stream in streams)
        assert abs(found - expected).max() <= 1  # it was taken on another machine


def test_a_file_without_a_checksum_loads_with_a_warning(
    pipe: Pipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "old.safetensors"
    save_old(path)
    with caplog.at_level(logging.WARNING):
        old = Snapshot.load(path)
    assert f"{path} has no checksum" in caplog.text
    frames = next(pipe.restore(old)).frames
    assert numpy.array_equal(frames, next(pipe.restore(Snapshot.load(FORMAT_3))).frames)
    old.save(path)
    caplog.clear()
    assert Snapshot.load(path).info["format"] == 4 and not caplog.text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"slot_chunks": None}, "no counts of chunks"),
        ({"slot_chunks": [0, 2, 2**40]}, "no counts of chunks"),
        ({"next_chunk": "4"}, "no counts of chunks"),
        ({"next_chunk": -1}, "no counts of chunks"),
        ({"slot_chunks": [0, 3, 3]}, "which cannot be before frame 12"),
        ({"next_chunk": 9}, "the snapshot lacks window_latents.7"),
        ({"cache": 3}, "CacheConfig is 3"),
    ],
)
def test_an_old_file_whose_values_are_none_is_refused(tmp_path: Path, values: dict, message: str) -> None:
    save_old(tmp_path / "old.safetensors", **values)
    with pytest.raises(ValueError, match="old.safetensors cannot be restored: ") as caught:
        Snapshot.load(tmp_path / "old.safetensors")
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "3", '{"format": NaN}', "[" * 5000, '{"format": 3, "format": 3}'])
def test_text_that_describes_no_stream_is_refused(snapshot: Snapshot, tmp_path: Path, text: str) -> None:
    path = tmp_path / "stream.safetensors"
    save_weights(path, snapshot.tensors, {"snapshot": text})
    with pytest.raises(ValueError, match="stream.safetensors cannot be restored: "):
        Snapshot.load(path)


WRONG = {
    "null": None, "true": True, "false": False, "minus one": -1, "one": 1, "half": 0.5, "wide": 2**70,
    "huge": 10**400, "nan": math.nan, "infinity": math.inf, "text": "7", "empty text": "", "list": [],
    "list of null": [None], "list of texts": ["a"], "object": {}, "object of null": {"alpha": None},
    "list of truth": [True, False, True], "numpy": numpy.int64(3),
}  # fmt: skip
# values that are not wrong: any text is a prompt and any seed a seed, this schedule has no first timesteps,
# and a decoder may be behind
FREE = {
    ("prompt", "text"),
    ("prompt", "empty text"),
    ("seed", "one"),
    ("first_timesteps", "list"),
    ("decoded_frames", "one"),
}
FIELDS = (
    "format", "fingerprint", "dtype", "decoder", "cache", "denoising_timesteps", "first_timesteps", "rolling",
    "prompt", "seed", "height", "width", "index", "next_chunk", "next_frame", "held", "joint_chunks",
    "decoded_frames",
)  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_a_wrong_value_of_any_field_is_refused(pipe: Pipeline, snapshot: Snapshot, field: str) -> None:
    assert set(FIELDS) == snapshot.info.keys()
    for name, value in WRONG.items():
        if (field, name) in FREE:
            continue
        with pytest.raises(ValueError, match="snapshot|height|width") as caught:
            pipe.restore(with_info(snapshot, **{field: value}))
        assert len(str(caught.value)) < 1500 and "\n" not in str(caught.value), (name, caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"next_frame": 15}, r"hold the frames \[0, 1, 2, 9, .*\], which cannot be before frame 15"),
        ({"next_chunk": 13}, "12 latent frames cannot be in 13 chunks"),
        ({"next_chunk": 3}, "12 latent frames cannot be in 3 chunks"),
        ({"held": [0, 1, 2, 9, 10, 11, 3, 4, 5]}, "cannot be before frame 12"),
        ({"held": [0, 1, 2, 9, 10, 11, 9, 10, 11]}, "cannot be before frame 12"),
        ({"held": [9, 10, 11, 0, 1, 2, 6, 7, 8]}, "cannot be before frame 12"),
        ({"held": [0, 1, 2, 9, 10, 11, -1, -1, -1]}, "cannot be before frame 12"),
        ({"held": [0, 1, 2, 9]}, "has 4 slots; this stream has 9"),
        ({"joint_chunks": 1}, "1 chunks are in flight, of 0 joint frames"),
        ({"decoded_frames": 15}, "decoded_frames is 15 after 12 latent frames"),
        ({"given_frames": 3}, "given_frames is 3 of a chunk of 3, which is begun with fewer"),
        ({"given_frames": 1}, "the snapshot lacks given_latents"),
        ({"index": 3}, "index is 3 and 4 chunks were handed out"),
        ({"height": 48}, r"cache.keys of the snapshot is .*; this stream needs"),
        ({"height": 65520, "width": 65520}, "height is 65520 pixels; use at most 8192"),
        ({"height": 8176, "width": 8176}, r"cache.keys of the snapshot is .*; this stream needs"),
        ({"height": 33}, "height is 33 pixels; it must be a multiple of 16"),
        ({"mood": "good"}, "has 'mood', which no stream has"),
        ({"fingerprint": "x" * 100_000}, "the snapshot's fingerprint is 'xxx"),
    ],
)  # fmt: skip
def test_values_that_do_not_belong_together_are_refused(
    pipe: Pipeline, snapshot: Snapshot, values: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        pipe.restore(with_info(snapshot, **values))
    assert len(str(caught.value)) < 1000


def spoiled(tensor: Tensor, value: float) -> Tensor:
    copy = tensor.clone(memory_format=torch.contiguous_format)
    copy.view(-1)[-1] = value
    return copy


def test_every_tensor_is_compared_with_what_the_stream_expects(pipe: Pipeline, snapshot: Snapshot) -> None:
    groups = set()
    for name, tensor in snapshot.tensors.items():
        others = {key: each for key, each in snapshot.tensors.items() if key != name}
        lacking = dataclasses.replace(snapshot, tensors=others)
        wrong = [tensor.double(), tensor[..., :0], spoiled(tensor, math.nan)]
        if name.split(".")[0] not in groups:  # everything that can be wrong, for one tensor of each group
            groups.add(name.split(".")[0])
            wrong += [tensor[None], tensor.to(torch.int32), "text", None]
            wrong += [spoiled(tensor, value) for value in (math.inf, -math.inf)]
        for damaged in (lacking, *(with_tensors(snapshot, **{name: each}) for each in wrong)):
            with pytest.raises(ValueError, match="snapshot"):
                pipe.restore(damaged)
    for name in ("cache.more", "decoder.more", "window_latents.0", "given_latents", "ahead.frames", "x"):
        with pytest.raises(ValueError, match="snapshot"):
            pipe.restore(with_tensors(snapshot, **{name: torch.zeros(2)}))


def test_a_refused_snapshot_leaves_the_pipeline_and_the_snapshot_as_they_were(
    pipe: Pipeline, snapshot: Snapshot
) -> None:
    expected = next(pipe.restore(snapshot)).frames
    name = next(name for name in snapshot.tensors if name.startswith("decoder."))
    damaged = with_tensors(snapshot, **{name: spoiled(snapshot.tensors[name], math.nan)})
    with pytest.raises(ValueError, match="has values that are not finite"):
        pipe.restore(damaged)
    assert numpy.array_equal(next(pipe.restore(snapshot)).frames, expected)


def test_what_is_no_stream_is_not_saved(snapshot: Snapshot, tmp_path: Path) -> None:
    for values in ({"seed": None}, {"seed": numpy.int64(3)}, {"denoising_timesteps": [math.nan]}):
        with pytest.raises(ValueError, match="the snapshot's"):
            with_info(snapshot, **values).save(tmp_path / "stream.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_stream_that_was_not_decoded_stays_so_when_restored(pipe: Pipeline) -> None:
    stream = pipe.stream("a circle")
    stream.advance(decode=False)
    restored = pipe.restore(stream.snapshot())
    with pytest.raises(RuntimeError, match="chunk 0 was not decoded"):
        next(restored)
    expected = stream.advance(decode=False)
    assert restored.advance(decode=False).index == expected.index == 1
    assert torch.equal(restored.latents, stream.latents)


def test_a_recached_window_and_a_hard_switch_are_consistent(pipe: Pipeline) -> None:
    stream = pipe.stream("a circle")
    for _ in stream.take(4):
        pass
    stream.set_prompt("a green square", "recache")
    snapshot = stream.snapshot()
    assert snapshot.info["held"] == [0, 1, 2, *range(6, 12)]
    assert numpy.array_equal(next(pipe.restore(snapshot)).frames, next(stream).frames)
    stream.set_prompt("a red square", "hard")
    restored = pipe.restore(stream.snapshot())
    chunk = next(restored)
    assert chunk.index == 5 and numpy.array_equal(chunk.frames, next(stream).frames)
