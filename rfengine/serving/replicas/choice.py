"""Which replica a request goes to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from rfengine.serving.access import is_loopback
from rfengine.serving.errors import Fault
from rfengine.serving.replicas.table import Replica

_SESSION_PATH = re.compile(r"/v1/realtime/sessions/rt_([0-9a-f]{8})[0-9a-f]{24}(?:/.*)?")

NO_REPLICA = Fault("no_replica", "no replica is ready; try again", 503, True, 5)
LOST = Fault(
    "engine_lost", "the replica that ran this session has ended; start another session", 503, True, 1
)
NO_ANSWER = Fault("replica_lost", "the replica ended before it answered; try again", 503, True, 1)


def named_replica(path: str) -> str | None:
    """The replica that made the session of a path; None where the path names no session."""
    match = _SESSION_PATH.fullmatch(path)
    return match and match[1]


def reachable(replica: Replica, machine: str) -> bool:
    """Whether a gateway on that machine reaches a replica that is not lost."""
    elsewhere = replica.machine != machine and is_loopback(replica.address.rpartition(":")[0])
    return not replica.is_gone and not elsewhere


def by_room(replicas: Iterable[Replica], relayed: Mapping[str, int]) -> list[Replica]:
    """Those that are ready, the one with most free memory first.

    relayed: sessions that the gateway has with each; those that a replica has not reported yet take the
    memory of a session of the model's own size.
    """

    def room(replica: Replica) -> int:
        unreported = relayed.get(replica.name, 0) - replica.load.sessions
        return replica.load.free_bytes - max(0, unreported) * replica.stream_bytes

    ready = [each for each in replicas if each.load.state == "ready"]
    return sorted(ready, key=lambda each: (-room(each), relayed.get(each.name, 0), each.name))
