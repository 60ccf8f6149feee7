"""Latents beside a video: read, or refused in one sentence that names the file."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rfengine.evaluation.latents_file import read_latents
from rfengine.evaluation.video_frames import as_frames

VIDEO = as_frames(torch.zeros(21, 32, 48, 3, dtype=torch.uint8))


def test_latents_are_read_and_a_batch_of_one_is_taken_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.safetensors"
    assert read_latents(path, VIDEO) is None
    latents = torch.randn(4, 6, 4, 6, generator=torch.Generator().manual_seed(0))
    for shape in (latents.shape, (1, *latents.shape)):
        save_file({"latents": latents.reshape(shape)}, path)
        assert torch.equal(read_latents(path, VIDEO), latents)
    assert not caplog.records


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"weight": torch.ones(3)}, "no tensor `latents`"),
        ({"latents": torch.ones(6, 4, 6)}, r"latents torch.float32 \(6, 4, 6\)"),
        ({"latents": torch.ones(2, 4, 6, 4, 6)}, r"\(2, 4, 6, 4, 6\)"),
        ({"latents": torch.ones(4, 0, 4, 6)}, r"\(4, 0, 4, 6\)"),
        ({"latents": torch.ones(4, 6, 4, 6, dtype=torch.int64)}, "torch.int64"),
        ({"latents": torch.full((4, 6, 4, 6), float("nan"))}, "not finite"),
    ],
)
def test_foreign_latents_are_named(tmp_path: Path, tensors: dict[str, torch.Tensor], reason: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"a\.safetensors has .*{reason}"):
        read_latents(path, VIDEO)


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\xff" * 64])
def test_damaged_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.safetensors "):
        read_latents(path, VIDEO)


def test_pipes_and_links_to_nothing_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "link.safetensors").symlink_to("nothing")
    for name in ("pipe", "link"):
        with pytest.raises(ValueError, match=name):
            read_latents(tmp_path / f"{name}.safetensors", VIDEO)


def test_latents_of_another_size_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"latents": torch.ones(4, 6, 8, 8)}, path)
    with caplog.at_level(logging.WARNING):
        assert read_latents(path, VIDEO) is not None
    assert "6 latent frames of 8 x 8, which are none of a video of 21 frames of 32 x 48" in caplog.text
