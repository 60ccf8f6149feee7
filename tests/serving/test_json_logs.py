"""Log lines as JSON and as text: whole, on one line, and without access keys."""

from __future__ import annotations

import base64
import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfengine.serving.json_logs import JsonFormatter, TextFormatter, configure_logging, redacted

KEY = "0123456789abcdef'\"!"  # printable ASCII, quotes included
BASIC = base64.b64encode(f"user:{KEY}".encode()).decode()
SUBPROTOCOL = "rfengine.bearer." + base64.urlsafe_b64encode(KEY.encode()).decode().rstrip("=")
TOKEN = "ab" * 32
FORMATTERS = [JsonFormatter(), TextFormatter()]
LOGGERS = ("rfengine", "uvicorn", "uvicorn.access", "uvicorn.asgi", "uvicorn.error")


def record(message: object, *args: object, **more: Any) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "rfengine.serving", "levelno": 30, "levelname": "WARNING", **more})
    made.msg, made.args = message, args
    return made


def failure(message: str) -> dict[str, Any]:
    """What logger.exception adds to a record."""
    try:
        raise RuntimeError(message)
    except RuntimeError:
        return {"exc_info": sys.exc_info()}


@pytest.fixture
def loggers() -> Iterator[None]:
    """Gives the loggers back as they were."""
    kept = {name: logging.getLogger(name).__dict__.copy() for name in LOGGERS}
    yield
    for name, attributes in kept.items():
        logging.getLogger(name).setLevel(attributes["level"])
        logging.getLogger(name).handlers = attributes["handlers"]
        logging.getLogger(name).propagate = attributes["propagate"]


def test_line_is_one_json_object_with_its_fields_and_a_time_in_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    fields = {"session": "s-1", "chunks": 3, "seconds": 0.5, "end": None, "sizes": (64, 64), "on": True}
    line = JsonFormatter().format(record("chunk %d of %s", 3, "s-1", created=1750000000.1239, fields=fields))
    monkeypatch.undo()
    time.tzset()
    assert json.loads(line) == {
        "time": "2025-06-15T15:06:40.123Z",
        "level": "WARNING",
        "logger": "rfengine.serving",
        "message": "chunk 3 of s-1",
        "fields": fields | {"sizes": [64, 64]},
    }


def test_value_that_json_has_no_form_for_is_written_as_text() -> None:
    fields = {"nan": math.nan, "infinite": -math.inf, "path": Path("a"), "bytes": b"b", 1: {2: [{3}]}}
    line = JsonFormatter().format(record("x", fields=fields))
    assert json.loads(line, parse_constant=pytest.fail)["fields"] == {
        "nan": "nan", "infinite": "-inf", "path": "a", "bytes": "b'b'", "1": {"2": ["{3}"]},
    }  # fmt: skip


def test_exception_is_written_with_type_message_and_traceback() -> None:
    entry = record("failed", **failure("no memory"))
    line = json.loads(JsonFormatter().format(entry))
    assert line["exception"] == {"type": "RuntimeError", "message": "no memory"}
    assert line["traceback"].startswith("Traceback") and "in failure" in line["traceback"]
    text = TextFormatter().format(entry).splitlines()
    assert text[0].endswith(" WARNING rfengine.serving: failed") and text[-1] == "    RuntimeError: no memory"
    assert all(below.startswith("    ") for below in text[1:])


@given(text=st.text())
def test_no_text_forges_a_line(text: str) -> None:
    entry = record("prompt %s", text, fields={text: text}, **failure(text))
    line = JsonFormatter().format(entry)
    assert len(line.splitlines()) == 1 and line.isprintable()
    if redacted(text) == text:
        assert json.loads(line)["message"] == f"prompt {text}"
        assert json.loads(line)["fields"] == {text: text}
        assert json.loads(line)["exception"]["message"] == text
    first, *below = TextFormatter().format(entry).split("\n")
    assert first.isprintable()
    assert all(line.startswith("    ") and line.isprintable() for line in below)


def test_prompt_cannot_end_a_line_or_move_the_cursor() -> None:
    forged = "a cat\n2026-01-01T00:00:00.000Z INFO rfengine: all is well\r\x1b[2J\u2028\x85\ud800"
    line = TextFormatter().format(record("prompt %s", forged))
    assert len(line.splitlines()) == 1 and line.isprintable()
    assert r"\n2026" in line and r"\x1b[2J\u2028\x85\ud800" in line


SECRET_TEXTS = [
    f"Authorization: Bearer {KEY}",
    f"authorization: Basic {BASIC}",
    f"< Authorization: Bearer {KEY}\nnext line",
    f"Proxy-Authorization=Bearer {KEY}",
    f"the header was Bearer {KEY}",
    f"basic {BASIC} came",
    f"Cookie: theme=dark; rfengine_access={TOKEN}; other=1",
    f"Set-Cookie: rfengine_access={TOKEN}; HttpOnly",
    f"token rfengine_access={TOKEN}; Path=/",
    f"Sec-WebSocket-Protocol: {SUBPROTOCOL}, rfengine",
    f"GET /v1/videos?api_key={KEY} HTTP/1.1",
    f"GET /v1/videos?a=1&token={KEY}&b=2",
    repr({"authorization": f"Bearer {KEY}"}),
    repr([(b"host", b"a"), (b"authorization", f"Bearer {KEY}".encode()), (b"cookie", TOKEN.encode())]),
    json.dumps({"Authorization": f"Bearer {KEY}", "cookie": TOKEN}),
    json.dumps(json.dumps({"Authorization": f"Bearer {KEY}", "cookie": TOKEN})),
    repr({"authorization": [KEY]}),
]


