"""kernels/flow_step.py beside PyTorch, eager and compiled.

Run: pytest bench/bench_flow_step.py
"""

from collections.abc import Callable

import pytest
from kernel_cases import KernelCase, cases_of


@pytest.mark.parametrize("case", cases_of("flow_step"), ids=str)
def test_flow_step(case: KernelCase, measure: Callable[[KernelCase], None]) -> None:
    measure(case)
