"""export-vae: files that appear, files that stay, and what cannot be exported as one sentence."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rfengine import cli
from rfengine.cli import export_vae
from rfengine.config import RuntimeConfig
from rfengine.export import onnx_export
from rfengine.export.decoder_graphs import DecoderGraph
from rfengine.pipeline import Pipeline
from support.outcome import fails
from support.shared_export import exported_checkpoint
from support.tensorrt import install

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


@pytest.fixture
def exported(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """A checkpoint with its float32 ONNX files, made by the command."""
    directory = tmp_path / "model"
    shutil.copytree(exported_checkpoint(tmp_path_factory), directory)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (directory / "tensorrt").iterdir()}


@pytest.mark.slow
def test_export_writes_one_onnx_file_for_each_graph(exported: Path) -> None:
    names = sorted(contents(exported))
    assert len(names) == 2
    assert names[0].endswith("-8x12-3-fp32-first.onnx") and names[1].endswith("-8x12-3-fp32-steady.onnx")


def test_files_that_are_there_are_kept(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(exported)
    assert cli.main(["export-vae", str(exported), "--onnx-only", "--precision", "fp32"]) == 0
    assert capsys.readouterr().out.count("is there already") == 2
    assert contents(exported) == before


def test_export_goes_to_the_directory_that_is_given_or_to_the_cache_for_the_package(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files that are there stand in for an export, which takes seconds: where they are looked for."""
    (exported / "tensorrt").rename(tmp_path / "mine")
    command = ["export-vae", str(exported), "--onnx-only", "--precision", "fp32"]
    assert cli.main([*command, "--out", str(tmp_path / "mine")]) == 0
    assert capsys.readouterr().out.count(f"{tmp_path / 'mine'}/vae-") == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folders = []
    monkeypatch.setattr(export_vae, "_export", lambda *arguments: folders.append(arguments[-1]))
    assert cli.main(["export-vae", "tiny", "--onnx-only"]) == 0
    assert folders[0].parent == tmp_path / "cache" / "rfengine" / "tensorrt"
    assert folders[0].name.startswith("tiny-")


def test_engines_are_built_where_tensorrt_and_a_gpu_are(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, "11.4.0.106")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    command = ["export-vae", str(exported), "--precision", "fp32"]
    assert cli.main(command) == 0
    engines = [name for name in contents(exported) if name.endswith(".engine")]
    assert len(engines) == 2 and all("Fake-GPU-80GB-sm90-trt11.4.0.106" in name for name in engines)
    assert capsys.readouterr().out.count(" MiB") == 2
    before = contents(exported)
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("is there already") == 4
    assert contents(exported) == before


def test_pipeline_streams_through_the_engines_what_the_full_decoder_gives(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = install(monkeypatch, "11.4.0.106")
    with monkeypatch.context() as on_gpu:
        on_gpu.setattr(torch.cuda, "is_available", lambda: True)
        on_gpu.setattr(torch.cuda, "current_device", lambda: 0)
        assert cli.main(["export-vae", str(exported), "--precision", "fp32"]) == 0
    videos = []
    for kind in ("full", "tensorrt"):
        pipeline = Pipeline.from_pretrained(exported, "cpu", runtime=RuntimeConfig(vae=kind))
        videos.append(pipeline.generate("a", num_frames=11).frames.astype(int))
    assert [stage for stage, _ in journal.executions[-2:]] == ["first", "steady"]
    assert videos[0].shape == videos[1].shape == (11, 8, 12, 3)
    assert abs(videos[0] - videos[1]).max() <= 1


def test_force_writes_a_damaged_file_again(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = contents(exported)
    first = next((exported / "tensorrt").glob("*-first.onnx"))
    first.write_bytes(first.read_bytes()[:1000])
    damaged = contents(exported)
    command = ["export-vae", exported, "--onnx-only", "--precision", "fp32"]
    printed = fails(capsys, cli.CALLER_ERROR, *command)
    assert f"{first} is truncated or no ONNX file" in printed and "--force" in printed
    assert contents(exported) == damaged
    models = {graph: onnx.load_from_string(content) for graph, content in whole.items()}
    asked = []

    def stored(graph: DecoderGraph) -> SimpleNamespace:
        stage = "first" if graph.first else "steady"
        asked.append(stage)
        model = next(model for name, model in models.items() if stage in name)
        del model.metadata_props[:]
        return SimpleNamespace(model_proto=model)

    monkeypatch.setattr(onnx_export, "export_graph", stored)  # it takes seconds
    monkeypatch.setattr(onnx_export, "missing_packages", lambda *names: list(names))
    assert cli.main([*map(str, command), "--force"]) == 0
    assert "onnxruntime is not installed: the export is not run" in capsys.readouterr().err
    assert asked == ["first", "steady"] and contents(exported) == whole


def test_export_that_differs_from_the_decoder_is_not_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    wrong = onnx_export.Agreement(3, 1e-6, 2e-3)
    monkeypatch.setattr(onnx_export, "check_in_onnxruntime", lambda *_: wrong)
    printed = fails(capsys, cli.OTHER_ERROR, "export-vae", directory, "--onnx-only")
    assert "onnxruntime differs from the decoder by 2.0e-03, above 0.0001: nothing is written" in printed
    assert not (directory / "tensorrt").exists()


def test_absent_tensorrt_and_absent_gpu_are_reported_before_any_work(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    printed = fails(capsys, cli.OTHER_ERROR, "export-vae", model)
    assert (
        "TensorRT cannot be imported" in printed
        and "pip install tensorrt" in printed
        and "--onnx-only" in printed
    )
    install(monkeypatch, "10.16.1.11")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    printed = fails(capsys, cli.OTHER_ERROR, "export-vae", model)
    assert "torch finds no GPU" in printed and "--onnx-only" in printed
    assert not (model / "tensorrt").exists()


def test_wrong_directory_size_and_chunk_are_one_sentence(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export-vae", "--onnx-only"]
    assert "is no directory" in fails(capsys, cli.CALLER_ERROR, *command, tmp_path / "no")
    assert "has no rfengine.json" in fails(capsys, cli.CALLER_ERROR, *command, tmp_path)
    printed = fails(capsys, cli.CALLER_ERROR, *command, model, "--height", 40)
    assert printed == "height is 40 pixels; it must be a multiple of 16, such as 32"
    printed = fails(capsys, cli.CALLER_ERROR, *command, model, "--latents", 0)
    assert printed == "latents is 0; it must be at least 1"
    printed = fails(capsys, cli.CALLER_ERROR, *command, model, "--latents", 10**9)
    assert printed == "latents is 1000000000; it must be at most 64"
    printed = fails(capsys, cli.CALLER_ERROR, *command, model, "--width", 65536)
    assert printed == "width is 65536 pixels; use at most 8192"
    assert list(tmp_path.iterdir()) == [] and not (model / "tensorrt").exists()