@pytest.mark.parametrize("formatter", FORMATTERS)
@pytest.mark.parametrize("text", SECRET_TEXTS)
def test_access_key_is_in_no_part_of_a_line(formatter: logging.Formatter, text: str) -> None:
    secrets = (KEY[:16], BASIC, SUBPROTOCOL.removeprefix("rfengine.bearer."), TOKEN)
    assert any(secret in text for secret in secrets)
    for entry in (
        record(text),
        record("%s: %s", *(text.split(": ", 1) if ": " in text else ("text", text))),
        record("x", fields={"text": text, text: [text]}),
        record("x", **failure(text)),
    ):
        line = formatter.format(entry)
        assert not [secret for secret in secrets if secret in line]
        assert "[redacted]" in line


def test_field_that_is_named_for_a_credential_is_redacted_whatever_it_holds() -> None:
    fields = {"Authorization": "short", "set-cookie": ["a"], "headers": {"cookie": {"a": "b"}}, "code": 1}
    assert json.loads(JsonFormatter().format(record("x", fields=fields)))["fields"] == {
        "Authorization": "[redacted]",
        "set-cookie": "[redacted]",
        "headers": {"cookie": "[redacted]"},
        "code": 1,
    }


def test_what_stands_beside_a_secret_stays() -> None:
    for value in ("Bearer x", f"Bearer {KEY}"):  # with quotes the value is escaped
        headers = repr({"authorization": value, "host": "a"})
        assert redacted(headers) == "{'authorization': [redacted], 'host': 'a'}"
    assert redacted("Authorization: Bearer x\nb") == "Authorization: [redacted]\nb"
    assert redacted(repr((b"cookie", b"x", b"y"))) == "(b'cookie', [redacted], b'y')"
    assert redacted(f"a, {SUBPROTOCOL}, rfengine") == "a, rfengine.bearer.[redacted], rfengine"
    assert redacted(f"GET /?key={KEY}&b=2 200") == "GET /?key=[redacted]&b=2 200"
    plain = "Basic authentication, bearer of news, a cookie on a table, GET /v1/videos?limit=20&keys=1 200"
    assert redacted(plain) == plain


@pytest.mark.parametrize("text", ["authorization:" * 20_000, "'" * 50_000, "cookie='" + "\\'" * 50_000])
def test_long_text_is_redacted_in_time_that_grows_with_its_length(text: str) -> None:
    assert len(redacted(text)) <= len(text) + len("[redacted]")  # a pattern that backtracks would not return


def test_records_reach_other_handlers_as_they_were() -> None:
    entry = record("%s", f"Bearer {KEY}", fields={"cookie": TOKEN}, **failure("x"))
    before = dict(vars(entry), message=None)
    for formatter in FORMATTERS:
        formatter.format(entry)
    assert dict(vars(entry), message=None) == before


@pytest.mark.usefixtures("loggers")
def test_loggers_of_the_engine_and_of_uvicorn_write_json_once(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("uvicorn.access").propagate = False
    logging.getLogger("uvicorn.access").handlers = [logging.StreamHandler()]
    for _ in range(2):
        configure_logging("info", json=True)
    logging.getLogger("rfengine.serving").info("one", extra={"fields": {"a": 1}})
    logging.getLogger("rfengine.serving").debug("left out")
    logging.getLogger("uvicorn.error").warning("two")
    logging.getLogger("uvicorn.access").info('%s - "%s"', "127.0.0.1:1", f"GET /?key={KEY}")
    written = capsys.readouterr()
    lines = [json.loads(line) for line in written.err.splitlines()]
    assert [(line["logger"], line["message"]) for line in lines] == [
        ("rfengine.serving", "one"),
        ("uvicorn.error", "two"),
        ("uvicorn.access", '127.0.0.1:1 - "GET /?key=[redacted]'),
    ]
    assert written.out == "" and caplog.records == []  # the root logger would write them again


@pytest.mark.usefixtures("loggers")
def test_text_is_written_where_json_is_not_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("WARNING", json=False)
    logging.getLogger("rfengine").warning("one", extra={"fields": {"a": 1}})
    logging.getLogger("rfengine").info("left out")
    assert capsys.readouterr().err.endswith('Z WARNING rfengine: one {"a": 1}\n')


@pytest.mark.usefixtures("loggers")
def test_unknown_level_is_an_error_and_changes_nothing() -> None:
    before = logging.getLogger("rfengine").handlers
    with pytest.raises(ValueError, match="log level is 'loud'; use DEBUG, INFO, WARNING, ERROR or CRITICAL"):
        configure_logging("loud", json=True)
    assert logging.getLogger("rfengine").handlers is before
