"""The record of a training checkpoint: what run it is of, and the sha256 of each of its files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rfengine.files import file_sha256, json_object, read_text, write_text

RECORD_FILE = "run.json"
_FORMAT = 2
_UNCHECKED_FORMAT = 1  # without checksums: the identity alone
_LIMIT_BYTES = 10_000_000


class DamagedCheckpointError(ValueError):
    """A checkpoint that is not whole; the message says what is wrong with it."""


def write_record(directory: Path, identity: Mapping[str, Any]) -> None:
    """Write the record of the files that lie in `directory`. identity: JSON values. Raises OSError."""
    files = {path.name: file_sha256(path) for path in sorted(directory.iterdir()) if path.name != RECORD_FILE}
    content = {"format": _FORMAT, "identity": dict(identity), "files": files}
    write_text(directory / RECORD_FILE, json.dumps(content | {"sha256": _digest(content)}, indent=1) + "\n")


def check_record(directory: Path) -> dict[str, Any]:
    """Read every file of a checkpoint against its record, and return the identity.

    A record of an earlier rfengine has no checksums: then only the record itself is checked.
    Raises DamagedCheckpointError where anything is absent, changed or not readable.
    """
    content = _read(directory / RECORD_FILE)
    if content.get("format") == _UNCHECKED_FORMAT:
        return {name: value for name, value in content.items() if name != "format"}
    stated = content.pop("sha256", None)
    if content.get("format") != _FORMAT or stated != _digest(content):
        raise DamagedCheckpointError(f"its {RECORD_FILE} is damaged")
    identity, files = content["identity"], content["files"]
    for name, digest in files.items():
        problem = _difference(directory / name, digest)
        if problem:
            raise DamagedCheckpointError(f"its file {name} {problem}")
    return identity


def _read(path: Path) -> dict[str, Any]:
    try:
        return json_object(read_text(path, _LIMIT_BYTES), path)
    except ValueError as error:
        raise DamagedCheckpointError(f"its {RECORD_FILE} cannot be read") from error


def _difference(path: Path, digest: str) -> str:
    if not re.fullmatch(r"[^/\0]+", path.name) or path.name in (".", ".."):
        return "has no name of a file"
    try:
        return "" if file_sha256(path) == digest else "is not what was written"
    except FileNotFoundError:
        return "is absent"
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
