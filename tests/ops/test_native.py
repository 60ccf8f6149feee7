"""The native eviction, run on the processor, the loaders of native kernels, and their installation.

Without a GPU the thread functions of csrc/ are compiled for the host and run over the very grid and
arguments that rfengine/ops/native launches with; where there is one, the same tests run the fatbin itself.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from rfengine.ops import native, reference
from rfengine.ops.native import driver as native_driver
from rfengine.ops.native import eviction, tensor_map
from rfengine.ops.native.tensor_map import TensorMap

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
C_TYPES = {
    "uint64": ctypes.c_void_p,
    "int64": ctypes.c_longlong,
    "int32": ctypes.c_int,
    "float32": ctypes.c_float,
}


class RecordingDriver:
    """Records its launches."""

    processors = 1

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.launches: list[tuple[str, tuple[int, int], int, list[Any]]] = []

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int],
        block: int,
        arguments: tuple[Any, ...],
        shared_bytes: int = 0,
    ) -> None:
        assert shared_bytes == 0
        self.launches.append((kernel, grid, block, list(arguments)))


class HostDriver(RecordingDriver):
    """Runs its launches, one thread after the other, from a library of the same kernels."""

    def __init__(self, library: Path) -> None:
        super().__init__()
        self._library = ctypes.CDLL(str(library))

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int],
        block: int,
        arguments: tuple[Any, ...],
        shared_bytes: int = 0,
    ) -> None:
        super().launch(kernel, grid, block, arguments, shared_bytes)
        assert block == eviction.THREADS
        converted = [C_TYPES[argument.dtype.name](argument.item()) for argument in arguments]
        self._library[kernel](*map(ctypes.c_int, grid), *converted)


@pytest.fixture(scope="module")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc, which knows where the CUDA headers are")
    library = tmp_path_factory.mktemp("native") / "host.so"
    command = ["nvcc", "-x", "c++", "-std=c++17", "-O2", "-shared", "--cudart=none", "-I", str(ROOT / "csrc")]
    command += ["-Xcompiler", "-fPIC,-ffp-contract=off", str(ROOT / "tests/support/native_host.cpp")]
    subprocess.run([*command, "-o", str(library)], check=True)
    return library


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def driver(request: pytest.FixtureRequest) -> native.Driver:
    if request.param == "host":
        return HostDriver(request.getfixturevalue("host_library"))
    if native.absence():
        pytest.skip(native.absence())
    return native.load_driver()


def spread(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal values of very different sizes: some are subnormal in float16."""
    exponents = torch.rand(shape, generator=generator) * 8 - 6
    return (torch.randn(shape, generator=generator) * 10**exponents).to(dtype)


