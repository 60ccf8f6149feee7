"""Several ranks: the mean over them, and trainings that equal those of one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from rfengine.training.config import RolloutConfig
from rfengine.training.parallel import Ranks, ranks_from_environment
from support.ranks import run_ranks
from support.small_training import changed, distillation_models, run_all, run_small


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'; torchrun sets it, here from 1 to 65536"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '999"),
        ({"WORLD_SIZE": "2"}, "RANK is ''; torchrun sets it, here from 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is '2'; torchrun sets it, here from 0 to 1"),
    ],
)
def test_ranks_that_torchrun_did_not_count_are_refused(monkeypatch, variables, sentence):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=sentence), ranks_from_environment(torch.device("cpu")):
        pass


RUNS = {
    "replicated": {"parallel": "replicated"},
    "sharded": {"parallel": "sharded"},
    "recomputed": {
        "parallel": "sharded",
        "rollout": RolloutConfig(2, 2, 2, checkpointing=True),
        "checkpointing": True,
    },
    "sharded adapters": {"parallel": "sharded", "lora_rank": 2},
}


def trained(directory: Path, name: str, **changes: object) -> dict[str, torch.Tensor]:
    """Alone, in this process; goes on from a checkpoint of `name` where there is one."""
    run_small(0, directory / name, changed(**changes), directory / "alone.pt")
    return torch.load(directory / "alone.pt", weights_only=True)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """Where two ranks have made all RUNS, and have left the mean of their numbers in means.pt."""
    directory = tmp_path_factory.mktemp("two")
    jobs = [(directory / name, changed(**run), directory / f"{name}.pt") for name, run in RUNS.items()]
    run_ranks(run_all, 2, jobs, directory / "means.pt")
    return directory


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, torch.Tensor]:
    return trained(tmp_path_factory.mktemp("alone"), "run")


def worst_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max((found[name].double() - expected[name].double()).abs().max().item() for name in found)


def test_every_rank_ends_with_the_mean(two_ranks):
    matrix, scalar, number = torch.load(two_ranks / "means.pt", weights_only=True)
    assert torch.equal(matrix, torch.full((2, 3), 0.5)) and float(scalar) == 5.0 and number == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["replicated", "sharded", "recomputed"])
def test_two_ranks_equal_one(alone, two_ranks, name):
    found = torch.load(two_ranks / f"{name}.pt", weights_only=True)
    assert worst_difference(found, alone) <= 1e-5


@pytest.mark.slow
def test_two_ranks_equal_one_with_adapters(two_ranks, tmp_path):
    found = torch.load(two_ranks / "sharded adapters.pt", weights_only=True)
    assert worst_difference(found, trained(tmp_path, "run", lora_rank=2)) <= 1e-5


def test_student_and_critic_move_far_more_than_ranks_may_differ(alone, two_ranks):
    models = distillation_models()
    for name, model in (("student", models.student), ("critic", models.critic)):
        before = model.state_dict()
        moved = max((alone[f"{name}.{key}"] - value).abs().max().item() for key, value in before.items())
        assert moved > 1e-3


@pytest.mark.parametrize("parallel", ["replicated", "sharded"])
def test_one_rank_goes_on_from_a_checkpoint_of_two(alone, two_ranks, tmp_path, parallel):
    place = tmp_path / "run" / "checkpoints" / "step_00000001"
    shutil.copytree(two_ranks / parallel / "checkpoints" / place.name, place)
    resumed = trained(tmp_path, "run")
    assert int(resumed["step"]) == 2
    assert worst_difference(resumed, alone) <= 1e-5


def test_passes_that_ranks_cannot_share_are_refused():
    ranks = Ranks()
    ranks.count, ranks.rank = 2, 1
    assert list(ranks.passes(6)) == [1, 3, 5]
    with pytest.raises(ValueError, match="accumulation is 3 for 2 ranks"):
        ranks.passes(3)
