"""kernels/sink_window_attention.py beside SDPA with each backend and FlashAttention where it is installed.

Run: pytest bench/bench_sink_window_attention.py
"""

from collections.abc import Callable

import pytest
from kernel_cases import KernelCase, cases_of


@pytest.mark.parametrize("case", cases_of("sink_window_attention"), ids=str)
def test_sink_window_attention(case: KernelCase, measure: Callable[[KernelCase], None]) -> None:
    measure(case)
