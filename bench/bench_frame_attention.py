"""kernels/frame_attention.py beside PyTorch, eager and compiled.

Run: pytest bench/bench_frame_attention.py
"""

from collections.abc import Callable

import pytest
from kernel_cases import KernelCase, cases_of


@pytest.mark.parametrize("case", cases_of("frame_attention"), ids=str)
def test_frame_attention(case: KernelCase, measure: Callable[[KernelCase], None]) -> None:
    measure(case)
