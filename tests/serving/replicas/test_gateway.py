"""A gateway with two replicas in this process: who is let in, where a request goes, what a client sees."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

pytest.importorskip("aiohttp")

from rfengine.serving.access import ApiKeys, ClientIdentity
from rfengine.serving.gateway_access import replica_secret
from rfengine.serving.options import ServiceOptions
from rfengine.serving.realtime.endpoint import RealtimeLimits
from rfengine.serving.replicas.gateway import create_gateway
from rfengine.serving.replicas.identity import identity_of
from rfengine.serving.replicas.member import Member
from rfengine.serving.replicas.plan import ModelSource, ReplicaPlan
from rfengine.serving.replicas.shared_directory import SharedDirectory, this_machine
from rfengine.serving.replicas.table import Load
from rfengine.serving.replicas.websocket_relay import _Relayed
from rfengine.serving.server import ServerOptions
from support.models import small_pipeline
from support.realtime import BareClient, RealtimeClient, realtime_client
from support.servers import RunningServer, running_app, running_server
from support.sessions import eventually

ALICE, BOB = "alice-has-this-key-1", "bob-has-this-key-123"
MEMORY = 2**28


@dataclass(frozen=True)
class Replicated:
    """url: of the gateway."""

    gateway: RunningServer
    members: tuple[Member, ...]
    lost: list[str]

    @property
    def url(self) -> str:
        return self.gateway.url


@contextmanager
def replicated(
    directory: Path, count: int = 2, lease_s: float = 5.0, **options: object
) -> Iterator[Replicated]:
    """options: of ServerOptions."""
    options.setdefault("service", ServiceOptions(memory_bytes=MEMORY))
    server = ServerOptions(directory, drain_s=5.0, **options)
    plan = ReplicaPlan(ModelSource("small", "cpu"), server, count, count, 1, lease_s=lease_s)
    token, lost = SharedDirectory(directory).token, []
    with ExitStack() as stack, running_app(create_gateway(server)) as gateway:
        members = []
        for _ in range(count):
            member = Member(small_pipeline(), plan, "127.0.0.1", token, lost.append)
            stack.callback(member.stop)
            members.append(member)
        eventually(lambda: httpx2.get(f"{gateway.url}/readyz").json()["replicas"]["ready"] == count)
        yield Replicated(gateway, tuple(members), lost)


@pytest.fixture(scope="module")
def open_to_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicated]:
    with replicated(tmp_path_factory.mktemp("open") / "data") as running:
        yield running


@pytest.fixture(scope="module")
def with_keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicated]:
    limits = RealtimeLimits(connections_per_key=3)
    keys = ApiKeys([ALICE, BOB])
    with replicated(tmp_path_factory.mktemp("keys") / "data", keys=keys, realtime=limits) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def code_of(answer: httpx2.Response) -> str:
    return answer.json()["error"]["code"]


def replica_of(client: RealtimeClient) -> str:
    return client.log[0]["request_id"][3:11]


# Who is let in


@pytest.mark.parametrize(
    "path", ["/", "/v1/models", "/v1/videos", "/metrics", "/static/page.js", "/openapi.json"]
)
def test_nothing_is_answered_without_a_key(with_keys: Replicated, path: str) -> None:
    answer = httpx2.get(with_keys.url + path)
    assert answer.status_code == 401 and code_of(answer) == "unauthorized"
    with pytest.raises(InvalidStatus):
        connect(with_keys.gateway.websocket_url)


def test_a_replicas_own_port_answers_nobody_but_the_gateway(with_keys: Replicated) -> None:
    for member in with_keys.members:
        address = member.table.replicas()[member.name].address
        shared = with_keys.gateway.app.state.gateway._shared.secret
        of_others = [replica_secret(shared, each.name) for each in with_keys.members if each is not member]
        secrets = [ALICE, "0" * 64, shared, *of_others]
        for headers in ({}, {"x-rfengine-key": "a"}, *map(bearer, secrets)):
            for path in ("/", "/livez", "/readyz", "/v1/models", "/metrics"):
                assert httpx2.get(f"http://{address}{path}", headers=headers).status_code == 401
        with pytest.raises(InvalidStatus):
            connect(f"ws://{address}/v1/realtime/video")


def test_a_session_is_its_keys_alone_and_no_header_changes_that(with_keys: Replicated) -> None:
    with connect(
        with_keys.gateway.websocket_url, additional_headers=bearer(ALICE), max_size=None
    ) as connection:
        client = RealtimeClient(connection)
        start = client.start(num_frames=21, record=True, hls=True)
        assert client.finish()["reason"] == "finished"
    for path in (start["download_url"], start["hls_url"]):
        assert httpx2.get(with_keys.url + path, headers=bearer(ALICE)).status_code == 200
        forged = {"x-rfengine-key": ApiKeys([ALICE]).identify(ALICE), "x-rfengine-address": "1.2.3.4"}
        for headers in (bearer(BOB), bearer(BOB) | forged):
            answer = httpx2.get(with_keys.url + path, headers=headers)
            assert answer.status_code == 404 and code_of(answer) == "not_found"


def test_a_browser_logs_in_once_and_pages_of_others_are_refused(with_keys: Replicated) -> None:
    with httpx2.Client(base_url=with_keys.url) as browser:
        first = browser.get("/", auth=("anything", ALICE))
        assert first.status_code == 200 and "HttpOnly" in first.headers["set-cookie"]
        assert "content-security-policy" in first.headers
        assert browser.get("/v1/page/config").json()["model"] == "small"
        answer = browser.get("/v1/models", headers={"Origin": "https://other.example"})
    assert answer.status_code == 403 and code_of(answer) == "foreign_origin"


def test_connections_of_a_key_count_over_all_replicas(with_keys: Replicated) -> None:
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(connect(with_keys.gateway.websocket_url, additional_headers=bearer(BOB)))
        fourth = stack.enter_context(connect(with_keys.gateway.websocket_url, additional_headers=bearer(BOB)))
        refused = RealtimeClient(fourth)
        assert refused.closed() == 1013 and refused.log[0]["code"] == "too_many_connections"


def test_without_keys_another_host_is_refused(open_to_all: Replicated) -> None:
    answer = httpx2.get(open_to_all.url + "/v1/models", headers={"Host": "evil.example"})
    assert answer.status_code == 403 and code_of(answer) == "foreign_host"


# Where requests go


def test_sessions_are_spread_and_each_ones_routes_lead_to_its_replica(open_to_all: Replicated) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(realtime_client(open_to_all.gateway)) for _ in range(4)]
        starts = [client.start(num_frames=33, record=True, hls=True) for client in clients]
        found = [replica_of(client) for client in clients]
        assert sorted(map(found.count, set(found))) == [2, 2]
        for client in clients:
            assert client.finish()["reason"] == "finished" and client.closed() == 1000
        for client, start in zip(clients, starts, strict=True):
            playlist = httpx2.get(open_to_all.url + start["hls_url"])
            assert playlist.status_code == 200 and "segment-2.m4s" in playlist.text
            assert playlist.headers["content-type"] == "application/vnd.apple.mpegurl"
            folder = start["hls_url"].removesuffix("playlist.m3u8")
            names = ("init.mp4", "segment-0.m4s", "segment-1.m4s", "segment-2.m4s")
            parts = [httpx2.get(f"{open_to_all.url}{folder}{name}").content for name in names]
            assert b"".join(parts) == client.media
            video = httpx2.get(open_to_all.url + start["download_url"])
            assert video.content[4:8] == b"ftyp" and "attachment" in video.headers["content-disposition"]


def test_a_session_can_do_through_the_gateway_what_it_can_without(open_to_all: Replicated) -> None:
    with realtime_client(open_to_all.gateway) as client:
        client.start(keep_every=0)
        client.take(1)
        client.change_prompt("a square", "ev1")
        client.until("session.interaction.applied", event_id="ev1")
        client.send("session.snapshot", event_id="ev2")
        kept = client.until("session.snapshot.kept")
        client.send("session.branch", event_id="ev3", snapshot_id=kept["snapshot_id"], seed=9)
        assert client.until("session.moved")["branch_id"] == 1
        client.send("session.pause")
        client.until("session.state", state="paused")
        client.send("session.resume")
        client.take(len(client.chunks) + 2)
        client.send("session.ping")
        client.until("session.pong")
        client.send("session.stop")
        assert client.finish()["reason"] == "stopped" and client.closed() == 1000


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server without a gateway, to compare with."""
    with running_server(small_pipeline(), tmp_path_factory.mktemp("single")) as running:
        yield running


