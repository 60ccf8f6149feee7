"""A checkpoint directory that is being written: whole or not at all, and one conversion at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from rfengine.files import locked, partial_path

_LOCK_NAME_BYTES = 200  # of the destination's name in that of its lock; file systems take 255


@contextmanager
def reserved(destination: Path) -> Iterator[None]:
    """Keep other conversions out of `destination` during the block; folders made for it go after an error.

    Raises ValueError where it is in use, RuntimeError where another process holds it or it cannot be written.
    """
    made = [folder for folder in destination.parents if not folder.exists()]
    shown = os.fsencode(destination.name)[:_LOCK_NAME_BYTES].decode(errors="ignore")
    lock = destination.with_name(f".{shown}.lock")
    try:
        with ExitStack() as stack:
            try:
                destination.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(lock, f"converting into {destination}"))
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


@contextmanager
def new_directory(destination: Path) -> Iterator[Path]:
    """A directory beside `destination` that takes its name at the end, and the place of what is there.

    If anything fails it goes, and what is there stays. Raises RuntimeError when it cannot be written.
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
