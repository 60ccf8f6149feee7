"""Checkpoints of a training that are damaged in any part, and directories that are in use."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as checkpoint
from torch import nn

from rfengine.training.checkpoints import (
    CheckpointDirectory,
    DamagedCheckpointError,
    TrainState,
    locked_run,
    read_checkpoint,
)
from rfengine.training.learner import WeightAverage

IDENTITY = {"name": "small", "betas": (0.0, 0.5), "seed": 0}


def small_state(step: int = 0) -> TrainState:
    model = nn.Linear(8, 8)
    with torch.no_grad():
        model.weight.fill_(float(step))
    optimizer = torch.optim.AdamW(model.parameters())
    state = TrainState({"student": model}, {"student": (optimizer,)}, {"student": WeightAverage(model, 0.5)})
    state.step = step
    return state


def checkpoints(directory: Path, **changes: object) -> CheckpointDirectory:
    return CheckpointDirectory(directory, IDENTITY | changes, keep=3)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    for step in (1, 2):
        checkpoints(directory).save(small_state(step), wait=True)
    return directory


@pytest.fixture
def run(two: Path, tmp_path: Path) -> Path:
    shutil.copytree(two, tmp_path / "run")
    return tmp_path / "run"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def exchange(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = [truncate, flip, Path.unlink, exchange, lambda path: path.write_bytes(b"")]
NEWEST = "checkpoints/step_00000002"


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "run.json"])
@pytest.mark.parametrize("damage", DAMAGES, ids=["truncated", "one bit", "absent", "a pipe", "empty"])
def test_the_one_before_a_damaged_checkpoint_is_taken_with_a_warning(
    run: Path, name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(run / NEWEST / name)
    state = small_state()
    assert checkpoints(run).restore(state)
    assert state.step == 1
    assert float(state.models["student"].weight[0, 0].detach()) == 1.0
    assert f"step_00000002 is damaged: its {'run.json' if name == 'run.json' else 'file'}" in caplog.text
    assert "step_00000001 is taken, and the damaged one is kept as step_00000002.damaged" in caplog.text
    assert sorted(os.listdir(run / "checkpoints")) == ["step_00000001", "step_00000002.damaged"]


def test_a_training_without_any_whole_checkpoint_is_refused(run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        (path / ".metadata").unlink()
    refusal = (
        "none of the 2 checkpoints .* is whole: of step_00000002, its file .metadata is absent; begin anew"
    )
    with pytest.raises(ValueError, match=refusal):
        checkpoints(run).restore(small_state())


def test_an_older_checkpoint_does_not_stand_in_for_one_of_another_recipe(run: Path) -> None:
    with pytest.raises(ValueError, match="step_00000002 was made with seed 0, this run has 1"):
        checkpoints(run, seed=1).restore(small_state())


def test_the_step_of_a_damaged_checkpoint_is_saved_again(run: Path) -> None:
    flip(run / NEWEST / "__0_0.distcp")
    again, state = checkpoints(run), small_state()
    again.restore(state)
    state.step = 2
    again.save(state, wait=True)
    assert checkpoints(run).restore(state)
    assert state.step == 2


def test_a_directory_in_which_another_trains_is_refused_at_once(tmp_path: Path) -> None:
    refused = pytest.raises(
        RuntimeError, match="another process is training in .*run; wait until it has ended"
    )
    with locked_run(tmp_path / "run"), refused, locked_run(tmp_path / "run"):
        pytest.fail("two trainings in one directory")
    with locked_run(tmp_path / "run"):
        pass


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
