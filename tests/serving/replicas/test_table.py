"""The table of replicas: who may join, leases, and what is remembered of those that are lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rfengine.serving.replicas import table as table_module
from rfengine.serving.replicas.identity import difference, identity_of
from rfengine.serving.replicas.table import Load, ReplicaTable
from support.models import small_pipeline

IDENTITY = {"version": "0.1.0", "fingerprint": "aa", "configuration": {"cache": {"window_frames": 9}}}
LEASE_S = 0.2


@pytest.fixture
def table(tmp_path: Path) -> Iterator[ReplicaTable]:
    table = ReplicaTable(tmp_path / "replicas.sqlite", lease_s=LEASE_S)
    yield table
    table.close()


def join(table: ReplicaTable, name: str, identity: dict[str, Any] = IDENTITY, **given: Any) -> None:
    place = {"address": "127.0.0.1:1000", "machine": "one", "process": 7, "stream_bytes": 100} | given
    table.join(name, place["address"], place["machine"], place["process"], identity, place["stream_bytes"])


def test_a_replica_that_renews_is_there_and_one_that_does_not_is_lost(table: ReplicaTable) -> None:
    join(table, "a")
    join(table, "b")
    assert {each.load.state for each in table.replicas().values()} == {"warming up"}
    time.sleep(LEASE_S)
    assert table.renew("a", Load("ready", 500, 2))
    found = table.replicas()
    assert not found["a"].is_gone and found["a"].load == Load("ready", 500, 2)
    assert found["b"].is_gone and found["b"].condition == "lost"


def test_a_replica_that_left_is_gone_at_once_and_lost_where_it_failed(table: ReplicaTable) -> None:
    for name in "abc":
        join(table, name)
    table.leave("a")
    table.leave("b", failed=True)
    conditions = {name: each.condition for name, each in table.replicas().items()}
    assert conditions == {"a": "ended", "b": "lost", "c": "warming up"}
    assert [each.is_gone for each in table.replicas().values()] == [True, True, False]


def test_a_lost_replica_is_forgotten_after_a_while_and_can_not_come_back(
    table: ReplicaTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    join(table, "a")
    join(table, "b")
    table.leave("a")
    table.sweep()
    assert set(table.replicas()) == {"a", "b"}
    monkeypatch.setattr(table_module, "LOST_S", 0.0)
    table.renew("b", Load("ready"))
    table.sweep()
    assert set(table.replicas()) == {"b"}
    assert not table.renew("a", Load("ready"))


def test_a_replica_that_comes_back_among_others_of_another_model_has_no_place(table: ReplicaTable) -> None:
    join(table, "a")
    time.sleep(LEASE_S)
    join(table, "b", IDENTITY | {"fingerprint": "bb"})  # a counts as lost
    assert table.renew("b", Load("ready")) and not table.renew("a", Load("ready"))
    assert table.replicas()["a"].is_gone
    table.leave("b")
    assert table.renew("a", Load("ready"))


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        (IDENTITY | {"fingerprint": "bb"}, "replica b has fingerprint 'bb' and replica a has 'aa'"),
        (IDENTITY | {"version": "0.2.0"}, "replica b has version '0.2.0' and replica a has '0.1.0'"),
        (
            IDENTITY | {"configuration": {"cache": {"window_frames": 12}}},
            "replica b has configuration.cache.window_frames 12 and replica a has 9",
        ),
    ],
)
def test_a_replica_that_runs_anything_else_is_refused(
    table: ReplicaTable, identity: dict[str, Any], message: str
) -> None:
    join(table, "a")
    with pytest.raises(ValueError, match=message):
        join(table, "b", identity)
    assert set(table.replicas()) == {"a"}
    table.leave("a")
    join(table, "b", identity)  # the others are gone


def test_a_replica_on_another_machine_is_refused_where_one_listens_on_loopback(table: ReplicaTable) -> None:
    join(table, "a")
    with pytest.raises(ValueError, match="127.0.0.1:1000 on two and at 127.0.0.1:1000 on one cannot both"):
        join(table, "b", machine="two")
    with pytest.raises(ValueError, match="replica_host=node"):
        join(table, "b", machine="two", address="10.0.0.2:1000")
    table.leave("a")
    join(table, "b", machine="two", address="10.0.0.2:1000")
    join(table, "c", machine="one", address="10.0.0.1:1000")


def test_a_table_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "replicas.sqlite"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(RuntimeError, match="cannot be used .file is not a database.; choose another"):
        ReplicaTable(path)


def test_refusals_count_for_a_while(table: ReplicaTable) -> None:
    table.note_refusal()
    table.note_refusal()
    assert table.refusals(10.0) == 2
    time.sleep(0.05)
    assert table.refusals(0.01) == 0


def test_the_identity_of_equal_pipelines_is_equal_and_shows_another_seed_of_the_weights() -> None:
    first, same = identity_of(small_pipeline()), identity_of(small_pipeline())
    assert difference(first, same) is None
    assert difference(first, first | {"fingerprint": "other"})[0] == "fingerprint"
    assert {"version", "torch", "fingerprint", "configuration"} <= first.keys()
