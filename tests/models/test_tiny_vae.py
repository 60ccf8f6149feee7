"""The tiny decoder against a plain loop over single frames, streamed in every way, and on its own weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rfengine.config import TinyVAEConfig
from rfengine.models.tiny_vae import TinyVAE
from rfengine.models.vae import WanVAE
from rfengine.ops import reference
from rfengine.presets import PRESETS

CONFIG = TinyVAEConfig(z_dim=4, widths=(12, 8, 6, 5), memory_blocks=2)
PLANS = [(1, 2, 3, 3), (9,), (1,) * 9, (3, 3, 3), (2, 4, 3)]


def tiny(config: TinyVAEConfig = CONFIG, dtype: torch.dtype = torch.float32, seed: int = 0) -> TinyVAE:
    torch.manual_seed(seed)
    return TinyVAE(config).to(dtype).eval().requires_grad_(False)


def latents(frames: int = 9, batch: int = 1, height: int = 3, width: int = 5, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(batch, CONFIG.z_dim, frames, height, width, generator=generator)


def fresh_state(decoder: TinyVAE, x: Tensor):
    return decoder.decoder_state(x.shape[0], *x.shape[3:], decoder.dtype, "cpu")


def streamed(decoder: TinyVAE, x: Tensor, plan: tuple[int, ...]) -> Tensor:
    state = fresh_state(decoder, x)
    parts = [decoder.decode(part, state) for part in x.split(plan, dim=2)]
    assert state.frames == sum(plan)
    return torch.cat(parts, dim=2)


def plain_decode(weights: dict[str, Tensor], x: Tensor, blocks: int, factors: tuple[int, ...]) -> Tensor:
    """The published order of layers over one frame at a time, by the numbers of the weights alone.

    x [z, F, h, w] -> [3, T, H, W] from -1 to 1, the first frames trimmed. Every layer maps a list of frames
    [C, h, w] to a list of frames; a memory block walks its list with the frame before in hand.
    """

    def conv(frame: Tensor, name: str) -> Tensor:
        weight, bias = weights[f"decoder.{name}.weight"], weights.get(f"decoder.{name}.bias")
        return F.conv2d(frame[None], weight, bias, padding=weight.shape[-1] // 2)[0]

    def remember(frames: list[Tensor], name: str) -> list[Tensor]:
        made, before = [], torch.zeros_like(frames[0])
        for frame in frames:
            hidden = conv(torch.cat([frame, before]), f"{name}.conv.0").clamp(min=0)
            hidden = conv(hidden, f"{name}.conv.2").clamp(min=0)
            made.append((conv(hidden, f"{name}.conv.4") + frame).clamp(min=0))
            before = frame
        return made

    frames = [conv(3 * torch.tanh(frame / 3), "1").clamp(min=0) for frame in x.unbind(1)]
    layer = 3
    for factor in factors:
        for _ in range(blocks):
            frames = remember(frames, str(layer))
            layer += 1
        frames = [F.interpolate(frame[None], scale_factor=2, mode="nearest")[0] for frame in frames]
        grown = [conv(frame, f"{layer + 1}.conv") for frame in frames]
        frames = [part for frame in grown for part in frame.chunk(factor)]
        frames = [conv(frame, str(layer + 2)) for frame in frames]
        layer += 3
    trimmed = torch.tensor(factors).prod() - 1
    pixels = [2 * conv(frame.clamp(min=0), str(layer + 1)) - 1 for frame in frames[trimmed:]]
    return torch.stack(pixels, dim=1)


def test_the_published_shape_has_the_published_count_and_names():
    with torch.device("meta"):
        state = TinyVAE(TinyVAEConfig()).state_dict()
    assert sum(value.numel() for value in state.values()) == 9_844_611
    for name, shape in {
        "decoder.1.weight": (256, 16, 3, 3),
        "decoder.3.conv.0.weight": (256, 512, 3, 3),
        "decoder.5.conv.4.bias": (256,),
        "decoder.7.conv.weight": (256, 256, 1, 1),
        "decoder.8.weight": (128, 256, 3, 3),
        "decoder.13.conv.weight": (256, 128, 1, 1),
        "decoder.19.conv.weight": (128, 64, 1, 1),
        "decoder.20.weight": (64, 64, 3, 3),
        "decoder.22.bias": (3,),
    }.items():
        assert tuple(state[name].shape) == shape
    assert not {"decoder.7.conv.bias", "decoder.8.bias", "decoder.14.bias"} & state.keys()


@pytest.mark.parametrize(
    "config", [CONFIG, TinyVAEConfig(z_dim=4, widths=(6, 5, 4, 4), memory_blocks=3, time_factors=(2, 1, 3))]
)
def test_a_clip_is_what_a_plain_loop_over_frames_gives(config):
    decoder, x = tiny(config).double(), latents(5, height=2).double()
    # float32 latents are limited in float32, whatever the weights are
    expected = plain_decode(decoder.state_dict(), x[0], config.memory_blocks, config.time_factors)
    torch.testing.assert_close(decoder.decode(x)[0], expected, atol=2e-6, rtol=0)
    assert expected.shape == (3, 1 + 4 * config.temporal_stride, 16, 40)


def test_the_length_is_one_frame_and_four_for_every_latent_after_the_first():
    decoder = tiny()
    for frames in (1, 2, 5):
        assert decoder.decode(latents(frames)).shape == (1, 3, 1 + 4 * (frames - 1), 24, 40)


@pytest.mark.parametrize("plan", PLANS)
def test_a_stream_is_the_clip_however_it_is_cut(plan):
    decoder, x = tiny(), latents(batch=2)
    torch.testing.assert_close(streamed(decoder, x, plan), decoder.decode(x), atol=1e-6, rtol=0)


def test_only_the_start_of_a_video_is_trimmed():
    decoder, x = tiny(), latents(4)
    state = fresh_state(decoder, x)
    assert [decoder.decode(x[:, :, at : at + 1], state).shape[2] for at in range(4)] == [1, 4, 4, 4]


def test_the_trimmed_frames_of_the_first_latent_still_reach_the_memory():
    decoder, x = tiny(), latents(2)
    other = x.clone()
    other[:, :, 0] += 1
    assert not torch.equal(decoder.decode(x)[:, :, 1:], decoder.decode(other)[:, :, 1:])


def test_a_snapshot_goes_on_bit_for_bit_and_the_state_stays_where_it_is():
    decoder, x = tiny(), latents()
    state = fresh_state(decoder, x)
    decoder.decode(x[:, :, :4], state)
    addresses = {name: tensor.data_ptr() for name, tensor in state.tensors().items()}
    saved, frames = {name: tensor.clone() for name, tensor in state.tensors().items()}, state.frames
    copied = copy.deepcopy(state)
    expected = decoder.decode(x[:, :, 4:], state)
    assert {name: tensor.data_ptr() for name, tensor in state.tensors().items()} == addresses
    restored = fresh_state(decoder, x)
    restored.load(saved, frames)
    assert torch.equal(decoder.decode(x[:, :, 4:], restored), expected)
    assert torch.equal(decoder.decode(x[:, :, 4:], copied), expected)


def test_gradients_reach_every_weight_of_a_clip():
    decoder = tiny().requires_grad_(True)
    decoder.decode(latents(3)).square().mean().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in decoder.parameters())


def test_a_state_keeps_no_autograd_graph():
    decoder, x = tiny().requires_grad_(True), latents(2)
    state = fresh_state(decoder, x)
    decoder.decode(x, state)
    assert not any(slot.requires_grad for slot in state.tensors().values())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_half_precision_stays_near_float32(dtype, bound):
    x = latents(4)
    exact, rounded = tiny().decode(x), streamed(tiny(dtype=dtype), x, (1, 3))
    assert rounded.dtype == dtype
    assert float((rounded.float() - exact).abs().max()) < bound * float(exact.abs().max())


def test_frames_are_the_packed_pixels():
    decoder, x = tiny(), latents(3)
    pixels = decoder.decode(x)[0]
    assert torch.equal(decoder.decode_frames(x, fresh_state(decoder, x)), reference.frame_pack(pixels))


def test_a_later_chunk_does_the_same_work_on_tensors_that_stay():
    """No host reads (meta tensors have no values to read) and no shape that depends on the chunk's number."""
    decoder = tiny().to("meta")
    state = decoder.decoder_state(1, 3, 5, torch.float32, "meta")
    x = torch.empty(1, 4, 3, 3, 5, device="meta")
    assert decoder.capturable_frames == 0
    shapes = [tuple(decoder.decode(x, state).shape) for _ in range(4)]
    assert decoder.capturable_frames == 3
    assert shapes == [(1, 3, 9, 24, 40)] + [(1, 3, 12, 24, 40)] * 3


