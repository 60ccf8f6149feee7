"""The parts of gpu_gate.py that touch the GPU, each run as a process: prints a JSON line for every result."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

import torch
from engine_shapes import Shapes
from kernel_cases import CASES, KernelCase
from measurement import Ceilings, Row, measure_case, measure_compiled, measured_ceilings, time_calls

from rfengine.backends import backend_reasons
from rfengine.evaluation.parity import replay

ROOT = Path(__file__).resolve().parents[1]


def tell(result: dict[str, Any]) -> None:
    print(json.dumps(result), flush=True)


def measure_device() -> None:
    """What the device is, its ceilings, and the matrix products of a layer."""
    properties = torch.cuda.get_device_properties()
    tell(
        {
            "gpu": properties.name,
            "processors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    )
    tell({"ceilings": measured_ceilings().to_dict()})
    shapes = Shapes()
    ffn_dim = shapes.config.model.ffn_dim
    for name, inner, outer in (
        ("q, k and v", shapes.dim, 3 * shapes.dim),
        ("attention output", shapes.dim, shapes.dim),
        ("FFN up", shapes.dim, ffn_dim),
        ("FFN down", ffn_dim, shapes.dim),
    ):
        sets = [
            tuple(
                torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
                for rows in (shapes.tokens, outer)
            )
            for _ in range(3)
        ]
        timing = time_calls(torch.nn.functional.linear, sets)
        flops = 2 * shapes.tokens * inner * outer
        tell({"linear": name, "ms": timing.median_ms, "tflop_per_s": flops / timing.median_ms / 1e9})


def replay_golden_files() -> None:
    """Every golden file through every backend that can run here."""
    backends = [name for name, reason in backend_reasons("cuda").items() if not reason]
    sixteen_bit = {"cudnn", "flash"}  # the libraries' attention serves 16 bits alone
    for path in sorted((ROOT / "tests" / "golden").glob("*.safetensors")):
        for backend in backends:
            for dtype in ("bfloat16",) if backend in sixteen_bit else ("float32", "bfloat16"):
                try:
                    print(replay(path, backend, "cuda", dtype).to_json(), flush=True)
                except (RuntimeError, ValueError, NotImplementedError) as error:
                    asked = {"file": str(path), "dtype": dtype, "backend": backend}
                    tell(asked | {"ok": False, "error": str(error)[:300]})


def time_kernels(ceilings: Ceilings, names: list[str]) -> None:
    """Every case with its rivals, then, which takes longest, what torch.compile makes of each."""
    chosen = [case for case in CASES if case.name in names]
    for measure in (measure_case, measure_compiled):
        for case in chosen:
            _time_case(case, measure, ceilings)


def _time_case(
    case: KernelCase, measure: Callable[[KernelCase, Shapes, Ceilings], Iterable[Row]], ceilings: Ceilings
) -> None:
    """A kernel that is wrong or cannot run is told of, and not timed."""
    if measure is measure_case:
        tell({"case": case.name, "begun": True})
    try:
        for row in measure(case, Shapes(), ceilings):
            tell(row.to_dict())
    except (AssertionError, RuntimeError, ValueError, NotImplementedError) as error:
        tell({"case": case.name, "wrong": f"{type(error).__name__}: {str(error)[:300]}"})
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("device", "parity", "kernels"))
    parser.add_argument(
        "--ceilings", type=json.loads, help="JSON of the ceilings, for kernels; else measured"
    )
    parser.add_argument("--cases", nargs="+", default=[], help="names of the cases, for kernels")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    if options.part == "device":
        measure_device()
    elif options.part == "parity":
        replay_golden_files()
    else:
        ceilings = Ceilings(**options.ceilings) if options.ceilings else measured_ceilings()
        time_kernels(ceilings, options.cases)


if __name__ == "__main__":
    main()
