"""Exported ONNX files: names, types, metadata, and the files that are refused."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rfengine.checkpoint.directories import checkpoint_directory
from rfengine.checkpoint.loader import save_weights
from rfengine.export import onnx_export
from rfengine.export.decoder_graphs import DecoderGraph
from rfengine.export.onnx_export import (
    STAGES,
    ExportSpec,
    check_in_onnxruntime,
    engine_folders,
    export_folder,
    export_graph,
    read_onnx,
    vae_fingerprint,
    write_onnx,
    write_whole,
)
from support.small_export import GRID, LATENTS, VAE, random_vae

onnx = pytest.importorskip("onnx")


@pytest.mark.parametrize("stage", STAGES)
def test_file_has_the_graph_s_names_and_static_shapes(export, stage) -> None:
    model = read_onnx(export.spec.onnx_file(export.folder, stage), export.spec, stage)
    size = (LATENTS, GRID.latent_height, GRID.latent_width)
    graph = DecoderGraph(export.vae, *size, first=stage == "first")
    assert [entry.name for entry in model.graph.input] == list(graph.inputs)
    assert [entry.name for entry in model.graph.output] == list(graph.outputs)
    for entry, given in zip(model.graph.input, graph.example_inputs(), strict=True):
        axes = entry.type.tensor_type.shape.dim
        assert tuple(axis.dim_value for axis in axes) == tuple(given.shape)
    frames = 5 if stage == "first" else 6
    pixels = model.graph.output[0].type.tensor_type.shape.dim
    assert tuple(axis.dim_value for axis in pixels) == (1, 3, frames, GRID.height, GRID.width)


def test_file_name_and_metadata_tell_the_same(export) -> None:
    path = export.spec.onnx_file(export.folder, "steady")
    mark = export.spec.vae_fingerprint
    assert path.name == f"vae-{mark[:12]}-8x12-3-fp32-steady.onnx"
    found = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert found == {
        "rfengine.format": "1", "rfengine.vae": mark, "rfengine.height": "8", "rfengine.width": "12",
        "rfengine.latents": "3", "rfengine.precision": "fp32", "rfengine.stage": "steady",
    }  # fmt: skip


def test_file_holds_nothing_of_the_machine(export) -> None:
    content = export.spec.onnx_file(export.folder, "first").read_bytes()
    assert str(Path(onnx_export.__file__).parent).encode() not in content
    assert b"stack_trace" not in content


@pytest.fixture(scope="module")
def bfloat16_model():
    pytest.importorskip("onnxscript")
    vae = random_vae().to(torch.bfloat16)
    return export_graph(DecoderGraph(vae, 1, 4, 6, first=False)).model_proto


def test_bfloat16_graph_is_typed_so_from_state_to_pixels(bfloat16_model) -> None:
    """onnxruntime has no bfloat16 convolution on a CPU; the checker of ONNX follows the types."""
    model = bfloat16_model
    onnx.checker.check_model(model, full_check=True)
    kinds = {
        entry.name: entry.type.tensor_type.elem_type for entry in (*model.graph.input, *model.graph.output)
    }
    bfloat16, float32 = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    assert kinds.pop("latents") == float32
    assert set(kinds.values()) == {bfloat16}
    weights = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    assert {entry.data_type for entry in model.graph.initializer if entry.name in weights} == {bfloat16}
    assert [entry.version for entry in model.opset_import] == [22]


def test_truncated_and_foreign_files_are_one_sentence(export, tmp_path) -> None:
    path = export.spec.onnx_file(export.folder, "first")
    content = path.read_bytes()
    for length in (0, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="truncated or no ONNX file|says format nothing") as refused:
            read_onnx(path, export.spec, "first")
        assert "--force" in str(refused.value) and "\n" not in str(refused.value)
    path.write_bytes(b"not ONNX at all")
    with pytest.raises(ValueError, match="is truncated or no ONNX file"):
        read_onnx(path, export.spec, "first")
    with pytest.raises(ValueError, match="does not exist; run rfengine export-vae"):
        read_onnx(tmp_path / "none.onnx", export.spec, "first")


def test_onnx_file_of_another_vae_is_refused(export) -> None:
    other = dataclasses.replace(export.spec, vae_fingerprint="0" * 64)
    path = export.spec.onnx_file(export.folder, "first")
    with pytest.raises(ValueError, match=f"says vae {export.spec.vae_fingerprint} where 0000"):
        read_onnx(path, other, "first")
    with pytest.raises(ValueError, match="says stage first where steady is needed"):
        read_onnx(path, export.spec, "steady")


def test_fingerprint_knows_weights_and_statistics(export) -> None:
    mark = vae_fingerprint(export.directory, VAE)
    other_mean = dataclasses.replace(VAE, latents_mean=(0.5, -0.25, 0.0, 1.5))
    assert vae_fingerprint(export.directory, VAE) == mark == export.spec.vae_fingerprint
    assert vae_fingerprint(export.directory, other_mean) != mark
    save_weights(export.directory / "vae.safetensors", random_vae(seed=1).state_dict())
    assert vae_fingerprint(export.directory, VAE) != mark


def test_a_write_that_fails_leaves_the_old_file(export, monkeypatch: pytest.MonkeyPatch) -> None:
    path = export.spec.onnx_file(export.folder, "first")
    before, names = path.read_bytes(), sorted(export.folder.iterdir())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rfengine.files.os.fsync", full)
    with pytest.raises(RuntimeError, match=r"cannot write .* bytes \(No space left on device\)"):
        write_onnx(export.programs["first"], export.spec, "first", export.folder)
    assert path.read_bytes() == before and sorted(export.folder.iterdir()) == names


def test_write_whole_makes_the_folder(tmp_path) -> None:
    write_whole(tmp_path / "new" / "file", b"content")
    assert (tmp_path / "new" / "file").read_bytes() == b"content"


def test_write_into_a_file_that_stands_for_the_folder_is_one_sentence(tmp_path) -> None:
    (tmp_path / "tensorrt").write_text("no folder")
    with pytest.raises(RuntimeError, match=r"cannot write .*tensorrt/a.onnx of 7 bytes \("):
        write_whole(tmp_path / "tensorrt" / "a.onnx", b"content")
    assert (tmp_path / "tensorrt").read_text() == "no folder"


def test_missing_exporter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "_EXPORTER", ("onnx", "no_such_package"))
    with pytest.raises(
        RuntimeError, match="no_such_package cannot be imported and the export needs it; pip install"
    ):
        export_graph(DecoderGraph(random_vae(), 1, 4, 6, first=True))


def test_export_without_latents_is_refused() -> None:
    with pytest.raises(ValueError, match="latents is 0; it must be at least 1"):
        ExportSpec("0" * 64, 16, 24, 0, "fp16")


def test_exporter_s_own_log_level_is_left_as_it_was(bfloat16_model) -> None:
    assert logging.getLogger("torch.onnx").level == logging.NOTSET


MARK = "0123456789abcdef" * 4


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rfengine" / "tensorrt"


def test_checkpoint_that_can_be_written_keeps_its_own(tmp_path: Path, cache: Path) -> None:
    assert export_folder(tmp_path, MARK) == tmp_path / "tensorrt"
    own_first = (tmp_path / "tensorrt", cache / f"{tmp_path.name}-0123456789abcdef")
    assert engine_folders(tmp_path, MARK) == own_first


def test_the_package_is_never_written(cache: Path) -> None:
    tiny = checkpoint_directory("tiny")
    assert export_folder(tiny, MARK) == cache / "tiny-0123456789abcdef"
    assert export_folder(tiny, MARK) in engine_folders(tiny, MARK)


def test_checkpoint_that_cannot_be_written_has_its_folder_in_the_cache(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export.os, "access", lambda path, mode: False)  # root may write everywhere
    assert export_folder(tmp_path, MARK) == cache / f"{tmp_path.name}-0123456789abcdef"
    assert export_folder(tmp_path, MARK) in engine_folders(tmp_path, MARK)


def test_folder_that_is_given_is_the_only_one(tmp_path: Path, cache: Path) -> None:
    given = tmp_path / "mine"
    assert export_folder(tmp_path, MARK, given) == given and engine_folders(tmp_path, MARK, given) == (given,)
    given.write_bytes(b"")
    with pytest.raises(ValueError, match="mine is no directory; choose another --out"):
        export_folder(tmp_path, MARK, given)


def test_user_without_a_home_directory_has_to_give_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert engine_folders(tmp_path, MARK) == (tmp_path / "tensorrt",)
    with pytest.raises(RuntimeError, match="no home directory; give --out DIR"):
        export_folder(checkpoint_directory("tiny"), MARK)


TOLERANCE = 1e-4  # float32


@pytest.fixture
def exported_once(session_export, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check takes the programs of the session instead of exporting again."""
    pytest.importorskip("onnxruntime")

    def program_of(graph):
        return session_export.programs["first" if graph.first else "steady"]

    monkeypatch.setattr(onnx_export, "export_graph", program_of)


