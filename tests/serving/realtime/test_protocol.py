"""The messages of the realtime protocol, and the page and the schema that are made from them."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError
from websockets.sync.client import ClientConnection, connect

from rfengine.serving.realtime.protocol import (
    CLIENT_MESSAGES,
    SERVER_MESSAGES,
    ClientMessage,
    Message,
    ServerMessage,
)
from rfengine.serving.realtime.protocol_page import (
    ERROR_CODES,
    EXAMPLES,
    EXCHANGE,
    PAGE,
    SCHEMA,
    main,
    messages,
    page,
    schema,
)
from support.models import small_pipeline
from support.servers import running_server

DOCS = Path(__file__).resolve().parents[3] / "docs"
REALTIME_MODULES = (
    "admission", "points", "session", "sessions", "realtime.endpoint", "realtime.live_video",
    "realtime.messages", "realtime.outbox",
)  # fmt: skip
CLIENT_TYPES, SERVER_TYPES = (
    [get_args(model.model_fields["type"].annotation)[0] for model in messages(union)]
    for union in (ClientMessage, ServerMessage)
)
SERVER_EXAMPLES = [example for example in EXAMPLES if example["type"] not in CLIENT_TYPES]
START = {"type": "session.start", "prompt": "a red circle"}
INTERACTION = {"type": "session.interaction", "interaction": {"event": {"prompt": "a red circle"}}}
WAIT_S = 30.0
MOST_MESSAGES = 2000  # of a session that never says what is waited for


def adapter_of(example: dict[str, Any]) -> Any:
    return CLIENT_MESSAGES if example["type"] in CLIENT_TYPES else SERVER_MESSAGES


def models(base: type = Message) -> Iterator[type[Message]]:
    for model in base.__subclasses__():
        yield model
        yield from models(model)


def validators() -> tuple[Any, Any]:
    """Of messages of the client and of the server, by a package that has never seen the models."""
    package = pytest.importorskip("jsonschema_rs")
    whole = json.loads(schema())
    client, server = (
        package.validator_for({"$ref": f"#/$defs/{name}", "$defs": whole["$defs"]})
        for name in ("ClientMessage", "ServerMessage")
    )
    return client, server


# The files


@pytest.mark.parametrize(("name", "made"), [(PAGE, page), (SCHEMA, schema)])
def test_committed_file_is_what_the_messages_give(name: str, made: Any) -> None:
    same = (DOCS / name).read_text(encoding="utf-8") == made()
    assert same, f"docs/{name} is out of date; run: python -m rfengine.serving.realtime.protocol_page"


def test_main_writes_both_files(tmp_path: Path) -> None:
    main(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [PAGE, SCHEMA]
    assert (tmp_path / PAGE).read_text(encoding="utf-8") == page()


def test_page_has_one_section_for_each_message_in_order() -> None:
    titles = [line.removeprefix("### ") for line in page().splitlines() if line.startswith("### ")]
    assert titles == CLIENT_TYPES + SERVER_TYPES


def test_page_lists_every_error_code_of_the_realtime_modules() -> None:
    codes = set()
    for name in REALTIME_MODULES:
        source = inspect.getsource(importlib.import_module(f"rfengine.serving.{name}"))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Fault":
                codes |= {part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)}
        codes |= {"invalid_value", "model_not_found"} if name == "realtime.messages" else set()
    assert len(codes) > 20
    assert codes - set(" ".join(ERROR_CODES.values()).split()) == set()


# The examples


def test_examples_have_each_message_once_in_order() -> None:
    assert [example["type"] for example in EXAMPLES] == CLIENT_TYPES + SERVER_TYPES


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example["type"])
def test_example_validates(example: dict[str, Any]) -> None:
    adapter_of(example).validate_json(json.dumps(example))


@pytest.mark.parametrize("example", SERVER_EXAMPLES, ids=lambda example: example["type"])
def test_example_of_the_server_has_every_field(example: dict[str, Any]) -> None:
    message = SERVER_MESSAGES.validate_json(json.dumps(example))
    assert json.loads(message.model_dump_json()) == example


def test_examples_satisfy_the_schema_in_their_own_direction() -> None:
    client, server = validators()
    for example in EXAMPLES:
        own, other = (client, server) if example["type"] in CLIENT_TYPES else (server, client)
        own.validate(example)
        assert not other.is_valid(example)


# The models


@pytest.mark.parametrize("model", list(models()), ids=lambda model: model.__name__)
def test_model_is_described_and_closed(model: type[Message]) -> None:
    description = vars(model)["__doc__"]
    assert description and description.strip().endswith(".")
    assert model.model_config["extra"] == "forbid"
    assert model.model_config["strict"] and model.model_config["frozen"]


def places(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where the objects are in a message."""
    if isinstance(value, dict):
        yield path
        for name, entry in value.items():
            yield from places(entry, (*path, name))


