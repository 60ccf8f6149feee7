"""qk_norm_rope_write_fp8 against the reference, and against window_fp8 of what qk_norm_rope_write writes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rfengine.kernels import qk_norm_rope_fp8 as qk_norm_rope_fp8_file
from rfengine.kernels.qk_norm_rope import qk_norm_rope_write
from rfengine.kernels.qk_norm_rope_fp8 import qk_norm_rope_write_fp8
from rfengine.ops import reference_fp8_attention
from rfengine.ops.reference_fp8_attention import aligned_tokens
from support.bits import DEVICE, DTYPES, angles, assert_same_bits, values
from support.interpreter_rounding import round_to_nearest_even
from support.tolerance import assert_within_reference_error

EPS = 1e-6
# batch, tokens, heads, head dim, frames
SIZES = [(2, 6, 2, 24, 2), (1, 5, 12, 128, 1), (1, 4, 3, 64, 4), (2, 66, 1, 64, 1), (1, 48, 2, 8, 3)]
NAMES = ("q", "keys_fp8", "values_fp8", "keys", "values", "raw_keys")


@pytest.fixture(autouse=True)
def gpu_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    round_to_nearest_even(monkeypatch)


def rows(size: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """q, k and v, views of one packed tensor [B, T, 3 D], and the weights."""
    batch, tokens, heads, head_dim, _ = size
    dim = heads * head_dim
    packed = values(batch, tokens, 3 * dim, seed=1, dtype=dtype)
    return [*packed.chunk(3, dim=-1), *(1 + 0.3 * values(2, dim, seed=2, dtype=dtype)).unbind()]


def units(size: tuple[int, ...]) -> list[Tensor]:
    """query_unit, key_unit, key_mean and value_unit; some values are more than 448 of theirs."""
    batch, _, heads, head_dim, _ = size
    given = [torch.tensor([size], device=DEVICE) for size in (0.03, 0.05)]
    mean = values(batch, heads, head_dim, seed=3)
    return [*given, mean, 0.01 + values(batch, heads, seed=4).abs() / 100]


def slots_of(frames: int) -> Tensor:
    """Of an arena of three times the frames, neither in order nor one after another."""
    order = torch.randperm(3 * frames, generator=torch.Generator().manual_seed(frames))
    return order[:frames].to(DEVICE)


def arenas(size: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Copies and arenas of old values, three times as long as the chunk."""
    batch, tokens, heads, head_dim, _ = size
    shape = (batch, 3 * tokens, heads, head_dim)
    wide = values(batch, heads, head_dim, aligned_tokens(3 * tokens), seed=5)
    eights = [values(*shape, seed=6).to(torch.float8_e4m3fn), wide.to(torch.float8_e4m3fn)]
    return eights + [values(*shape, seed=seed, dtype=dtype) for seed in (7, 8, 9)]


def run(op, size: tuple[int, ...], dtype: torch.dtype, working: torch.dtype, kept: int) -> tuple[Tensor, ...]:
    """q, the copies and the arenas after the call, the first `kept` of which are given; in float64 all is."""
    is_truth = working == torch.float64
    batch, tokens, heads, head_dim, frames = size
    q, k, v, *weights = (each.to(working) for each in rows(size, dtype))
    given = [each.double() if is_truth else each for each in units(size)]
    into = [each.to(working) if is_truth else each for each in arenas(size, dtype)]
    options = [each if index < kept else None for index, each in enumerate(into[2:])]
    rotation = angles(tokens, head_dim)
    made = op(q, k, v, *weights, rotation, EPS, *given, *into[:2], slots_of(frames), *options)
    return made, *into


def assert_like_reference(size: tuple[int, ...], dtype: torch.dtype, kept: int = 3) -> None:
    kernel = run(qk_norm_rope_write_fp8, size, dtype, dtype, kept)
    expected = run(reference_fp8_attention.qk_norm_rope_write_fp8, size, dtype, dtype, kept)
    truth = run(reference_fp8_attention.qk_norm_rope_write_fp8, size, dtype, torch.float64, kept)
    for name, own, other, exact in zip(NAMES, kernel, expected, truth, strict=True):
        assert own.dtype == other.dtype, name
        assert_within_reference_error(name, own.float(), other.float(), exact)
    own, other = (each[2].float() for each in (kernel, expected))
    assert_same_bits("values_fp8", own, other)
    assert own.abs().max() == 448  # some saturate
    others = torch.ones(3 * size[1], dtype=torch.bool, device=DEVICE)
    frame_tokens = size[1] // size[4]
    for slot in slots_of(size[4]).tolist():
        others[slot * frame_tokens : (slot + 1) * frame_tokens] = False
    old = arenas(size, dtype)
    for name, own, before in zip(NAMES[1:], kernel[1:], old, strict=True):
        if name == "values_fp8":
            others_of = torch.cat((others, others.new_ones(before.shape[-1] - len(others))))
            own, before = own[..., others_of], before[..., others_of]
        else:
            own, before = own[:, others], before[:, others]
        assert_same_bits(f"the other slots of {name}", own.float(), before.float())
    for own, before in zip(kernel[3 + kept :], old[2 + kept :], strict=True):
        assert_same_bits("an arena that is not given", own, before)


