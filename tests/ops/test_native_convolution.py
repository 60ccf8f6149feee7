"""The native convolution against the reference: its source on an emulated multiprocessor, and the
fatbin where there is a GPU that it is made for.

The emulation of support/emulated_hopper.hpp has to notice what would be wrong on the device, so the last
tests break the machine, piece by piece.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rfengine.config import VAEConfig
from rfengine.models.streaming_decoder import StreamingDecoder
from rfengine.models.vae import WanVAE
from rfengine.ops import REFERENCE_OPS, Ops, native, reference
from rfengine.ops.native import convolution
from rfengine.ops.native.convolution import TILES, Tile, causal_conv3d, tile_of, unserved
from rfengine.ops.native.tensor_map import TensorMap
from support.emulated_convolution import EmulatedDriver, Emulation, build_library
from support.tolerance import assert_within_reference_error

DTYPES = [torch.float16, torch.bfloat16]
# how the emulated device may run: copies and products as late as the program allows, or at once
SCHEDULES = [(1, 1), (0, 1), (1, 0), (0, 0)]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc, which knows where the CUDA headers are")
    return build_library(tmp_path_factory.mktemp("convolution"))


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def driver(request: pytest.FixtureRequest) -> native.Driver:
    if request.param == "host":
        return EmulatedDriver(request.getfixturevalue("library"))
    return device_driver()


def device_driver() -> native.Driver:
    reason = native.absence() or unserved((96, 96, 3, 3, 3), torch.float16, torch.device("cuda"))
    if reason:
        pytest.skip(reason)
    return native.load_driver()


def halo_in_nan(
    frames: int, height: int, width: int, channels: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """x [T + 2, H, W, Cin] amid NaN: what is read beside it cannot go unnoticed."""
    generator = torch.Generator().manual_seed(frames + height + width)
    around = torch.full((frames + 4, height + 2, width + 2, channels + 8), float("nan"), dtype=dtype)
    x = around[1:-1, 1:-1, 1:-1, :-8]
    x.copy_(torch.randn(x.shape, generator=generator))
    return around.to(device)[1:-1, 1:-1, 1:-1, :-8]


def weight_of(channels_out: int, channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(channels_out + channels)
    values = torch.randn(channels_out, 3, 3, 3, channels, generator=generator) * (27 * channels) ** -0.5
    return values.to(device, dtype).movedim(-1, 1)


def bias_of(channels_out: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(channels_out, generator=torch.Generator().manual_seed(3)).to(device, dtype)


def assert_like_reference(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    expected = reference.causal_conv3d(x, weight, bias)
    wide = (x.double(), weight.double(), None if bias is None else bias.double())
    assert out.dtype == x.dtype
    assert_within_reference_error("out", out, expected, reference.causal_conv3d(*wide))


# T, H, W, channels in and out: one pixel; less than a block; one more than a block each way; several parts of
# channels; the block itself
SIZES = [
    (1, 1, 1, 32, 96), (1, 5, 1, 96, 96), (3, 17, 18, 32, 96), (2, 16, 16, 64, 288),
    (1, 1, 1, 64, 192), (3, 9, 17, 64, 192), (2, 8, 16, 192, 192), (1, 3, 33, 64, 384),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_the_result_is_that_of_the_reference(
    size: tuple[int, ...], dtype: torch.dtype, driver: native.Driver
) -> None:
    *pixels, channels, channels_out = size
    x = halo_in_nan(*pixels, channels, dtype, driver.device)
    weight, bias = (make(dtype, driver.device) for make in makers(channels_out, channels))
    out = causal_conv3d(x, weight, bias, None, driver)
    assert out.shape == (*pixels, channels_out)
    assert_like_reference(out, x, weight, bias)


def makers(channels_out: int, channels: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    return (
        lambda dtype, device: weight_of(channels_out, channels, dtype, device),
        lambda dtype, device: bias_of(channels_out, dtype, device),
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: str(tile.columns))
def test_no_order_of_threads_copies_and_products_changes_the_result(
    tile: Tile, schedule: tuple[int, int], seed: int, library: Path
) -> None:
    emulation = Emulation(*schedule, seed=seed)
    _, x, weight, bias = case(tile)
    out = causal_conv3d(x, weight, bias, None, EmulatedDriver(library, emulation, processors=2))
    assert_like_reference(out, x, weight, bias)


def case(tile: Tile) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out of NaN, x, weight, bias: three tiles for two processors, so that one goes from one to the next."""
    device, dtype = torch.device("cpu"), torch.float16
    x = halo_in_nan(1, 3, 2 * tile.width + 1, 2 * tile.chunk, dtype, device)
    weight = weight_of(tile.columns, 2 * tile.chunk, dtype, device)
    out = torch.full((1, 3, 2 * tile.width + 1, tile.columns), float("nan"), dtype=dtype)
    return out, x, weight, bias_of(tile.columns, dtype, device)


