"""Weights that ranks share: each reads and holds its part, and together they are those of one rank."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rfengine.checkpoint.loader import read_safetensors, save_weights
from rfengine.models.dit import WanDiT
from rfengine.training.build import build_stage
from rfengine.training.parallel import Ranks
from rfengine.training.sharded_weights import fresh_model
from support.models import SMALL
from support.ranks import run_ranks
from support.shared_weights import CPU, WIDE, build_shared, states_of, wide_checkpoint, wide_training

RANKS = 4
LAST = "head.head.weight"  # whose last rows the last rank of a group holds


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where four ranks have built a stage from files in one group and in two, of fresh weights, and of files
    with a value that is not finite."""
    place = tmp_path_factory.mktemp("built")
    source = wide_checkpoint(place / "source")
    spoilt = Path(shutil.copytree(source, place / "spoilt"))
    tensors, _ = read_safetensors(spoilt / "transformer.safetensors")
    tensors[LAST][-1] = torch.inf
    save_weights(spoilt / "transformer.safetensors", tensors)
    jobs = [
        (wide_training(str(source), source), 4, place / "four.pt"),
        (wide_training(str(source), source), 2, place / "two.pt"),
        (wide_training("", source, lora_rank=2), 2, place / "fresh.pt"),
        (wide_training(str(spoilt), source), 2, place / "spoilt.pt"),
    ]
    run_ranks(build_shared, RANKS, jobs)
    return place


def reports(built: Path, name: str) -> list[dict]:
    return [torch.load(built / f"{name}.{rank}", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize(("name", "group"), [("two", 2), ("four", 4)])
def test_each_rank_reads_and_holds_its_share_alone(built, name, group):
    files = {path.stem: path.stat().st_size for path in (built / "source").glob("*.safetensors")}
    share = 3 * files["transformer"] / group  # of a student, a teacher and a critic
    sizes = [value.numel() for value in WanDiT(WIDE).parameters()]
    numbers, buffers = (
        sum(sizes),
        3 * len(sizes) * io.DEFAULT_BUFFER_SIZE,
    )  # what a read of a tensor begins with
    assert files["vae"] + files["text_encoder"] < 0.05 * share
    for report in reports(built, name):
        assert report["error"] == ""
        assert 0.95 * share < report["bytes"] < 1.05 * share + files["vae"] + buffers
        assert report["held"] == pytest.approx([numbers / group] * 3, rel=0.05)
    held = [report["held"] for report in reports(built, name)[:group]]
    assert [sum(models) for models in zip(*held, strict=True)] == [numbers] * 3


@pytest.mark.parametrize("name", ["two", "four", "fresh"])
def test_shared_weights_are_those_of_one_rank(built, name):
    source = built / "source"
    changes = {"lora_rank": 2} if name == "fresh" else {}
    config = wide_training("" if name == "fresh" else str(source), source, **changes)
    alone, shared = states_of(build_stage(config, CPU, Ranks())), torch.load(built / f"{name}.pt")
    assert alone.keys() == shared.keys()
    assert all(torch.equal(alone[key], value) for key, value in shared.items())


def test_models_without_a_source_are_different_ones(built):
    fresh = torch.load(built / "fresh.pt")
    values = [fresh[f"{name}.patch_embedding.weight"] for name in ("student", "teacher", "critic")]
    assert not any(torch.equal(values[one], values[other]) for one, other in ((0, 1), (0, 2), (1, 2)))


def test_what_one_rank_cannot_use_ends_them_all(built):
    errors = [report["error"] for report in reports(built, "spoilt")]
    own = f"ValueError: {LAST} has values that are not finite in torch.float32; use a wider dtype"
    other = f"RuntimeError: another rank could not load its share of the weights (rank 1: {LAST} has values"
    assert [error.startswith(own) for error in errors] == [False, True, False, True]
    assert [error.startswith(other) for error in errors] == [True, False, True, False]


@pytest.mark.parametrize("fps_embedding", [False, True])
def test_fresh_weights_are_what_the_constructor_draws(fps_embedding):
    shape = replace(SMALL, fps_embedding=fps_embedding)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        expected = WanDiT(shape).state_dict()
        before = torch.get_rng_state()
        with torch.device("meta"):
            model = WanDiT(shape)
        found = fresh_model(model, CPU, 5).state_dict()
        assert torch.equal(torch.get_rng_state(), before), "the caller's generator stays as it is"
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