def test_activations_stay_channels_last():
    decoder, seen = tiny(), []
    for layer in decoder.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    decoder.decode(latents(3))
    assert len(seen) == 1 + 3 * (2 * 3 + 2) + 1
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


def test_a_stream_lays_the_weights_out_as_the_activations_and_changes_no_value():
    decoder, untouched = tiny(), tiny().state_dict()
    decoder.decoder_state(1, 3, 5, torch.float32, "cpu")
    for name, value in decoder.state_dict().items():
        assert torch.equal(value, untouched[name])
        assert value.ndim == 1 or value.is_contiguous(memory_format=torch.channels_last)


def test_latents_and_states_that_do_not_fit_are_refused():
    decoder, x = tiny(), latents(2)
    with pytest.raises(ValueError, match=r"latents are \(1, 3, 2, 3, 5\); give \[batch, 4, frames"):
        decoder.decode(x[:, :3])
    with pytest.raises(ValueError, match="with at least one frame"):
        decoder.decode(x[:, :, :0])
    with pytest.raises(ValueError, match="slot '3' of the state is .* make the state for this model"):
        decoder.decode(x, decoder.decoder_state(1, 3, 6, torch.float32, "cpu"))
    with pytest.raises(ValueError, match=r"torch.bfloat16.* ask for .*torch.float32"):
        decoder.decode(x, decoder.decoder_state(1, 3, 5, torch.bfloat16, "cpu"))
    other = tiny(TinyVAEConfig(z_dim=4, widths=(12, 8, 6, 5), memory_blocks=1))
    with pytest.raises(ValueError, match="slot '.+' of the state is .* make the state for this model"):
        decoder.decode(x, fresh_state(other, x))
    full = WanVAE(PRESETS["tiny"].vae)
    with pytest.raises(ValueError, match="state is a DecoderState; this call needs a TinyDecoderState"):
        decoder.decode(x, full.decoder_state(1, 3, 5, torch.float32, "cpu"))
    with pytest.raises(ValueError, match="packed of one video at a time"):
        decoder.decode_frames(latents(2, batch=2), None)


def test_a_refused_call_leaves_the_state_as_it_was():
    decoder, x = tiny(), latents(4)
    state = fresh_state(decoder, x)
    decoder.decode(x[:, :, :2], state)
    before, frames = copy.deepcopy(state), state.frames
    with pytest.raises(ValueError):
        decoder.decode(x[:, :, 2:, :2], state)
    assert state.frames == frames
    for name, slot in state.tensors().items():
        assert torch.equal(slot, before.slots[name])
