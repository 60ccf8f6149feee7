"""Rows of a tensor whose parts are stored apart; ranks that read theirs are in test_sharded_weights.py."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from rfengine.checkpoint.tensor_file import StoredTensor
from rfengine.training.shares import joined, placed_like, put

WHOLE = torch.arange(21.0).view(7, 3)


def stored(tensor: torch.Tensor, seen: list[tuple[int, int]]) -> StoredTensor:
    """A tensor that is read by its rows alone, which `seen` lists."""

    def rows(start: int, stop: int) -> torch.Tensor:
        seen.append((start, stop))
        return tensor[start:stop]

    return StoredTensor(tuple(tensor.shape), tensor.dtype, lambda: pytest.fail("read whole"), rows)


@pytest.mark.parametrize("sizes", [(7,), (4, 3), (3, 3, 1), (1,) * 7])
@pytest.mark.parametrize(("start", "stop"), [(0, 7), (0, 1), (2, 5), (3, 4), (6, 7)])
def test_rows_come_from_the_parts_that_have_them(sizes: Sequence[int], start: int, stop: int) -> None:
    seen: list[tuple[int, int]] = []
    whole = joined([stored(part, seen) for part in WHOLE.split(list(sizes))])
    assert whole.shape == (7, 3)
    assert torch.equal(whole.part(0, start, stop).read(), WHOLE[start:stop])
    assert sum(high - low for low, high in seen) == stop - start


def test_a_whole_tensor_is_put_together_and_cast() -> None:
    value = torch.zeros(7, 3, dtype=torch.bfloat16)
    parts = [StoredTensor.of(part) for part in WHOLE.split(4)]
    assert put(value, joined(parts)) is value
    assert torch.equal(value, WHOLE.bfloat16())
    assert placed_like(value, joined(parts)).dtype == torch.float32


def test_another_shape_is_refused_and_changes_nothing() -> None:
    value = torch.zeros(7, 3)
    for shape in ((1, 3), (7, 1), (3,), (8, 3)):  # most of which a copy would spread out
        with pytest.raises(ValueError, match=r"a tensor \(7, 3\) is stored as"):
            put(value, StoredTensor.of(torch.ones(shape)))
    assert not value.any()