def with_unknown_field(example: dict[str, Any]) -> list[dict[str, Any]]:
    """The message with another field, once in each of its objects."""
    changed = []
    for path in places(example):
        message = inner = json.loads(json.dumps(example))
        for name in path:
            inner = inner[name]
        inner["unknown"] = 1
        changed.append(message)
    return changed


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example["type"])
def test_message_with_an_unknown_field_is_refused(example: dict[str, Any]) -> None:
    for message in with_unknown_field(example):
        with pytest.raises(ValidationError) as raised:
            adapter_of(example).validate_json(json.dumps(message))
        (error,) = raised.value.errors()
        assert error["type"] == "extra_forbidden" and error["loc"][-1] == "unknown"


def test_message_with_an_unknown_field_does_not_satisfy_the_schema() -> None:
    client, server = validators()
    for message in (message for example in EXAMPLES for message in with_unknown_field(example)):
        assert not client.is_valid(message) and not server.is_valid(message)


def start(**fields: Any) -> dict[str, Any]:
    return START | fields


def interaction(**fields: Any) -> dict[str, Any]:
    return INTERACTION | {"interaction": INTERACTION["interaction"] | fields}


def several(second: Any) -> dict[str, Any]:
    """An interaction with two texts."""
    return interaction(event={"prompt": [{"text": "a", "weight": 1}, second]})


WRONG = [
    ({}, "union_tag_not_found", ""),
    ({"type": "session.begin"}, "union_tag_invalid", ""),
    ({"type": 1, "prompt": "a"}, "union_tag_invalid", ""),
    ({"type": "video.start"}, "union_tag_invalid", ""),  # of the other direction
    ([START], "dict_type", ""),
    ({"type": "session.start"}, "missing", "prompt"),
    (start(prompt=1), "string_type", "prompt"),
    (start(prompt=""), "string_too_short", "prompt"),
    (start(prompt="a" * 10_001), "string_too_long", "prompt"),
    (start(prompt=["a"]), "string_type", "prompt"),
    (start(model=5), "string_type", "model"),
    (start(format="mp4"), "literal_error", "format"),
    (start(width="64"), "int_type", "width"),
    (start(width=True), "int_type", "width"),
    (start(width=24), "multiple_of", "width"),
    (start(height=0), "greater_than_equal", "height"),
    (start(height=8208), "less_than_equal", "height"),
    (start(fps=16.5), "int_type", "fps"),
    (start(num_frames=0), "greater_than_equal", "num_frames"),
    (start(seed=-1), "greater_than_equal", "seed"),
    (start(seed=2**63), "less_than_equal", "seed"),
    (start(seed=None), "int_type", "seed"),
    (start(guidance_scale="1.0"), "float_type", "guidance_scale"),
    (start(pace="slow"), "literal_error", "pace"),
    (start(lead_seconds=-0.5), "greater_than_equal", "lead_seconds"),
    (start(slow_client="wait"), "literal_error", "slow_client"),
    (start(keep_every=10_001), "less_than_equal", "keep_every"),
    (start(record="yes"), "bool_type", "record"),
    (start(hls=1), "bool_type", "hls"),
    ({"type": "session.interaction"}, "missing", "interaction"),
    (interaction(event={}), "missing", "interaction.event.prompt"),
    (interaction(event=None), "model_type", "interaction.event"),
    (interaction(event={"prompt": ""}), "string_too_short", "interaction.event.prompt.text"),
    (interaction(event={"prompt": 7}), "string_type", "interaction.event.prompt.text"),
    (interaction(event={"prompt": []}), "too_short", "interaction.event.prompt.texts"),
    (interaction(event={"prompt": 17 * [{"text": "a"}]}), "too_long", "interaction.event.prompt.texts"),
    (several({"weight": 2}), "missing", "interaction.event.prompt.texts.1.text"),
    (several("a circle"), "model_type", "interaction.event.prompt.texts.1"),
    (several({"text": "b", "weight": 0}), "greater_than", "interaction.event.prompt.texts.1.weight"),
    (several({"text": "b", "weight": 2e6}), "less_than_equal", "interaction.event.prompt.texts.1.weight"),
    (several({"text": "b", "weight": "2"}), "float_type", "interaction.event.prompt.texts.1.weight"),
    (interaction(interpolation="cubic"), "literal_error", "interaction.interpolation"),
    (interaction(event_id=""), "string_too_short", "interaction.event_id"),
    (interaction(event_id="e" * 129), "string_too_long", "interaction.event_id"),
    (interaction(mode="fade"), "literal_error", "interaction.mode"),
    (interaction(transition_chunks=-1), "greater_than_equal", "interaction.transition_chunks"),
    (interaction(transition_chunks=1001), "less_than_equal", "interaction.transition_chunks"),
    ({"type": "session.seek"}, "missing", "snapshot_id"),
    ({"type": "session.seek", "snapshot_id": -1}, "greater_than_equal", "snapshot_id"),
    ({"type": "session.seek", "snapshot_id": "0"}, "int_type", "snapshot_id"),
    ({"type": "session.branch", "snapshot_id": 0, "seed": 1.5}, "int_type", "seed"),
    ({"type": "session.branch", "snapshot_id": 0, "prompt": ""}, "string_too_short", "prompt"),
    ({"type": "session.pause", "event_id": 7}, "string_type", "event_id"),
]


