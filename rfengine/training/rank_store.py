"""The store by which the ranks of one start find one another.

torchrun's agent offers its own, and goes on with the same one when it starts the ranks again (torch 2.13): it
still has the addresses of those that are gone, and who reads them first cannot connect. So the ranks of every
start keep theirs under a name that the first of them draws. The name that is found may be of an earlier
start; a rank takes one only where the first rank has written that it saw this very process.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from rfengine.torchrun import environment_integer

_START, _SEEN = "rfengine/start", "seen"
_LOOK_S = 0.05


def is_agent_shared() -> bool:
    """Whether torchrun's agent has told the ranks to use its own store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def open_rank_store(rank: int, count: int, timeout: timedelta) -> Store:
    """The store of this start's ranks, in that of torchrun's agent or, where it shares none, of the first
    rank; each of the `count` ranks has to call it. Raises RuntimeError where they have not all met within
    `timeout`, ValueError where the environment does not say where to meet."""
    host, port = os.environ.get("MASTER_ADDR", ""), environment_integer("MASTER_PORT", 1, 65535)
    if not host:
        raise ValueError(
            "the environment variable MASTER_ADDR is empty; torchrun sets it: start the ranks with it"
        )
    if is_agent_shared():
        return met(TCPStore(host, port, is_master=False, timeout=timeout), rank, count, timeout)
    return TCPStore(host, port, is_master=rank == 0, timeout=timeout)


def check_devices(store: Store, rank: int, count: int, device_type: str) -> None:
    """Raises ValueError on every rank where one computes on another type of device than the first: they would
    wait for one another by different means."""
    store.set(f"device {rank}", f"{device_type} {socket.gethostname()}")
    found = [store.get(f"device {other}").decode().split() for other in range(count)]
    for other, (kind, host) in enumerate(found):
        if kind != found[0][0]:
            raise ValueError(
                f"rank {other} on {host} computes on {kind} and rank 0 on {found[0][1]} on {found[0][0]}; "
                "look at `rfengine doctor` there, or give all ranks the same --device"
            )


def met(agent: Store, rank: int, count: int, timeout: timedelta) -> Store:
    """As open_rank_store, in the agent's store, which is open."""
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
