"""How ranks find one another in a store that remembers those of earlier starts."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore, Store

from rfengine.training.parallel import ranks_from_environment
from rfengine.training.rank_store import check_devices, is_agent_shared, met

SOON = timedelta(seconds=20)


def all_met(agent: Store, count: int, first_is_late: bool = False) -> list[Store]:
    """The stores of `count` ranks that start together; the first may come when all others have looked."""
    late = threading.Event()

    def start(rank: int) -> Store:
        if rank == 0 and first_is_late:
            late.wait(0.2)
        return met(agent, rank, count, SOON)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(start, range(count)))


def test_ranks_share_a_store_that_knows_nothing_of_an_earlier_start() -> None:
    agent = HashStore()
    earlier = all_met(agent, 3)
    earlier[1].set("address", "gone")
    assert earlier[2].get("address") == b"gone"
    for _ in range(3):
        stores = all_met(agent, 3, first_is_late=True)
        assert not stores[0].check(["address"])
        stores[1].set("address", "here")
        assert [store.get("address") for store in stores] == [b"here"] * 3
        stores[1].set("address", "gone")


def test_another_number_of_ranks_meets_after_a_start_that_never_finished() -> None:
    agent = HashStore()
    agent.set_timeout(timedelta(seconds=0.5))
    with pytest.raises(Exception, match="(?i)timeout|timed out"):
        met(agent, 0, 3, SOON)  # alone
    agent.set_timeout(SOON)
    stores = all_met(agent, 2, first_is_late=True)
    stores[0].set("address", "here")
    assert stores[1].get("address") == b"here"


def test_a_rank_that_meets_nobody_gives_up_in_time() -> None:
    agent = HashStore()
    all_met(agent, 2)
    with pytest.raises(
        RuntimeError, match=r"rank 1 has not met the other 1 in 0.3 s; .* or give --timeout more"
    ):
        met(agent, 1, 2, timedelta(seconds=0.3))


@pytest.mark.parametrize(("value", "shared"), [("True", True), ("False", False), (None, False)])
def test_the_agent_says_whether_its_store_is_used(monkeypatch, value, shared) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    if value is not None:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", value)
    assert is_agent_shared() == shared


@pytest.mark.parametrize(
    ("kinds", "sentence"),
    [
        (["cuda", "cuda", "cpu"], r"rank 2 on \S+ computes on cpu and rank 0 on \S+ on cuda; look at"),
        (["cpu", "cuda", "cuda"], r"rank 1 on \S+ computes on cuda and rank 0 on \S+ on cpu; look at"),
    ],
)
def test_ranks_on_other_devices_are_refused_on_every_rank(kinds, sentence) -> None:
    store = HashStore()

    def check(rank: int) -> str:
        with pytest.raises(ValueError, match=sentence):
            check_devices(store, rank, 3, kinds[rank])
        return kinds[rank]

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(check, range(3))) == kinds
    check_devices(HashStore(), 0, 1, "cuda")


def test_a_place_to_meet_that_is_not_said_is_named(monkeypatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with (
        pytest.raises(ValueError, match="MASTER_ADDR is empty; torchrun sets it"),
        ranks_from_environment(torch.device("cpu")),
    ):
        pass
