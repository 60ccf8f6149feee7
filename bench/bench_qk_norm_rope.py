"""kernels/qk_norm_rope.py beside PyTorch, eager and compiled.

Run: pytest bench/bench_qk_norm_rope.py
"""

from collections.abc import Callable

import pytest
from kernel_cases import KernelCase, cases_of


@pytest.mark.parametrize("case", cases_of("qk_norm_rope"), ids=str)
def test_qk_norm_rope(case: KernelCase, measure: Callable[[KernelCase], None]) -> None:
    measure(case)
