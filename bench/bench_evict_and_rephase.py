"""kernels/evict_and_rephase.py beside PyTorch, eager and compiled.

Run: pytest bench/bench_evict_and_rephase.py
"""

from collections.abc import Callable

import pytest
from kernel_cases import KernelCase, cases_of


@pytest.mark.parametrize("case", cases_of("evict_and_rephase"), ids=str)
def test_evict_and_rephase(case: KernelCase, measure: Callable[[KernelCase], None]) -> None:
    measure(case)
