"""docs/realtime_protocol.md and its JSON Schema, made from the messages of protocol.py.

`python -m rfengine.serving.realtime.protocol_page` writes both.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from string import Template
from typing import Any, Literal, get_args

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from rfengine.files import replaced
from rfengine.serving.options import ServiceOptions
from rfengine.serving.realtime.endpoint import RealtimeLimits
from rfengine.serving.realtime.protocol import (
    CLIENT_MESSAGES,
    SERVER_MESSAGES,
    ClientMessage,
    Message,
    ServerMessage,
)

Mode = Literal["validation", "serialization"]  # what a client may send, what a server sends
PAGE, SCHEMA = "realtime_protocol.md", "realtime_protocol.schema.json"
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_LINE = 110  # characters of an example that stays on one line

_INTRODUCTION = Template("""\
# The realtime protocol

A WebSocket at `/v1/realtime/video` carries one session: a video that is sent while it is made. Its prompt can
change at any moment, it can pause, and it can go back to an earlier point and take another course. This page
and [its JSON Schema](realtime_protocol.schema.json) (draft 2020-12, both directions) are made from
`rfengine/serving/realtime/protocol.py` by `python -m rfengine.serving.realtime.protocol_page`.
`examples/realtime_client.py` is a client in a page of Python.

## Connection
`ws://HOST:PORT/v1/realtime/video`, or `wss://` behind TLS. `session.start` is the client's first message,
within $start_s s. A connection has one session, which ends with it.

Where the server has access keys, the handshake carries one. The first of these that is there decides:
- `Authorization: Bearer KEY`, or `Authorization: Basic` with any name and the key as password;
- for browsers, which set no headers, two subprotocols: `rfengine`, which the server accepts, and
  `rfengine.bearer.` followed by the key in base64url;
- the cookie that the server sets when a browser gave the key to its own dialogue.

A key in the address is never read. The handshake is answered with HTTP 401 without a valid key, and with 403
where the page comes from an origin that the server does not serve; both have a JSON body.

## Messages
Control messages are JSON objects in text messages of at most $message_bytes bytes, told apart by `type`,
which is the title of the sections below. An unknown field or one of another type is an error, and no value is
converted. The server leaves no field out; a client ignores messages and fields that it does not know, since
later versions may add some.

`request_id` names the session. `event_id` names a message of the client and comes back in its answers: the
client takes one that is new in the session, or the server makes one. Answers need not come in the order of
their messages. The server reads $messages_at_once messages at once and $messages_per_s a second after that;
others wait.

## Order
1. `video.start` comes first. Where the session is refused, an `error` with `fatal: true` comes instead, and
   the connection closes.
2. The binary message that a `video.chunk_metadata` describes follows it at once, with nothing in between.
3. `session.state` with `draining` says that no further chunk is begun, where a session ends on its own; one
   that is being made still comes.
4. `session.done` is the last message; after a failure an `error` with `fatal: true` stands before it. Its
   `reason` is finished (all of `num_frames`), stopped (by the client), draining (the server stops), idle,
   expired, slow_client or failed.

## Binary messages
Each is one chunk: a fragment of an MP4 file (H.264) that begins with a keyframe. The first one has the
initialisation segment in front, which its `byte_length` counts too. Joined in the order of arrival they are a
file that plays; a browser appends them to a `SourceBuffer` of the type `mime`. Presentation times go on over
seeks and branches, so the file shows what was sent in the order in which it was sent; a chunk that was left
out leaves a gap.

With `record: true`, GET `download_url` gives all chunks so far as an ordinary MP4, and with `?branch=N` those
of one branch from the start of the video. With `hls: true`, other players open `hls_url`.

## Prompts and their receipts
`session.interaction` is answered by `session.interaction.queued`, and again by `session.interaction.applied`
just before the first chunk that is made with the new prompt. That chunk has the event id in
`started_event_ids`; `active_event_ids` has it while the transition lasts, and `completed_event_ids` at its
end. A change never reaches into a chunk that is being made; where the engine works a chunk ahead, it shows
one chunk later (a hard cut does not). A transition of several chunks needs the mode soft. A change that a
seek passes over before it shows gets the error `superseded`.

