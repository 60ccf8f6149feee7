"""kernels/ema_evict.py beside PyTorch, eager and compiled.

Run: pytest bench/bench_ema_evict.py
"""

from collections.abc import Callable

import pytest
from kernel_cases import KernelCase, cases_of


@pytest.mark.parametrize("case", cases_of("ema_evict"), ids=str)
def test_ema_evict(case: KernelCase, measure: Callable[[KernelCase], None]) -> None:
    measure(case)
