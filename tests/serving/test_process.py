"""The server as a process: what a signal does to its sessions, and what a hanging device does to it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from uvicorn.protocols.http.h11_impl import H11Protocol
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from rfengine.serving.process import uvicorn_config
from rfengine.serving.server import ServerOptions

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, "tests")
from rfengine.serving.options import ServiceOptions
from rfengine.serving.process import Address, listen, serve
from rfengine.serving.server import ServerOptions
from rfengine.serving.session import Session
from support.models import small_pipeline

directory, port, kind = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if kind == "hangs":
    Session.turn = lambda self, may_advance: time.sleep(1000)
service = ServiceOptions(stall_s=0.5 if kind == "hangs" else 60.0)
listener = listen(Address(port=port), None)
options = ServerOptions(directory, service=service, drain_s=5.0)
sys.exit(serve(small_pipeline(), options, listener))
"""
START = {"type": "session.start", "prompt": "a circle", "pace": "realtime"}


@contextmanager
def server_process(directory: Path, kind: str = "works") -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SCRIPT, str(directory / "data"), str(port), kind]
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (directory / "log").read_text()
            try:
                if httpx2.get(url + "/readyz").status_code == 200:
                    break
            except httpx2.TransportError:
                time.sleep(0.05)
        yield process, url
    finally:
        process.kill()
        process.wait(30)


def messages_until_closed(websocket) -> list[dict]:
    received = []
    try:
        while True:
            message = websocket.recv(30)
            received += [json.loads(message)] if isinstance(message, str) else []
    except ConnectionClosed:
        return received


async def _answer_nothing(scope: object, receive: object, send: object) -> None:
    raise AssertionError("nobody asks")


def test_the_server_runs_on_the_loop_and_the_protocol_that_its_limits_are_of(tmp_path: Path) -> None:
    # with uvloop and httptools installed "auto" takes those, and the limit of a request's head is h11's
    config = uvicorn_config(_answer_nothing, ServerOptions(tmp_path))
    config.load()
    assert config.http_protocol_class is H11Protocol
    assert config.h11_max_incomplete_event_size == 2**16
    loop = config.get_loop_factory()()
    try:
        assert type(loop).__module__.startswith("asyncio.")
    finally:
        loop.close()


def test_a_signal_to_stop_lets_sessions_finish_their_chunk(tmp_path: Path) -> None:
    with (
        server_process(tmp_path) as (process, url),
        connect(url.replace("http", "ws") + "/v1/realtime/video") as ws,
    ):
        ws.send(json.dumps(START))
        while isinstance(ws.recv(30), str):
            pass
        sent_at = time.monotonic()
        process.send_signal(signal.SIGTERM)
        received = messages_until_closed(ws)
        assert process.wait(30) == 0
        assert time.monotonic() - sent_at < 8
    assert received[-1]["type"] == "session.done" and received[-1]["reason"] == "draining"
    kinds = [message["type"] for message in received]
    at = kinds.index("session.state")
    assert received[at]["state"] == "draining"
    assert kinds[at:].count("video.chunk_metadata") <= 1  # the one that was being made
    assert set(kinds[at + 1 : -1]) <= {"video.chunk_metadata", "session.snapshot.kept"}
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    with (
        server_process(tmp_path) as (process, url),
        connect(url.replace("http", "ws") + "/v1/realtime/video") as ws,
    ):
        ws.send(json.dumps(START))
        ws.recv(30)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0


def test_a_hanging_turn_fails_the_sessions_and_ends_the_process(tmp_path: Path) -> None:
    with server_process(tmp_path, "hangs") as (process, url):
        with connect(url.replace("http", "ws") + "/v1/realtime/video") as ws:
            ws.send(json.dumps(START))
            received = messages_until_closed(ws)
        error, done = received[-2:]
        assert (error["type"], error["code"], error["retryable"]) == ("error", "engine_lost", True)
        assert done["reason"] == "failed"
        assert process.wait(30) == 70


def test_a_port_that_is_taken_is_one_sentence(tmp_path: Path) -> None:
    with server_process(tmp_path) as (_, url):
        port = url.rpartition(":")[2]
        second = tmp_path / "second"
        second.mkdir()
        command = [sys.executable, "-c", SCRIPT, str(second / "data"), port, "works"]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0
    assert f"127.0.0.1:{port} cannot be bound (Address already in use" in ended.stderr
    assert "another server may have it, choose another --port" in ended.stderr
