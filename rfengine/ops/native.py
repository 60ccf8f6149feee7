"""The kernels of csrc/: finds the fatbin, loads it through PyCUDA or cuda.core, launches on torch's stream.

Both loaders work on the primary context of the device, the one torch uses, so pointers of tensors are valid
as they are, and a launch is captured by a CUDA graph like any other once its kernel has run before. Importing
this needs torch alone. Shapes: L layers, B batch, S tokens, H heads, E head dim.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from rfengine.ops.checks import require

if TYPE_CHECKING:
    from numpy import generic

FATBIN = Path(__file__).parents[1] / "_native.fatbin"  # where CMakeLists.txt and setup.py put it
THREADS = 256  # of every block, as in csrc/scalars.cuh
VECTOR_BYTES = 16
# blocks of a launch: four waves of 8 blocks on each of 132 multiprocessors; unmeasured
TARGET_BLOCKS = 4096
MAX_GRID_Y = 65535
_SUFFIXES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
_LEGACY_STREAM = 1  # CU_STREAM_LEGACY: torch writes the same stream as 0
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no ordering with the default stream, as torch's own side streams


class Driver(Protocol):
    """Launches the kernels of the fatbin on one device."""

    device: torch.device

    def launch(self, kernel: str, grid: tuple[int, int], block: int, arguments: tuple[generic, ...]) -> None:
        """Queue a kernel on torch's current stream.

        arguments: numpy scalars, each of the width that the kernel declares.
        """


class PyCudaDriver:
    """Loads through PyCUDA.

    PyCUDA launches on its default stream or on streams it made, never on a foreign one. A launch that torch
    has on a side stream therefore goes to a stream of PyCUDA's that waits for torch's and is waited for; a
    capture follows these events, so that in a graph they cost nothing.
    """

    NEEDS = ("init", "Device", "Context", "Stream", "module_from_buffer")  # of the module in LOADERS

    def __init__(self, fatbin: bytes, device: torch.device) -> None:
        import pycuda.driver as cuda

        cuda.init()
        self.device = device
        self._cuda = cuda
        self._context = cuda.Device(device.index).retain_primary_context()
        self._module = self._in_context(lambda: cuda.module_from_buffer(fatbin))
        self._functions: dict[str, Any] = {}
        self._streams: dict[int, tuple[Any, torch.cuda.Stream]] = {}

    def _in_context(self, action: Callable[[], Any]) -> Any:
        """Keep our context on PyCUDA's own stack, one for each thread, only for as long as `action` runs."""
        self._context.push()
        try:
            return action()
        finally:
            self._cuda.Context.pop()

    def _function(self, kernel: str, arguments: tuple[generic, ...]) -> Any:
        if kernel not in self._functions:
            function = self._module.get_function(kernel)
            self._functions[kernel] = function.prepare([argument.dtype for argument in arguments])
        return self._functions[kernel]

    def _beside(self, current: torch.cuda.Stream) -> tuple[Any, torch.cuda.Stream]:
        """PyCUDA's stream for one of torch's; shared by two, it would carry one capture into another."""
        handle = current.cuda_stream
        if handle not in self._streams:
            own = self._in_context(lambda: self._cuda.Stream(_NON_BLOCKING))
            self._streams[handle] = own, torch.cuda.ExternalStream(own.handle, device=self.device)
        return self._streams[handle]

    def launch(self, kernel: str, grid: tuple[int, int], block: int, arguments: tuple[generic, ...]) -> None:
        function = self._in_context(lambda: self._function(kernel, arguments))
        current = torch.cuda.current_stream(self.device)

        def queue(stream: Any) -> None:
            self._in_context(
                lambda: function.prepared_async_call((*grid, 1), (block, 1, 1), stream, *arguments)
            )

        if not current.cuda_stream:
            queue(None)
            return
        own, seen_by_torch = self._beside(current)
        seen_by_torch.wait_stream(current)
        queue(own)
        current.wait_stream(seen_by_torch)


