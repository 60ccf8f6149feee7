"""Files and directories that appear whole or not at all, locks between processes, and checked reading."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, BinaryIO

_RETRY_S = 0.02
_SHOWN_BYTES = 200  # of a name; file systems take 255 with what is added
_MOST_DIGITS = 1000  # of an integer in JSON; Python itself refuses to read more than 4300
_HASHED_AT_ONCE = 1 << 20  # bytes


def partial_path(path: Path) -> Path:
    """A hidden name beside `path` that no other writer has: not in this process, in another, nor in a
    container whose processes have the same numbers."""
    shown = os.fsencode(path.name)[:_SHOWN_BYTES].decode(errors="ignore")
    return path.with_name(f".{shown}.{os.getpid()}-{secrets.token_hex(8)}.partial")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give the block a hidden path beside `path` to write a file to, which takes the name `path` at the end.

    Of several writers at once the last to end wins, and each file is whole. After an error nothing is left,
    and what was there under the name stays, as a directory, a device or a pipe always does. Raises OSError
    for those, and where the disk is full or cannot be written.
    """
    if kind := _other_kind(path):
        raise FileExistsError(errno.EEXIST, f"it is {kind}", str(path))
    partial = partial_path(path)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with suppress(OSError):  # a file system that has become read-only keeps it
            partial.unlink(missing_ok=True)


@contextmanager
def new_directory(destination: Path) -> Iterator[Path]:
    """Give the block a hidden directory beside `destination`, which takes its name and its place at the end.

    After an error nothing is left, and what was there stays. Raises RuntimeError when it cannot be written.
    """
    beside = partial_path(destination)
    try:
        beside.mkdir()
        yield beside
        _take_name(beside, destination)
    except OSError as error:
        raise _cannot_write(destination, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _take_name(directory: Path, name: Path) -> None:
    if not name.exists():
        directory.rename(name)
        return
    former = partial_path(name)
    name.rename(former)  # no rename takes the place of a directory with files
    try:
        directory.rename(name)
    except BaseException:
        former.rename(name)
        raise
    shutil.rmtree(former, ignore_errors=True)


def _cannot_write(destination: Path, error: OSError) -> RuntimeError:
    return RuntimeError(
        f"cannot write {destination} ({error.strerror or error}); free space or choose another place"
    )


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text to `path`, as `replaced` does. Raises OSError."""
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def require_writable(path: Path, option: str) -> None:
    """Raises ValueError where no file can be written to `path`, the value of `option`. Directories for it are
    made."""
    try:
        if kind := _other_kind(path):
            raise ValueError(f"{option} is {path}, {kind}; name an ordinary file")
        path.parent.mkdir(parents=True, exist_ok=True)
        trial = partial_path(path)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ValueError(
            f"{option} is {path}, which cannot be written ({error.strerror}); choose another"
        ) from error


@contextmanager
def locked(path: Path, holds: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path` during the block; it is removed at the end.

    Other processes, threads and containers on this machine that see the same file are kept out; a process
    that dies lets go. holds: what the holder is doing, for the error of the others. wait_s: how long to wait
    for another holder. Raises RuntimeError when it is still held then, OSError where no file can be made.
    """
    deadline = time.monotonic() + wait_s
    while (file := _try_lock(path)) is None:
        if time.monotonic() >= deadline:
            raise RuntimeError(f"{path} is locked: another process is {holds}; wait until it has ended")
        time.sleep(_RETRY_S)
    try:
        yield
    finally:
        with suppress(OSError):  # before it is let go, so that nobody holds a file that has no name
            path.unlink(missing_ok=True)
        os.close(file)


@contextmanager
def reserved(destination: Path, holds: str) -> Iterator[None]:
    """Keep other writers out of `destination` during the block; after an error remove folders made for it.

    holds: as in `locked`. Raises ValueError where it is in use, RuntimeError where another process holds it
    or it cannot be written.
    """
    made = [folder for folder in destination.parents if not folder.exists()]
    shown = os.fsencode(destination.name)[:_SHOWN_BYTES].decode(errors="ignore")
    lock = destination.with_name(f".{shown}.lock")
    try:
        with ExitStack() as stack:
            try:
                destination.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(lock, holds))
            except OSError as error:
                raise _cannot_write(destination, error) from error
            if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
                raise ValueError(
                    f"{destination} exists and is not an empty directory; choose another or remove it"
                )
            yield
    except BaseException:
        for folder in made:
            with suppress(OSError):  # somebody else has put something there
                folder.rmdir()
        raise


