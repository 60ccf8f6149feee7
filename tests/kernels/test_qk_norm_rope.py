"""qk_norm_rope, its gradients, and qk_norm_rope_write against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rfengine.kernels import qk_norm_rope as qk_norm_rope_file
from rfengine.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_write
from rfengine.kernels.rephase_keys import rephase_keys
from rfengine.ops import reference
from support.against_reference import assert_op_matches
from support.bits import DEVICE, DTYPES, angles, assert_same_bits, values
from support.interpreter_rounding import round_to_nearest_even
from support.tolerance import assert_within_reference_error

EPS = 1e-6
# batch, tokens, heads, head dim. Several rows in all of them: in float32 the error of a row is that of its
# one rounded rms, which the reference may hit by luck
SIZES = [(8, 1, 1, 64), (2, 3, 12, 128), (2, 5, 2, 24), (1, 6, 40, 128)]
CASES = [
    (SIZES[0], torch.float32), (SIZES[1], torch.float16), (SIZES[2], torch.bfloat16),
    (SIZES[2], torch.float32), (SIZES[3], torch.float16),
]  # fmt: skip


@pytest.fixture(autouse=True)
def gpu_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    round_to_nearest_even(monkeypatch)


def weights(dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [(1 + 0.3 * torch.randn(dim, generator=generator)).to(DEVICE, dtype) for _ in range(2)]


def rows(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v as views of one packed tensor [B, T, 3 D]."""
    batch, tokens, heads, head_dim = size
    packed = values(batch, tokens, 3 * heads * head_dim, seed=1, dtype=dtype)
    return list(packed.chunk(3, dim=-1))


@pytest.mark.parametrize(("size", "dtype"), CASES)
def test_norm_rotation_and_gradients_agree_with_the_reference(
    size: tuple[int, ...], dtype: torch.dtype
) -> None:
    _, tokens, heads, head_dim = size
    rotation = angles(tokens, head_dim)
    q, k, _ = rows(size, dtype)
    assert_op_matches(
        lambda *leaves: qk_norm_rope(*leaves[:4], rotation, heads, leaves[4]),
        lambda *leaves: reference.qk_norm_rope(*leaves[:4], rotation, heads, leaves[4]),
        [q, k, *weights(heads * head_dim, dtype)],
    )


@settings(max_examples=4, deadline=None, derandomize=True)
@given(size=st.tuples(st.integers(1, 2), st.integers(3, 4), st.integers(1, 5), st.integers(8, 40)))
def test_any_shape_agrees_with_the_reference(size: tuple[int, ...]) -> None:
    batch, tokens, heads, half = size
    rotation = angles(tokens, 2 * half)
    q, k, _ = rows((batch, tokens, heads, 2 * half), torch.float16)
    assert_op_matches(
        lambda *leaves: qk_norm_rope(*leaves[:4], rotation, heads, leaves[4]),
        lambda *leaves: reference.qk_norm_rope(*leaves[:4], rotation, heads, leaves[4]),
        [q, k, *weights(2 * heads * half, torch.float16)],
    )


def test_weight_gradients_are_summed_over_programs_that_take_several_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(qk_norm_rope_file, "rows_per_sum", lambda rows: 4)
    rotation = angles(5, 64)
    q, k, _ = rows((2, 5, 2, 64))
    assert_op_matches(
        lambda *leaves: qk_norm_rope(*leaves[:4], rotation, 2, leaves[4]),
        lambda *leaves: reference.qk_norm_rope(*leaves[:4], rotation, 2, leaves[4]),
        [q, k, *weights(128)],
    )


def test_gradients_reach_a_packed_tensor_through_an_attention_layout() -> None:
    rotation = angles(7, 24)
    packed, (weight_q, weight_k) = values(2, 7, 3 * 48, seed=3), weights(48)
    towards = values(2, 2, 7, 24, seed=4)

    def gradient(op, dtype: torch.dtype) -> Tensor:
        leaf = packed.to(dtype).requires_grad_()
        q, k, v = leaf.chunk(3, dim=-1)
        q, k = op(q, k, weight_q.to(dtype), weight_k.to(dtype), rotation, 2, EPS)
        scores = (q.transpose(1, 2) * towards.to(dtype)).sum() + k.sum() + v.sum()
        return torch.autograd.grad(scores, leaf)[0]

    truth = gradient(reference.qk_norm_rope, torch.float64)
    expected = gradient(reference.qk_norm_rope, torch.float32)
    assert_within_reference_error("packed", gradient(qk_norm_rope, torch.float32), expected, truth)


