"""Who may come without keys where others choose which address is listened at."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from rfengine.limits import shown
from rfengine.serving.access import KEYS_VARIABLE, PUBLIC_PATHS, is_loopback, refuse
from rfengine.serving.errors import Fault


class LocalClients:
    """Lets clients of this machine through to an ASGI application and refuses all others, but at the paths
    that are public."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, as ASGI has it."""
        public = scope["type"] == "http" and scope["path"] in PUBLIC_PATHS
        if scope["type"] not in ("http", "websocket") or public:
            await self._app(scope, receive, send)
            return
        address = (scope.get("client") or ("unknown",))[0]
        if is_loopback(address):
            await self._app(scope, receive, send)
            return
        message = (
            f"there are no access keys, so this machine alone is served, and the client is {shown(address)}; "
            f"give keys (api_key_file or {KEYS_VARIABLE}), or insecure=true"
        )
        await refuse(Fault("foreign_client", message, 403), scope, receive, send)