def _try_lock(path: Path) -> int | None:
    """The descriptor of the locked file, or None while another holds it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file), path.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):  # held, or removed by the one that held it
        pass
    except BaseException:
        os.close(file)
        raise
    os.close(file)
    return None


def appears(path: Path, within_s: float) -> bool:
    """Whether something is at `path`, or comes within so many seconds: a file system of several machines may
    show late what another has made."""
    deadline = time.monotonic() + within_s
    while not path.exists():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_RETRY_S)
    return True


def open_regular(path: Path) -> BinaryIO:
    """Open an ordinary file for reading, a link to one included; a pipe or a device is never waited for.

    Raises ValueError when `path` is anything else, OSError (FileNotFoundError and others) as open does.
    """
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = os.fstat(file).st_mode
    if not stat.S_ISREG(kind):
        os.close(file)
        raise ValueError(f"{path} is {_KINDS.get(stat.S_IFMT(kind), 'no file')}; give an ordinary file")
    return open(file, "rb")


_KINDS = {
    stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}  # fmt: skip


def _other_kind(path: Path) -> str:
    """What is at `path` where that is no ordinary file, nor a link to one; "" where it is, or nothing is.
    Raises OSError where that cannot be found out."""
    try:
        kind = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return ""
    return "" if stat.S_ISREG(kind) else _KINDS.get(stat.S_IFMT(kind), "no file")


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Give the block an ordinary file to read. Raises ValueError where it is absent or cannot be read."""
    try:
        with open_regular(path) as file:
            yield file
    except FileNotFoundError as error:
        raise ValueError(f"{path} {absence(path)}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); make it readable") from error


def absence(path: Path) -> str:
    """How an error says that nothing is at `path`; a cache holds links, whose files may never have come."""
    if os.path.islink(path):
        return "is a link to a file that is not there: a download was not finished, so get it again"
    return "does not exist; check the path"


def read_text(path: Path, limit_bytes: int) -> str:
    """The text of an ordinary UTF-8 file of at most `limit_bytes`; a byte order mark is left out.

    Raises ValueError for anything else, one that does not exist or cannot be read included.
    """
    with reading(path) as file:
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise ValueError(f"{path} has more than the {limit_bytes} bytes that are read; give a smaller file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8 text") from error


def text_lines(text: str) -> list[str]:
    """The lines of a text, which end at \\n or \\r\\n alone; str.splitlines has others, U+2028 too."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]


def file_sha256(path: Path) -> str:
    """The sha256 of an ordinary file, as 64 hexadecimal digits. Raises as open_regular does."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(_HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def strict_json(text: str) -> Any:
    """The value of a JSON text.

    Raises ValueError for what is no JSON, NaN and infinity included, for an object that holds a key twice,
    for an integer of very many digits, and for a text that is nested too deep.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_without_repeats, parse_int=_integer, parse_constant=_refuse_constant
        )
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        repeated = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"it has the key {shortened(repeated)} twice")
    return values


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"it has an integer of {len(digits)} digits; use at most {_MOST_DIGITS}")
    return int(digits)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def json_object(text: str, source: object) -> dict[str, Any]:
    """The object that a JSON text is; source: what errors call it. Raises ValueError for anything else."""
    try:
        values = strict_json(text)
    except ValueError as error:
        raise ValueError(f"{source} is not valid JSON ({error}); get the file again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{source} holds a {type(values).__name__}, not a JSON object; get the file again")
    return values
