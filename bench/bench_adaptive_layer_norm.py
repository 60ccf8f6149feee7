"""kernels/adaptive_layer_norm.py beside PyTorch, eager and compiled.

Run: pytest bench/bench_adaptive_layer_norm.py
"""

from collections.abc import Callable

import pytest
from kernel_cases import KernelCase, cases_of


@pytest.mark.parametrize("case", cases_of("adaptive_layer_norm"), ids=str)
def test_adaptive_layer_norm(case: KernelCase, measure: Callable[[KernelCase], None]) -> None:
    measure(case)
