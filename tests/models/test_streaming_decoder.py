"""The streaming decoder: the plain one in every plan, states, buffers, what a CUDA graph needs, errors."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from rfengine.config import VAEConfig
from rfengine.models.streaming_decoder import StreamingDecoder
from rfengine.models.streaming_layers import Residual, TimeDoubling
from rfengine.models.vae import CausalConv, WanVAE
from rfengine.ops import REFERENCE_OPS, Ops
from rfengine.ops.reference import frame_pack

SMALL = VAEConfig(
    base_dim=4,
    z_dim=4,
    num_res_blocks=1,
    latents_mean=(0.5, -0.25, 0.0, 1.0),
    latents_std=(2.0, 0.5, 1.0, 3.0),
)
NARROW = VAEConfig(base_dim=8)  # the published decoder, a twelfth as wide
PLANS = [[9], [1] * 9, [1, 2, 3, 3], [3, 3, 3], [2, 7]]
LATE_BIAS = Ops({**REFERENCE_OPS.choice, "causal_conv3d": "cudnn", "phase_conv": "cudnn"})


def random_vae(config: VAEConfig = SMALL, seed: int = 0) -> WanVAE:
    generator = torch.Generator().manual_seed(seed)
    vae = WanVAE(config).eval()
    for parameter in vae.parameters():
        gamma = parameter.ndim > 1 and parameter[0].numel() == 1
        scale = 0.3 if gamma or parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.data = gamma + scale * torch.randn(parameter.shape, generator=generator)
    return vae


def decoder_of(config: VAEConfig = SMALL, ops: Ops = REFERENCE_OPS) -> StreamingDecoder:
    return StreamingDecoder(random_vae(config), ops)


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fresh_state(decoder, height: int = 2, width: int = 3, dtype: torch.dtype = torch.float32):
    return decoder.decoder_state(1, height, width, dtype, "cpu")


def decode_in_calls(decoder, latents: torch.Tensor, plan: list[int]) -> torch.Tensor:
    weights = decoder.conv2.weight if isinstance(decoder, WanVAE) else decoder._first.weight
    state = fresh_state(decoder, *latents.shape[3:], weights.dtype)
    with torch.no_grad():
        pixels = torch.cat([decoder.decode(part, state) for part in latents.split(plan, dim=2)], dim=2)
    assert state.frames == latents.shape[2]
    return pixels


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("config", [SMALL, NARROW], ids=["small", "published shape"])
def test_every_plan_gives_the_plain_video(config, plan):
    decoder, latents = decoder_of(config), noise(1, config.z_dim, 9, 2, 3)
    with torch.no_grad():
        plain = decoder._vae.decode(latents)
    assert plain.abs().mean() > 0.1
    assert (decode_in_calls(decoder, latents, plan) - plain).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("dim_mult", "temporal"), [((1, 2), (True,)), ((1, 2, 2), (True, False)), ((1, 2), (False,)), ((1,), ())]
)
def test_other_levels_give_the_plain_video(dim_mult, temporal):
    decoder = decoder_of(dataclasses.replace(SMALL, dim_mult=dim_mult, temporal_downsample=temporal))
    latents = noise(1, 4, 5, 3, 2)
    with torch.no_grad():
        plain = decoder._vae.decode(latents)
    for plan in ([5], [1, 2, 2]):
        assert (decode_in_calls(decoder, latents, plan) - plain).abs().max() <= 1e-5


def test_a_bias_left_to_the_op_behind_gives_the_same_video():
    latents = noise(1, 4, 5, 2, 3)
    with torch.no_grad():
        plain = random_vae().decode(latents)
    late = decode_in_calls(decoder_of(ops=LATE_BIAS), latents, [1, 2, 2])
    assert (late - plain).abs().max() <= 1e-5


@pytest.mark.parametrize("ops", [REFERENCE_OPS, LATE_BIAS], ids=["bias", "late bias"])
def test_bfloat16_errs_no_more_than_the_plain_decoder_does(ops):
    latents, exact, plain = noise(1, 16, 6, 2, 3), random_vae(NARROW), random_vae(NARROW).bfloat16()
    with torch.no_grad():
        expected = exact.decode(latents)
    theirs = (decode_in_calls(plain, latents.bfloat16(), [3, 3]) - expected).norm()
    streamed = decode_in_calls(StreamingDecoder(plain, ops), latents.bfloat16(), [3, 3])
    assert streamed.dtype == torch.bfloat16
    assert 0 < (streamed - expected).norm() <= 1.1 * theirs


def test_frames_are_the_packed_pixels():
    decoder, latents = decoder_of(), noise(1, 4, 6, 2, 3)
    states = [fresh_state(decoder) for _ in range(2)]
    for part in latents.split([3, 3], dim=2):
        pixels = decoder.decode(part, states[0])[0]
        assert torch.equal(decoder.decode_frames(part, states[1]), frame_pack(pixels))
    assert [state.frames for state in states] == [6, 6]


def test_first_latent_gives_one_frame_and_later_ones_four():
    decoder = decoder_of()
    state = fresh_state(decoder)
    shapes = [tuple(decoder.decode(noise(1, 4, frames, 2, 3), state).shape) for frames in (1, 1, 3)]
    assert shapes == [(1, 3, frames, 16, 24) for frames in (1, 4, 12)]


@pytest.mark.parametrize("seen", [1, 2, 3])
def test_snapshot_in_mid_stream_continues_bit_for_bit(seen):
    decoder, latents = decoder_of(), noise(1, 4, 6, 2, 3)
    state, restored = fresh_state(decoder), fresh_state(decoder)
    decoder.decode(latents[:, :, :seen], state)
    saved = {name: tensor.clone() for name, tensor in state.tensors().items()}
    copied = copy.deepcopy(state)
    rest = decoder.decode(latents[:, :, seen:], state)
    restored.load(saved, seen)
    assert torch.equal(decoder.decode(latents[:, :, seen:], restored), rest)
    assert torch.equal(decoder.decode(latents[:, :, seen:], copied), rest)
    assert all(torch.equal(restored.slots[name], slot) for name, slot in state.slots.items())


@pytest.mark.parametrize("seen", [1, 2, 4])
def test_snapshots_pass_between_the_plain_and_the_streaming_decoder(seen):
    decoder, latents = decoder_of(), noise(1, 4, 6, 2, 3)
    for before, after in ((decoder, decoder._vae), (decoder._vae, decoder)):
        with torch.no_grad():
            state, other = fresh_state(before), fresh_state(after)
            before.decode(latents[:, :, :seen], state)
            other.load({name: tensor.contiguous() for name, tensor in state.tensors().items()}, seen)
            rest = before.decode(latents[:, :, seen:], state)
            assert (after.decode(latents[:, :, seen:], other) - rest).abs().max() <= 1e-5


def test_streams_that_share_a_decoder_do_not_disturb_each_other():
    shared, sizes = decoder_of(), [(2, 3), (2, 3), (3, 2), (4, 6)]
    clips = [noise(1, 4, 9, *size, seed=seed) for seed, size in enumerate(sizes)]
    plans = [[3, 3, 3], [3, 3, 3], [3, 3, 3], [1, 2, 6]]
    states = [fresh_state(shared, *size) for size in sizes]
    calls = [list(clip.split(plan, dim=2)) for clip, plan in zip(clips, plans, strict=True)]
    interleaved = [[] for _ in clips]
    for call in range(3):
        for stream, parts in enumerate(calls):
            interleaved[stream].append(shared.decode(parts[call], states[stream]))
    for clip, plan, pieces in zip(clips, plans, interleaved, strict=True):
        assert torch.equal(torch.cat(pieces, dim=2), decode_in_calls(decoder_of(), clip, plan))


class Watch(TorchDispatchMode):
    """Lists every op with the shapes it gets; fails on one that reads a tensor on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "local_scalar" not in str(func) and torch.Tag.dynamic_output_shape not in func.tags, func
        self.ran.append(f"{func} {[tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor)]}")
        return func(*args, **(kwargs or {}))


