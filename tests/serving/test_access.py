"""Who is served and who is not, over HTTP and at the WebSocket handshake, by raw ASGI and a real server."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from rfengine.serving.access import (
    SECURITY_HEADERS,
    AccessMiddleware,
    ApiKeys,
    ClientIdentity,
    check_bind,
)

KEY = "0123456789abcdef:!"  # a key may hold a colon, which separates a name from a password
OTHER_KEY = "?>" * 8 + "?"  # its base64 has a /, which is _ in a subprotocol, and padding
WRONG = "wrong" * 5
LIMIT = 1000  # bytes of a body
STUDIO = "https://studio.example"


@dataclass
class App:
    """The application behind: reads the body, answers 200 or accepts, and keeps what it was given."""

    scopes: list[dict[str, Any]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    headers: tuple[tuple[bytes, bytes], ...] = ()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(dict(scope))
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept", "subprotocol": scope["state"]["subprotocol"]})
        if scope["type"] != "http":
            return
        body, message = b"", {"more_body": True}
        while message.get("more_body"):
            message = await receive()
            body += message.get("body", b"")
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": list(self.headers)})
        await send({"type": "http.response.body", "body": b"served"})


@dataclass
class Answer:
    """What was sent for one request."""

    messages: list[dict[str, Any]]

    @property
    def accepted(self) -> bool:
        return self.messages[0]["type"] == "websocket.accept"

    @property
    def status(self) -> int:
        return self.messages[0].get("status", 0)

    def header(self, name: str) -> str:
        values = [v.decode() for n, v in self.messages[0].get("headers", ()) if n == name.encode()]
        assert len(values) < 2
        return values[0] if values else ""

    @property
    def cookie(self) -> str:
        return self.header("set-cookie").partition(";")[0]

    @property
    def fault(self) -> tuple[int, str]:
        """Status and code of a typed error; its body must have OpenAI's shape and the length that is said."""
        start, end = self.messages
        assert self.header("content-type") == "application/json"
        assert self.header("content-length") == str(len(end["body"]))
        error = json.loads(end["body"])["error"]
        assert set(error) == {"code", "message", "type", "param", "retryable"}
        assert (error["type"], error["param"], error["retryable"]) == ("invalid_request_error", None, False)
        return start["status"], error["code"]


UNAUTHORIZED = (401, "unauthorized")
FOREIGN_ORIGIN = (403, "foreign_origin")
FOREIGN_HOST = (403, "foreign_host")
TOO_LARGE = (413, "body_too_large")


class Caller:
    """Sends requests through the middleware to an App."""

    def __init__(self, *keys: str, app: Any = None, **options: Any) -> None:
        self.keys = ApiKeys(keys) if keys else None
        self.app = app or App()
        self.middleware = AccessMiddleware(self.app, self.keys, LIMIT, **options)

    def call(
        self,
        *headers: tuple[str, str],
        host: str | None = "localhost:8000",
        chunks: tuple[bytes, ...] = (b"",),
        **scope: Any,
    ) -> Answer:
        pairs = [("host", host), *headers] if host is not None else headers
        whole = {
            "type": "http", "method": "GET", "path": "/v1/videos", "scheme": "http", "query_string": b"",
            "client": ("10.0.0.7", 5000), "headers": [(n.encode(), v.encode()) for n, v in pairs], **scope,
        }  # fmt: skip
        waiting: list[dict[str, Any]] = [
            {"type": "http.request", "body": chunk, "more_body": number < len(chunks)}
            for number, chunk in enumerate(chunks, 1)
        ]
        if whole["type"] == "websocket":
            waiting = [{"type": "websocket.connect"}]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return waiting.pop(0)

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        asyncio.run(self.middleware(whole, receive, send))
        assert not waiting or whole["type"] == "http"  # a handshake is taken before it is answered
        return Answer(sent)

    def handshake(self, *headers: tuple[str, str], offered: tuple[str, ...] = (), **scope: Any) -> Answer:
        if offered:
            headers = (*headers, ("sec-websocket-protocol", ", ".join(offered)))
        own = {"type": "websocket", "scheme": "ws", "extensions": {"websocket.http.response": {}}}
        return self.call(*headers, **own | {"subprotocols": list(offered)} | scope)


def basic(key: str, name: str = "anybody") -> tuple[str, str]:
    return "authorization", "Basic " + base64.b64encode(f"{name}:{key}".encode()).decode()


