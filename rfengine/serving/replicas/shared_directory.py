"""The data directory that replicas share: the secret of their gateway, and whether it is the same one."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterable
from pathlib import Path

_SECRET_BYTES = 32
_SECRET = re.compile(rf"[0-9a-f]{{{2 * _SECRET_BYTES}}}")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def this_machine() -> str:
    """A name that no other machine or container has."""
    try:
        boot = _BOOT_ID.read_text(encoding="ascii").strip()[:8]
    except OSError:
        boot = "unknown"
    return f"{socket.gethostname()}-{boot}"


class SharedDirectory:
    """The files beside the jobs and recordings: `replicas/secret`, which only its owner can read, and the
    table.

    Made where it is absent; of several processes that do so at once one succeeds, and all have the same
    secret. Raises RuntimeError where it cannot be, and for a secret that others can read or that is none.
    """

    def __init__(self, data_directory: Path) -> None:
        self.data_directory = data_directory
        folder = data_directory / "replicas"
        self.table_path = folder / "replicas.sqlite"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.secret = _secret(folder / "secret")
        except OSError as error:
            raise RuntimeError(
                f"the data directory {data_directory} cannot be used ({error.strerror}); make it writable or "
                "choose another"
            ) from error

    @property
    def token(self) -> str:
        """What another process compares with its own; it does not give the secret."""
        return hashlib.sha256(self.secret.encode()).hexdigest()[:16]

    def require(self, token: str) -> None:
        """Raises ValueError unless the directory is the one with that token."""
        if token != self.token:
            raise ValueError(
                f"{self.data_directory} on {this_machine()} is another directory ({self.token}) than that of "
                f"the other replicas ({token}); name one that all machines share"
            )

    def remove_recordings(self, kept: Callable[[], Iterable[str]]) -> None:
        """Remove the recordings of all replicas but those that `kept` names. It is asked when the directory
        has been read, so that those of a replica that joins meanwhile stay."""
        try:
            found = list((self.data_directory / "recordings").iterdir())
        except FileNotFoundError:
            return
        names = set(kept())
        for path in found:
            if path.name in names:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _secret(path: Path) -> str:
    """The text of the file; a new one where there is none."""
    if not path.exists():
        new = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(_SECRET_BYTES))
        try:
            os.link(new, path)  # which fails where another was first
        except FileExistsError:
            pass
        finally:
            new.unlink()
    with path.open(encoding="ascii", errors="replace") as file:
        mode, text = os.fstat(file.fileno()).st_mode & 0o777, file.read(4 * _SECRET_BYTES)
    return _checked(path, mode, text)


def _checked(path: Path, mode: int, text: str) -> str:
    if mode & 0o077:
        raise RuntimeError(f"{path} has mode {mode:o}, so others can use the replicas; run: chmod 600 {path}")
    if not _SECRET.fullmatch(text):
        raise RuntimeError(
            f"{path} is not {2 * _SECRET_BYTES} hexadecimal digits; remove it while no replica runs"
        )
    return text
