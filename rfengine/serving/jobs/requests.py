"""What POST /v1/videos takes, as JSON or as a form, and the job that it asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from rfengine.files import strict_json
from rfengine.limits import shown
from rfengine.pipeline import Pipeline
from rfengine.prompts import MOST_CHARACTERS, check_prompt
from rfengine.serving.errors import Fault, ServiceError
from rfengine.serving.jobs.table import JobRequest
from rfengine.serving.realtime.messages import check_compatible
from rfengine.serving.realtime.protocol import Seed
from rfengine.video import frame_count

_MOST_FORM_FIELDS = 32
_MOST_FIELD_BYTES = 2**16
_ONLY_TEXT = "input_reference"  # and input_reference[...], as the openai client sends an object
_FIELD_NAME = re.compile(r"[A-Za-z0-9_.\[\]-]{1,64}")  # that is repeated as the `param` of an error


@dataclass(frozen=True, slots=True)
class JobLimits:
    """Limits of a request. max_prompt: characters. max_frames: of one video. max_waiting: jobs that may wait
    of one key."""

    max_prompt: int = MOST_CHARACTERS
    max_frames: int = 4800
    max_waiting: int = 16


class CreateVideo(BaseModel):
    """What POST /v1/videos takes. A field that is not named here is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Annotated[str, Field(min_length=1, max_length=MOST_CHARACTERS)]
    model: str | None = Field(None, max_length=255, description="As GET /v1/models names it.")
    seconds: Annotated[str, Field(pattern=r"^[0-9]{1,6}(\.[0-9]{1,9})?$")] | float | None = Field(
        None, description="Length of the video; 81 frames where neither it nor num_frames is given."
    )
    size: Annotated[str, Field(pattern=r"^[0-9]{1,5}x[0-9]{1,5}$")] | None = Field(
        None, description="Width x height in pixels, such as 832x480; the model's own where absent."
    )
    seed: Seed = 0
    fps: int | None = Field(None, description="Only the model's own rate is accepted.")
    num_frames: int | None = Field(None, description="The length in frames, exactly.")
    num_inference_steps: int | None = Field(None, description="Only the model's own number is accepted.")
    guidance_scale: float | None = Field(None, description="Only 1 is accepted: the model is distilled.")
    negative_prompt: str | None = Field(
        None, max_length=MOST_CHARACTERS, description="Only an empty one is accepted."
    )


async def read_body(request: Request) -> CreateVideo:
    """The fields of a JSON object or a form, in which every value is text. Raises ServiceError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        values = _json_values(await request.body())
    elif kind == "multipart/form-data":
        values = await _form_values(request)
    else:
        message = f"the content type is {shown(kind)}; use application/json or multipart/form-data"
        raise ServiceError(Fault("unsupported_media_type", message, 415))
    for name, value in values.items():
        if name.startswith(_ONLY_TEXT) and value is not None:
            raise ServiceError(_not_text(_ONLY_TEXT))
    values.pop(_ONLY_TEXT, None)
    if unknown := values.keys() - CreateVideo.model_fields.keys():
        name = min(unknown)
        message = f"there is no field {shown(name)}; there are {', '.join(CreateVideo.model_fields)}"
        raise ServiceError(Fault("unknown_field", message, 400, param=_param(name)))
    try:
        return CreateVideo.model_validate(values, strict=kind == "application/json")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        name = str(first["loc"][0])
        raise ServiceError(Fault("invalid_value", f"{name}: {first['msg']}", 400, param=name)) from None


def _json_values(body: bytes) -> dict[str, Any]:
    try:
        values = strict_json(body.decode())
    except ValueError as error:
        raise ServiceError(Fault("invalid_json", f"the body is no JSON ({error}); send an object")) from None
    if not isinstance(values, dict):
        raise ServiceError(Fault("invalid_json", f"the body is {shown(values)}; send a JSON object"))
    return values


async def _form_values(request: Request) -> dict[str, Any]:
    form = request.form(max_files=1, max_fields=_MOST_FORM_FIELDS, max_part_size=_MOST_FIELD_BYTES)
    values: dict[str, Any] = {}
    try:
        async with form as fields:
            for name, value in fields.multi_items():
                if name in values:
                    message = f"the form has the field {shown(name)} twice; give it once"
                    raise ServiceError(Fault("invalid_form", message, 400, param=_param(name)))
                if isinstance(value, UploadFile):
                    raise ServiceError(_not_text(name))
                values[name] = value
    except HTTPException as error:
        raise ServiceError(Fault("invalid_form", f"the form cannot be read: {error.detail}")) from None
    return values


def _not_text(name: str) -> Fault:
    message = f"{shown(name)} is no text; the model makes videos from text alone, so leave it out"
    return Fault("unsupported_field", message, 400, param=_param(name))


def _param(name: str) -> str | None:
    """A name that a client chose, where it can stand in an answer."""
    return name if _FIELD_NAME.fullmatch(name) else None


def job_request(body: CreateVideo, pipeline: Pipeline, limits: JobLimits) -> JobRequest:
    """The job that a request asks for. Raises ServiceError for what is contradictory, or beyond a limit."""
    check_compatible(body, pipeline)
    config = pipeline.config
    try:
        check_prompt(body.prompt)
        if len(body.prompt) > limits.max_prompt:
            raise ValueError(
                f"the prompt has {len(body.prompt)} characters; give at most {limits.max_prompt}"
            )
    except ValueError as error:
        raise ServiceError(Fault("invalid_value", str(error), param="prompt")) from None
    width, height = (config.width, config.height) if body.size is None else map(int, body.size.split("x"))
    return JobRequest(
        body.prompt, config.name, body.seed, _num_frames(body, config.fps, limits), config.fps, height, width
    )


def _num_frames(body: CreateVideo, fps: int, limits: JobLimits) -> int:
    seconds = None if body.seconds is None else float(body.seconds)
    name = "num_frames" if seconds is None else "seconds"
    try:
        count = frame_count(fps, seconds, None if name == "seconds" else body.num_frames)
        if body.num_frames not in (None, count):
            raise ValueError(
                f"seconds is {seconds:g}, which is {count} frames, and num_frames is {body.num_frames}; give "
                "one of them"
            )
        if count > limits.max_frames:
            raise ValueError(
                f"the video would have {count} frames; ask for at most {limits.max_frames}, "
                f"{limits.max_frames / fps:g} s"
            )
    except ValueError as error:
        raise ServiceError(Fault("invalid_value", str(error), param=name)) from None
    return count
