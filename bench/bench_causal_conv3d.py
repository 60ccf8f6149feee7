"""kernels/causal_conv3d.py beside PyTorch, eager and compiled.

Run: pytest bench/bench_causal_conv3d.py
"""

from collections.abc import Callable

import pytest
from kernel_cases import KernelCase, cases_of


@pytest.mark.parametrize("case", cases_of("causal_conv3d"), ids=str)
def test_causal_conv3d(case: KernelCase, measure: Callable[[KernelCase], None]) -> None:
    measure(case)