def test_steady_call_reads_nothing_on_the_host_and_keeps_its_ops_and_addresses():
    decoder = decoder_of()
    state, ran, addresses = fresh_state(decoder), [], []
    for _ in range(4):
        with Watch() as watch:
            decoder.run(noise(1, 4, 3, 2, 3), state, packed=True)
        state.frames += 3
        ran.append(watch.ran)
        kept = {**decoder._halos, **state.slots}
        addresses.append({name: tensor.data_ptr() for name, tensor in kept.items()})
    assert ran[1] == ran[2] == ran[3] != ran[0]
    assert addresses[0] == addresses[1] == addresses[2] == addresses[3]


def test_between_the_ops_nothing_is_padded_concatenated_or_laid_out_anew():
    ops = Ops(REFERENCE_OPS.choice)
    ops._run = {name: unwatched(run) for name, run in ops._run.items()}
    decoder = decoder_of(ops=ops)
    state = fresh_state(decoder)
    decoder.decode(noise(1, 4, 3, 2, 3), state)
    with Watch() as watch:
        decoder.run(noise(1, 4, 3, 2, 3), state, packed=False)
    ran = [op.split(".")[1] for op in watch.ran]
    # two copies of two frames for each convolution, and the latents into the first halo
    assert ran.count("copy_") == 2 * len(state.slots) + 1
    assert not {"cat", "stack", "clone", "constant_pad_nd", "contiguous", "upsample_nearest2d"} & set(ran)


def unwatched(run: Callable) -> Callable:
    def without_watch(*args: object) -> object:
        with _disable_current_modes():
            return run(*args)

    return without_watch