def state_of(
    dtype: torch.dtype, heads: int, head_dim: int, chunk: int, slots: int
) -> dict[str, Tensor | None]:
    """Two layers and two streams, in arenas with room behind the last slot: layers and streams lie apart."""
    generator = torch.Generator().manual_seed(7)
    shape = (2, 2, slots * chunk + 3, heads, head_dim)
    state = {name: spread(shape, dtype, generator)[:, :, :-3] for name in ("raw", "rotated", "values")}
    low = (2, 2, chunk, heads, head_dim)
    state |= {name: spread(low, dtype, generator) * 0.01 for name in ("low_keys", "low_values")}
    angles = torch.rand(slots * chunk, head_dim // 2, generator=generator) * 100
    return state | {"rotation": torch.stack((angles.cos(), angles.sin()))}


def on(state: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copies on a device, with their strides."""
    copies = {}
    for name, tensor in state.items():
        copies[name] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        copies[name].copy_(tensor)
    return copies


def plain(state: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Without split precision."""
    return state | {"low_keys": None, "low_values": None}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


@pytest.mark.parametrize("split", [True, False], ids=["split", "plain"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "head_dim", "chunk", "slots", "leaving_slot"),
    [(3, 64, 7, 3, 1), (3, 64, 7, 3, 2), (12, 128, 1, 3, 2), (5, 8, 63, 4, 2)],
)
def test_evict_and_rephase_is_the_reference_bit_for_bit(
    heads: int, head_dim: int, chunk: int, slots: int, leaving_slot: int,
    dtype: torch.dtype, split: bool, driver: native.Driver,
) -> None:  # fmt: skip
    state = state_of(dtype, heads, head_dim, chunk, slots)
    expected, actual = on(state, driver.device), on(state, driver.device)
    chosen = (lambda tensors: tensors) if split else plain
    integers = (chunk, leaving_slot * chunk, 0.999)
    reference.evict_and_rephase(*chosen(expected).values(), *integers)
    native.evict_and_rephase(*chosen(actual).values(), *integers, driver)
    for name, tensor in actual.items():
        assert torch.equal(bits(tensor), bits(expected[name])), name
    assert not torch.equal(actual["values"].cpu(), state["values"]), "the sink stood still"


@pytest.mark.gpu
def test_a_captured_launch_is_replayed_with_the_graph() -> None:
    if native.absence():
        pytest.skip(native.absence())
    state = on(state_of(torch.float32, heads=2, head_dim=8, chunk=2, slots=3), torch.device("cuda"))
    expected = on(state, torch.device("cuda"))
    native.evict_and_rephase(*on(state, torch.device("cuda")).values(), 2, 4, 0.999)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        native.evict_and_rephase(*state.values(), 2, 4, 0.999)
    graph.replay()
    reference.evict_and_rephase(*expected.values(), 2, 4, 0.999)
    assert all(torch.equal(bits(tensor), bits(expected[name])) for name, tensor in state.items())


def test_a_launch_passes_pointers_strides_sizes_and_factors() -> None:
    recorded = RecordingDriver()
    state = state_of(torch.bfloat16, heads=3, head_dim=64, chunk=7, slots=3)
    native.evict_and_rephase(*state.values(), 7, 14, 0.999, recorded)
    ((kernel, grid, block, arguments),) = recorded.launches
    raw, low = state["raw"], state["low_keys"]
    assert kernel == "evict_and_rephase_bf16"
    assert (grid, block) == ((1, 4), 256)  # 21 tokens of 8 columns; 2 layers of 2 streams
    assert [argument.item() for argument in arguments] == [
        *(tensor.data_ptr() for tensor in state.values()),
        raw.stride(0), raw.stride(1), low.stride(0), low.stride(1),
        2, 2, 21, 3, 64, 7, 14,
        numpy.float32(0.999), numpy.float32(1 - 0.999),
    ]  # fmt: skip
    kinds = [argument.dtype.name for argument in arguments]
    assert kinds == ["uint64"] * 6 + ["int64"] * 4 + ["int32"] * 7 + ["float32"] * 2


def test_without_split_precision_the_remainders_are_null() -> None:
    recorded = RecordingDriver()
    state = state_of(torch.float32, heads=1, head_dim=8, chunk=2, slots=3)
    native.evict_and_rephase(*plain(state).values(), 2, 2, 0.999, recorded)
    assert [argument.item() for argument in recorded.launches[0][3][3:5]] == [0, 0]


def test_a_large_window_is_launched_with_fewer_rows_than_layers() -> None:
    recorded = RecordingDriver()
    arena = torch.zeros(8, 1, 14040, 1, 128, dtype=torch.bfloat16)
    rotation = torch.zeros(2, 14040, 64)
    native.evict_and_rephase(arena, arena, arena, None, None, rotation, 4680, 4680, 0.999, recorded)
    assert recorded.launches[0][1] == (878, 5)


def test_a_grid_with_one_row_does_all_layers(driver: native.Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eviction, "TARGET_BLOCKS", 1)
    state = state_of(torch.float32, heads=2, head_dim=8, chunk=2, slots=3)
    expected, actual = on(state, driver.device), on(state, driver.device)
    reference.evict_and_rephase(*expected.values(), 2, 4, 0.999)
    native.evict_and_rephase(*actual.values(), 2, 4, 0.999, driver)
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name


ARENAS = ("raw", "rotated", "values")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"values": s["values"].float()}, "values is torch.float32"),
        (lambda s: {"rotated": s["rotated"][:, :, :-1]}, "rotated .* they must be alike"),
        (lambda s: {"rotation": s["rotation"].double()}, "rotation is torch.float64"),
        (lambda s: {"rotation": s["rotation"][:, :10]}, "contiguous float32"),
        (lambda s: {"low_keys": s["low_keys"][:, :, 1:]}, "they must be alike"),
        (
            lambda s: {name: s[name][:, :, 1:] for name in ("low_keys", "low_values")},
            "low_keys is .* it must be",
        ),
        (lambda s: {"low_keys": None}, "must both be given, or both be None"),
        (lambda s: {name: s[name][..., ::2] for name in ARENAS}, "must be contiguous"),
        (lambda s: {name: s[name].double() for name in ARENAS}, "serve bfloat16, float16 and float32"),
        (lambda s: {name: s[name][:, :, :20] for name in ARENAS}, "it lies from 7 to 13"),
        (lambda s: {name: s[name][..., :60].contiguous() for name in ARENAS}, "multiples of 8"),
    ],
)
def test_tensors_the_kernel_cannot_serve_are_refused(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor | None]], message: str
) -> None:
    state = state_of(torch.bfloat16, heads=3, head_dim=64, chunk=7, slots=3)
    recorded = RecordingDriver()
    with pytest.raises(ValueError, match=message):
        native.evict_and_rephase(*(state | change(state)).values(), 7, 14, 0.999, recorded)
    assert recorded.launches == []


