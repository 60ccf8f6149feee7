"""kernels/phase_conv.py beside PyTorch, eager and compiled.

Run: pytest bench/bench_phase_conv.py
"""

from collections.abc import Callable

import pytest
from kernel_cases import KernelCase, cases_of


@pytest.mark.parametrize("case", cases_of("phase_conv"), ids=str)
def test_phase_conv(case: KernelCase, measure: Callable[[KernelCase], None]) -> None:
    measure(case)
