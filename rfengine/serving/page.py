"""The page: static files, and what they need to know of the model."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.types import Scope

from rfengine.pipeline import Pipeline

STATIC = Path(__file__).with_name("static")
# prompts to click, for the shipped model; others have none of their own
_EXAMPLES = {
    "tiny": (
        "a large red circle moving slowly to the right over a cloudy sky",
        "a large yellow triangle moving slowly upwards over a grassy meadow",
        "a large purple square moving slowly to the left over a sandy beach",
        "a small green circle bouncing slowly up and down over a checkered floor",
    )
}


class PageFiles(StaticFiles):
    """The page's files, which a browser asks for again each time, so that they always belong together."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """What StaticFiles answers, with one header more."""
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = "no-cache"
        return response


def page_router(pipeline: Pipeline) -> APIRouter:
    """GET / and /v1/page/config."""
    router = APIRouter(include_in_schema=False)
    config = pipeline.config

    @router.get("/")
    async def page() -> FileResponse:
        """The page itself."""
        return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})

    @router.get("/v1/page/config")
    async def page_config() -> JSONResponse:
        """Sizes, rate and examples of the model."""
        return JSONResponse(
            {
                "model": config.name,
                "width": config.width,
                "height": config.height,
                "fps": config.fps,
                "chunk_frames": config.cache.chunk_frames * config.vae.temporal_stride,
                "examples": list(_EXAMPLES.get(config.name, ())),
            }
        )

    return router