def test_an_address_that_is_no_multiple_of_16_is_refused() -> None:
    arena = torch.zeros(1 + 3 * 8)[1:].view(1, 1, 3, 1, 8)
    with pytest.raises(ValueError, match="must be a multiple of 16"):
        native.evict_and_rephase(
            arena, arena, arena, None, None, torch.zeros(2, 3, 4), 1, 1, 0.999, RecordingDriver()
        )


def test_a_tensor_of_another_device_is_refused() -> None:
    state = on(state_of(torch.float32, heads=1, head_dim=8, chunk=2, slots=3), torch.device("meta"))
    with pytest.raises(ValueError, match="a tensor is on meta but the kernels on cpu"):
        native.evict_and_rephase(*state.values(), 2, 2, 0.999, RecordingDriver())


def test_absence_names_the_fatbin_then_the_device_then_the_loaders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert native.FATBIN == ROOT / "rfengine/_native.fatbin", "setup.py builds it there"
    fatbin = tmp_path / "some.fatbin"
    assert native.absence("cuda", fatbin) == (
        "some.fatbin is not built; install with RFENGINE_NATIVE=1 where cmake and nvcc are"
    )
    fatbin.touch()
    assert native.absence("cpu", fatbin) == "it runs on CUDA devices, not on cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert native.absence("cuda", fatbin) == "torch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in native_driver.LOADERS:
        monkeypatch.setitem(sys.modules, name, None)
    assert native.absence("cuda", fatbin).startswith("neither PyCUDA nor cuda.core can be used")
    core = ModuleType("cuda.core")
    core.experimental = ModuleType("cuda.core.experimental")  # an early version has all of it there alone
    monkeypatch.setitem(sys.modules, "cuda.core", core)
    early = "cuda.core of this version has no Device, ObjectCode.from_fatbin, Kernel.handle: install a later"
    assert early in native.absence("cuda", fatbin)
    core.Device = object
    core.ObjectCode = SimpleNamespace(from_fatbin=len)
    core.Kernel = object  # as of version 0.5, whose kernels have no handle
    assert "cuda.core of this version has no Kernel.handle: install" in native.absence("cuda", fatbin)
    core.Kernel = SimpleNamespace(handle=None)
    assert native.absence("cuda", fatbin) == ""


def test_a_launch_where_the_kernels_are_absent_says_why() -> None:
    with pytest.raises(RuntimeError, match="the native kernels cannot run: .*(not built|not on cpu)"):
        native.evict_and_rephase(*state_of(torch.float32, 1, 8, 2, 3).values(), 2, 2, 0.999)


class FakeStream:
    """A stream of torch's that keeps its orders in a common list."""

    def __init__(self, log: list[Any], handle: int) -> None:
        self.log, self.cuda_stream = log, handle

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(("wait", self.cuda_stream, other.cuda_stream))


def fake_torch(monkeypatch: pytest.MonkeyPatch, log: list[Any]) -> list[int]:
    """torch's current stream is the one whose handle is in the list that this returns; the GPU has 132
    multiprocessors."""
    current = [0]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream(log, current[0]))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: FakeStream(log, handle))
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return current


def fake_pycuda(monkeypatch: pytest.MonkeyPatch, log: list[Any]) -> None:
    class Function:
        def set_attribute(self, attribute: str, value: int) -> None:
            log.append((attribute, value))

        def prepare(self, kinds: list[Any]) -> Function:
            log.append(("prepare", [str(kind) for kind in kinds]))
            return self

        def prepared_async_call(
            self, grid: Any, block: Any, stream: Any, *arguments: Any, shared_size: int
        ) -> None:
            log.append(("launch", grid, block, stream and stream.handle, arguments, shared_size))

    context = SimpleNamespace(push=lambda: log.append("push"))
    made = iter(range(100, 200))
    cuda = ModuleType("pycuda.driver")
    cuda.init = lambda: None
    cuda.Device = lambda index: SimpleNamespace(retain_primary_context=lambda: context)
    cuda.Context = SimpleNamespace(pop=lambda: log.append("pop"))
    cuda.Stream = lambda flags: log.append(("stream", flags)) or SimpleNamespace(handle=next(made))
    cuda.function_attribute = SimpleNamespace(MAX_DYNAMIC_SHARED_SIZE_BYTES="most shared")
    cuda.module_from_buffer = lambda fatbin: (
        log.append(("load", fatbin)) or SimpleNamespace(get_function=lambda name: Function())
    )
    package = ModuleType("pycuda")
    package.driver = cuda
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", cuda)


