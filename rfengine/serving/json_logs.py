"""The server's log, a line for each entry, as JSON or as text, without access keys."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from json import dumps
from typing import Any

_REDACTED = "[redacted]"
_SECRET_HEADERS = r"(?:proxy-)?authorization|(?:set-)?cookie"
_SECRET_NAME = re.compile(_SECRET_HEADERS, re.IGNORECASE)
_QUOTED = r"""(?P<quote>['"])(?:\\.|(?!(?P=quote))[^\\\n])*(?P=quote)"""
_SECRETS = (
    # a header as a line, in JSON, or in the repr of a dict or of pairs: to the closing quote, else to the end
    re.compile(rf"""(\b(?:{_SECRET_HEADERS})(?:\\?['"],|\\?['"]?\s*[:=])\s*)(?:b?{_QUOTED}|[^\n]+)""", re.I),
    re.compile(r"(\b(?:Bearer|Basic)\s+)\S{16,}", re.I),  # shorter words are no keys
    re.compile(r"""(rfengine\.bearer\.)[^\s,'"]+"""),
    re.compile(r"""(rfengine_access=)[^\s;,'"]+"""),
    re.compile(r"([?&](?:api_?key|key|token|access_token)=)[^\s&]+", re.I),  # not accepted, but tried
)
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
# below the logger uvicorn; its default set-up gives some of them handlers of their own
_UVICORN_LOGGERS = ("uvicorn.access", "uvicorn.asgi", "uvicorn.error")


def redacted(text: str) -> str:
    """The text without access keys: values of Authorization and cookie headers, subprotocols with a key."""
    for secret in _SECRETS:
        text = secret.sub(rf"\1{_REDACTED}", text)
    return text


class JsonFormatter(logging.Formatter):
    """Writes a record as one JSON object, without access keys: time (UTC), level, logger, message; where
    there are any, fields (of extra={"fields": {...}}), exception (its type and message) and traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """One line of ASCII: JSON escapes what could end it, so no prompt forges another."""
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": redacted(record.getMessage()),
        }
        if fields := record.__dict__.get("fields"):
            line["fields"] = _plain(fields)
        if record.exc_info and (error := record.exc_info[1]):
            line["exception"] = {"type": type(error).__name__, "message": redacted(str(error))}
            line["traceback"] = redacted(self.formatException(record.exc_info))
        return dumps(line)


class TextFormatter(logging.Formatter):
    """Writes a record for a reader, without access keys: one line, and a traceback indented below it."""

    def format(self, record: logging.LogRecord) -> str:
        """Characters that could end a line are escaped, so no prompt forges another."""
        message = _visible(redacted(record.getMessage()))
        text = f"{_time(record)} {record.levelname} {record.name}: {message}"
        if fields := record.__dict__.get("fields"):
            text += f" {dumps(_plain(fields))}"
        if record.exc_info:
            traceback = redacted(self.formatException(record.exc_info))
            text += "".join(f"\n    {_visible(line)}" for line in traceback.split("\n"))
        return text


def configure_logging(level: str, json: bool) -> None:
    """Send what the loggers `rfengine` and `uvicorn` report at `level` or above to standard error.

    Replaces their handlers, so it may be called again; uvicorn is to be started with log_config=None.
    Raises ValueError for another level than DEBUG, INFO, WARNING, ERROR and CRITICAL, in any case of letters.
    """
    if level.upper() not in _LEVELS:
        raise ValueError(f"the log level is {level!r}; use {', '.join(_LEVELS[:-1])} or {_LEVELS[-1]}")
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if json else TextFormatter())
    for name in ("rfengine", "uvicorn"):
        logger = logging.getLogger(name)
        logger.setLevel(level.upper())
        logger.handlers = [handler]
        logger.propagate = False
    for name in _UVICORN_LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.NOTSET)
        logger.handlers = []
        logger.propagate = True


def configure_service_logging(json: bool) -> None:
    """configure_logging at INFO, but for each step of uvicorn's start and every op, which `rfengine doctor`
    lists too."""
    configure_logging("INFO", json)
    for name in ("uvicorn", "rfengine.ops"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _visible(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _plain(value: Any) -> Any:
    """A value as JSON has it, without access keys; what JSON has no form for becomes its text."""
    if isinstance(value, Mapping):
        return {
            redacted(str(name)): _REDACTED if _SECRET_NAME.fullmatch(str(name)) else _plain(entry)
            for name, entry in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return redacted(str(value))