def test_without_a_bias(driver: native.Driver) -> None:
    x = halo_in_nan(2, 4, 5, 32, torch.float16, driver.device)
    weight = weight_of(96, 32, torch.float16, driver.device)
    assert_like_reference(causal_conv3d(x, weight, None, None, driver), x, weight, None)


@pytest.mark.parametrize("channels_out", [96, 192])
def test_every_other_frame_of_a_longer_tensor_is_written_and_nothing_else(
    channels_out: int, driver: native.Driver
) -> None:
    x = halo_in_nan(3, 5, 19, 64, torch.bfloat16, driver.device)
    weight = weight_of(channels_out, 64, torch.bfloat16, driver.device)
    pairs = x.new_full((3, 2, 5, 19, channels_out), float("nan"))
    out = causal_conv3d(x, weight, None, pairs[:, 1], driver)
    assert out.data_ptr() == pairs[:, 1].data_ptr()
    assert_like_reference(pairs[:, 1], x, weight, None)
    assert pairs[:, 0].isnan().all()


@pytest.mark.parametrize("start", [3, 8])
def test_channels_within_wider_pixels_are_written_whatever_their_alignment(
    start: int, driver: native.Driver
) -> None:
    x = halo_in_nan(2, 4, 17, 32, torch.float16, driver.device)
    weight, bias = (make(torch.float16, driver.device) for make in makers(96, 32))
    wide = x.new_full((2, 4, 17, 112), float("nan"))
    causal_conv3d(x, weight, bias, wide[..., start : start + 96], driver)
    assert_like_reference(wide[..., start : start + 96], x, weight, bias)
    assert wide[..., :start].isnan().all() and wide[..., start + 96 :].isnan().all()


def test_sizes_of_one_may_have_any_stride(driver: native.Driver) -> None:
    x = halo_in_nan(1, 6, 1, 32, torch.float16, driver.device).contiguous()
    x = x.as_strided(x.shape, (x.stride(0), x.stride(1), 1, 1))
    weight = weight_of(96, 32, torch.float16, driver.device)
    assert_like_reference(causal_conv3d(x, weight, None, None, driver), x, weight, None)


def test_a_result_of_no_pixels_launches_nothing(library: Path) -> None:
    driver = EmulatedDriver(library)
    x, weight = torch.zeros(2, 4, 4, 32).half(), weight_of(96, 32, torch.float16, driver.device)
    assert causal_conv3d(x, weight, None, None, driver).shape == (0, 4, 4, 96)
    assert driver.launches == []


