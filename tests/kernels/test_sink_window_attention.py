"""Attention over the arena: every form against the reference, with errors measured in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rfengine.kernels import sink_window_attention as attention
from rfengine.kernels import sink_window_attention_descriptor as descriptor
from rfengine.kernels.device import fill
from rfengine.kernels.sink_window_attention import (
    choose_form,
    pointer_launch,
    sink_window_attention,
    sink_window_attention_slot,
)
from rfengine.ops import reference
from support.tolerance import assert_within_reference_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = ("pointer", "descriptor", "specialised")


def arena(batch, tokens, arena_tokens, heads, head_dim, dtype, kv_len, seed=0):
    """q, keys, values and kv_len; keys and values are one layer of a larger arena, NaN from kv_len on."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, tokens, heads, head_dim, generator=generator)
    cache = torch.randn(2, 2, batch, arena_tokens, heads, head_dim, generator=generator)
    cache[:, :, :, kv_len:] = float("nan")
    q, cache = q.to(DEVICE, dtype), cache.to(DEVICE, dtype)
    return q, cache[0, 1], cache[1, 1], torch.tensor([kv_len], dtype=torch.int32, device=DEVICE)


def assert_like_reference(out, q, keys, values, kv_len):
    expected = reference.sink_window_attention(q, keys, values, int(kv_len))
    truth = reference.sink_window_attention(q.double(), keys.double(), values.double(), int(kv_len))
    assert_within_reference_error("attention", out, expected, truth)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("tokens", "kv_len", "head_dim"),
    [(1, 1, 64), (63, 128, 128), (100, 129, 64)],
)
def test_half_precision_matches_reference_on_and_off_tile_borders(form, tokens, kv_len, head_dim):
    q, keys, values, length = arena(1, tokens, 384, 2, head_dim, torch.float16, kv_len)
    assert_like_reference(sink_window_attention(q, keys, values, length, form), q, keys, values, length)


@pytest.mark.parametrize(("tokens", "kv_len", "head_dim"), [(1, 17, 128), (63, 64, 64)])
def test_single_precision_matches_reference_at_its_own_rounding(tokens, kv_len, head_dim):
    q, keys, values, length = arena(2, tokens, 96, 2, head_dim, torch.float32, kv_len)
    assert_like_reference(sink_window_attention(q, keys, values, length), q, keys, values, length)


@pytest.mark.parametrize("form", ["descriptor", "specialised"])
def test_batches_and_the_parts_of_the_last_wave_are_put_together(form, monkeypatch):
    monkeypatch.setattr(descriptor, "count_processors", lambda device: 4)
    q, keys, values, length = arena(2, 130, 1024, 3, 64, torch.float16, 261)
    split = descriptor.split_tiles(6, 4, 2)
    assert (split.whole, split.cut, split.parts) == (4, 2, 2)
    assert_like_reference(sink_window_attention(q, keys, values, length, form), q, keys, values, length)


@pytest.mark.parametrize("form", FORMS)
def test_log_sum_exp_is_natural_and_in_single_precision(form, monkeypatch):
    monkeypatch.setattr(descriptor, "count_processors", lambda device: 2)
    q, keys, values, length = arena(2, 40, 1024, 3, 64, torch.float16, 140)
    _, log_sum_exp = torch.ops.rfengine.sink_window_attention(q, keys, values, length, form)

    def expected(q, keys):
        return torch.einsum("bthe,bshe->bhts", q / 8, keys[:, :140]).logsumexp(-1)

    truth = expected(q.double(), keys.double())
    assert_within_reference_error("log-sum-exp", log_sum_exp, expected(q.float(), keys.float()), truth)


@pytest.mark.parametrize("form", ["descriptor", "specialised"])
def test_parts_without_keys_do_not_count(form, monkeypatch):
    monkeypatch.setattr(descriptor, "count_processors", lambda device: 8)
    q, keys, values, length = arena(1, 20, 2048, 2, 64, torch.float16, 200)
    assert descriptor.split_tiles(2, 8, 4).parts == 4  # two tiles of keys
    assert_like_reference(sink_window_attention(q, keys, values, length, form), q, keys, values, length)


