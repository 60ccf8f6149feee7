"""Member: one replica in its process, with its engine, its own port and its lease."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import uvicorn

from rfengine.pipeline import Pipeline
from rfengine.serving.gateway_access import replica_secret
from rfengine.serving.options import ReplicaPlace
from rfengine.serving.process import drain_sessions, uvicorn_config
from rfengine.serving.replicas.identity import identity_of
from rfengine.serving.replicas.plan import ReplicaPlan
from rfengine.serving.replicas.shared_directory import SharedDirectory, this_machine
from rfengine.serving.replicas.table import Load, ReplicaState, ReplicaTable
from rfengine.serving.server import ServerOptions, create_app

logger = logging.getLogger(__name__)

_NAME_BYTES = 4
_GATEWAY_CONNECTIONS = 64  # beside those of clients: what the gateway keeps open and asks for itself
_START_S = 60.0
_POLL_S = 0.05


class Member:
    """A replica from here to `stop`.

    host: where the gateway reaches it. token: of the data directory that the others have. on_lost: as
    SessionService has it, and called too where the others have given the replica up.

    Raises ValueError where it may not join the others, before anything is begun; RuntimeError where the
    directory cannot be used.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        plan: ReplicaPlan,
        host: str,
        token: str,
        on_lost: Callable[[str], None],
    ) -> None:
        options = plan.own_options(pipeline)
        shared = SharedDirectory(options.data_directory)
        shared.require(token)
        self.name = secrets.token_hex(_NAME_BYTES)
        self._shared, self._on_lost = shared, on_lost
        self.table = ReplicaTable(shared.table_path, plan.journal, plan.lease_s)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, 0), family=family)
        address = f"{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        try:
            self.table.join(
                self.name, address, this_machine(), os.getpid(), identity_of(pipeline),
                pipeline.stream_bytes(),
            )  # fmt: skip
        except BaseException:
            listener.close()
            self.table.close()
            raise
        self._state: ReplicaState | None = None  # where it is not that of the service
        self._ended = threading.Event()
        secret = replica_secret(shared.secret, self.name)
        place = ReplicaPlace(self.name, secret, plan.job_lease_s, plan.journal)
        own = replace(options, replica=place)
        self.app = create_app(pipeline, own, on_lost)
        self._drain_s = options.drain_s
        config = uvicorn_config(self.app, replace(own, max_connections=_connections(own)))
        config.ws_ping_interval = None  # the gateway asks its clients; it reads no faster than they do
        self._server = uvicorn.Server(config)
        self._serving = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listener]}, name="rfengine-replica", daemon=True
        )
        self._serving.start()
        self._lease = threading.Thread(target=self._keep_lease, name="rfengine-lease", daemon=True)
        self._lease.start()
        self._await_start()
        logger.info("replica %s serves at %s", self.name, address)

    def _await_start(self) -> None:
        deadline = time.monotonic() + _START_S
        while not self._server.started:
            if not self._serving.is_alive() or time.monotonic() > deadline:
                raise RuntimeError(f"replica {self.name} did not start within {_START_S:g} s; see its log")
            time.sleep(_POLL_S)

    def check(self) -> None:
        """Raises RuntimeError where the replica serves no session any more, and has to be replaced."""
        if self.app.state.service.lost:
            raise RuntimeError(f"replica {self.name} has lost its engine: {self.app.state.service.lost}")
        if not self._serving.is_alive():
            raise RuntimeError(f"replica {self.name} listens no more")

    def waiting_jobs(self) -> int:
        """Of all replicas."""
        return self.app.state.store.counts()["queued"]

    def load(self) -> Load:
        """What the gateway chooses by."""
        service = self.app.state.service
        free, sessions = service.room()
        if self._state is not None:
            state = self._state
        elif not service.ready:
            state = "draining"
        else:
            state = "ready" if service.warm else "warming up"
        return Load(state, free, sessions)

    def _keep_lease(self) -> None:
        while not self._ended.wait(self.table.lease_s / 4):
            self._renew()

    def _renew(self) -> None:
        try:
            if not self.table.renew(self.name, self.load()):
                self._on_lost(f"replica {self.name} was silent for so long that others took its work")
            self.table.sweep()
            self._shared.remove_recordings(self.table.replicas)
        except (OSError, RuntimeError):
            logger.exception("the lease of replica %s was not renewed", self.name)

    def stop(self) -> None:
        """Admit nobody, let sessions end within the time of the options, put jobs back, and leave. Stopping
        again changes nothing."""
        if self._state is not None:
            return
        self._state = "draining"
        self._renew()
        drain_sessions(self.app, self._drain_s)
        self._server.should_exit = True
        self._serving.join(self._drain_s)
        self._ended.set()
        self._lease.join()
        self.table.leave(self.name, failed=bool(self.app.state.service.lost))
        self._shared.remove_recordings(lambda: self.table.replicas().keys() - {self.name})
        self.table.close()


def _connections(options: ServerOptions) -> int:
    return options.max_connections + _GATEWAY_CONNECTIONS
