"""The page: static files, and what they need to know of the model."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, JSONResponse

from rfengine.pipeline import Pipeline

STATIC = Path(__file__).with_name("static")
# prompts to click, for the shipped model; others have none of their own
_EXAMPLES = {
    "tiny": (
        "a large red circle moving slowly to the right over a cloudy sky",
        "a large yellow triangle moving slowly upwards over a grassy meadow",
        "a small green square and a small purple circle bouncing over a checkered floor",
        "a large purple square moving slowly to the left over a sandy beach",
    )
}


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
