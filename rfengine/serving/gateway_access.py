"""What a replica believes: the gateway in front of it, which proves itself by a secret and says who asks."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from rfengine.serving.access import ClientIdentity, refuse
from rfengine.serving.errors import Fault

_AUTHORIZATION = b"authorization"
_KEY_NAME, _ADDRESS = b"x-rfengine-key", b"x-rfengine-address"
GATEWAY_HEADERS = frozenset({_AUTHORIZATION, _KEY_NAME, _ADDRESS})  # that a client cannot send through it
_WRONG_SECRET = Fault("unauthorized", "only the gateway may ask a replica; ask the gateway", 401)


def replica_secret(secret: str, replica: str) -> str:
    """What the gateway shows to the replica of that name alone: whoever takes the port of one that has ended
    can show it to no other."""
    return hmac.digest(secret.encode(), replica.encode(), "sha256").hex()


def gateway_headers(secret: str, replica: str, client: ClientIdentity) -> list[tuple[str, str]]:
    """The headers by which a replica knows the gateway, and for whom it asks. secret: of the directory."""
    headers = [
        (_AUTHORIZATION.decode(), f"Bearer {replica_secret(secret, replica)}"),
        (_ADDRESS.decode(), client.address),
    ]
    if client.key_name is not None:
        headers.append((_KEY_NAME.decode(), client.key_name))
    return headers


class GatewayMiddleware:
    """Lets requests of the gateway through to an ASGI application and refuses all others.

    app: gets scope["state"]["client"] as AccessMiddleware of the gateway made it.
    """

    def __init__(self, app: ASGIApp, secret: str) -> None:
        self._app = app
        self._expected = f"Bearer {secret}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, as ASGI has it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        given = {name: value for name, value in scope["headers"] if name in GATEWAY_HEADERS}
        if not hmac.compare_digest(given.get(_AUTHORIZATION, b""), self._expected):
            await refuse(_WRONG_SECRET, scope, receive, send)
            return
        key_name, address = given.get(_KEY_NAME), given.get(_ADDRESS, b"unknown")
        identity = ClientIdentity(None if key_name is None else key_name.decode(), address.decode("latin-1"))
        scope.setdefault("state", {})["client"] = identity
        scope["headers"] = [pair for pair in scope["headers"] if pair[0] not in GATEWAY_HEADERS]
        await self._app(scope, receive, send)