class CudaCoreDriver:
    """Loads through cuda.core, which launches on any stream."""

    NEEDS = ("Device", "LaunchConfig", "ObjectCode", "Stream", "launch")

    def __init__(self, fatbin: bytes, device: torch.device) -> None:
        from cuda.core import Device, LaunchConfig, ObjectCode, Stream, launch

        self.device = device
        self._device = Device(device.index)
        self._device.set_current()
        self._code = ObjectCode.from_fatbin(fatbin, name="rfengine")
        self._config, self._stream, self._launch = LaunchConfig, Stream.from_handle, launch
        self._kernels: dict[str, Any] = {}

    def launch(self, kernel: str, grid: tuple[int, int], block: int, arguments: tuple[generic, ...]) -> None:
        self._device.set_current()  # per thread
        if kernel not in self._kernels:
            self._kernels[kernel] = self._code.get_kernel(kernel)
        stream = self._stream(torch.cuda.current_stream(self.device).cuda_stream or _LEGACY_STREAM)
        self._launch(stream, self._config(grid=grid, block=block), self._kernels[kernel], *arguments)


# in the order of preference
LOADERS: dict[str, type[PyCudaDriver] | type[CudaCoreDriver]] = {
    "pycuda.driver": PyCudaDriver,
    "cuda.core": CudaCoreDriver,
}


def _loader() -> tuple[type[PyCudaDriver] | type[CudaCoreDriver] | None, str]:
    """The first loader that can be imported and has what is used of it, or None and why none can."""
    failures = []
    for module, driver in LOADERS.items():
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            failures.append(f"{module}: {error}")
            continue
        missing = [name for name in driver.NEEDS if not hasattr(found, name)]
        if not missing:
            return driver, ""
        failures.append(f"{module} of this version has no {', '.join(missing)}: install a later one")
    return None, "; ".join(failures)


def absence(device: torch.device | str = "cuda", fatbin: Path = FATBIN) -> str:
    """Why the native kernels cannot run on `device`, with the way out; "" where they can."""
    if not fatbin.is_file():
        return f"{fatbin.name} is not built; install with RFENGINE_NATIVE=1 where cmake and nvcc are"
    if torch.device(device).type != "cuda":
        return f"it runs on CUDA devices, not on {device}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    driver, failures = _loader()
    if driver is None:
        return (
            f"neither PyCUDA nor cuda.core can be used ({failures}); pip install cuda-core, or build "
            "PyCUDA from its source archive, for it has no wheel: CUDA_ROOT set, without cuRAND"
        )
    return ""


