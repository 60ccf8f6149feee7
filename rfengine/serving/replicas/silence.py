"""What a gateway asks of a replica, given up where the replica is silent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from rfengine.serving.replicas.table import Replica

IsSilent = Callable[[Replica], bool]  # of one that does not answer any more, though its port may be open
Outcome = TypeVar("Outcome")

_CHECK_S = 0.5


async def unless_silent(
    asking: Coroutine[Any, Any, Outcome], replica: Replica, is_silent: IsSilent
) -> Outcome:
    """What `asking` returns or raises; it is cancelled, with TimeoutError, when the replica is silent."""
    task = asyncio.ensure_future(asking)
    try:
        while not task.done():
            if is_silent(replica):
                raise TimeoutError(f"replica {replica.name} is silent")
            await asyncio.wait({task}, timeout=_CHECK_S)
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