def test_pycuda_joins_its_own_stream_to_a_side_stream_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    fake_pycuda(monkeypatch, log)
    current = fake_torch(monkeypatch, log)
    driver = native_driver.PyCudaDriver(b"fatbin", torch.device("cuda", 0))
    assert log == ["push", ("load", b"fatbin"), "pop"]
    assert driver.processors == 132
    arguments = (numpy.uint64(5), numpy.float32(0.5))
    driver.launch("kernel", (3, 2), 256, arguments)
    launch = ("launch", (3, 2, 1), (256, 1, 1))
    assert log[3:] == ["push", ("prepare", ["uint64", "float32"]), "pop"] + [
        "push", (*launch, None, arguments, 0), "pop"
    ]  # fmt: skip
    log.clear()
    current[0] = 7
    for _ in range(2):
        driver.launch("kernel", (3, 2), 256, arguments)
    steps = [entry for entry in log if entry not in ("push", "pop")]
    joined = [("wait", 100, 7), (*launch, 100, arguments, 0), ("wait", 7, 100)]
    assert steps == [("stream", 1), *joined, *joined]
    current[0] = 8
    log.clear()
    driver.launch("kernel", (3, 2), 256, arguments)
    assert ("wait", 101, 8) in log, "two streams of torch share one of PyCUDA"
    assert log.count("push") == log.count("pop")


MAP = TensorMap(4096, torch.float16, (96, 7, 5), (192, 1344), (32, 4, 2), 64)


class FakeLibrary:
    """libcuda: keeps the calls, encodes a tensor map as 128 times its rank, and names functions 50 more than
    their kernels. failure: what every call but these returns."""

    def __init__(self, log: list[Any], failure: int = 0) -> None:
        self.log, self.failure = log, failure

    def cuTensorMapEncodeTiled(self, place: Any, *rest: Any) -> int:  # noqa: N802
        assert place.value % 64 == 0
        kind, rank, address, sizes, strides, box, steps, *modes = rest
        lists = tuple(tuple(each) for each in (sizes, strides, box, steps))
        self.log.append(("encode", kind, address.value, *lists, tuple(modes)))
        ctypes.memset(place.value, rank.value, 128)
        return self.failure

    def cuKernelGetFunction(self, function: Any, kernel: Any) -> int:  # noqa: N802
        function._obj.value = kernel.value + 50
        return 0

    def cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> int:  # noqa: N802
        self.log.append(("attribute", function.value, attribute, value))
        return 0

    def cuLaunchKernel(self, function: Any, *rest: Any) -> int:  # noqa: N802
        *size, shared_bytes, stream, pointers, extra = rest
        widths = (128, 4) if len(pointers) == 2 else (4,)
        values = [ctypes.string_at(at, width) for at, width in zip(pointers, widths, strict=True)]
        assert extra is None
        self.log.append(("launch", function.value, tuple(size), shared_bytes, stream.value, values))
        return self.failure


def fake_library(monkeypatch: pytest.MonkeyPatch, log: list[Any], failure: int = 0) -> None:
    for module in (native_driver, tensor_map):
        monkeypatch.setattr(module, "driver_library", lambda: FakeLibrary(log, failure))


def test_pycuda_passes_tensor_maps_as_bytes_and_raises_the_limit_of_shared_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[Any] = []
    fake_pycuda(monkeypatch, log)
    fake_torch(monkeypatch, log)
    fake_library(monkeypatch, log)
    driver = native_driver.PyCudaDriver(b"fatbin", torch.device("cuda", 0))
    for _ in range(2):
        driver.launch("kernel", (3, 1), 384, (MAP, numpy.int32(6)), 200_000)
    steps = [entry for entry in log if entry not in ("push", "pop") and entry[0] not in ("load", "encode")]
    launch = ("launch", (3, 1, 1), (384, 1, 1), None, (b"\x03" * 128, numpy.int32(6)), 200_000)
    assert steps == [("most shared", 200_000), ("prepare", ["128s", "int32"]), launch, launch]