A prompt of several texts with weights shows the weighted mean of their text states; answers name it as
`3 * a red circle | 1 * a green square`. [The page about prompts](prompts.md) has the formulas.

## Pause, seek, branch
`session.pause` and `session.resume` are answered by `session.state`; a chunk that was being made may still
follow the answer to a pause. A paused session keeps points, seeks and branches at once; a change of its
prompt shows, and gets its receipt, when it goes on. It ends with the reason idle after $idle_s s, and any
session with the reason expired after $life_h hours.

A point is kept at `session.snapshot`, and by the server every `keep_every` chunks; `session.snapshot.kept`
says so both times. Where memory is short, automatic points are dropped (`session.snapshot.dropped`) and the
distance between them doubles. `session.seek` and `session.branch` go to a kept point. `session.moved` says on
which branch the video goes on: after a seek on the point's own where nothing was made after it, else on a new
one. A seek makes the same frames again until something changes. A branch with a prompt gets
`session.interaction.applied` too.

## Clients that read slowly
At most $queue_seconds s of video or $queue_mib MiB wait for a client, beside what the network holds; other
sessions go on. `slow_client` says what happens then: with `pause` generation waits and nothing is lost; with
`drop` the chunks that have waited longest are left out, and `dropped_chunks` of the next one counts them;
with `disconnect` the session ends. A client that takes nothing for $idle_s s ends its session with the reason
slow_client, and so does one that keeps sending and does not read the answers.

## Errors
An `error` has a `code` for programs, a sentence for people, and `retryable`: the same may succeed later.

| when | codes |
|---|---|
$codes

| close code | meaning |
|---|---|
| 1000 | the session has ended as `session.done` says |
| 1002, 1007 | the client broke the WebSocket protocol, or sent text that is not UTF-8 |
| 1008 | `session.start` was refused, and would be again |
| 1009 | a message was too large |
| 1011 | the session has failed, or its client read too slowly |
| 1012 | the server stops, and the session did not end in time |
| 1013 | `session.start` was refused for now; try again later |

## vLLM-Omni
The names and shapes are those that vLLM-Omni publishes for its streaming video output. A client of that
protocol which ignores messages and fields that it does not know plays a session here, with prompt updates.

- Refused with a typed error, since the model cannot do it: another `guidance_scale` than 1, a negative
  prompt, another `fps` or `num_inference_steps` than the model's; and `extra_params`.
- Beyond it: `num_frames` may be absent, for a video without end; `mode`, `interpolation` and a list of texts
  as prompt in `session.interaction`; `session.interaction.applied`; `session.state`; `session.pause`,
  `session.resume`, `session.snapshot`, `session.seek`, `session.branch` and their answers; `seed` of a
  branch; `pace`, `lead_seconds`, `slow_client`, `keep_every`, `record` and `hls`; `mime`, `hls_url` and
  `download_url`; in `video.chunk_metadata` the branch, the prompt, points, left out chunks and times;
  `reason` in `session.done`; all of `error` but `message`.

