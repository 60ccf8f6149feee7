"""Convolutions in e4m3 and backends by layer: what StreamingDecoder's layers make of them."""

from __future__ import annotations

import copy

import pytest
import torch

from rfengine.config import VAEConfig
from rfengine.models.streaming_decoder import StreamingDecoder
from rfengine.models.streaming_layers import activation_unit
from rfengine.models.vae import WanVAE
from rfengine.ops import REFERENCE_OPS, Ops, reference
from rfengine.ops.table import OPS

NARROW = VAEConfig(base_dim=8)  # the published decoder, a twelfth as wide
SIZE = (2, 3)


def random_vae(dtype: torch.dtype = torch.float32) -> WanVAE:
    generator = torch.Generator().manual_seed(0)
    vae = WanVAE(NARROW).eval()
    for parameter in vae.parameters():
        gamma = parameter.ndim > 1 and parameter[0].numel() == 1
        scale = 0.3 if gamma or parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.data = gamma + scale * torch.randn(parameter.shape, generator=generator)
    return vae.to(dtype)


def latents(frames: int = 9) -> torch.Tensor:
    return torch.randn(1, 16, frames, *SIZE, generator=torch.Generator().manual_seed(1))


def decode(decoder: StreamingDecoder, parts, state=None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    state = state or decoder.decoder_state(1, *SIZE, dtype, "cpu")
    return torch.cat([decoder.decode(part.to(dtype), state) for part in parts], dim=2)


def test_seventeen_convolutions_of_the_published_decoder_are_large():
    decoder = StreamingDecoder(random_vae(), REFERENCE_OPS, "fp8")
    names = decoder.fp8_slots
    assert len(names) == 17
    modules = dict(random_vae().decoder.named_modules())
    assert all(modules[name].kernel_size == (3, 3, 3) for name in names)
    assert [modules[name].in_channels for name in names] == [32] * 5 + [16] * 6 + [8] * 6
    assert "upsamples.4.residual.2" not in names  # twice as many channels out as in
    assert StreamingDecoder(random_vae(), REFERENCE_OPS).fp8_slots == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_frames_are_near_and_the_same_in_every_plan(dtype):
    vae, clip = random_vae(dtype), latents()
    decoder = StreamingDecoder(vae, REFERENCE_OPS, "fp8")
    plain = decode(StreamingDecoder(vae, REFERENCE_OPS), clip.split(3, dim=2), dtype=dtype)
    found = decode(decoder, clip.split(3, dim=2), dtype=dtype)
    error = (found - plain).float().square().mean().sqrt() / plain.float().std()
    assert 0.01 < error < 0.2
    for plan in (1, 9):
        assert torch.equal(decode(decoder, clip.split(plan, dim=2), dtype=dtype), found)


def test_a_state_in_fp8_holds_the_frames_and_goes_on_bit_for_bit():
    vae, parts = random_vae(torch.bfloat16), latents().split(3, dim=2)
    decoder = StreamingDecoder(vae, REFERENCE_OPS, "fp8")
    state = decoder.decoder_state(1, *SIZE, torch.bfloat16, "cpu")
    decode(decoder, parts[:2], state, torch.bfloat16)
    snapshot = copy.deepcopy(state)
    rest = decode(decoder, parts[2:], state, torch.bfloat16)
    fresh = StreamingDecoder(vae, REFERENCE_OPS, "fp8")
    assert torch.equal(decode(fresh, parts[2:], snapshot, torch.bfloat16), rest)
    plain = StreamingDecoder(vae, REFERENCE_OPS)
    plain_state = plain.decoder_state(1, *SIZE, torch.bfloat16, "cpu")
    decode(plain, parts, plain_state, torch.bfloat16)
    for name, slot in state.slots.items():  # the same frames, whatever they are multiplied in
        held = plain_state.slots[name].float()
        assert (slot.float() - held).norm() < 0.3 * held.norm(), name


def test_the_unit_lets_nothing_saturate_and_is_a_power_of_two():
    for channels, largest in ((96, 1.0), (384, 7.3), (8, 0.02)):
        gamma = torch.linspace(-largest, largest / 2, channels)
        unit = activation_unit(gamma)
        x = torch.zeros(1, 1, 1, channels)
        x[..., 0] = -1e3  # all of the norm in the channel with the largest gamma
        out = torch.empty_like(x)
        reference.channel_norm_silu(x, None, None, gamma, out, unit)
        assert 200 < channels**0.5 * largest / unit <= 448 and out.abs().max() <= 448
        assert torch.tensor(unit).frexp().mantissa == 0.5
    assert activation_unit(torch.zeros(4)) == 1.0


def test_no_convolution_is_laid_out_anew_and_halos_in_e4m3_are_shared():
    decoder = StreamingDecoder(random_vae(), REFERENCE_OPS, "fp8")
    decode(decoder, latents(3).split(3, dim=2))
    eights = {tuple(halo.shape) for halo in decoder._halos.values() if halo.dtype == torch.float8_e4m3fn}
    assert eights == {(8, 4, 6, 32), (14, 8, 12, 16), (14, 16, 24, 8)}


class Recorded(Ops):
    """The reference as if it were the backends of `choice`; keeps what each convolution was given."""

    def __init__(self, shapes: dict[str, str]) -> None:
        super().__init__(REFERENCE_OPS.choice)
        self.choice |= shapes
        self.biased: dict[str, set[bool]] = {}

    def causal_conv3d(self, x, weight, bias, out=None):
        key = "x".join(map(str, (*weight.shape, *x.shape[1:3])))
        self.biased.setdefault(key, set()).add(bias is not None)
        return super().causal_conv3d(x, weight, bias, out)


def test_layers_of_one_decoder_run_on_different_backends():
    vae, parts = random_vae(), latents().split(3, dim=2)
    on_cudnn = "8x8x3x3x3x16x24"
    ops = Recorded({f"causal_conv3d@{on_cudnn}": "cudnn"})
    found = decode(StreamingDecoder(vae, ops), parts)
    assert (found - decode(StreamingDecoder(vae, REFERENCE_OPS), parts)).abs().max() <= 1e-5
    # its bias is left to the op behind, that of all others is not
    assert ops.biased.pop(on_cudnn) == {False}
    assert len(ops.biased) > 4 and set(map(frozenset, ops.biased.values())) == {frozenset({True})}


def test_ops_bind_a_convolution_by_its_shape(monkeypatch):
    called = []
    for name in ("causal_conv3d", "phase_conv"):
        run = OPS[name].backends["cudnn"]
        spy = lambda *given, run=run, name=name: called.append(name) or run(*given)  # noqa: E731
        monkeypatch.setitem(OPS[name].backends, "cudnn", spy)
    by_shape = ("causal_conv3d@8x8x3x3x3x16x24", "phase_conv@2x2x8x16x2x2x8x12")
    ops = Ops(REFERENCE_OPS.choice | dict.fromkeys(by_shape, "cudnn"))
    decode(StreamingDecoder(random_vae(), ops), latents(3).split(3, dim=2))
    assert called.count("causal_conv3d") == 6 and len(called) == 7


def test_a_decoder_on_other_ops_shares_weights_and_no_buffer():
    decoder, parts = StreamingDecoder(random_vae(), REFERENCE_OPS), latents().split(3, dim=2)
    first = decode(decoder, parts)
    other = decoder.on(Ops(REFERENCE_OPS.choice))
    assert other._halos == {} and other.capturable_frames == 0 and other._ops is not decoder._ops
    assert torch.equal(decode(other, parts), first)
    assert other._first.weight is decoder._first.weight
    assert not {halo.data_ptr() for halo in other._halos.values()} & {
        halo.data_ptr() for halo in decoder._halos.values()
    }