def fake_cuda_core(monkeypatch: pytest.MonkeyPatch, log: list[Any]) -> None:
    core = ModuleType("cuda.core")
    core.Device = lambda index: SimpleNamespace(set_current=lambda: log.append(("device", index)))
    handles = {"first": 7, "second": 8}
    core.ObjectCode = SimpleNamespace(
        from_fatbin=lambda fatbin, name: SimpleNamespace(
            get_kernel=lambda kernel: SimpleNamespace(handle=handles[kernel])
        )
    )
    package = ModuleType("cuda")
    package.core = core
    monkeypatch.setitem(sys.modules, "cuda", package)
    monkeypatch.setitem(sys.modules, "cuda.core", core)


def test_what_cuda_core_loads_is_launched_on_the_stream_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    fake_cuda_core(monkeypatch, log)
    current = fake_torch(monkeypatch, log)
    fake_library(monkeypatch, log)
    driver = native_driver.CudaCoreDriver(b"fatbin", torch.device("cuda", 1))
    assert driver.processors == 132
    for handle in (0, 9):
        current[0] = handle
        driver.launch("first", (3, 2), 256, (numpy.int32(1),))
    launch, one = ("launch", 57, (3, 2, 1, 256, 1, 1), 0), numpy.int32(1).tobytes()
    assert log == [*[("device", 1)] * 2, (*launch, 1, [one]), ("device", 1), (*launch, 9, [one])]
    log.clear()
    for _ in range(2):
        driver.launch("second", (5, 1), 384, (MAP, numpy.int32(1)), 200_000)
    steps = [entry for entry in log if entry[0] in ("attribute", "launch")]
    launch = ("launch", 58, (5, 1, 1, 384, 1, 1), 200_000, 9, [b"\x03" * 128, one])
    assert steps == [("attribute", 58, 8, 200_000), launch, launch]


def test_a_launch_that_the_driver_refuses_names_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda_core(monkeypatch, [])
    fake_torch(monkeypatch, [])
    fake_library(monkeypatch, [], failure=1)
    driver = native_driver.CudaCoreDriver(b"fatbin", torch.device("cuda", 1))
    with pytest.raises(RuntimeError, match="the driver refuses first with CUDA error 1; use another"):
        driver.launch("first", (3, 2), 256, (numpy.int32(1),))
    with pytest.raises(RuntimeError, match="the driver refuses TensorMap.* with CUDA error 1; use another"):
        MAP.encode()


def test_a_tensor_map_is_encoded_from_the_innermost_axis_out(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    fake_library(monkeypatch, log)
    x = torch.zeros(5, 3, 7, 64, dtype=torch.bfloat16)[1::2, :, 1:]
    mapped = TensorMap.of("x", x, (1, 2, 4, 64))
    assert mapped.encode() == b"\x04" * 128
    sizes, strides = (64, 6, 3, 2), (128, 7 * 128, 2 * 21 * 128)
    # bfloat16; no interleaving, swizzled over 128 bytes, fetched by 128 bytes, zeros outside
    assert log == [("encode", 9, x.data_ptr(), sizes, strides, (64, 4, 2, 1), (1,) * 4, (0, 3, 2, 0))]
    one = torch.zeros(4, 1, 1, 32, dtype=torch.float16).as_strided((4, 1, 1, 32), (32, 5, 3, 1))
    mapped = TensorMap.of("x", one, (1, 2, 4, 32))
    assert (mapped.strides, mapped.swizzle_bytes) == ((64, 64, 64), 64)


def run_setup(folder: Path, choice: str, *commands: str) -> subprocess.CompletedProcess[str]:
    """setup.py of a copy of the sources, on a machine with no tool at all."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "rfengine").mkdir()
    shutil.copy(ROOT / "rfengine/__init__.py", folder / "rfengine")
    environment = {**os.environ, "PATH": str(folder / "nowhere"), "RFENGINE_NATIVE": choice}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "setup.py", *commands]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("choice", "reason"), [("auto", "lacks cmake"), ("0", "RFENGINE_NATIVE is 0")])
def test_the_native_part_is_left_out_with_one_line_of_reason(
    tmp_path: Path, choice: str, reason: str
) -> None:
    done = run_setup(tmp_path, choice, "build_native")
    assert done.returncode == 0, done.stderr
    assert [reason in line for line in done.stdout.splitlines() if line.startswith("rfengine:")] == [True]


@pytest.mark.parametrize(
    ("choice", "message"),
    [("1", "this machine lacks cmake 3.19 or newer, make, nvcc"), ("yes", "'yes'; it must be auto")],
)
def test_setup_refuses_what_it_cannot_do(tmp_path: Path, choice: str, message: str) -> None:
    refused = run_setup(tmp_path, choice, "--name")
    assert refused.returncode != 0
    assert message in refused.stderr
