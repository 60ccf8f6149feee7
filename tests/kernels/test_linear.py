"""The products against the reference; bfloat16 products are wrong in the interpreter, so those need a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rfengine.accuracy import relative_error
from rfengine.config import WanConfig
from rfengine.kernels import linear as kernels
from rfengine.kernels.linear_tile import TILES, Device, choose_tile, count_whole_tiles, tile_fill
from rfengine.models.dit import WanDiT, pack_weights
from rfengine.ops import choose_ops, reference
from support.models import noise_of, small_model, text_states
from support.tolerance import assert_within_reference_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOPPER = Device(132, 227 * 1024, (9, 0))
AMPERE = Device(108, 163 * 1024, (8, 0))
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]
NAMES = ["linear", "linear_gelu", "gated_linear"]


def inputs(name, rows=(2, 21), inputs=40, outputs=72, dtype=torch.float32, gate=(2, 3), seed=0):
    """Arguments of the op; rows are [B, T], gate [B or 1, F or 1] or None."""
    torch.manual_seed(seed)
    y = torch.randn(*rows, inputs)
    weight, bias = torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs)
    values = [tensor.to(DEVICE, dtype) for tensor in (y, weight, bias)]
    if name != "gated_linear":
        return values
    table = None if gate is None else torch.randn(*gate, 6, outputs, device=DEVICE).unbind(2)[2]
    return [torch.randn(*rows, outputs).to(DEVICE, dtype), *values, table]


def widened(case):
    return [None if tensor is None else tensor.double() for tensor in case]


def assert_matches(name, case):
    found, expected = getattr(kernels, name)(*case), getattr(reference, name)(*case)
    assert found.dtype == expected.dtype and found.is_contiguous()
    assert_within_reference_error(name, found, expected, getattr(reference, name)(*widened(case)))


@pytest.fixture
def hopper(monkeypatch):
    """The form for tensor descriptors, which the interpreter runs as well."""
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "describe_device", lambda _: HOPPER)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_the_products_agree_with_the_reference(name, dtype):
    for rows in ((1, 1), (1, 63), (2, 21)):
        gate = (rows[0], 3) if rows[1] % 3 == 0 else (1, 1)
        assert_matches(name, inputs(name, rows, dtype=dtype, gate=gate))


@pytest.mark.parametrize(
    ("name", "tile"), [*(("gated_linear", tile) for tile in TILES), ("linear_gelu", TILES[1])]
)
def test_every_tile_agrees_by_pointers_and_by_descriptors(name, tile, monkeypatch):
    """Two tiles of rows and two of columns, the last of them cut, and the last step of the inputs."""
    monkeypatch.setattr(kernels, "choose_tile", lambda *_: tile)
    rows, outputs = tile.rows // 3 * 3 + 24, tile.columns + tile.tail + 8
    case = inputs(name, (1, rows), inputs=72, outputs=outputs, dtype=torch.float16, gate=(1, 3))
    for device in (HOPPER, AMPERE) if DEVICE == "cpu" else (None,):
        if device is not None:
            monkeypatch.setattr(kernels, "describe_device", lambda _, device=device: device)
        assert_matches(name, case)


@pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0), reason="needs tensor descriptors"
)
@pytest.mark.parametrize(
    ("name", "processors", "inner"),
    [
        ("linear", 5, 328),  # 9 tiles of 6 steps: the last 4 in 5 shares, most of them of two tiles
        ("linear_gelu", 4, 328),  # the last alone in 4
        ("gated_linear", 16, 328),  # all in 16: a tile has up to three parts
        ("gated_linear", 7, 40),  # 2 tiles of one step in 7 shares, most of them empty
        ("linear", 16, 200),
    ],
)
def test_tiles_cut_along_the_inputs_agree_with_the_reference(name, processors, inner, monkeypatch):
    monkeypatch.setattr(kernels, "describe_device", lambda _: Device(processors, 227 * 1024, (9, 0)))
    monkeypatch.setattr(kernels, "choose_tile", lambda *_: TILES[-1])
    monkeypatch.setattr(kernels, "count_whole_tiles", lambda tile, tiles, *_: tiles - tiles % processors)
    monkeypatch.setattr(kernels, "_linear_kernel", None)  # it has no part in this
    case = inputs(name, (1, 150), inner, 136, torch.float16, (1, 3))
    assert_matches(name, case)


@pytest.mark.parametrize(
    ("rows", "outputs", "inner", "device", "whole"),
    [
        (4680, 1536, 8960, HOPPER, 132),  # 222 tiles: by hand, 45,600 cycles saved for 17,800
        (4680, 1536, 1536, HOPPER, 222),  # 7,800 for 17,800
        (4680, 8960, 1536, HOPPER, 1295),  # 9.8 waves
        (4680, 5120, 13824, HOPPER, 660),  # 740 tiles of 14B
        (4680, 4608, 99999, HOPPER, 888),  # tiles with a tail
        (4680, 1536, 8960, Device(114, 227 * 1024, (9, 0)), 222),  # 108 of 114 in the last wave
        (4680, 1536, 8960, Device(111, 227 * 1024, (9, 0)), 222),  # two whole waves
        (4680, 1536, 8960, Device(132, 227 * 1024, (10, 0)), 222),  # another rate
    ],
)
def test_the_last_wave_is_cut_where_that_saves_twice_its_cost(rows, outputs, inner, device, whole):
    tile = choose_tile(rows, outputs, torch.bfloat16, device)
    tiles = -(-rows // tile.rows) * -(-outputs // (tile.columns + tile.tail))
    assert count_whole_tiles(tile, tiles, inner, device) == whole


def test_rows_of_one_latent_frame_agree_with_the_reference(hopper):
    """1561 rows, one more than at 832 x 480, in the tile that 1536 outputs get, and two columns of tiles."""
    case = inputs("gated_linear", (1, 1561), inputs=24, outputs=176, dtype=torch.float16, gate=(1, 1))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kernels, "choose_tile", lambda rows, _, *rest: choose_tile(rows, 1536, *rest))
        assert_matches("gated_linear", case)


@pytest.mark.parametrize("gate", [None, (1, 1), (2, 1), (1, 3), (2, 3), (1, 12)])
def test_a_gate_may_serve_frames_or_samples_together(gate, hopper):
    assert_matches("gated_linear", inputs("gated_linear", (2, 12), dtype=torch.float16, gate=gate))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_views_agree_with_the_reference(dtype, hopper):
    x, y, weight, bias, gate = inputs("gated_linear", (2, 24), 40, 72, dtype)
    packed = torch.cat([y, y + 1, y - 1], -1)
    assert_matches("linear", [packed[..., 40:80], weight, bias])
    assert_matches("linear", [packed[..., 41:81], weight, bias])  # no address that TMA takes
    assert_matches("linear_gelu", [y[:, ::2], weight[::2], bias[::2].contiguous()])
    assert_matches("linear", [y.transpose(1, 2).contiguous().transpose(1, 2), weight, bias])
    assert_matches("gated_linear", [x[:, ::2], y[:, 1::2], weight, bias, gate])


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 2), st.integers(1, 70), st.integers(1, 70), st.integers(1, 140), st.sampled_from(NAMES))
def test_any_shape_agrees_with_the_reference(batch, tokens, inner, outer, name):
    assert_matches(name, inputs(name, (batch, tokens), inner, outer, torch.float16, (1, 1)))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_gelu_is_finite_and_exact_at_its_ends():
    x = torch.tensor([[-1e4, -20.0, -5.0, 0.0, 5.0, 20.0, 1e4]], device=DEVICE).T
    one, zero = torch.ones(16, 1, device=DEVICE), torch.zeros(16, device=DEVICE)
    found, expected = kernels.linear_gelu(x, one, zero), reference.linear_gelu(x, one, zero)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found[0, 0] == 0 and found[-1, 0] == 1e4


@pytest.mark.parametrize("name", NAMES)
def test_gradients_agree_with_the_reference(name):
    case = inputs(name)
    grads = {}
    for kind, op in (("kernel", getattr(kernels, name)), ("reference", getattr(reference, name))):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in case]
        (op(*leaves) ** 2).sum().backward()
        grads[kind] = [leaf.grad for leaf in leaves]
    leaves = [tensor.double().requires_grad_() for tensor in case]
    (getattr(reference, name)(*leaves) ** 2).sum().backward()
    for index, leaf in enumerate(leaves):
        assert_within_reference_error(
            f"gradient {index}", grads["kernel"][index], grads["reference"][index], leaf.grad
        )


@pytest.mark.parametrize("name", NAMES)
def test_only_the_gradients_that_are_asked_for_are_formed(name):
    case = inputs(name)
    case[-1].requires_grad_()
    getattr(kernels, name)(*case).sum().backward()
    assert case[-1].grad is not None and case[0].grad is None


@pytest.mark.parametrize("name", NAMES)
def test_torch_sees_the_ops_as_it_must(name):
    case = [tensor.requires_grad_() for tensor in inputs(name, (2, 3), 16, 16)]
    torch.library.opcheck(getattr(torch.ops.rfengine, name).default, tuple(case))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: (x, w.half(), b), "the dtypes are"),
        (lambda x, w, b: (x[..., :8], w, b), "weight is"),
        (lambda x, w, b: (x, w, b[:1]), "and bias"),
        (lambda x, w, b: (x.double(), w.double(), b.double()), "all must be one of"),
        (lambda x, w, b: (x, w.t().contiguous().t(), b), "the last axis of weight has stride"),
    ],
)
def test_what_a_kernel_cannot_read_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        kernels.linear(*change(*inputs("linear")))


@pytest.mark.parametrize(
    ("rows", "outputs", "size", "filled"),
    [  # of 132 multiprocessors, by hand: rows * outputs / (programs in whole waves * 132 * size of a tile)
        (4680, 1536, (128, 256), 4680 * 1536 / (2 * 132 * 128 * 256)),  # 222 programs
        (4680, 4608, (128, 192), 4680 * 4608 / (7 * 132 * 128 * 192)),  # 888
        (4680, 8960, (128, 256), 4680 * 8960 / (10 * 132 * 128 * 256)),  # 1295
        (1560, 1536, (128, 160), 1560 * 1536 / (1 * 132 * 128 * 160)),  # 130
        (1560, 4608, (128, 256), 1560 * 4608 / (2 * 132 * 128 * 256)),  # 234
        (1560, 8960, (128, 128), 1560 * 8960 / (7 * 132 * 128 * 128)),  # 910
    ],
)
def test_the_tile_fills_the_waves_that_its_shape_makes(rows, outputs, size, filled):
    tile = choose_tile(rows, outputs, torch.bfloat16, HOPPER)
    assert (tile.rows, tile.columns + tile.tail) == size
    assert tile_fill(tile, rows, outputs, 132) == pytest.approx(filled)
    assert filled > 0.83


@pytest.mark.parametrize(("processors", "outputs"), [(108, 4608), (114, 1536), (128, 1536), (170, 4608)])
def test_a_chunk_of_three_frames_has_no_tile_of_160_columns_on_any_gpu(processors, outputs):
    tile = choose_tile(4680, outputs, torch.bfloat16, Device(processors, 163 * 1024, (8, 0)))
    assert tile.tail != 32


def test_the_tile_fits_few_rows_and_little_shared_memory():
    half = torch.bfloat16
    assert choose_tile(64, 1536, half, HOPPER).rows == 64
    assert all(tile.stages * tile.stage_bytes <= HOPPER.shared_bytes for tile in TILES)
    small = Device(188, 99 * 1024, (12, 0))
    tile = choose_tile(4680, 8960, half, small)
    assert tile.stages * tile.stage_bytes <= small.shared_bytes


def test_a_model_on_these_products_with_folded_gates_and_packed_weights_equals_the_reference():
    config = WanConfig(64, 96, 1, 1, text_dim=16, text_len=8, freq_dim=32, in_dim=4, out_dim=4)
    plain = small_model(config).to(DEVICE)
    triton = dict.fromkeys(NAMES, "triton")
    folded = WanDiT(config, choose_ops("reference", DEVICE, triton, folds_gate=True)).to(DEVICE).eval()
    folded.load_state_dict(plain.state_dict())
    pack_weights(folded)
    given = noise_of(0, 2)[0].to(DEVICE), torch.tensor([500.0], device=DEVICE), text_states().to(DEVICE)
    with torch.no_grad():
        assert relative_error(folded.forward_clip(*given), plain.forward_clip(*given)) <= 3e-6
