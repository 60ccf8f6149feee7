import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from rfengine.ops import reference
from rfengine.rotary import rotary_table


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_the_reference_that_kernels_are_held_to_is_not_rounded_to_tf32():
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_adaptive_norm_uses_one_row_for_each_latent_frame():
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    shift, scale = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    out = reference.adaptive_layer_norm(x, shift, scale, 1e-6)
    for frame in range(3):
        tokens = slice(2 * frame, 2 * frame + 2)
        normed = F.layer_norm(x[:, tokens], (8,), eps=1e-6)
        expected = normed * (1 + scale[:, frame, None]) + shift[:, frame, None]
        torch.testing.assert_close(out[:, tokens], expected)


def test_gated_residual_norms_the_sum():
    x, y, gate = torch.randn(1, 4, 8), torch.randn(1, 4, 8), torch.randn(1, 1, 8)
    weight, bias = torch.randn(8), torch.randn(8)
    total, normed = reference.gated_residual_affine_norm(x, y, gate, weight, bias, 1e-6)
    torch.testing.assert_close(total, x + gate * y)
    torch.testing.assert_close(normed, F.layer_norm(x + gate * y, (8,), weight, bias, 1e-6))
    total, _ = reference.gated_residual_adaptive_norm(x, y, None, gate, gate, 1e-6)
    torch.testing.assert_close(total, x + y)


def test_rms_norm_is_rounded_before_the_weight():
    x, weight = torch.randn(3, 16).bfloat16(), torch.randn(16).bfloat16()
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(reference.rms_norm(x, weight, 1e-6), wide.bfloat16() * weight)


def test_rotation_turns_interleaved_pairs_by_their_angle():
    x = torch.zeros(1, 1, 1, 4, dtype=torch.float64)
    x[..., 0], x[..., 3] = 1.0, 1.0
    angles = torch.tensor([[0.3, 1.1]], dtype=torch.float64)
    out = reference.rotate(x, torch.stack((angles.cos(), angles.sin()))).flatten().tolist()
    assert out == pytest.approx([math.cos(0.3), math.sin(0.3), -math.sin(1.1), math.cos(1.1)])


def test_attention_depends_on_relative_time_only():
    q, k, v = (torch.randn(1, 12, 2, 16, dtype=torch.float64) for _ in range(3))
    early = rotary_table(16, torch.tensor([0, 1]), 2, 3).double()
    late = rotary_table(16, torch.tensor([5000, 5001]), 2, 3).double()

    def attend(table):
        return reference.clip_attention(reference.rotate(q, table), reference.rotate(k, table), v, None)

    torch.testing.assert_close(attend(early), attend(late), rtol=0, atol=1e-6)


def test_rotary_table_splits_a_head_of_128_into_44_42_42():
    table = rotary_table(128, torch.tensor([0, 1]), 2, 2)
    assert table.shape == (2, 8, 64)
    cos = table[0]
    assert torch.equal(cos[0], torch.ones(64))
    time_step, column_step, row_step = cos[4], cos[1], cos[2]
    assert (time_step[:22] != 1).any() and torch.equal(time_step[22:], torch.ones(42))
    assert torch.equal(row_step[:22], torch.ones(22)) and row_step[22] == pytest.approx(math.cos(1.0))
    assert torch.equal(column_step[:43], torch.ones(43)) and column_step[43] == pytest.approx(math.cos(1.0))
    assert time_step[1].item() == pytest.approx(math.cos(10000 ** (-2 / 44)), abs=1e-7)


def test_window_attention_reads_the_filled_part_only():
    q, keys, values = torch.randn(2, 3, 2, 8), torch.randn(2, 10, 2, 8), torch.randn(2, 10, 2, 8)
    keys[:, 7:], values[:, 7:] = float("nan"), float("nan")
    out = reference.sink_window_attention(q, keys, values, 7)
    scores = torch.einsum("bthe,bshe->bhts", q, keys[:, :7]) / 8**0.5
    torch.testing.assert_close(out, torch.einsum("bhts,bshe->bthe", scores.softmax(-1), values[:, :7]))