@torch.no_grad()
def test_a_decoder_asked_for_native_has_it_where_it_serves(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """192 and 96 channels are the kernel's; the first convolution and that over time are the reference's."""
    driver = EmulatedDriver(library)
    monkeypatch.setattr(convolution, "load_driver", lambda device: driver)
    config = VAEConfig(num_res_blocks=1, dim_mult=(1, 2), temporal_downsample=(True,))
    vae = WanVAE(config).eval()
    for index, parameter in enumerate(vae.parameters()):
        generator = torch.Generator().manual_seed(index)
        scale = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.data = (scale * torch.randn(parameter.shape, generator=generator)).half().float()
    latents = torch.randn(1, config.z_dim, 3, 2, 3, generator=torch.Generator().manual_seed(1)).half()
    exact, errors = vae.decode(latents.float()), []
    vae.half()
    for backend in ("reference", "native"):
        decoder = StreamingDecoder(vae, Ops({**REFERENCE_OPS.choice, "causal_conv3d": backend}))
        state = decoder.decoder_state(1, 2, 3, torch.float16, "cpu")
        video = torch.cat([decoder.decode(part, state) for part in latents.split([1, 2], 2)], 2)
        errors.append((video - exact).norm())
    kernels = [launch[0] for launch in driver.launches]
    assert {name: kernels.count(name) for name in kernels} == {
        "causal_conv3d_192_f16": 2 * 8, "causal_conv3d_96_f16": 2 * 4,
    }  # fmt: skip
    theirs, found = errors
    assert exact.abs().mean() > 0.05 and 0 < found <= 1.1 * theirs


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("frames", "height", "width", "channels"), [(12, 240, 416, 192), (12, 480, 832, 96), (9, 480, 832, 96)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_decoders_own_sizes(
    dtype: torch.dtype, frames: int, height: int, width: int, channels: int
) -> None:
    driver = device_driver()
    x = torch.randn(frames + 2, height, width, channels, device="cuda").to(dtype)
    weight, bias = (make(dtype, driver.device) for make in makers(channels, channels))
    out = causal_conv3d(x, weight, bias, None, driver)
    for rows in (slice(0, 40), slice(height - 40, height)):  # the reference needs far more memory
        part = x[:, max(rows.start - 1, 0) : rows.stop + 1]
        inner = slice(0, 40) if rows.start == 0 else slice(1, 41)
        expected = reference.causal_conv3d(part, weight, bias)[:, inner]
        truth = reference.causal_conv3d(part.double(), weight.double(), bias.double())[:, inner]
        assert_within_reference_error("out", out[:, rows], expected, truth)


@pytest.mark.gpu
def test_a_captured_launch_is_replayed_with_the_graph() -> None:
    driver = device_driver()
    x = halo_in_nan(3, 17, 18, 96, torch.float16, driver.device)
    weight = weight_of(96, 96, torch.float16, driver.device)
    out = causal_conv3d(x, weight, None, None, driver)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        causal_conv3d(x, weight, None, out, driver)
    x.copy_(x.flip(2))
    out.fill_(float("nan"))
    for _ in range(3):
        graph.replay()
    assert_like_reference(out, x, weight, None)


def test_a_launch_passes_maps_pointers_strides_and_sizes(library: Path) -> None:
    driver = EmulatedDriver(library, processors=7)
    x = torch.zeros(5, 17, 50, 64, dtype=torch.bfloat16)
    weight, bias = (make(torch.bfloat16, driver.device) for make in makers(192, 64))
    out = x.new_zeros(3, 2, 17, 50, 192)[:, 0]
    causal_conv3d(x, weight, bias, out, driver)
    ((kernel, grid, block, arguments, shared_bytes),) = driver.launches
    assert (kernel, grid, block, shared_bytes) == ("causal_conv3d_192_bf16", (7, 1), 384, 230_560)
    pixels = (128, 50 * 128, 17 * 50 * 128)
    assert arguments[:2] == (
        TensorMap(x.data_ptr(), torch.bfloat16, (64, 50, 17, 5), pixels, (64, 16, 10, 1), 128),
        TensorMap(weight.data_ptr(), torch.bfloat16, (27 * 64, 192), (27 * 64 * 2,), (64, 192), 128),
    )
    tiles = 2 * 3 * 4  # pairs of frames, rows of blocks, columns of blocks
    assert [argument.item() for argument in arguments[2:]] == [
        bias.data_ptr(), out.data_ptr(), *out.stride()[:3], 3, 17, 50, 64, 192, tiles,
    ]  # fmt: skip
    assert [argument.dtype.name for argument in arguments[2:]] == (
        ["uint64"] * 2 + ["int64"] * 3 + ["int32"] * 6
    )


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: str(tile.columns))
def test_the_tiles_are_those_of_the_kernel(tile: Tile, library: Path) -> None:
    sizes = EmulatedDriver(library).tile(f"causal_conv3d_{tile.columns}_f16")
    for name in ("columns", "chunk", "frames", "height", "width", "shared_bytes"):
        assert sizes[name] == getattr(tile, name), name


@pytest.mark.parametrize(("tile", "x_bytes", "weight_bytes"), [(TILES[1], 10.7, 8.0), (TILES[0], 5.9, 16.0)])
def test_a_block_asks_l2_for_as_many_bytes_a_cycle_as_its_header_says(
    tile: Tile, x_bytes: float, weight_bytes: float, library: Path
) -> None:
    driver = EmulatedDriver(library, processors=1)
    channels, pixels = 2 * tile.chunk, (tile.frames, tile.height, tile.width)
    x = torch.zeros(tile.frames + 2, tile.height, tile.width, channels).half()
    causal_conv3d(x, weight_of(tile.columns, channels, torch.float16, driver.device), None, None, driver)
    products = 27 * channels // 16 * (pixels[0] * pixels[1] * pixels[2] // 64)
    assert driver.counts[1] == products
    cycles = products * tile.columns // 2
    assert driver.counts[0] / cycles == pytest.approx(x_bytes + weight_bytes, abs=0.1)
    header = (Path(__file__).resolve().parents[2] / "csrc/causal_conv3d.cuh").read_text()
    numbers = rf"//\s+{tile.columns}\s+2 x {tile.height} x 16\s+{x_bytes:g} \+ {weight_bytes:g}\b"
    assert re.search(numbers, header)


def test_what_serves_how_many_channels() -> None:
    assert tile_of(96, 96) == tile_of(288, 32) == TILES[1]
    assert tile_of(192, 192) == tile_of(384, 384) == tile_of(192, 384) == TILES[0]
    assert tile_of(192, 96) == TILES[1]  # 96 channels in are no multiple of 64
    assert tile_of(3, 96) is tile_of(96, 48) is tile_of(128, 128) is None


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((96, 96, 3, 3, 3), torch.float32, "serves bfloat16 and float16, not torch.float32"),
        ((96, 96, 1, 3, 3), torch.float16, r"not a weight of \(96, 96, 1, 3, 3\)"),
        (
            (96, 16, 3, 3, 3),
            torch.float16,
            "a multiple of 32 to a multiple of 96 or a multiple of 64 to a mul",
        ),
        ((128, 96, 3, 3, 3), torch.float16, "channels from a multiple of 32"),
    ],
)
def test_what_is_not_served_has_a_reason_and_is_refused(
    shape: tuple[int, ...], dtype: torch.dtype, reason: str, library: Path
) -> None:
    assert re.search(reason, unserved(shape, dtype, torch.device("cpu")))
    driver = EmulatedDriver(library)
    x, weight = torch.zeros(4, 4, 4, shape[1]).to(dtype), torch.zeros(shape).to(dtype)
    with pytest.raises(ValueError, match=f"{reason}.*; use another backend"):
        causal_conv3d(x, weight, None, None, driver)
    assert driver.launches == []


