import pytest
import torch

from rfengine import ops, reference


def test_auto_runs_the_reference():
    assert ops.resolve_backend("auto", "cpu") == "reference"
    assert ops.resolve_backend("reference", "cpu") == "reference"


def test_a_missing_backend_is_an_error_that_names_the_others():
    with pytest.raises(RuntimeError, match="backend 'triton' is not built .* use one of auto, reference"):
        ops.resolve_backend("triton", "cpu")


def test_every_op_has_the_name_and_signature_of_its_reference():
    import inspect

    public = [
        name for name, value in vars(ops).items() if inspect.isfunction(value) and not name.startswith("_")
    ]
    for name in set(public) - {"resolve_backend"}:
        assert inspect.signature(getattr(ops, name)) == inspect.signature(getattr(reference, name)), name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.adaptive_layer_norm(torch.zeros(1, 5, 4), *[torch.zeros(1, 2, 4)] * 2, 1e-6), "modulation"),
        (lambda: ops.rms_norm(torch.zeros(1, 5, 4), torch.zeros(3), 1e-6), "weight is"),
        (lambda: ops.sink_window_attention(*[torch.zeros(1, 4, 1, 8)] * 3, 5), "kv_len is 5"),
        (lambda: ops.sink_window_attention(*[torch.zeros(1, 4, 1, 8)] * 3, 0), "kv_len is 0"),
        (lambda: ops.rephase_keys(*[torch.zeros(1, 1, 4, 1, 8)] * 2, torch.zeros(2, 3, 4)), "rotation is"),
        (
            lambda: ops.ema_evict(
                *[torch.zeros(1, 1, 4, 1, 8)] * 2, None, None, *[torch.zeros(1, 1, 2, 1, 8)] * 2, 0.9
            ),
            "the evicted chunk",
        ),
        (
            lambda: ops.flow_step(torch.zeros(1, 1, 16), torch.zeros(1, 4, 1, 2, 2), 1.0, torch.zeros(1), 0.5),
            "noise is",
        ),
        (
            lambda: ops.qk_norm_rope_write(
                *[torch.zeros(1, 4, 8)] * 3, torch.ones(8), torch.ones(8), torch.zeros(2, 4, 4), 1e-6,
                torch.zeros(1, 3, 1, 8), torch.zeros(1, 3, 1, 8), None,
            ),
            "the slot is",
        ),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