def test_every_frame_is_written_to_its_slot_rotated_and_raw():
    q, k, v = torch.randn(1, 12, 16), torch.randn(1, 12, 16), torch.randn(1, 12, 16)
    weight, slots = torch.randn(16), torch.tensor([2, 0])
    table = rotary_table(8, torch.tensor([4, 5]), 2, 3)
    keys, values, raw = (torch.full((1, 18, 2, 8), float("nan")) for _ in range(3))
    rotated_q = reference.qk_norm_rope_write(q, k, v, weight, weight, table, 1e-6, keys, values, raw, slots)
    expected_q, expected_k = reference.qk_norm_rope(q, k, weight, weight, table, 2, 1e-6)

    def written(arena):
        assert arena[:, 6:12].isnan().all()
        return torch.cat([arena[:, 12:], arena[:, :6]], dim=1)

    assert torch.equal(rotated_q, expected_q) and torch.equal(written(keys), expected_k)
    assert torch.equal(written(values), v.view(1, 12, 2, 8))
    assert torch.equal(reference.rotate(written(raw), table), written(keys))


def test_split_ema_follows_float64_where_bf16_stands_still():
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(2, 1, 1, 4, 2, 32, generator=generator)
    exact = start.bfloat16().double()
    split, plain = start.bfloat16().clone(), start.bfloat16().clone()
    low = torch.zeros_like(split)
    for _ in range(5000):
        evicted = (0.5 + torch.randn(start.shape, generator=generator)).bfloat16()
        exact = 0.999 * exact + 0.001 * evicted.double()
        reference.ema_evict(split[0], split[1], low[0], low[1], evicted[0], evicted[1], 0.999)
        reference.ema_evict(plain[0], plain[1], None, None, evicted[0], evicted[1], 0.999)
    together = split.double() + low.double()
    assert ((together - exact).norm() / exact.norm()).item() <= 2e-4
    assert ((split.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-3 * 2**-8).all()
    moved = (exact - start.double()).norm()
    assert ((plain.double() - exact).norm() / moved).item() > 0.5


def test_ema_of_plain_precision_rounds_as_published():
    sink, evicted = torch.randn(1, 1, 3, 2, 4).bfloat16(), torch.randn(1, 1, 3, 2, 4).bfloat16()
    expected = 0.9 * sink + (1 - 0.9) * evicted
    values = sink.clone()
    reference.ema_evict(sink, values, None, None, evicted, evicted, 0.9)
    assert torch.equal(sink, expected) and torch.equal(values, expected)


def test_published_bf16_ema_leaves_every_value_at_alpha_0_999():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    normal = every[(every.abs() > 1e-34) & (every.abs() < 1e38)]
    assert len(normal) > 60_000
    sink = normal.clone().view(1, 1, -1, 1, 1)
    reference.ema_evict(sink, sink.clone(), None, None, sink.clone(), sink.clone(), 0.999)
    assert torch.equal(sink.flatten(), normal)


def test_flow_step_gives_x0_and_renoises_it():
    tokens = torch.randn(1, 6, 16)
    x, noise = torch.randn(1, 4, 1, 4, 6), torch.randn(1, 4, 1, 4, 6)
    flow = reference.unpatchify(tokens, x)
    sigma, following = torch.tensor([0.8], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)
    x0 = reference.flow_step(tokens, x, sigma)
    torch.testing.assert_close(x0, x - 0.8 * flow)
    renoised = reference.flow_step(tokens, x, sigma, noise, following)
    torch.testing.assert_close(renoised, 0.7 * x0 + 0.3 * noise)


def test_flow_step_takes_a_level_for_every_frame():
    tokens = torch.randn(1, 12, 16)
    x, noise = torch.randn(1, 4, 2, 4, 6), torch.randn(1, 4, 2, 4, 6)
    sigmas, following = torch.tensor([[0.8, 0.0], [0.3, 0.0]], dtype=torch.float64)
    out = reference.flow_step(tokens, x, sigmas, noise, following)
    alone = reference.flow_step(tokens[:, :6], x[:, :, :1], sigmas[:1], noise[:, :, :1], following[:1])
    assert torch.equal(out[:, :, :1], alone) and torch.equal(out[:, :, 1:], x[:, :, 1:])


def test_unpatchify_puts_channels_fastest():
    tokens = torch.arange(2 * 3 * 4.0).view(1, 6, 4)
    latents = reference.unpatchify(tokens.repeat_interleave(2, dim=-1), torch.zeros(1, 2, 1, 4, 6))
    assert latents.shape == (1, 2, 1, 4, 6)
    assert latents[0, 1, 0, :2, :2].tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert latents[0, 0, 0, 2, 4].item() == tokens[0, 5, 0].item()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_channel_norm_reads_the_rounded_sum_and_writes_into_a_view(with_bias, with_residual):
    x, residual = torch.randn(3, 2, 4, 8).bfloat16(), torch.randn(3, 2, 4, 8).bfloat16()
    bias, gamma = torch.randn(8).bfloat16(), torch.randn(8).bfloat16()
    exact = x.double() + (bias.double() if with_bias else 0) + (residual.double() if with_residual else 0)
    halo = torch.zeros(5, 2, 4, 8, dtype=torch.bfloat16)
    total = reference.channel_norm_silu(
        x.clone(), bias if with_bias else None, residual if with_residual else None, gamma, halo[2:]
    )
    assert total.dtype == torch.bfloat16 and (total - exact).abs().max() <= 2**-7 * exact.abs().max()
    wide = total.float()
    normed = wide / wide.norm(dim=-1, keepdim=True) * 8**0.5 * gamma.float()
    torch.testing.assert_close(halo[2:].float(), F.silu(normed), rtol=2**-8, atol=1e-6)
    assert not halo[:2].any()


def test_channel_norm_divides_by_the_floor_below_it():
    x = torch.tensor([3e-13, -4e-13, 0.0, 0.0], dtype=torch.float64).view(1, 1, 1, 4)
    out = torch.empty_like(x)
    reference.channel_norm_silu(x, None, None, torch.ones(4, dtype=torch.float64), out)
    torch.testing.assert_close(out, F.silu(x / 1e-12 * 2))
    reference.channel_norm_silu(torch.zeros_like(x), None, None, torch.ones(4), out)
    assert not out.any()


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (3, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize("channels", [3, 4, 8, 16])  # narrow ones take several pixels at once on oneDNN
@pytest.mark.parametrize("width", [4, 6, 5])
@torch.no_grad()
def test_causal_convolution_is_padded_in_space_alone(kernel, channels, width):
    x, bias = torch.randn(4 + kernel[0] - 1, 3, width, 6), torch.randn(channels)
    weight = torch.randn(channels, 6, *kernel)
    padding = (0, kernel[1] // 2, kernel[2] // 2)
    expected = F.conv3d(
        x.double().permute(3, 0, 1, 2)[None], weight.double(), bias.double(), padding=padding
    )[0].permute(1, 2, 3, 0)
    result = reference.causal_conv3d(x, weight, bias)
    assert result.is_contiguous() and result.shape == (4, 3, width, channels)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    pairs = torch.zeros(4, 2, 3, width, channels)
    assert reference.causal_conv3d(x, weight, None, pairs[:, 1]).data_ptr() == pairs[:, 1].data_ptr()
    torch.testing.assert_close((pairs[:, 1] + bias).double(), expected, rtol=1e-5, atol=1e-5)
    assert not pairs[:, 0].any()


def test_causal_convolution_rounds_its_float32_sum_once_and_has_gradients():
    x, weight, bias = torch.randn(5, 4, 4, 8).bfloat16(), torch.randn(8, 8, 3, 3, 3).bfloat16(), torch.ones(8)
    wide = reference.causal_conv3d(x.float(), weight.float(), bias)
    assert torch.equal(reference.causal_conv3d(x, weight, bias.bfloat16()), wide.bfloat16())
    leaf = x.float().requires_grad_()
    reference.causal_conv3d(leaf, weight.float(), bias).sum().backward()
    assert leaf.grad.any()


@torch.no_grad()
def test_convolution_in_fp8_is_that_of_what_the_values_stand_for():
    x, weight, bias = torch.randn(4, 3, 5, 8), torch.randn(6, 8, 3, 3, 3), torch.randn(6)
    weight[2] *= 100
    weight[3] = 0
    values, scale = reference.channel_fp8(weight)
    assert values.dtype == torch.float8_e4m3fn and values.shape == weight.shape and scale[3] == 1
    stood_for = values.float() * scale[:, None, None, None, None]
    torch.testing.assert_close(stood_for, weight, rtol=2**-4, atol=2**-10 * weight[2].abs().max() / 448)
    eights = (x / 0.25).to(torch.float8_e4m3fn)
    out = torch.empty(2, 3, 5, 6)
    expected = reference.causal_conv3d(0.25 * eights.float(), stood_for, bias)
    assert reference.causal_conv3d_fp8(eights, values, 0.25 * scale, bias, out) is out
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
    assert reference.causal_conv3d_fp8(eights, values, 0.25 * scale, bias).dtype == torch.bfloat16


def test_channel_norm_writes_fp8_in_its_unit_and_saturates():
    x, gamma = torch.randn(2, 3, 4, 16), torch.rand(16) + 0.5
    plain, eights = torch.empty_like(x), torch.empty(x.shape, dtype=torch.float8_e4m3fn)
    reference.channel_norm_silu(x, None, None, gamma, plain)
    reference.channel_norm_silu(x, None, None, gamma, eights, 0.125)
    assert torch.equal(eights, (plain / 0.125).to(torch.float8_e4m3fn))
    reference.channel_norm_silu(x, None, None, gamma, eights, 1e-3)
    assert eights.float().max() == 448 and torch.isfinite(eights.float()).all()


def test_phases_are_convolutions_of_two_by_two():
    x, weight = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 2, 3, 5, 2, 2).double()
    bias, padded = torch.randn(3).double(), F.pad(x, (0, 0, 1, 1, 1, 1))
    expected = torch.zeros(2, 6, 8, 3).double()
    for a, b, i, j in itertools.product((0, 1), (0, 1), range(3), range(4)):
        seen = padded[:, i + a : i + a + 2, j + b : j + b + 2]
        expected[:, 2 * i + a, 2 * j + b] = torch.einsum("trsc,ocrs->to", seen, weight[a, b]) + bias
    torch.testing.assert_close(reference.phase_conv(x, weight, bias), expected)
    torch.testing.assert_close(reference.phase_conv(x, weight, None), expected - bias)


def test_folded_weight_is_nearest_upsampling_and_a_convolution_of_three_by_three():
    x, weight, bias = torch.randn(2, 3, 5, 6), torch.randn(4, 6, 3, 3), torch.randn(4)
    doubled = F.interpolate(x.double().permute(0, 3, 1, 2), scale_factor=2, mode="nearest")
    expected = F.conv2d(doubled, weight.double(), bias.double(), padding=1).permute(0, 2, 3, 1)
    folded = reference.fold_upsample_weight(weight)
    assert folded.permute(0, 1, 2, 4, 5, 3).is_contiguous()
    with torch.no_grad():
        torch.testing.assert_close(
            reference.phase_conv(x, folded, bias).double(), expected, rtol=1e-5, atol=1e-5
        )
    exact = reference.fold_upsample_weight(weight.bfloat16().double())
    assert torch.equal(reference.fold_upsample_weight(weight.bfloat16()), exact.bfloat16())


def test_frame_attention_stays_inside_its_frame():
    q, k, v = torch.randn(2, 5, 3 * 8).double().chunk(3, dim=-1)
    scores = torch.einsum("tnc,tmc->tnm", q, k) / 8**0.5
    torch.testing.assert_close(reference.frame_attention(q, k, v), scores.softmax(-1) @ v)


def test_last_convolution_packs_its_unrounded_sum():
    x, weight, bias = torch.randn(5, 4, 6, 8).bfloat16(), 0.05 * torch.randn(3, 8, 3, 3, 3).bfloat16(), None
    pixels = reference.causal_conv3d(x.float(), weight.float(), bias).permute(3, 0, 1, 2)
    assert torch.equal(reference.conv_frame_pack(x, weight, bias), reference.frame_pack(pixels))
    rounded = reference.frame_pack(pixels.bfloat16())
    assert (reference.conv_frame_pack(x, weight, bias) != rounded).any()


def test_pixels_are_clamped_and_rounded_to_the_nearest_level() -> None:
    row = torch.tensor([-2.0, -1.0, 0.0, 0.6 / 127.5 - 1, 1.0, 3.0])
    pixels = row.reshape(1, 1, 1, 6).expand(3, 1, 1, 6)
    assert reference.frame_pack(pixels)[0, 0, :, 0].tolist() == [0, 0, 128, 1, 255, 255]
