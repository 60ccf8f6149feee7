"""Whatever bytes a client sends, it gets a typed error or a proper close code, and nobody else notices."""

from __future__ import annotations

import json
import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from copy import deepcopy

import pytest
from pydantic import ValidationError
from websockets.frames import Frame, Opcode

from rfengine import Pipeline
from rfengine.serving.options import ServiceOptions
from rfengine.serving.realtime.endpoint import RealtimeLimits
from rfengine.serving.realtime.protocol import CLIENT_MESSAGES, SERVER_MESSAGES, Message, SessionPing
from rfengine.serving.session import MOST_COMMANDS, Session
from rfengine.serving.video_encoder import VideoEncoder
from support.models import small_pipeline
from support.realtime import BareClient, realtime_client
from support.resources import resources
from support.servers import RunningServer, running_server
from support.sessions import eventually

UNLIMITED = RealtimeLimits(messages_per_s=1e6, messages_at_once=10**6, connections_per_key=64, flush_s=0.5)
MESSAGE_BYTES = UNLIMITED.message_bytes
CHUNKS = 5  # of the session beside, at least
ALLOWED_BYTES = 24 * 2**20  # that the process may gain: a few of the largest messages in each queue
TOO_BIG = 1009  # a reset overtakes it where the server has not read all that was sent
CLOSE_CODES = {1000, 1002, 1007, 1008, TOO_BIG, 1011, 1013, None}
NO_MESSAGE = {"binary_message", "invalid_message", "message_too_large"}
ERROR_CODES = NO_MESSAGE | {
    "already_started", "event_id_conflict", "illegal_transition", "invalid_value", "model_not_found",
    "no_session", "session_ended", "snapshot_budget", "superseded", "too_large", "too_many_commands",
    "unknown_snapshot",
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return small_pipeline()


@pytest.fixture(scope="module")
def server(pipe: Pipeline, tmp_path_factory) -> Iterator[RunningServer]:
    data = tmp_path_factory.mktemp("hostile") / "data"
    service = ServiceOptions(keep_every=0, max_sessions=64)  # ended ones count until their next turn
    with running_server(pipe, data, service=service, realtime=UNLIMITED) as running:
        for listener in running.server.servers[0].sockets:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with realtime_client(running) as client:  # what the process keeps for good is there after it
            client.start(num_frames=33)
            client.finish()
        yield running


class Errors(logging.Handler):
    """Keeps what is logged as an error or with a traceback."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR or record.exc_info:
            self.found.append(record.getMessage())


@pytest.fixture(autouse=True)
def nothing_is_logged_as_an_error() -> Iterator[None]:
    errors = Errors()
    loggers = [logging.getLogger(name) for name in ("rfengine", "uvicorn", "asyncio")]
    for logger in loggers:
        logger.addHandler(errors)
    yield
    for logger in loggers:
        logger.removeHandler(errors)
    assert not errors.found


@contextmanager
def unharmed_session(server: RunningServer, pipe: Pipeline) -> Iterator[None]:
    """A session that runs beside the block, at the pace of its video, and is what it is alone."""
    with realtime_client(server) as client:
        client.start(seed=5, pace="realtime", lead_seconds=4.0)  # the first chunks come at once
        reading = threading.Thread(target=client.finish)
        reading.start()
        try:
            yield
            eventually(lambda: len(client.chunks) >= CHUNKS)
        finally:
            client.send("session.stop")
            reading.join()
        assert client.log[-1]["reason"] == "stopped"
    encoder = VideoEncoder(pipe.config.fps, pipe.config.height, pipe.config.width)
    stream = pipe.stream("a circle", seed=5)
    for number, (_, data) in enumerate(client.chunks):
        alone = encoder.encode(next(stream).frames).data
        assert data == (alone if number else encoder.init_segment + alone)


# Messages

VALID = (
    {"type": "session.interaction", "interaction": {"event": {"prompt": "a square"}, "mode": "recache"}},
    {"type": "session.interaction", "interaction": {"event_id": "x", "event": {"prompt": "a star"}}},
    {"type": "session.pause", "event_id": "p"},
    {"type": "session.resume"},
    {"type": "session.snapshot", "event_id": "s"},
    {"type": "session.seek", "snapshot_id": 0},
    {"type": "session.branch", "snapshot_id": 0, "prompt": "a star", "mode": "hard", "seed": 3},
    {"type": "session.ping"},
    {"type": "session.stop"},
    {
        "type": "session.start", "prompt": "a circle", "width": 48, "height": 32, "num_frames": 21, "seed": 1,
        "pace": "realtime", "lead_seconds": 1.0, "slow_client": "drop", "keep_every": 2, "fps": 16,
        "guidance_scale": 1.0, "num_inference_steps": 2, "negative_prompt": "", "hls": True,
    },
)  # fmt: skip
JUNK: tuple[object, ...] = (
    None, True, False, 0, -1, 1.5, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 1e308, float("nan"),
    float("inf"), "", " ", "\0", "\u202e", "a" * 129, "a" * 10_001, "soft\n", "1", [], [1], [[]], {},
    {"type": "session.stop"}, "session.stop", "\ud800", "../../etc/passwd", "%s%n", "<script>", "\U0001f9ff",
)  # fmt: skip


def paths(value: object, at: tuple = ()) -> list[tuple]:
    """Where values are in a message, the message itself left out."""
    if not isinstance(value, dict):
        return []
    return [path for key in value for path in ((*at, key), *paths(value[key], (*at, key)))]


def changed(chance: random.Random, message: dict) -> dict:
    """The message with a few values exchanged, added or left out."""
    copy = json.loads(json.dumps(message))
    for _ in range(chance.randint(1, 3)):
        found = paths(copy)
        if not found:
            return copy
        *above, key = chance.choice(found)
        owner = copy
        for name in above:
            owner = owner[name]
        match chance.randrange(4):
            case 0:
                del owner[key]
            case 1:
                name = chance.choice(("extra", "type", "__class__", "", "event_id", "k" * 1000))
                owner[name] = deepcopy(chance.choice(JUNK))
            case _:
                owner[key] = deepcopy(chance.choice(JUNK))
    return copy


def damaged(chance: random.Random, text: bytes) -> bytes:
    """The text with a few bytes exchanged, cut off, doubled or added."""
    data = bytearray(text)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(4):
            case 0:
                del data[at:]
            case 1:
                data[at:at] = data[: chance.randrange(40)]
            case 2:
                data[at:at] = bytes(chance.randrange(256) for _ in range(chance.randint(1, 4)))
            case 3 if at < len(data):
                data[at] = chance.randrange(256)
    return bytes(data)


def special(chance: random.Random) -> bytes:
    """Texts that parsers have trouble with."""
    deep = chance.choice((10, 199, 201, 5000, 60_000))
    return chance.choice(
        (
            b"",
            b" \n\t",
            b"null",
            b"[" * deep,
            b"[" * deep + b"]" * deep,
            b'{"type":' * deep,
            b'{"type":"session.ping","a":' + b"[" * deep + b"]" * deep + b"}",
            b'{"type":"session.ping","type":"session.seek"}',
            b'{"type":"session.seek","snapshot_id":0,"snapshot_id":"1"}',
            b'{"type":"session.seek","snapshot_id":' + b"9" * deep + b"}",
            b'{"type":"session.seek","snapshot_id":1e999}',
            b'{"type":"session.start","prompt":"a","guidance_scale":NaN}',
            b'{"type":"session.snapshot","event_id":"\\ud800"}',
            b'{"type":"session.snapshot","event_id":"\\ud800\\udc00"}',
            b'{"type":"session.ping"' + b"".join(b',"%x":0' % number for number in range(deep % 5000)) + b"}",
            b'\xef\xbb\xbf{"type":"session.ping"}',
            b'{"type":"session.ping"}{"type":"session.ping"}',
            b'{"type":"session.snapshot","event_id":"\xed\xa0\x80"}',
            json.dumps({"type": "session.snapshot", "event_id": "e" * deep}).encode(),
            b" " * (MESSAGE_BYTES + chance.choice((-1, 0, 1))),
        )
    )


def fuzzed(chance: random.Random) -> tuple[Opcode, bytes]:
    """One message: its kind and its bytes."""
    message = chance.choice(VALID)
    match chance.randrange(8):
        case 0:
            return Opcode.BINARY, chance.choice((b"", json.dumps(message).encode(), chance.randbytes(300)))
        case 1 | 2:
            return Opcode.TEXT, damaged(chance, json.dumps(message).encode())
        case 3:
            return Opcode.TEXT, special(chance)
        case _:
            return Opcode.TEXT, json.dumps(changed(chance, message)).encode()


def parsed(opcode: Opcode, data: bytes) -> Message | None:
    """The message, where it is one."""
    try:
        return CLIENT_MESSAGES.validate_json(data.decode()) if opcode is Opcode.TEXT else None
    except (ValidationError, UnicodeDecodeError):
        return None


# Fuzzing


class Attacker:
    """Sends messages to a session of its own, and opens another where one has ended.

    The session has one chunk to make at most, so that the machine's time goes to the messages.
    """

    def __init__(self, server: RunningServer) -> None:
        self._server = server
        self._client: BareClient | None = None
        self.closes: dict[int | None, int] = {}
        self.errors: dict[str, int] = {}

    def send(self, opcode: Opcode, data: bytes) -> None:
        client = self._connected()
        client.send_frame(opcode, data)
        client.send({"type": "session.ping"})
        message = parsed(opcode, data)
        errors = self._read_pongs(client, 1 + isinstance(message, SessionPing))
        if message is None and not client.has_ended:
            assert len(NO_MESSAGE.intersection(errors)) == 1, (errors, data[:200])

    def _connected(self) -> BareClient:
        if self._client is None:
            self._client = BareClient(self._server, receive_buffer=2**16)
            self._client.start(keep_every=0, num_frames=10**6, pace="realtime", lead_seconds=0.0)
            self._client.send({"type": "session.pause"})
            self._client.send({"type": "session.ping"})
            self._read_pongs(self._client, 1)
        return self._client

    def _read_pongs(self, client: BareClient, count: int) -> list[str]:
        """The codes of the errors until so many pongs, or the end; all else is as the protocol says."""
        errors = []
        while True:
            entries = [entry for entry in client.read() if isinstance(entry, dict)]
            for entry in entries:
                SERVER_MESSAGES.validate_python(entry)
                if entry["type"] == "error":
                    self._note(entry)
                    errors.append(entry["code"])
            if client.has_ended:
                self._note_close(client)
                return errors
            count -= sum(entry["type"] == "session.pong" for entry in entries)
            if count <= 0:
                return errors

    def _note(self, error: dict) -> None:
        assert error["code"] in ERROR_CODES, error
        assert 0 < len(error["message"]) < 6000 and "Traceback" not in error["message"]
        self.errors[error["code"]] = self.errors.get(error["code"], 0) + 1

    def _note_close(self, client: BareClient) -> None:
        assert client.close_code in CLOSE_CODES, client.close_code
        self.closes[client.close_code] = self.closes.get(client.close_code, 0) + 1
        client.socket.close()
        self._client = None

    def close(self) -> None:
        if self._client is not None:
            self._client.vanish()


def fuzz(server: RunningServer, pipe: Pipeline, seed: int, count: int) -> None:
    chance = random.Random(seed)
    with unharmed_session(server, pipe), closing(Attacker(server)) as attacker:
        for number in range(count):
            if number == count // 4:  # what the process keeps for good is there
                before = resources()
            attacker.send(*fuzzed(chance))
    eventually(lambda: not server.app.state.service._sessions)
    after = resources()
    assert after.memory_bytes - before.memory_bytes < ALLOWED_BYTES
    assert after.files <= before.files
    expected = {"invalid_message", "binary_message", "unknown_snapshot", "already_started"}
    assert expected <= attacker.errors.keys()
    assert {1000, 1007} <= attacker.closes.keys() and {TOO_BIG, None} & attacker.closes.keys()


def test_a_thousand_fuzzed_messages_are_answered(server: RunningServer, pipe: Pipeline) -> None:
    fuzz(server, pipe, seed=0, count=1000)


@pytest.mark.soak
def test_nine_thousand_more_fuzzed_messages_are_answered(server: RunningServer, pipe: Pipeline) -> None:
    fuzz(server, pipe, seed=time.time_ns(), count=9000)


def first_messages(server: RunningServer, pipe: Pipeline, seed: int, count: int) -> None:
    chance = random.Random(seed)
    with unharmed_session(server, pipe):
        for _ in range(count):
            opcode, data = fuzzed(chance)
            with BareClient(server, receive_buffer=2**16) as client:
                client.send_frame(opcode, data)
                client.send({"type": "session.stop"})
                entries = [entry for entry in client.read_to_the_end() if isinstance(entry, dict)]
            for entry in entries:
                SERVER_MESSAGES.validate_python(entry)
            kinds = [entry["type"] for entry in entries]
            if kinds and kinds[0] == "video.start":
                assert client.close_code == 1000 and kinds[-1] == "session.done", data[:200]
            elif kinds:
                assert kinds == ["error"] and entries[0]["fatal"], data[:200]
                assert entries[0]["code"] in ERROR_CODES and client.close_code in (1008, 1013), entries
            else:
                assert client.close_code in (1002, 1007, TOO_BIG, None), data[:200]
    eventually(lambda: not server.app.state.service._sessions)


def test_fuzzed_first_messages_are_answered(server: RunningServer, pipe: Pipeline) -> None:
    first_messages(server, pipe, seed=0, count=80)


@pytest.mark.soak
def test_a_thousand_fuzzed_first_messages_are_answered(server: RunningServer, pipe: Pipeline) -> None:
    first_messages(server, pipe, seed=time.time_ns(), count=1000)


def frame(first: int, second: int, rest: bytes = b"") -> Callable[[BareClient], None]:
    return lambda client: client.socket.sendall(bytes((first, second)) + rest)


def fragments(client: BareClient) -> None:
    client.send_frame(Opcode.TEXT, b" " * 2**16, fin=False)
    for _ in range(2):
        client.send_frame(Opcode.CONT, b" " * 2**16, fin=False)


@pytest.mark.parametrize(
    ("send", "code"),
    [
        (frame(0x81, 0x05, b"hello"), 1002),  # not masked
        (frame(0x83, 0x80, bytes(4)), 1002),  # a reserved opcode
        (frame(0xF1, 0x80, bytes(4)), 1002),  # reserved bits
        (frame(0x80, 0x80, bytes(4)), 1002),  # a continuation of nothing
        (frame(0x89, 0xFE, b"\x00\x7e" + bytes(4 + 126)), 1002),  # a long ping
        (frame(0x81, 0xFF, b"\x7f" + b"\xff" * 7 + bytes(4)), TOO_BIG),  # 2^63 bytes to come
        (fragments, TOO_BIG),
        (lambda client: client.send_frame(Opcode.TEXT, b"\xff\xfe"), 1007),
        (lambda client: client.send_frame(Opcode.TEXT, b"a" * (MESSAGE_BYTES + 1)), TOO_BIG),
        (lambda client: client.send_frame(Opcode.BINARY, bytes(MESSAGE_BYTES + 1)), TOO_BIG),
    ],
)
@pytest.mark.parametrize("started", [False, True])
def test_what_is_no_message_closes_the_connection(
    server: RunningServer, send: Callable[[BareClient], None], code: int, started: bool
) -> None:
    with BareClient(server) as client:
        if started:
            client.start()
            while not any(isinstance(entry, bytes) for entry in client.read()):
                pass
        send(client)
        client.read_to_the_end()
        assert client.close_code == code or (code == TOO_BIG and client.close_code is None)
    eventually(lambda: not server.app.state.service._sessions)


def flood(client: BareClient, data: bytes, count: int) -> None:
    """Send until the server has closed the connection, or takes no more."""
    client.socket.settimeout(2.0)
    try:
        for _ in range(count):
            client.socket.sendall(data)
    except (ConnectionError, TimeoutError):
        return


def test_a_flood_of_messages_without_reading_ends_its_session_alone(
    server: RunningServer, pipe: Pipeline
) -> None:
    ping = Frame(Opcode.TEXT, b'{"type":"session.ping"}').serialize(mask=True)
    with unharmed_session(server, pipe), BareClient(server) as client:
        client.start()
        before = resources()
        flood(client, ping * 1000, 200)
        eventually(lambda: len(server.app.state.service._sessions) == 1)
        assert resources().memory_bytes - before.memory_bytes < ALLOWED_BYTES
        eventually(lambda: len(server.server.server_state.connections) == 1)
    eventually(lambda: not server.server.server_state.connections)


def test_a_flood_of_pings_without_reading_holds_no_memory(server: RunningServer, pipe: Pipeline) -> None:
    ping = Frame(Opcode.PING, bytes(125)).serialize(mask=True)
    with unharmed_session(server, pipe), BareClient(server) as client:
        client.start(slow_client="pause")
        before = resources()
        flood(client, ping * 1000, 400)  # 50 MB
        assert resources().memory_bytes - before.memory_bytes < ALLOWED_BYTES
    eventually(lambda: not server.server.server_state.connections)


def test_a_flood_of_commands_is_refused_with_a_code(
    server: RunningServer, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn, may_turn = Session.turn, threading.Event()

    def held(session: Session, may_advance: bool) -> None:
        assert may_turn.wait(30)
        turn(session, may_advance)

    with unharmed_session(server, pipe), realtime_client(server) as client:
        client.start()
        monkeypatch.setattr(Session, "turn", held)
        for number in range(100):
            client.change_prompt(f"shape {number}", f"e{number}")
        client.send("session.snapshot", event_id="last")
        try:
            while (message := client.receive()).get("event_id") != "last":
                pass
        finally:
            may_turn.set()
        assert (message["code"], message["retryable"]) == ("too_many_commands", True)
        client.until("session.interaction.applied")
        client.send("session.snapshot", event_id="last")  # it may be tried again as it was
        assert client.until("session.snapshot.kept")["event_id"] == "last"
        client.send("session.stop")
        client.finish()
    queued = {each["event_id"] for each in client.log if each["type"] == "session.interaction.queued"}
    refused = {each["event_id"] for each in client.log if each["type"] == "error"} - {"last"}
    assert len(queued) >= MOST_COMMANDS and not queued & refused
    assert queued | refused == {f"e{number}" for number in range(100)}


def test_messages_are_read_no_faster_than_allowed(pipe: Pipeline, tmp_path) -> None:
    limits = RealtimeLimits(messages_per_s=20.0, messages_at_once=5)
    with (
        running_server(pipe, tmp_path / "data", realtime=limits) as server,
        realtime_client(server) as client,
    ):
        client.start()
        started = time.monotonic()
        for _ in range(30):
            client.send("session.ping")
        for _ in range(30):
            client.until("session.pong")
        assert time.monotonic() - started > (30 - 5 - 1) / 20.0


def test_one_large_message_takes_the_place_of_many(pipe: Pipeline, tmp_path) -> None:
    limits = RealtimeLimits(messages_per_s=20.0, messages_at_once=5)
    mistakes = {"type": "session.ping"} | {f"{number:x}": 0 for number in range(10_000)}
    with (
        running_server(pipe, tmp_path / "data", realtime=limits) as server,
        realtime_client(server) as client,
    ):
        client.start()
        started = time.monotonic()
        for _ in range(2):
            client.connection.send(json.dumps(mistakes))
            client.until("error")
        client.send("session.ping")
        client.until("session.pong")
        assert time.monotonic() - started > 1.0
