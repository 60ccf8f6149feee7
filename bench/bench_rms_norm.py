"""kernels/rms_norm.py beside PyTorch, eager and compiled.

Run: pytest bench/bench_rms_norm.py
"""

from collections.abc import Callable

import pytest
from kernel_cases import KernelCase, cases_of


@pytest.mark.parametrize("case", cases_of("rms_norm"), ids=str)
def test_rms_norm(case: KernelCase, measure: Callable[[KernelCase], None]) -> None:
    measure(case)
