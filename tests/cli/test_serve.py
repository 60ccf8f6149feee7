"""serve: what it refuses before a model is loaded, and the packages that it needs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest

from rfengine import Lora, cli
from rfengine.cli import serve
from rfengine.serving import process
from support.outcome import fails


@pytest.fixture(autouse=True)
def never_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(serve.Pipeline, "from_pretrained", load)
    monkeypatch.delenv("RFENGINE_API_KEYS", raising=False)


def test_an_address_beyond_loopback_needs_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    error = fails(capsys, 2, "serve", "--host", "0.0.0.0", "--port", "8999")
    assert "0.0.0.0" in error and "--api-key-file" in error and "--insecure" in error


def test_a_key_file_that_others_can_read_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys"
    path.write_text("a-key-of-some-length-123\n")
    path.chmod(0o644)
    assert "chmod 600" in fails(capsys, 2, "serve", "--api-key-file", path)


def test_a_port_that_is_taken_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        error = fails(capsys, 1, "serve", "--port", taken.getsockname()[1])
    assert "cannot be bound" in error and "choose another --port" in error


@pytest.mark.parametrize(
    ("option", "value"),
    [("--max-sessions", 0), ("--memory-gb", -1), ("--connections-per-key", 0), ("--port", 0)],
)
def test_a_limit_out_of_range_is_refused(
    capsys: pytest.CaptureFixture[str], option: str, value: float
) -> None:
    assert f"{option} is {value}" in fails(capsys, 2, "serve", option, value)


def test_without_its_packages_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    error = fails(capsys, 1, "serve")
    assert "uvicorn" in error and "rfengine[serve]" in error


def test_loras_reach_the_pipeline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = []

    def load(*arguments: object, loras: tuple[Lora, ...], **options: object) -> None:
        given.extend(loras)
        raise ValueError("enough")

    monkeypatch.setattr(serve.Pipeline, "from_pretrained", load)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = ["serve", "--port", port, "--data-directory", str(tmp_path), "--lora", "a:0.5", "--lora", "b"]
    assert cli.main([*command, "--allow-unmatched-lora"]) == 2
    assert given == [Lora("a", 0.5, True), Lora("b", 1.0, True)]


def test_limits_reach_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = []
    monkeypatch.setattr(
        serve.Pipeline,
        "from_pretrained",
        lambda *_, **__: SimpleNamespace(config=SimpleNamespace(name="tiny")),
    )
    monkeypatch.setattr(process, "serve", lambda _, server, __: given.append(server) or 0)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    limits = {"--max-sessions": "3", "--connections-per-key": "40", "--max-connections": "500"}
    command = ["serve", "--port", port, "--data-directory", str(tmp_path)]
    assert cli.main([*command, *(word for pair in limits.items() for word in pair)]) == 0
    (server,) = given
    assert server.service.max_sessions == 3
    assert (server.realtime.connections_per_key, server.max_connections) == (40, 500)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--replicas", "1000"], "1000 replicas need as many cores and there are "),
        (
            ["--replicas", "2", "--max-replicas", "1"],
            "max-replicas is 1 and replicas 2; give at least as many",
        ),
        (["--replicas", "0"], "--replicas is 0"),
    ],
)
def test_replicas_that_cannot_be_are_refused_with_the_numbers(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in fails(capsys, 2, "serve", "--device", "cpu", *arguments)


@pytest.mark.parametrize("package", ["ray", "aiohttp"])
def test_replicas_without_their_packages_say_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setattr(serve, "_cores", lambda: 2)
    monkeypatch.setitem(sys.modules, package, None)
    error = fails(capsys, 1, "serve", "--device", "cpu", "--replicas", "2")
    assert f"replicas need {package}, which is not installed; pip install 'rfengine[ray]'" in error


def test_serve_opens_the_page_and_ends_at_a_signal(model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "rfengine.cli", "serve", "--model", str(model), "--port", port]
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path / "state")}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith(f"rfengine serves small; the page is at http://localhost:{port}/")
            deadline = time.monotonic() + 60
            while True:
                assert process.poll() is None and time.monotonic() < deadline
                try:
                    if httpx2.get(f"http://localhost:{port}/readyz").status_code == 200:
                        break
                except httpx2.TransportError:
                    time.sleep(0.05)
            assert httpx2.get(f"http://127.0.0.1:{port}/").status_code == 200
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert (tmp_path / "state" / "rfengine" / f"serve-{port}" / "recordings").is_dir()
