"""Who may call the server: access keys, the origins and hosts that are served, and the size of a body."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import NoReturn

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rfengine.files import reading, text_lines
from rfengine.limits import shown
from rfengine.serving.errors import Fault, ServiceError, error_body

logger = logging.getLogger(__name__)

KEYS_VARIABLE = "RFENGINE_API_KEYS"
SUBPROTOCOL = "rfengine"
BEARER_SUBPROTOCOL = "rfengine.bearer."  # and the key in base64url: a browser sets no header at a handshake
COOKIE = "rfengine_access"
PUBLIC_PATHS = ("/livez", "/readyz")

SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (
        b"content-security-policy",
        b"default-src 'self'; media-src 'self' blob:; img-src 'self' blob: data:; connect-src 'self'; "
        b"style-src 'self'; script-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    ),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)

_KEY = re.compile(r"[!-~]{16,256}")
_SITE = re.compile(r"(https?)://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?")
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")
_SCHEMES = {"ws": "http", "wss": "https"}
_PORTS = {"http": 80, "https": 443}
_MOST_KEYS = 1000
_MOST_FILE_BYTES = 2**20
_MOST_COOKIES = 4  # of one name; pages of other ports of the host can set some too
_LENGTH_DIGITS = 18  # of a Content-Length that is read as a number
_CREDENTIAL_HEADERS = (b"authorization", b"cookie", b"sec-websocket-protocol")


@dataclass(frozen=True, slots=True)
class ClientIdentity:
    """Who sent a request. key_name: of ApiKeys, None without keys. address: of the sender, without port."""

    key_name: str | None
    address: str


@dataclass(frozen=True, slots=True)
class _Key:
    name: str
    digest: bytes
    token: str


@dataclass(frozen=True, slots=True)
class _Credential:
    """What a request was let in with. cookie: the Set-Cookie header of its response, where one is due."""

    key_name: str | None = None
    cookie: str | None = None


class ApiKeys:
    """The access keys of a server, kept as sha256 digests alone.

    Raises ValueError for no key, more than 1000, and one that is not 16 to 256 printable ASCII characters
    without spaces; the error names the key's place, never the key.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        secret = secrets.token_bytes(32)  # of this process: a cookie ends with it
        known: dict[bytes, _Key] = {}
        for number, key in enumerate(keys, 1):
            if not _KEY.fullmatch(key):
                raise ValueError(
                    f"access key {number} ({len(key)} characters) is not valid; use 16 to 256 printable "
                    "ASCII characters without spaces"
                )
            digest = hashlib.sha256(key.encode()).digest()
            token = hmac.digest(secret, digest, "sha256").hex()
            known[digest] = _Key(digest.hex()[:8], digest, token)
        if not 1 <= len(known) <= _MOST_KEYS:
            raise ValueError(f"there are {len(known)} access keys; give 1 to {_MOST_KEYS}")
        self._keys = tuple(known.values())

    @classmethod
    def from_file(cls, path: Path) -> ApiKeys:
        """The keys of a file: one on a line; blank lines and those that begin with # are skipped.

        Raises ValueError as ApiKeys does, for a file that cannot be read, and for one that others may read.
        """
        with reading(path) as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            if mode & 0o077:
                raise ValueError(
                    f"{path} has mode {mode:o}, so others can use the access keys; run: chmod 600 {path}"
                )
            content = file.read(_MOST_FILE_BYTES + 1)
        if len(content) > _MOST_FILE_BYTES:
            raise ValueError(f"{path} has more than {_MOST_FILE_BYTES} bytes; give a file of access keys")
        try:
            return cls(key_lines(content.decode("utf-8-sig", "replace")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> ApiKeys | None:
        """The keys of RFENGINE_API_KEYS, separated by commas; None where it is not set.

        Raises ValueError as ApiKeys does; a variable that is set and empty is an error too.
        """
        value = environment.get(KEYS_VARIABLE)
        if value is None:
            return None
        try:
            return cls(key.strip() for key in value.split(",") if key.strip())
        except ValueError as error:
            raise ValueError(f"{KEYS_VARIABLE}: {error}, or unset it") from None

    def identify(self, candidate: str) -> str | None:
        """The short name of a key, which stays the same over restarts; None where it is none of them."""
        digest = hashlib.sha256(candidate.encode("utf-8", "surrogatepass")).digest()
        return _find(digest, ((key.digest, key.name) for key in self._keys))

    def token(self, key_name: str) -> str:
        """What stands for a key in a cookie; it is good for this process alone and does not give the key."""
        return next(key.token for key in self._keys if key.name == key_name)

    def identify_token(self, token: str) -> str | None:
        """The name of the key that a token stands for; None for any other text."""
        given = token.encode("utf-8", "surrogatepass")
        return _find(given, ((key.token.encode(), key.name) for key in self._keys))


def key_lines(text: str) -> list[str]:
    """The keys in the text of a file: its lines, without blank ones and those that begin with #."""
    lines = [line.strip() for line in text_lines(text)]
    return [line for line in lines if line and not line.startswith("#")]


def _find(value: bytes, entries: Iterable[tuple[bytes, str]]) -> str | None:
    """The name beside an equal value; every entry is compared, so the time shows none of them."""
    found = None
    for known, name in entries:
        if hmac.compare_digest(known, value):
            found = name
    return found


def owner_of(scope: Scope) -> str | None:
    """The name of the key that a request came with, as AccessMiddleware left it; None without keys."""
    client = scope.get("state", {}).get("client")
    return None if client is None else client.key_name


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host: localhost, 127.0.0.0/8 or ::1, in brackets or not."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def check_bind(host: str, keys: ApiKeys | None, insecure: bool) -> None:
    """Raises ValueError for a server without keys that other machines could reach, unless `insecure`."""
    if keys is None and not insecure and not is_loopback(host):
        raise ValueError(
            f"host {shown(host)} can be reached by other machines and there is no access key; give keys "
            f"(--api-key-file or {KEYS_VARIABLE}), bind 127.0.0.1, or say --insecure"
        )


class AccessMiddleware:
    """Lets requests and WebSocket handshakes through to an ASGI application, or answers why not.

    app: gets scope["state"]["client"], a ClientIdentity, and scope["state"]["subprotocol"], which a route
    accepts a WebSocket with; headers and subprotocols with a credential are taken out of its scope.
    keys: None serves everybody who asks for a loopback host or one of `allowed_hosts` (names or addresses,
    without port), so a name that an attacker points here is not served.
    allowed_origins: scheme://host[:port] of pages that may call beside the server's own.
    public_paths: need no key, and have neither host nor origin checked.

    Raises ValueError for an allowed origin or host that is malformed.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: ApiKeys | None,
        max_body_bytes: int,
        allowed_origins: tuple[str, ...] = (),
        allowed_hosts: tuple[str, ...] = (),
        public_paths: tuple[str, ...] = PUBLIC_PATHS,
    ) -> None:
        for origin in allowed_origins:
            if _site(origin) is None:
                raise ValueError(f"{shown(origin)} is no origin; use scheme://host or scheme://host:port")
        for host in allowed_hosts:
            if not _HOST.fullmatch(host.lower()):
                raise ValueError(f"{shown(host)} is no host; use a name or an address, without port")
        self._app = app
        self._keys = keys
        self._max_body_bytes = max_body_bytes
        self._origins = frozenset(map(_site, allowed_origins))
        self._hosts = frozenset(host.lower() for host in allowed_hosts)
        self._public_paths = frozenset(public_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, as ASGI has it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        address = (scope.get("client") or ("unknown",))[0]
        try:
            credential = self._admit(scope)
        except ServiceError as error:
            fields = {"code": error.fault.code, "path": scope["path"], "address": address}
            logger.info("refused a request: %s", error.fault.code, extra={"fields": fields})
            await refuse(error.fault, scope, receive, _with_headers(send, None))
            return
        state = scope.setdefault("state", {})
        state["client"] = ClientIdentity(credential.key_name, address)
        offered = scope.get("subprotocols", ())
        state["subprotocol"] = SUBPROTOCOL if SUBPROTOCOL in offered else None
        scope["headers"] = [pair for pair in scope["headers"] if pair[0].lower() not in _CREDENTIAL_HEADERS]
        send = _with_headers(send, credential.cookie)
        if scope["type"] == "websocket":
            scope["subprotocols"] = [name for name in offered if not name.startswith(BEARER_SUBPROTOCOL)]
            await self._app(scope, receive, send)
            return
        body = _LimitedBody(scope, receive, send, self._max_body_bytes)
        try:
            await self._app(scope, body.receive, body.send)
        except ClientDisconnect:
            if not body.answered:
                raise

    def _admit(self, scope: Scope) -> _Credential:
        """Raises ServiceError for a request that is not served."""
        if scope["type"] == "http" and scope["path"] in self._public_paths:
            credential = _Credential()
        else:
            self._check_host(scope)
            self._check_origin(scope)
            credential = _Credential() if self._keys is None else _credential(scope, self._keys)
        for length in _values(scope, b"content-length"):
            if length.isdecimal() and (len(length) > _LENGTH_DIGITS or int(length) > self._max_body_bytes):
                raise ServiceError(_too_large(self._max_body_bytes))
        return credential

    def _check_host(self, scope: Scope) -> None:
        if self._keys is not None:
            return
        own = _own_site(scope)
        host = own[1].strip("[]") if own else ""
        if not is_loopback(host) and host not in self._hosts:
            _forbid("foreign_host", f"the host {shown(host)} is not served; use localhost, or --allow-host")

    def _check_origin(self, scope: Scope) -> None:
        origins = _values(scope, b"origin")
        if origins:
            site = _site(origins[0]) if len(origins) == 1 else None
            if site is None or (site != _own_site(scope) and site not in self._origins):
                origin = shown(origins[0])
                _forbid(
                    "foreign_origin", f"the origin {origin} is not served; use the server's page or allow it"
                )
        elif _is_from_another_site(scope):
            _forbid("foreign_origin", "a page of another site sent the request; use the server's page")


def _forbid(code: str, message: str) -> NoReturn:
    raise ServiceError(Fault(code, message, status=403))


def _credential(scope: Scope, keys: ApiKeys) -> _Credential:
    """Raises ServiceError for a request without a valid key. An Authorization header alone decides, where
    there is one."""
    of_cookie = _key_of_cookie(scope, keys)
    cookie = None
    if headers := _values(scope, b"authorization"):
        scheme, key = _scheme_and_key(headers)
        name = keys.identify(key)
        if name and scheme == "basic" and name != of_cookie:
            secure = "; Secure" if _own_scheme(scope) == "https" else ""
            cookie = f"{COOKIE}={keys.token(name)}; HttpOnly; SameSite=Strict; Path=/{secure}"
    elif offered := [name for name in scope.get("subprotocols", ()) if name.startswith(BEARER_SUBPROTOCOL)]:
        text = offered[0].removeprefix(BEARER_SUBPROTOCOL)
        name = keys.identify(_decoded(text + "=" * (-len(text) % 4), b"-_"))
    else:
        name = of_cookie
    if name is None:
        message = "the request has no valid access key; send it as Authorization: Bearer KEY"
        raise ServiceError(Fault("unauthorized", message, status=401))
    return _Credential(name, cookie)


def _key_of_cookie(scope: Scope, keys: ApiKeys) -> str | None:
    cookies = ";".join(_values(scope, b"cookie")).split(";")
    pairs = (cookie.strip().partition("=") for cookie in cookies)
    tokens = [value for name, _, value in pairs if name == COOKIE]
    return next(filter(None, map(keys.identify_token, tokens[:_MOST_COOKIES])), None)


def _scheme_and_key(headers: list[str]) -> tuple[str, str]:
    """What an Authorization header says; an empty key where it has none, or there are several headers."""
    scheme, _, value = headers[0].strip().partition(" ")
    scheme, value = scheme.lower(), value.strip()
    if len(headers) > 1 or scheme not in ("basic", "bearer"):
        return scheme, ""
    return scheme, value if scheme == "bearer" else _decoded(value).partition(":")[2]


def _decoded(text: str, altchars: bytes | None = None) -> str:
    """The text that base64 stands for; empty where it is malformed."""
    try:
        return base64.b64decode(text, altchars, validate=True).decode("latin-1")
    except ValueError:
        return ""


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]


def _own_scheme(scope: Scope) -> str:
    scheme = scope.get("scheme", "http")
    return _SCHEMES.get(scheme, scheme)


def _own_site(scope: Scope) -> tuple[str, str, int] | None:
    """Scheme, host and port that the client asked for; None where it names no host, or several."""
    hosts = _values(scope, b"host")
    return _site(f"{_own_scheme(scope)}://{hosts[0]}") if len(hosts) == 1 else None


def _site(origin: str) -> tuple[str, str, int] | None:
    """Scheme, host and port of an origin; None where it is malformed, or `null`."""
    match = _SITE.fullmatch(origin.lower())
    return match and (match[1], match[2], int(match[3] or _PORTS[match[1]]))


def _is_from_another_site(scope: Scope) -> bool:
    """Whether a browser marks the request as another site's, unless it follows a link."""
    foreign = {"cross-site", "same-site"} & set(_values(scope, b"sec-fetch-site"))
    link = scope.get("method") in ("GET", "HEAD") and _values(scope, b"sec-fetch-mode") == ["navigate"]
    return bool(foreign) and not link


def _too_large(most_bytes: int) -> Fault:
    message = f"the body has more than {most_bytes} bytes; send a smaller one"
    return Fault("body_too_large", message, status=413)


def _with_headers(send: Send, cookie: str | None) -> Send:
    """`send` with SECURITY_HEADERS in every response, and a cookie where there is one to set."""
    own = {name for name, _ in SECURITY_HEADERS}
    added = [*SECURITY_HEADERS, *([(b"set-cookie", cookie.encode())] if cookie else [])]

    async def send_with_headers(message: Message) -> None:
        if message["type"].endswith("http.response.start"):  # of a refused WebSocket too
            kept = [pair for pair in message.get("headers", ()) if pair[0].lower() not in own]
            message = {**message, "headers": kept + added}
        await send(message)

    return send_with_headers


async def refuse(fault: Fault, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with a fault; a WebSocket before it is accepted."""
    kind = "http.response"
    if scope["type"] == "websocket":
        await receive()  # websocket.connect
        if "websocket.http.response" not in (scope.get("extensions") or {}):
            await send({"type": "websocket.close", "code": 1008, "reason": fault.code})
            return
        kind = "websocket.http.response"
    body = json.dumps(error_body(fault)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if fault.status == 401:
        headers.append((b"www-authenticate", b'Basic realm="rfengine"'))
    if fault.status == 413:
        headers.append((b"connection", b"close"))  # so the rest of the body is not read
    await send({"type": f"{kind}.start", "status": fault.status, "headers": headers})
    await send({"type": f"{kind}.body", "body": body})


class _LimitedBody:
    """The two ends of one request, whose body is counted as it comes and cut with an answer of 413.

    The application then sees a disconnect, and what it still sends goes nowhere.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, most_bytes: int) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._most_bytes = most_bytes
        self._bytes = 0
        self._started = False
        self.answered = False

    async def receive(self) -> Message:
        if self._bytes > self._most_bytes:
            return {"type": "http.disconnect"}
        message = await self._receive()
        self._bytes += len(message.get("body", b""))
        if self._bytes <= self._most_bytes:
            return message
        if not self._started:
            self.answered = True
            await refuse(_too_large(self._most_bytes), self._scope, self._receive, self._send)
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if not self.answered:
            self._started = True
            await self._send(message)
