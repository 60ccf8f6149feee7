"""Attention in FP8: every form within what float32 leaves open of the rounded weights of the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rfengine.accuracy import relative_error
from rfengine.kernels import sink_window_attention_descriptor as descriptor
from rfengine.kernels import sink_window_attention_fp8 as attention
from rfengine.kernels import sink_window_attention_fp8_descriptor as fp8_descriptor
from rfengine.kernels.device import require_fp8
from rfengine.kernels.qk_norm_rope_fp8 import qk_norm_rope_write_fp8
from rfengine.kernels.sink_window_attention_fp8 import choose_form, sink_window_attention_fp8
from rfengine.kernels.window_fp8 import window_fp8
from rfengine.ops import reference, reference_fp8_attention
from rfengine.ops.reference_fp8_attention import aligned_tokens
from support.bits import DEVICE
from support.fp8_attention import E4M3, Attention, assert_rounded_from
from support.interpreter_rounding import round_to_nearest_even

FORMS = ("pointer", "descriptor", "specialised")
HALF, SINGLE = torch.float16, torch.float32


@pytest.fixture(autouse=True)
def gpu_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    round_to_nearest_even(monkeypatch)


def within(limit: Tensor, found: Tensor, exact: Tensor) -> bool:
    return bool(((found.double() - exact).abs() <= limit).all())


def assert_like_reference(case: Attention, form: str | None, dtype: torch.dtype = SINGLE) -> Tensor:
    found = sink_window_attention_fp8(*case.arguments(dtype), False, form)
    assert found.dtype == dtype and found.is_contiguous() and found.isfinite().all()
    exact, limit = case.exact(dtype)
    assert within(limit, found, exact)
    assert within(limit, reference_fp8_attention.sink_window_attention_fp8(*case.arguments(dtype)), exact)
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("tokens", "kv_len", "head_dim", "dtype"),
    [(1, 1, 64, SINGLE), (63, 128, 128, HALF), (129, 257, 64, SINGLE), (20, 191, 128, SINGLE)],
)
def test_every_form_matches_the_reference_on_and_off_tile_borders(
    form: str, tokens: int, kv_len: int, head_dim: int, dtype: torch.dtype
) -> None:
    assert_like_reference(Attention.drawn(1, tokens, 390, 2, head_dim, kv_len), form, dtype)


def test_the_limit_tells_rounded_weights_from_others() -> None:
    case = Attention.drawn(1, 30, 300, 2, 64, 290)
    exact, limit = case.exact(SINGLE)
    assert limit.norm() < 1e-3 * exact.norm()
    operands = (case.q, case.keys, case.values, case.logit_scale, case.value_unit)
    unrounded = reference_fp8_attention.sink_window_attention_fp8(
        *(tensor.double() for tensor in operands), case.kv_len, None, SINGLE
    )
    assert not within(limit, unrounded, exact)
    off = replace(case, value_unit=case.value_unit * (1 + 2**-8))
    assert not within(limit, sink_window_attention_fp8(*off.arguments(SINGLE)), exact)


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("rows", [False, True])
def test_batches_and_the_parts_of_the_last_wave_are_put_together(
    form: str, rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8_descriptor, "count_processors", lambda device: 4)
    assert descriptor.split_tiles(6, 4, 2).cut == 2
    case = Attention.drawn(2, 130, 1024, 3, 64, 261)
    found = assert_like_reference(case, form, HALF)
    if rows:
        assert_rows_of(found, *sink_window_attention_fp8(*case.arguments(HALF), True, form))


@pytest.mark.parametrize("form", FORMS[1:])
def test_parts_without_keys_do_not_count(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_descriptor, "count_processors", lambda device: 8)
    assert descriptor.split_tiles(2, 8, 4).parts == 4  # two tiles of keys
    assert_like_reference(Attention.drawn(1, 20, 2048, 2, 64, 200), form)


def assert_rows_of(result: Tensor, eights: Tensor, scales: Tensor) -> None:
    """row_fp8 of the result, whose quotient a kernel may round otherwise in its last bits."""
    expected, expected_scales = reference.row_fp8(result)
    assert torch.equal(scales, expected_scales[..., 0]) and eights.dtype == E4M3
    quotient = result.double() / scales.double()[..., None]
    assert_rounded_from("rows", eights, quotient, 2.0**-22 * quotient.abs())
    assert (eights.float() != expected.float()).float().mean() < 1e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_rows_are_rounded_to_dtype_and_then_to_their_own_scale(form: str, dtype: torch.dtype) -> None:
    case = Attention.drawn(2, 33, 150, 2, 64, 140)
    case.values[1, 0, :, :140] = torch.zeros(64, 140, device=DEVICE).to(E4M3)
    found = sink_window_attention_fp8(*case.arguments(dtype), False, form)
    eights, scales = sink_window_attention_fp8(*case.arguments(dtype), True, form)
    assert_rows_of(found, eights, scales)
    assert (scales[1, :, 0] == 1).all() and not eights[1, :, 0].float().any()
    assert (eights[0].float().abs().amax(-1) == 448).all()


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_are_nearly_zero_become_zero(form: str) -> None:
    case = Attention.drawn(1, 5, 20, 2, 64, 17)
    case.values[:, :, 0] = torch.zeros(20 + 12, device=DEVICE).to(E4M3)  # one value of each row is 0
    case = replace(case, value_unit=torch.full_like(case.value_unit, 1e-39))
    eights, scales = sink_window_attention_fp8(*case.arguments(SINGLE, True, form))
    assert not eights.float().any() and (scales == 1).all()


@settings(deadline=None, max_examples=6, derandomize=True)
@given(
    form=st.sampled_from(FORMS),
    tokens=st.integers(1, 140),
    heads=st.integers(1, 3),
    kv_len=st.integers(1, 200),
    spread=st.sampled_from([0.1, 2.0, 6.0]),
)
def test_any_shape_matches_the_reference(
    form: str, tokens: int, heads: int, kv_len: int, spread: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        round_to_nearest_even(patch)
        assert_like_reference(Attention.drawn(1, tokens, 200, heads, 64, kv_len, spread), form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first", [True, False])
def test_a_maximum_far_above_the_others_counts_wherever_it_lies(form: str, first: bool) -> None:
    case = Attention.drawn(1, 9, 384, 1, 64, 300)
    case.keys[:, 0 if first else 299] = case.q[:, 4]
    found = assert_like_reference(case, form)
    value = case.values[..., 0 if first else 299].double() * case.value_unit.double()[..., None]
    assert relative_error(found[:, 4], value) < 2**-4  # the rounding of the one weight that matters


@pytest.mark.parametrize("form", FORMS)
def test_zero_queries_weigh_all_keys_alike(form: str) -> None:
    case = Attention.drawn(1, 5, 200, 2, 64, 190)
    case = replace(case, q=torch.zeros_like(case.q, dtype=SINGLE).to(E4M3))
    mean = case.values[..., :190].double().mean(-1) * case.value_unit.double()[..., None]
    assert relative_error(assert_like_reference(case, form), mean[:, None].expand(1, 5, 2, 64)) < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_logits_far_from_zero_stay_finite(form: str) -> None:
    case = Attention.drawn(1, 20, 140, 1, 64, 140, spread=60.0)
    case.keys[..., 0] = torch.full((1, 140, 1), -448.0).to(DEVICE, E4M3)
    case.q[..., 0] = torch.full((1, 20, 1), 448.0).to(DEVICE, E4M3)
    assert_like_reference(case, form)


def test_heads_apart_in_memory_are_read_through_their_strides() -> None:
    case = Attention.drawn(2, 30, 64, 2, 64, 50)
    apart = replace(
        case,
        q=case.q.transpose(1, 2).contiguous().transpose(1, 2),
        keys=case.keys.transpose(1, 2).contiguous().transpose(1, 2),
        values=torch.cat((case.values, case.values), -1)[..., :64],
    )
    assert torch.equal(assert_like_reference(apart, None), assert_like_reference(case, "pointer"))
    with pytest.raises(ValueError, match="heads that are not adjacent"):
        sink_window_attention_fp8(*apart.arguments(SINGLE), False, "descriptor")


@pytest.mark.parametrize("form", FORMS)
def test_a_run_repeats_bit_for_bit(form: str) -> None:
    case = Attention.drawn(1, 70, 600, 2, 64, 590)
    runs = [sink_window_attention_fp8(*case.arguments(SINGLE), False, form) for _ in range(2)]
    assert torch.equal(*runs)


def test_a_chunk_written_and_attended_in_fp8_is_near_attention_in_float64() -> None:
    """All three kernels, over keys that share a large part; 0.052 is what e4m3 leaves (see the reference)."""
    generator = torch.Generator().manual_seed(1)
    tokens, window, heads, head_dim, dim = 6, 120, 2, 64, 128
    drawn = torch.randn(3, 1, window + tokens, dim, generator=generator)
    drawn[1] += 3 * torch.randn(dim, generator=generator)
    q, k, v = drawn.to(DEVICE, HALF)
    weight = torch.ones(dim, device=DEVICE, dtype=HALF)
    rotation = torch.stack((torch.ones(window, 32), torch.zeros(window, 32))).to(DEVICE)  # by no angle
    norm = (weight, weight, rotation[:, :tokens].contiguous(), 1e-6)
    _, keys = reference.qk_norm_rope(q[:, :window], k[:, :window], weight, weight, rotation, heads, 1e-6)
    values = v[:, :window].unflatten(-1, (heads, -1)).contiguous()
    chunk = [each[:, window:] for each in (q, k, v)]
    unit = torch.tensor([16 / 448], device=DEVICE)  # sqrt(dim) is the most that a norm leaves
    mean, value_unit = (torch.empty(1, 1, heads, *each, device=DEVICE) for each in ((head_dim,), ()))
    keys8 = torch.empty(1, *keys.shape, device=DEVICE).to(E4M3)
    values8 = torch.empty(1, 1, heads, head_dim, aligned_tokens(window), device=DEVICE).to(E4M3)
    filled = torch.tensor([window], dtype=torch.int32, device=DEVICE)
    window_fp8(keys[None], values[None], unit, mean, value_unit, keys8, values8, window, filled)
    layer = (mean[0], value_unit[0], keys8[0], values8[0])
    slots = torch.tensor([7, 19], device=DEVICE)
    q8 = qk_norm_rope_write_fp8(*chunk, *norm, unit, unit, *layer, slots, keys, values)
    found = sink_window_attention_fp8(
        q8, keys8[0], values8[0], unit * unit * head_dim**-0.5, value_unit[0], window, filled, HALF
    )
    rotated, _ = reference.qk_norm_rope(*chunk[:2], *norm[:3], heads, 1e-6)
    exact = reference.sink_window_attention(*(x.double() for x in (rotated, keys, values)), window)
    assert relative_error(found, exact) < 0.06


def test_the_ops_are_well_formed() -> None:
    *operands, _, filled, dtype = Attention.drawn(1, 5, 20, 1, 64, 17).arguments(SINGLE)
    for op in ("sink_window_attention_fp8", "sink_window_attention_fp8_rows"):
        # the other checks compare tensors, which torch cannot in e4m3
        arguments = (*operands, filled, dtype, None)
        torch.library.opcheck(getattr(torch.ops.rfengine, op), arguments, test_utils="test_faketensor")


def test_form_follows_the_device_and_the_dtype() -> None:
    assert choose_form((9, 0), torch.bfloat16) == "specialised"
    assert choose_form((9, 0), SINGLE) == "descriptor"
    assert choose_form((8, 9), HALF) == choose_form((12, 0), HALF) == choose_form(None, HALF) == "pointer"


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6)])
def test_a_gpu_without_fp8_is_refused(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    found = f"{capability[0]}.{capability[1]}"
    message = f"this GPU has compute capability {found} and FP8 comes with 8.9; use 16 bits on it"
    with pytest.raises(RuntimeError, match=message):
        require_fp8(capability)
    monkeypatch.setattr(attention, "capability_of", lambda device: capability)
    with pytest.raises(RuntimeError, match=message):
        sink_window_attention_fp8(*Attention.drawn(1, 4, 16, 2, 64, 16).arguments(SINGLE))
    for able in ((8, 9), (9, 0), (12, 0), None):
        require_fp8(able)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"q": c.q[..., :32], "keys": c.keys[..., :32]}, "the head dim is 32"),
        (lambda c: {"keys": c.keys[:, :, :1]}, r"keys are .*; they must be \[B, S, H, D\]"),
        (lambda c: {"values": c.values[..., :15]}, r"values are .*; they must be \[B, H, D, S8\]"),
        (lambda c: {"keys": c.keys.half()}, "keys torch.float16.*; all must be torch.float8_e4m3fn"),
        (lambda c: {"keys": c.keys.mT.contiguous().mT}, "call contiguous"),
        (lambda c: {"logit_scale": c.logit_scale.half()}, "logit_scale is torch.float16"),
        (lambda c: {"value_unit": c.value_unit[0]}, r"value_unit is .*; it must be torch.float32 \(1, 2\)"),
    ],
)
def test_inputs_it_cannot_take_are_errors(change, message: str) -> None:
    case = Attention.drawn(1, 4, 16, 2, 64, 16)
    with pytest.raises(ValueError, match=message):
        sink_window_attention_fp8(*replace(case, **change(case)).arguments(SINGLE))


def test_results_and_forms_there_are_none_of_are_errors() -> None:
    case = Attention.drawn(1, 4, 16, 2, 64, 16)
    with pytest.raises(ValueError, match="the result is asked for in torch.float64; use one of"):
        sink_window_attention_fp8(*case.arguments(torch.float64))
    with pytest.raises(ValueError, match="the form is 'fast'; it must be one of"):
        sink_window_attention_fp8(*case.arguments(SINGLE), False, "fast")


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kv_len", [4680, 14039])
def test_the_shipped_shape_matches_the_reference_on_the_gpu(form: str, kv_len: int) -> None:
    """The tensor core keeps about 14 bits of a sum in FP8: held to twice the reference's own error."""
    if form != "pointer" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("descriptors and specialisation are Hopper's")
    case = Attention.drawn(1, 4680, 14040, 12, 128, kv_len)
    found = sink_window_attention_fp8(*case.arguments(torch.bfloat16), False, form)
    operands = (case.q, case.keys, case.values, case.logit_scale, case.value_unit)
    for head in range(12):
        part = [each[:, :, head : head + 1] for each in operands[:2]]
        part += [case.values[:, head : head + 1], case.logit_scale, case.value_unit[:, head : head + 1]]
        own = reference_fp8_attention.sink_window_attention_fp8(*part, kv_len, None, torch.bfloat16)
        truth = reference_fp8_attention.sink_window_attention_fp8(
            *(each.double() for each in part), kv_len, None, torch.bfloat16
        )
        assert relative_error(found[:, :, head : head + 1], truth) <= 2 * relative_error(own, truth)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_one_captured_graph_serves_the_filling_and_the_full_window(form: str) -> None:
    if form != "pointer" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("descriptors and specialisation are Hopper's")
    case = Attention.drawn(1, 4680, 14040, 12, 128, 14040)
    arguments = case.arguments(torch.bfloat16, True, form)
    filled = arguments[6]
    sink_window_attention_fp8(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, scales = sink_window_attention_fp8(*arguments)
    for kv_len in (4680, 14040, 100):
        filled.fill_(kv_len)
        graph.replay()
        eager, eager_scales = sink_window_attention_fp8(*arguments)
        assert torch.equal(out.view(torch.uint8), eager.view(torch.uint8)) and torch.equal(
            scales, eager_scales
        )
