import pytest
import torch

from rfengine.kernels.device import row_launch, rows_per_sum
from rfengine.kernels.layer_norm import Affine, layer_norm, layer_norm_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def case(batch=2, frames=3, tokens=6, dim=16):
    total, y, grad_total, grad_normed = torch.randn(4, batch, tokens, dim, device=DEVICE)
    gate, factor, offset = torch.randn(3, batch, frames, dim, device=DEVICE)
    return total, y, gate, factor, offset, grad_total, grad_normed, 1e-6, True


def test_tables_that_disagree_in_frames_are_refused():
    x, table = torch.randn(1, 12, 8), torch.randn(1, 3, 8)
    with pytest.raises(ValueError, match=r"the tables have \[2, 3\] rows"):
        layer_norm(x, Affine(table, table[:, :2], plus_one=True), 1e-6)


def test_other_dtypes_are_refused():
    table = torch.zeros(1, 1, 8)
    with pytest.raises(ValueError, match="x is torch.float64; the norm kernels serve"):
        layer_norm(torch.zeros(1, 2, 8, dtype=torch.float64), Affine(table, table, plus_one=True), 1e-6)


@pytest.mark.parametrize("dim", [1, 48, 192, 1536, 5120])
def test_a_program_covers_a_row(dim):
    block, num_warps = row_launch(dim)
    assert block >= dim and block & (block - 1) == 0
    assert num_warps in (1, 2, 4, 8, 16)


@pytest.mark.parametrize("rows", [1, 48, 4680, 100_000])
def test_backward_programs_share_all_rows_and_stay_few(rows):
    assert 1 <= -(-rows // rows_per_sum(rows)) <= 512


def test_gradients_are_bitwise_the_same_in_every_run():
    inputs = case()
    for first, second in zip(layer_norm_backward(*inputs), layer_norm_backward(*inputs), strict=True):
        assert torch.equal(first, second)


def test_torch_sees_the_backward_op_as_it_must():
    total, y, gate, factor, offset, *rest = case()
    torch.library.opcheck(layer_norm_backward, (total, y, gate, factor, offset, *rest))
    torch.library.opcheck(layer_norm_backward, (total, y, None, factor[:1], offset[:, :1], *rest))
    torch.library.opcheck(
        layer_norm_backward, (total, None, None, factor[0, 0], offset[0, 0], None, *rest[1:])
    )
