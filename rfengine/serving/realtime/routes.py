"""HTTP routes beside the realtime WebSocket: the HLS playlist of a session, and its recording."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import FileResponse, Response
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool

from rfengine.serving.access import owner_of
from rfengine.serving.errors import Fault, ServiceError
from rfengine.serving.realtime.hls import HlsPlaylist
from rfengine.serving.realtime.library import RecordingLibrary

SessionId = Annotated[str, Path(pattern=r"^rt_[0-9a-f]{32}$")]
_NO_STORE = {"Cache-Control": "no-store"}


def live_router(library: RecordingLibrary) -> APIRouter:
    """GET /v1/realtime/sessions/{id}/hls/... and /video.mp4; a key sees its own sessions alone."""
    router = APIRouter(prefix="/v1/realtime/sessions/{session_id}", tags=["realtime"])

    @router.get("/hls/playlist.m3u8")
    async def playlist(session_id: SessionId, request: Request) -> Response:
        """The HLS playlist; segments are fragmented MP4."""
        text = _hls(library, session_id, request).playlist()
        return Response(text, media_type="application/vnd.apple.mpegurl", headers=_NO_STORE)

    @router.get("/hls/init.mp4")
    async def initialisation(session_id: SessionId, request: Request) -> Response:
        """What every segment needs first."""
        _hls(library, session_id, request)
        video = library.video(session_id, owner_of(request.scope))
        return Response(video.init_segment, media_type="video/mp4", headers=_NO_STORE)

    @router.get("/hls/segment-{number}.m4s")
    async def segment(
        session_id: SessionId, number: Annotated[int, Path(ge=0, le=2**31)], request: Request
    ) -> Response:
        """One chunk, while it is in the playlist."""
        data = _hls(library, session_id, request).segment(number)
        if data is None:
            message = f"segment {number} is not in the playlist; load the playlist again"
            raise ServiceError(Fault("not_found", message, status=404))
        return Response(data, media_type="video/iso.segment", headers=_NO_STORE)

    @router.get("/video.mp4")
    async def recording(
        session_id: SessionId,
        request: Request,
        branch: Annotated[int | None, Query(ge=0, le=2**31)] = None,
    ) -> FileResponse:
        """The whole video so far as an ordinary MP4, or one branch of it from the start."""
        path = await run_in_threadpool(library.export, session_id, owner_of(request.scope), branch)
        name = f"{session_id}.mp4" if branch is None else f"{session_id}-branch-{branch}.mp4"
        return FileResponse(
            path,
            media_type="video/mp4",
            filename=name,
            headers=_NO_STORE,
            background=BackgroundTask(library.discard, path),
        )

    return router


def _hls(library: RecordingLibrary, session_id: str, request: Request) -> HlsPlaylist:
    hls = library.video(session_id, owner_of(request.scope)).hls
    if hls is None:
        message = "the session has no HLS playlist; start it with hls: true"
        raise ServiceError(Fault("no_hls", message, status=404))
    return hls
