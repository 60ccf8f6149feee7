"""One export for all tests of ONNX files and of TensorRT: it takes seconds."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from rfengine.export.onnx_export import STAGES, ExportSpec, Stage, vae_fingerprint
from rfengine.models.vae import WanVAE
from support.shared_export import StoredProgram, exported_checkpoint
from support.small_export import GRID, LATENTS, VAE, random_vae


@dataclass(frozen=True)
class Export:
    """A checkpoint directory, its VAE, and both graphs in float32, as programs and as files in `folder`."""

    directory: Path
    vae: WanVAE
    spec: ExportSpec
    programs: dict[Stage, StoredProgram]

    @property
    def folder(self) -> Path:
        return self.directory / "tensorrt"


@pytest.fixture(scope="session")
def session_export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    pytest.importorskip("onnxscript")
    directory = exported_checkpoint(tmp_path_factory)
    spec = ExportSpec(vae_fingerprint(directory, VAE), GRID.height, GRID.width, LATENTS, "fp32")
    programs = {stage: StoredProgram(spec.onnx_file(directory / "tensorrt", stage)) for stage in STAGES}
    return Export(directory, random_vae(), spec, programs)


@pytest.fixture
def export(session_export: Export, tmp_path: Path) -> Export:
    """The export in a directory of the test's own."""
    directory = tmp_path / "checkpoint"
    shutil.copytree(session_export.directory, directory)
    return Export(directory, session_export.vae, session_export.spec, session_export.programs)
