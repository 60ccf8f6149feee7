"""`/v1/videos` and `/v1/models`: video jobs over HTTP in the shape of OpenAI's API."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from rfengine.limits import shown
from rfengine.pipeline import Pipeline
from rfengine.serving.access import owner_of
from rfengine.serving.errors import Fault, ServiceError
from rfengine.serving.jobs.requests import CreateVideo, JobLimits, job_request, read_body
from rfengine.serving.jobs.runner import JobRunner
from rfengine.serving.jobs.store import JobStore
from rfengine.serving.jobs.table import Job, JobStatus


class VideoError(BaseModel):
    """Why a job failed."""

    code: str
    message: str


class VideoObject(BaseModel):
    """A video job as clients see it."""

    id: str
    object: Literal["video"] = "video"
    status: JobStatus
    progress: int = Field(description="Per cent of the frames that are made.")
    created_at: int
    completed_at: int | None
    expires_at: int | None
    model: str
    prompt: str
    seconds: str
    size: str
    error: VideoError | None
    remixed_from_video_id: None = None
    seed: int
    num_frames: int
    fps: int


class VideoList(BaseModel):
    """One page of a key's videos."""

    object: Literal["list"] = "list"
    data: list[VideoObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(BaseModel):
    """A video that is no longer there."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class ModelObject(BaseModel):
    """The model that the server runs. created: when the server began to run it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "rfengine"


class ModelList(BaseModel):
    """All models of the server."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class ErrorDescription(BaseModel):
    """What went wrong, and whether the same request may succeed later."""

    code: str
    message: str
    type: str
    param: str | None
    retryable: bool


class ErrorAnswer(BaseModel):
    """The body of every error."""

    error: ErrorDescription


def video_router(store: JobStore, runner: JobRunner, pipeline: Pipeline, limits: JobLimits) -> APIRouter:
    """The routes. Every failure is a ServiceError, or FastAPI's RequestValidationError."""
    routes = _Routes(store, runner, pipeline, limits)
    router = APIRouter(responses={"default": {"model": ErrorAnswer, "description": "Any error"}})
    schema = CreateVideo.model_json_schema()
    kinds = ("application/json", "multipart/form-data")
    body = {"required": True, "content": {kind: {"schema": schema} for kind in kinds}}
    router.add_api_route("/v1/videos", routes.create, methods=["POST"], openapi_extra={"requestBody": body})
    router.add_api_route("/v1/videos", routes.page, methods=["GET"])
    router.add_api_route("/v1/videos/{video_id}", routes.retrieve, methods=["GET"])
    router.add_api_route("/v1/videos/{video_id}", routes.delete, methods=["DELETE"])
    router.add_api_route(
        "/v1/videos/{video_id}/content", routes.content, methods=["GET"], response_class=FileResponse
    )
    router.add_api_route("/v1/models", routes.models, methods=["GET"])
    router.add_api_route("/v1/models/{model_id:path}", routes.model, methods=["GET"])
    return router


class _Routes:
    """What each route does. All but `create` run on threads, since the store waits for its disk."""

    def __init__(self, store: JobStore, runner: JobRunner, pipeline: Pipeline, limits: JobLimits) -> None:
        self._store, self._runner, self._pipeline, self._limits = store, runner, pipeline, limits
        self._model = ModelObject(id=pipeline.config.name, created=int(time.time()))

    async def create(self, request: Request) -> VideoObject:
        """Queue a video; it is made when its turn comes."""
        return await run_in_threadpool(self._accept, await read_body(request), owner_of(request.scope))

    def _accept(self, body: CreateVideo, owner: str | None) -> VideoObject:
        request = job_request(body, self._pipeline, self._limits)
        try:
            self._runner.check(request)
        except ServiceError as error:  # all but the size was checked before
            raise ServiceError(replace(error.fault, param="size")) from error
        job = self._store.accept(request, owner, self._limits.max_waiting)
        self._runner.wake()
        return _video_object(job)

    def page(
        self,
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> VideoList:
        """Videos of the caller's key, newest first; `after` is the last id of the page before."""
        jobs, has_more = self._store.page(owner_of(request.scope), after, limit, order == "desc")
        videos = [_video_object(job) for job in jobs]
        first, last = (videos[0].id, videos[-1].id) if videos else (None, None)
        return VideoList(data=videos, first_id=first, last_id=last, has_more=has_more)

    def retrieve(self, video_id: str, request: Request) -> VideoObject:
        """How far a video is."""
        return _video_object(self._store.job(video_id, owner_of(request.scope)))

    def delete(self, video_id: str, request: Request) -> DeletedVideo:
        """Remove a video; one that is being made is stopped."""
        self._store.delete(video_id, owner_of(request.scope))
        self._runner.cancel(video_id)
        return DeletedVideo(id=video_id)

    def content(
        self, video_id: str, request: Request, variant: Literal["video"] = "video"
    ) -> FileResponse:  # fmt: skip
        """The MP4 of a completed video, or the ranges of it that are asked for."""
        path = self._store.video(video_id, owner_of(request.scope))
        try:
            return FileResponse(
                path, media_type="video/mp4", filename=f"{video_id}.mp4", stat_result=path.stat()
            )
        except FileNotFoundError:  # deleted just now
            raise ServiceError(Fault("not_found", "the video has been deleted", 404)) from None

    def models(self) -> ModelList:
        """The one model of the server."""
        return ModelList(data=[self._model])

    def model(self, model_id: str) -> ModelObject:
        """The model of that name."""
        if model_id != self._model.id:
            message = f"there is no model {shown(model_id)}; this server runs {self._model.id}"
            raise ServiceError(Fault("model_not_found", message, 404))
        return self._model


def _video_object(job: Job) -> VideoObject:
    made = job.request
    seconds = f"{made.num_frames / made.fps:.4f}".rstrip("0").rstrip(".")
    return VideoObject(
        id=job.id, status=job.status, progress=job.progress, created_at=job.created_at,
        completed_at=job.completed_at, expires_at=job.expires_at, model=made.model, prompt=made.prompt,
        seconds=seconds, size=f"{made.width}x{made.height}", seed=made.seed, num_frames=made.num_frames,
        fps=made.fps,
        error=None if job.error is None else VideoError(code=job.error.code, message=job.error.message),
    )  # fmt: skip