def test_gpus_of_another_capability_are_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    for capability in ((8, 0), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, known=capability: known)
        reason = unserved((96, 96, 3, 3, 3), torch.float16, cuda)
        assert reason == (
            ""
            if capability == (9, 0)
            else "the native convolution is made for GPUs of capability 9.0, which cuda:0 is not"
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: (x, w.bfloat16(), b), "float16, weight torch.bfloat16 and bias torch.float16"),
        (lambda x, w, b: (x, w, b.float()), "bias torch.float32; they must be alike"),
        (lambda x, w, b: (x, w.contiguous(), b), "call contiguous.memory_format=torch.channels_last_3d."),
        (lambda x, w, b: (x, w, b.repeat(2)[::2]), "bias is .* it must be contiguous"),
        (lambda x, w, b: (x, w, b, x), "out is .* it must be torch.float16 .2, 4, 8, 96. with contiguous"),
        (lambda x, w, b: (x, w, b, x.new_zeros(2, 4, 8, 192)[..., ::2]), "out is .* contiguous channels"),
        (lambda x, w, b: (x.unflatten(3, (32, 2))[..., 0], half(w), b), "and that one 1: call contiguous"),
        (lambda x, w, b: (odd_strides(x), w, b), "all but the last must be multiples of 8"),
        (lambda x, w, b: (odd_start(x), w, b), "it must be a multiple of 16: call clone"),
    ],
)  # fmt: skip
def test_layouts_the_kernel_cannot_serve_are_refused(
    change: Callable[..., tuple[Tensor, ...]], message: str, library: Path
) -> None:
    driver = EmulatedDriver(library)
    x = torch.zeros(4, 4, 8, 64, dtype=torch.float16)
    weight, bias = (make(torch.float16, driver.device) for make in makers(96, 64))
    x, weight, bias, *out = change(x, weight, bias)
    with pytest.raises(ValueError, match=message):
        causal_conv3d(x, weight, bias, *(out or [None]), driver)
    assert driver.launches == []


