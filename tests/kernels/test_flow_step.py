"""flow_step against the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rfengine.kernels.flow_step import flow_step
from rfengine.ops import reference
from support.bits import DEVICE, DTYPES, assert_same_bits, in_every_dtype, values
from support.interpreter_rounding import round_to_nearest_even


@pytest.fixture(autouse=True)
def gpu_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    round_to_nearest_even(monkeypatch)


SIGMAS = (0.9375456, 0.5882, 1.0, 0.001)
# batch, channels, frames, rows and columns of tokens, patch; a row of the last takes two programs
SIZES = [(1, 16, 3, 1, 3, 2), (2, 4, 2, 1, 5, 2), (1, 3, 2, 3, 5, 1), (1, 9, 2, 1, 24, 3)]


def level(*sigmas: float) -> torch.Tensor:
    return torch.tensor(sigmas, dtype=torch.float64, device=DEVICE)


def inputs(size: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    batch, channels, frames, rows, columns, patch = size
    tokens = values(batch, frames * rows * columns, patch * patch * channels, seed=1, dtype=dtype)
    x, noise = (
        values(batch, channels, frames, rows * patch, columns * patch, seed=seed, dtype=dtype)
        for seed in (2, 3)
    )
    return tokens, x, noise


@pytest.mark.parametrize(("size", "dtype"), in_every_dtype(SIZES))
def test_clean_latents_are_those_of_the_reference_bit_for_bit(
    size: tuple[int, ...], dtype: torch.dtype
) -> None:
    tokens, x, _ = inputs(size, dtype)
    for sigma in SIGMAS:
        expected = reference.flow_step(tokens, x, level(sigma))
        assert_same_bits(f"x0 at sigma {sigma}", flow_step(tokens, x, level(sigma)), expected)


@pytest.mark.parametrize(("size", "dtype"), in_every_dtype(SIZES))
def test_renoised_latents_are_those_of_the_reference_bit_for_bit(
    size: tuple[int, ...], dtype: torch.dtype
) -> None:
    tokens, x, noise = inputs(size, dtype)
    for sigma, following in zip(SIGMAS, SIGMAS[1:], strict=False):
        expected = reference.flow_step(tokens, x, level(sigma), noise, level(following))
        assert_same_bits(
            "the noisy latents", flow_step(tokens, x, level(sigma), noise, level(following)), expected
        )


@pytest.mark.parametrize(("size", "dtype"), in_every_dtype(SIZES[1:3]))
def test_every_frame_has_its_own_level(size: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens, x, noise = inputs(size, dtype)
    sigmas, following = level(0.9375456, 0.0), level(0.5882, 0.0)
    out = flow_step(tokens, x, sigmas, noise, following)
    assert_same_bits("by frame", out, reference.flow_step(tokens, x, sigmas, noise, following))
    shared = flow_step(tokens, x, sigmas[:1], noise, following[:1])
    assert_same_bits("the first frame", out[:, :, :1], shared[:, :, :1])
    assert_same_bits("a clean frame", out[:, :, 1:], x[:, :, 1:])


@settings(max_examples=10, deadline=None)
@given(
    size=st.tuples(*(st.integers(1, limit) for limit in (2, 7, 2, 2, 9, 3))),
    sigma=st.floats(0.0, 1.0),
    following=st.floats(0.0, 1.0),
)
def test_any_shape_and_sigma_agree(size: tuple[int, ...], sigma: float, following: float) -> None:
    tokens, x, noise = inputs(size, torch.float32)
    expected = reference.flow_step(tokens, x, level(sigma), noise, level(following))
    assert_same_bits(
        "the noisy latents", flow_step(tokens, x, level(sigma), noise, level(following)), expected
    )


@pytest.mark.parametrize(
    ("tokens_dtype", "dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_result_has_the_dtype_of_the_latents(tokens_dtype: torch.dtype, dtype: torch.dtype) -> None:
    tokens, x, noise = inputs(SIZES[0], dtype)
    tokens = tokens.to(tokens_dtype)
    expected = reference.flow_step(tokens, x, level(0.7), noise, level(0.3))
    assert_same_bits("the noisy latents", flow_step(tokens, x, level(0.7), noise, level(0.3)), expected)


def test_views_are_read_where_they_lie() -> None:
    tokens, x, noise = inputs((2, 4, 3, 2, 5, 2), torch.float32)
    wide = torch.cat((tokens, tokens), dim=2)[:, :, : tokens.shape[2]]
    late = x.transpose(1, 2).contiguous().transpose(1, 2)  # channels behind frames in memory
    turned = noise.transpose(3, 4).contiguous().transpose(3, 4)  # last axis not contiguous
    expected = reference.flow_step(tokens, x, level(0.7), noise, level(0.3))
    assert_same_bits("the noisy latents", flow_step(wide, late, level(0.7), turned, level(0.3)), expected)


@pytest.mark.parametrize("with_noise", [True, False])
def test_flow_step_is_a_well_formed_op(with_noise: bool) -> None:
    tokens, x, noise = inputs(SIZES[0], torch.float32)
    torch.library.opcheck(flow_step, (tokens, x, level(0.7), *((noise, level(0.3)) if with_noise else ())))


def test_tokens_that_do_not_fit_the_latents_are_refused() -> None:
    tokens, x, noise = inputs(SIZES[0], torch.float32)
    with pytest.raises(ValueError, match="tokens are"):
        flow_step(tokens[:, :-1], x, level(0.7), noise, level(0.3))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunk_of_the_engine_is_the_same_bit_for_bit_on_the_gpu(dtype: torch.dtype) -> None:
    tokens, x, noise = inputs((1, 16, 3, 30, 52, 2), dtype)
    for sigma, following in zip(SIGMAS, SIGMAS[1:], strict=False):
        expected = reference.flow_step(tokens, x, level(sigma), noise, level(following))
        assert_same_bits(
            "the noisy latents", flow_step(tokens, x, level(sigma), noise, level(following)), expected
        )
