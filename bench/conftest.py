"""Benchmarks of the kernels: without a GPU they say so; with one, each kernel is checked, then timed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kernel_cases import KernelCase
from measurement import (
    ABSENT,
    OURS,
    input_sets,
    measure_case,
    measure_compiled,
    measured_ceilings,
    seeded_draw,
)
from pytest_benchmark.fixture import BenchmarkFixture

from rfengine.costs.shapes import Shapes

HERE = Path(__file__).parent
MEASURED: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    for item in items:
        if item.path.parent != HERE:  # a hook of this file sees the items of every folder
            continue
        case = item.callspec.params["case"]
        if capability is None:
            item.add_marker(pytest.mark.skip(reason=ABSENT))
        elif 10 * capability[0] + capability[1] < case.minimum_capability:
            item.add_marker(
                pytest.mark.skip(reason=f"needs compute capability {case.minimum_capability / 10}")
            )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in MEASURED if torch.cuda.is_available() else [ABSENT]:
        terminalreporter.write_line(line)


@pytest.fixture
def measure(benchmark: BenchmarkFixture) -> Callable[[KernelCase], None]:
    """Check a case, time every contender on the GPU, and give pytest-benchmark our calls from the host."""

    def measure(case: KernelCase) -> None:
        shapes, ceilings = Shapes(), measured_ceilings()
        with torch.no_grad():
            rows = [*measure_case(case, shapes, ceilings), *measure_compiled(case, shapes, ceilings)]
            MEASURED.extend(str(row) for row in rows)
            benchmark.extra_info |= {"ceilings": ceilings.to_dict(), "rows": [row.to_dict() for row in rows]}
            kernel, draw = case.kernel(), seeded_draw(3)
            sets = input_sets(lambda: case.inputs(shapes, draw), case.floor_bytes(shapes))

            def call_all() -> None:
                for arguments in sets:
                    kernel(*arguments)
                torch.cuda.synchronize()

            benchmark.name = f"{case.name} ({OURS}, {len(sets)} calls)"
            benchmark.pedantic(call_all, rounds=50, warmup_rounds=3)

    return measure
