"""Several ranks: the mean over them, and trainings that equal those of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rfengine.training.parallel import Ranks, average_over_workers, ranks_from_environment, run_workers
from rfengine.training.rollout import RolloutConfig
from support.small_distillation import distillation_models
from support.small_runs import changed, run_all, run_small


def write_average(rank: int, directory) -> None:
    tensors = [torch.full((2, 3), float(rank)), torch.tensor([10.0 * rank])]
    average_over_workers(tensors)
    torch.save(tensors, directory / f"{rank}.pt")


@pytest.mark.parametrize("workers", [1, 2])
def test_every_worker_ends_with_the_mean(tmp_path, workers: int):
    run_workers(write_average, workers, tmp_path)
    mean = (workers - 1) / 2
    for rank in range(workers):
        matrix, scalar = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(matrix, torch.full((2, 3), mean)) and float(scalar) == 10 * mean


def test_no_workers_are_refused():
    with pytest.raises(ValueError, match="workers is 0; it must be at least 1"):
        run_workers(write_average, 0)
    with pytest.raises(ValueError, match="workers is 1000000; it must be at most 1024"):
        run_workers(write_average, 10**6)


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'; torchrun sets it, here from 1 to 65536"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '999"),
        ({"WORLD_SIZE": "2"}, "RANK is ''; torchrun sets it, here from 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is '2'; torchrun sets it, here from 0 to 1"),
    ],
)
def test_ranks_that_torchrun_did_not_count_are_refused(monkeypatch, variables, told):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=told), ranks_from_environment(torch.device("cpu")):
        pass


RUNS = {
    "replicated": {"parallel": "replicated"},
    "sharded": {"parallel": "sharded"},
    "recomputed": {
        "parallel": "sharded",
        "rollout": RolloutConfig(4, 4, 3, checkpointing=True),
        "checkpointing": True,
    },
    "replicated two steps": {"parallel": "replicated", "steps": 2},
    "sharded two steps": {"parallel": "sharded", "steps": 2},
    "sharded adapters": {"parallel": "sharded", "lora_rank": 2},
}


def trained(directory: Path, name: str, **changes: object) -> dict[str, torch.Tensor]:
    """Alone, in this process; goes on from a checkpoint of `name` where there is one."""
    run_small(0, directory / name, changed(**changes), directory / "alone.pt")
    return torch.load(directory / "alone.pt", weights_only=True)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """Where two ranks have made all RUNS."""
    directory = tmp_path_factory.mktemp("two")
    jobs = [(directory / name, changed(**run), directory / f"{name}.pt") for name, run in RUNS.items()]
    run_workers(run_all, 2, jobs)
    return directory


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, torch.Tensor]:
    return trained(tmp_path_factory.mktemp("alone"), "run")


def worst_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max((found[name].double() - expected[name].double()).abs().max().item() for name in found)


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
def test_one_rank_goes_on_from_a_checkpoint_of_two(alone, two_ranks, parallel):
    name = f"{parallel} two steps"
    assert int(torch.load(two_ranks / f"{name}.pt", weights_only=True)["step"]) == 2
    resumed = trained(two_ranks, name)
    assert int(resumed["step"]) == 3
    assert worst_difference(resumed, alone) <= 1e-5


def test_passes_that_ranks_cannot_share_are_refused():
    ranks = Ranks()
    ranks.count, ranks.rank = 2, 1
    assert list(ranks.passes(6)) == [1, 3, 5]
    with pytest.raises(ValueError, match="accumulation is 3 for 2 ranks"):
        ranks.passes(3)