def bearer(key: str) -> tuple[str, str]:
    return "authorization", f"Bearer {key}"


def bearer_subprotocol(key: str) -> str:
    return "rfengine.bearer." + base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")


def key_file(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture
def keyed() -> Caller:
    return Caller(KEY, OTHER_KEY)


# keys


def test_keys_are_the_lines_of_a_file_that_are_no_comment(tmp_path: Path) -> None:
    text = f"# of Ann\n{KEY}\r\n\n  {OTHER_KEY}  \n#{'c' * 20}\n"
    keys = ApiKeys.from_file(key_file(tmp_path / "keys", text))
    assert keys.identify(KEY) and keys.identify(OTHER_KEY)
    assert keys.identify("c" * 20) is keys.identify("#" + "c" * 20) is None


def test_name_of_a_key_is_short_stable_and_its_own() -> None:
    first, second = ApiKeys([KEY, OTHER_KEY]), ApiKeys([OTHER_KEY, KEY])
    names = {first.identify(KEY), first.identify(OTHER_KEY)}
    assert names == {second.identify(KEY), second.identify(OTHER_KEY)}
    assert len(names) == 2 and all(len(name or "") == 8 for name in names)


def test_candidate_that_is_no_key_has_no_name() -> None:
    for candidate in ("", KEY[:-1], KEY + "x", KEY.upper(), "né" * 9, "\udc80", "\0" * 16):
        assert ApiKeys([KEY]).identify(candidate) is None


def test_keys_hold_no_key() -> None:
    assert KEY not in repr(vars(ApiKeys([KEY])))


@pytest.mark.parametrize("key", ["short", "k" * 15, "k" * 257, "with a space in it", "ключ" * 8, "tab\t" * 8])
def test_key_that_is_short_long_or_not_plain_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(ValueError, match="access key 2 .* 16 to 256 printable ASCII") as error:
        ApiKeys([KEY, key])
    assert key not in str(error.value)


def test_key_file_that_others_can_use_is_refused(tmp_path: Path) -> None:
    for mode in (0o644, 0o640, 0o620, 0o601):
        with pytest.raises(ValueError, match="chmod 600"):
            ApiKeys.from_file(key_file(tmp_path / "keys", KEY, mode))


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "0 access keys"), ("# comment\n\n", "0 access keys"), ("x" * (2**20 + 1), "1048576 bytes"),
     (f"{KEY}\nshort\n", "access key 2"), ("ÿ" * 20, "printable ASCII")],
)  # fmt: skip
def test_key_file_without_good_keys_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ApiKeys.from_file(key_file(tmp_path / "keys", text))


def test_keys_of_the_environment_are_separated_by_commas() -> None:
    keys = ApiKeys.from_environment({"RFENGINE_API_KEYS": f"{KEY}, {OTHER_KEY},"})
    assert keys and keys.identify(KEY) and keys.identify(OTHER_KEY)
    assert ApiKeys.from_environment({}) is None


def test_environment_without_a_good_key_is_an_error_and_not_a_server_without_keys() -> None:
    for value in ("", " , ", "short"):
        with pytest.raises(ValueError, match="RFENGINE_API_KEYS: .*unset it"):
            ApiKeys.from_environment({"RFENGINE_API_KEYS": value})


def test_server_without_keys_binds_loopback_alone() -> None:
    for host in ("localhost", "LocalHost", "127.0.0.1", "127.9.8.7", "::1", "[::1]"):
        check_bind(host, None, insecure=False)
    for host in ("0.0.0.0", "::", "", "192.168.1.5", "localhost.evil.example", "127.0.0.1.evil.example"):
        with pytest.raises(ValueError, match="bind 127.0.0.1"):
            check_bind(host, None, insecure=False)
        check_bind(host, ApiKeys([KEY]), insecure=False)
        check_bind(host, None, insecure=True)


# credentials


def test_key_in_an_authorization_header_is_served(keyed: Caller) -> None:
    spaced = ("authorization", f"bEaReR   {KEY}")
    for header in (bearer(KEY), spaced, basic(KEY), basic(KEY, name=""), bearer(OTHER_KEY)):
        assert keyed.call(header).status == 200
        assert keyed.handshake(header).accepted


