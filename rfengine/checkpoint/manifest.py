"""`manifest.json` of a checkpoint directory: size and sha256 of every file, by which damage is noticed.

Loading compares the sizes, which costs nothing; `verify` reads every byte. A file may be a link, as in a
download cache: the name as given is what counts.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path, PurePosixPath
from reprlib import repr as shortened
from typing import Any

from rfengine.checkpoint.directories import EXPORT_FOLDER
from rfengine.checkpoint.fp8_table import TABLE_FILE
from rfengine.files import file_sha256, read_text, strict_json, write_text

MANIFEST_FILE = "manifest.json"
_FORMAT = 1
_MAX_BYTES = 10_000_000
_MAX_SIZE = 2**63 - 1
_READ_SUFFIXES = (".safetensors", ".json", ".model")  # what loading reads
_SHOWN = 3  # differences in one sentence


def write_manifest(directory: Path) -> None:
    """Write the manifest of the files in `directory`, in place of the one that is there. Raises OSError."""
    paths = {name: directory / name for name in _present(directory)}
    files = {name: {"size": path.stat().st_size, "sha256": file_sha256(path)} for name, path in paths.items()}
    text = json.dumps({"format": _FORMAT, "files": files}, indent=1)
    write_text(directory / MANIFEST_FILE, text + "\n")


def read_manifest(directory: Path) -> dict[str, dict[str, Any]] | None:
    """The size in bytes and the sha256 of each listed file by its name inside `directory`; None where it has
    no manifest.

    Raises ValueError for a manifest that is damaged or names anything outside of the directory.
    """
    path = directory / MANIFEST_FILE
    if not os.path.lexists(path):
        return None
    text = read_text(path, _MAX_BYTES)
    try:
        return _parse(strict_json(text))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; get it again or {_renewal(directory)}") from error


def check_sizes(directory: Path) -> None:
    """Raises ValueError where a listed file is absent or has another size; without a manifest all is well."""
    listed = read_manifest(directory) or {}
    _refuse(directory, {name: _difference(directory / name, each, False) for name, each in listed.items()})


def verify(directory: Path) -> None:
    """Read every listed file of `directory` whole and compare it with the manifest.

    Raises ValueError where one differs, where a file that loading reads is not listed, and where there is no
    manifest.
    """
    found = differences(directory)
    if found is None:
        raise ValueError(
            f"{directory} has no {MANIFEST_FILE} to verify it by; convert it again or {_renewal(directory)}"
        )
    _refuse(directory, found)


def differences(directory: Path) -> dict[str, str] | None:
    """What differs of each listed file and of each that should be, "" where nothing does; None without a
    manifest."""
    listed = read_manifest(directory)
    if listed is None:
        return None
    found = {name: _difference(directory / name, entry, True) for name, entry in listed.items()}
    unlisted = [name for name in _present(directory) if name not in listed and name.endswith(_READ_SUFFIXES)]
    return found | dict.fromkeys(unlisted, "is not listed")


def _parse(values: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(values, dict) or values.keys() != {"format", "files"}:
        raise ValueError("it is no object of format and files")
    if type(values["format"]) is not int or values["format"] != _FORMAT:
        raise ValueError(f"its format is {shortened(values['format'])} and this rfengine reads {_FORMAT}")
    if not isinstance(values["files"], dict):
        raise ValueError("its files are no object of names")
    for name, entry in values["files"].items():
        if not _is_inside(name):
            raise ValueError(f"the name {shortened(name)} is not that of a file inside the directory")
        if not isinstance(entry, dict) or entry.keys() != {"size", "sha256"}:
            raise ValueError(f"the entry of {name} is no object of size and sha256")
        size, sha256 = entry["size"], entry["sha256"]
        if type(size) is not int or not 0 <= size <= _MAX_SIZE:
            raise ValueError(f"the size of {name} is {shortened(size)}; it must be a whole number of bytes")
        if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
            raise ValueError(f"the sha256 of {name} is {shortened(sha256)}; it must be 64 hexadecimal digits")
    return values["files"]


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    plain = name.isprintable() and len(name) <= 1000 and str(path) == name and name != MANIFEST_FILE
    return plain and bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _present(directory: Path) -> list[str]:
    """The files in `directory` and its folders, without hidden ones, the manifest, what was built for one
    machine, and the table of `rfengine calibrate`, which is made there later and says whose weights it is of.
    """
    names = []
    for folder, folders, files in os.walk(directory, followlinks=False):
        inside = Path(folder).relative_to(directory)
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        if inside == Path():
            folders[:] = [each for each in folders if each != EXPORT_FOLDER]
        names += [(inside / name).as_posix() for name in sorted(files) if not name.startswith(".")]
    return [name for name in names if name not in (MANIFEST_FILE, TABLE_FILE)]


def _difference(path: Path, entry: dict[str, Any], reads: bool) -> str:
    """Why the file is not the listed one, by its size or, where it `reads`, its content; "" where it is."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return "is no ordinary file"
        if found.st_size != entry["size"]:
            return f"has {found.st_size} bytes instead of {entry['size']}"
        return "has another content (sha256)" if reads and file_sha256(path) != entry["sha256"] else ""
    except FileNotFoundError:
        return "is absent"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _refuse(directory: Path, found: dict[str, str]) -> None:
    wrong = [f"{name} {reason}" for name, reason in found.items() if reason]
    if not wrong:
        return
    more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    raise ValueError(
        f"{directory} differs from its {MANIFEST_FILE}: {', '.join(wrong[:_SHOWN])}{more}; get it again, or, "
        f"where the change is meant, {_renewal(directory)}"
    )


def _renewal(directory: Path) -> str:
    return f"run `rfengine doctor --model {directory} --renew`"