def load_driver(device: torch.device | str = "cuda") -> Driver:
    """The driver for a CUDA device, loaded once. Raises RuntimeError with the reason where it cannot be."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return _load(device)


@cache
def _load(device: torch.device) -> Driver:
    reason = absence(device)
    if reason:
        raise RuntimeError(f"the native kernels cannot run: {reason}")
    driver, _ = _loader()
    assert driver is not None, "absence() has tried it"
    return driver(FATBIN.read_bytes(), device)


def evict_and_rephase(
    raw: Tensor, rotated: Tensor, values: Tensor, low_keys: Tensor | None, low_values: Tensor | None,
    rotation: Tensor, sink_tokens: int, leaving: int, alpha: float, driver: Driver | None = None,
) -> None:  # fmt: skip
    """reference.evict_and_rephase in one launch, bit for bit.

    Raises ValueError for what its 16-byte accesses cannot serve: the last three axes of an arena must be
    contiguous, the arenas alike in shape, dtype and strides, their addresses multiples of 16 bytes.
    """
    driver = driver or load_driver(raw.device)
    suffix = _suffix(raw)
    layers, batch, tokens, heads, head_dim = _arena("raw", raw)
    for name, arena in (("rotated", rotated), ("values", values)):
        _check_alike("raw", raw, name, arena)
    require(
        0 < sink_tokens <= leaving <= tokens - sink_tokens,
        lambda: (
            f"the chunk that leaves starts at token {leaving}; it lies from {sink_tokens} to "
            f"{tokens - sink_tokens}"
        ),
    )
    expected = (2, tokens, head_dim // 2)
    require(
        rotation.shape == expected and rotation.dtype == torch.float32 and rotation.is_contiguous(),
        lambda: f"rotation is {_layout(rotation)}; it must be contiguous float32 {expected}",
    )
    low_strides = (0, 0)
    if low_keys is not None and low_values is not None:
        _check_alike("low_keys", low_keys, "low_values", low_values)
        expected = (layers, batch, sink_tokens, heads, head_dim)
        require(
            _arena("low_keys", low_keys) == expected and low_keys.dtype == raw.dtype,
            lambda: f"low_keys is {_layout(low_keys)}; it must be {raw.dtype} {expected}",
        )
        low_strides = low_keys.stride()[:2]
    else:
        require(low_keys is low_values, lambda: "low_keys and low_values must both be given, or both be None")
    tensors = (raw, rotated, values, low_keys, low_values, rotation)
    _check_addresses(driver, tensors)
    sizes = (layers, batch, tokens, heads, head_dim, sink_tokens, leaving)
    arguments = _arguments(tensors, (*raw.stride()[:2], *low_strides), sizes, (alpha, 1 - alpha))
    columns = head_dim * raw.element_size() // VECTOR_BYTES
    driver.launch(f"evict_and_rephase_{suffix}", _grid(tokens * columns, layers * batch), THREADS, arguments)


def _grid(threads: int, rows: int) -> tuple[int, int]:
    """Blocks for `threads` threads, and the rows that run side by side; a thread loops over the others."""
    blocks = -(-threads // THREADS)
    return blocks, max(1, min(rows, -(-TARGET_BLOCKS // blocks), MAX_GRID_Y))


def _arguments(
    tensors: tuple[Tensor | None, ...],
    strides: tuple[int, ...],
    sizes: tuple[int, ...],
    factors: tuple[float, ...],
) -> tuple[generic, ...]:
    """Every kernel's parameters: pointers, strides (int64), sizes (int32), factors (float32), in this
    order."""
    import numpy

    return (
        *(numpy.uint64(0 if tensor is None else tensor.data_ptr()) for tensor in tensors),
        *map(numpy.int64, strides),
        *map(numpy.int32, sizes),
        *map(numpy.float32, factors),
    )


def _layout(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"


def _check_alike(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    alike = (tensor.shape, tensor.dtype, tensor.stride()) == (other.shape, other.dtype, other.stride())
    require(
        alike, lambda: f"{other_name} is {_layout(other)} and {name} {_layout(tensor)}; they must be alike"
    )


def _suffix(tensor: Tensor) -> str:
    require(
        tensor.dtype in _SUFFIXES,
        lambda: f"the native kernels serve bfloat16, float16 and float32, not {tensor.dtype}",
    )
    return _SUFFIXES[tensor.dtype]


def _arena(name: str, arena: Tensor) -> torch.Size:
    require(arena.ndim == 5, lambda: f"{name} is {tuple(arena.shape)}; it must be [L, B, S, H, E]")
    heads, head_dim = arena.shape[3:]
    dense = arena.stride()[2:] == (heads * head_dim, head_dim, 1)
    require(dense, lambda: f"{name} is {_layout(arena)}; its last three axes must be contiguous")
    lanes = VECTOR_BYTES // arena.element_size()
    whole = head_dim % lanes == 0 and all(stride % lanes == 0 for stride in arena.stride()[:2])
    require(
        whole,
        lambda: (
            f"{name} is {_layout(arena)}; head dim and strides must be multiples of {lanes}, for 16-byte "
            "accesses"
        ),
    )
    return arena.shape


def _check_addresses(driver: Driver, tensors: tuple[Tensor | None, ...]) -> None:
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device != driver.device:
            raise ValueError(
                f"a tensor is on {tensor.device} but the kernels on {driver.device}; move it there"
            )
        if tensor.data_ptr() % VECTOR_BYTES:
            raise ValueError(
                f"a tensor starts at address {tensor.data_ptr()}; it must be a multiple of {VECTOR_BYTES}"
            )
