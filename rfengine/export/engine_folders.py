"""Folders of exported decoders: beside their checkpoint, in the user's cache directory, or a given one."""

from __future__ import annotations

import os
from pathlib import Path

from rfengine.checkpoint.directories import EXPORT_FOLDER, checkpoint_directory

_FINGERPRINT_DIGITS = 16  # of the VAE, in the name of a folder


def export_folder(directory: Path, fingerprint: str, given: Path | None = None) -> Path:
    """The folder that decoders of the checkpoint `directory` are written to: `given`, else the checkpoint's
    own where it can be written and is not the package's, else one in the user's cache directory.

    fingerprint: vae_fingerprint of the checkpoint. Raises ValueError where `given` is a file, RuntimeError
    where there is no such place.
    """
    if given is not None:
        if given.exists() and not given.is_dir():
            raise ValueError(f"{given} is no directory; choose another --out")
        return given
    own = directory / EXPORT_FOLDER
    packaged = directory.resolve() == checkpoint_directory("tiny").resolve()
    if not packaged and os.access(own if own.exists() else directory, os.W_OK | os.X_OK):
        return own
    cached = _cached_folder(directory, fingerprint)
    if cached is None:
        raise RuntimeError(f"{directory} cannot be written and there is no home directory; give --out DIR")
    return cached


def engine_folders(directory: Path, fingerprint: str, given: Path | None = None) -> tuple[Path, ...]:
    """The folders that engines are looked for in, in this order: `given` alone, or the checkpoint's own and
    the one in the user's cache directory."""
    if given is not None:
        return (given,)
    cached = _cached_folder(directory, fingerprint)
    return (directory / EXPORT_FOLDER, *([cached] if cached else []))


def _cached_folder(directory: Path, fingerprint: str) -> Path | None:
    """None for a user without a home directory."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    name = f"{directory.resolve().name}-{fingerprint[:_FINGERPRINT_DIGITS]}"
    return cache / "rfengine" / "tensorrt" / name if cache.is_absolute() else None
