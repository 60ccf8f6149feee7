from __future__ import annotations

import torch
from torch import Tensor

from rfengine.checkpoint.lora_change import LoraChange, merge_lora, merged
from rfengine.checkpoint.tensor_file import StoredTensor


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_scale_is_that_of_the_product() -> None:
    weight, down, up = torch.zeros(3, 2), torch.ones(4, 2), torch.ones(3, 4)
    assert torch.equal(merge_lora(weight, down, up), torch.full((3, 2), 4.0))
    assert torch.equal(merge_lora(weight, down, up, scale=0.5), torch.full((3, 2), 2.0))


def test_every_part_of_a_change_has_the_scale_and_the_pair_its_factor() -> None:
    weight, down, up, difference = (drawn(*shape, seed=seed) for seed, shape in enumerate(
        ((6, 4), (2, 4), (6, 2), (6, 4))
    ))  # fmt: skip
    change = LoraChange(
        4.0, StoredTensor.of(down), StoredTensor.of(up), difference=StoredTensor.of(difference)
    )
    exact = weight.double() - 0.5 * (4.0 * up.double() @ down.double() + difference.double())
    torch.testing.assert_close(merged(weight, [(-0.5, change)]), exact.float())
    bias = LoraChange(4.0, bias=StoredTensor.of(drawn(6, seed=9)))
    exact = drawn(6, seed=8) + 0.5 * 4.0 * drawn(6, seed=9)
    torch.testing.assert_close(merged(drawn(6, seed=8), [(0.5, bias)]), exact)


def test_changes_are_added_in_float32_and_a_weight_of_16_bits_is_not_rounded_between_them() -> None:
    weight = torch.ones(2, 2, dtype=torch.bfloat16)
    small = LoraChange(difference=StoredTensor.of(torch.full((2, 2), 2.0**-9)))  # lost beside 1 in bfloat16
    sum_of_both = merged(weight, [(1.0, small), (1.0, small)])
    assert sum_of_both.dtype == torch.float32
    assert torch.equal(sum_of_both, torch.full((2, 2), 1 + 2.0**-8))
    assert torch.equal(weight, torch.ones(2, 2, dtype=torch.bfloat16))


def test_whole_tensor_takes_the_place_of_the_weight_and_others_add_to_it() -> None:
    weight, whole, more = (drawn(3, 3, seed=seed) for seed in range(3))
    changes = [(1.0, LoraChange(whole=StoredTensor.of(whole)))]
    assert torch.equal(merged(weight, changes), whole)
    changes.append((2.0, LoraChange(difference=StoredTensor.of(more))))
    assert torch.equal(merged(weight, changes), whole + 2.0 * more)


def test_a_change_in_memory_is_a_copy_in_the_dtype_of_the_file() -> None:
    values = drawn(2, 4, seed=0).half()
    change = LoraChange(difference=StoredTensor.of(values)).in_memory()
    values.zero_()
    assert torch.equal(change.difference.read(), drawn(2, 4, seed=0).half()) and change.nbytes == 16
