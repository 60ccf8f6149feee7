"""The server as a process: it listens, drains at a signal to stop, and ends when its engine is lost."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sized
from dataclasses import dataclass
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from rfengine.pipeline import Pipeline
from rfengine.serving.access import ApiKeys, check_bind
from rfengine.serving.realtime.websocket_protocol import BoundedWebSocket
from rfengine.serving.server import ServerOptions, create_app

logger = logging.getLogger(__name__)

ENGINE_LOST = 70  # exit status: EX_SOFTWARE of sysexits.h, for a supervisor to start the server again
_TELL_CLIENTS_S = 2.0
_POLL_S = 0.05
_KEEPALIVE_S = 20.0
_BACKLOG = 1024
_MOST_HEADER_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens. insecure: other than loopback without keys."""

    host: str = "127.0.0.1"
    port: int = 8000
    insecure: bool = False


def listen(address: Address, keys: ApiKeys | None) -> socket.socket:
    """The listening socket, before a model is loaded.

    Raises ValueError where the address may not be bound without keys, RuntimeError where it cannot be.
    """
    check_bind(address.host, keys, address.insecure)
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise RuntimeError(
            f"{address.host}:{address.port} cannot be bound ({error.strerror}); another server may have it, "
            "choose another --port"
        ) from error


def serve(pipeline: Pipeline, options: ServerOptions, listener: socket.socket) -> int:
    """Serve on the socket until a signal to stop; returns the exit status.

    The first signal lets each session finish its chunk and end, within options.drain_s; a second one ends at
    once.
    """
    app = create_app(pipeline, options, end_process)
    server = DrainingServer(uvicorn_config(app, options), lambda: drain_sessions(app, options.drain_s))
    server.run(sockets=[listener])
    return 0 if server.started else 1


def uvicorn_config(app: ASGIApp, options: ServerOptions) -> uvicorn.Config:
    """How an application of a server with these options listens."""
    return uvicorn.Config(
        app,
        loop="asyncio",  # not whatever else is installed: the limits below are of these two
        http="h11",
        log_config=None,
        access_log=False,
        server_header=False,
        ws=BoundedWebSocket,
        ws_max_size=options.realtime.message_bytes,
        ws_per_message_deflate=False,  # encoded video does not shrink
        ws_ping_interval=_KEEPALIVE_S,
        ws_ping_timeout=_KEEPALIVE_S,
        timeout_graceful_shutdown=int(_TELL_CLIENTS_S),
        limit_concurrency=options.max_connections,
        h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
    )


class DrainingServer(uvicorn.Server):
    """Drains before it stops. A second signal stops it at once.

    drain: called on a thread at the first signal; the server stops when it has returned.
    """

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain = drain
        self._draining = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """What uvicorn calls at a signal."""
        if self._draining or not self.started:
            self.should_exit = self.force_exit = True
            return
        self._draining = True
        threading.Thread(target=self._stop, name="rfengine-drain", daemon=True).start()

    def _stop(self) -> None:
        try:
            self._drain()
        finally:
            self.should_exit = True


def drain_sessions(app: FastAPI, drain_s: float) -> None:
    """Admit nobody and let the sessions of an application end, for so long; then its clients hear of it."""
    logger.info("stopping: sessions end after their chunk")
    if not app.state.service.drain(drain_s):
        logger.warning("sessions did not end within %g s and are cut off", drain_s)
    await_end_of(app.state.endpoint.connections)


def await_end_of(connections: Sized) -> None:
    """Give clients a moment to hear how their sessions ended."""
    deadline = time.monotonic() + _TELL_CLIENTS_S
    while len(connections) and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def end_process(why: str) -> None:
    """Leave the clients a moment for their errors, then end: a hanging device lets no thread be joined."""
    time.sleep(_TELL_CLIENTS_S)
    logger.critical("the process ends, since the engine is lost: %s", why)
    for handler in logging.getLogger("rfengine").handlers:
        handler.flush()
    os._exit(ENGINE_LOST)
