"""Limits of a service, and who counts what happens in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from rfengine.serving.events import EndReason


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """Limits of a SessionService.

    memory_bytes: device memory of all resident streams; None is most of what is free at the start.
    host_bytes: host memory of parked states and kept points. lease_s: a session that nobody renews for so
    long ends. idle_s: so does one that is paused, or whose client takes nothing, for so long. life_s: so does
    every session. park_s: a paused session's state moves to host memory after so long. stall_s: a turn that
    takes longer means that the device hangs. keep_every: chunks between automatic points. delivery_threads:
    those that encode and record; 0 is the engine's own, None is 0 on a CPU and 2 beside a device.
    cpu_threads: of torch on the engine's thread; None leaves torch's own number.
    """

    max_sessions: int = 16
    memory_bytes: int | None = None
    host_bytes: int = 2**30
    lease_s: float = 30.0
    idle_s: float = 300.0
    life_s: float = 4 * 3600.0
    park_s: float = 20.0
    stall_s: float = 60.0
    keep_every: int = 4
    max_pixels: int = 1280 * 1280
    delivery_threads: int | None = None
    cpu_threads: int | None = None


@dataclass(frozen=True, slots=True)
class ReplicaPlace:
    """Of a server that is one of several with the same data directory, behind a gateway.

    name: eight hexadecimal digits, with which its session ids begin. secret: by which the gateway proves
    itself to this one; its word is taken for who asks. job_lease_s: a job whose claim was not renewed for so
    long is another's. journal: of the database of jobs, as JobTable has it.
    """

    name: str
    secret: str
    job_lease_s: float = 15.0
    journal: Literal["WAL", "DELETE"] = "WAL"


class Observer(Protocol):
    """Counts what happens; called on the service's threads, and must return at once."""

    def admission(self, admitted: bool) -> None:
        """A session was admitted or refused."""
        ...

    def chunk(self, denoise_ms: float, decode_ms: float, turn_ms: float) -> None:
        """A chunk was made; turn_ms is the whole turn of its session."""
        ...

    def session_end(self, reason: EndReason) -> None:
        """A session has ended."""
        ...
