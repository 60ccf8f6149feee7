import pytest
import torch

from rfengine.ops import cpu, reference
from rfengine.ops.backends import backend_reasons
from rfengine.ops.table import OPS, implementation
from support.tolerance import assert_draws_within_reference_error

EPS = 1e-6


def drawn(*shapes):
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def wide(case):
    return [
        part.double() if isinstance(part, torch.Tensor) and part.is_floating_point() else part
        for part in case
    ]


def assert_agrees(op, *case):
    """Results of the op on "cpu", several of an op that returns several, within the reference's error."""
    with torch.no_grad():
        found, expected, truth = (
            run(*given)
            for run, given in (
                (implementation(op, "cpu"), case),
                (OPS[op].reference, case),
                (OPS[op].reference, wide(case)),
            )
        )
    if isinstance(found, torch.Tensor):
        found, expected, truth = (found,), (expected,), (truth,)
    for each in zip(found, expected, truth, strict=True):
        assert each[0].shape == each[1].shape and each[0].dtype == each[1].dtype
        assert_draws_within_reference_error(op, [each])


def test_the_backend_is_for_a_cpu_alone():
    reasons = backend_reasons("cpu"), backend_reasons("cuda")
    assert reasons[0]["cpu"] == "" and reasons[1]["cpu"] == "it is for a CPU and this device is cuda"


@pytest.mark.parametrize("op", ["linear", "linear_gelu"])
@pytest.mark.parametrize(
    ("tokens", "terms", "outputs"), [(1, 64, 96), (63, 192, 576), (21, 193, 7), (5, 1024, 1031)]
)
@pytest.mark.parametrize("layout", ["rows", "columns", "part of columns"])
def test_a_product_agrees_with_the_reference_in_every_layout_of_its_weight(
    op, tokens, terms, outputs, layout
):
    x, weight, bias = drawn((2, tokens, terms), (outputs, terms), (outputs,))
    if layout == "columns":
        weight = weight.t().contiguous().t()
    if layout == "part of columns":
        weight = torch.cat([weight, weight]).t().contiguous().t()[:outputs]
    assert_agrees(op, x, weight / terms**0.5, bias)


def test_a_product_of_part_of_a_tensor_agrees_with_the_reference():
    x, weight, bias = drawn((2, 9, 3 * 64), (96, 64), (96,))
    assert_agrees("linear", x[:, ::2, 64:128], weight / 8, bias)


@pytest.mark.parametrize("op", ["linear", "linear_gelu"])
def test_a_product_gives_way_where_a_gradient_is_recorded(op):
    case = [part.requires_grad_() for part in drawn((2, 5, 64), (32, 64), (32,))]
    found = implementation(op, "cpu")(*case)
    assert torch.equal(found, OPS[op].reference(*case))
    assert all(grad is not None for grad in torch.autograd.grad(found.sum(), case))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_every_other_dtype_is_the_reference(dtype):
    x, y, gate, shift, scale = (part.to(dtype) for part in drawn(*[(1, 6, 64)] * 2, *[(1, 1, 64)] * 3))
    weight, bias = (part.to(dtype) for part in drawn((64, 64), (64,)))
    for op, case in {
        "linear": (x, weight, bias),
        "rms_norm": (x, bias, EPS),
        "adaptive_layer_norm": (x, shift, scale, EPS),
        "gated_residual_adaptive_norm": (x, y, gate, shift, scale, EPS),
    }.items():
        found, expected = implementation(op, "cpu")(*case), OPS[op].reference(*case)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("tokens", "dim"), [(3, 8), (63, 100), (1560, 192)])
def test_norms_agree_with_the_reference(tokens, dim, rows):
    x, y, gate, shift, scale = drawn(*[(2, tokens, dim)] * 2, *[(1, rows, dim)] * 3)
    (weight,) = drawn((dim,))
    assert_agrees("rms_norm", x, weight, EPS)
    assert_agrees("adaptive_layer_norm", x, shift, scale, EPS)
    for present in (gate, None):
        assert_agrees("gated_residual_adaptive_norm", x, y, present, shift, scale, EPS)


