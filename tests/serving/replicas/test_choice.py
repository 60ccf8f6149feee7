"""Which replica a session goes to, and which one a path names."""

from __future__ import annotations

import time

import pytest

from rfengine.serving.replicas.choice import by_room, named_replica, reachable
from rfengine.serving.replicas.table import Load, Replica


def replica(name: str, free: int = 1000, sessions: int = 0, state: str = "ready", **given: object) -> Replica:
    place = {"address": "127.0.0.1:1", "machine": "one", "lease_until": time.time() + 60} | given
    return Replica(name, place["address"], place["machine"], 7, 100, Load(state, free, sessions),
                   place["lease_until"])  # fmt: skip


def names(replicas: list[Replica], **relayed: int) -> list[str]:
    return [each.name for each in by_room(replicas, relayed)]


def test_the_one_with_most_free_memory_is_first() -> None:
    assert names([replica("a", 100), replica("b", 300), replica("c", 200)]) == ["b", "c", "a"]


def test_only_those_that_are_ready_take_sessions() -> None:
    states = ("warming up", "draining", "ended", "ready")
    assert names([replica(state, state=state) for state in states]) == ["ready"]


def test_sessions_that_are_not_reported_yet_take_their_memory() -> None:
    replicas = [replica("a", 1000, sessions=0), replica("b", 950, sessions=0)]
    assert names(replicas) == ["a", "b"]
    assert names(replicas, a=1) == ["b", "a"]
    reported = [replica("a", 1000, sessions=1), replica("b", 950)]
    assert names(reported, a=1) == ["a", "b"]  # what it reports counts that one already


def test_sessions_that_come_at_once_are_spread() -> None:
    replicas, relayed = [replica("a"), replica("b"), replica("c")], {}
    for _ in range(9):
        chosen = by_room(replicas, relayed)[0].name
        relayed[chosen] = relayed.get(chosen, 0) + 1
    assert relayed == {"a": 3, "b": 3, "c": 3}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/realtime/sessions/rt_0123abcd" + "0" * 24 + "/hls/playlist.m3u8", "0123abcd"),
        ("/v1/realtime/sessions/rt_0123abcd" + "0" * 24, "0123abcd"),
        ("/v1/realtime/sessions/rt_0123abcd/video.mp4", None),
        ("/v1/realtime/sessions/rt_0123ABCD" + "0" * 24 + "/video.mp4", None),
        ("/v1/videos/video_0123abcd", None),
        ("/v1/realtime/sessions/rt_0123abcd" + "0" * 24 + "\n/x", None),
        ("/", None),
    ],
)
def test_a_path_names_the_replica_of_its_session(path: str, name: str | None) -> None:
    assert named_replica(path) == name


def test_a_lost_replica_and_one_on_the_loopback_of_another_machine_are_not_reached() -> None:
    assert reachable(replica("a"), "one")
    assert not reachable(replica("a"), "two")
    assert reachable(replica("a", address="10.0.0.1:1"), "two")
    assert not reachable(replica("a", lease_until=time.time() - 1), "one")
    assert not reachable(replica("a", state="ended"), "one")
