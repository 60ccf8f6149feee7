"""A checkpoint whose pickles name code is refused, and the code does not run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as checkpoint

from rfengine.training.checkpoint_reader import read_checkpoint
from rfengine.training.checkpoint_record import DamagedCheckpointError


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_what_torch_saves_is_read(tmp_path: Path) -> None:
    values = {
        "weights": torch.arange(6.0).view(2, 3),
        "step": 4,
        "rates": {"betas": (0.0, 0.9), "fused": None},
    }
    checkpoint.save(values, checkpoint_id=tmp_path / "saved", no_dist=True)
    tree = {"weights": torch.zeros(2, 3), "step": 0, "rates": {"betas": (0.0, 0.0), "fused": True}}
    read_checkpoint(tree, tmp_path / "saved")
    assert torch.equal(tree.pop("weights"), values.pop("weights"))
    assert tree == values


def test_code_in_the_index_does_not_run(tmp_path: Path) -> None:
    checkpoint.save({"step": 4}, checkpoint_id=tmp_path / "saved", no_dist=True)
    (tmp_path / "saved" / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "made")))
    with pytest.raises(DamagedCheckpointError, match="names posix.mkdir, which is no part of an index"):
        read_checkpoint({"step": 0}, tmp_path / "saved")
    assert not (tmp_path / "made").exists()


def test_code_in_a_value_does_not_run(tmp_path: Path) -> None:
    checkpoint.save({"step": Touch(tmp_path / "made")}, checkpoint_id=tmp_path / "saved", no_dist=True)
    with pytest.raises(DamagedCheckpointError, match="cannot be read"):
        read_checkpoint({"step": 0}, tmp_path / "saved")
    assert not (tmp_path / "made").exists()


def test_an_index_that_names_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    checkpoint.save({"step": 4}, checkpoint_id=tmp_path / "saved", no_dist=True)
    index = tmp_path / "saved" / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    for info in metadata.storage_data.values():
        object.__setattr__(info, "relative_path", "../" + info.relative_path)
    index.write_bytes(pickle.dumps(metadata))
    with pytest.raises(DamagedCheckpointError, match="which lies elsewhere"):
        read_checkpoint({"step": 0}, tmp_path / "saved")
