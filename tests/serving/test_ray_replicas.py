"""Two replicas of the shipped model on a real Ray: their sessions are those of a single server, and what
happens to one replica is not felt at the other."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.util import find_spec

import httpx2
import pytest

from rfengine import Pipeline
from support.ray_replicas import RayReplicas, ray_replicas, until
from support.realtime import RealtimeClient, realtime_client
from support.servers import running_server

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")

PROMPTS = ("a large red circle moving slowly to the right", "a small green square over a sandy beach")
CHUNKS = 8
FRAMES = 12 * CHUNKS - 3


def start_of(seed: int) -> dict[str, object]:
    return {"prompt": PROMPTS[seed % 2], "seed": seed, "num_frames": FRAMES}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The media of each seed at a single server with one engine."""
    directory = tmp_path_factory.mktemp("single")
    with running_server(Pipeline.from_pretrained("tiny", "cpu"), directory) as server:
        return [play(server, seed) for seed in range(8)]


def play(server, seed: int) -> bytes:
    with realtime_client(server) as client:
        client.start(**start_of(seed))
        assert client.finish()["reason"] == "finished"
        return client.media


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayReplicas]:
    with ray_replicas(tmp_path_factory.mktemp("replicated") / "data") as running:
        yield running


def sessions_by_replica(clients: list[RealtimeClient]) -> dict[str, list[int]]:
    """The numbers of the clients, by the replica that their session ids name."""
    found = defaultdict(list)
    for number, client in enumerate(clients):
        found[client.log[0]["request_id"][3:11]].append(number)
    return found


def create_job(url: str, seed: int, frames: int) -> dict:
    answer = httpx2.post(
        f"{url}/v1/videos", json={"prompt": PROMPTS[0], "seed": seed, "num_frames": frames}, timeout=30
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def job(url: str, job_id: str) -> dict:
    return httpx2.get(f"{url}/v1/videos/{job_id}", timeout=30).json()


def test_a_killed_replica_fails_its_sessions_alone_and_its_job_is_made_by_another(
    replicas: RayReplicas, alone: list[bytes]
) -> None:
    names = set(replicas.await_ready(2))
    url = replicas.server.url
    made = create_job(url, 5, 12 * 24 - 3)
    until(lambda: job(url, made["id"])["status"] == "in_progress", "the job has begun")
    with ExitStack() as stack, ThreadPoolExecutor(8) as pool:
        clients = [stack.enter_context(realtime_client(replicas.server)) for _ in range(8)]
        list(pool.map(lambda seed: clients[seed].start(**start_of(seed), hls=True), range(8)))
        by_replica = sessions_by_replica(clients)
        assert {name: len(sessions) for name, sessions in by_replica.items()} == dict.fromkeys(names, 4)
        killed = replicas_job(replicas, made["id"])
        for number in by_replica[killed]:
            clients[number].take(1)
        replicas.kill(killed)
        codes = list(pool.map(RealtimeClient.closed, clients))
    for number in by_replica.pop(killed):
        error, done = clients[number].log[-2:]
        assert codes[number] == 1011
        assert (error["type"], error["code"], error["retryable"]) == ("error", "engine_lost", True)
        assert (done["reason"], done["chunks"]) == ("failed", len(clients[number].chunks))
        assert alone[number].startswith(clients[number].media)  # no wrong frame before that
        answer = httpx2.get(url + clients[number].log[0]["hls_url"])
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_lost"
        assert answer.json()["error"]["retryable"] is True
    (others,) = by_replica.values()
    for number in others:
        assert codes[number] == 1000 and clients[number].log[-1]["reason"] == "finished"
        assert clients[number].media == alone[number]
        assert httpx2.get(url + clients[number].log[0]["hls_url"]).status_code == 200
    until(lambda: job(url, made["id"])["status"] == "completed", "the job is made by another")
    video = httpx2.get(f"{url}/v1/videos/{made['id']}/content", headers={"Range": "bytes=4-7"})
    assert (video.status_code, video.content) == (206, b"ftyp")
    assert set(replicas.await_ready(2)) != names  # another has taken its place


def replicas_job(replicas: RayReplicas, job_id: str) -> str:
    """The replica that makes a job."""
    import sqlite3

    with sqlite3.connect(replicas.directory / "videos" / "jobs.sqlite") as jobs:
        return jobs.execute("SELECT replica FROM claims WHERE job_id = ?", (job_id,)).fetchone()[0]


def test_a_replica_that_is_drained_ends_its_sessions_and_puts_its_job_back_at_once(
    replicas: RayReplicas, alone: list[bytes]
) -> None:
    replicas.await_ready(2)
    url = replicas.server.url
    made = create_job(url, 6, 12 * 24 - 3)
    with ExitStack() as stack, ThreadPoolExecutor(4) as pool:
        clients = [stack.enter_context(realtime_client(replicas.server)) for _ in range(4)]
        for seed, client in enumerate(clients):  # two of which would go on for hours
            client.start(**start_of(seed) | ({"pace": "realtime", "num_frames": None} if seed < 2 else {}))
        by_replica = sessions_by_replica(clients)
        assert sorted(map(len, by_replica.values())) == [2, 2]
        replicas.scale(1)
        asked_at = time.monotonic()
        draining = until(lambda: set(by_replica) - set(replicas.ready()), "a replica drains").pop()
        ended = by_replica.pop(draining)
        done = list(pool.map(lambda number: clients[number].finish(), ended))
        assert time.monotonic() - asked_at < 15
        ((kept, others),) = by_replica.items()
        assert {each["reason"] for each in done} <= {"draining", "finished"}
        assert "draining" in {each["reason"] for each in done}
        with realtime_client(replicas.server) as late:
            assert late.start(**start_of(3))["request_id"].startswith(f"rt_{kept}")
            assert late.finish()["reason"] == "finished" and late.media == alone[3]
        for number in others:
            if clients[number].log[0]["config"]["num_frames"] is not None:
                assert clients[number].finish()["reason"] == "finished"
                assert clients[number].media == alone[number]
    until(lambda: job(url, made["id"])["status"] == "completed", "the job is made by the one that is left")
    assert set(replicas.await_ready(1)) == {kept}
    replicas.scale(2)