@pytest.mark.slow
def test_float32_agrees_over_several_chunks(session_export, exported_once) -> None:
    agreement = check_in_onnxruntime(session_export.vae, LATENTS, GRID.height, GRID.width)
    assert agreement.chunks == 3
    assert agreement.pixels <= TOLERANCE and agreement.state <= TOLERANCE
    assert "3 chunks agree to" in str(agreement)


def test_wrong_weight_in_the_file_shows_in_both_figures(session_export, exported_once, monkeypatch) -> None:
    right = onnx_export.export_graph

    def with_wrong_weight(graph):
        program = right(graph)
        model = program.model_proto
        weight = next(entry for entry in model.graph.initializer if entry.name == "layers.1.weight")
        values = onnx.numpy_helper.to_array(weight) * 1.01
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        return SimpleNamespace(model_proto=model)

    monkeypatch.setattr(onnx_export, "export_graph", with_wrong_weight)
    agreement = check_in_onnxruntime(session_export.vae, LATENTS, GRID.height, GRID.width)
    assert min(agreement.pixels, agreement.state) > 10 * TOLERANCE
    assert agreement.worst == max(agreement.pixels, agreement.state)


def test_history_that_is_lost_shows_from_the_second_chunk_on(
    session_export, exported_once, monkeypatch
) -> None:
    monkeypatch.setattr(onnx_export, "state_output", lambda name: f"no output of {name}")
    agreement = check_in_onnxruntime(session_export.vae, LATENTS, GRID.height, GRID.width)
    assert agreement.pixels > 100 * TOLERANCE


@pytest.mark.slow
def test_float16_graph_of_the_first_latent_runs() -> None:
    """Bound: some 40 roundings to 11 bits on values around one."""
    pytest.importorskip("onnxruntime")
    agreement = check_in_onnxruntime(random_vae().half(), 1, GRID.height, GRID.width)
    assert agreement.pixels < 0.05


def test_missing_onnxruntime_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "missing_packages", lambda *names: list(names))
    with pytest.raises(
        RuntimeError, match="onnxruntime cannot be imported and the check needs it; pip install"
    ):
        check_in_onnxruntime(random_vae(), 1, GRID.height, GRID.width)
