"""What a client is told when something fails: a code, a sentence, and whether trying again may help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_CLIENT_STATUS = 500  # below it the fault is the client's


@dataclass(frozen=True, slots=True)
class Fault:
    """One failure as a client sees it, without a path of the server or a traceback.

    code: a word that programs compare. message: the value, the limit and the way out. status: of HTTP.
    retryable: the same request may succeed later, after retry_after_s seconds where that is known.
    param: the field of the request at fault.
    """

    code: str
    message: str
    status: int = 400
    retryable: bool = False
    retry_after_s: int | None = None
    param: str | None = None


class ServiceError(Exception):
    """A request that fails with a Fault."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


def error_body(fault: Fault) -> dict[str, Any]:
    """The JSON body of an HTTP error, in the shape of OpenAI's API with `retryable` added."""
    kind = "invalid_request_error" if fault.status < _CLIENT_STATUS else "server_error"
    return {
        "error": {
            "code": fault.code,
            "message": fault.message,
            "type": kind,
            "param": fault.param,
            "retryable": fault.retryable,
        }
    }
