import pytest
import torch

from recipes.tiny.chunked_attention import ChunkedAttentionOps
from recipes.tiny.transformer import LAYOUTS, Segment, layout_mask
from rfengine.ops import REFERENCE_OPS


def assert_agree(query_tokens: int, key_tokens: int, chunk_tokens: int, mask: torch.Tensor | None) -> None:
    torch.manual_seed(0)
    shapes = [(2, tokens, 3, 10) for tokens in (query_tokens, key_tokens, key_tokens)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    upstream = torch.randn(shapes[0], dtype=torch.float64)
    found = ChunkedAttentionOps(chunk_tokens).clip_attention(*inputs, mask)
    expected = REFERENCE_OPS.clip_attention(*inputs, mask)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients_are_those_of_masked_attention(layout: tuple[Segment, ...]):
    assert_agree(7 * len(layout), 7 * len(layout), 7, layout_mask(layout, 7))


def test_without_a_mask_every_key_is_seen():
    assert_agree(12, 5, 4, None)
