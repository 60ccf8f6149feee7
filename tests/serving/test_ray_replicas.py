"""Two replicas of the shipped model on a real Ray: their sessions are those of a single server, and what
happens to one replica is not felt at the other."""

from __future__ import annotations

import io
import random
import sqlite3
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.util import find_spec

import httpx2
import numpy
import pytest

from rfengine import Pipeline
from support.ray_replicas import RayReplicas, ray_replicas, until
from support.realtime import RealtimeClient, realtime_client
from support.servers import running_server

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed"),
    pytest.mark.slow,
]

PROMPTS = ("a large red circle moving slowly to the right", "a small green square over a sandy beach")
CHUNKS = 8
FRAMES = 12 * CHUNKS - 3
JOB_FRAMES = 12 * 24 - 3
KILLS = 20
ENCODER_DIFFERENCE = 2.0  # mean of a picture; with another seed it is above 20


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
def job_alone(tmp_path_factory: pytest.TempPathFactory) -> numpy.ndarray:
    """The pictures of a job's file at a single server."""
    directory = tmp_path_factory.mktemp("single")
    with running_server(Pipeline.from_pretrained("tiny", "cpu"), directory) as server:
        made = create_job(server.url, 5, JOB_FRAMES)["id"]
        until(lambda: job(server.url, made)["status"] == "completed", "the job is made")
        return pictures(server.url, made)


def pictures(url: str, job_id: str) -> numpy.ndarray:
    """Those of a job's file, as integers: two files of one video differ a little, by the encoder."""
    import av

    content = httpx2.get(f"{url}/v1/videos/{job_id}/content", timeout=30).content
    with av.open(io.BytesIO(content)) as file:
        return numpy.stack([frame.to_ndarray(format="yuv420p") for frame in file.decode(video=0)]).astype(int)


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayReplicas]:
    with ray_replicas(tmp_path_factory.mktemp("replicated") / "data") as running:
        yield running


def sessions_by_replica(clients: list[RealtimeClient]) -> dict[str, list[int]]:
    """The numbers of the clients, by the replica that their session ids name."""
    found = defaultdict(list)
    for number, client in enumerate(clients):
        found[replica_of(client)].append(number)
    return found


def replica_of(client: RealtimeClient) -> str:
    return client.log[0]["request_id"][3:11]


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
    made = create_job(url, 5, JOB_FRAMES)
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
    with sqlite3.connect(replicas.directory / "videos" / "jobs.sqlite") as jobs:
        return jobs.execute("SELECT replica FROM claims WHERE job_id = ?", (job_id,)).fetchone()[0]


def test_a_replica_that_is_drained_ends_its_sessions_and_puts_its_job_back_at_once(
    replicas: RayReplicas, alone: list[bytes]
) -> None:
    replicas.await_ready(2)
    url = replicas.server.url
    made = create_job(url, 6, JOB_FRAMES)
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


@pytest.mark.soak
def test_no_job_is_lost_and_no_frame_is_wrong_when_replicas_are_killed(
    replicas: RayReplicas, alone: list[bytes], job_alone: numpy.ndarray
) -> None:
    url, rng = replicas.server.url, random.Random(20)
    made = []
    for _ in range(KILLS):
        names = set(replicas.await_ready(2))
        made += [create_job(url, 5, JOB_FRAMES)["id"] for _ in range(2)]
        with ExitStack() as stack, ThreadPoolExecutor(4) as pool:
            clients = [stack.enter_context(realtime_client(replicas.server)) for _ in range(4)]
            for seed, client in enumerate(clients):
                client.start(**start_of(seed))
            ends = [pool.submit(client.closed) for client in clients]
            time.sleep(rng.uniform(0.0, 1.5))
            killed = rng.choice(sorted(names))
            replicas.kill(killed)
            codes = [end.result() for end in ends]
        until(lambda killed=killed: killed not in replicas.ready(), "it is lost")
        for seed, client in enumerate(clients):
            if client.log[-1]["reason"] == "finished":
                assert codes[seed] == 1000 and client.media == alone[seed]
                continue
            assert replica_of(client) == killed and codes[seed] == 1011
            assert client.log[-2]["code"] == "engine_lost" and client.log[-2]["retryable"]
            assert alone[seed].startswith(client.media)
        assert all(
            client.log[-1]["reason"] == "finished" or replica_of(client) == killed for client in clients
        )
    for job_id in made:
        until(lambda job_id=job_id: job(url, job_id)["status"] in ("completed", "failed"), "a job has ended")
        assert job(url, job_id)["error"] is None
        made_again = pictures(url, job_id)
        assert made_again.shape == job_alone.shape and len(job_alone) == JOB_FRAMES
        assert abs(made_again - job_alone).mean((1, 2)).max() < ENCODER_DIFFERENCE
    assert {each["id"] for each in httpx2.get(f"{url}/v1/videos?limit=100").json()["data"]} >= set(made)


@pytest.mark.soak
def test_a_replica_is_added_while_jobs_wait_and_drained_when_most_are_idle(replicas: RayReplicas) -> None:
    url = replicas.server.url
    replicas.await_ready(2)
    replicas.scale(None)
    replicas.await_ready(1)
    made = [create_job(url, seed, 12 * 200 - 3)["id"] for seed in range(4)]
    assert len(replicas.await_ready(2)) == 2
    until(lambda: all(job(url, each)["status"] == "completed" for each in made), "all jobs are made")
    replicas.await_ready(1)
    replicas.scale(2)
