import copy
import inspect

import pytest
import torch

from rfengine import ops
from rfengine.ops import REFERENCE_OPS, Ops, choose_ops, native, reference
from rfengine.ops.table import OPS


def test_auto_runs_the_reference_on_a_cpu_but_for_the_ops_that_have_a_form_there():
    chosen = choose_ops("auto", "cpu").choice
    assert chosen == {op: "cpu" if "cpu" in OPS[op].backends else "reference" for op in OPS}
    assert set(choose_ops("reference", "cpu").choice.values()) == {"reference"}


def test_a_missing_backend_is_an_error_that_names_the_others():
    with pytest.raises(
        RuntimeError, match="backend 'native' cannot run on cpu: .*; use one of auto, reference"
    ):
        choose_ops("native", "cpu")
    with pytest.raises(RuntimeError, match="backend 'flash' cannot run"):
        choose_ops("auto", "cpu", {"sink_window_attention": "flash"})


@pytest.fixture
def hopper(monkeypatch):
    """A GPU of compute capability 9 with all libraries, as far as choosing goes."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    reasons = dict.fromkeys(ops.backend_reasons("cpu"), "")
    monkeypatch.setattr(ops, "backend_reasons", lambda device: dict(reasons))
    return reasons


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_hopper_cudnn_attends_in_sixteen_bits_until_something_else_is_said(hopper, monkeypatch, dtype):
    op = "sink_window_attention"
    chosen = choose_ops("auto", "cuda", dtype=dtype).choice
    assert (
        chosen[op] == "cudnn" and chosen["rms_norm"] == "triton" and chosen["clip_attention"] == "reference"
    )
    assert choose_ops("auto", "cuda", {op: "triton"}, dtype=dtype).choice[op] == "triton"
    assert choose_ops("triton", "cuda", dtype=dtype).choice[op] == "triton"
    assert choose_ops("auto", "cuda", dtype=torch.float32).choice[op] == "triton"
    assert choose_ops("auto", "cuda").choice[op] == "triton"
    monkeypatch.setitem(hopper, "cudnn", "this torch was built without cuDNN")
    assert choose_ops("auto", "cuda", dtype=dtype).choice[op] == "triton"


@pytest.mark.parametrize("capability", [(8, 9), (10, 0), (12, 0)])
def test_on_any_other_gpu_triton_attends(hopper, monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert choose_ops("auto", "cuda", dtype=torch.bfloat16).choice["sink_window_attention"] == "triton"


def test_a_form_of_tritons_attention_is_a_backend_of_that_op_alone(hopper):
    op = "sink_window_attention"
    for form in ("triton-descriptor", "triton-pointer"):
        assert choose_ops("auto", "cuda", {op: form}, dtype=torch.bfloat16).choice[op] == form
        with pytest.raises(ValueError, match=f"clip_attention has no form for backend '{form}'"):
            choose_ops("auto", "cuda", {"clip_attention": form})
    with pytest.raises(ValueError, match="has no form for backend 'triton-square'"):
        choose_ops("auto", "cuda", {op: "triton-square"})
    hopper["triton"] = "triton is not installed"
    with pytest.raises(RuntimeError, match="'triton-pointer' cannot run on cuda: triton is not installed"):
        choose_ops("auto", "cuda", {op: "triton-pointer"})


def test_an_override_of_an_unknown_op_is_an_error():
    with pytest.raises(ValueError, match="there is no op 'sink_attention'; there are"):
        choose_ops("auto", "cpu", {"sink_attention": "reference"})


def test_a_model_with_its_ops_can_be_copied():
    copied = copy.deepcopy(REFERENCE_OPS)
    assert copied.rms_norm(torch.ones(1, 4), torch.ones(4), 0.0).tolist() == [[1.0] * 4]


LEVEL = torch.zeros(1, dtype=torch.float64)


@pytest.mark.parametrize("name", OPS)
def test_every_check_takes_the_arguments_of_its_op_with_and_without_the_optional_ones(name):
    assert getattr(Ops, name).__doc__ == OPS[name].reference.__doc__
    arguments = inspect.signature(OPS[name].reference).parameters.values()
    required = [argument for argument in arguments if argument.default is argument.empty]
    if OPS[name].check is not None:
        inspect.signature(OPS[name].check).bind(*arguments)
        inspect.signature(OPS[name].check).bind(*required)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: o.adaptive_layer_norm(torch.zeros(1, 5, 4), *[torch.zeros(1, 2, 4)] * 2, 0), "modulation"),
        (lambda o: o.rms_norm(torch.zeros(1, 4), torch.zeros(3), 1e-6), "weight is"),
        (lambda o: o.frame_pack(torch.zeros(1, 2, 4, 4)), r"pixels are \(1, 2, 4, 4\)"),
        (
            lambda o: o.gated_linear(
                torch.zeros(1, 4, 2), torch.zeros(1, 3, 8), torch.zeros(2, 8), torch.zeros(2), None
            ),
            "x is",
        ),
        (
            lambda o: o.gated_linear(
                torch.zeros(1, 4, 2), torch.zeros(1, 4, 8), torch.zeros(2, 8), torch.zeros(2),
                torch.zeros(1, 3, 2),
            ),
            "a modulation of",
        ),
        (lambda o: o.sink_window_attention(*[torch.zeros(1, 4, 1, 8)] * 3, 5, None), "is 5"),
        (lambda o: o.sink_window_attention(*[torch.zeros(1, 4, 1, 8)] * 3, 0, None), "is 0"),
        (lambda o: o.rephase_keys(*[torch.zeros(1, 1, 4, 1, 8)] * 2, torch.zeros(2, 3, 4)), "rotation is"),
        (
            lambda o: o.ema_evict(
                *[torch.zeros(1, 1, 4, 1, 8)] * 2, None, None, *[torch.zeros(1, 1, 2, 1, 8)] * 2, 0.9
            ),
            "the evicted chunk",
        ),
        (
            lambda o: o.flow_step(
                torch.zeros(1, 1, 16), torch.zeros(1, 4, 1, 2, 2), LEVEL, torch.zeros(1), LEVEL
            ),
            "noise is",
        ),
        (
            lambda o: o.flow_step(torch.zeros(1, 1, 16), torch.zeros(1, 4, 1, 2, 2), LEVEL.repeat(2)),
            "sigmas do not fit",
        ),
        (
            lambda o: o.qk_norm_rope_write(
                *[torch.zeros(1, 4, 8)] * 3, torch.ones(8), torch.ones(8), torch.zeros(2, 4, 4), 1e-6,
                *[torch.zeros(1, 6, 1, 4)] * 2, None, torch.zeros(2, dtype=torch.int64),
            ),
            "the arena is",
        ),
        (
            lambda o: o.qk_norm_rope_write(
                *[torch.zeros(1, 4, 8)] * 3, torch.ones(8), torch.ones(8), torch.zeros(2, 4, 4), 1e-6,
                *[torch.zeros(1, 6, 1, 8)] * 2, None, torch.zeros(3, dtype=torch.int64),
            ),
            "slots are",
        ),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(REFERENCE_OPS)


FRAMES, KERNEL = torch.zeros(3, 2, 2, 4), torch.zeros(4, 4, 3, 3, 3)
EIGHTS = FRAMES.to(torch.float8_e4m3fn), KERNEL.to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: o.channel_norm_silu(FRAMES, None, None, torch.ones(3), FRAMES), "gamma does not fit"),
        (lambda o: o.channel_norm_silu(FRAMES, None, FRAMES[:1], torch.ones(4), FRAMES), "the residual is"),
        (lambda o: o.channel_norm_silu(FRAMES, None, None, torch.ones(4), FRAMES[:1]), "out is"),
        (lambda o: o.causal_conv3d(FRAMES, KERNEL[:, :3], None), "a weight of"),
        (lambda o: o.causal_conv3d(FRAMES[:2], KERNEL, None), "a weight of"),
        (lambda o: o.causal_conv3d(FRAMES, KERNEL, None, FRAMES), r"it must be \(1, 2, 2, 4\)"),
        (lambda o: o.channel_norm_silu(FRAMES, None, None, torch.ones(4), FRAMES, 0.0), "out_scale is 0.0"),
        (lambda o: o.causal_conv3d_fp8(FRAMES, KERNEL, torch.ones(4), None), "must be torch.float8_e4m3fn"),
        (lambda o: o.causal_conv3d_fp8(*EIGHTS, torch.ones(3), None), "scale is"),
        (lambda o: o.causal_conv3d_fp8(*EIGHTS, torch.ones(4), None, FRAMES), r"it must be \(1, 2, 2, 4\)"),
        (lambda o: o.phase_conv(FRAMES, KERNEL, None), "a phase weight of"),
        (lambda o: o.frame_attention(FRAMES, FRAMES, FRAMES), "it must be .frames, positions"),
        (lambda o: o.conv_frame_pack(FRAMES, KERNEL, None), "gives 4 channels"),
    ],
)
def test_shapes_of_the_decoder_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(REFERENCE_OPS)


@torch.no_grad()
def test_the_library_forms_of_the_convolutions_equal_the_reference():
    x, weight, bias = torch.randn(4, 3, 5, 8), torch.randn(16, 8, 3, 3, 3), torch.randn(16)
    library = Ops({"causal_conv3d": "cudnn", "phase_conv": "cudnn"})  # torch's own, which a CPU has too
    out = torch.empty(2, 3, 5, 16)
    expected = REFERENCE_OPS.causal_conv3d(x, weight, bias)
    assert library.causal_conv3d(x, weight, bias, out) is out
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(library.causal_conv3d(x, weight, None), expected - bias, rtol=1e-4, atol=1e-4)
    phases = reference.fold_upsample_weight(torch.randn(16, 8, 3, 3))
    torch.testing.assert_close(library.phase_conv(x, phases, bias), REFERENCE_OPS.phase_conv(x, phases, bias))


@pytest.mark.parametrize("channels_out", [16, 96])
def test_the_native_convolution_is_the_reference_where_the_kernel_serves_nothing(channels_out, monkeypatch):
    called = []
    monkeypatch.setattr(native, "causal_conv3d", lambda *given: called.append(given) or "the kernel")
    ops = Ops({"causal_conv3d": "native"})
    x, weight = torch.randn(4, 3, 5, 32).half(), torch.randn(channels_out, 32, 3, 3, 3).half()
    bias, out = torch.randn(channels_out).half(), torch.empty(2, 3, 5, channels_out).half()
    if channels_out == 96:
        assert ops.causal_conv3d(x, weight, bias, out) == "the kernel"
        assert [id(tensor) for tensor in called[0]] == [id(tensor) for tensor in (x, weight, bias, out)]
        return
    assert ops.causal_conv3d(x, weight, bias, out) is out and called == []
    assert torch.equal(out, REFERENCE_OPS.causal_conv3d(x, weight, bias))


def test_native_ops_are_chosen_on_request_alone(monkeypatch):
    monkeypatch.setattr(native, "absence", lambda device: "")
    chosen = {op for op, backend in choose_ops("native", "cpu").choice.items() if backend == "native"}
    assert chosen == {"evict_and_rephase", "causal_conv3d"}
    assert "native" not in choose_ops("auto", "cpu").choice.values()