@pytest.mark.parametrize(("message", "kind", "where"), WRONG, ids=lambda value: str(value)[:60])
def test_wrong_message_is_refused_with_its_mistake(message: Any, kind: str, where: str) -> None:
    with pytest.raises(ValidationError) as raised:
        CLIENT_MESSAGES.validate_json(json.dumps(message))
    (error,) = raised.value.errors()
    assert error["type"] == kind
    assert ".".join(map(str, error["loc"][1:])) == where


def test_wrong_message_does_not_satisfy_the_schema() -> None:
    client, server = validators()
    accepted = [message for message, _, _ in WRONG if client.is_valid(message) or server.is_valid(message)]
    assert accepted == []


def test_prompt_is_a_text_or_several_with_weights() -> None:
    client, _ = validators()
    message = several({"text": "b", "weight": 0.5})
    client.validate(message)
    prompt = CLIENT_MESSAGES.validate_json(json.dumps(message)).interaction.event.prompt
    assert [(each.text, each.weight) for each in prompt] == [("a", 1.0), ("b", 0.5)]
    assert "| `interaction.event.prompt[].weight` | number, above 0 and up to 1000000 | `1.0` |" in page()
    assert "| `interaction.event.prompt[].text` | text, 1 to 10000 characters | required |" in page()


@pytest.mark.parametrize(
    "text", ["", "{", "null", "1", '"session.stop"', '{"type": "session.stop"', "\ud800"]
)
def test_text_that_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        CLIENT_MESSAGES.validate_json(text.encode("utf-8", "surrogatepass"))


# A real session


def received(connection: ClientConnection) -> dict[str, Any] | None:
    """The next message; None for a binary one."""
    message = connection.recv(timeout=WAIT_S)
    return json.loads(message) if isinstance(message, str) else None


def test_typical_exchange_takes_place_as_the_page_shows_it(tmp_path: Path) -> None:
    _, server = validators()
    log: list[dict[str, Any] | None] = []
    with (
        running_server(small_pipeline(), tmp_path) as running,
        connect(running.websocket_url) as connection,
    ):
        for sender, message in EXCHANGE:
            if sender == "client":
                pace = {"pace": "fast"} if message["type"] == "session.start" else {}
                connection.send(json.dumps(message | pace))
                continue
            while not log or not fits(log[-1], message):  # other chunks come in between
                assert len(log) < MOST_MESSAGES, f"{message} did not come"
                log.append(received(connection))
                if log[-1] is not None:
                    server.validate(log[-1])
            if message is not None:
                log.append({})  # each message is good for one step
    pairs = [entry for entry in log if entry != {}]
    for number, entry in enumerate(pairs[:-1]):
        if entry is not None and entry["type"] == "video.chunk_metadata":
            assert pairs[number + 1] is None
    assert pairs[0]["type"] == "video.start" and pairs[-1]["type"] == "session.done"


def fits(found: dict[str, Any] | None, wanted: dict[str, Any] | None) -> bool:
    """Whether a message has the fields that are wanted; None is a binary one."""
    if found is None or wanted is None:
        return found is wanted
    return all(name in found and found[name] == value for name, value in wanted.items())