@pytest.mark.parametrize(
    "sent",
    [
        '{"type": "session.stop"}',
        '{"type": "session.start"}',
        '{"type": "session.start", "prompt": "a circle", "height": 8192, "width": 8192}',
        '{"type": "session.start", "prompt": "a circle", "model": "another"}',
        "no json",
        b"binary",
    ],
)
def test_a_wrong_first_message_is_answered_as_by_a_single_server(
    open_to_all: Replicated, single: RunningServer, sent: str | bytes
) -> None:
    answers = []
    for server in (open_to_all.gateway, single):
        with connect(server.websocket_url) as connection:
            connection.send(sent)
            client = RealtimeClient(connection)
            answers.append((client.closed(), client.log))
    assert answers[0] == answers[1] and answers[1][1][0]["fatal"]


def test_a_client_that_says_nothing_is_told_so(tmp_path: Path) -> None:
    limits = RealtimeLimits(start_s=0.2)
    with (
        replicated(tmp_path, count=1, realtime=limits) as running,
        realtime_client(running.gateway) as client,
    ):
        assert client.closed() == 1013 and client.log[0]["code"] == "start_timeout"


def test_a_session_that_one_replica_has_no_room_for_goes_to_another(tmp_path: Path) -> None:
    service = ServiceOptions(max_sessions=1, memory_bytes=MEMORY)
    with replicated(tmp_path, service=service) as running, ExitStack() as stack:
        clients = [stack.enter_context(realtime_client(running.gateway)) for _ in range(3)]
        for client in clients[:2]:
            client.start(pace="realtime")
        assert len(set(map(replica_of, clients[:2]))) == 2
        # as if the gateway had not heard that they are full
        clients[2].send("session.start", prompt="a circle")
        assert clients[2].closed() == 1013
        error = clients[2].log[0]
        assert error["code"] in ("too_many_sessions", "no_replica") and error["retryable"]
        eventually(lambda: running.members[0].table.refusals(60.0) == 1)
        clients[0].send("session.stop")
        clients[0].finish()
        eventually(lambda: not running.gateway.app.state.gateway.relay.relayed[replica_of(clients[0])])
        with realtime_client(running.gateway) as fourth:
            assert fourth.start(num_frames=9)["request_id"][3:11] == replica_of(clients[0])
            assert fourth.finish()["reason"] == "finished"


