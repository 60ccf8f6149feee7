"""The dtype of the full decoder: which is planned, whether weights pass in it, and what is kept of that."""

from __future__ import annotations

import contextlib
import logging
import math

import pytest
import torch

from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.config import RuntimeConfig
from rfengine.models.streaming_decoder import StreamingDecoder
from rfengine.models.vae import WanVAE
from rfengine.ops import REFERENCE_OPS
from rfengine.pipeline import Pipeline
from rfengine.runtime import decoder_precision
from rfengine.runtime.decoder_precision import (
    LEAST_PSNR_DB,
    SIDE,
    check_float16,
    check_fp8,
    decoded_psnr,
    drawn_clip,
    latent_sets,
    plan_precision,
    require_fp8,
    settle_decoder_dtype,
)
from rfengine.stream import VideoStream
from rfengine.tuning.record import TuningCache, default_cache_path, describe_machine
from support.models import SMALL_VAE

CPU = torch.device("cpu")
FULL, FP16, BF16, FP8 = (RuntimeConfig(vae_precision=each) for each in ("default", "fp16", "bf16", "fp8"))
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def own_record(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture(scope="module")
def tiny() -> WanVAE:
    checkpoint = Checkpoint.open("tiny")
    return checkpoint.load(lambda: WanVAE(checkpoint.config.vae), "vae", SINGLE, CPU).eval()


def small_vae(spread: float = 1.0) -> WanVAE:
    """Random weights. spread: how much larger the branches of the residual blocks are than at random."""
    torch.manual_seed(0)
    vae = WanVAE(SMALL_VAE).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if name.startswith("decoder.") and ".residual.6." in name:
            parameter.mul_(spread)
    return vae


@pytest.mark.parametrize(
    ("runtime", "device", "dtype", "plan"),
    [
        (FULL, "cuda", BRAIN, (HALF, True, BRAIN)),
        (FULL, "cuda", HALF, (HALF, True, BRAIN)),
        (FULL, "cuda", SINGLE, (SINGLE, False, None)),
        (FULL, "cpu", SINGLE, (SINGLE, False, None)),
        (FULL, "cpu", BRAIN, (BRAIN, False, None)),
        (FP8, "cuda", BRAIN, (HALF, True, BRAIN)),
        (FP8, "cpu", SINGLE, (SINGLE, False, None)),
        (FP16, "cuda", BRAIN, (HALF, True, None)),
        (FP16, "cpu", SINGLE, (HALF, True, None)),
        (BF16, "cuda", HALF, (BRAIN, False, None)),
        (RuntimeConfig(vae="tiny"), "cuda", BRAIN, (BRAIN, False, None)),
        (RuntimeConfig(vae="tensorrt"), "cuda", HALF, (HALF, False, None)),
    ],
)
def test_float16_is_the_default_on_cuda_in_16_bits_alone(runtime, device, dtype, plan):
    found = plan_precision(runtime, device, dtype)
    assert (found.dtype, found.checked, found.fallback) == plan


def test_a_plan_is_a_line_of_a_report():
    assert str(plan_precision(FULL, "cuda", BRAIN)) == (
        "float16 where it passes its check, else bfloat16: the default on cuda"
    )
    assert str(plan_precision(FP16, "cpu", SINGLE)).startswith("float16 where it passes its check, nothing")
    assert str(plan_precision(FULL, "cpu", SINGLE)) == "float32: the model's, the default on cpu"


def test_the_shipped_decoder_is_nearer_to_float32_in_float16_than_in_bfloat16(tiny):
    verdict, reason = check_float16(tiny)
    assert verdict == "passed" and "the largest activation is" in reason and "of 65504" in reason
    near, far = (float(part.split(" dB")[0].split()[-1]) for part in reason.split(" and ")[:2])
    assert near > 70 and 50 < far < 60


@pytest.mark.parametrize(
    ("spread", "passes"),
    [(1.0, True), (1e4, True), (1e6, False), (math.inf, False)],
    ids=["random", "in the headroom", "above it", "no number"],
)
def test_activations_beyond_the_headroom_of_float16_are_refused(spread, passes):
    vae = small_vae(1.0 if spread == math.inf else spread)
    if spread == math.inf:
        vae.decoder.upsamples[0].residual["2"].bias.fill_(math.nan)
    verdict, reason = check_float16(vae)
    assert (verdict == "passed") is passes
    assert ("where float16 holds 2 times as much up to 32752" in reason) is not passes
    if spread == math.inf:
        assert reason.startswith("the largest activation is nan in decoder.upsamples.0.residual.2, where")


def test_an_overflow_is_found_where_it_begins_even_if_the_frames_hide_it():
    """A norm takes the size of what comes in away: in float32 the frames are as they were."""
    vae = small_vae()
    with torch.no_grad():
        plain = vae.decode(torch.ones(1, 4, 2, 2, 2))
        vae.decoder.upsamples[-1].residual["2"].weight.mul_(1e6)
        vae.decoder.upsamples[-1].residual["2"].bias.mul_(1e6)
        assert (vae.decode(torch.ones(1, 4, 2, 2, 2)) - plain).abs().max() < 1e-4
    verdict, reason = check_float16(vae)
    last = len(vae.decoder.upsamples) - 1
    assert verdict == "refused" and f"in decoder.upsamples.{last}.residual.2," in reason
    assert not any(module._forward_hooks for module in vae.modules())


def test_float16_that_loses_small_weights_is_refused():
    """Weights below its smallest number are zero; bfloat16 has the range of float32, and a norm behind them
    makes them count."""
    vae = small_vae()
    with torch.no_grad():
        for module in vae.decoder.upsamples:
            if hasattr(module, "residual"):
                module.residual["2"].weight.mul_(1e-8)
                module.residual["2"].bias.mul_(1e-8)
    verdict, reason = check_float16(vae)
    assert verdict == "refused" and reason.startswith("float16 is ")


def test_what_is_asked_for_and_does_not_pass_is_an_error_and_a_default_falls_back(monkeypatch, caplog):
    rough = small_vae(1e6)
    with pytest.raises(RuntimeError, match="is 'fp16' and with these weights the largest .*; use"):
        settle_decoder_dtype(rough, FP16, SINGLE, CPU, None)
    assert rough.decoder_dtype == SINGLE
    asked = plan_precision(FULL, "cuda", BRAIN)
    monkeypatch.setattr(decoder_precision, "plan_precision", lambda *_: asked)
    with caplog.at_level(logging.WARNING):
        settle_decoder_dtype(rough, FULL, BRAIN, CPU, None)
    assert rough.decoder_dtype == BRAIN and next(rough.encoder.parameters()).dtype == SINGLE
    assert "the decoder is in bfloat16: with these weights the largest activation" in caplog.text


def test_the_dtype_and_its_distance_are_logged_and_checked_once_for_each_weights(monkeypatch, caplog):
    checks, check = [], decoder_precision.check_float16
    monkeypatch.setattr(decoder_precision, "check_float16", lambda vae: checks.append(1) or check(vae))
    for fingerprint in ("these", "these", "others", None, None):
        vae = small_vae()
        with caplog.at_level(logging.INFO):
            settle_decoder_dtype(vae, FP16, SINGLE, CPU, fingerprint)
        assert vae.decoder_dtype == HALF
        assert "the decoder is in float16: asked for; float16 is" in caplog.messages[-1]
    assert len(checks) == 4
    kept = TuningCache(default_cache_path(), describe_machine(CPU)).decisions()
    assert {decision.key.depends_on for decision in kept} == {"weights these", "weights others"}


def clip_of(stream: VideoStream) -> torch.Tensor:
    """The latents that a stream has continued."""
    return torch.cat([latents for _, latents in sorted(stream._window_latents.items())], dim=2)


def test_a_pipeline_decodes_in_float16_and_encodes_in_float32():
    pipeline = Pipeline.from_pretrained("tiny", device="cpu", runtime=FP16)
    assert pipeline.vae_dtype == HALF and pipeline.vae_tier == "lossless"
    assert {each.dtype for each in pipeline.vae.encoder.parameters()} == {SINGLE}
    plain = Pipeline.from_pretrained("tiny", device="cpu")
    ours, theirs = (each.generate("a red circle", num_frames=9).frames for each in (pipeline, plain))
    assert abs(ours.astype(int) - theirs.astype(int)).max() <= 1
    stream = pipeline.stream("a red circle", start_frames=theirs)
    other = plain.stream("a red circle", start_frames=theirs)
    assert torch.equal(clip_of(stream), clip_of(other))
    snapshot = stream.snapshot()
    assert all(each.dtype == HALF for each in snapshot.group("decoder").values())
    restored = pipeline.restore(snapshot)
    assert (next(restored).frames == next(stream).frames).all()
    message = "the snapshot's decoder is 'full in float16', this pipeline's is 'full'; restore it with"
    with pytest.raises(ValueError, match=message):
        plain.restore(snapshot)


def test_a_clip_encoded_in_float32_does_not_depend_on_the_model_s_dtype():
    pipeline = Pipeline.from_pretrained("tiny", device="cpu", dtype="bfloat16")
    assert pipeline.vae_dtype == BRAIN and pipeline.vae.conv1.weight.dtype == SINGLE
    frames = Pipeline.from_pretrained("tiny", device="cpu").generate("a red circle", num_frames=9).frames
    stream = pipeline.stream("a red circle", start_frames=frames)
    pixels = torch.from_numpy(frames).float().permute(3, 0, 1, 2).unsqueeze(0) / 127.5 - 1
    exact = pipeline.vae.encode_in_groups(pixels)
    assert exact.dtype == SINGLE and torch.equal(clip_of(stream), exact.bfloat16())


def test_the_shipped_decoder_holds_its_psnr_in_fp8(tiny):
    decoder = StreamingDecoder(tiny, REFERENCE_OPS, "fp8")
    assert len(decoder.fp8_slots) == 12
    assert LEAST_PSNR_DB <= decoded_psnr(tiny, decoder, SINGLE) < 60
    assert decoded_psnr(tiny, StreamingDecoder(tiny, REFERENCE_OPS), SINGLE) > 100
    verdict, reason = check_fp8(tiny, decoder, (SIDE, SIDE), 3)
    assert verdict == "passed" and reason.endswith("at 8 x 8 latents")


def rough_vae(config) -> WanVAE:
    """Its branches weigh as much as what they are added to."""
    rough = WanVAE(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in rough.parameters():
        if parameter.shape[0] != parameter.numel():
            parameter.data.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    return rough


def test_frames_too_far_from_float32_are_refused_with_the_number(tiny):
    rough = rough_vae(tiny.config)
    decoder = StreamingDecoder(rough, REFERENCE_OPS, "fp8")
    with pytest.raises(RuntimeError, match=r"its frames are \d+\.\d dB \(PSNR\) from float32, at 8 x 8 lat"):
        require_fp8(rough, decoder, (8, 8), 3, "rough")
    kept = TuningCache(default_cache_path(), describe_machine(CPU)).decisions()
    assert [(each.key.name, each.key.shape, each.backend) for each in kept] == [
        ("vae_fp8", (3, 8, 8), "refused")
    ]
    rough.decoder.head["2"].bias.data[:] = math.nan
    with pytest.raises(RuntimeError, match="its frames are nan dB"):
        require_fp8(rough, StreamingDecoder(rough, REFERENCE_OPS, "fp8"), (8, 8), 3, None)


def test_fp8_is_measured_at_the_size_or_on_the_part_that_fits_the_time_and_the_memory(monkeypatch):
    vae = small_vae()
    decoder = StreamingDecoder(vae, REFERENCE_OPS, "fp8")
    sizes = []

    def measured(exact, decoder, dtype, size, chunk) -> float:
        sizes.append(size)
        return 50.0

    monkeypatch.setattr(decoder_precision, "decoded_psnr", measured)
    monkeypatch.setattr(decoder_precision, "GATE_S", 1e9)
    assert check_fp8(vae, decoder, (10, 24), 3)[1].endswith("at 10 x 24 latents")
    largest = 4 * (100 * 8) * (240 * 8) * SMALL_VAE.base_dim * 4  # bytes of four frames in float32
    monkeypatch.setattr(decoder_precision, "free_memory", lambda _: 2 * 10 * largest // 4 + 1)
    assert check_fp8(vae, decoder, (100, 240), 3)[1].endswith("at 50 x 120 of 100 x 240 latents")
    assert sizes == [(10, 24), (50, 120)]
    monkeypatch.setattr(decoder_precision, "free_memory", lambda _: None)
    monkeypatch.setattr(decoder_precision, "GATE_S", 1e-9)
    check_fp8(vae, decoder, (100, 6), 3)
    assert sizes[2] == (8, 6)


def test_the_check_runs_with_the_decoder_s_gpu_as_the_current_one(monkeypatch):
    current, seen = [], []

    @contextlib.contextmanager
    def make_current(device):
        current.append(device)
        yield
        current.pop()

    def check(*_: object) -> tuple[str, str]:
        seen.append(list(current))
        return "passed", "as it must"

    monkeypatch.setattr(decoder_precision, "made_current", make_current)
    for name in ("check_float16", "check_fp8"):
        monkeypatch.setattr(decoder_precision, name, check)
    vae = small_vae()
    settle_decoder_dtype(vae, FP16, SINGLE, CPU, None)
    require_fp8(vae, StreamingDecoder(vae, REFERENCE_OPS, "fp8"), (8, 8), 3, None)
    assert seen == [[CPU], [CPU]] and current == []


def test_latents_of_the_check_are_of_a_picture_that_moves_and_drawn_ones(tiny):
    encoded, drawn, wide = latent_sets(tiny, (8, 10), 3, (1.0, 4.0))
    assert encoded.shape == drawn.shape == (1, tiny.config.z_dim, 3, 8, 10)
    assert torch.equal(wide, 4 * drawn) and drawn.std() == pytest.approx(1, abs=0.1)
    clip = drawn_clip(9, 64, 80)
    assert clip.shape == (1, 3, 9, 64, 80) and clip.abs().max() <= 1
    assert (clip[:, :, 1:] - clip[:, :, :-1]).abs().mean() > 0.02
    assert torch.equal(drawn_clip(9, 128, 160)[..., :64, :80], clip)  # as much detail at every size
