"""What an operator asks a server: is it alive, is it ready, and its numbers."""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rfengine.serving.events import EndReason, SessionState
from rfengine.serving.jobs.store import JobStore
from rfengine.serving.metrics import JOB_STATUSES, MEMORY_KINDS, SESSION_STATES, ServerMetrics
from rfengine.serving.realtime.outbox import Outbox
from rfengine.serving.sessions import SessionService


def operations_router(service: SessionService, metrics: ServerMetrics) -> APIRouter:
    """GET /livez, /readyz and /metrics."""
    router = APIRouter(include_in_schema=False)

    @router.get("/livez")
    async def live() -> JSONResponse:
        """The event loop answers."""
        return JSONResponse({"status": "live"})

    @router.get("/readyz")
    async def ready() -> JSONResponse:
        """Whether a session would be served: 503 while warming up, draining, or when the engine is lost."""
        if service.lost:
            status = "lost"
        elif not service.ready:
            status = "draining"
        else:
            status = "ready" if service.warm else "warming up"
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    @router.get("/metrics")
    async def numbers() -> Response:
        """Prometheus's text format."""
        body, content_type = metrics.render()
        return Response(body, media_type=content_type)

    return router


class MetricsObserver:
    """Counts what a SessionService reports."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics

    def admission(self, admitted: bool) -> None:
        """A session was admitted or refused."""
        self._metrics.admissions["admitted" if admitted else "refused"].inc()

    def chunk(self, denoise_ms: float, decode_ms: float, turn_ms: float) -> None:
        """A chunk was made."""
        for stage, ms in (("denoise", denoise_ms), ("decode", decode_ms), ("total", turn_ms)):
            self._metrics.chunk_seconds[stage].observe(ms / 1e3)

    def session_end(self, reason: EndReason) -> None:
        """A session has ended."""
        self._metrics.session_ends[reason].inc()


def watch_gauges(
    metrics: ServerMetrics, service: SessionService, outboxes: Iterable[Outbox], store: JobStore
) -> None:
    """Let the gauges ask when they are read."""
    for state in SESSION_STATES:
        metrics.sessions[state].set_function(lambda state=state: service.counts()[SessionState(state)])
    for kind in MEMORY_KINDS:
        metrics.memory_bytes[kind].set_function(lambda kind=kind: service.memory()[kind])
    for status in JOB_STATUSES:
        metrics.jobs[status].set_function(lambda status=status: store.counts()[status])
    metrics.queue_bytes.set_function(lambda: sum(box.waiting[0] for box in tuple(outboxes)))
    metrics.queue_chunks.set_function(lambda: sum(box.waiting[1] for box in tuple(outboxes)))


class RequestCount:
    """ASGI middleware that counts answers by route template and status."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, as ASGI has it."""

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                self._metrics.count_request(getattr(route, "path", None), message["status"])
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)