def test_jobs_are_the_same_at_every_replica(open_to_all: Replicated) -> None:
    url = open_to_all.url
    with httpx2.Client(base_url=url, timeout=30) as http:
        made = [
            http.post("/v1/videos", json={"prompt": "a circle", "num_frames": 21}).json() for _ in range(3)
        ]
        for job in made:
            for _ in range(2):  # the gateway asks one after the other
                assert http.get(f"/v1/videos/{job['id']}").status_code == 200
        eventually(
            lambda: {http.get(f"/v1/videos/{job['id']}").json()["status"] for job in made} == {"completed"}
        )
        path = f"/v1/videos/{made[0]['id']}/content"
        whole = http.get(path)
        assert whole.headers["content-type"] == "video/mp4" and whole.headers["accept-ranges"] == "bytes"
        part = http.get(path, headers={"Range": "bytes=4-7"})
        assert (part.status_code, part.content) == (206, whole.content[4:8])
        head = http.head(path)
        assert head.status_code == 405 or int(head.headers["content-length"]) == len(whole.content)
        assert {job["id"] for job in http.get("/v1/videos").json()["data"]} >= {job["id"] for job in made}
        assert http.delete(f"/v1/videos/{made[0]['id']}").json()["deleted"]
        assert http.get(f"/v1/videos/{made[0]['id']}").status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "given"),
    [
        ("GET", f"/v1/realtime/sessions/rt_{'0' * 32}/video.mp4", {}),
        ("GET", "/v1/realtime/sessions/rt_short/video.mp4", {}),
        ("GET", "/nothing", {}),
        ("GET", "/v1/models/a%2Fb%20c?x=%26", {}),
        ("GET", "/v1/videos/", {}),
        ("GET", "/v1/videos/", {"headers": {"X-Forwarded-Proto": "https", "X-Forwarded-For": "1.2.3.4"}}),
        ("PUT", "/v1/videos", {}),
        ("POST", "/v1/videos", {"json": {"prompt": "a" * 2**21}}),
        ("POST", "/v1/videos", {"json": {"prompt": ""}}),
        ("POST", "/v1/videos", {"content": b"{", "headers": {"content-type": "application/json"}}),
        ("POST", "/v1/videos", {"data": {"prompt": "a"}, "files": {"input_reference": b"picture"}}),
        ("HEAD", "/", {}),
        ("POST", "/v1/videos", {"content": b"{}"}),  # without a content type
        ("GET", f"/v1/videos/?{'a' * 20_000}", {}),  # whose answer repeats the address
    ],
)
def test_what_is_not_served_is_answered_as_by_a_single_server(
    open_to_all: Replicated, single: RunningServer, method: str, path: str, given: dict
) -> None:
    through, direct = (httpx2.request(method, url + path, **given) for url in (open_to_all.url, single.url))
    assert (through.status_code, through.content) == (direct.status_code, direct.content)
    assert len(through.headers.get_list("date")) == 1
    both = (dict(each.headers) for each in (through, direct))
    (ours, theirs) = ({name: value for name, value in each.items() if name != "date"} for each in both)
    assert ours == {
        name: value.replace(single.url[7:], open_to_all.url[7:]) for name, value in theirs.items()
    }