@pytest.mark.parametrize(
    "headers",
    [
        [], [bearer(WRONG)], [bearer("")], [basic(WRONG)], [basic("", name=KEY)], [("authorization", KEY)],
        [("authorization", f"Digest {KEY}")], [("authorization", "Basic ???")], [bearer(KEY), bearer(WRONG)],
        [bearer(WRONG), bearer(KEY)], [("cookie", f"rfengine_access={KEY}")], [("x-api-key", KEY)],
        [("sec-websocket-protocol", bearer_subprotocol(KEY))],
        [("authorization", basic(KEY)[1].removesuffix("="))], [("authorization", basic(KEY)[1] + "!")],
    ],
)  # fmt: skip
def test_request_without_a_key_is_unauthorized(keyed: Caller, headers: list[tuple[str, str]]) -> None:
    answer = keyed.call(*headers, query_string=f"key={KEY}&access_token={KEY}".encode())
    assert answer.fault == UNAUTHORIZED
    assert answer.header("www-authenticate") == 'Basic realm="rfengine"'
    assert answer.cookie == "" and keyed.app.scopes == []


@given(value=st.binary(max_size=60), scheme=st.sampled_from(["", "Basic ", "Bearer "]))
def test_any_bytes_as_authorization_are_refused_and_never_fail(value: bytes, scheme: str) -> None:
    assert Caller(KEY).call(("authorization", scheme + value.decode("latin-1"))).status == 401


def test_basic_key_is_answered_with_a_cookie_that_serves_without_the_key(keyed: Caller) -> None:
    first = keyed.call(basic(KEY))
    assert first.header("set-cookie") == f"{first.cookie}; HttpOnly; SameSite=Strict; Path=/"
    assert first.cookie.startswith("rfengine_access=") and KEY not in first.cookie
    several = ("cookie", f"a=b; rfengine_access=other; {first.cookie}")
    answer = keyed.call(several)
    assert answer.status == 200 and answer.cookie == ""
    assert keyed.app.scopes[-1]["state"]["client"].key_name == keyed.keys.identify(KEY)
    assert keyed.handshake(several).accepted
    assert keyed.call(basic(KEY), scheme="https").header("set-cookie").endswith("; Secure")


def test_cookie_is_set_only_where_basic_authentication_brought_another_key(keyed: Caller) -> None:
    cookie = keyed.call(basic(KEY)).cookie
    assert keyed.call(bearer(KEY)).cookie == keyed.call(basic(KEY), ("cookie", cookie)).cookie == ""
    assert keyed.call(basic(OTHER_KEY), ("cookie", cookie)).cookie not in ("", cookie)


def test_cookie_of_another_process_and_one_beside_a_wrong_key_are_refused(keyed: Caller) -> None:
    cookie = ("cookie", keyed.call(basic(KEY)).cookie)
    assert Caller(KEY).call(cookie).fault == UNAUTHORIZED
    assert keyed.call(cookie, bearer(WRONG)).fault == UNAUTHORIZED


def test_application_learns_who_calls_and_gets_no_credential(keyed: Caller) -> None:
    cookie = keyed.call(basic(KEY)).cookie
    keyed.call(bearer(KEY), ("cookie", cookie), ("accept", "text/html"), state={"service": 1})
    scope = keyed.app.scopes[-1]
    assert scope["state"]["client"] == ClientIdentity(keyed.keys.identify(KEY), "10.0.0.7")
    assert scope["state"]["service"] == 1
    assert scope["headers"] == [(b"host", b"localhost:8000"), (b"accept", b"text/html")]
    unkeyed = Caller()
    unkeyed.call(client=None)
    assert unkeyed.app.scopes[0]["state"]["client"] == ClientIdentity(None, "unknown")


@pytest.mark.parametrize("keys", [(), (KEY,)])
def test_health_needs_neither_key_nor_host_nor_origin(keys: tuple[str, ...]) -> None:
    foreign = (("origin", "https://evil.example"), ("sec-fetch-site", "cross-site"))
    for path in ("/livez", "/readyz"):
        assert Caller(*keys).call(*foreign, path=path, host="evil.example", method="POST").status == 200


def test_path_that_only_resembles_a_public_one_needs_a_key(keyed: Caller) -> None:
    for path in ("/livez/", "/livez/../v1/videos", "/Livez", "//livez", "/metrics", "/"):
        assert keyed.call(path=path).fault == UNAUTHORIZED
    assert keyed.handshake(path="/livez").fault == UNAUTHORIZED


