"""The data directory that replicas share: the secret of their gateway, and whether it is the same one."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_SECRET_BYTES = 32
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
    secret. Raises RuntimeError where it cannot be.
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

    def remove_recordings(self, kept: Iterable[str]) -> None:
        """Remove the recordings of all replicas but those named."""
        recordings = self.data_directory / "recordings"
        kept = set(kept)
        with suppress(FileNotFoundError):
            for path in recordings.iterdir():
                if path.name not in kept:
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


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
    return path.read_text(encoding="ascii")