def test_buffers_are_shared_by_the_convolutions_of_one_size():
    decoder = decoder_of(NARROW)
    for _ in range(2):
        decoder.decode(noise(1, 16, 3, 2, 3), fresh_state(decoder))
    # latents and 32 channels of 3 frames, 16 and 32 of 6, then 12 frames, each with the two before them
    expected = {(5, 2, 3, 16), (5, 2, 3, 32), (8, 4, 6, 16), (8, 4, 6, 32), (14, 8, 12, 16), (14, 16, 24, 8)}
    assert {tuple(halo.shape) for halo in decoder._halos.values()} == expected
    assert len(fresh_state(decoder).slots) == 32


def test_weights_of_the_plain_decoder_stay_as_they_are():
    vae = random_vae()
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    decode_in_calls(StreamingDecoder(vae, REFERENCE_OPS), noise(1, 4, 3, 2, 3), [3])
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())
    assert all(
        isinstance(parameter, nn.Parameter) and parameter.requires_grad for parameter in vae.parameters()
    )


def test_large_weights_are_kept_once_for_the_plain_and_the_streaming_decoder():
    vae = random_vae(NARROW)
    held = {layer.slot: layer.weight for layer in vae.decoder.modules() if isinstance(layer, CausalConv)}
    decoder, twin = StreamingDecoder(vae, REFERENCE_OPS), StreamingDecoder(vae, REFERENCE_OPS)
    convolutions = [decoder._first, decoder._last]
    for layer in decoder._layers:
        if isinstance(layer, Residual):
            convolutions += [layer.first, layer.second]
        elif isinstance(layer, TimeDoubling):
            convolutions.append(layer.convolution)
    assert {convolution.slot for convolution in convolutions} == held.keys()
    for convolution in convolutions:
        assert convolution.weight.is_contiguous(memory_format=torch.channels_last_3d)
        assert convolution.weight.data_ptr() == held[convolution.slot].data_ptr()
    assert twin._first.weight.data_ptr() == decoder._first.weight.data_ptr()


def test_decoder_serves_calls_inside_and_outside_of_inference_mode():
    decoder, latents = decoder_of(), noise(1, 4, 6, 2, 3)
    with torch.inference_mode():
        state = fresh_state(decoder)
        first = decoder.decode(latents[:, :, :3], state)
    second = decoder.decode(latents[:, :, 3:], state)
    assert torch.equal(torch.cat([first, second], dim=2), decode_in_calls(decoder_of(), latents, [3, 3]))


def test_refusals_change_nothing_and_leave_the_stream_usable():
    decoder, latents = decoder_of(), noise(1, 4, 6, 2, 3)
    state = fresh_state(decoder)
    first = decoder.decode(latents[:, :, :3], state)
    damaged = latents[:, :, 3:].clone()
    damaged[0, 1, 2, 1, 2] = float("nan")
    other_model = fresh_state(decoder_of(dataclasses.replace(SMALL, base_dim=6)))
    other_depth = fresh_state(decoder_of(dataclasses.replace(SMALL, num_res_blocks=2)))
    before = copy.deepcopy(state)
    for given, given_state, message in (
        (damaged, state, "the latents are not finite"),
        (noise(2, 4, 3, 2, 3), state, r"latents are \(2, 4, 3, 2, 3\); give \[1, 4, frames, height, width\]"),
        (noise(1, 5, 3, 2, 3), state, "latents are .* give"),
        (noise(1, 4, 0, 2, 3), state, "with at least one frame"),
        (noise(4, 3, 2, 3), state, "latents are .* give"),
        (noise(1, 4, 3, 2, 4), state, r"slot 'conv1' of the state is \(1, 4, 2, 2, 3\)"),
        (latents, other_model, r"slot 'middle.0.residual.2' of the state is \(1, 24, 2, 2, 3\)"),
        (
            latents,
            other_depth,
            r"slot 'upsamples.2.time_conv' of the state is None",
        ),
        (latents, fresh_state(decoder, dtype=torch.bfloat16), "bfloat16 on cpu, .* ask for .*float32 on cpu"),
        (latents, decoder._vae.encoder_state(1, 2, 3, torch.float32, "cpu"), "state is a EncoderState"),
    ):
        for decode in (decoder.decode, decoder.decode_frames):
            with pytest.raises(ValueError, match=message):
                decode(given, given_state)
    with pytest.raises(ValueError, match="batch is 2; this decoder takes one video"):
        decoder.decoder_state(2, 2, 3, torch.float32, "cpu")
    assert state.frames == before.frames
    assert all(torch.equal(before.slots[name], slot) for name, slot in state.slots.items())
    video = torch.cat([first, decoder.decode(latents[:, :, 3:], state)], dim=2)
    assert torch.equal(video, decode_in_calls(decoder_of(), latents, [3, 3]))
