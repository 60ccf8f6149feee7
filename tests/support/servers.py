"""A server in this process on a free port, for tests that talk to it as clients do."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from rfengine import Pipeline
from rfengine.serving.options import ServiceOptions
from rfengine.serving.realtime.websocket_protocol import BoundedWebSocket
from rfengine.serving.server import ServerOptions, create_app


@dataclass(frozen=True)
class RunningServer:
    """url: http://127.0.0.1:PORT; websocket_url: that of the realtime route."""

    url: str
    app: FastAPI
    server: uvicorn.Server

    @property
    def websocket_url(self) -> str:
        return self.url.replace("http", "ws", 1) + "/v1/realtime/video"


@contextmanager
def running_app(app: FastAPI, **settings: object) -> Iterator[RunningServer]:
    """Serve an application from a thread until the block ends."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        log_level="warning",
        timeout_graceful_shutdown=5,
        ws=BoundedWebSocket,
        ws_max_size=2**17,
        ws_per_message_deflate=False,
        **settings,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    try:
        yield RunningServer(f"http://127.0.0.1:{listener.getsockname()[1]}", app, server)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@contextmanager
def running_server(pipeline: Pipeline, directory: Path, **options: object) -> Iterator[RunningServer]:
    """A server of `pipeline` whose data is in `directory`; options: of ServerOptions."""
    options.setdefault("service", ServiceOptions())
    with running_app(create_app(pipeline, ServerOptions(directory, **options))) as running:
        yield running
