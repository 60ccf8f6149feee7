"""The full decoder as a stream gets it: FP8 only where its frames are near enough, backends by size."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import weakref

import pytest
import torch

from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.config import RuntimeConfig
from rfengine.grid import LatentGrid
from rfengine.models.streaming_decoder import StreamingDecoder
from rfengine.models.vae import WanVAE
from rfengine.ops import REFERENCE_OPS
from rfengine.pipeline import Pipeline
from rfengine.runtime import decoders
from rfengine.runtime.decoders import (
    LEAST_PSNR_DB,
    decoded_psnr,
    decoder_ops,
    full_opener,
    require_decoder,
    require_psnr,
    tier_of,
)
from rfengine.tuning import autotune, convolutions
from rfengine.tuning.autotune import Choice
from rfengine.tuning.record import CaseKey, Decision
from support.models import GRID, small_pipeline

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FP8 = RuntimeConfig(vae_precision="fp8")


@pytest.fixture(scope="module")
def tiny():
    checkpoint = Checkpoint.open("tiny")
    config = checkpoint.config
    vae = checkpoint.load(lambda: WanVAE(config.vae), "vae", torch.float32, CPU)
    return dataclasses.replace(config, runtime=FP8), vae.eval()


def test_the_shipped_decoder_holds_its_psnr_in_fp8(tiny):
    config, vae = tiny
    decoder = full_opener(config, vae, torch.float32, CPU)(LatentGrid.of(config))
    assert tier_of(config.runtime) == "near-lossless" and len(decoder.fp8_slots) == 12
    psnr = require_psnr(vae, decoder, torch.float32)
    assert LEAST_PSNR_DB <= psnr < 60
    plain = decoded_psnr(vae, StreamingDecoder(vae, REFERENCE_OPS), torch.float32)
    assert plain > 100


def test_frames_too_far_from_float32_are_refused_with_the_number(tiny):
    config, _ = tiny
    rough = WanVAE(config.vae).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in rough.parameters():  # noise: its branches weigh as much as what they are added to
        if parameter.shape[0] != parameter.numel():
            parameter.data.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    with pytest.raises(
        RuntimeError, match=r"its frames are \d+\.\d dB \(PSNR\) from float32; at least 45 dB"
    ):
        full_opener(config, rough, torch.float32, CPU)
    rough.decoder.head["2"].bias.data[:] = math.nan
    with pytest.raises(RuntimeError, match="its frames are nan dB"):
        full_opener(config, rough, torch.float32, CPU)


def test_a_pipeline_in_fp8_says_so_and_makes_other_frames():
    plain = Pipeline.from_pretrained("tiny", device="cpu")
    eight = Pipeline.from_pretrained("tiny", device="cpu", runtime=FP8)
    assert (plain.vae_tier, eight.vae_tier) == ("lossless", "near-lossless")
    ours, theirs = (each.generate("a red circle", num_frames=9).frames for each in (eight, plain))
    difference = abs(ours.astype(int) - theirs.astype(int))
    assert 0 < difference.mean() < 3


def test_a_gpu_without_fp8_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    with pytest.raises(RuntimeError, match="NVIDIA A100 has no FP8 products, .* capability 8.9"):
        require_decoder(FP8, CUDA)


def test_fp8_is_checked_with_the_decoder_s_gpu_as_the_current_one(monkeypatch, tiny):
    config, vae = tiny
    device, current = torch.device("cuda", 1), []

    @contextlib.contextmanager
    def make_current(chosen):
        current.append(chosen)
        yield
        current.pop()

    checked = []
    monkeypatch.setattr(torch.cuda, "device", make_current)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(decoders, "choose_ops", lambda *_: REFERENCE_OPS)
    monkeypatch.setattr(decoders, "require_psnr", lambda *_: checked.append(list(current)))
    full_opener(config, vae, torch.bfloat16, device)
    assert checked == [[device]] and current == []


def test_buffers_of_a_size_that_no_stream_uses_are_given_up():
    pipeline = small_pipeline()
    opener = full_opener(pipeline.config, pipeline.vae, torch.float32, CPU)
    forgotten = weakref.ref(opener(LatentGrid(32, 32)))
    kept = opener(GRID)
    for side in (48, 64):
        opener(LatentGrid(side, 80))
    gc.collect()
    assert forgotten() is None and kept is not None


def test_each_size_has_a_decoder_of_its_own_with_the_same_weights():
    pipeline = small_pipeline()
    opener = full_opener(pipeline.config, pipeline.vae, torch.float32, CPU)
    first, other = opener(GRID), opener(LatentGrid(64, 48))
    assert opener(LatentGrid(GRID.height, GRID.width)) is first and other is not first
    assert first._first.weight is other._first.weight


@pytest.mark.parametrize(
    ("requested", "runtime", "asked"),
    [
        ("auto", RuntimeConfig(), "auto"),
        ("auto", RuntimeConfig(autotune=False), None),
        ("cudnn", RuntimeConfig(autotune=False), "cudnn"),
        ("triton", RuntimeConfig(), None),
        ("auto", FP8, "auto"),
    ],
)
def test_backends_are_chosen_on_cuda_and_a_requested_cudnn_is_always_checked(
    monkeypatch, requested, runtime, asked
):
    config = dataclasses.replace(small_pipeline().config, runtime=runtime, backend=requested)
    calls, chosen = [], []

    def tune(shapes, device, *, requested):
        calls.append((shapes.grid, requested))
        return Choice((Decision(CaseKey("phase_conv@1"), "cudnn", "faster"),))

    monkeypatch.setattr(autotune, "tune", tune)
    monkeypatch.setattr(convolutions, "decoder_cases", lambda shapes: shapes)
    monkeypatch.setattr(decoders, "choose_ops", lambda *given: chosen.append(given) or REFERENCE_OPS)
    decoder_ops(config, GRID, torch.bfloat16, CUDA)
    assert calls == ([] if asked is None else [(GRID, asked)])
    overrides = {} if asked is None else {"phase_conv@1": "cudnn"}
    if runtime is FP8:
        overrides["causal_conv3d_fp8"] = "triton"
    assert chosen == [(requested, CUDA, overrides)]


@pytest.mark.gpu
def test_a_gpu_holds_the_psnr_in_fp8(tiny, monkeypatch, tmp_path):
    if torch.cuda.get_device_capability() < decoders.FP8_CAPABILITY:
        pytest.skip("FP8 needs sm_89")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config, vae = tiny
    on_gpu = WanVAE(config.vae).eval().cuda().bfloat16()
    on_gpu.load_state_dict(vae.state_dict())
    grid = LatentGrid.of(config)
    decoder = full_opener(config, on_gpu, torch.bfloat16, torch.device("cuda"))(grid)
    assert decoder._ops.choice["causal_conv3d_fp8"] == "triton"
    assert require_psnr(on_gpu, decoder, torch.bfloat16) >= LEAST_PSNR_DB
