"""Trainings of a small model: resumed, stopped, killed while saving, and with a full disk."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal

import pytest
import torch

from rfengine.training.checkpoints import TrainingCheckpoints, TrainState
from rfengine.training.config import AdamConfig, RolloutConfig, TrainConfig
from rfengine.training.parallel import Ranks
from rfengine.training.stages import TeacherStage, TrajectoryStage, seeded
from rfengine.training.trainer import Trainer
from support.models import small_model, text_states
from support.small_training import ENGINE, PLAIN, changed, small_trainer

ADAM = AdamConfig(1e-3)
DMD = changed(
    steps=7,
    batch=2,
    accumulation=1,
    optimizer=ADAM,
    critic_optimizer=ADAM,
    rollout=RolloutConfig(1, 2, 1),
    average_decay=0.99,
    average_start=3,
    save_every=3,
)
ALL_KEPT = dataclasses.replace(DMD, keep=9)


class DrawnClips:
    def draw(self, count, generator):
        shape = (count, ENGINE.model.in_dim, 9, 4, 6)
        return torch.randn(shape, generator=generator), text_states(1).expand(count, -1, -1)


class DrawnTrajectories:
    """Trajectories that end in zeros."""

    def draw(self, count, generator):
        states = torch.randn(count, 3, ENGINE.model.in_dim, 9, 4, 6, generator=generator)
        states[:, -1] = 0
        return states, text_states(1).expand(count, -1, -1)


def dmd_trainer(directory, config: TrainConfig = DMD, **options) -> Trainer:
    return small_trainer(directory, config, **options)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    found = {}
    for name, model in trainer.stage.models.items():
        found |= {f"{name}.{key}": value for key, value in model.state_dict().items()}
        (optimizer,) = trainer.stage.optimizers[name]
        moments = optimizer.state_dict()["state"]
        found |= {f"{name}.{i}.{key}": torch.as_tensor(v) for i, s in moments.items() for key, v in s.items()}
    for name, average in trainer.stage.averages.items():
        found |= {f"{name}_average.{key}": value for key, value in average.values.items()}
    return found


def assert_equal(one: Trainer, other: Trainer) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    differing = [name for name in left if not torch.equal(left[name], right[name])]
    assert not differing


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    trainer = dmd_trainer(tmp_path_factory.mktemp("whole"), ALL_KEPT)
    assert trainer.run() == ""
    return trainer


@pytest.fixture(scope="module")
def run_of_three(tmp_path_factory):
    trainer = dmd_trainer(tmp_path_factory.mktemp("three"), dataclasses.replace(DMD, steps=3))
    trainer.run()
    return trainer


@pytest.fixture
def three_steps(tmp_path, run_of_three):
    """A directory of a run that has made three steps."""
    return shutil.copytree(run_of_three.directory, tmp_path / "run")


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_run_stopped_by_sigterm_and_resumed_equals_one_that_never_stopped(tmp_path, whole_run, stop_after):
    def stop(step, figures):
        if step == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    first = dmd_trainer(tmp_path, on_step=stop)
    assert "SIGTERM" in first.run()
    assert first.state.step == stop_after
    resumed = dmd_trainer(tmp_path)
    assert resumed.run() == ""
    assert_equal(resumed, whole_run)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6, 7]


def test_end_of_the_terminal_stops_a_run_as_termination_does(tmp_path):
    trainer = dmd_trainer(tmp_path, on_step=lambda *_: os.kill(os.getpid(), signal.SIGHUP))
    assert trainer.run() == "stopped by SIGHUP; resume to go on"
    assert trainer.interrupted and trainer.state.step == 1
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_crash_after_a_save_goes_on_from_it(tmp_path, whole_run):
    class Crash(Exception):
        pass

    def crash(step, figures):
        if step == 5:
            raise Crash

    with pytest.raises(Crash):
        dmd_trainer(tmp_path, on_step=crash).run()
    resumed = dmd_trainer(tmp_path)
    resumed.run()
    assert_equal(resumed, whole_run)


def test_checkpoint_holds_the_weights_of_its_step_although_training_goes_on(
    tmp_path, whole_run, run_of_three
):
    copy = shutil.copytree(whole_run.directory, tmp_path / "run")
    for path in whole_run.checkpoints.complete()[-2:]:
        shutil.rmtree(copy / path.relative_to(whole_run.directory))
    restored = dmd_trainer(copy, ALL_KEPT)
    assert restored.checkpoints.restore(restored.state)
    assert restored.state.step == 3
    assert_equal(restored, run_of_three)


def test_killed_save_leaves_the_checkpoint_before_it(three_steps):
    again = dmd_trainer(three_steps)
    partial = again.checkpoints.path / "step_00000006.partial"
    shutil.copytree(again.checkpoints.complete()[-1], partial)
    (partial / "run.json").unlink()
    assert again.checkpoints.restore(again.state)
    assert again.state.step == 3 and not partial.exists()
    assert again.run() == ""
    assert again.state.step == 7


def test_full_disk_is_reported_and_loses_no_checkpoint(three_steps, monkeypatch):
    trainer = dmd_trainer(three_steps, dataclasses.replace(DMD, steps=3))
    whole = trainer.checkpoints.complete()[-1]

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rfengine.training.checkpoints.save_weights", full)
    trainer.state.step = 4
    with pytest.raises(OSError, match="was not written .*No space left.*make room"):
        trainer.checkpoints.save(trainer.state, wait=True)
    assert trainer.checkpoints.complete()[-1] == whole
    assert not list(trainer.checkpoints.path.glob("*.partial"))
    monkeypatch.undo()
    assert dmd_trainer(three_steps).checkpoints.restore(trainer.state)


def test_checkpoint_of_another_recipe_is_refused(tmp_path):
    dmd_trainer(tmp_path, dataclasses.replace(DMD, steps=1)).run()
    with pytest.raises(ValueError, match="seed 0, this run has 1"):
        dmd_trainer(tmp_path, dataclasses.replace(DMD, seed=1))
    longer = dmd_trainer(tmp_path, dataclasses.replace(DMD, steps=2))
    assert longer.run() == "", "more steps are the same run"


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    trainer = dmd_trainer(tmp_path, dataclasses.replace(DMD, save_every=1, steps=5))
    trainer.run()
    assert sorted(path.name for path in trainer.checkpoints.path.iterdir()) == [
        "step_00000004",
        "step_00000005",
    ]


def test_student_learns_in_every_second_step_and_its_average_follows(whole_run, tmp_path):
    lines = [json.loads(line) for line in (whole_run.directory / "log.jsonl").read_text().splitlines()]
    assert [("student_loss" in line) for line in lines] == [False, True, False, True, False, True, False]
    assert all("critic_loss" in line for line in lines)
    assert all("distance" in line for line in lines if "student_loss" in line)
    student = whole_run.stage.models["student"].state_dict()
    average = whole_run.stage.averages["student"].values
    assert any(not torch.equal(student[name], average[name]) for name in student)


def test_accumulated_passes_make_one_step(tmp_path):
    calls = []
    trainer = dmd_trainer(tmp_path, dataclasses.replace(DMD, steps=1, accumulation=2))
    (optimizer,) = trainer.stage.optimizers["critic"]
    step, zero = optimizer.step, optimizer.zero_grad
    optimizer.step = lambda: (calls.append("step"), step())
    optimizer.zero_grad = lambda **options: (calls.append("zero"), zero(**options))
    trainer.stage.update(0)
    assert calls == ["zero", "step"]


def test_loss_that_is_not_finite_stops_before_anything_changes(tmp_path):
    trainer = dmd_trainer(tmp_path)
    with torch.no_grad():
        trainer.stage.models["critic"].head.head.bias.fill_(torch.nan)
    before = {name: value.clone() for name, value in weights(trainer).items()}
    with pytest.raises(RuntimeError, match="critic's loss is nan"):
        trainer.run()
    after = weights(trainer)
    assert all(torch.equal(after[name].nan_to_num(), value.nan_to_num()) for name, value in before.items())


def test_on_step_ends_the_run_with_its_sentence(tmp_path):
    trainer = dmd_trainer(tmp_path, on_step=lambda step, figures: "enough" if step == 2 else None)
    assert trainer.run() == "enough"
    assert trainer.checkpoints.complete()[-1].name == "step_00000002"


def test_samples_are_written_on_their_steps(tmp_path):
    seen = []
    config = dataclasses.replace(DMD, steps=4, sample_every=2)
    dmd_trainer(tmp_path, config, sample=lambda step, directory: seen.append((step, directory.name))).run()
    assert seen == [(2, "samples"), (4, "samples")]


@pytest.mark.parametrize("stage", ["teacher", "ode-init"])
def test_model_learns_in_the_other_stages(tmp_path, stage):
    config = TrainConfig(
        name=stage, stage=stage, engine=ENGINE, steps=40, batch=4, optimizer=AdamConfig(2e-3), data="toy"
    )
    model, ranks = small_model(), Ranks()
    if stage == "teacher":
        built = TeacherStage(config, model, DrawnClips(), ranks)
    else:
        built = TrajectoryStage(config, model, DrawnTrajectories(), ranks)
    trainer = Trainer(config, built, tmp_path, ranks)
    trainer.run()
    name = "teacher_loss" if stage == "teacher" else "student_loss"
    losses = [json.loads(line)[name] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_keys_of_draws_do_not_meet():
    device = torch.device("cpu")
    draws = {
        torch.rand((), generator=seeded(device, *key)).item()
        for key in ((0, "a", 1, 2), (0, "a", 12), (0, "a", 1, 3), (1, "a", 1, 2), (0, "b", 1, 2))
    }
    assert len(draws) == 5


def test_state_is_the_same_whether_saved_before_the_first_student_step_or_not(tmp_path):
    saved, unsaved = dmd_trainer(tmp_path), dmd_trainer(tmp_path / "other")
    TrainingCheckpoints(tmp_path / "extra", {}, 1).save(saved.state, wait=True)
    for step in range(2):
        saved.stage.update(step)
        unsaved.stage.update(step)
    assert_equal(saved, unsaved)


def test_a_log_that_was_cut_in_its_last_line_stops_no_resume(tmp_path, caplog):
    dmd_trainer(tmp_path, dataclasses.replace(DMD, steps=1)).run()
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 2, "critic_lo')
    assert dmd_trainer(tmp_path, dataclasses.replace(DMD, steps=2)).run() == ""
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2]
    assert "log.jsonl is damaged at line 2 of 2; the 1 whole lines up to step 1" in caplog.text


def test_a_run_with_a_damaged_newest_checkpoint_ends_as_one_without_damage(tmp_path, whole_run, caplog):
    trainer = dmd_trainer(tmp_path, dataclasses.replace(DMD, save_every=3, steps=6))
    trainer.run()
    for path in trainer.checkpoints.complete()[-1].glob("*.safetensors"):
        path.write_bytes(b"")
    resumed = dmd_trainer(tmp_path)
    assert resumed.state.step == 3
    assert resumed.run() == ""
    assert_equal(resumed, whole_run)
    assert (
        "step_00000006 is damaged: its file rank_00000.safetensors is not what was written; step_00000003 is"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 10**30}, "steps is 1000000000000000000000000000000; it must be at most 1000000000"),
        ({"batch": 2.0}, "batch is 2.0; it must be an integer"),
        ({"accumulation": 2**31}, "accumulation is 2147483648; it must be at most 65536"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be at most 9223372036854775807"),
        ({"save_every": True}, "save_every is True; it must be an integer"),
        ({"sample_every": -1}, "sample_every is -1; it must be at least 0"),
        ({"lora_rank": 0}, "lora_rank is 0; it must be at least 1"),
        ({"data": ""}, "data is ''; give a path, or a word"),
        ({"base": ""}, "base is ''; give a path, or a word"),
        ({"reward": ""}, "reward is ''; give a path, or a word"),
        ({"lora_rank": 65536}, "lora_rank is 65536; the narrowest weights have"),
        ({"average_decay": float("nan")}, "average_decay is nan; it must be a finite number"),
        ({"precision": "int4"}, "precision is 'int4'; use 'float32' or 'bfloat16'"),
        ({"batch": 3, "group": 2}, "whole groups"),
        ({"average_decay": 1.0}, "average_decay is 1.0"),
        ({"rollout": None}, "needs distillation, rollout"),
        ({"stage": "re-dmd"}, "beta is None"),
        ({"rollout": RolloutConfig(5, 5, 5)}, "gradient_chunks is 5"),
        ({"stage": "redmd"}, "stage is 'redmd'; use 'teacher', 'ode-init', 'dmd' or 're-dmd'"),
        ({"stage": "re-dmd", "distillation": dataclasses.replace(PLAIN, beta=1.0)}, "at least 2 samples"),
    ],
)
def test_configs_that_can_not_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DMD, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"rate": 0.0}, {"rate": float("inf")}, {"betas": (0.9, 1.0)}, {"betas": (0.9,)}, {"eps": 0.0},
        {"weight_decay": -1.0}, {"clip": 0}, {"clip": float("nan")}, {"warm_up": -1}, {"fall": 1.5},
    ],
)  # fmt: skip
def test_an_optimizer_that_cannot_step_is_refused(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} is .*; (it|each entry) must be"):
        dataclasses.replace(ADAM, **change)


def test_state_restores_only_into_the_models_it_was_saved_from(tmp_path):
    trainer = dmd_trainer(tmp_path, dataclasses.replace(DMD, steps=1))
    trainer.run()
    assert isinstance(trainer.state, TrainState)
    assert not TrainingCheckpoints(tmp_path / "nothing", {}, 1).restore(trainer.state)
