"""kernels/rephase_keys.py beside PyTorch, eager and compiled.

Run: pytest bench/bench_rephase_keys.py
"""

from collections.abc import Callable

import pytest
from kernel_cases import KernelCase, cases_of


@pytest.mark.parametrize("case", cases_of("rephase_keys"), ids=str)
def test_rephase_keys(case: KernelCase, measure: Callable[[KernelCase], None]) -> None:
    measure(case)
