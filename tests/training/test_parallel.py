"""Several ranks: the mean over them, and trainings that equal those of one."""

from __future__ import annotations

import json
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from rfengine.training.config import RolloutConfig, TrainConfig
from rfengine.training.parallel import Ranks, group_size, ranks_from_environment
from support.ranks import run_ranks
from support.small_training import (
    FOUR,
    HYBRID,
    changed,
    distillation_models,
    run_all,
    run_apart,
    run_small,
    wait_for_the_first,
)


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
    "bfloat16": {"parallel": "sharded", "precision": "bfloat16"},
}


def trained(directory: Path, name: str, **changes: object) -> dict[str, torch.Tensor]:
    """Alone, in this process; goes on from a checkpoint of `name` where there is one."""
    run_small(0, directory / name, changed(**changes), directory / "alone.pt")
    return torch.load(directory / "alone.pt", weights_only=True)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, four_ranks) -> Path:
    """Where two ranks have made all RUNS, have gone on from the first checkpoint of the four, and have left
    the mean of their numbers in means.pt."""
    directory = tmp_path_factory.mktemp("two")
    jobs = [(directory / name, changed(**run), directory / f"{name}.pt") for name, run in RUNS.items()]
    jobs.append(
        gone_on(directory, "from four", four_ranks / "hybrid", 1, changed(**FOUR, parallel="sharded"))
    )
    run_ranks(run_all, 2, jobs, directory / "means.pt")
    return directory


def gone_on(
    directory: Path, name: str, run: Path, step: int, config: TrainConfig
) -> tuple[Path, TrainConfig, Path]:
    """A job that begins with the checkpoint of one step of another run."""
    place = f"checkpoints/step_{step:08d}"
    shutil.copytree(run / place, directory / name / place)
    return directory / name, config, directory / f"{name}.pt"


@pytest.fixture(scope="module")
def alone_for_four(tmp_path_factory) -> Path:
    """Where one rank has made what four ranks share out."""
    directory = tmp_path_factory.mktemp("alone_for_four")
    trained(directory, "run", **FOUR)
    return directory


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory, alone_for_four) -> Path:
    """Where four ranks, two replicas of two shares, have trained from the start, from the first checkpoint of
    one rank, and have read its last one; and, in apart.pt, what they say when they have not the same."""
    directory = tmp_path_factory.mktemp("four")
    run = alone_for_four / "run"
    jobs = [
        (directory / "hybrid", HYBRID, directory / "hybrid.pt"),
        gone_on(directory, "from one", run, 1, HYBRID),
        gone_on(directory, "read", run, 2, HYBRID),
    ]
    run_ranks(run_apart, 4, jobs, directory / "means.pt", directory / "apart")
    return directory