@pytest.mark.parametrize(
    "target", ["5/x", "@127.0.0.1:9/x", "*", "http://127.0.0.1:9/x", "/v1/models#x", "//v1/models", "/a/../"]
)
def test_no_target_of_a_request_changes_which_port_is_asked(
    open_to_all: Replicated, single: RunningServer, target: str
) -> None:
    answers = []
    for url in (open_to_all.url, single.url):
        host, _, port = url[7:].partition(":")
        with socket.create_connection((host, int(port)), 10) as connection:
            lines = f"GET {target} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n"
            connection.sendall(lines.encode())
            head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
        answers.append((head.partition(b"\r\n")[0], body))
    assert answers[0] == answers[1] and b" 404 " in answers[0][0]


def test_another_websocket_is_refused(open_to_all: Replicated) -> None:
    with pytest.raises(InvalidStatus):
        connect(open_to_all.gateway.websocket_url + "/other")


# What is felt of a client, of a replica and of the gateway


def test_a_client_that_does_not_read_holds_its_session_alone(tmp_path: Path) -> None:
    limits = RealtimeLimits(queue_bytes=2**16, queue_seconds=1.0)
    with replicated(tmp_path, count=1, realtime=limits) as running:
        service = running.members[0].app.state.service
        with BareClient(running.gateway) as slow:
            slow.start(width=256, height=256)
            eventually(lambda: service._sessions and service._sessions[0].chunks > 2)
            session = service._sessions[0]

            def stands() -> bool:
                before = session.chunks
                time.sleep(0.5)
                return session.chunks == before

            eventually(stands)
            with realtime_client(running.gateway) as other:
                other.start(num_frames=45)
                assert other.finish()["reason"] == "finished"
            before = session.chunks
            received = 0
            while session.chunks < before + 3:  # it goes on when the client reads
                received += len(slow.read())
            assert received > 0