def half(weight: Tensor) -> Tensor:
    return weight[:, :32].clone(memory_format=torch.channels_last_3d)


def odd_strides(x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:3], x.shape[3] + 4)[..., :-4]


def odd_start(x: Tensor) -> Tensor:
    return x.new_zeros(x.numel() + 4)[4:].view(x.shape)


def test_a_tensor_of_another_device_is_refused(library: Path) -> None:
    x = torch.zeros(4, 4, 8, 64, dtype=torch.float16, device="meta")
    weight = weight_of(96, 64, torch.float16, torch.device("meta"))
    with pytest.raises(ValueError, match="a tensor is on meta but the kernels on cpu"):
        causal_conv3d(x, weight, None, None, EmulatedDriver(library))


# The emulated device notices what is wrong.


def is_wrong(library: Path, tile: Tile, emulation: Emulation, **driver: object) -> str:
    """What the emulation says, or that the result is not the reference's; "" where all is right."""
    out, x, weight, bias = case(tile)
    try:
        causal_conv3d(x, weight, bias, out, EmulatedDriver(library, emulation, **driver))
        assert_like_reference(out, x, weight, bias)
    except RuntimeError as error:
        return str(error)
    except AssertionError:
        return "another result"
    return ""


def barriers(tile: Tile, library: Path) -> dict[str, tuple[int, int]]:
    """The ranges of barriers by name: four runs that follow each other in memory."""
    sizes = EmulatedDriver(library).tile(f"causal_conv3d_{tile.columns}_f16")
    slabs, taps = sizes["slabs"], sizes["taps"]
    ends = [0, slabs, 2 * slabs, 2 * slabs + taps, 2 * slabs + 2 * taps]
    names = ("slabs full", "slabs free", "taps full", "taps free")
    return {name: (ends[index], ends[index + 1]) for index, name in enumerate(names)}


both_tiles = pytest.mark.parametrize("tile", TILES, ids=lambda tile: str(tile.columns))


