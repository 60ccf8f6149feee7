"""A gateway without keys behind proxies that listen anywhere serves its own machine alone."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from rfengine.serving.replicas.local_clients import LocalClients


def answer(scope: dict[str, Any]) -> list[dict[str, Any]]:
    sent = []

    async def app(scope: dict[str, Any], receive: object, send: Any) -> None:
        await send({"type": "let through"})

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(LocalClients(app)(scope, receive, send))
    return sent


@pytest.mark.parametrize("client", [("192.0.2.7", 1), ("::ffff:192.0.2.7", 1), ("", 1), None])
def test_others_are_refused_with_what_to_do(client: tuple[str, int] | None) -> None:
    start, body = answer({"type": "http", "path": "/v1/models", "client": client})
    error = json.loads(body["body"])["error"]
    assert (
        start["status"] == 403 and error["code"] == "foreign_client" and "insecure=true" in error["message"]
    )
    (closed,) = answer({"type": "websocket", "path": "/v1/realtime/video", "client": client})
    assert closed["type"] == "websocket.close"


def test_this_machine_and_public_paths_are_served() -> None:
    through = [{"type": "let through"}]
    for address in ("127.0.0.1", "::1"):
        assert answer({"type": "http", "path": "/", "client": (address, 1)}) == through
    assert answer({"type": "http", "path": "/readyz", "client": ("192.0.2.7", 1)}) == through
    assert answer({"type": "lifespan"}) == through
