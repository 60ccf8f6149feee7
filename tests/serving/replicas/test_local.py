"""`rfengine serve --replicas` as a process: a signal drains every replica, and nothing of Ray is left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import httpx2
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from support.forking_process import ROOT

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed"),
    pytest.mark.slow,
]
START = {"type": "session.start", "prompt": "a circle", "pace": "realtime"}
LIMIT_S = 120.0
LISTENS = "0A"  # as /proc/net/tcp writes it, and loopback in IPv4, in IPv6 and as IPv4 within IPv6
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def command(directory: Path, port: int, *options: str) -> list[str]:
    return [
        sys.executable, "-m", "rfengine.cli", "serve", "--device", "cpu", "--replicas", "2",
        "--port", str(port), "--data-directory", str(directory), *options,
    ]  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)} | more


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def descendants(process: int) -> Iterator[int]:
    """Processes that it started, and those that they did."""
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            yield child
            yield from descendants(child)


def open_ports(process: int) -> list[int]:
    """Ports at which a process listens beyond loopback."""
    sockets = {os.readlink(path) for path in Path(f"/proc/{process}/fd").iterdir()}
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/{process}/net/{name}").read_text().splitlines()[1:]
    ]
    addresses = [
        line[1].split(":") for line in lines if line[3] == LISTENS and f"socket:[{line[9]}]" in sockets
    ]
    return [int(port, 16) for address, port in addresses if address not in LOOPBACK]


def answer_without_token(port: int) -> str:
    """What a port of Ray Serve says to one who has no token of this Ray."""
    import grpc

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
        with pytest.raises(grpc.RpcError) as raised:
            call(b"", timeout=10)
    return raised.value.code().name


def is_alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


@pytest.mark.soak
def test_a_signal_to_stop_drains_every_replica_and_leaves_no_process(tmp_path: Path, port: int) -> None:
    url = f"http://127.0.0.1:{port}"
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(
            command(tmp_path / "data", port), env=environment(), stdout=log, stderr=log
        ) as server,
    ):
        try:
            deadline = time.monotonic() + LIMIT_S
            while True:
                assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                try:
                    if httpx2.get(url + "/readyz").json()["replicas"]["ready"] == 2:
                        break
                except httpx2.TransportError:
                    pass
                time.sleep(0.2)
            with connect(f"ws://127.0.0.1:{port}/v1/realtime/video", max_size=None) as websocket:
                websocket.send(json.dumps(START))
                while isinstance(websocket.recv(30), str):
                    pass
                started = list(descendants(server.pid))
                refused = [answer_without_token(port) for each in started for port in open_ports(each)]
                server.send_signal(signal.SIGTERM)
                received = []
                with pytest.raises(ConnectionClosed):
                    while True:
                        received.append(websocket.recv(30))
            done = json.loads([each for each in received if isinstance(each, str)][-1])
            assert (done["type"], done["reason"]) == ("session.done", "draining")
            assert server.wait(60) == 0
        finally:
            server.kill()
    assert len(started) > 4
    while any(map(is_alive, started)):
        assert time.monotonic() < deadline + LIMIT_S, "processes of Ray are left"
        time.sleep(0.1)
    assert refused == ["UNAUTHENTICATED"] * 2  # of each replica, which only Ray itself may ask
    text = (tmp_path / "log").read_text()
    assert text.count("the page is at") == 1 and "Traceback" not in text
    assert list((tmp_path / "data" / "recordings").iterdir()) == []


@pytest.mark.soak
def test_what_a_replica_cannot_load_ends_the_server_with_its_sentence(tmp_path: Path, port: int) -> None:
    ended = subprocess.run(
        command(tmp_path / "data", port, "--vae", "tensorrt"),
        env=environment(), capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert ended.returncode != 0
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("rfengine: error: the replicas did not start: ") and "TensorRT" in last
