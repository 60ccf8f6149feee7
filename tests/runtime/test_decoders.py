"""The full decoder as a stream gets it: FP8 only where its frames are near enough, backends by size."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref

import pytest
import torch

from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.config import RuntimeConfig
from rfengine.grid import LatentGrid
from rfengine.models.vae import WanVAE
from rfengine.ops import REFERENCE_OPS
from rfengine.ops.backends import FP8_CAPABILITY
from rfengine.pipeline import Pipeline
from rfengine.runtime import decoders
from rfengine.runtime.decoder_precision import LEAST_PSNR_DB, decoded_psnr
from rfengine.runtime.decoders import decoder_ops, full_opener, require_decoder
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


def test_fp8_is_checked_on_small_frames_and_then_at_each_size(monkeypatch, tiny):
    config, vae = tiny
    checked = []
    monkeypatch.setattr(decoders, "require_fp8", lambda vae, decoder, *about: checked.append(about))
    opener = full_opener(config, vae, CPU, "these weights")
    assert checked == [((8, 8), 3, "these weights, backend auto")]
    for grid in (LatentGrid(48, 80), LatentGrid(48, 80), LatentGrid(64, 80)):
        opener(grid)
    assert checked[1:] == [(size, 3, "these weights, backend auto") for size in ((6, 10), (8, 10))]


def test_a_given_vae_must_have_the_dtype_that_is_asked_for():
    pipeline = small_pipeline()
    config = dataclasses.replace(pipeline.config, runtime=RuntimeConfig(vae_precision="bf16"))
    with pytest.raises(
        ValueError, match="is 'bf16' and the decoder of this VAE is in torch.float32; load it"
    ):
        full_opener(config, pipeline.vae, CPU)
    pipeline.vae.set_decoder_dtype(torch.bfloat16)
    assert full_opener(config, pipeline.vae, CPU)(GRID)._first.weight.dtype == torch.bfloat16


def test_buffers_of_a_size_that_no_stream_uses_are_given_up():
    pipeline = small_pipeline()
    opener = full_opener(pipeline.config, pipeline.vae, CPU)
    forgotten = weakref.ref(opener(LatentGrid(32, 32)))
    kept = opener(GRID)
    for side in (48, 64):
        opener(LatentGrid(side, 80))
    gc.collect()
    assert forgotten() is None and kept is not None


def test_each_size_has_a_decoder_of_its_own_with_the_same_weights():
    pipeline = small_pipeline()
    opener = full_opener(pipeline.config, pipeline.vae, CPU)
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
    if torch.cuda.get_device_capability() < FP8_CAPABILITY:
        pytest.skip("FP8 needs sm_89")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config, vae = tiny
    on_gpu = copy.deepcopy(vae).cuda()
    on_gpu.set_decoder_dtype(torch.float16)
    decoder = full_opener(config, on_gpu, torch.device("cuda"))(LatentGrid.of(config))
    assert decoder._ops.choice["causal_conv3d_fp8"] == "triton"
    assert decoded_psnr(vae.cuda(), decoder, torch.float16) >= LEAST_PSNR_DB
