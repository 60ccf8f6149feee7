"""Admission: which sessions fit into memory, reckoned before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rfengine.memory import free_memory
from rfengine.pipeline import Pipeline
from rfengine.prompts import check_prompt
from rfengine.serving.errors import Fault, ServiceError
from rfengine.serving.events import SessionRequest, SessionState
from rfengine.serving.options import ServiceOptions
from rfengine.serving.points import KeptPoints
from rfengine.serving.session import Session

_LEAST_POINTS = 4  # that must fit for points to be kept automatically
_SHARE_OF_FREE_MEMORY = 0.8
_RETRY_S = 5
_MIB = 2**20


def memory_for_sessions(device: torch.device) -> int:
    """Bytes of `device` that sessions get by default: most of what is free, once the model is loaded."""
    return int((free_memory(device) or 2**30) * _SHARE_OF_FREE_MEMORY)


class Admission:
    """The budget of one pipeline. Its methods that take sessions are called under the service's lock."""

    def __init__(self, pipeline: Pipeline, options: ServiceOptions) -> None:
        self.memory_bytes = options.memory_bytes or memory_for_sessions(pipeline.model.device)
        self._pipeline, self._options = pipeline, options
        self._stream_bytes: dict[tuple[int | None, int | None], int] = {}

    def knows(self, request: SessionRequest) -> bool:
        """Whether `needed` answers at once: it has seen a session of that size."""
        return (request.height, request.width) in self._stream_bytes

    def needed(self, request: SessionRequest) -> int:
        """Device memory of the session in bytes. Raises ServiceError for one that can never be."""
        config, limit = self._pipeline.config, self._options.max_pixels
        height, width = request.height or config.height, request.width or config.width
        try:
            check_prompt(request.prompt)
            if height * width > limit:
                raise ValueError(f"{height} x {width} are {height * width} pixels; use at most {limit}")
            key = (request.height, request.width)
            if key not in self._stream_bytes:
                self._stream_bytes[key] = self._pipeline.stream_bytes(*key)
        except ValueError as error:
            raise ServiceError(Fault("invalid_value", str(error))) from error
        needed = self._stream_bytes[key]
        if needed > self.memory_bytes:
            raise ServiceError(
                Fault(
                    "too_large",
                    f"a session of {height} x {width} pixels needs {needed // _MIB} MiB and the server has "
                    f"{self.memory_bytes // _MIB}; choose a smaller size",
                    status=413,
                )
            )
        return needed

    def room(self, sessions: Sequence[Session]) -> int:
        """Device memory in bytes that another session could have beside `sessions`."""
        if len(sessions) >= self._options.max_sessions:
            return 0
        return max(0, self.memory_bytes - self._committed(sessions))

    def refusal(self, sessions: Sequence[Session], needed: int) -> Fault | None:
        """Why no session of so many bytes can be opened beside `sessions` now."""
        if len(sessions) < self._options.max_sessions:
            return self.shortage(sessions, needed)
        message = f"{len(sessions)} sessions are open, which is the limit; try again when one has ended"
        return Fault("too_many_sessions", message, 429, True, _RETRY_S)

    def shortage(self, sessions: Sequence[Session], needed: int) -> Fault | None:
        """Why so many bytes more cannot be had, if they cannot."""
        committed = self._committed(sessions)
        if committed + needed <= self.memory_bytes:
            return None
        message = (
            f"the session needs {needed // _MIB} MiB and others take {committed // _MIB} of "
            f"{self.memory_bytes // _MIB}; try again when one has ended"
        )
        return Fault("no_memory", message, 429, True, _RETRY_S)

    def _committed(self, sessions: Sequence[Session]) -> int:
        """Device memory of all sessions but the paused ones whose state the host has room for."""
        host = self._options.host_bytes - sum(session.points.nbytes for session in sessions)
        committed = 0
        for session in sessions:
            if session.released:
                continue
            if session.state is SessionState.PAUSED and session.bytes <= host:
                host -= session.bytes
            else:
                committed += session.bytes
        return committed

    def new_points(self, request: SessionRequest, needed: int) -> KeptPoints:
        """The kept points of a new session; each session has the same share of half the host's budget."""
        share = self._options.host_bytes // (2 * self._options.max_sessions)
        own = self._options.keep_every if share >= _LEAST_POINTS * needed else 0
        return KeptPoints(share, own if request.keep_every is None else request.keep_every)
