"""Checkpoints of a training that are damaged in any part, and directories that are in use."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from rfengine.checkpoint.loader import save_weights
from rfengine.training.checkpoints import (
    TrainingCheckpoints,
    TrainState,
    check_same_checkpoints,
    locked_run,
)
from rfengine.training.config import AdamConfig
from rfengine.training.learner import Learner, WeightAverage
from rfengine.training.parallel import Ranks
from rfengine.training.stages import TrainingStage

IDENTITY = {"name": "small", "betas": (0.0, 0.5), "seed": 0}


def small_state(step: int = 0, size: int = 8) -> TrainState:
    model = nn.Linear(size, size)
    with torch.no_grad():
        model.weight.fill_(float(step))
    learner = Learner("student", model, AdamConfig(1e-3), 1, 1, Ranks())
    state = TrainState(TrainingStage((learner,), {"student": WeightAverage(model, 0.5)}))
    state.step = step
    return state


def checkpoints(directory: Path, **changes: object) -> TrainingCheckpoints:
    return TrainingCheckpoints(directory, IDENTITY | changes, keep=3)


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


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "run.json"])
@pytest.mark.parametrize("damage", DAMAGES, ids=["truncated", "one bit", "absent", "a pipe", "empty"])
def test_the_one_before_a_damaged_checkpoint_is_taken_with_a_warning(
    run: Path, name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(run / NEWEST / name)
    state = small_state()
    assert checkpoints(run).restore(state)
    assert state.step == 1
    assert float(state.stage.models["student"].weight[0, 0].detach()) == 1.0
    assert f"step_00000002 is damaged: its {'run.json' if name == 'run.json' else 'file'}" in caplog.text
    assert "step_00000001 is taken, and the damaged one is kept as step_00000002.damaged" in caplog.text
    assert sorted(os.listdir(run / "checkpoints")) == ["step_00000001", "step_00000002.damaged"]


def test_a_training_without_any_whole_checkpoint_is_refused(run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        (path / "rank_00000.safetensors").unlink()
    refusal = "none of the 2 checkpoints .* is whole: of step_00000002, its file rank_00000.safetensors is"
    with pytest.raises(ValueError, match=refusal):
        checkpoints(run).restore(small_state())


def test_an_older_checkpoint_does_not_stand_in_for_one_of_another_recipe(run: Path) -> None:
    with pytest.raises(ValueError, match="step_00000002 was made with seed 0, this run has 1"):
        checkpoints(run, seed=1).restore(small_state())


def test_of_another_recipe_only_the_value_that_differs_is_named(tmp_path: Path) -> None:
    def of_shift(schedule: dict[str, float]) -> TrainingCheckpoints:
        return checkpoints(tmp_path, model={"dim": 64, "schedule": schedule})

    state = small_state()
    state.step = 1
    of_shift({"shift": 2.0}).save(state, wait=True)
    with pytest.raises(ValueError, match=r"was made with model.schedule.shift 2.0, this run has 1.0; resume"):
        of_shift({"shift": 1.0}).restore(small_state())
    with pytest.raises(ValueError, match=r"was made with model.schedule.more None, this run"):
        of_shift({"shift": 2.0, "more": None}).restore(small_state())


def test_the_step_of_a_damaged_checkpoint_is_saved_again(run: Path) -> None:
    flip(run / NEWEST / "rank_00000.safetensors")
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


def test_a_checkpoint_of_an_earlier_format_is_refused(run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        content = json.loads((path / "run.json").read_text()) | {"format": 2}
        del content["sha256"]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        (path / "run.json").write_text(json.dumps(content | {"sha256": digest}))
    with pytest.raises(ValueError, match="none .* is whole: .* its run.json has format 2, and 3 is read"):
        checkpoints(run).restore(small_state())


def test_tensors_of_another_model_are_damage(run: Path) -> None:
    with pytest.raises(ValueError, match="none of the 2 .* is whole: of step_00000002, it cannot be read"):
        checkpoints(run).restore(small_state(size=4))


def test_a_save_gets_its_name_without_a_wait_once_it_is_written(tmp_path, monkeypatch) -> None:
    may_end, written = threading.Event(), save_weights

    def slow(*arguments: object) -> None:
        may_end.wait()
        written(*arguments)

    monkeypatch.setattr("rfengine.training.checkpoints.save_weights", slow)
    saving = checkpoints(tmp_path)
    saving.save(small_state(1))
    saving.finish_if_written()
    assert saving.complete() == []
    may_end.set()
    deadline = time.monotonic() + 20
    while not saving.complete() and time.monotonic() < deadline:
        saving.finish_if_written()
    assert [path.name for path in saving.complete()] == ["step_00000001"]
    saving.finish_if_written()


def test_an_old_checkpoint_that_cannot_go_yet_does_not_end_the_run(tmp_path, monkeypatch) -> None:
    """As on NFS, where somebody on the same machine reads it; it goes with the next."""
    saving, remove = checkpoints(tmp_path), shutil.rmtree
    for step in (1, 2, 3):
        saving.save(small_state(step), wait=True)

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if path.exists() and not ignore_errors:
            raise OSError(39, "Directory not empty", str(path))

    monkeypatch.setattr("rfengine.training.checkpoints.shutil.rmtree", busy)
    saving.save(small_state(4), wait=True)
    assert len(saving.complete()) == 4
    monkeypatch.setattr("rfengine.training.checkpoints.shutil.rmtree", remove)
    saving.save(small_state(5), wait=True)
    assert [path.name[-1] for path in saving.complete()] == ["3", "4", "5"]


def test_a_checkpoint_that_cannot_be_begun_or_named_is_one_sentence(tmp_path, monkeypatch) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    refused = pytest.raises(OSError, match="step_00000001 was not written .*; earlier ones are whole: make")
    with refused:
        checkpoints(tmp_path).save(small_state(1))
    (tmp_path / "checkpoints").unlink()
    full = OSError(28, "No space left on device")
    monkeypatch.setattr("rfengine.training.checkpoints.write_text", lambda *_: (_ for _ in ()).throw(full))
    with refused:
        checkpoints(tmp_path).save(small_state(1), wait=True)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_memory_that_runs_out_says_nothing_of_a_checkpoint(run: Path, monkeypatch) -> None:
    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("rfengine.training.checkpoints.put", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        checkpoints(run).restore(small_state())
    assert [path.name for path in checkpoints(run).complete()] == ["step_00000001", "step_00000002"]


def test_a_directory_that_cannot_be_made_is_refused_and_one_that_is_let_go_is_waited_for(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match="Not a directory"), locked_run(tmp_path / "file" / "run"):
        pytest.fail("trains nowhere")
    held, taken = threading.Event(), threading.Event()

    def hold() -> None:
        with locked_run(tmp_path / "run"):
            (tmp_path / "run" / "log.jsonl").touch()
            held.set()
            time.sleep(0.2)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    with locked_run(tmp_path / "run", wait_s=20):
        taken.set()
    holder.join()
    assert taken.is_set()


class SecondOfTwo(Ranks):
    """What a rank sees whose first sees `first`; `then` is called whenever they tell one another."""

    def __init__(self, first: list[str], then: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.first, self.then = first, then

    def gathered(self, value, patient=False):
        self.then()
        return [self.first, value]


def test_checkpoints_that_another_node_sees_later_are_waited_for(tmp_path, monkeypatch) -> None:
    def write_later() -> None:
        threading.Timer(0.3, (tmp_path / NEWEST).mkdir, kwargs={"parents": True, "exist_ok": True}).start()

    check_same_checkpoints(tmp_path, SecondOfTwo(["step_00000002"], write_later))
    monkeypatch.setattr("rfengine.training.checkpoints.SEEN_S", 0.1)
    with pytest.raises(
        ValueError,
        match=r"rank 1 sees the checkpoints \['step_00000002'\] in .* and rank 0 \[\]; give a directory that",
    ):
        check_same_checkpoints(tmp_path, SecondOfTwo([]))
