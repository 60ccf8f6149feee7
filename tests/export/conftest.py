"""One export for all tests of ONNX files and of TensorRT: it takes seconds."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.onnx import ONNXProgram

from rfengine.export.decoder_graphs import DecoderGraph
from rfengine.export.onnx_export import STAGES, ExportSpec, Stage, export_graph, vae_fingerprint, write_onnx
from rfengine.models.vae import WanVAE
from support.small_export import GRID, LATENTS, VAE, write_checkpoint


@dataclass(frozen=True)
class Export:
    """A checkpoint directory, its VAE, and both graphs in float32, as programs and as files in `folder`."""

    directory: Path
    vae: WanVAE
    spec: ExportSpec
    programs: dict[Stage, ONNXProgram]

    @property
    def folder(self) -> Path:
        return self.directory / "tensorrt"


@pytest.fixture(scope="session")
def session_export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    pytest.importorskip("onnxscript")
    directory = tmp_path_factory.mktemp("export")
    vae = write_checkpoint(directory)
    spec = ExportSpec(vae_fingerprint(directory, VAE), GRID.height, GRID.width, LATENTS, "fp32")
    size = (LATENTS, GRID.latent_height, GRID.latent_width)
    programs = {stage: export_graph(DecoderGraph(vae, *size, first=stage == "first")) for stage in STAGES}
    for stage, program in programs.items():
        write_onnx(program, spec, stage, directory / "tensorrt")
    return Export(directory, vae, spec, programs)


@pytest.fixture
def export(session_export: Export, tmp_path: Path) -> Export:
    """The export in a directory of the test's own."""
    directory = tmp_path / "checkpoint"
    shutil.copytree(session_export.directory, directory)
    return Export(directory, session_export.vae, session_export.spec, session_export.programs)
