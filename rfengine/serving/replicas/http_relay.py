"""HttpRelay: a request of a client, asked of a replica."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Sequence

import aiohttp
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from rfengine.serving.errors import Fault, ServiceError
from rfengine.serving.gateway_access import GATEWAY_HEADERS, gateway_headers
from rfengine.serving.replicas.choice import NO_ANSWER
from rfengine.serving.replicas.table import Replica

logger = logging.getLogger(__name__)

# of one connection, not of the message (RFC 9110, 7.6.1)
_HOP_BY_HOP = frozenset(
    {b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
     b"trailer", b"transfer-encoding", b"upgrade"}
)  # fmt: skip
_OF_PROXIES = frozenset({b"x-forwarded-for", b"x-forwarded-proto"})  # which the gateway has obeyed, or not
_NOT_SENT = _HOP_BY_HOP | _OF_PROXIES | GATEWAY_HEADERS | {b"content-length", b"expect"}
_ASKED_AGAIN = ("GET", "HEAD")
_CONNECT_S = 2.0
_SILENT_S = 300.0  # of a replica that makes a large file ready
_READ_BYTES = 2**16
_RECEIVED_BYTES = 2**18  # that the kernel holds of a replica's answer


def new_session() -> aiohttp.ClientSession:
    """The connections to replicas; a body is passed on as it is, and takes as long as it comes."""
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENT_S),
        # none is kept, since it may end just as it is used again
        connector=aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=_small_socket),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    )


def _small_socket(place: aiohttp.AddrInfoType) -> socket.socket:
    """A socket with little room, so that a replica soon feels a client that does not read."""
    family, kind, protocol, _, _ = place
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVED_BYTES)
    return made


class HttpRelay:
    """Asks replicas with the connections of `session`, and proves itself to them by `secret`."""

    def __init__(self, session: aiohttp.ClientSession, secret: str) -> None:
        self._session, self._secret = session, secret

    async def ask(self, request: Request, replicas: Sequence[Replica], lost: Fault = NO_ANSWER) -> Response:
        """The answer of the first replica that is there.

        One that dies before it answers is followed by the next where nothing was sent, or asking twice does
        no harm. Raises ServiceError with `lost` where none answers.
        """
        body = await request.body()
        path = request.scope["path"]
        url_path = request.scope.get("raw_path", path.encode()).decode("latin-1")
        query = request.scope["query_string"].decode("latin-1")
        headers = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in request.scope["headers"]
            if name not in _NOT_SENT
        ]
        headers.append(("x-forwarded-proto", request.scope["scheme"]))
        headers += gateway_headers(self._secret, request.scope["state"]["client"])
        for replica in replicas:
            url = _encoded_url(f"http://{replica.address}{url_path}{'?' if query else ''}{query}")
            try:
                answer = await self._session.request(
                    request.method, url, headers=headers, data=body or None, allow_redirects=False
                )
            except aiohttp.ClientConnectorError:
                continue
            except (aiohttp.ClientError, TimeoutError) as error:
                logger.warning("replica %s did not answer: %s", replica.name, type(error).__name__)
                if request.method not in _ASKED_AGAIN:
                    break
                continue
            return _passed_on(answer)
        raise ServiceError(lost)

    async def text(self, replica: Replica, path: str, client: object) -> str | None:
        """What a replica answers to GET; None where it does not, or with an error."""
        headers = gateway_headers(self._secret, client)
        try:
            async with self._session.get(f"http://{replica.address}{path}", headers=headers) as answer:
                return await answer.text() if answer.status == 200 else None
        except (aiohttp.ClientError, TimeoutError):
            return None


def _encoded_url(text: str) -> object:
    """The address as it came: what the client has escaped stays so, and nothing else is."""
    from yarl import URL

    return URL(text, encoded=True)


def _passed_on(answer: aiohttp.ClientResponse) -> Response:
    async def body() -> AsyncIterator[bytes]:
        try:
            async for data in answer.content.iter_chunked(_READ_BYTES):
                yield data
        finally:
            answer.close()  # where the client has gone before the end

    response = StreamingResponse(body(), answer.status)
    response.raw_headers = [
        (name.lower(), value) for name, value in answer.raw_headers if name.lower() not in _HOP_BY_HOP
    ]
    return response
