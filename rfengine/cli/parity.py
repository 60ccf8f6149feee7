"""`rfengine parity`: golden files replayed through the engine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from rfengine.cli.exit_status import OTHER_ERROR
from rfengine.cli.terminal import fail, find_device, one_line
from rfengine.config import Backend, DTypeName


@dataclass(frozen=True, kw_only=True)
class ParityOptions:
    """Replay golden files through the engine; one JSON line each, exit 1 if one is above its tolerance."""

    files: Positional[tuple[Path, ...]]
    """Golden files: recorded weights, inputs and results of one part of the engine."""
    backend: Backend = "auto"
    """The backend to replay with."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    dtype: DTypeName = "float32"
    """Precision of weights and activations."""


def run(options: ParityOptions) -> int:
    from rfengine.ops import choose_ops
    from rfengine.parity.replay import replay

    if not options.files:
        raise ValueError("0 files are given; name at least one golden file")
    device = find_device(options.device)
    choose_ops(options.backend, device)  # a backend that cannot run is one error, not one for each file
    passed = True
    for path in options.files:
        try:
            report = replay(path, options.backend, device, options.dtype)
        except Exception as error:  # noqa: BLE001 - every file gets its line, whatever it made of the engine
            passed = False
            plain = isinstance(error, ValueError | RuntimeError | OSError)
            message = one_line(error) if plain else one_line(f"{type(error).__name__}: {error}")
            fail(message if str(path) in message else f"{path}: {message}", OTHER_ERROR)
            failure = {"file": str(path), "kind": None, "dtype": options.dtype, "backend": options.backend}
            print(json.dumps({**failure, "max_rel_err": None, "errors": {}, "ok": False, "error": message}))
        else:
            passed = passed and report.ok
            print(report.to_json(), flush=True)
    return 0 if passed else OTHER_ERROR