def saved(directory: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(directory / f"{name}.pt", weights_only=True)


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


def test_gradient_in_bfloat16_is_whole_on_ranks_that_share_the_weights(two_ranks, tmp_path):
    trained(tmp_path, "run", precision="bfloat16")
    norms = [
        logged(directory, "student_gradient_norm") for directory in (two_ranks / "bfloat16", tmp_path / "run")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=0.01)


def logged(directory: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


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


@pytest.mark.slow
def test_two_replicas_of_two_shares_equal_one_rank(alone_for_four, four_ranks):
    alone = saved(alone_for_four, "alone")
    assert worst_difference(saved(four_ranks, "hybrid"), alone) <= 1e-5
    assert worst_difference(saved(four_ranks, "from one"), alone) <= 1e-5


def test_replicas_read_a_checkpoint_of_one_rank_bit_for_bit(alone_for_four, four_ranks):
    assert worst_difference(saved(four_ranks, "read"), saved(alone_for_four, "alone")) == 0


def test_one_rank_reads_a_checkpoint_of_replicas_bit_for_bit(four_ranks, tmp_path):
    job = gone_on(tmp_path, "run", four_ranks / "hybrid", 2, changed(**FOUR))
    run_small(0, *job)
    assert worst_difference(saved(tmp_path, "run"), saved(four_ranks, "hybrid")) == 0


def test_only_the_first_replica_writes(four_ranks):
    found = sorted(path.name for path in (four_ranks / "hybrid" / "checkpoints" / "step_00000002").iterdir())
    assert found == ["rank_00000.safetensors", "rank_00001.safetensors", "run.json"]


@pytest.mark.slow
def test_two_ranks_and_one_go_on_from_a_checkpoint_of_replicas(
    alone_for_four, four_ranks, two_ranks, tmp_path
):
    alone = saved(alone_for_four, "alone")
    assert worst_difference(saved(two_ranks, "from four"), alone) <= 1e-5
    run_small(0, *gone_on(tmp_path, "run", four_ranks / "hybrid", 1, changed(**FOUR)))
    assert worst_difference(saved(tmp_path, "run"), alone) <= 1e-5


def test_ranks_that_differ_are_refused_on_every_rank_with_what_differs(four_ranks):
    for rank in range(4):
        refusals = torch.load(four_ranks / f"apart.{rank}", weights_only=True)
        assert "has config.seed 7 and rank 0 on" in refusals["seed"] and refusals["seed"].startswith(
            "rank 2 on"
        )
        assert refusals["place"].startswith(f"{four_ranks}")
        assert (
            "of rank 0 is not there on rank 1, 3; give a directory that all nodes share" in refusals["place"]
        )
        assert "another process is training in" in refusals["lock"]


def test_a_checkpoint_is_saved_once_though_another_node_does_not_see_it_yet(four_ranks):
    for rank in range(4):
        found = torch.load(four_ranks / f"apart.{rank}", weights_only=True)
        assert found["again"] == ["step_00000001", "step_00000002"]


def test_ranks_wait_for_the_work_of_the_first_past_the_timeout_and_end_when_it_is_gone(tmp_path):
    result = tmp_path / "told"
    run_ranks(wait_for_the_first, 2, 1.5, result, timeout=timedelta(seconds=1))
    seconds, told = result.read_text().split(" ", 1)
    assert float(seconds) < 10 and "Connection" in told


@pytest.mark.parametrize(
    ("parallel", "shard_ranks", "count", "size"),
    [
        ("replicated", None, 6, 1), ("sharded", None, 6, 6), ("hybrid", 3, 6, 3), ("hybrid", None, 6, 2),
        ("hybrid", 6, 6, 6), ("hybrid", 1, 6, 1),
    ],
)  # fmt: skip
def test_groups_are_of_a_node_where_nothing_else_is_said(monkeypatch, parallel, shard_ranks, count, size):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert group_size(parallel, shard_ranks, count) == size


def test_ranks_that_are_no_whole_number_of_groups_are_refused(monkeypatch):
    sentence = (
        r"6 rank\(s\) cannot be divided into groups of 4 .* a multiple of 4 ranks, or give --shard-ranks"
    )
    with pytest.raises(ValueError, match=sentence):
        group_size("hybrid", 4, 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=sentence):
        group_size("hybrid", None, 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "none")
    with pytest.raises(
        ValueError, match="LOCAL_WORLD_SIZE is 'none'; torchrun sets it, here from 1 to 65536"
    ):
        group_size("hybrid", None, 6)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert group_size("hybrid", None, 6) == 6


def test_groups_of_ranks_are_for_hybrid_alone():
    with pytest.raises(ValueError, match="shard_ranks is 2 and parallel 'sharded'; groups of ranks are of"):
        changed(parallel="sharded", shard_ranks=2)


def test_a_rank_that_lost_another_says_so(monkeypatch):
    monkeypatch.setattr("rfengine.training.parallel._join", lambda *_: None)
    monkeypatch.setattr("rfengine.training.parallel.Ranks", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    gone = (
        "[/src/gloo/transport/tcp/pair.cc:537] Read error [::1]:5: Connection reset by peer. This is typical"
    )
    sentence = (
        r"rank 1 of 2 has lost another rank, whose output .* \(Read error .*: Connection reset by peer\)"
    )
    with pytest.raises(RuntimeError, match=sentence), ranks_from_environment(torch.device("cpu")):
        raise RuntimeError(gone)
    with pytest.raises(RuntimeError, match="^its own fault$"), ranks_from_environment(torch.device("cpu")):
        raise RuntimeError("its own fault")
