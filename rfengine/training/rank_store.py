"""The store by which the ranks of one start find one another.

torchrun's agent offers its own, and goes on with the same one when it starts the ranks again (torch 2.13): it
still has the addresses of those that are gone, and who reads them first cannot connect. So the ranks of every
start keep theirs under a name that the first of them draws. The name that is found may be of an earlier
start; a rank takes one only where the first rank has written that it saw this very process.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

_START, _SEEN = "rfengine/start", "seen"
_LOOK_S = 0.05


def is_agent_shared() -> bool:
    """Whether torchrun's agent has told the ranks to use its own store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def open_rank_store(rank: int, count: int, timeout: timedelta) -> Store:
    """The store of this start's ranks, in that of torchrun's agent; each of the `count` ranks has to call
    it. Raises RuntimeError where they have not all met within `timeout`."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return met(TCPStore(host, port, is_master=False, timeout=timeout), rank, count, timeout)


def met(agent: Store, rank: int, count: int, timeout: timedelta) -> Store:
    """The same in a store that is open."""
    own_name = uuid.uuid4().hex
    if rank == 0:
        agent.set(_START, own_name)
        store = PrefixStore(own_name, agent)
        store.set(_SEEN, " ".join(store.get(f"rank {other}").decode() for other in range(1, count)))
        return store
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        store = PrefixStore(agent.get(_START).decode(), agent)
        store.set(f"rank {rank}", own_name)
        if store.check([_SEEN]) and own_name in store.get(_SEEN).decode().split():
            return store
        time.sleep(_LOOK_S)
    raise RuntimeError(
        f"rank {rank} has not met the other {count - 1} in {timeout.total_seconds():g} s; look at what they "
        "wrote, or give --timeout more"
    )
