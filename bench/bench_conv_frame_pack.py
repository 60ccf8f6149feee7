"""kernels/conv_frame_pack.py beside PyTorch, eager and compiled.

Run: pytest bench/bench_conv_frame_pack.py
"""

from collections.abc import Callable

import pytest
from kernel_cases import KernelCase, cases_of


@pytest.mark.parametrize("case", cases_of("conv_frame_pack"), ids=str)
def test_conv_frame_pack(case: KernelCase, measure: Callable[[KernelCase], None]) -> None:
    measure(case)
