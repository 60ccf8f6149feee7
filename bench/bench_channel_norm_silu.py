"""kernels/channel_norm_silu.py beside PyTorch, eager and compiled.

Run: pytest bench/bench_channel_norm_silu.py
"""

from collections.abc import Callable

import pytest
from kernel_cases import KernelCase, cases_of


@pytest.mark.parametrize("case", cases_of("channel_norm_silu"), ids=str)
def test_channel_norm_silu(case: KernelCase, measure: Callable[[KernelCase], None]) -> None:
    measure(case)
