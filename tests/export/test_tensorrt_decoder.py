"""TensorRTDecoder: whole streams through a fake TensorRT that reads and writes by address."""

from __future__ import annotations

import copy
import dataclasses
import logging

import pytest
import torch
from torch import Tensor

from rfengine.config import CacheConfig, EngineConfig, RuntimeConfig
from rfengine.export import tensorrt_decoder as tensorrt_module
from rfengine.export.decoder_graphs import DecoderGraph
from rfengine.export.onnx_export import STAGES, engine_folders, export_graph, write_onnx
from rfengine.export.tensorrt_decoder import TensorRTDecoder
from rfengine.export.tensorrt_engine import build_engine
from rfengine.models.decoder import reset_state
from rfengine.ops import REFERENCE_OPS
from support.small_export import CONFIG, GRID, LATENTS, noise
from support.tensorrt import RecordedCall, install

CPU = torch.device("cpu")
SIZE = (GRID.latent_height, GRID.latent_width)
TOLERANCE = 1e-4  # float32, onnxruntime against torch
CHUNKS = 4


@pytest.fixture(params=["10.16.1.11", "11.4.0.106"])
def journal(request, export, monkeypatch):
    """A fake TensorRT of either major, with the engines of the export built."""
    journal = install(monkeypatch, request.param)
    for stage in STAGES:
        build_engine(export.folder, export.spec, stage, CPU)
    return journal


@pytest.fixture
def decoder(export, journal) -> TensorRTDecoder:
    decoder = opened(export)
    assert decoder.graphs is False
    return decoder


def opened(export, config=CONFIG, grid=GRID, dtype=torch.float32, folder=None) -> TensorRTDecoder:
    runtime = RuntimeConfig(vae="tensorrt", tensorrt_directory=folder and str(folder))
    config = dataclasses.replace(config, runtime=runtime)
    return TensorRTDecoder.open(export.directory, config, grid, dtype, CPU, graphs=False)


def with_chunks_of(latents: int) -> EngineConfig:
    return dataclasses.replace(CONFIG, cache=CacheConfig(latents, 2 * latents, sink="none", sink_frames=0))


def fresh_states(export, decoder: TensorRTDecoder):
    return (
        decoder.decoder_state(1, *SIZE, torch.float32, "cpu"),
        export.vae.decoder_state(1, *SIZE, torch.float32, "cpu"),
    )


