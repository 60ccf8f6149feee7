"""HttpRelay: a request of a client, asked of a replica."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING
from urllib.parse import quote

import aiohttp
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Scope

from rfengine.serving.access import ClientIdentity
from rfengine.serving.errors import Fault, ServiceError
from rfengine.serving.gateway_access import GATEWAY_HEADERS, gateway_headers
from rfengine.serving.replicas.choice import NO_ANSWER
from rfengine.serving.replicas.silence import IsSilent, unless_silent
from rfengine.serving.replicas.table import Replica

if TYPE_CHECKING:
    from yarl import URL

logger = logging.getLogger(__name__)

# of one connection, not of the message (RFC 9110, 7.6.1)
_HOP_BY_HOP = frozenset(
    {b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
     b"trailer", b"transfer-encoding", b"upgrade"}
)  # fmt: skip
_OF_PROXIES = frozenset({b"x-forwarded-for", b"x-forwarded-proto"})  # which the gateway has obeyed, or not
_NOT_SENT = _HOP_BY_HOP | _OF_PROXIES | GATEWAY_HEADERS | {b"content-length", b"expect"}
_NOT_PASSED_ON = _HOP_BY_HOP | {b"date"}  # which the gateway's own server adds
_OF_LIBRARY = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")  # that a client did not send
_ASKED_AGAIN = ("GET", "HEAD")
_CONNECT_S = 2.0
_READ_S = 300.0  # of a replica that makes a large file ready
_NUMBERS_S = 5.0
_MOST_HEADER_BYTES = 2**16  # of one, as a replica reads them: an answer may repeat the address
_READ_BYTES = 2**16
_RECEIVED_BYTES = 2**18  # that the kernel holds of a replica's answer


def new_session() -> aiohttp.ClientSession:
    """The connections to replicas; a body is passed on as it is, and takes as long as it comes."""
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_READ_S),
        # none is kept, since it may end just as it is used again
        connector=aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=_small_socket),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=_OF_LIBRARY,
        max_line_size=_MOST_HEADER_BYTES,
        max_field_size=_MOST_HEADER_BYTES,
    )


def _small_socket(place: aiohttp.AddrInfoType) -> socket.socket:
    """A socket with little room, so that a replica soon feels a client that does not read."""
    family, kind, protocol, _, _ = place
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVED_BYTES)
    return made


class HttpRelay:
    """Asks replicas with the connections of `session`, and proves itself to them by `secret`.

    is_silent: of one that does not answer any more, though its port is open.
    """

    def __init__(self, session: aiohttp.ClientSession, secret: str, is_silent: IsSilent) -> None:
        self._session, self._secret, self._is_silent = session, secret, is_silent

    async def ask(self, request: Request, replicas: Sequence[Replica], lost: Fault = NO_ANSWER) -> Response:
        """The answer of the first replica that is there.

        One that dies before it answers is followed by the next where nothing was sent, or asking twice does
        no harm. Raises ServiceError with `lost` where none answers, HTTPException for what is no path.
        """
        if not _raw_path(request.scope).startswith("/"):  # else it would be a part of the replica's address
            raise HTTPException(404)
        body, headers = await request.body(), _sent_on(request.scope)
        for replica in replicas:
            proof = gateway_headers(self._secret, replica.name, request.scope["state"]["client"])
            asking = self._session.request(
                request.method, _url_at(replica, request.scope), headers=headers + proof, data=body or None,
                allow_redirects=False,
            )  # fmt: skip
            try:
                answer = await unless_silent(asking, replica, self._is_silent)
            except aiohttp.ClientConnectorError:
                continue
            except (aiohttp.ClientError, TimeoutError) as error:
                logger.warning("replica %s did not answer: %s", replica.name, type(error).__name__)
                if request.method not in _ASKED_AGAIN:
                    break
                continue
            return _passed_on(answer)
        raise ServiceError(lost)

    async def text(self, replica: Replica, path: str, client: ClientIdentity) -> str | None:
        """What a replica answers to GET; None where it does not within a few seconds, or with an error."""
        headers, timeout = (
            gateway_headers(self._secret, replica.name, client),
            aiohttp.ClientTimeout(_NUMBERS_S),
        )
        url = f"http://{replica.address}{path}"
        try:
            async with self._session.get(url, headers=headers, timeout=timeout) as answer:
                return await answer.text() if answer.status == 200 else None
        except (aiohttp.ClientError, TimeoutError):
            return None


def _raw_path(scope: Scope) -> str:
    return scope.get("raw_path", quote(scope["path"]).encode()).decode("latin-1")


def _url_at(replica: Replica, scope: Scope) -> URL:
    """Path and query as they came: what the client has escaped stays so, and nothing else is."""
    from yarl import URL

    query = scope["query_string"].decode("latin-1")
    return URL.build(
        scheme="http", authority=replica.address, path=_raw_path(scope), query_string=query, encoded=True
    )


def _sent_on(scope: Scope) -> list[tuple[str, str]]:
    """The headers of a client, without those of its connection, which that names (RFC 9110, 7.6.1)."""
    named = b",".join(value for name, value in scope["headers"] if name == b"connection").lower().split(b",")
    dropped = _NOT_SENT | {name.strip() for name in named}
    headers = [
        (name.decode("latin-1"), value.decode("latin-1"))
        for name, value in scope["headers"]
        if name not in dropped
    ]
    return [*headers, ("x-forwarded-proto", scope["scheme"])]


def _passed_on(answer: aiohttp.ClientResponse) -> Response:
    async def body() -> AsyncIterator[bytes]:
        try:
            async for data in answer.content.iter_chunked(_READ_BYTES):
                yield data
        finally:
            answer.close()  # where the client has gone before the end

    response = StreamingResponse(body(), answer.status)
    response.raw_headers = [
        (name.lower(), value) for name, value in answer.raw_headers if name.lower() not in _NOT_PASSED_ON
    ]
    return response
