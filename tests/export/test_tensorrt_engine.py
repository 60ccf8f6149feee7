"""Engine files: how they are built and named, and which are refused, with a fake TensorRT of both majors."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rfengine.checkpoint.tensor_file import read_header
from rfengine.export.onnx_export import STAGES
from rfengine.export.tensorrt_api import import_tensorrt
from rfengine.export.tensorrt_engine import EngineTarget, build_engine, read_engine
from support.tensorrt import install

CPU = torch.device("cpu")
VERSIONS = ["10.16.1.11", "11.4.0.106"]
REBUILD = "rfengine export-vae DIR"


def target_here() -> EngineTarget:
    return EngineTarget.of(import_tensorrt(), CPU)


@pytest.mark.parametrize("version", VERSIONS)
def test_engine_is_named_by_gpu_version_precision_and_shape(export, monkeypatch, version) -> None:
    install(monkeypatch, version)
    for stage in STAGES:
        path = build_engine(export.folder, export.spec, stage, CPU)
        mark = export.spec.vae_fingerprint[:12]
        assert path.name == f"vae-{mark}-8x12-3-fp32-{stage}-Fake-GPU-80GB-sm90-trt{version}.engine"
        content = read_engine(export.folder, export.spec, stage, target_here(), REBUILD)
        onnx_file = export.spec.onnx_file(export.folder, stage)
        assert content == b"fake engine " + version.encode() + b"\n" + onnx_file.read_bytes()
    _, metadata = read_header(path)
    assert metadata["rfengine.gpu"] == "Fake GPU 80GB" and metadata["rfengine.capability"] == "9.0"


def test_timing_cache_is_kept_for_the_next_build_and_a_damaged_one_is_replaced(export, monkeypatch) -> None:
    journal = install(monkeypatch, "11.4.0.106")
    for stage in STAGES:
        build_engine(export.folder, export.spec, stage, CPU)
    timings = export.folder / "timing-Fake-GPU-80GB-sm90-trt11.4.0.106.cache"
    assert journal.timings_given == [b"", b"fake timings of 11.4.0.106+1"]
    assert timings.read_bytes() == b"fake timings of 11.4.0.106+1+1"
    timings.write_bytes(b"damaged")
    build_engine(export.folder, export.spec, "first", CPU)
    assert journal.timings_given[2:] == [b"damaged", b""]
    assert timings.read_bytes() == b"fake timings of 11.4.0.106+1"


@pytest.mark.parametrize(
    ("fault", "value", "reason"),
    [
        ("parser_error", "Conv of bfloat16 is unknown", r"cannot read .*first.onnx \(Conv of bfloat16 is"),
        ("build_fails", True, r"cannot build .*first.onnx \(no tactic fits the memory\); free GPU memory"),
        ("rename", "output_0", "renames inputs or outputs of .*first.onnx"),
    ],
)
def test_build_that_fails_is_one_sentence_and_writes_nothing(
    export, monkeypatch, fault, value, reason
) -> None:
    journal = install(monkeypatch, "10.16.1.11")
    setattr(journal, fault, value)
    before = sorted(export.folder.iterdir())
    with pytest.raises(RuntimeError, match=reason):
        build_engine(export.folder, export.spec, "first", CPU)
    assert sorted(export.folder.iterdir()) == before


def test_build_from_a_truncated_onnx_file_is_refused(export, monkeypatch) -> None:
    install(monkeypatch, "10.16.1.11")
    path = export.spec.onnx_file(export.folder, "first")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="truncated or no ONNX file"):
        build_engine(export.folder, export.spec, "first", CPU)


def test_engine_of_another_gpu_or_version_is_named_with_the_command_that_rebuilds(
    export, monkeypatch
) -> None:
    install(monkeypatch, "10.16.1.11", gpu="NVIDIA A100")
    built = build_engine(export.folder, export.spec, "steady", CPU)
    install(monkeypatch, "11.4.0.106", gpu="NVIDIA H200")
    with pytest.raises(ValueError) as refused:
        read_engine(export.folder, export.spec, "steady", target_here(), REBUILD)
    assert str(refused.value) == (
        f"{built} was built for NVIDIA A100 (sm 9.0) with TensorRT 10.16.1.11, and this is "
        f"NVIDIA H200 (sm 9.0) with TensorRT 11.4.0.106; build one with `{REBUILD}`"
    )
    built.rename(target_here().engine_file(export.folder, export.spec, "steady"))  # a name does not help
    with pytest.raises(ValueError, match="was built for NVIDIA A100"):
        read_engine(export.folder, export.spec, "steady", target_here(), REBUILD)


def test_missing_truncated_and_foreign_engines_are_one_sentence(export, monkeypatch) -> None:
    install(monkeypatch, "11.4.0.106")
    with pytest.raises(ValueError, match=f"has no engine vae-.*-steady; build it with `{REBUILD}`"):
        read_engine(export.folder, export.spec, "steady", target_here(), REBUILD)
    path = build_engine(export.folder, export.spec, "steady", CPU)
    other = dataclasses.replace(export.spec, vae_fingerprint="0" * 64)
    path.rename(target_here().engine_file(export.folder, other, "steady"))
    with pytest.raises(ValueError, match=f"says vae .* where 0000.* `{REBUILD} --force`"):
        read_engine(export.folder, other, "steady", target_here(), REBUILD)
    path = build_engine(export.folder, export.spec, "steady", CPU)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is truncated"):
        read_engine(export.folder, export.spec, "steady", target_here(), REBUILD)
