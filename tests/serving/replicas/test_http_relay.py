"""What the gateway passes on of a request."""

from __future__ import annotations

import asyncio
import time

import pytest

pytest.importorskip("aiohttp")

from rfengine.serving.replicas.http_relay import _sent_on
from rfengine.serving.replicas.silence import unless_silent
from rfengine.serving.replicas.table import Load, Replica

REPLICA = Replica("aaaaaaaa", "127.0.0.1:1", "one", 1, 1, Load("ready"), time.time() + 60)


def names_sent_on(*headers: tuple[bytes, bytes]) -> list[str]:
    scope = {"headers": list(headers), "scheme": "http"}
    return [name for name, _ in _sent_on(scope)]


def test_headers_of_the_connection_and_those_it_names_stay_behind() -> None:
    sent = names_sent_on(
        (b"connection", b"close, X-Mine"), (b"connection", b"x-other"), (b"x-mine", b"1"), (b"x-other", b"2"),
        (b"te", b"trailers"), (b"upgrade", b"h2c"), (b"range", b"bytes=0-1"), (b"content-length", b"3"),
    )  # fmt: skip
    assert sent == ["range", "x-forwarded-proto"]


def test_what_only_the_gateway_may_say_is_never_taken_from_a_client() -> None:
    forged = (b"authorization", b"x-rfengine-key", b"x-rfengine-address", b"x-forwarded-for")
    assert names_sent_on(*((name, b"forged") for name in forged)) == ["x-forwarded-proto"]
    given = [(b"x-forwarded-proto", b"https"), (b"connection", b"x-forwarded-proto")]
    assert dict(_sent_on({"headers": given, "scheme": "http"})) == {"x-forwarded-proto": "http"}


def test_what_is_asked_of_a_replica_that_falls_silent_is_cancelled() -> None:
    ended, answers = [], iter((False, True))

    async def asking() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def answered() -> int:
        return 7

    assert asyncio.run(unless_silent(answered(), REPLICA, lambda replica: False)) == 7
    with pytest.raises(TimeoutError, match="replica aaaaaaaa is silent"):
        asyncio.run(unless_silent(asking(), REPLICA, lambda replica: next(answers)))
    assert ended == [True]