def queries(tokens, heads, head_dim):
    """q, k and v as views of one product, the weights of their norms, and a rotation."""
    dim = heads * head_dim
    product, weight_q, weight_k, angles = drawn((2, tokens, 3 * dim), (dim,), (dim,), (tokens, head_dim // 2))
    return *product.chunk(3, -1), weight_q, weight_k, torch.stack((angles.cos(), angles.sin()))


SIZES = [(3, 3, 64), (63, 2, 6), (12, 1, 22), (1560, 2, 128)]


@pytest.mark.parametrize(("tokens", "heads", "head_dim"), SIZES)
def test_queries_and_keys_agree_with_the_reference(tokens, heads, head_dim):
    q, k, _, *rest = queries(tokens, heads, head_dim)
    assert_agrees("qk_norm_rope", q, k, *rest, heads, EPS)


@torch.no_grad()
@pytest.mark.parametrize("keeps_raw", [True, False])
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), SIZES)
def test_what_is_written_to_the_cache_agrees_with_the_reference(tokens, heads, head_dim, keeps_raw):
    given = queries(tokens, heads, head_dim)
    slots = torch.tensor([3, 0, 2])
    results = []
    for run, case in (
        (cpu.qk_norm_rope_write, given),
        (reference.qk_norm_rope_write, given),
        (reference.qk_norm_rope_write, wide(given)),
    ):
        shape = (2, 4 * tokens // 3, heads, head_dim)
        keys, values, raw = (torch.zeros(shape, dtype=case[0].dtype) for _ in range(3))
        rotated = run(*case, EPS, keys, values, raw if keeps_raw else None, slots)
        results.append((rotated, keys, values, raw))
    for found, expected, truth in zip(*results, strict=True):
        assert_draws_within_reference_error("qk_norm_rope_write", [(found, expected, truth)])
    assert results[0][3].any() == keeps_raw


@torch.no_grad()
@pytest.mark.parametrize("place", ["whole", "slots", "odd offset", "odd stride"])
def test_new_phases_agree_with_the_reference_wherever_keys_lie(place):
    (memory,) = drawn((2, 1, 12, 3, 23))
    views = {
        "whole": lambda x: x[..., :22].contiguous(),
        "slots": lambda x: x[..., :22].contiguous()[:, :, :9],
        "odd offset": lambda x: x[..., 1:],
        "odd stride": lambda x: x[..., :22],
    }
    raw = views[place](memory)
    (angles,) = drawn((raw.shape[2], 11))
    rotation = torch.stack((angles.cos(), angles.sin()))
    found, expected = views[place](memory.clone()), views[place](memory.clone())
    truth = raw.double().clone()
    cpu.rephase_keys(raw, found, rotation)
    reference.rephase_keys(raw, expected, rotation)
    reference.rephase_keys(raw.double(), truth, rotation.double())
    assert_draws_within_reference_error("rephase_keys", [(found, expected, truth)])
    assert not torch.equal(found, raw)


@torch.no_grad()
def test_a_chunk_that_leaves_is_folded_as_in_the_reference():
    raw, values, rotated = drawn(*[(2, 1, 9, 3, 64)] * 3)
    (angles,) = drawn((9, 32))
    rotation = torch.stack((angles.cos(), angles.sin()))
    both = []
    for run in (cpu.evict_and_rephase, reference.evict_and_rephase):
        low = [torch.zeros(2, 1, 3, 3, 64) for _ in range(2)]
        state = [part.clone() for part in (raw, rotated, values)]
        run(*state, *low, rotation, 3, 6, 0.9)
        both.append([*state, *low])
    for name, found, expected in zip(("raw", "rotated", "values", "low", "low"), *both, strict=True):
        torch.testing.assert_close(found, expected, msg=name)
    assert not torch.equal(both[0][0], raw)


@torch.no_grad()
@pytest.mark.parametrize("place", ["whole", "part of a row", "sixteen bits"])
@pytest.mark.parametrize("channels", [1, 8, 33])
@pytest.mark.parametrize(("has_bias", "has_residual"), [(False, False), (True, True)])
def test_the_norm_of_channels_agrees_with_the_reference(channels, place, has_bias, has_residual):
    shape = (3, 5, 7, channels)
    x, residual, bias, gamma = drawn(shape, shape, (channels,), (channels,))
    bias, residual = bias if has_bias else None, residual if has_residual else None
    results = []
    for run, kind in (
        (cpu.channel_norm_silu, torch.float32),
        (reference.channel_norm_silu, torch.float32),
        (reference.channel_norm_silu, torch.float64),
    ):
        own = torch.bfloat16 if place == "sixteen bits" and kind == torch.float32 else kind
        out = torch.full((3, 5, 7, 2 * channels), torch.nan, dtype=own)
        out = out[..., :channels] if place == "part of a row" else out[..., :channels].contiguous()
        given = [None if part is None else part.to(kind, copy=True) for part in (x, bias, residual, gamma)]
        results.append((run(*given, out), out))
    for found, expected, truth in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        assert_draws_within_reference_error("channel_norm_silu", [(found, expected, truth)])


@torch.no_grad()
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="bits are those of x86 vectors"
)
def test_bits_of_the_tiny_model_are_those_of_the_reference():
    q, k, _, weight_q, weight_k, rotation = queries(48, 3, 64)
    x, y, gate, shift, scale = drawn(*[(1, 48, 192)] * 2, *[(1, 1, 192)] * 3)
    for op, case in {
        "rms_norm": (x, weight_q, EPS),
        "qk_norm_rope": (q, k, weight_q, weight_k, rotation, 3, EPS),
        "gated_residual_adaptive_norm": (x, y, gate, shift, scale, EPS),
    }.items():
        found, expected = implementation(op, "cpu")(*case), OPS[op].reference(*case)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