@pytest.mark.parametrize("tiles", [1, 3, 131, 132, 133, 444, 1000])
def test_split_covers_every_tile_once_and_does_not_add_a_wave(tiles):
    split = descriptor.split_tiles(tiles, 132, 8)
    assert split.whole + split.cut == tiles
    assert split.cut == 0 or split.whole % 132 == 0
    waves = split.whole / 132 + -(-split.cut * split.parts // 132) / split.parts
    assert waves <= -(-tiles // 132)


def test_last_wave_of_the_shipped_shape_takes_four_tenths_of_a_tile():
    split = descriptor.split_tiles(37 * 12, 132, 8)
    assert (split.whole, split.cut, split.parts) == (396, 48, 5)


@pytest.mark.parametrize(
    ("tokens", "heads", "rows"),
    [(4680, 12, 128), (1560, 12, 64), (4680, 40, 128), (1560, 40, 128), (63, 12, 64)],
)
def test_the_pointer_form_takes_small_tiles_where_they_fill_the_waves_better(tokens, heads, rows):
    launch = pointer_launch((9, 0), torch.bfloat16, 128, tokens, heads, 132)
    assert launch == ((64, 64, 4, 3) if rows == 64 else (128, 64, 8, 3))
    assert pointer_launch((8, 0), torch.bfloat16, 128, tokens, heads, 108) == (128, 32, 8, 3)


def test_fills_of_the_pointer_form_at_one_latent_frame():
    whole, half = (fill(1560 * 12, -(-1560 // rows) * 12, rows, 132) for rows in (128, 64))
    assert (whole, half) == pytest.approx((1560 * 12 / (264 * 128), 1560 * 12 / (396 * 64)))


def test_the_small_tiles_of_a_gpu_match_the_reference(monkeypatch):
    monkeypatch.setattr(attention, "pointer_launch", lambda *_: (64, 64, 4, 3))
    q, keys, values, length = arena(1, 63, 200, 3, 64, torch.float16, 171)
    assert_like_reference(sink_window_attention(q, keys, values, length, "pointer"), q, keys, values, length)
    q, keys, values, length = arena(1, 1561, 100, 1, 128, torch.float16, 81)  # one frame, and a row more
    assert_like_reference(sink_window_attention(q, keys, values, length, "pointer"), q, keys, values, length)


@settings(deadline=None, max_examples=4)
@given(
    form=st.sampled_from(FORMS),
    tokens=st.integers(1, 140),
    heads=st.integers(1, 3),
    kv_len=st.integers(1, 200),
)
def test_any_shape_matches_reference(form, tokens, heads, kv_len):
    q, keys, values, length = arena(1, tokens, 200, heads, 64, torch.float16, kv_len)
    assert_like_reference(sink_window_attention(q, keys, values, length, form), q, keys, values, length)


def test_large_and_very_negative_logits_stay_finite():
    q, keys, values, length = arena(1, 20, 140, 1, 64, torch.float32, 140)
    keys[:, :, :, 0] = -keys[:, :, :, 0].abs() - 100
    q[..., 0] = 10.0
    assert_like_reference(sink_window_attention(q, keys, values, length), q, keys, values, length)


def test_heads_apart_in_memory_are_read_through_their_strides():
    generator = torch.Generator().manual_seed(1)
    q, keys, values = (
        torch.randn(2, 2, tokens, 64, generator=generator).to(DEVICE).transpose(1, 2)
        for tokens in (30, 50, 50)
    )
    length = torch.tensor([41], dtype=torch.int32, device=DEVICE)
    assert_like_reference(sink_window_attention(q, keys, values, length), q, keys, values, length)
    with pytest.raises(ValueError, match="heads that are not adjacent"):
        sink_window_attention(q, keys, values, length, "descriptor")


def gradients(function, *inputs):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape).to(out.dtype)
    return torch.autograd.grad(out, leaves, weight)


@pytest.mark.parametrize(("dtype", "tokens", "kv_len"), [(torch.float32, 40, 33), (torch.float16, 65, 70)])
def test_gradients_of_queries_and_arena_match_autograd_of_reference(dtype, tokens, kv_len):
    q, keys, values, length = arena(2, tokens, 80, 2, 64, dtype, kv_len)
    keys, values = keys.nan_to_num(), values.nan_to_num()

    def expected(q, keys, values):
        return reference.sink_window_attention(q, keys, values, kv_len)

    ours = gradients(lambda *inputs: sink_window_attention(*inputs, length), q, keys, values)
    reference_grads = gradients(expected, q, keys, values)
    truth = gradients(expected, q.double(), keys.double(), values.double())
    for name, *grads in zip(("q", "keys", "values"), ours, reference_grads, truth, strict=True):
        assert_within_reference_error(f"gradient of {name}", *grads)


@pytest.mark.parametrize(("slot_start", "head_dim"), [(0, 64), (50, 128)])
def test_slot_gets_the_gradient_and_the_rest_of_the_cache_is_constant(slot_start, head_dim):
    q, keys, values, length = arena(1, 25, 90, 2, head_dim, torch.float32, 75)
    keys, values = keys.nan_to_num(), values.nan_to_num()
    slot = slice(slot_start, slot_start + 25)

    def expected(q, slot_keys, slot_values):
        arena_keys, arena_values = keys.to(q.dtype).clone(), values.to(q.dtype).clone()
        arena_keys[:, slot], arena_values[:, slot] = slot_keys, slot_values
        return reference.sink_window_attention(q, arena_keys, arena_values, 75)

    def kernel(q, slot_keys, slot_values):
        return sink_window_attention_slot(q, keys, values, length, slot_keys, slot_values, slot_start)

    inputs = q, keys[:, slot], values[:, slot]
    truth = gradients(expected, *(tensor.double() for tensor in inputs))
    names = ("q", "slot keys", "slot values")
    ours, reference_grads = gradients(kernel, *inputs), gradients(expected, *inputs)
    for name, *grads in zip(names, ours, reference_grads, truth, strict=True):
        assert_within_reference_error(f"gradient of {name}", *grads)


def test_gradient_of_a_broadcast_output_gradient_is_right():
    q, keys, values, length = arena(1, 9, 20, 1, 64, torch.float32, 20)
    q.requires_grad_()
    (ours,) = torch.autograd.grad(sink_window_attention(q, keys, values, length).sum(), q)
    (expected,) = torch.autograd.grad(reference.sink_window_attention(q, keys, values, 20).sum(), q)
    (truth,) = torch.autograd.grad(
        reference.sink_window_attention(q.double(), keys.double(), values.double(), 20).sum(), q
    )
    assert_within_reference_error("gradient", ours, expected, truth)


def test_an_arena_overwritten_before_backward_is_an_error():
    q, keys, values, length = arena(1, 4, 16, 1, 64, torch.float32, 16)
    out = sink_window_attention(q.requires_grad_(), keys, values, length)
    keys[:, :4] = 0.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_ops_pass_opcheck():
    q, keys, values, length = arena(1, 5, 20, 1, 64, torch.float32, 17)
    keys, values = keys.nan_to_num(), values.nan_to_num()
    leaves = [tensor.clone().requires_grad_() for tensor in (q, keys, values)]
    torch.library.opcheck(torch.ops.rfengine.sink_window_attention, (*leaves, length, None))
    slot = [tensor[:, 5:10].clone().requires_grad_() for tensor in (keys, values)]
    arguments = (leaves[0], keys, values, length, *slot, 5, None)
    torch.library.opcheck(torch.ops.rfengine.sink_window_attention_slot, arguments)


def test_form_follows_the_device_and_the_dtype():
    assert choose_form((9, 0), torch.bfloat16) == "specialised"
    assert choose_form((9, 0), torch.float32) == "pointer"
    assert choose_form((8, 0), torch.float16) == "pointer"
    assert choose_form(None, torch.float32) == "pointer"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, n: (q[..., :32], k[..., :32], v[..., :32], n), "the head dim is 32"),
        (lambda q, k, v, n: (q, k[:, :, :1], v, n), "both must be"),
        (lambda q, k, v, n: (q, k.half(), v, n), "cast them to one dtype"),
        (lambda q, k, v, n: (q.mT.contiguous().mT, k, v, n), "call contiguous"),
        (lambda q, k, v, n: (q, k, v, n.long()), "it must be one int32"),
        (lambda q, k, v, n: (q, k, v, n, "fast"), "must be one of"),
    ],
)
def test_inputs_it_cannot_take_are_errors(change, message):
    with pytest.raises(ValueError, match=message):
        sink_window_attention(*change(*arena(1, 4, 16, 2, 64, torch.float32, 16)))


def test_a_slot_outside_the_arena_is_an_error():
    q, keys, values, length = arena(1, 4, 16, 2, 64, torch.float32, 16)
    with pytest.raises(ValueError, match="end within the arena"):
        sink_window_attention_slot(q, keys, values, length, keys[:, :4], values[:, :4], 13)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kv_len", [4680, 9360, 14040])
def test_shipped_shape_in_bfloat16_matches_reference(form, kv_len):
    if form != "pointer" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("descriptors need Hopper or later")
    q, keys, values, length = arena(1, 4680, 14040, 12, 128, torch.bfloat16, kv_len)
    out = sink_window_attention(q, keys, values, length, form)
    expected = reference.sink_window_attention(q, keys, values, kv_len)
    truth = reference.sink_window_attention(q.float(), keys.float(), values.float(), kv_len)
    assert_within_reference_error("attention", out, expected, truth)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_one_captured_graph_serves_the_filling_and_the_full_window(form):
    if form != "pointer" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("descriptors need Hopper or later")
    q, keys, values, length = arena(1, 4680, 14040, 12, 128, torch.bfloat16, 14040)
    sink_window_attention(q, keys, values, length, form)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sink_window_attention(q, keys, values, length, form)
    for kv_len in (4680, 9360, 14040, 100):
        length.fill_(kv_len)
        graph.replay()
        assert torch.equal(out, sink_window_attention(q, keys, values, length, form))


@pytest.mark.gpu
def test_gradients_in_bfloat16_match_autograd_of_reference():
    q, keys, values, length = arena(1, 1000, 3000, 4, 128, torch.bfloat16, 2500)
    keys, values = keys.nan_to_num(), values.nan_to_num()

    def expected(q, keys, values):
        return F.scaled_dot_product_attention(
            q.transpose(1, 2), keys[:, :2500].transpose(1, 2), values[:, :2500].transpose(1, 2)
        ).transpose(1, 2)

    ours = gradients(lambda *inputs: sink_window_attention(*inputs, length), q, keys, values)
    reference_grads = gradients(expected, q, keys, values)
    truth = gradients(expected, q.double(), keys.double(), values.double())
    for name, *grads in zip(("q", "keys", "values"), ours, reference_grads, truth, strict=True):
        assert_within_reference_error(f"gradient of {name}", *grads)
