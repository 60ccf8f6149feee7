"""A checkpoint with its exported decoder, made once for all tests and all workers: exports take seconds."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from rfengine import cli
from rfengine.export import onnx_export
from rfengine.models.vae import WanVAE
from support.models import small_pipeline, write_pipeline
from support.small_export import VAE, random_vae


def exported_checkpoint(factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory with the VAE of small_export and float32 ONNX files of both its graphs: to be
    copied, not changed. The first worker of pytest-xdist that asks makes it, and the others wait."""
    place = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    made = place / "exported"
    with (place / "exported.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            partial = factory.mktemp("partial")
            _export_into(partial)
            partial.rename(made)
    return made


def _export_into(directory: Path) -> None:
    """By the command, whose own check takes seconds and is that of tests/export: here it is only called."""
    pipeline, checked = small_pipeline(vae_config=VAE), []
    pipeline.vae = random_vae()
    write_pipeline(directory, pipeline)

    def check(vae: WanVAE, *size: int) -> onnx_export.Agreement:
        checked.append((vae.conv2.weight.dtype, *size))
        return onnx_export.Agreement(3, 1e-6, 1e-6)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "check_in_onnxruntime", check)
        assert cli.main(["export-vae", str(directory), "--onnx-only", "--precision", "fp32"]) == 0
    assert checked == [(torch.float32, 3, 8, 8)]


@dataclass(frozen=True)
class StoredProgram:
    """An exported graph in its file; each `model_proto` is another copy, as that of torch's program is."""

    path: Path

    @property
    def model_proto(self) -> object:
        import onnx

        return onnx.load(self.path)
