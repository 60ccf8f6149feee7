"""kernels/linear.py beside PyTorch, eager and compiled.

Run: pytest bench/bench_linear.py
"""

from collections.abc import Callable

import pytest
from kernel_cases import KernelCase, cases_of


@pytest.mark.parametrize("case", cases_of("linear"), ids=str)
def test_linear(case: KernelCase, measure: Callable[[KernelCase], None]) -> None:
    measure(case)