""")

# codes of errors by when they come; the session goes on after those of a message
ERROR_CODES = {
    "the session does not start": (
        "no_session start_timeout invalid_message binary_message invalid_value model_not_found too_large "
        "too_many_connections too_many_sessions no_memory recording_quota draining no_replica"
    ),
    "a message changes nothing": (
        "invalid_message binary_message message_too_large invalid_value already_started event_id_conflict "
        "illegal_transition session_ended too_many_commands unknown_snapshot snapshot_budget "
        "too_many_branches superseded no_memory out_of_memory command_failed"
    ),
    "the recording has ended, and the session goes on": "recording_ended",
    "the session has ended": (
        "slow_client no_memory out_of_memory chunk_failed delivery_failed engine_lost"
    ),
}  # fmt: skip

_ID = "rt_37daa8be1054e9e8114ced16b789199c"
_CIRCLE = "a large red circle moving slowly to the right over a cloudy sky"
_SQUARE = "a large green square moving slowly to the right over a cloudy sky"
_PURPLE = "a large purple circle moving slowly to the left over a cloudy sky"

EXAMPLES: tuple[dict[str, Any], ...] = (
    {
        "type": "session.start", "prompt": _CIRCLE, "model": "tiny", "seed": 3, "pace": "realtime",
        "record": True,
    },
    {
        "type": "session.interaction",
        "interaction": {"event_id": "square", "event": {"prompt": _SQUARE}, "mode": "recache"},
    },
    {"type": "session.pause", "event_id": "pause-1"},
    {"type": "session.resume", "event_id": "resume-1"},
    {"type": "session.snapshot", "event_id": "keep-1"},
    {"type": "session.seek", "snapshot_id": 0, "event_id": "seek-1"},
    {"type": "session.branch", "snapshot_id": 0, "prompt": _PURPLE, "seed": 4, "event_id": "branch-1"},
    {"type": "session.ping"},
    {"type": "session.stop"},
    {
        "type": "video.start", "request_id": _ID, "format": "m4s",
        "mime": 'video/mp4; codecs="avc1.64000a"',
        "config": {
            "model": "tiny", "prompt": _CIRCLE, "width": 64, "height": 64, "fps": 16, "num_frames": None,
            "seed": 3, "pace": "realtime", "lead_seconds": 1.0, "slow_client": "pause", "keep_every": 4,
            "chunk_frames": 12,
        },
        "hls_url": None, "download_url": f"/v1/realtime/sessions/{_ID}/video.mp4",
    },
    {
        "type": "video.chunk_metadata", "request_id": _ID, "kind": "media", "transport_chunk_index": 2,
        "generation_chunk_index": 2, "branch_id": 0, "num_frames": 12, "byte_length": 4845,
        "start_seconds": 1.3125, "prompt": _SQUARE, "started_event_ids": ["square"],
        "active_event_ids": [], "completed_event_ids": ["square"], "snapshot_id": None,
        "dropped_chunks": 0, "denoise_ms": 97.089, "decode_ms": 30.285, "encode_ms": 8.072,
    },
    {"type": "session.interaction.queued", "request_id": _ID, "event_id": "square"},
    {
        "type": "session.interaction.applied", "request_id": _ID, "event_id": "square", "chunk_index": 2,
        "branch_id": 0,
    },
    {"type": "session.state", "request_id": _ID, "state": "paused", "event_id": "pause-1"},
    {
        "type": "session.snapshot.kept", "request_id": _ID, "snapshot_id": 1, "chunk_index": 4,
        "branch_id": 0, "prompt": _SQUARE, "automatic": False, "event_id": "keep-1",
    },
    {"type": "session.snapshot.dropped", "request_id": _ID, "snapshot_id": 3},
    {
        "type": "session.moved", "request_id": _ID, "event_id": "branch-1", "snapshot_id": 0,
        "chunk_index": 0, "branch_id": 1, "parent_branch_id": 0, "prompt": _PURPLE, "seed": 4,
    },
    {"type": "session.pong"},
    {"type": "session.done", "request_id": _ID, "chunks": 9, "stopped": True, "reason": "stopped"},
    {
        "type": "error", "request_id": _ID, "event_id": "seek-1", "code": "unknown_snapshot",
        "message": "snapshot_id is 9 and no such point is kept; the newest are: 0, 1",
        "retryable": False, "fatal": False,
    },
)  # fmt: skip

# who sends what; of messages of the server the fields that matter, and None for a binary one
EXCHANGE: tuple[tuple[str, dict[str, Any] | None], ...] = (
    ("client", {"type": "session.start", "prompt": "a red circle", "pace": "realtime", "keep_every": 0}),
    ("server", {"type": "video.start", "format": "m4s"}),
    ("server", {"type": "video.chunk_metadata", "transport_chunk_index": 0, "num_frames": 9}),
    ("server", None),
    (
        "client",
        {
            "type": "session.interaction",
            "interaction": {"event_id": "a", "event": {"prompt": "a green square"}},
        },
    ),
    ("server", {"type": "session.interaction.queued", "event_id": "a"}),
    ("server", {"type": "session.interaction.applied", "event_id": "a", "branch_id": 0}),
    ("server", {"type": "video.chunk_metadata", "num_frames": 12, "started_event_ids": ["a"]}),
    ("server", None),
    ("client", {"type": "session.pause", "event_id": "b"}),
    ("server", {"type": "session.state", "state": "paused", "event_id": "b"}),
    ("client", {"type": "session.snapshot", "event_id": "c"}),
    ("server", {"type": "session.snapshot.kept", "snapshot_id": 0, "event_id": "c"}),
    ("client", {"type": "session.resume", "event_id": "d"}),
    ("server", {"type": "session.state", "state": "running", "event_id": "d"}),
    ("server", {"type": "video.chunk_metadata", "num_frames": 12, "branch_id": 0}),
    ("server", None),
    ("client", {"type": "session.branch", "snapshot_id": 0, "prompt": "a purple circle", "event_id": "e"}),
    ("server", {"type": "session.moved", "event_id": "e", "branch_id": 1, "parent_branch_id": 0}),
    ("server", {"type": "session.interaction.applied", "event_id": "e", "branch_id": 1}),
    ("server", {"type": "video.chunk_metadata", "num_frames": 12, "branch_id": 1}),
    ("server", None),
    ("client", {"type": "session.stop"}),
    ("server", {"type": "session.done", "stopped": True, "reason": "stopped"}),
)  # fmt: skip


class _JsonSchema(GenerateJsonSchema):
    """Requires every field of a message of the server, which leaves none out."""

    def field_is_required(self, field: Any, total: bool) -> bool:
        return self.mode == "serialization" or super().field_is_required(field, total)


def messages(union: Any) -> tuple[type[Message], ...]:
    """The models of ClientMessage or ServerMessage, in the order of protocol.py."""
    return get_args(get_args(union)[0])


def schema() -> str:
    """The JSON Schema of both directions; its $defs have ClientMessage and ServerMessage alone too."""
    unions = {"ClientMessage": CLIENT_MESSAGES, "ServerMessage": SERVER_MESSAGES}
    modes = {"ClientMessage": "validation", "ServerMessage": "serialization"}
    inputs = [(name, modes[name], adapter) for name, adapter in unions.items()]
    schemas, definitions = TypeAdapter.json_schemas(inputs, schema_generator=_JsonSchema)
    own = {name: schemas[name, modes[name]] for name in unions}
    whole = {
        "$schema": _DIALECT,
        "title": "Messages of WS /v1/realtime/video",
        "oneOf": [{"$ref": f"#/$defs/{name}"} for name in unions],
        "$defs": own | definitions["$defs"],
    }
    return json.dumps(whole, indent=1) + "\n"


def page() -> str:
    """The page."""
    parts = [_introduction(), "## A typical exchange\n", _exchange()]
    examples = {example["type"]: example for example in EXAMPLES}
    for title, union, mode in (
        ("From the client", ClientMessage, "validation"),
        ("From the server", ServerMessage, "serialization"),
    ):
        parts.append(f"## {title}\n\n")
        parts += [_section(model, mode, examples) for model in messages(union)]
    return "".join(parts).rstrip() + "\n"


def _introduction() -> str:
    limits, service = RealtimeLimits(), ServiceOptions()
    rows = (
        f"| {when} | {', '.join(f'`{code}`' for code in codes.split())} |"
        for when, codes in ERROR_CODES.items()
    )
    return _INTRODUCTION.substitute(
        start_s=f"{limits.start_s:g}",
        message_bytes=limits.message_bytes,
        messages_per_s=f"{limits.messages_per_s:g}",
        messages_at_once=limits.messages_at_once,
        queue_seconds=f"{limits.queue_seconds:g}",
        queue_mib=limits.queue_bytes // 2**20,
        idle_s=f"{service.idle_s:g}",
        life_h=f"{service.life_s / 3600:g}",
        codes="\n".join(rows),
    )


def _exchange() -> str:
    lines = ["Of the server's messages only some fields are shown.", "", "```"]
    for sender, message in EXCHANGE:
        lines.append(f"{sender}  {'(binary message)' if message is None else json.dumps(message)}")
    return "\n".join([*lines, "```", "", ""])


def _section(model: type[Message], mode: Mode, examples: dict[str, dict[str, Any]]) -> str:
    """What the page says of one message."""
    whole = TypeAdapter(model).json_schema(mode=mode)
    name = whole["properties"]["type"]["const"]
    client = mode == "validation"
    rows = _rows(whole, whole.get("$defs", {}), "", client)
    example = json.dumps(examples[name])
    if len(example) > _LINE:
        example = json.dumps(examples[name], indent=2)
    description = inspect.cleandoc(whole["description"]).replace("\n", " ")
    parts = [f"### {name}\n{description}", f"```json\n{example}\n```", ""]
    if rows:
        titles = "| field | type | default | meaning |" if client else "| field | type | meaning |"
        parts.insert(1, "\n".join([titles, "|---" * (titles.count("|") - 1) + "|", *rows]))
    return "\n\n".join(parts)


def _rows(schema: dict[str, Any], models: dict[str, Any], prefix: str, client: bool) -> list[str]:
    """The rows of an object's fields; those of an object in it, and of each in a list, come after its own,
    with a dotted name."""
    rows = []
    fields = {name: field for name, field in schema["properties"].items() if name != "type"}
    for name, field in fields.items():
        cells = [f"`{prefix}{name}`", _type_in_words(field)]
        if client:
            default = field.get("default")
            cells.append("required" if name in schema["required"] else f"`{json.dumps(default)}`")
        rows.append(f"| {' | '.join([*cells, field.get('description', '')])} |")
        for kind in field.get("oneOf", [field]):
            reference = kind.get("$ref") or kind.get("items", {}).get("$ref")
            if reference is not None:
                inner = f"{prefix}{name}." if "$ref" in kind else f"{prefix}{name}[]."
                rows += _rows(models[reference.rpartition("/")[2]], models, inner, client)
    return rows


def _type_in_words(field: dict[str, Any]) -> str:
    """A JSON Schema as a reader says it."""
    if "$ref" in field:
        return "object"
    kinds = [_type_in_words(kind) for kind in field.get("anyOf", field.get("oneOf", []))]
    if kinds:
        return (", or " if "," in kinds[0] else " or ").join(kinds)
    if "const" in field or "enum" in field:
        return ", ".join(f"`{json.dumps(value)}`" for value in field.get("enum", [field.get("const")]))
    if "$ref" in field.get("items", {}):
        return f"list of {field['minItems']} to {field['maxItems']} objects"
    words = {"string": "text", "boolean": "true or false", "array": "list of texts"}
    return words.get(field["type"], field["type"]) + _limits_in_words(field)


def _limits_in_words(field: dict[str, Any]) -> str:
    """What follows the type of a text or a number."""
    if "maxLength" in field:
        low = field.get("minLength", 0)
        return f", {f'{low} to' if low else 'at most'} {field['maxLength']} characters"
    if "exclusiveMinimum" in field:
        return f", above {field['exclusiveMinimum']} and up to {field['maximum']}"
    low, high, multiple = (field.get(name) for name in ("minimum", "maximum", "multipleOf"))
    limits = "" if low is None else f", {low:g} or more" if high is None else f", {low:g} to {int(high)}"
    return limits + ("" if multiple is None else f", a multiple of {multiple}")


def main(directory: Path) -> None:
    """Write the page and the schema into `directory`."""
    for name, text in ((PAGE, page()), (SCHEMA, schema())):
        with replaced(directory / name) as partial:
            partial.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(__file__).resolve().parents[3] / "docs")
