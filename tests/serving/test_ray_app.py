"""The application for Ray Serve: its options from arguments and the environment."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import httpx2
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from rfengine.cli.serve import ServeOptions
from rfengine.serving.ray_app import app, app_options
from rfengine.serving.server import server_options
from support.forking_process import ROOT
from support.realtime import RealtimeClient
from support.sessions import eventually

KEY = "a-key-of-some-length-123"
LIMIT_S = 120.0
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
ENVIRONMENT = {
    "RFENGINE_SERVE_DATA_DIRECTORY": "/data",
    "RFENGINE_SERVE_REPLICAS": "4",
    "RFENGINE_SERVE_ALLOW_ORIGIN": "https://a.example, https://b.example",
    "RFENGINE_SERVE_LOG_JSON": "true",
    "RFENGINE_API_KEYS": "not-an-option-of-the-application",
}


def test_options_come_from_the_environment_and_arguments_take_their_place() -> None:
    options = app_options({"replicas": "2", "memory_gb": "1.5"}, ENVIRONMENT)
    assert (options.data_directory, options.replicas, options.memory_gb) == (Path("/data"), 2, 1.5)
    assert options.allow_origin == ("https://a.example", "https://b.example") and options.log_json
    assert options.model == "tiny" and options.max_sessions == 16


def test_limits_reach_the_server_as_those_of_serve_do(tmp_path: Path) -> None:
    limits = {"max_sessions": 3, "connections_per_key": 40, "max_connections": 500, "disk_gb": 3.0}
    served = server_options(ServeOptions(**limits), tmp_path, None)
    options = app_options({"data_directory": str(tmp_path), **limits}, {})
    assert server_options(options, tmp_path, None) == served
    assert served.realtime.connections_per_key == 40
    assert served.recording_bytes == served.video_bytes == 3 * 2**29


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"replica": "2"}, r"^replica \(or RFENGINE_SERVE_REPLICA\): .*; there are data_directory, model, "),
        ({"replicas": "none"}, r"^replicas \(or RFENGINE_SERVE_REPLICAS\): .*integer"),
        ({"replicas": "0"}, "greater than or equal to 1"),
        ({"dtype": "int8"}, r"^dtype .*'bfloat16'"),
        ({"memory_gb": "nan"}, "memory_gb"),
    ],
)
def test_a_wrong_option_is_refused_by_its_name(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        app_options(arguments, ENVIRONMENT)


def test_a_data_directory_has_to_be_named() -> None:
    with pytest.raises(ValueError, match="data_directory .or RFENGINE_SERVE_DATA_DIRECTORY"):
        app_options({}, {})


@needs_ray
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "cpu", "replicas": "1000"}, "1000 replicas need as many cores and there are"),
        ({"device": "cpu", "runtime": '{"graph": true}'}, "graph"),
        ({"device": "cpu", "api_key_file": "/nowhere"}, "/nowhere"),
    ],
)
def test_what_cannot_be_is_refused_when_the_application_is_built(
    tmp_path: Path, arguments: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        app({"data_directory": str(tmp_path), **arguments})


@needs_ray
@pytest.mark.soak
def test_serve_run_offers_sessions_jobs_and_the_page_to_those_with_a_key(tmp_path: Path) -> None:
    port, directory = free_port(), Path(tempfile.mkdtemp("", "rf", "/tmp"))
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    keys.chmod(0o600)
    arguments = {
        "data_directory": str(tmp_path / "data"), "device": "cpu", "replicas": 1, "memory_gb": 0.25,
        "api_key_file": str(keys),
    }  # fmt: skip
    application = {
        "name": "rfengine", "route_prefix": "/", "import_path": "rfengine.serving.ray_app:app",
        "args": arguments,
    }  # fmt: skip
    config = tmp_path / "config.yaml"  # JSON is YAML
    http = {"host": "127.0.0.1", "port": port}
    config.write_text(json.dumps({"http_options": http, "applications": [application]}))
    command = [sys.executable, "-m", "ray.serve.scripts", "run", "--address", "local", str(config)]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(directory), "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_TOKEN": "0" * 64,
    }  # fmt: skip
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT) as serve,
    ):
        try:
            use_through_proxy(serve, tmp_path / "log", f"http://127.0.0.1:{port}")
        finally:
            serve.send_signal(signal.SIGINT)
            try:
                serve.wait(60)
            finally:
                serve.kill()
    shutil.rmtree(directory, ignore_errors=True)


def use_through_proxy(serve: subprocess.Popen, log: Path, url: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while True:
        assert serve.poll() is None and time.monotonic() < deadline, log.read_text()
        try:
            if httpx2.get(url + "/readyz").status_code == 200:
                break
        except httpx2.TransportError:
            pass
        time.sleep(0.2)
    assert httpx2.get(url + "/").status_code == 401
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx2.Client(base_url=url, headers=headers, timeout=30) as http:
        assert "<!doctype html>" in http.get("/").text
        made = http.post("/v1/videos", json={"prompt": "a circle", "num_frames": 21}).json()
        websocket_url = url.replace("http", "ws", 1) + "/v1/realtime/video"
        with pytest.raises(InvalidStatus):
            connect(websocket_url)
        with connect(websocket_url, additional_headers=headers, max_size=None) as connection:
            client = RealtimeClient(connection)
            start = client.start(num_frames=33, record=True)
            assert client.finish()["reason"] == "finished" and client.closed() == 1000
        assert http.get(start["download_url"]).content[4:8] == b"ftyp"
        eventually(lambda: http.get(f"/v1/videos/{made['id']}").json()["status"] == "completed")
        assert http.get(f"/v1/videos/{made['id']}/content").content[4:8] == b"ftyp"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]