@pytest.mark.parametrize(
    ("size", "dtype", "kept"),
    [
        (SIZES[0], torch.float32, 3), (SIZES[0], torch.bfloat16, 3), (SIZES[1], torch.float16, 0),
        (SIZES[2], torch.bfloat16, 2), (SIZES[3], torch.float16, 3), (SIZES[4], torch.float32, 0),
    ],
)  # fmt: skip
def test_a_chunk_is_written_as_the_reference_writes_it(
    size: tuple[int, ...], dtype: torch.dtype, kept: int
) -> None:
    assert_like_reference(size, dtype, kept)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    heads=st.integers(1, 4), half=st.integers(8, 40), frames=st.integers(1, 3), frame_tokens=st.integers(2, 9)
)
def test_any_shape_agrees_with_the_reference(heads: int, half: int, frames: int, frame_tokens: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        round_to_nearest_even(patch)
        assert_like_reference((2, frames * frame_tokens, heads, 2 * half, frames), torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_arena_and_its_copies_are_those_of_the_other_kernels_bit_for_bit(dtype: torch.dtype) -> None:
    size = SIZES[0]
    q8, keys8, values8, keys, spare, raw = run(qk_norm_rope_write_fp8, size, dtype, dtype, 3)
    plain = arenas(size, dtype)[2:]
    inputs = *rows(size, dtype), angles(size[1], size[3]), EPS
    q = qk_norm_rope_write(*inputs, *plain, slots_of(size[4]))
    for name, own, other in zip(NAMES[3:], (keys, spare, raw), plain, strict=True):
        assert_same_bits(name, own, other)
    query_unit, key_unit, mean, value_unit = units(size)
    exact = q.float() * query_unit.reciprocal()
    assert_same_bits("q", q8.float(), exact.clamp(-448, 448).to(torch.float8_e4m3fn).float())
    frame_tokens = size[1] // size[4]
    for slot in slots_of(size[4]).tolist():
        part = slice(slot * frame_tokens, (slot + 1) * frame_tokens)
        centred = (keys[:, part].float() - mean[:, None]) * key_unit.reciprocal()
        scaled = spare[:, part].float() * value_unit.reciprocal()[:, None, :, None]
        for name, own, exact in (
            ("keys", keys8[:, part], centred), ("values", values8[..., part].permute(0, 3, 1, 2), scaled)
        ):  # fmt: skip
            assert_same_bits(name, own.float(), exact.clamp(-448, 448).to(torch.float8_e4m3fn).float())


def test_some_heads_of_rows_are_written_as_the_other_kernel_writes_them() -> None:
    size, dtype = SIZES[0], torch.bfloat16
    _, tokens, _, head_dim, frames = size
    q, k, v, *weights = rows(size, dtype)
    means = torch.stack([(each.float().square().mean(-1) * scale) for each, scale in ((q, 1.5), (k, 0.5))])
    eights, *kept = arenas(size, dtype)[:1], *arenas(size, dtype)[2:]
    given = q, k, v, *weights, angles(tokens, head_dim), EPS
    slots = slots_of(frames)
    wide = arenas(size, dtype)[1]
    own = qk_norm_rope_write_fp8(*given, *units(size), *eights, wide, slots, *kept, means)
    others = arenas(size, dtype)[2:]
    turned = qk_norm_rope_write(*given, *others, slots, means)
    for name, one, other in zip(("keys", "values", "raw"), kept, others, strict=True):
        assert_same_bits(name, one, other)
    unit = units(size)[0]
    assert_same_bits(
        "q", own.float(), (turned.float() * unit.reciprocal()).clamp(-448, 448).to(own.dtype).float()
    )


def test_copies_that_lie_otherwise_in_memory_get_the_same_bits() -> None:
    results = []
    for apart in (False, True):
        size, dtype = SIZES[2], torch.float16
        into = arenas(size, dtype)
        if apart:
            into = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in into]
        inputs = *rows(size, dtype), angles(size[1], size[3]), EPS, *units(size)
        q = qk_norm_rope_write_fp8(*inputs, *into[:2], slots_of(size[4]), *into[2:])
        results.append((q, *into))
    for name, own, other in zip(NAMES, *results, strict=True):
        assert_same_bits(name, own.float(), other.float())


def test_the_op_is_well_formed() -> None:
    size = SIZES[4]
    inputs = *rows(size, torch.float32), angles(size[1], size[3]), EPS, *units(size)
    inputs += (*arenas(size, torch.float32)[:2], slots_of(size[4]))
    # the other checks compare tensors, which torch cannot in e4m3
    torch.library.opcheck(qk_norm_rope_write_fp8, inputs, test_utils="test_faketensor")
    changed = [
        each.name
        for each in torch.ops.rfengine.qk_norm_rope_write_fp8.default._schema.arguments
        if each.is_write
    ]
    assert changed == ["keys_fp8", "values_fp8", "keys", "values", "raw_keys"]


def test_what_it_cannot_read_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    size = SIZES[0]
    q, k, *rest = rows(size, torch.float32)
    inputs = (*rest, angles(size[1], size[3]), EPS)
    into = (*arenas(size, torch.float32)[:2], slots_of(size[4]))
    with pytest.raises(ValueError, match="the last axis of k has stride"):
        qk_norm_rope_write_fp8(q, k.mT.contiguous().mT, *inputs, *units(size), *into)
    query_unit, *others = units(size)
    with pytest.raises(ValueError, match="query_unit is torch.float16 .* must be float32 and contiguous"):
        qk_norm_rope_write_fp8(q, k, *inputs, query_unit.half(), *others, *into)
    monkeypatch.setattr(qk_norm_rope_fp8_file, "capability_of", lambda device: (8, 6))
    with pytest.raises(RuntimeError, match="compute capability 8.6 and FP8 comes with 8.9"):
        qk_norm_rope_write_fp8(q, k, *inputs, *units(size), *into)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_chunk_of_the_engine_on_the_gpu(dtype: torch.dtype) -> None:
    assert_like_reference((1, 4680, 12, 128, 3), dtype)