@both_tiles
@pytest.mark.parametrize("factor", ["first_xor", "second_xor"])
@pytest.mark.parametrize(
    "bits",
    [3 << 62, 1 << 62, 1 << 32, 1 << 36, 1 << 3, 1 << 6],
    ids=["other swizzle", "no or half swizzle", "16 bytes more", "half or more stride", "start", "far start"],
)
def test_a_wrong_descriptor_is_noticed(tile: Tile, factor: str, bits: int, library: Path) -> None:
    assert is_wrong(library, tile, Emulation(**{factor: bits}))


@both_tiles
@pytest.mark.parametrize("place", [0, 1], ids=["x", "weight"])
def test_a_wrong_swizzle_of_a_copy_is_noticed(tile: Tile, place: int, library: Path) -> None:
    def change(index: int, tensor_map: TensorMap) -> TensorMap:
        swizzle = 192 - 2 * tile.chunk  # 64 for 128 bytes and the other way round
        return replace(tensor_map, swizzle_bytes=swizzle) if index == place else tensor_map

    assert is_wrong(library, tile, Emulation(), change=change) == "another result"


@both_tiles
@pytest.mark.parametrize("name", ["slabs full", "taps full"])
def test_a_missing_wait_for_a_copy_is_noticed(tile: Tile, name: str, library: Path) -> None:
    lost = barriers(tile, library)[name]
    assert is_wrong(library, tile, Emulation(lost_waits=lost)) == "products of what a copy has not filled"


@both_tiles
def test_missing_waits_for_free_pieces_are_noticed(tile: Tile, library: Path) -> None:
    """Those of the ring that runs out first; the other ring's copies are held back by it."""
    lost = barriers(tile, library)["taps free" if tile.columns == 192 else "slabs free"]
    assert is_wrong(library, tile, Emulation(lost_waits=lost, late_copies=0))


@both_tiles
@pytest.mark.parametrize("name", ["slabs full", "taps full", "slabs free", "taps free"])
def test_a_wrong_parity_is_noticed(tile: Tile, name: str, library: Path) -> None:
    flipped = barriers(tile, library)[name]
    assert is_wrong(library, tile, Emulation(flipped_waits=flipped))


@both_tiles
@pytest.mark.parametrize("name", ["slabs full", "taps full", "slabs free", "taps free"])
def test_a_missing_arrival_is_a_deadlock(tile: Tile, name: str, library: Path) -> None:
    lost = barriers(tile, library)[name]
    assert is_wrong(library, tile, Emulation(lost_arrivals=lost)) == (
        "all threads wait and no copy is under way"
    )


@both_tiles
def test_pieces_given_back_before_their_products_are_done_are_noticed(tile: Tile, library: Path) -> None:
    problem = is_wrong(library, tile, Emulation(late_copies=0, lost_product_waits=1))
    assert problem == "a copy over what products under way read"


@both_tiles
def test_products_that_nothing_began_are_noticed(tile: Tile, library: Path) -> None:
    assert is_wrong(library, tile, Emulation(lost_begins=1)) == "products that nothing began"


def test_a_warp_that_does_not_wait_together_is_noticed(library: Path) -> None:
    """A lane that has not seen a phase when another gives the piece back, in some order of threads; with 192
    columns, whose taps run out first, a slab is never filled twice in that time."""
    emulations = [Emulation(late_copies=0, lost_warp_waits=1, seed=seed) for seed in range(4)]
    problems = {is_wrong(library, TILES[1], emulation) for emulation in emulations}
    assert "all threads wait and no copy is under way" in problems


@both_tiles
@pytest.mark.parametrize("bytes_", [16, -16])
def test_a_wrong_count_of_bytes_is_noticed(tile: Tile, bytes_: int, library: Path) -> None:
    problem = is_wrong(library, tile, Emulation(more_bytes=bytes_))
    assert problem in ("all threads wait and no copy is under way", "more bytes than a barrier expects")


@both_tiles
def test_the_unbroken_machine_finds_nothing(tile: Tile, library: Path) -> None:
    assert is_wrong(library, tile, Emulation()) == ""
