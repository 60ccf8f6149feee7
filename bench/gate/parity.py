"""Part parity: every golden file through every backend that can run here, in float32 and bfloat16."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from gate.part import Item, Setting
from gate.record import Result

from rfengine.config import Backend, DTypeName
from rfengine.ops.backends import backend_reasons
from rfengine.parity.replay import replay

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
BACKENDS: tuple[Backend, ...] = ("reference", "triton", "native", "cudnn", "flash")
SIXTEEN_BIT = ("cudnn", "flash")  # the libraries' attention serves 16 bits alone


def items(setting: Setting) -> list[Item]:
    device = setting.device.type
    if setting.small:
        path = GOLDEN / "frozen_sink_absolute.safetensors"
        return [Item(f"{path.stem} reference float32", _replayed(path, "reference", device, "float32"))]
    reasons = backend_reasons(device)
    first, count = setting.shard
    return [
        Item(f"{path.stem} {backend} {dtype}", _replayed(path, backend, device, dtype))
        for backend in BACKENDS
        if not reasons[backend]
        for path in sorted(GOLDEN.glob("*.safetensors"))
        for dtype in (("bfloat16",) if backend in SIXTEEN_BIT else ("float32", "bfloat16"))
    ][first::count]


def _replayed(path: Path, backend: Backend, device: str, dtype: DTypeName) -> Callable[[], Iterator[Result]]:
    def run() -> Iterator[Result]:
        report = json.loads(replay(path, backend, device, dtype).to_json())
        yield report | {"file": path.stem, "asked": backend}

    return run