def test_checkpointed_activations_give_the_same_gradients() -> None:
    rotation, (weight_q, weight_k) = angles(6, 64), weights(128)
    q, k = (x.contiguous().requires_grad_() for x in rows((1, 6, 2, 64))[:2])

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return sum(out.square().sum() for out in qk_norm_rope(q, k, weight_q, weight_k, rotation, 2, EPS))

    plain = torch.autograd.grad(loss(q, k), (q, k))
    again = torch.autograd.grad(checkpoint(loss, q, k, use_reentrant=False), (q, k))
    for name, own, other in zip(("q", "k"), again, plain, strict=True):
        assert_same_bits(name, own, other)


FRAMES = {1: 1, 2: 2, 3: 3, 4: 2, 5: 5, 6: 2}  # of a chunk of so many tokens


def arenas_of(size: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Three arenas [B, 3 T, H, E] of old values, thrice as long as the chunk."""
    batch, tokens, heads, head_dim = size
    return [values(batch, 3 * tokens, heads, head_dim, seed=seed, dtype=dtype) for seed in (5, 6, 7)]


def scattered(tokens: int) -> Tensor:
    """A slot of that arena for every frame, neither in order nor one after another."""
    frames = FRAMES[tokens]
    order = torch.randperm(3 * frames, generator=torch.Generator().manual_seed(tokens))
    return order[:frames].to(DEVICE)


def tokens_of(slots: Tensor, tokens: int) -> Tensor:
    frame_tokens = tokens // len(slots)
    return (slots[:, None] * frame_tokens + torch.arange(frame_tokens, device=slots.device)).flatten()


@pytest.mark.parametrize(
    ("size", "dtype", "keep_raw"), [(*case, True) for case in CASES] + [(SIZES[2], torch.float16, False)]
)
def test_frames_are_written_as_the_reference_writes_them(
    size: tuple[int, ...], dtype: torch.dtype, keep_raw: bool
) -> None:
    _, tokens, heads, head_dim = size
    rotation, scales, slots = angles(tokens, head_dim), weights(heads * head_dim), scattered(tokens)
    results = []
    for op, working in (
        (qk_norm_rope_write, dtype),
        (reference.qk_norm_rope_write, dtype),
        (reference.qk_norm_rope_write, torch.float64),
    ):
        arenas = [arena.to(working) for arena in arenas_of(size, dtype)]
        inputs = [x.to(working) for x in rows(size, dtype)] + [w.to(dtype).to(working) for w in scales]
        keys, spare, raw = arenas
        q = op(*inputs, rotation, EPS, keys, spare, raw if keep_raw else None, slots)
        results.append((q, *arenas))
    kernel, expected, truth = results
    for name, own, other, exact in zip(("q", "keys", "values", "raw"), kernel, expected, truth, strict=True):
        assert_within_reference_error(name, own, other, exact)
    old_keys, _, old_raw = arenas_of(size, dtype)
    others = torch.ones(3 * tokens, dtype=torch.bool, device=DEVICE)
    others[tokens_of(slots, tokens)] = False
    assert_same_bits("values", kernel[2], expected[2])
    assert_same_bits("the other slots", kernel[1][:, others], old_keys[:, others])
    if not keep_raw:
        assert_same_bits("raw keys", kernel[3], old_raw)


@pytest.mark.parametrize("dtype", DTYPES)
def test_some_heads_of_rows_are_written_as_the_whole_rows_are(dtype: torch.dtype) -> None:
    size = (2, 6, 3, 64)
    rotation, slots = angles(6, 64), scattered(6)
    q, k, v = rows(size, dtype)
    scales = weights(192, dtype)
    means = torch.stack([x.double().square().mean(-1) for x in (q, k)])
    for heads in (slice(0, 1), slice(1, 3)):
        part = slice(64 * heads.start, 64 * heads.stop)
        results = []
        for op, working, squares in (
            (qk_norm_rope_write, dtype, means.float()),
            (reference.qk_norm_rope_write, dtype, means.float()),
            (reference.qk_norm_rope_write, torch.float64, None),
        ):
            columns = slice(None) if squares is None else part
            own = heads if squares is not None else slice(None)
            arenas = [each[:, :, own].to(working) for each in arenas_of(size, dtype)]
            inputs = [x[..., columns].to(working) for x in (q, k, v)]
            given = [weight[columns].to(working) for weight in scales]
            turned = op(*inputs, *given, rotation, EPS, *arenas, slots, squares)
            results.append([x if squares is not None else x[:, :, heads] for x in (turned, *arenas)])
        for name, *found in zip(("q", "keys", "values", "raw"), *results, strict=True):
            assert_within_reference_error(name, *found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_written_keys_are_the_rephased_raw_keys_bit_for_bit(dtype: torch.dtype) -> None:
    size = (2, 6, 3, 64)
    rotation, (keys, spare, raw), slots = angles(6, 64), arenas_of(size, dtype), scattered(6)
    qk_norm_rope_write(*rows(size, dtype), *weights(192, dtype), rotation, EPS, keys, spare, raw, slots)
    own = tokens_of(slots, 6)
    again = torch.empty_like(keys[:, own])
    rephase_keys(raw[:, own][None], again[None], rotation)
    assert_same_bits("keys", keys[:, own], again)


def test_arenas_that_lie_head_first_in_memory_get_the_same_bits() -> None:
    results = []
    for head_first in (True, False):
        arenas = [values(2, 3, 8, 64, seed=seed).transpose(1, 2) for seed in (5, 6, 7)]
        keys, spare, raw = arenas if head_first else [arena.contiguous() for arena in arenas]
        inputs = *rows((2, 4, 3, 64)), *weights(192), angles(4, 64), EPS
        q = qk_norm_rope_write(*inputs, keys, spare, raw, torch.tensor([3, 0], device=DEVICE))
        results.append((q, keys, spare, raw))
    for name, own, other in zip(("q", "keys", "values", "raw"), *results, strict=True):
        assert_same_bits(name, own, other)


def test_qk_norm_rope_is_a_well_formed_op() -> None:
    q, k = (x.contiguous().requires_grad_() for x in rows((1, 2, 2, 64))[:2])
    scales = [weight.requires_grad_() for weight in weights(128)]
    torch.library.opcheck(qk_norm_rope, (q, k, *scales, angles(2, 64), 2, EPS))


@pytest.mark.parametrize("keep_raw", [True, False])
def test_qk_norm_rope_write_is_a_well_formed_op(keep_raw: bool) -> None:
    size = (1, 2, 2, 64)
    keys, spare, raw = arenas_of(size, torch.float32)
    arenas = keys, spare, raw if keep_raw else None
    inputs = (*rows(size), *weights(128), angles(2, 64), EPS, *arenas, scattered(2))
    torch.library.opcheck(qk_norm_rope_write, inputs)


def test_rows_with_a_strided_last_axis_are_refused() -> None:
    q, k, _ = rows((1, 64, 1, 64))
    with pytest.raises(ValueError, match="last axis of k"):
        qk_norm_rope(q, k.transpose(1, 2), *weights(64), angles(64, 64), 1, EPS)


def test_an_odd_head_dim_is_refused() -> None:
    q, k, _ = rows((1, 4, 2, 3))
    with pytest.raises(ValueError, match="must be even"):
        qk_norm_rope(q, k, *weights(6), angles(4, 2), 2, EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 4680, 12, 128), (1, 4680, 40, 128)])
def test_chunk_of_the_engine_is_written_as_by_the_reference_on_the_gpu(
    size: tuple[int, ...], dtype: torch.dtype
) -> None:
    test_frames_are_written_as_the_reference_writes_them(size, dtype, keep_raw=True)
    test_norm_rotation_and_gradients_agree_with_the_reference(size, dtype)
