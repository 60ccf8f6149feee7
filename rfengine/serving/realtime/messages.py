"""What realtime messages mean to a session: commands, what the model refuses, and how fast they are read."""

from __future__ import annotations

import time
from typing import Protocol

from pydantic import ValidationError

from rfengine.pipeline import Pipeline
from rfengine.prompts import WeightedText
from rfengine.serving.errors import Fault, ServiceError
from rfengine.serving.events import Branch, ChangePrompt, Command, KeepPoint, Seek
from rfengine.serving.realtime.protocol import (
    ClientMessage,
    SessionBranch,
    SessionInteraction,
    SessionSeek,
    SessionSnapshot,
)

_LONG = 4096  # characters: to find the mistakes of a long message takes milliseconds


class MessageBucket:
    """How long to wait before the next message is read."""

    def __init__(self, per_second: float, at_once: int) -> None:
        self._per_second, self._most = per_second, float(at_once)
        self._left, self._at = float(at_once), time.monotonic()

    def delay(self, length: int) -> float:
        """Take one message of so many characters, a long one for several; seconds until it was due."""
        now, taken = time.monotonic(), max(1.0, length / _LONG)
        self._left = min(self._most, self._left + (now - self._at) * self._per_second) - taken
        self._at = now
        return max(0.0, -self._left / self._per_second)


def command_of(message: ClientMessage, event_id: str) -> Command:
    """The command of a message that is one."""
    match message:
        case SessionInteraction():
            change = message.interaction
            prompt, chunks = change.event.prompt, max(1, change.transition_chunks or 1)
            if not isinstance(prompt, str):
                prompt = tuple(WeightedText(part.text, part.weight) for part in prompt)
            return ChangePrompt(event_id, prompt, change.mode, chunks, change.interpolation)
        case SessionSnapshot():
            return KeepPoint(event_id)
        case SessionSeek():
            return Seek(event_id, message.snapshot_id)
        case SessionBranch():
            return Branch(event_id, message.snapshot_id, message.prompt, message.mode, message.seed)
    raise AssertionError(message.type)


class AskedFor(Protocol):
    """What a request says of the model, in either API."""

    @property
    def model(self) -> str | None: ...

    @property
    def fps(self) -> int | None: ...

    @property
    def guidance_scale(self) -> float | None: ...

    @property
    def num_inference_steps(self) -> int | None: ...

    @property
    def negative_prompt(self) -> str | None: ...


def check_compatible(start: AskedFor, pipeline: Pipeline) -> None:
    """Raises ServiceError for what the model does not do."""
    config = pipeline.config
    steps = len(config.schedule.denoising_steps)
    wrong = {
        "model": (start.model not in (None, config.name), config.name),
        "fps": (start.fps not in (None, config.fps), str(config.fps)),
        "guidance_scale": (start.guidance_scale not in (None, 1.0), "1: the model is distilled"),
        "num_inference_steps": (start.num_inference_steps not in (None, steps), str(steps)),
        "negative_prompt": (bool(start.negative_prompt), "an empty one: the model is distilled"),
    }
    for name, (is_wrong, allowed) in wrong.items():
        if is_wrong:
            value = str(getattr(start, name))[:60]
            message = f"{name} is {value!r}; this model takes {allowed}"
            code = "model_not_found" if name == "model" else "invalid_value"
            raise ServiceError(Fault(code, message, 404 if name == "model" else 400, param=name))


def validation_fault(error: ValidationError) -> Fault:
    """The first mistake of a message, without its values."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])[:120]
    more = error.error_count() - 1
    others = f", and {more} more" if more else ""
    message = f"{where or 'the message'}: {first['msg']}{others}"
    return Fault("invalid_message", message[:400], param=where or None)
