"""A gateway without keys behind proxies that listen anywhere serves its own machine alone."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("aiohttp")

from rfengine.serving.access import ApiKeys
from rfengine.serving.replicas.deployment import gateway_behind_proxies
from rfengine.serving.replicas.local_clients import LocalClients
from rfengine.serving.replicas.plan import ModelSource, ReplicaPlan
from rfengine.serving.server import ServerOptions


async def through(scope: dict[str, Any], receive: object, send: Any) -> None:
    await send({"type": "let through"})


_LOCAL = LocalClients(through)


def answer(scope: dict[str, Any], app: Any = _LOCAL) -> list[dict[str, Any]]:
    sent = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
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
    served = [{"type": "let through"}]
    for address in ("127.0.0.1", "::1"):
        assert answer({"type": "http", "path": "/", "client": (address, 1)}) == served
    assert answer({"type": "http", "path": "/readyz", "client": ("192.0.2.7", 1)}) == served
    assert answer({"type": "lifespan"}) == served


@pytest.mark.parametrize(
    ("keys", "insecure", "code"),
    [
        (None, False, "foreign_client"),
        (None, True, "not_found"),
        (ApiKeys(["a-key-of-some-length"]), False, "unauthorized"),
    ],
)
def test_the_gateway_on_ray_serve_needs_keys_or_a_word_for_clients_of_other_machines(
    tmp_path: Path, keys: ApiKeys | None, insecure: bool, code: str
) -> None:
    plan = ReplicaPlan(
        ModelSource("tiny", "cpu"), ServerOptions(tmp_path, keys=keys), 1, 1, 1, insecure=insecure
    )
    app = gateway_behind_proxies(plan)
    headers = [(b"host", b"localhost")]  # which a client may say that is elsewhere
    scope = {"type": "http", "method": "GET", "path": "5/x", "raw_path": b"5/x", "query_string": b"",
             "scheme": "http", "headers": headers, "client": ("192.0.2.7", 1)}  # fmt: skip
    app.router.default = app.router.not_found
    body = answer(scope, app)[1]["body"]
    assert json.loads(body)["error"]["code"] == code