def test_a_client_that_takes_nothing_holds_no_connection_when_its_replica_is_lost() -> None:
    class Stuck:
        async def send_text(self, text: str) -> None:
            await asyncio.Event().wait()

    relay = SimpleNamespace(limits=RealtimeLimits(flush_s=0.05))
    relayed = _Relayed(relay, Stuck(), ClientIdentity(None, "127.0.0.1"))
    asyncio.run(asyncio.wait_for(relayed._tell_lost(), 5.0))


def test_numbers_of_all_replicas_have_a_label_and_jobs_are_counted_once(open_to_all: Replicated) -> None:
    for _ in open_to_all.members:
        httpx2.get(open_to_all.url + "/v1/models")
    text = httpx2.get(open_to_all.url + "/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    names = {member.name for member in open_to_all.members}
    sessions = families["rfengine_sessions"].samples
    assert {sample.labels["replica"] for sample in sessions} == names and len(sessions) == 6
    requests = [sample.labels for sample in families["rfengine_http_requests"].samples]
    assert {labels["replica"] for labels in requests} == {*names, "gateway"}
    assert {labels["route"] for labels in requests if labels["replica"] == "gateway"} >= {
        "/readyz",
        "relayed",
    }
    chunks = families["rfengine_chunk_seconds"]
    assert chunks.type == "histogram" and {sample.labels["replica"] for sample in chunks.samples} == names
    jobs = families["rfengine_jobs"].samples
    assert len(jobs) == 4 and all(set(sample.labels) == {"status"} for sample in jobs)
    states = {sample.labels["state"]: sample.value for sample in families["rfengine_replicas"].samples}
    assert states == {"warming up": 0, "ready": 2, "draining": 0, "ended": 0, "lost": 0}


def test_a_replica_that_stops_ends_its_sessions_and_its_routes_are_typed_errors(tmp_path: Path) -> None:
    with replicated(tmp_path) as running, ExitStack() as stack:
        clients = [stack.enter_context(realtime_client(running.gateway)) for _ in range(2)]
        starts = [client.start(pace="realtime", hls=True) for client in clients]
        (stopped,) = (each for each in running.members if each.name == replica_of(clients[0]))
        stopped.stop()
        assert clients[0].finish()["reason"] == "draining" and clients[0].closed() == 1000
        eventually(lambda: httpx2.get(running.url + "/readyz").json()["replicas"]["ended"] == 1)
        assert httpx2.get(running.url + "/readyz").json()["replicas"]["lost"] == 0
        answer = httpx2.get(running.url + starts[0]["hls_url"])
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["retryable"] and code_of(answer) == "engine_lost"
        clients[1].take(2)
        with realtime_client(running.gateway) as late:
            late.start(num_frames=9)
            assert replica_of(late) == replica_of(clients[1])
            assert late.finish()["reason"] == "finished"


def test_without_any_replica_clients_are_told_to_try_again(tmp_path: Path) -> None:
    with replicated(tmp_path, count=1) as running:
        running.members[0].stop()
        eventually(lambda: httpx2.get(running.url + "/readyz").status_code == 503)
        answer = httpx2.get(running.url + "/v1/models")
        assert answer.status_code == 503 and answer.json()["error"]["retryable"]
        with realtime_client(running.gateway) as client:
            client.send("session.start", prompt="a circle")
            assert client.closed() == 1013 and client.log[0]["code"] == "no_replica"
        assert httpx2.get(running.url + "/livez").status_code == 200


def test_a_replica_that_others_have_given_up_ends(tmp_path: Path) -> None:
    with replicated(tmp_path, count=1, lease_s=0.4) as running:
        member = running.members[0]
        member.table._execute("DELETE FROM replicas")
        eventually(lambda: running.lost)
        assert "was silent for so long that others took its work" in running.lost[0]


def test_a_replica_that_ends_since_its_engine_is_lost_counts_as_lost(tmp_path: Path) -> None:
    with replicated(tmp_path) as running:
        running.members[0].app.state.service._lose("the device is gone")
        running.members[0].stop()
        eventually(lambda: httpx2.get(running.url + "/readyz").json()["replicas"]["lost"] == 1)
        assert httpx2.get(running.url + "/readyz").json()["replicas"]["ended"] == 0


def test_a_second_server_cannot_have_the_directory(open_to_all: Replicated) -> None:
    options = open_to_all.gateway.app.state.gateway.options
    with pytest.raises(RuntimeError, match="another process is serving the jobs there"):
        create_gateway(options)


def test_a_replica_that_hangs_fails_its_sessions_when_its_lease_is_over(tmp_path: Path) -> None:
    with replicated(tmp_path, count=1) as running, realtime_client(running.gateway) as client:
        client.start(pace="realtime")
        client.take(1)
        gateway = running.gateway.app.state.gateway
        member = gateway._replicas[running.members[0].name]
        assert not gateway._is_silent(member)
        hung = replace(member, name="hung", lease_until=time.time() - 60)
        assert any(gateway._is_silent(gateway._replicas.setdefault("hung", hung)) for _ in range(3))
        gateway.relay.is_silent = lambda replica: True
        assert client.closed() == 1011
        error, done = client.log[-2:]
        assert error["code"] == "engine_lost" and error["retryable"] and error["fatal"]
        assert done["type"] == "session.done" and done["chunks"] == len(client.chunks)
        eventually(lambda: not running.members[0].app.state.service._sessions)


def test_a_replica_that_hangs_while_it_is_asked_is_followed_by_another(tmp_path: Path) -> None:
    with replicated(tmp_path, count=1) as running, socket.create_server(("127.0.0.1", 0)) as mute:
        gateway, table = running.gateway.app.state.gateway, running.members[0].table
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        identity = identity_of(small_pipeline())
        table.join("00000000", address, this_machine(), 1, identity, 1)
        table._execute("UPDATE replicas SET lease_until = lease_until + 60 WHERE name = '00000000'")
        table.renew("00000000", Load("ready", 2**40, 0))
        eventually(lambda: "00000000" in [each.name for each in gateway._by_room()])
        gateway._http._is_silent = gateway.relay.is_silent = lambda replica: replica.name == "00000000"
        began = time.monotonic()
        for _ in range(2):  # each is asked first in turn
            assert httpx2.get(running.url + "/v1/models", timeout=20).status_code == 200
        with realtime_client(running.gateway) as client:
            client.start(num_frames=9)
            assert replica_of(client) == running.members[0].name
            assert client.finish()["reason"] == "finished"
        assert time.monotonic() - began < 15


def test_a_replica_of_another_model_or_directory_is_refused(open_to_all: Replicated, tmp_path: Path) -> None:
    options = open_to_all.gateway.app.state.gateway.options
    plan = ReplicaPlan(ModelSource("small", "cpu"), options, 2, 2, 1)
    token = SharedDirectory(options.data_directory).token
    with pytest.raises(ValueError, match="has fingerprint .* and replica .* has"):
        Member(small_pipeline(seed=3), plan, "127.0.0.1", token, print)
    elsewhere = ReplicaPlan(ModelSource("small", "cpu"), ServerOptions(tmp_path), 2, 2, 1)
    with pytest.raises(ValueError, match="name one that all machines share"):
        Member(small_pipeline(), elsewhere, "127.0.0.1", token, print)
