"""The server: one FastAPI application around one pipeline.

create_app puts the parts together; each route is where its subject is: realtime/endpoint.py and routes.py,
jobs/routes.py, page.py and operations.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.routing import WebSocketRoute

from rfengine.pipeline import Pipeline
from rfengine.serving.access import AccessMiddleware, ApiKeys
from rfengine.serving.errors import Fault, ServiceError, error_body
from rfengine.serving.gateway_access import GatewayMiddleware
from rfengine.serving.jobs.requests import JobLimits
from rfengine.serving.jobs.routes import video_router
from rfengine.serving.jobs.runner import JobRunner
from rfengine.serving.jobs.store import Claimant, JobStore
from rfengine.serving.metrics import ServerMetrics
from rfengine.serving.operations import (
    MetricsObserver,
    RequestCount,
    operations_router,
    watch_gauges,
)
from rfengine.serving.options import ReplicaPlace, ServiceOptions
from rfengine.serving.page import STATIC, PageFiles, page_router
from rfengine.serving.realtime.endpoint import RealtimeEndpoint, RealtimeLimits
from rfengine.serving.realtime.library import RecordingLibrary
from rfengine.serving.realtime.routes import live_router
from rfengine.serving.sessions import SessionService

logger = logging.getLogger(__name__)

_GIB = 2**30
_SWEEP_S = 60.0


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What a server allows.

    data_directory: of this server alone; it holds recordings, video jobs and their files. recording_bytes,
    video_bytes: quotas of the two. file_life_s: of a recording after its session, and of a finished video.
    waiting_jobs: in the queue, of all keys. max_connections: of HTTP and WebSocket together.
    allowed_origins, allowed_hosts: as AccessMiddleware has them. drain_s: for sessions to end at a stop.
    replica: where the server is one of several behind a gateway, which keys, origins and hosts are then left
    to; recording_bytes is its own share.
    """

    data_directory: Path
    service: ServiceOptions = field(default_factory=ServiceOptions)
    realtime: RealtimeLimits = field(default_factory=RealtimeLimits)
    keys: ApiKeys | None = None
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 2**20
    recording_bytes: int = 4 * _GIB
    video_bytes: int = 4 * _GIB
    file_life_s: float = 24 * 3600.0
    jobs: JobLimits = field(default_factory=JobLimits)
    waiting_jobs: int = 256
    max_connections: int = 256
    drain_s: float = 20.0
    replica: ReplicaPlace | None = None


class GivenLimits(Protocol):
    """Limits as a person gives them: in GB, and by the names of `rfengine serve`."""

    max_sessions: int
    connections_per_key: int
    max_connections: int
    memory_gb: float | None
    host_memory_gb: float
    disk_gb: float
    allow_origin: tuple[str, ...]
    allow_host: tuple[str, ...]


def server_options(
    given: GivenLimits, data_directory: Path, keys: ApiKeys | None, cpu_threads: int | None = None
) -> ServerOptions:
    """The options of a server with these limits; recordings and videos have half of its disk each.
    cpu_threads: as ServiceOptions has them."""
    memory = None if given.memory_gb is None else int(given.memory_gb * _GIB)
    host_bytes, disk = int(given.host_memory_gb * _GIB), int(given.disk_gb * _GIB)
    return ServerOptions(
        data_directory,
        service=ServiceOptions(given.max_sessions, memory, host_bytes, cpu_threads=cpu_threads),
        realtime=RealtimeLimits(connections_per_key=given.connections_per_key),
        keys=keys,
        allowed_origins=given.allow_origin,
        allowed_hosts=given.allow_host,
        recording_bytes=disk // 2,
        video_bytes=disk // 2,
        max_connections=given.max_connections,
    )


def create_app(
    pipeline: Pipeline, options: ServerOptions, on_lost: Callable[[str], None] | None = None
) -> FastAPI:
    """The application; its parts live from here to the end of its lifespan.

    on_lost: as SessionService has it. Raises RuntimeError where another server has the data directory.
    """
    metrics = ServerMetrics()
    store = _job_store(options)
    service = SessionService(pipeline, options.service, MetricsObserver(metrics), on_lost, warm_up=True)
    recordings = options.data_directory / "recordings"
    session_prefix = "" if options.replica is None else options.replica.name
    if session_prefix:
        recordings /= session_prefix
    library = RecordingLibrary(recordings, options.recording_bytes, options.file_life_s)
    endpoint = RealtimeEndpoint(service, library, metrics, options.realtime, session_prefix)
    runner = JobRunner(service, store)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(endpoint.spare_encoder.refill)
        sweep = asyncio.create_task(_sweep(library))
        yield
        sweep.cancel()
        await run_in_threadpool(runner.stop)
        await run_in_threadpool(service.drain, options.drain_s)
        await run_in_threadpool(service.stop)
        store.close()

    app = FastAPI(title="rfengine", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service, app.state.endpoint, app.state.store = service, endpoint, store
    app.router.routes.append(WebSocketRoute("/v1/realtime/video", endpoint.serve))
    app.include_router(video_router(store, runner, pipeline, options.jobs))
    app.include_router(live_router(library))
    app.include_router(operations_router(service, metrics))
    app.include_router(page_router(pipeline))
    app.mount("/static", PageFiles(directory=STATIC))
    answer_errors(app)
    watch_gauges(metrics, service, endpoint.outboxes, store)
    if options.replica is None:
        add_access(app, options)
    else:
        app.add_middleware(GatewayMiddleware, secret=options.replica.secret)
    app.add_middleware(RequestCount, metrics=metrics)  # outside: refused requests count too
    return app


def _job_store(options: ServerOptions) -> JobStore:
    directory, place = options.data_directory / "videos", options.replica
    limits = options.video_bytes, options.file_life_s, options.waiting_jobs
    if place is None:
        return JobStore(directory, *limits)
    return JobStore(directory, *limits, Claimant(place.name, place.job_lease_s), place.journal)


def add_access(app: FastAPI, options: ServerOptions) -> None:
    """Let in who has a key, from where the options allow it."""
    app.add_middleware(
        AccessMiddleware,
        keys=options.keys,
        max_body_bytes=options.max_body_bytes,
        allowed_origins=options.allowed_origins,
        allowed_hosts=options.allowed_hosts,
    )


async def _sweep(library: RecordingLibrary) -> None:
    while True:
        await asyncio.sleep(_SWEEP_S)
        await run_in_threadpool(library.sweep)


def answer_errors(app: FastAPI) -> None:
    """Let every error be typed JSON, without a traceback or a path."""

    @app.exception_handler(ServiceError)
    async def service_error(request: Request, error: ServiceError) -> JSONResponse:
        return _answer(error.fault)

    @app.exception_handler(RequestValidationError)
    async def wrong_request(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])[:120]
        return _answer(Fault("invalid_value", f"{where or 'the request'}: {first['msg']}"[:400], param=where))

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        codes = {404: "not_found", 405: "method_not_allowed"}
        fault = Fault(codes.get(error.status_code, "http_error"), str(error.detail), error.status_code)
        return _answer(fault, error.headers)

    @app.exception_handler(Exception)
    async def internal_error(request: Request, error: Exception) -> JSONResponse:
        message = "the server failed at this request; the log says more"
        return _answer(Fault("internal_error", message, 500, True))


def _answer(fault: Fault, headers: dict[str, str] | None = None) -> JSONResponse:
    more = {} if fault.retry_after_s is None else {"Retry-After": str(fault.retry_after_s)}
    return JSONResponse(error_body(fault), fault.status, {**(headers or {}), **more})