def assert_same_state(ours, theirs) -> None:
    assert ours.frames == theirs.frames
    wanted = theirs.tensors()
    assert list(ours.tensors()) == list(wanted)
    for name, tensor in ours.tensors().items():
        torch.testing.assert_close(tensor, wanted[name], atol=TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
def plain(export, latents: Tensor, state) -> Tensor:
    return export.vae.decode(latents, state)


def test_stream_equals_the_plain_decoder_in_pixels_and_state(export, journal, decoder) -> None:
    ours, theirs = fresh_states(export, decoder)
    for chunk in range(CHUNKS):
        wanted = plain(export, noise(chunk), theirs)
        pixels = decoder.decode(noise(chunk), ours)
        assert pixels.shape == wanted.shape
        torch.testing.assert_close(pixels, wanted, atol=TOLERANCE, rtol=TOLERANCE)
        assert_same_state(ours, theirs)
    assert [stage for stage, _ in journal.executions] == ["first", "steady", "steady", "steady"]


def test_frames_are_packed_as_everywhere(export, decoder) -> None:
    ours, theirs = fresh_states(export, decoder)
    for chunk in range(2):
        wanted = REFERENCE_OPS.frame_pack(plain(export, noise(chunk), theirs)[0])
        frames = decoder.decode_frames(noise(chunk), ours)
        assert frames.dtype == torch.uint8 and frames.shape == wanted.shape
        assert (frames.int() - wanted.int()).abs().max() <= 1


def test_state_changes_sides_and_is_never_copied(export, journal, decoder) -> None:
    state, _ = fresh_states(export, decoder)
    for chunk in range(CHUNKS):
        decoder.decode(noise(chunk), state)
    places = [addresses for _, addresses in journal.executions]
    for before, after in zip(places[1:], places[2:], strict=False):
        assert before["next_conv1"] == after["state_conv1"]
        assert before["state_conv1"] == after["next_conv1"]
    assert len({addresses["latents"] for addresses in places}) == 1


@pytest.mark.parametrize("journal", ["11.4.0.106"], indirect=True)
def test_single_latents_start_from_zero_where_the_first_call_leaves_slots_out(export, journal) -> None:
    """The first latent alone skips the temporal doubling: its slot is zero then, in a used state too."""
    spec = dataclasses.replace(export.spec, latents=1)
    for stage in STAGES:
        program = export_graph(DecoderGraph(export.vae, 1, *SIZE, first=stage == "first"))
        write_onnx(program, spec, stage, export.folder)
        build_engine(export.folder, spec, stage, CPU)
    single = opened(export, with_chunks_of(1))
    ours, _ = fresh_states(export, single)
    for _ in range(2):
        theirs = export.vae.decoder_state(1, *SIZE, torch.float32, "cpu")
        for chunk in range(3):
            latents = noise(chunk, latents=1)
            wanted = plain(export, latents, theirs)
            torch.testing.assert_close(single.decode(latents, ours), wanted, atol=TOLERANCE, rtol=TOLERANCE)
            assert_same_state(ours, theirs)
        ours.load(ours.tensors(), 0)  # a new video in the same buffers, which are not zero


def test_no_graph_is_recorded_where_none_is_wanted(export, decoder, monkeypatch) -> None:
    monkeypatch.setattr(tensorrt_module, "CapturedCall", None)  # cannot be called
    state, _ = fresh_states(export, decoder)
    for chunk in range(CHUNKS):
        decoder.decode(noise(chunk), state)


def test_streams_on_one_decoder_do_not_touch_each_other(export, decoder) -> None:
    pairs = [fresh_states(export, decoder) for _ in range(2)]
    for chunk in range(3):
        for stream, (ours, theirs) in enumerate(pairs):
            latents = noise(10 * stream + chunk)
            wanted = plain(export, latents, theirs)
            torch.testing.assert_close(decoder.decode(latents, ours), wanted, atol=TOLERANCE, rtol=TOLERANCE)


def test_pixels_of_a_chunk_outlive_the_next_call(export, decoder) -> None:
    state, _ = fresh_states(export, decoder)
    decoder.decode(noise(0), state)
    second = decoder.decode(noise(1), state)
    kept = second.clone()
    decoder.decode(noise(2), state)
    assert second.equal(kept)


def test_snapshot_moves_between_this_decoder_and_the_plain_one(export, decoder) -> None:
    ours, theirs = fresh_states(export, decoder)
    for chunk in range(2):
        plain(export, noise(chunk), theirs)
    ours.load(theirs.tensors(), theirs.frames)
    pixels = decoder.decode(noise(2), ours)
    torch.testing.assert_close(pixels, plain(export, noise(2), theirs), atol=TOLERANCE, rtol=TOLERANCE)
    back = export.vae.decoder_state(1, *SIZE, torch.float32, "cpu")
    back.load(ours.tensors(), ours.frames)
    copied, _ = fresh_states(export, decoder)
    copied.load(ours.tensors(), ours.frames)
    wanted = decoder.decode(noise(3), ours)
    torch.testing.assert_close(plain(export, noise(3), back), wanted, atol=TOLERANCE, rtol=TOLERANCE)
    assert decoder.decode(noise(3), copied).equal(wanted)


def test_state_that_is_put_back_starts_a_video_anew(export, decoder) -> None:
    state, _ = fresh_states(export, decoder)
    first = [decoder.decode(noise(chunk), state) for chunk in range(3)]
    reset_state(state)
    again = [decoder.decode(noise(chunk), state) for chunk in range(3)]
    assert all(one.equal(other) for one, other in zip(first, again, strict=True))


def test_steady_calls_are_recorded_once_for_each_direction(export, journal, decoder, monkeypatch) -> None:
    monkeypatch.setattr(tensorrt_module, "CapturedCall", RecordedCall)
    monkeypatch.setattr(RecordedCall, "made", 0)
    decoder.graphs = True
    ours, theirs = fresh_states(export, decoder)
    for chunk in range(6):
        wanted = plain(export, noise(chunk), theirs)
        pixels = decoder.decode(noise(chunk), ours)
        torch.testing.assert_close(pixels, wanted, atol=TOLERANCE, rtol=TOLERANCE)
        assert_same_state(ours, theirs)
    assert RecordedCall.made == 2
    reset_state(ours)
    decoder.decode(noise(0), ours)
    decoder.decode(noise(1), ours)
    assert RecordedCall.made == 2


def test_decoder_runs_without_graphs_where_capture_fails(export, decoder, monkeypatch, caplog) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(tensorrt_module, "CapturedCall", refuse)
    decoder.graphs = True
    ours, theirs = fresh_states(export, decoder)
    with caplog.at_level(logging.WARNING, logger="rfengine"):
        for chunk in range(CHUNKS):
            wanted = plain(export, noise(chunk), theirs)
            pixels = decoder.decode(noise(chunk), ours)
            torch.testing.assert_close(pixels, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    assert caplog.text.count("runs without CUDA graphs: operation not permitted") == 1


def test_wrong_input_leaves_the_stream_usable(export, decoder) -> None:
    ours, theirs = fresh_states(export, decoder)
    other = opened(export)
    decoder.decode(noise(0), ours)
    plain(export, noise(0), theirs)
    with pytest.raises(
        ValueError, match=r"latents are \(1, 4, 2, 4, 6\); these engines decode \(1, 4, 3, 4, 6\)"
    ):
        decoder.decode(noise(1, latents=2), ours)
    with pytest.raises(ValueError, match="the state is of another decoder"):
        other.decode(noise(1), ours)
    with pytest.raises(ValueError, match="the state is of another decoder"):
        decoder.decode(noise(1), theirs)
    with pytest.raises(ValueError, match="slot 'conv1' is"):
        smaller = export.vae.decoder_state(1, 2, 2, torch.float32, "cpu")
        ours.load(smaller.tensors(), 3)
    torch.testing.assert_close(
        decoder.decode(noise(1), ours), plain(export, noise(1), theirs), atol=TOLERANCE, rtol=TOLERANCE
    )


@pytest.mark.parametrize("asked", [(2, *SIZE), (1, 8, 6), (1, 4, 8)], ids=str)
def test_state_of_another_size_is_refused(decoder, asked) -> None:
    with pytest.raises(ValueError, match=r"these engines decode latents of \(1, 4, 6\)"):
        decoder.decoder_state(*asked, torch.float32, "cpu")


def test_open_names_the_command_that_builds_what_is_missing(export, journal) -> None:
    other = dataclasses.replace(GRID, height=32)
    with pytest.raises(ValueError) as refused:
        opened(export, with_chunks_of(5), other, torch.bfloat16)
    command = f"rfengine export-vae {export.directory} --height 32 --width 12 --latents 5 --precision bf16"
    assert f"build it with `{command}`" in str(refused.value)
    assert f"{export.folder} has no engine" in str(refused.value) and ", nor has " in str(refused.value)
    with pytest.raises(ValueError, match="dtype is torch.float64; a TensorRT decoder serves torch.float16"):
        opened(export, dtype=torch.float64)


def test_engines_are_found_in_the_cache_directory_and_in_a_folder_that_is_given(
    export, journal, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached = engine_folders(export.directory, export.spec.vae_fingerprint)[1]
    cached.parent.mkdir(parents=True)
    export.folder.rename(cached)
    assert opened(export).engines
    cached.rename(tmp_path / "mine")
    with pytest.raises(ValueError, match="has no engine"):
        opened(export)
    assert opened(export, folder=tmp_path / "mine").engines
    with pytest.raises(
        ValueError, match=f"^{tmp_path}/no has no engine .*; build it with .* --out {tmp_path}/no"
    ):
        opened(export, folder=tmp_path / "no")


def test_half_precisions_serve_each_other_and_float32_serves_neither(export, journal) -> None:
    half = dataclasses.replace(export.spec, precision="fp16")
    for stage in STAGES:
        there = next(export.folder.glob(f"{export.spec.stem(stage)}-*.engine"))
        there.rename(there.with_name(there.name.replace(export.spec.stem(stage), half.stem(stage))))
    with pytest.raises(ValueError, match="says precision fp32 where fp16 is needed"):  # it was looked at
        opened(export, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="has no engine vae-.*-fp32-first"):
        opened(export)


def test_engine_that_tensorrt_does_not_load_is_one_sentence(decoder) -> None:
    with pytest.raises(
        RuntimeError, match=r"cannot load the first engine \(the version tag does not match\)"
    ):
        TensorRTDecoder(decoder.trt, {"first": b"?"}, decoder.bindings, CPU)


def test_engine_with_other_bindings_is_refused_by_name(export, decoder, journal) -> None:
    right = decoder.bindings["steady"]
    steady = DecoderGraph(copy.deepcopy(export.vae).half(), *right.latents_shape[2:], first=False)
    content = next(export.folder.glob("*-steady-*.engine"))
    engines = {"steady": content.read_bytes()[content.read_bytes().index(b"fake engine") :]}
    with pytest.raises(
        RuntimeError, match=r"next_conv1 of the steady engine is \(False, .*torch.float32\) where"
    ):
        TensorRTDecoder(decoder.trt, engines, {"steady": steady}, CPU)


def test_chunk_length_is_that_of_the_checkpoint_s_cache(decoder) -> None:
    assert decoder.bindings["steady"].latents_shape[2] == LATENTS
