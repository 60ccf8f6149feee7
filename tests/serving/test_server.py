"""The application as a whole: who is let in at every route, what errors look like, and what operators see."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from starlette.routing import Mount, Route, WebSocketRoute
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from rfengine import Pipeline
from rfengine.serving.access import ApiKeys
from rfengine.serving.server import ServerOptions, create_app
from support.models import small_pipeline
from support.realtime import RealtimeClient
from support.servers import RunningServer, running_app, running_server
from support.sessions import eventually

KEY, OTHER_KEY = "first-key-0123456789", "second-key-0123456789"
PUBLIC = ("/livez", "/readyz")
START = {"prompt": "a circle", "num_frames": 21}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return small_pipeline()


@pytest.fixture(scope="module")
def open_server(pipe: Pipeline, tmp_path_factory) -> Iterator[RunningServer]:
    with running_server(pipe, tmp_path_factory.mktemp("open") / "data") as running:
        yield running


@pytest.fixture(scope="module")
def locked_server(pipe: Pipeline, tmp_path_factory) -> Iterator[RunningServer]:
    keys = ApiKeys([KEY, OTHER_KEY])
    with running_server(pipe, tmp_path_factory.mktemp("locked") / "data", keys=keys) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def routes_of(running: RunningServer) -> list[tuple[str, str]]:
    """Every method and path of the application, with something in place of each parameter."""
    found = []
    for route in walk(running.app.routes):
        if isinstance(route, Mount):
            found.append(("GET", route.path + "/style.css"))
        elif isinstance(route, Route):
            path = re.sub(r"{[^}]*}", "1", route.path)
            found += [(method, path) for method in sorted(route.methods or ())]
    return found


def walk(routes: list) -> Iterator[object]:
    for route in routes:
        inner = getattr(getattr(route, "original_router", None), "routes", None)
        if inner is None:
            yield route
        else:
            yield from walk(inner)


def websocket_paths(running: RunningServer) -> list[str]:
    return [route.path for route in walk(running.app.routes) if isinstance(route, WebSocketRoute)]


def played(websocket: ClientConnection, start: dict) -> dict:
    """Play a session to its end; returns its video.start."""
    client = RealtimeClient(websocket)
    begun = client.start(**start)
    client.finish()
    return begun


def is_typed(answer: httpx2.Response, code: str | None = None) -> bool:
    error = answer.json()["error"]
    assert set(error) == {"code", "message", "type", "param", "retryable"}
    assert "Traceback" not in answer.text and str(Path(__file__).parents[2]) not in answer.text
    return code is None or error["code"] == code


def test_every_route_is_known_to_these_tests(locked_server: RunningServer) -> None:
    paths = {path for _, path in routes_of(locked_server)}
    assert {"/", "/livez", "/readyz", "/metrics", "/v1/page/config", "/static/style.css"} <= paths
    assert "/v1/realtime/sessions/1/video.mp4" in paths
    assert websocket_paths(locked_server) == ["/v1/realtime/video"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong-key-0123456789"),
        {"Authorization": f"Basic {KEY}"},
        {"Cookie": f"rfengine_access={KEY}"},
        {"X-Api-Key": KEY},
    ],
)
def test_every_route_refuses_a_request_without_a_right_key(
    locked_server: RunningServer, headers: dict[str, str]
) -> None:
    for method, path in routes_of(locked_server):
        if path in PUBLIC:
            continue
        for target in (path, f"{path}?key={KEY}&api_key={KEY}"):
            answer = httpx2.request(method, locked_server.url + target, headers=headers)
            assert answer.status_code == 401, (method, target)
            if method != "HEAD":
                assert is_typed(answer, "unauthorized")


def test_every_route_refuses_a_foreign_origin_even_with_a_key(locked_server: RunningServer) -> None:
    for origin in ("https://example.org", "null", locked_server.url.replace("http", "https"), "file://"):
        for method, path in routes_of(locked_server):
            if path in PUBLIC:
                continue
            headers = bearer(KEY) | {"Origin": origin}
            answer = httpx2.request(method, locked_server.url + path, headers=headers)
            assert answer.status_code == 403, (method, path, origin)
            assert "access-control-allow-origin" not in answer.headers


def test_the_websocket_refuses_a_missing_key_a_wrong_key_and_a_foreign_origin(
    locked_server: RunningServer,
) -> None:
    url = locked_server.websocket_url
    refused = [
        ({}, 401),
        (bearer("wrong-key-0123456789"), 401),
        (bearer(KEY) | {"Origin": "https://example.org"}, 403),
    ]
    for headers, status in refused:
        with pytest.raises(InvalidStatus) as caught, connect(url, additional_headers=headers):
            pass
        assert caught.value.response.status_code == status
    with connect(url, additional_headers=bearer(KEY) | {"Origin": locked_server.url}) as websocket:
        websocket.send(json.dumps({"type": "session.start", **START}))
        assert json.loads(websocket.recv())["type"] == "video.start"


def test_a_server_is_alive_before_it_is_ready(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm = threading.Event()
    monkeypatch.setattr(type(pipe), "stream", lambda *arguments, **options: warm.wait(30) and iter(()))
    with running_app(create_app(pipe, ServerOptions(tmp_path / "data"))) as running:
        answer = httpx2.get(running.url + "/readyz")
        assert (answer.status_code, answer.json()) == (503, {"status": "warming up"})
        assert httpx2.get(running.url + "/livez").status_code == 200
        warm.set()


def test_health_needs_no_key_and_everything_else_is_served_with_one(locked_server: RunningServer) -> None:
    eventually(lambda: httpx2.get(locked_server.url + "/readyz").status_code == 200)
    assert httpx2.get(locked_server.url + "/livez").status_code == 200
    for path in ("/", "/static/style.css", "/metrics", "/v1/page/config", "/openapi.json"):
        answer = httpx2.get(locked_server.url + path, headers=bearer(KEY))
        assert answer.status_code == 200, path
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_key_does_not_see_the_sessions_of_another(locked_server: RunningServer) -> None:
    start = START | {"record": True, "hls": True}
    with connect(locked_server.websocket_url, additional_headers=bearer(KEY)) as websocket:
        begun = played(websocket, start)
        for path in (begun["download_url"], begun["hls_url"]):
            url = locked_server.url + path
            assert httpx2.get(url, headers=bearer(KEY)).status_code == 200
            answer = httpx2.get(url, headers=bearer(OTHER_KEY))
            assert answer.status_code == 404 and is_typed(answer, "not_found")


def test_errors_are_typed_json(open_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = "/v1/realtime/sessions/rt_" + "0" * 32
    cases = [
        ("GET", "/nothing", 404, "not_found"),
        ("DELETE", "/livez", 405, "method_not_allowed"),
        ("GET", "/v1/realtime/sessions/..%2f..%2fetc/video.mp4", 404, "not_found"),
        ("GET", "/v1/realtime/sessions/other/video.mp4", 400, "invalid_value"),
        ("GET", unknown + "/video.mp4", 404, "not_found"),
        ("GET", unknown + "/hls/playlist.m3u8", 404, "not_found"),
        ("GET", unknown + "/video.mp4?branch=-1", 400, "invalid_value"),
        ("GET", "/static/..%2fserver.py", 404, "not_found"),
    ]
    for method, path, status, code in cases:
        answer = httpx2.request(method, open_server.url + path)
        assert answer.status_code == status, path
        assert is_typed(answer, code), path
    large = httpx2.post(open_server.url + "/livez", content=b"x" * (2**20 + 1))
    assert large.status_code == 413 and is_typed(large, "body_too_large")


def test_an_error_of_the_server_shows_nothing_of_it(pipe: Pipeline, tmp_path: Path) -> None:
    app = create_app(pipe, ServerOptions(tmp_path / "data"))

    @app.get("/fails")
    def fails() -> None:
        raise KeyError("/secret/path")

    with running_app(app) as running:
        answer = httpx2.get(running.url + "/fails")
    assert answer.status_code == 500 and is_typed(answer, "internal_error") and "secret" not in answer.text


def test_metrics_count_what_happened_and_name_nobody(open_server: RunningServer) -> None:
    with connect(open_server.websocket_url) as websocket:
        begun = played(websocket, START)
    httpx2.get(open_server.url + "/v1/nothing", headers={"Origin": "https://example.org"})
    text = httpx2.get(open_server.url + "/metrics").text
    numbers = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(numbers['rfengine_admissions_total{outcome="admitted"}']) >= 1
    assert float(numbers['rfengine_session_ends_total{reason="finished"}']) >= 1
    assert float(numbers["rfengine_first_frame_seconds_count"]) >= 1
    assert float(numbers['rfengine_chunk_seconds_count{stage="encode"}']) >= 2
    assert float(numbers['rfengine_chunk_seconds_count{stage="denoise"}']) >= 2
    assert float(numbers['rfengine_memory_bytes{kind="budget"}']) > 0
    assert 'rfengine_http_requests_total{route="unmatched",status_class="4xx"}' in numbers
    assert begun["request_id"] not in text and "circle" not in text


def test_readiness_follows_the_warm_up_and_the_drain(pipe: Pipeline, tmp_path: Path) -> None:
    app = create_app(pipe, ServerOptions(tmp_path / "data"))
    with running_app(app) as running:
        eventually(lambda: httpx2.get(running.url + "/readyz").json() == {"status": "ready"})
        app.state.service.drain(1)
        answer = httpx2.get(running.url + "/readyz")
        assert (answer.status_code, answer.json()) == (503, {"status": "draining"})
        assert httpx2.get(running.url + "/livez").status_code == 200
        with connect(running.websocket_url) as websocket:
            websocket.send(json.dumps({"type": "session.start", **START}))
            error = json.loads(websocket.recv())
        assert (error["code"], error["retryable"], error["fatal"]) == ("draining", True, True)


def test_the_page_asks_no_other_host(open_server: RunningServer) -> None:
    page = httpx2.get(open_server.url + "/")
    assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    assert not re.search(r"(src|href)=\"(https?:)?//", page.text)
    config = httpx2.get(open_server.url + "/v1/page/config").json()
    assert config["fps"] == 16 and config["chunk_frames"] == 12 and config["model"] == "small"