def test_lifespan_goes_through_untouched(keyed: Caller) -> None:
    asyncio.run(keyed.middleware({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert keyed.app.scopes == [{"type": "lifespan"}]


@pytest.mark.parametrize("others", [("rfengine",), (), ("another", "rfengine")])
def test_key_as_a_subprotocol_is_served_and_is_never_the_accepted_one(
    keyed: Caller, others: tuple[str, ...]
) -> None:
    assert keyed.handshake(offered=(bearer_subprotocol(OTHER_KEY), *others)).accepted
    answer = keyed.handshake(offered=(bearer_subprotocol(KEY), *others))
    accepted = "rfengine" if "rfengine" in others else None
    assert answer.messages == [{"type": "websocket.accept", "subprotocol": accepted}]
    scope = keyed.app.scopes[-1]
    assert scope["subprotocols"] == list(others) and scope["headers"] == [(b"host", b"localhost:8000")]
    assert scope["state"]["client"].key_name == keyed.keys.identify(KEY)


def test_handshake_without_a_key_is_answered_as_http(keyed: Caller) -> None:
    empty, no_base64 = "rfengine.bearer.", "rfengine.bearer.%%%"
    for offered in ("rfengine", empty, no_base64, bearer_subprotocol(WRONG), KEY):
        answer = keyed.handshake(offered=(offered,), query_string=f"key={KEY}".encode())
        types = [message["type"] for message in answer.messages]
        assert types == ["websocket.http.response.start", "websocket.http.response.body"]
        assert answer.fault == UNAUTHORIZED
        assert answer.header("www-authenticate") and answer.header("x-content-type-options") == "nosniff"


def test_handshake_is_closed_where_the_server_cannot_answer_it_as_http(keyed: Caller) -> None:
    answer = keyed.handshake(extensions={})
    assert answer.messages == [{"type": "websocket.close", "code": 1008, "reason": "unauthorized"}]


# origins and hosts


@pytest.mark.parametrize(
    ("origin", "host", "scheme"),
    [
        ("http://localhost:8000", "localhost:8000", "http"), ("HTTP://LocalHost", "localhost:80", "http"),
        ("https://127.0.0.1", "127.0.0.1:443", "https"), ("http://[::1]:8000", "[::1]:8000", "http"),
        (STUDIO, "localhost:8000", "http"),  # it is allowed
    ],
)  # fmt: skip
def test_own_and_allowed_origins_are_served(origin: str, host: str, scheme: str) -> None:
    caller = Caller(allowed_origins=(STUDIO,))
    headers = (("origin", origin), ("sec-fetch-site", "cross-site"))  # of an allowed page this is so
    assert caller.call(*headers, host=host, scheme=scheme, method="POST").status == 200
    assert caller.handshake(*headers, host=host, scheme={"http": "ws", "https": "wss"}[scheme]).accepted


@pytest.mark.parametrize(
    "origin",
    [
        "null", "", "*", "http://evil.example", "https://localhost:8000", "http://localhost:8001",
        "http://localhost", "http://127.0.0.1:8000", "http://localhost:8000.evil.example", "localhost:8000",
        "http://localhost:8000@evil.example", "http://localhost:8000/", "http://localhost:8000 http://a.example",
        "http://studio.example", f"{STUDIO}.evil.example", f"{STUDIO}:444",
    ],
)  # fmt: skip
@pytest.mark.parametrize("keys", [(), (KEY,)])
def test_other_origins_are_refused_with_a_key_too(origin: str, keys: tuple[str, ...]) -> None:
    caller = Caller(*keys, allowed_origins=(STUDIO,))
    for method in ("GET", "POST", "OPTIONS"):
        assert caller.call(("origin", origin), bearer(KEY), method=method).fault == FOREIGN_ORIGIN
    assert caller.handshake(("origin", origin), bearer(KEY)).fault == FOREIGN_ORIGIN
    assert caller.app.scopes == []


def test_two_origins_or_two_hosts_are_refused() -> None:
    origin = ("origin", "http://localhost:8000")
    assert Caller().call(origin, origin).fault == FOREIGN_ORIGIN
    assert Caller().call(("host", "localhost:8000")).fault == FOREIGN_HOST


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1", "", None, "a b",
     "[::2]", "localhost@evil.example", "studio.example.evil.example"],
)  # fmt: skip
def test_foreign_host_is_refused_without_keys(host: str | None) -> None:
    # a name that is pointed at this machine makes a stranger's page one of the same origin
    caller = Caller(allowed_hosts=("studio.example",))
    for headers in ((), (("origin", f"http://{host}"),)):
        assert caller.call(*headers, host=host).fault == FOREIGN_HOST
        assert caller.handshake(*headers, host=host).fault == FOREIGN_HOST


def test_loopback_and_allowed_hosts_are_served_without_keys() -> None:
    caller = Caller(allowed_hosts=("Studio.example", "fd00::5"))
    for host in ("localhost", "LOCALHOST:8000", "127.1.2.3", "[::1]:8000", "studio.example:80", "[fd00::5]"):
        assert caller.call(host=host).status == 200


def test_any_host_is_served_with_keys(keyed: Caller) -> None:
    assert keyed.call(bearer(KEY), host="any.example").status == 200


def test_page_of_another_site_may_only_link_here() -> None:
    caller, link = Caller(), ("sec-fetch-mode", "navigate")
    for foreign in (("sec-fetch-site", "cross-site"), ("sec-fetch-site", "same-site")):
        assert caller.call(foreign, link).status == 200
        for method in ("POST", "DELETE", "PATCH"):
            assert caller.call(foreign, link, method=method).fault == FOREIGN_ORIGIN
            assert caller.call(("sec-fetch-site", "same-origin"), method=method).status == 200
        assert caller.call(foreign, ("sec-fetch-mode", "no-cors")).fault == FOREIGN_ORIGIN
        assert caller.handshake(foreign, ("sec-fetch-mode", "websocket")).fault == FOREIGN_ORIGIN


def test_allowed_origin_or_host_that_is_none_is_an_error() -> None:
    for origin in ("*", "null", "studio.example", f"{STUDIO}/", "https://*.example"):
        with pytest.raises(ValueError, match="is no origin"):
            Caller(allowed_origins=(origin,))
    for host in ("*", "studio.example:8000", STUDIO, ""):
        with pytest.raises(ValueError, match="is no host"):
            Caller(allowed_hosts=(host,))


# bodies


def test_body_up_to_the_limit_is_served() -> None:
    caller = Caller()
    assert caller.call(("content-length", str(LIMIT)), method="POST", chunks=(b"x" * LIMIT,)).status == 200
    assert caller.call(method="POST", chunks=(b"x" * 600, b"x" * 400)).status == 200
    assert caller.app.bodies == [b"x" * LIMIT] * 2


def test_declared_length_above_the_limit_is_refused_before_anything_is_read() -> None:
    caller = Caller()
    for length, path in ((LIMIT + 1, "/v1/videos"), (LIMIT + 1, "/livez"), ("9" * 5000, "/livez")):
        answer = caller.call(("content-length", str(length)), method="POST", path=path, chunks=())
        assert answer.fault == TOO_LARGE and answer.header("connection") == "close"
    assert caller.app.scopes == []


def test_body_that_grows_above_the_limit_is_cut_and_the_application_answers_no_more() -> None:
    caller = Caller()
    answer = caller.call(method="POST", chunks=(b"x" * 600, b"y" * 600, b"z" * 600))
    assert answer.fault == TOO_LARGE and answer.header("referrer-policy") == "no-referrer"
    assert caller.app.bodies == [b"x" * 600]


def test_application_that_reads_on_sees_the_cut_again_and_its_own_answer_only_if_it_had_begun() -> None:
    seen: list[str] = []

    async def stubborn(scope: Any, receive: Any, send: Any) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": []}
        if scope["path"] == "/early":
            await send(start)
        seen.extend([(await receive())["type"], (await receive())["type"]])
        if scope["path"] != "/early":
            await send(start)
        await send({"type": "http.response.body", "body": b"end"})

    chunks = (b"x" * 1200, b"x")
    assert Caller(app=stubborn).call(method="POST", chunks=chunks).fault == TOO_LARGE
    begun = Caller(app=stubborn).call(method="POST", chunks=chunks, path="/early")
    assert (begun.status, begun.messages[1]["body"], len(begun.messages)) == (200, b"end", 2)
    assert seen == ["http.disconnect"] * 4


def test_cut_body_is_no_error_of_the_server_and_another_fault_is() -> None:
    async def upload(request: Request) -> Response:
        return Response(await request.body())

    app = Starlette(routes=[Route("/v1/videos", upload, methods=["POST"])])
    assert Caller(app=app).call(method="POST", chunks=(b"x" * 600, b"x" * 600)).fault == TOO_LARGE

    async def failing(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Caller(app=failing).call()


# answers


def test_every_response_has_the_security_headers_once(keyed: Caller) -> None:
    keyed.app.headers = ((b"X-Content-Type-Options", b"sniff"), (b"etag", b"1"))
    for answer in (keyed.call(bearer(KEY)), keyed.call(), keyed.call(path="/livez")):
        assert set(answer.messages[0]["headers"]) >= set(SECURITY_HEADERS)
    assert keyed.call(bearer(KEY)).messages[0]["headers"] == [(b"etag", b"1"), *SECURITY_HEADERS]


def test_page_runs_its_own_scripts_alone_and_stands_in_no_frame() -> None:
    policy = dict(SECURITY_HEADERS)[b"content-security-policy"].decode()
    sources = {name: values for name, *values in map(str.split, policy.split(";"))}
    assert sources["default-src"] == sources["script-src"] == sources["connect-src"] == ["'self'"]
    assert sources["frame-ancestors"] == sources["base-uri"] == ["'none'"]
    assert {name for values in sources.values() for name in values} == {"'self'", "'none'", "blob:", "data:"}


def test_no_response_lets_another_origin_read_it() -> None:
    caller = Caller(allowed_origins=(STUDIO,))
    for origin in (STUDIO, "null"):
        for method in ("GET", "OPTIONS"):
            headers = caller.call(("origin", origin), method=method).messages[0]["headers"]
            assert not [name for name, _ in headers if b"access-control" in name]


def test_refusal_is_logged_without_the_credential(keyed: Caller, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "rfengine.serving.access"):
        keyed.call(bearer(WRONG), ("cookie", f"rfengine_access={WRONG}"), query_string=WRONG.encode())
    (record,) = caplog.records
    assert record.__dict__["fields"] == {"code": "unauthorized", "path": "/v1/videos", "address": "10.0.0.7"}
    assert WRONG not in repr(vars(record))


@contextmanager
def served(middleware: AccessMiddleware) -> Iterator[int]:
    """The port of a real server in a thread."""
    config = uvicorn.Config(middleware, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def test_real_server_refuses_and_accepts_handshakes_and_bodies() -> None:
    async def hello(request: Request) -> Response:
        return JSONResponse([request.state.client.key_name, len(await request.body())])

    async def talk(websocket: WebSocket) -> None:
        await websocket.accept(websocket.state.subprotocol)
        await websocket.send_text(websocket.state.client.key_name)
        await websocket.close()

    app = Starlette(routes=[Route("/", hello, methods=["GET", "POST"]), WebSocketRoute("/ws", talk)])
    name = ApiKeys([KEY]).identify(KEY)
    with served(Caller(KEY, app=app).middleware) as port:
        address, own = f"ws://127.0.0.1:{port}/ws", f"http://127.0.0.1:{port}"
        for origin, key, status in ((own, WRONG, 401), (STUDIO, KEY, 403)):
            offered: Any = [bearer_subprotocol(key), "rfengine"]
            with pytest.raises(InvalidStatus) as refused:
                connect(address, subprotocols=offered, origin=origin)  # type: ignore[arg-type]
            assert refused.value.response.status_code == status
            assert json.loads(refused.value.response.body or b"")["error"]["message"]
        offered = [bearer_subprotocol(KEY), "rfengine"]
        with connect(address, subprotocols=offered, origin=own) as websocket:  # type: ignore[arg-type]
            assert (websocket.subprotocol, websocket.recv()) == ("rfengine", name)

        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/", headers=dict([basic(KEY)]))
        answer = connection.getresponse()
        assert json.loads(answer.read()) == [name, 0]
        cookie = (answer.getheader("set-cookie") or "").partition(";")[0]
        blocks = iter([b"x" * 600, b"x" * 600])
        connection.request("POST", "/", body=blocks, headers={"Cookie": cookie}, encode_chunked=True)
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["error"]["code"]) == TOO_LARGE
        connection.close()
