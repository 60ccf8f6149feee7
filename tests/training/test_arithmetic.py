"""The toy world is trained in bfloat16 where the CPU has it, and in float32 where it would be slow."""

import pytest
import torch

from rfengine.training import arithmetic
from rfengine.training.arithmetic import fast_autocast


@pytest.mark.parametrize(("has_bfloat16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_arithmetic_is_what_the_cpu_is_fast_in(monkeypatch, has_bfloat16, dtype):
    monkeypatch.setattr(arithmetic, "multiplies_bfloat16", lambda: has_bfloat16)
    matrix = torch.ones(4, 4)
    with fast_autocast(torch.device("cpu")):
        assert (matrix @ matrix).dtype == dtype


def test_the_library_tells_of_this_cpu():
    assert isinstance(arithmetic.multiplies_bfloat16(), bool)


def test_a_build_without_the_library_has_no_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert arithmetic.multiplies_bfloat16() is False
