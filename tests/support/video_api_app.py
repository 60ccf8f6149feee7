"""An application with the video job API alone, on a real port, for tests."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from rfengine import Pipeline
from rfengine.serving.access import AccessMiddleware, ApiKeys
from rfengine.serving.errors import Fault, ServiceError, error_body
from rfengine.serving.jobs.requests import JobLimits
from rfengine.serving.jobs.routes import video_router
from rfengine.serving.jobs.runner import JobRunner
from rfengine.serving.jobs.store import JobStore
from rfengine.serving.sessions import SessionService
from support.servers import running_app
from support.sessions import WAIT, running_service


def video_app(
    store: JobStore,
    runner: JobRunner,
    pipeline: Pipeline,
    limits: JobLimits | None = None,
    keys: ApiKeys | None = None,
) -> FastAPI:
    app = FastAPI()
    app.include_router(video_router(store, runner, pipeline, limits or JobLimits()))

    @app.exception_handler(ServiceError)
    async def service_error(request: Request, error: ServiceError) -> JSONResponse:
        seconds = error.fault.retry_after_s
        headers = None if seconds is None else {"Retry-After": str(seconds)}
        return JSONResponse(error_body(error.fault), error.fault.status, headers)

    @app.exception_handler(RequestValidationError)
    async def wrong_request(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse(
            error_body(Fault("invalid_value", first["msg"], param=str(first["loc"][-1]))), 400
        )

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        fault = Fault("http_error", error.detail, error.status_code)
        return JSONResponse(error_body(fault), fault.status, error.headers)

    app.add_middleware(AccessMiddleware, keys=keys, max_body_bytes=2**20)
    return app


@dataclass(frozen=True, slots=True)
class VideoServer:
    """A running server and its parts. url: without a slash at the end."""

    url: str
    service: SessionService
    store: JobStore
    runner: JobRunner


@contextmanager
def video_server(
    pipeline: Pipeline,
    directory: Path,
    limits: JobLimits | None = None,
    keys: ApiKeys | None = None,
    most_bytes: int = 2**30,
    most_waiting: int = 100,
    life_s: float = 3600.0,
) -> Iterator[VideoServer]:
    """A server in a thread; all of it has ended at the end."""
    with running_service(pipeline) as service:
        store = JobStore(directory, most_bytes, life_s, most_waiting)
        runner = JobRunner(service, store)
        app = video_app(store, runner, pipeline, limits, keys)
        with running_app(app) as running:
            yield VideoServer(running.url, service, store, runner)
        assert runner.stop(WAIT)
        store.close()


def decoded(video: Path | bytes) -> numpy.ndarray:
    """The frames of an MP4, uint8 [T, H, W, 3]; whatever is wrong with it is an error."""
    with av.open(io.BytesIO(video) if isinstance(video, bytes) else str(video)) as file:
        file.streams.video[0].codec_context.options = {"err_detect": "explode"}
        return numpy.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def assert_same_video(one: Path | bytes, other: Path | bytes) -> None:
    """Both have the same frames: as many, and but for what x264 stores of them from run to run.

    Its mbtree is not the same each time on a CPU with AVX-512, which moves a frame's values by 0.5 on average
    at most; other seeds are 15 apart.
    """
    first, second = decoded(one), decoded(other)
    assert first.shape == second.shape
    assert numpy.abs(first.astype(int) - second).mean() < 2
